"""One thing that is wrong with a cluster file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A line for a person: where, what came, what to do."""

    key: str
    """Dotted key, option or line."""
    text: str
    note: bool = False
    """Worth a look, but no fault of the file."""

    def line(self, file: object) -> str:
        """Return it as it is printed."""
        return f"{file}: {self.key}: {'note: ' if self.note else ''}{self.text}"
