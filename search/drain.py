"""Leaves a machine that the cluster is about to take away: a spot instance with its notice, a node that is drained."""

from __future__ import annotations

import time
from collections.abc import Collection

LOOK_S = 0.5
"""How often the cluster is asked."""
LEAVING = "its machine is being taken away"


class Leaving(RuntimeError):
    """The process ends itself between two epochs: its trial goes on elsewhere, from the checkpoint just written."""

    def __init__(self) -> None:
        super().__init__(LEAVING)


class Notice:
    """Knows whether the cluster has given notice of a machine; used in a process that Ray started."""

    def __init__(self) -> None:
        self._looked = 0.0

    def mind(self, nodes: Collection[str]) -> None:
        """Do nothing, as a rule.

        Args:
            nodes: ids of the machines that a trial runs on.
        Raises:
            Leaving: if one of them is about to go.
        """
        if (now := time.monotonic()) - self._looked < LOOK_S:
            return
        self._looked = now
        from ray._private.state import state

        if not state.get_draining_nodes().keys().isdisjoint(nodes):
            raise Leaving
