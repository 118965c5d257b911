"""How one is trained: each module here is a workload, found by its name.

A workload is a module, here or anywhere importable, with

    class Config                                  frozen dataclass of everything that can be set; Config.debug() is
                                                  seconds on the CPU, Config.reference() the original system's values
    def metrics(config) -> dict[str, str]         what an epoch reports: name -> "max" or "min", whichever is better;
                                                  the first, never one of the training, chooses a run's best epoch
    def prepare(config) -> dict                   check the data and decode it once for this machine; returns the
                                                  manifest: {"sha256", "samples": {split: n}, "synthetic": bool,
                                                  "warnings": [...], ...}; raises segmentation.epoch.DataError
    def train(config, resume=None)                yield one segmentation.epoch.Epoch for each epoch; `resume` is a
                                                  checkpoint folder that one of its epochs saved
    def evaluate(checkpoint, split, out_dir,      score a checkpoint folder; returns segmentation.epoch.Evaluation;
                 changes=None)                    `changes` are values of its Config that are others now
    def predict(checkpoint, source, out_dir,      write a prediction for each image in a file or folder; returns paths
                changes=None)
    def inspect(config, out_dir)                  draw what the network will see; returns paths of the pictures

for the search of a learning rate and a table of the network's layers (`python -m workloads lr` and `describe`), if it
wants

    def parts(config) -> segmentation.training.Parts    what learns, and from what

and, for the checks of `python -m workloads sanity`, `parts` with `samples` (see below) and a `normalise`
(segmentation.normalisation.Normalise) in its Config; masks may be coarser than images

and, for prediction by several workers (`python -m search predict`), if it wants

    def sources(source) -> list[Path]             the files of a folder that `predict` takes, in its order
    def merge(out_dir, source) -> list[Path]      write what is about all images, once their predictions are there

and, for preparation by several workers (`python -m search prepare`), if its data take long to process

    def pieces(config) -> list[str]               the parts of the data, such as tiles, that are not processed yet
    def process(config, names) -> list[str]       process some of them, several processes at once; returns those that
                                                  were not done before; `prepare` finds them done

and, where its networks can be pruned, for `python -m workloads filters`

    def filters(checkpoint, out_dir,              look at a checkpoint's filters, and at those that values of `prune` in
                changes=None) -> list[Path]       `changes` would drop; returns paths

and, for `python -m workloads train`, if it wants

    def finish(folder) -> list[Path]              write what follows from a whole run; its folder holds best/ and last/

and, for what makes a checkpoint ready to use (`python -m workloads export` and `cost`), if it has a network

    def load(checkpoint, changes=None)            its Config, its network in evaluation, and its Normaliser
    def samples(config) -> (Samples, Splits)      the decoded data: what int8 is calibrated by and scored on
    def deployment(config) -> dict                if it wants: values of segmentation.deployment.onnx.Description that
                                                  follow from its Config, such as tile, resize, threshold, colours

Each makes `out_dir` if it is missing. `python -m workloads` is the way to use one without a search.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

CONTRACT = ("Config", "metrics", "prepare", "train", "evaluate", "predict", "inspect")


class WorkloadError(ValueError):
    """No such workload, or one that does not keep the contract."""


def names() -> list[str]:
    """Return the workloads that live in this package."""
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_") and not module.ispkg
    )


def load(name: str) -> ModuleType:
    """Return the workload's module: one of this package, or any importable dotted name.

    Raises:
        WorkloadError: naming the nearest workload, or what the module lacks.
    """
    target = name if "." in name else f"{__name__}.{name}"
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{target}.".startswith(f"{error.name}."):
            raise
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"here are {', '.join(names())}"
        raise WorkloadError(f"workload {name!r} not found; {hint}") from error
    missing = [member for member in CONTRACT if not hasattr(module, member)]
    if missing:
        raise WorkloadError(f"{target} is no workload: it lacks {', '.join(missing)}")
    return module
