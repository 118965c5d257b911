"""What the system says of a process's memory."""

from __future__ import annotations

from pathlib import Path


def kib(what: str, pid: int | str = "self") -> int:
    """Return a line of a process's status in KiB: VmRSS is now, VmHWM the most ever; 0 if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{what}:")), 0)
