"""Train, evaluate, predict, inspect, describe or export one configuration of a workload: no search, no Ray.

Results go to stdout, logs to stderr; the exit code is 0 when done, 1 when it failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import configuration
import durable
import workloads
from configuration import ConfigError
from segmentation.deployment import DeploymentError
from segmentation.epoch import DataError, Evaluation, NoFallError, NonFiniteError, SanityError
from workloads import WorkloadError, _comparison, _run
from workloads._run import RunError

logger = logging.getLogger("workloads")

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
SPLITS = ("train", "validation", "test")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    given = _parse(arguments)
    _log_to_stderr()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        given.run(given)
        sys.stdout.flush()
        return DONE
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        return _fail(_os_problem(error, given), BAD_INPUT)
    except (WorkloadError, ConfigError, DataError, DeploymentError, RunError) as error:
        return _fail(error, BAD_INPUT)
    except ValueError as error:
        if not _names_a_value(error, given.name):
            raise
        return _fail(error, BAD_INPUT)
    except (NonFiniteError, NoFallError, SanityError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; `train` goes on from its last whole epoch by --resume", INTERRUPTED)


def list_(given: argparse.Namespace) -> None:
    """Print the workloads, or what one of them can be told and what it reports."""
    if given.name is None:
        names = workloads.names()
        width = max(map(len, names))
        for name in names:
            print(f"{name:{width}}  {_sentence(name)}")
        return
    workload = workloads.load(given.name)
    config = configuration.build(workload.Config, _values(given))
    print(_help(workload, config))


def backbones(given: argparse.Namespace) -> None:
    """Print what encoders cost in UNet 3+: parameters, GMACs for one image, channels and strides of their levels."""
    from segmentation.networks import cost  # here, because PyTorch takes seconds that `list` need not pay

    names = list(dict.fromkeys([*cost.BACKBONES, *given.encoders]))
    width = max(map(len, ("backbone", *names)))
    try:
        rows = cost.backbones(names, size=given.size)
        print(f"{'backbone':{width}}  {'its parameters':>14}  {'of UNet 3+':>12}  {'GMACs':>8}  channels / strides")
        for row in rows:
            counts = f"{row.encoder_parameters:14,}  {row.parameters:12,}  {row.macs / 1e9:8.2f}"
            levels = " / ".join(" ".join(map(str, values)) for values in (row.channels, row.strides))
            print(f"{row.name:{width}}  {counts}  {levels}", flush=True)
    except ValueError as error:
        raise DataError(str(error)) from error


def train(given: argparse.Namespace) -> None:
    """Train one model and print the folder of its best checkpoint."""
    workload = workloads.load(given.name)
    if given.config is not None and given.flags:
        raise ConfigError("--config", "says what to train, and so do the flags after --; give one of the two")
    if given.config is not None:
        run = _begin_from_file(given, workload)
    elif given.flags:
        run = _begin_from_flags(given, workload)
    elif given.mode is not None:
        raise ConfigError("--mode", "belongs to --config FILE; without it write --set prune.mode=...")
    else:
        start = _run.go_on if given.resume else _run.begin
        run = start(_out(given), given.name, workload, _values(given), given.metric)
    print(_run.train(run))


def lr(given: argparse.Namespace) -> None:
    """Sweep the learning rate, draw the loss over it, and print what to search as a line for a search space."""
    workload = workloads.load(given.name)
    if not hasattr(workload, "parts"):
        raise WorkloadError(f"{given.name}: its learning rate cannot be swept, for it offers no `parts(config)`")
    from segmentation import lr_finder  # here, because PyTorch takes seconds that `list` need not pay

    config = _prepared(workload, given)
    found = lr_finder.find(config, workload.parts(config), steps=given.steps)
    path = lr_finder.draw(found, _out(given) / "lr.png")
    logger.info("%d steps up to lr %.1e, steepest fall at %.1e; see %s", *found.summary(), path)
    print(found.search_line())


def sanity(given: argparse.Namespace) -> None:
    """Check by three short trainings that data, network and loss are wired rightly; print what they show."""
    from workloads import _sanity  # here, because PyTorch takes seconds that `list` need not pay

    workload = workloads.load(given.name)
    _sanity.need(given.name, workload)
    config = _prepared(workload, given)
    found = _sanity.climb(workload, config, given.steps)
    path = _sanity.write(_out(given) / "sanity.json", given.name, config, found)
    print(_sanity.table(found))
    logger.info("%s", path)
    if failed := [f"{rung.name} failed; usually {rung.meaning}" for rung in found if not rung.passed]:
        raise SanityError(f"{given.name}: " + ".\n".join(failed))


def _begin_from_file(given: argparse.Namespace, workload: ModuleType) -> _run.Run:
    """Check a run of the values in a configuration file of the system that a workload reproduces."""
    if given.resume:
        raise RunError("--config: a run that goes on has its values with it; leave this out, and name its --out")
    original = _original(given.name, "read")
    if original is None:
        raise DataError(f"--config: {given.name} reads no other system's files; write its values by --set")
    told, changes = original.read(given.config, workload.Config), configuration.flatten(_values(given))
    values = original.resolved(told, changes, given.mode)
    try:
        config = configuration.build(workload.Config, values)
    except ConfigError as error:
        where = "" if error.key in changes else f"{given.config}: "
        raise ConfigError(f"{where}{error.key}", error.problem) from error
    if told.tracking:
        logger.warning("%s: W&B follows searches (section tracking); this run writes local files alone", given.config)
    reserved = given.out is None
    given.out = given.out or original.run_folder(told, original.name_of(config))
    try:
        run = _run.begin(given.out, given.name, workload, values, given.metric)
    except BaseException:
        if reserved:
            given.out.parent.rmdir()  # nothing has been written yet
        raise
    source = {"file": str(given.config), "sha256": told.sha256, "changes": changes, "mode": given.mode}
    return dataclasses.replace(run, record={**run.record, "source": source})


def _begin_from_flags(given: argparse.Namespace, workload: ModuleType) -> _run.Run:
    """Check a run of what the command line of the system that a workload reproduces says, after `--`."""
    if given.resume:
        raise RunError("--: a run that goes on has its values with it; leave the flags out, and name its --out")
    original = _original(given.name, "from_flags")
    if original is None:
        raise DataError(f"--: {given.name} reads no other system's flags; write its values by --set")
    told = original.from_flags(given.flags)
    given.out = given.out or told.out or _out(given)
    if told.tracking:
        logger.warning("--use_wandb: W&B follows searches (section tracking); this run writes local files alone")
    # The original's own files lie where its script put them.
    values = {**told.values, "out": str(given.out), **configuration.flatten(_values(given))}
    run = _run.begin(given.out, given.name, workload, values, given.metric)
    return dataclasses.replace(run, record={**run.record, "source": {"flags": given.flags}})


def _original(name: str, function: str) -> ModuleType | None:
    """Return what reads the files or flags of the system that a workload reproduces; None: nothing does."""
    package = f"{workloads.__name__}._{name}"
    if not (importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}.original")):
        return None
    found = importlib.import_module(f"{package}.original")
    return found if hasattr(found, function) else None


def evaluate(given: argparse.Namespace) -> None:
    """Score a checkpoint and print a table; figures and evaluation.json go to the output folder."""
    workload, checkpoint, out = workloads.load(given.name), _run.checkpoint(given.checkpoint), _out(given)
    if given.external and not hasattr(workload, "external"):
        raise DataError(f"--external: {given.name} does not score predictions of others; leave it out")
    evaluation = workload.evaluate(checkpoint, given.split, out, **_changes(given))
    _write_evaluation(out, given, evaluation, checkpoint=str(checkpoint))
    logger.info("%s on %s, %d groups; more in %s", checkpoint, given.split, len(evaluation.groups), out)
    print(_table(evaluation))
    if told := _beside_majority(evaluation):
        print(f"\n{told}")
    if not given.external:
        return
    others = {}
    for name, path in given.external:
        others[name] = workload.external(checkpoint, given.split, path, **_changes(given))
        _write_evaluation(out / "external" / name, given, others[name], source=str(path))
    lines = _comparison.lines({given.name: evaluation, **others}, workload.EXTERNAL)
    print(f"\n{_comparison.text(lines)}")
    logger.info("%s", _comparison.write(out / "comparison.csv", lines))


def _write_evaluation(out: Path, given: argparse.Namespace, evaluation: Evaluation, **source: str) -> None:
    content = {**source, "split": given.split, **dataclasses.asdict(evaluation)}
    durable.write_json(out / "evaluation.json", content)


def predict(given: argparse.Namespace) -> None:
    """Write a prediction for each image and print the paths."""
    workload = workloads.load(given.name)
    if not given.source.exists():
        raise DataError(f"{given.source}: no such file or folder")
    for path in workload.predict(_run.checkpoint(given.checkpoint), given.source, _out(given), **_changes(given)):
        print(path)


def inspect(given: argparse.Namespace) -> None:
    """Draw what the network will see and print the pictures' paths."""
    workload = workloads.load(given.name)
    for path in workload.inspect(_prepared(workload, given), _out(given)):
        print(path)


