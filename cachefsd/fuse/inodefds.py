"""The descriptors by which the backing's inodes are reached: which stay open, and how one is opened again."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from cachefsd.backing.descriptors import Descriptors
from cachefsd.backing.tree import Tree
from cachefsd.fuse.inode import Inode

_MAX_DESCRIPTORS = 65536  # each pins an inode of the backing, 1 KiB or so of kernel memory


class InodeDescriptors:
    """O_PATH descriptors of inodes, as many as the process may have; an operation keeps the one that it uses."""

    def __init__(self, tree: Tree, unpinned: Callable[[Inode], None]) -> None:
        """``unpinned`` is called when the last operation that used an inode has ended."""
        self._tree: Final = tree
        self._unpinned: Final = unpinned
        self.budget: Final = Descriptors()
        self._max_open = max(16, min(_MAX_DESCRIPTORS, self.budget.limit // 2))
        self._open: dict[Inode, None] = {}
        """Inodes with a descriptor of their own, the one that was used longest ago first."""

    @asynccontextmanager
    async def using(self, inode: Inode) -> AsyncIterator[int]:
        """The inode's O_PATH descriptor, kept open until the end of the block.

        :raises OSError: ESTALE when the inode is no more.
        """
        inode.pins += 1
        try:
            if inode.fd < 0:
                self.take(inode, await self._reopen(inode))
            elif inode in self._open:
                del self._open[inode]
                self._open[inode] = None
            yield inode.fd
        finally:
            inode.pins -= 1
            if not inode.pins:
                self._unpinned(inode)

    def take(self, inode: Inode, fd: int) -> None:
        """Make ``fd`` the inode's descriptor unless it has one; -1 is none."""
        if fd < 0:
            return
        if inode.fd >= 0:
            os.close(fd)  # not the last one, so there is nothing to wait for
            return
        inode.fd = fd
        self._open[inode] = None
        if len(self._open) > self._max_open or self.budget.in_reserve(fd):
            self.close_some()

    def close_some(self) -> None:
        """Close the descriptors not used for longest, but for what could not be opened again: an eighth, or more."""
        if not self._tree.can_reopen:
            return
        surplus = max(len(self._open) // 8 + 1, len(self._open) - self._max_open * 7 // 8)
        idle = [inode for inode in self._open if not inode.pins and inode.stat.st_nlink]
        for inode in idle[:surplus]:
            self.close(inode)

    def close(self, inode: Inode) -> None:
        """Close the descriptor of an inode that no operation uses. :meth:`using` opens it again."""
        self._open.pop(inode, None)
        self._tree.close_fd(inode.fd)
        inode.fd = -1

    def give_up(self, inode: Inode) -> None:
        """Close the descriptor of an inode that leaves the table, with the last time of access; soon, for the kernel
        forgets many, one after the other."""
        self._open.pop(inode, None)
        self._tree.close_later(inode.fd, accessed=inode.atime_owed)
        inode.fd, inode.atime_owed = -1, False

    async def _reopen(self, inode: Inode) -> int:
        if self._tree.can_reopen:
            return await self._tree.reopen(inode.handle)
        if inode.parent is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        async with self.using(inode.parent) as directory:
            found = await self._tree.lookup(directory, inode.name)
        if found.handle != inode.handle:
            self._tree.close_fd(found.fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return found.fd
