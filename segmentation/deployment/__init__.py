"""Networks ready to use: what one costs, as an ONNX file with all that its user has to know, in int8, as an engine.

Every function takes a network in evaluation, full or pruned: a pruned one is a module whose layers have fewer channels.
`onnx`, `onnxscript` and `onnxruntime` are the optional extra `onnx`; only the functions that need them import them.
"""

from __future__ import annotations

import importlib.util

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class DeploymentError(ValueError):
    """A network or file that cannot be exported, or a tool for it that is missing; the message says what to do."""


def require(*packages: str) -> None:
    """Raise DeploymentError, naming the extra, if one of the packages of the extra `onnx` is not installed."""
    missing = [name for name in packages or PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DeploymentError(
            f"{', '.join(missing)} not installed; pip install 'segmentation-search[onnx]' for export and int8"
        )