def describe(given: argparse.Namespace) -> None:
    """Print the layers of a workload's network: what each gives of a training image, and its parameters."""
    workload = workloads.load(given.name)
    if not hasattr(workload, "parts"):
        raise WorkloadError(f"{given.name}: its network cannot be described, for it offers no `parts(config)`")
    from segmentation.networks import summary  # here, because PyTorch takes seconds that `list` need not pay

    parts = workload.parts(_prepared(workload, given))
    image, *_ = next(iter(parts.train_batches(1)))
    print("\n".join(summary.lines(parts.model, *image.shape[1:])))


def export(given: argparse.Namespace) -> None:
    """Write a checkpoint's network as model.onnx, in int8 and as an engine where asked, and print the paths."""
    from workloads import _deploy  # here, because PyTorch takes seconds that `list` need not pay

    workload, checkpoint = workloads.load(given.name), _run.checkpoint(given.checkpoint)
    ready = _deploy.ready(given.name, workload, checkpoint, _values(given))
    wanted = {"int8": given.int8, "qat_steps": given.qat, "engine": given.tensorrt, "split": given.split}
    if given.beside:
        other = _run.checkpoint(given.beside)
        wanted["beside"] = _deploy.ready(given.name, workload, other, _values(given))
    written = _deploy.export(ready, _out(given), **wanted)
    for path in written:
        if path.suffix == ".md":
            logger.info("%s", path.read_text(encoding="utf-8"))
        print(path)


