"""Many names in one line of an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LISTED = 5


def listed(values: Sequence[Any]) -> str:
    """Return the first few, and how many more there are."""
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return ", ".join(map(str, values[:LISTED])) + more
