"""What was measured, when and on what machine, and the README's table made of it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import benchmarks
import durable

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
TABLE = re.compile(r"(<!-- figures.*?-->\n).*?(<!-- /figures -->)", re.S)
HEAD = ["| what | measured | against | command |", "| --- | --- | --- | --- |"]


def machine() -> dict[str, Any]:
    """Return what figures depend on besides the code: the machine, and how busy it was before."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.M)
    return {
        "cpu": model[1] if model else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load": round(os.getloadavg()[0], 2),
    }


def store(name: str, result: Mapping[str, Any], measured_on: Mapping[str, Any]) -> None:
    """Keep one result with its date and machine."""
    content = {"result": dict(result), "date": time.strftime("%Y-%m-%d"), "machine": dict(measured_on)}
    durable.write_json(FOLDER / f"{name}.json", content)


def stored() -> dict[str, dict[str, Any]]:
    """Return what is kept, by the names of the benchmarks."""
    known = {name: FOLDER / f"{name}.json" for name in benchmarks.names()}
    return {name: durable.read_json(path) for name, path in known.items() if path.is_file()}


def update_readme() -> None:
    """Write the README's table anew from what is kept."""
    README.write_text(with_table(README.read_text(encoding="utf-8"), stored()), encoding="utf-8")


def with_table(text: str, kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a README's text with the table made of these results between its two markers."""
    lines = [*HEAD]
    for name, content in kept.items():
        for what, measured, against in benchmarks.load(name).figures(content["result"]):
            lines.append(f"| {what} | {measured} | {against} | `python -m benchmarks {name}` |")
    places = list(dict.fromkeys(_place(content) for content in kept.values()))
    after = ["", f"Measured {'; '.join(places)}."] if places else []
    return TABLE.sub(lambda found: found[1] + "\n" + "\n".join([*lines, *after]) + "\n" + found[2], text)


def _place(content: Mapping[str, Any]) -> str:
    on = content["machine"]
    return f"{content['date']} on {on['cores']} cores ({on['cpu']}), {on['memory_gib']} GiB"