def cost(given: argparse.Namespace) -> None:
    """Print what a checkpoint's network costs: parameters, GMACs, latency, peak memory; cost.json says how counted."""
    from segmentation.deployment import measure
    from workloads import _deploy

    workload, checkpoint = workloads.load(given.name), _run.checkpoint(given.checkpoint)
    sizes = {"size": given.size, "threads": given.threads}
    found = _deploy.cost(given.name, workload, checkpoint, _values(given), **sizes)
    durable.write_json(_out(given) / "cost.json", {"costs": [each.to_dict() for each in found]})
    print("\n\n".join(measure.table(measure.rows(each)) for each in found))


def filters(given: argparse.Namespace) -> None:
    """Look at the filters of a checkpoint, and at those that values of `prune` would drop; print the files' paths."""
    workload = workloads.load(given.name)
    if not hasattr(workload, "filters"):
        raise DataError(
            f"{given.name}: its networks cannot be pruned; take a workload whose `list` shows prune.default"
        )
    for path in workload.filters(_run.checkpoint(given.checkpoint), _out(given), **_changes(given)):
        print(path)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workloads", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for function in (list_, train, lr, sanity, evaluate, predict, inspect, describe, filters, export, cost):
        name, text = function.__name__.rstrip("_"), function.__doc__
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=function)
        nargs = "?" if function is list_ else None
        command.add_argument("name", metavar="NAME", nargs=nargs, help="workload; `list` shows them")
        text = "value of the workload's Config; preset=NAME starts from one of its presets"
        if function in (evaluate, predict, filters, export, cost):
            text = "value of the Config that is another than in training, such as batch sizes, precision or data"
        if function is filters:
            text = "value of prune, such as prune.default=0.3, or one that is another than in training"
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
        if function in (evaluate, predict, filters, export, cost):
            text = "folder of a checkpoint, a model or a run"
            command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=text)
        if function not in (list_, describe):
            text = f"output folder (default: runs/NAME-{name})"
            command.add_argument("--out", type=Path, metavar="FOLDER", help=text)
    _add_own(commands.choices)
    _add_backbones(commands.add_parser("backbones", help=backbones.__doc__, description=backbones.__doc__))
    words = sys.argv[1:] if arguments is None else arguments
    # What another program's command line says is not for this parser to read.
    end = words.index("--") if words[:1] == [train.__name__] and "--" in words else len(words)
    given = parser.parse_args(words[:end])
    given.flags = words[end + 1 :]
    return given


