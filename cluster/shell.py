"""What the commands in a cluster file give away, leave open or ask for in vain."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.files import commands, flag, mapping, number
from cluster.problem import Problem

DRIVER = "driver"
"""The resource of a head that each search's driver takes one of."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
IMAGE = re.compile(r"(?P<name>[^@]*?)(:(?P<tag>[\w.-]+))?(@sha256:[0-9a-f]{64})?")


def starts_ray(command: str, key: str) -> Iterator[Problem]:
    """Check a command that starts Ray on a node, or stops it."""
    words = command.split()
    if re.search(r"\bray (start|symmetric-run)\b", command) and not _asks_for_token(command):
        yield Problem(key, "starts Ray without a token, for anyone to use; write RAY_AUTH_MODE=token before `ray`")
    host = flag(words, "--dashboard-host")
    if host is not None and host not in LOOPBACK:
        yield Problem(key, f"--dashboard-host {host} opens the dashboard to others; leave it out and forward port 8265")
    if re.search(r"\bray stop\b.*(--force|-f)\b", command):
        yield Problem(key, "`ray stop --force` kills everyone's Ray on the machine, unsaved; write `ray stop`")
    if re.search(r"\b(pkill|killall)\b", command):
        yield Problem(key, "kills by name, other people's processes too; write `ray stop`")


def _asks_for_token(command: str) -> bool:
    modes = re.findall(r"\bRAY_AUTH_MODE=[\"']?(\w*)", command)
    return bool(modes) and modes[-1] == "token"


def installs(command: str, key: str, ray: str) -> Iterator[Problem]:
    """Check that a command installs what was tested, if it installs anything."""
    for asked in re.findall(r"\bpip3? install\b([^;&|]*)", command):
        given = [word.strip("\"'") for word in asked.split("#")[0].split()]
        for name in (word for word in given if re.match(r"ray\b(?!-)", word)):
            version = re.search(r"==([\w.]+)", name)
            if version and version[1] != ray:
                yield Problem(key, f"Ray {version[1]}, but requirements.lock has {ray}; write ray=={ray}")
        from_file = [after for before, after in itertools.pairwise(given) if before in ("-r", "-c")]
        loose = [word for word in given if not word.startswith("-") and word not in from_file and not _is_pinned(word)]
        if loose:
            yield Problem(
                key, f"installs {', '.join(loose)} in any version; write NAME==VERSION or -r requirements.lock"
            )
        if from_file and "--require-hashes" not in given:
            yield Problem(key, "installs a list without its hashes; add --require-hashes")


def _is_pinned(requirement: str) -> bool:
    return bool(re.fullmatch(r"[\w.\[\],-]+==[\w.!+]+", requirement))


def image(name: Any, key: str, ray: str) -> Iterator[Problem]:
    """Check that an image is one certain version, and Ray's that of the lock."""
    found = IMAGE.fullmatch(str(name))
    tag = found and found["tag"]
    if not tag and "@sha256:" not in str(name):
        yield Problem(key, f"got {name!r}, which is whatever is newest; write a version after the colon")
    elif tag and re.match(r"(latest|nightly|main|master|stable)\b", tag):
        yield Problem(key, f"got {name!r}, which changes under you; write a version after the colon")
    elif found and found["name"].endswith("rayproject/ray") and tag and not re.match(rf"{re.escape(ray)}-py311", tag):
        came = f"got {tag}, but requirements.lock is of Ray {ray} and Python 3.11"
        yield Problem(key, f"{came}; write {ray}-py311-gpu or -cpu")


def job_flags(text: str) -> Iterator[Problem]:
    """Check each `ray job submit`, also those in comments, which people type."""
    for words in commands(re.sub(r"^#+ ?", "", text, flags=re.M)):
        line = " ".join(words)
        if "ray job submit " not in f"{line} ":
            continue
        if number(flag(words, "--entrypoint-num-gpus"), 0) > 0:
            yield Problem("--entrypoint-num-gpus", "a driver computes nothing and would hold a GPU; write 0")
        if "tune.py" in words and flag(words, "--runs") is None:
            yield Problem("--runs", "not given, so results go with the head; name a folder that all nodes see")
        if "tune.py" in words:
            yield from needs_driver(flag(words, "--entrypoint-resources"), "--entrypoint-resources")


def needs_driver(given: Any, key: str, has: int | None = None) -> Iterator[Problem]:
    """Check that a job asks for the resource that only the head has."""
    wanted = mapping(_json(given)).get(DRIVER, 0)
    if not isinstance(wanted, int | float) or wanted <= 0:
        what = "nothing" if given is None else repr(given)
        yield Problem(key, f"got {what}, so the driver may run on spot; write '{{\"{DRIVER}\": 1}}'")
    elif has is not None and wanted > has:
        yield Problem(key, f"asks for {wanted} {DRIVER}, but the head has {has}; the job would wait for ever: write 1")


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None


def resources(text: Any) -> Mapping[str, Any]:
    """Return what a `--resources` flag gives, however many quotes stand around it."""
    found = _json(text)
    if isinstance(found, str):
        found = _json(found)
    if found is None and isinstance(text, str):
        found = _json(text.strip("'\"").replace('\\"', '"'))
    return mapping(found)


def results_folders(text: str) -> list[str]:
    """Return where the commands write results: the values of --runs and --out, also in comments."""
    found = re.findall(r"--(?:runs|out)[ =](\S+)", text)
    return [each.strip("\"'").replace('"', "") for each in found]
