"""How many descriptors there are for what: those of users' files must never be missing for what is open already."""

from __future__ import annotations

import os
import resource
from typing import Final

_MOST_IN_RESERVE = 1024
_FOR_EACH_FILE = 2
"""One for its data, and one that leads to its inode when it has no name any more, or that writes its tail."""


class Descriptors:
    """The budget of this process, from its limit (RLIMIT_NOFILE) and what is open when this is made.

    A quarter is in reserve, for what is open for a moment only: requests, syncs, writeback.
    """

    def __init__(self) -> None:
        self.limit: Final = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        reserve = min(_MOST_IN_RESERVE, self.limit // 4)
        self._first_in_reserve: Final = self.limit - reserve
        fixed = len(os.listdir("/proc/self/fd"))
        self.most_files: Final = max(1, (self.limit - reserve - fixed) // _FOR_EACH_FILE)
        """So many files of users may be open at a time."""

    def in_reserve(self, fd: int) -> bool:
        """Whether a new descriptor is one of the reserve. The kernel takes the lowest number, so none below is free."""
        return fd >= self._first_in_reserve

    def short(self) -> bool:
        """Whether the next descriptor would be one of the reserve, or there is none."""
        try:
            fd = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError:
            return True
        os.close(fd)
        return self.in_reserve(fd)
