"""Syncs of the whole backing, counted, for whoever needs one that began after some moment."""

from __future__ import annotations

from ..backing.ports import Backing
from .stats import Statistics


class Syncs:
    """All syncs of one backing."""

    def __init__(self, backing: Backing, stats: Statistics) -> None:
        self.begun = 0
        """How many have begun."""
        self.done = 0
        """The number of the last one that was good."""
        self.written = 0
        """How much had been written back when the last good one of them began, in bytes."""
        self._backing = backing
        self._stats = stats

    async def sync_all(self) -> None:
        """Make the whole backing durable, names included.

        :raises OSError: from the backing.
        """
        self.begun += 1
        number, written = self.begun, self._stats.writeback.bytes
        await self._backing.sync_all()
        self.written = max(self.written, written)
        self.done = max(self.done, number)
