"""Who decides: search spaces, the study, samplers, stopping rules, promotion; Ray Tune and Optuna, never a tensor."""

import os
import secrets
import sys

# Ray reads these when it is first imported. A Ray that we start ourselves is reachable from this machine only, with a
# token of its own instead of a file in the home folder. Where RAY_ADDRESS names a cluster, its owner has decided.
if "ray" not in sys.modules and "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
