"""Waiting for slots while the cache is full."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import trio

from ..wakeup import Signal
from .dirtyqueue import DirtyQueue
from .slots import Slots


class Room:
    """Where those wait who find no slot."""

    def __init__(self, slots: Slots, queue: DirtyQueue, persist: Callable[[], Awaitable[None]], upkeep: Signal) -> None:
        """``upkeep`` is set when slots of files without names are wanted, too."""
        self.waiting = 0
        """How many wait."""
        self._slots = slots
        self._queue = queue
        self._persist = persist
        self._upkeep = upkeep

    async def wait(self, deadline: float) -> None:
        """Wait until slots may be had. OSError when ``deadline`` (loop time) passes first."""
        if self._slots.searching:
            await trio.lowlevel.checkpoint()  # and the search goes on
            return
        if self._slots.deferred and self._slots.unpersisted:
            await self._persist()
            return
        self._queue.press()
        self._upkeep.set()
        self.waiting += 1
        try:
            with trio.move_on_at(deadline) as scope:
                await self._slots.freed.wait()
        finally:
            self.waiting -= 1
        if scope.cancelled_caught:
            raise self._full_error()

    def _full_error(self) -> OSError:
        """Why a full cache does not empty: the backing's own error where it says one."""
        for file in self._queue:
            if file.error is not None:
                return OSError(file.error.errno, f"cache full, writeback fails: {file.error.strerror}")
        return OSError(errno.EIO, "cache full, and writeback has not freed a slot in time")
