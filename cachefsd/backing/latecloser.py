"""Closing what is not needed any more, together with others."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from typing import Final

import trio

from cachefsd.backing import syscalls
from cachefsd.backing.workers import Workers

_CLOSE_AFTER_S: Final = 0.01


class LateCloser:
    """Closes descriptors in a thread, many at a time: to wake a thread costs more than to close."""

    def __init__(self, workers: Workers) -> None:
        self._workers: Final = workers
        self._unused: Final[deque[int]] = deque()
        """While there are any, there is a task or a job for them."""
        self._accessed: Final[set[int]] = set()
        """Those of them that are of files which have been read."""

    def close(self, fd: int, *, accessed: bool = False) -> None:
        """Close soon. ``accessed``: it is of a regular file that has been read, which its atime should say."""
        if accessed:
            self._accessed.add(fd)
        self._unused.append(fd)
        if len(self._unused) == 1:
            trio.lowlevel.spawn_system_task(self._close_soon)

    async def _close_soon(self) -> None:
        await trio.sleep(_CLOSE_AFTER_S)
        self._workers.post(self.close_all)

    def close_all(self) -> None:
        """Close what waits, in the calling thread."""
        # All of them first: one that comes to an empty queue posts a job of its own, and does not wait behind these.
        taken = []
        with suppress(IndexError):
            while True:
                taken.append(self._unused.popleft())
        for fd in taken:
            if fd in self._accessed:
                self._accessed.discard(fd)
                with suppress(OSError):  # nobody waits for a time of access
                    syscalls.access(fd)
            os.close(fd)
