"""Scripts for Slurm: their #SBATCH lines beside what their commands ask for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import configuration
from cluster import shell
from cluster.files import ClusterFile, commands, flag, number, whole
from cluster.problem import Problem

LEAST_WARNING_S = 60
OPTIONS = re.findall(
    r"[a-z-]+",
    """
    account array begin chdir comment constraint cpus-per-gpu cpus-per-task dependency distribution error
    exclude exclusive export gpu-bind gpus gpus-per-node gpus-per-task gres hint hold job-name
    kill-on-invalid-dep licenses mail-type mail-user mem mem-per-cpu mem-per-gpu mincpus nice nodelist nodes
    no-requeue ntasks ntasks-per-gpu ntasks-per-node open-mode output overcommit oversubscribe partition
    prefer priority qos quiet requeue reservation signal switches threads-per-core time time-min tmp verbose
    wait-all-nodes wckey
    """,
)
"""Those of sbatch that a search may want."""
NOT_WITH_SYMMETRIC_RUN = ("--head", "--node-ip-address", "--port", "--block")


def rules(file: ClusterFile, ray: str) -> Iterator[Problem]:
    """Check a script for sbatch."""
    if not file.text.startswith("#!"):
        yield Problem("line 1", "not the shell's name, so sbatch refuses it; write #!/bin/bash")
    if not re.search(r"^set -\w*e", file.text, re.M):
        yield Problem("set", "a command that fails goes unnoticed; write set -euo pipefail")
    for name in file.content:
        if name not in OPTIONS:
            yield Problem(f"--{name}", configuration.unknown_key(name, OPTIONS).problem)
    yield from _late_options(file)
    yield from _again(file)
    yield from _amounts(file)
    lines = commands(file.text)
    for words in lines:
        yield from _command(file, words, " ".join(words))
    for line in file.text.splitlines():
        if not line.lstrip().startswith("#"):
            yield from shell.installs(line, "pip install", ray)
    if not any(shell.results_folders(" ".join(words)) for words in lines) and "--runs" not in file.text:
        yield Problem("--out", "no command says where results go; name a folder that all nodes see")


def nodes(file: ClusterFile) -> int:
    """Return how many nodes the script gets."""
    return whole(file.content.get("nodes", "1").partition("-")[0], 1)


def tasks(file: ClusterFile) -> int:
    """Return how many tasks run on each."""
    options = file.content
    if "ntasks-per-node" in options:
        return whole(options["ntasks-per-node"], 1)
    return max(1, whole(options.get("ntasks"), 1) // nodes(file))


def gpus(file: ClusterFile) -> int:
    """Return how many GPUs each node has for it; `--gres=gpu:a100:4` and `--gpus-per-node=a100:4` are 4."""
    options = file.content
    if "gpus-per-node" in options:
        return whole(options["gpus-per-node"].rpartition(":")[2])
    if found := re.search(r"\bgpu(:\w+)?:(\d+)", options.get("gres", "")):
        return int(found[2])
    if "gpus-per-task" in options:
        return tasks(file) * whole(options["gpus-per-task"].rpartition(":")[2])
    return whole(options.get("gpus", "0").rpartition(":")[2]) // nodes(file)


def cpus(file: ClusterFile) -> int:
    """Return how many CPUs each node has for it."""
    return tasks(file) * whole(file.content.get("cpus-per-task"), 1)


def _late_options(file: ClusterFile) -> Iterator[Problem]:
    begun = False
    for row, line in enumerate(file.text.splitlines(), 1):
        begun = begun or bool(line.strip() and not line.startswith("#"))
        if begun and line.startswith("#SBATCH"):
            yield Problem(f"line {row}", f"{line} stands after a command, so Slurm does not read it; move it up")


def _again(file: ClusterFile) -> Iterator[Problem]:
    """Check that a script that is taken away is warned, and comes back."""
    options = file.content
    if "requeue" not in options or "no-requeue" in options:
        yield Problem("--requeue", "missing, so a job that is taken away does not come back; add #SBATCH --requeue")
    if options.get("open-mode") != "append":
        yield Problem("--open-mode", "not append, so its next start wipes the log; add #SBATCH --open-mode=append")
    limit_s = _seconds(options.get("time", ""))
    if limit_s is None:
        yield Problem("--time", f"got {options.get('time', 'nothing')!r}; write how long it may take, as 24:00:00")
    warned = re.fullmatch(r"B:(?:SIG)?([A-Z0-9]+)@(\d+)", options.get("signal", ""))
    if warned is None:
        came = options.get("signal", "nothing")
        yield Problem("--signal", f"got {came}, so the script hears nothing before its end; write B:USR1@180")
        return
    name, ahead_s = warned[1], int(warned[2])
    if ahead_s < LEAST_WARNING_S or (limit_s is not None and ahead_s >= limit_s):
        yield Problem("--signal", f"{ahead_s} s before the end; expected {LEAST_WARNING_S} s or more, less than --time")
    code = "\n".join(line for line in file.text.splitlines() if not line.lstrip().startswith("#"))
    if not re.search(rf"^\s*trap .*\b(SIG)?{name}\b", code, re.M):
        yield Problem("trap", f"nobody hears {name}, which then ends the script; add a trap that requeues")
    if "scontrol requeue" not in code:
        yield Problem("trap", 'nothing puts the job in the queue again; add scontrol requeue "$SLURM_JOB_ID"')
    if not re.search(r"^\s*wait\b", code, re.M) or not re.search(r"[^&]&\s*$", code, re.M):
        yield Problem("wait", "bash hears a signal between commands only; end the command with & and wait for it")


def _seconds(limit: str) -> int | None:
    """Return a time limit of Slurm's: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on."""
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = numbers if len(numbers) == 3 else [0, *numbers, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _amounts(file: ClusterFile) -> Iterator[Problem]:
    for option in ("nodes", "cpus-per-task", "ntasks-per-node"):
        if option in file.content and whole(file.content[option].partition("-")[0]) < 1:
            yield Problem(f"--{option}", f"got {file.content[option]!r}; expected a number, 1 or more")
    if gpus(file) < 1:
        yield Problem("--gpus-per-node", "no GPU is asked for; write how many each node has")


def _command(file: ClusterFile, words: Sequence[str], line: str) -> Iterator[Problem]:
    words = list(words)
    if "symmetric-run" in words:
        yield from _symmetric_run(file, words)
    exported = " ".join(re.findall(r"^\s*export .*", file.text, re.M))
    yield from shell.starts_ray(f"{exported} ; {line}" if "ray" in words else line, f"ray {_verb(words)}")
    if "predict" in words and "search" in words:
        yield from _predict(file, words)
    if "evaluate" in words and "workloads" in words and nodes(file) * gpus(file) > 1:
        asked = nodes(file) * gpus(file)
        yield Problem("--gpus-per-node", f"{asked} GPUs in all, but `workloads evaluate` uses one; ask for 1")
    for folder in shell.results_folders(line):
        if folder.startswith(("/tmp", "/dev/shm", "/scratch/local", "$TMPDIR", "$SLURM_TMPDIR")):
            yield Problem("--runs" if "--runs" in line else "--out", f"got {folder}, which goes with the node")


def _verb(words: list[str]) -> str:
    return next((after for before, after in itertools.pairwise(words) if before == "ray"), "")


def _symmetric_run(file: ClusterFile, words: list[str]) -> Iterator[Problem]:
    own = words[: words.index("--")] if "--" in words else words
    if "--" not in words:
        yield Problem("ray symmetric-run", "no `--` before the command that it runs; add it")
    for name in NOT_WITH_SYMMETRIC_RUN:
        if flag(own, name) is not None:
            yield Problem("ray symmetric-run", f"{name} is not taken there; leave it out")
    if "exclusive" not in file.content:
        yield Problem(
            "--exclusive", "missing: symmetric-run neither starts beside another Ray nor leaves it alive; add it"
        )
    if "srun" not in own:
        yield Problem("ray symmetric-run", "runs on the first node only; write srun before it")
    expected = {"--min-nodes": nodes(file), "--num-gpus": gpus(file), "--num-cpus": cpus(file)}
    for name, has in expected.items():
        given = flag(own, name)
        if given is None and name == "--min-nodes" and has > 1:
            yield Problem(name, f"missing, so the command begins on one node of {has}; write {name} {has}")
        elif given is not None and given.isdigit() and int(given) != has:
            yield Problem(name, f"got {given}, but the #SBATCH lines give {has}; make them equal")
    if tasks(file) != 1:
        yield Problem("--ntasks-per-node", f"{tasks(file)} tasks a node, each of which would start Ray; write 1")
    host = (flag(own, "--address") or "").rpartition(":")[0]
    if not host or (nodes(file) > 1 and host in shell.LOOPBACK):
        yield Problem("--address", f'got {host or "nothing"}; write the first node, as "$head:6379"')
    if nodes(file) > 1 and "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=" not in file.text:
        yield Problem("RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT", "not set, so nodes have 30 s to come; export 600")
    if "tune.py" in words and not re.search(r"\bRAY_ADDRESS=", file.text):
        yield Problem("RAY_ADDRESS", "not set, so tune.py starts a Ray of its own; write env RAY_ADDRESS=... before it")


def _predict(file: ClusterFile, words: list[str]) -> Iterator[Problem]:
    workers = whole(flag(words, "--workers"), 1)
    for each, name, has in (("--gpus-per-worker", "GPU", gpus(file)), ("--cpus-per-worker", "CPU", cpus(file))):
        amount = number(flag(words, each), 1 if name == "CPU" else 0)
        if workers * amount > has:
            came = f"{workers} workers x {amount:g} {name} = {workers * amount:g}, but a node has {has}"
            yield Problem("--workers", f"{came}; lower --workers or {each}, or ask for more")
        elif name == "GPU" and amount * workers < has:
            yield Problem("--gpus-per-node", f"asks for {has}, but the workers use {workers * amount:g}; ask for that")
    if nodes(file) > 1:
        yield Problem("--nodes", f"got {nodes(file)}, but `search predict` starts Ray on one; write 1")