def _add_own(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    text = "what chooses the best epoch (default: the first that `list NAME` shows)"
    commands["train"].add_argument("--metric", metavar="METRIC", help=text)
    commands["train"].add_argument("--resume", action="store_true", help="go on from the last whole epoch in --out")
    text = "training steps from the lowest rate to the highest (default: 100)"
    commands["lr"].add_argument("--steps", type=_whole(10, " of steps"), default=100, metavar="COUNT", help=text)
    text = "training steps on one batch at most, and a fifth of them on shuffled inputs (default: 1000)"
    commands["sanity"].add_argument("--steps", type=_whole(5, " of steps"), default=1000, metavar="COUNT", help=text)
    text = "start from a configuration file of the system that the workload reproduces; --set has the last word"
    commands["train"].add_argument("--config", metavar="FILE", type=Path, help=text)
    commands[
        "train"
    ].epilog = (
        "After -- come flags of the training script that the workload reproduces: train severstal -- --encoder resnet50"
    )
    text = "with --config and --set parent=FOLDER: what the pruned network begins with: none (or null), random, rewind"
    commands["train"].add_argument("--mode", "--reinitialize_weights", metavar="MODE", help=text)
    text = "what to score on (default: test)"
    commands["evaluate"].add_argument("--split", choices=SPLITS, default="test", help=text)
    text = "predictions of somebody else's, a folder or a file, to be scored beside the checkpoint; once or more"
    commands["evaluate"].add_argument(
        "--external", metavar="NAME=PATH", action="append", default=[], type=_named_path, help=text
    )
    commands["predict"].add_argument("source", metavar="IMAGES", type=Path, help="an image, or a folder of images")
    text = "write model_int8.onnx too, and what it loses and gains as quantisation.csv and .md"
    commands["export"].add_argument("--int8", action="store_true", help=text)
    text = "steps of quantisation-aware training for model_int8_qat.onnx; implies --int8"
    commands["export"].add_argument("--qat", type=_whole(1), default=0, metavar="STEPS", help=text)
    text = "build an engine on this machine's GPU too (default: fp16)"
    precisions = ("fp32", "fp16", "int8")
    commands["export"].add_argument("--tensorrt", nargs="?", const="fp16", choices=precisions, help=text)
    text = "what int8 is scored on (default: test); calibration images are of the training split"
    commands["export"].add_argument("--split", choices=SPLITS, default="test", help=text)
    text = "another checkpoint for the table of int8, such as the parent of a pruned one"
    commands["export"].add_argument("--beside", type=Path, metavar="CHECKPOINT", help=text)
    text = "side of a square image in pixels (default: as the workload's samples)"
    commands["cost"].add_argument("--size", type=_whole(1, " of pixels"), metavar="PIXELS", help=text)
    text = "threads of the CPU (default: 1)"
    commands["cost"].add_argument("--threads", type=_whole(1), default=1, metavar="THREADS", help=text)


def _add_backbones(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=backbones, name=None)
    text = "a timm encoder to show beside the ten that are always shown"
    command.add_argument("encoders", metavar="ENCODER", nargs="*", help=text)
    text = "side of the image that GMACs are counted for, in pixels (default: 512)"
    command.add_argument("--size", type=_whole(1, " of pixels"), default=512, metavar="PIXELS", help=text)


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (equals and path and re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name)):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected NAME=PATH, such as sam2=predictions/")
    return name, Path(path)


