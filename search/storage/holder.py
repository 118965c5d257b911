"""Who holds a study, and how to ask for its end: a signal on the same machine, a file in its folder from another."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from search.record import StudyPaths

LOOK_S = 1.0
"""How often a driver looks for the file that asks it to stop."""
POLL_S = 0.1


@dataclass(frozen=True)
class Holder:
    """The process that writes a study, as its lease says."""

    pid: int
    host: str
    since: str
    born: str = ""
    """Tells the process from a later one with the same number: the machine's boot, and the process's start in it."""

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine that still runs."""
        return self.host == socket.gethostname() and self.born != "" and self.born == _born(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def lines() -> dict[str, Any]:
    """Return what this process writes into the lease that it takes."""
    pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": pid, "host": socket.gethostname(), "since": since, "born": _born(pid)}


def of(paths: StudyPaths) -> Holder | None:
    """Return who holds a study, without holding it."""
    try:
        with paths.lease.open() as file:
            if _is_free(file.fileno()):
                return None
            found = json.loads(file.read())
        return Holder(found["pid"], found["host"], found["since"], found.get("born", ""))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # it is just being written
        return Holder(0, "an unknown machine", "just now")


def named(host: str, pid: int, since: str) -> Holder:
    """Return a process that is known to run."""
    return Holder(pid, host, since, _born(pid) if host == socket.gethostname() else "")


def ask_to_stop(paths: StudyPaths, holder: Holder) -> Literal["signal", "file"]:
    """Ask the driver that holds a study to stop as at SIGTERM: it keeps everything, and the same command goes on."""
    if holder.is_here:
        with contextlib.suppress(PermissionError):  # of another user, who may share the folder
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(holder.pid, signal.SIGTERM)
            return "signal"
    paths.stop.touch()
    return "file"


def wait_until_free(paths: StudyPaths, timeout_s: float) -> bool:
    """Wait until nobody holds a study; return whether that came to pass."""
    until = time.monotonic() + timeout_s
    while of(paths) is not None:
        if time.monotonic() > until:
            return False
        time.sleep(POLL_S)
    return True


@contextlib.contextmanager
def attending(paths: StudyPaths) -> Iterator[None]:
    """Stop this process as SIGTERM does when somebody asks for it from elsewhere; an older request counts for nothing.

    In a thread of its own: a search waits in many places, and in each of them the signal reaches it.
    """
    paths.stop.unlink(missing_ok=True)
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(paths.stop, over), name="stop", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join(LOOK_S)


def _watch(request: Path, over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        if request.exists():
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def _born(pid: int) -> str:
    """Return when a process was started, in words that no clock changes; "" if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The second field is the command in brackets, and may hold spaces; the start is the 22nd.
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{boot} {after[19]}"
