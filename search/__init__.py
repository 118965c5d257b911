"""Who decides: search spaces, the study, samplers, stopping rules, promotion; Ray Tune and Optuna, never a tensor."""

import os
import sys

from search import ray_token

if "ray" not in sys.modules:
    ray_token.prepare(os.environ)