def _whole(least: int, of: str = "") -> Callable[[str], int]:
    """Return what reads a whole number of something, at least so many, from a command line."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number{of}, at least {least}")
        return int(text)

    return read


def _values(given: argparse.Namespace) -> dict[str, Any]:
    return dict(map(configuration.parse_assignment, given.set))


def _prepared(workload: ModuleType, given: argparse.Namespace) -> Any:
    """Return the configuration that was asked for, once its data is ready; say what there is to warn of."""
    config = configuration.build(workload.Config, _values(given))
    for warning in workload.prepare(config)["warnings"]:
        logger.warning("%s", warning)
    return config


def _changes(given: argparse.Namespace) -> dict[str, Any]:
    """Return what evaluate and predict are told beyond the checkpoint: nothing, so that they need not take it."""
    return {"changes": configuration.flatten(_values(given))} if given.set else {}


def _out(given: argparse.Namespace) -> Path:
    out: Path = given.out or Path("runs") / f"{given.name}-{given.command}"
    return out


def _os_problem(error: OSError, given: argparse.Namespace) -> str:
    if not error.filename:
        return str(error)
    inside = "out" in given and Path(error.filename).absolute().is_relative_to(_out(given).absolute())
    remedy = "; write to another folder by --out" if inside else ""
    return f"{error.filename}: {error.strerror}{remedy}"


def _sentence(name: str) -> str:
    """Return the first sentence of a workload's docstring; read, not imported, which is a hundred times quicker."""
    spec = importlib.util.find_spec(f"{workloads.__name__}.{name}")
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _help(workload: ModuleType, config: Any) -> str:
    values, known = configuration.to_values(config), configuration.fields(workload.Config)
    lines = [(workload.__doc__ or "").strip(), "", "values, as --set KEY=VALUE or in a search space:"]
    for name, field in known.items():
        kind = configuration.type_name(field.annotation)
        if name.endswith(configuration.OPEN):
            lines.append(f"  {name}  ({kind}; any name)")
        else:
            both = (values[name], field.default)
            value, default = (json.dumps(durable.plain(one), ensure_ascii=False) for one in both)
            lines.append(f"  {name} = {value}  ({kind}; default {default})")
        lines += [f"      {line}" for line in field.help.splitlines()]
    lines += ["", f"presets, as --set preset=NAME: {', '.join(configuration.presets(workload.Config))}"]
    lines += ["", "metrics, the first of which chooses the best epoch:"]
    reported = workload.metrics(config)
    width = max(map(len, reported))
    return "\n".join([*lines, *(f"  {name:{width}}  {mode}" for name, mode in reported.items())])


def _table(evaluation: Evaluation) -> str:
    rows = [("metric", "score", "95 % interval")]
    for name, score in evaluation.metrics.items():
        low, high = evaluation.intervals.get(name, (None, None))
        interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        rows.append((name, "undefined" if score is None else f"{score:.4f}", interval))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:{first}}  {score:>{second}}  {interval}".rstrip() for name, score, interval in rows)


def _beside_majority(evaluation: Evaluation, name: str = "mean_iou") -> str:
    """Say how a score stands beside that of calling everything the most frequent class; "" where not known."""
    from segmentation import bootstrap

    drawn = [evaluation.resamples.get(each) for each in (name, f"{name}_majority")]
    if drawn[0] is None or drawn[1] is None:
        return ""
    gap = bootstrap.paired_difference(drawn[0], drawn[1])
    word = "better than" if gap.low > 0 else "worse than" if gap.high < 0 else "not distinguishable from"
    score, blind = evaluation.metrics[name], evaluation.metrics[f"{name}_majority"]
    return (
        f"{word} calling everything {evaluation.details['majority']}: {name} {score:.4f} against {blind:.4f}, "
        f"95 % interval of the difference {gap.low:+.4f} to {gap.high:+.4f}"
    )


def _names_a_value(error: ValueError, workload: str | None) -> bool:
    """Return whether an error is about a value of the configuration: `device: got ...`. Others are mistakes of ours.

    A part names its values without its own name: `encoder: timm has no model ...`.
    """
    known = configuration.fields(workloads.load(workload).Config) if workload else {}
    name = str(error).partition(": ")[0]
    return any(f".{field}".endswith(f".{name}") for field in known)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Once())
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


class _Once(logging.Filter):
    """Let each warning pass once: a workload may log one that its manifest lists too."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is new, or no warning."""
        text = record.getMessage()
        new = record.levelno < logging.WARNING or text not in self.said
        self.said.add(text)
        return new


def _fail(problem: object, code: int) -> int:
    print(f"python -m workloads: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
