"""Which names of an inode may not be durable, and making them so."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from cachefsd.backing.tree import Tree
from cachefsd.fuse.inode import Inode
from cachefsd.fuse.inodefds import InodeDescriptors

_SOMEWHERE = b""
"""In the place of a directory's handle: it is not known."""


class NameSync:
    """Syncs directories for the names in them. The names that may not be durable are in :attr:`Inode.unsynced`."""

    def __init__(self, tree: Tree, fds: InodeDescriptors, is_known: Callable[[Inode], bool]) -> None:
        """``is_known``: whether an inode is in the table, so that it may be opened."""
        self._tree: Final = tree
        self._fds: Final = fds
        self._is_known: Final = is_known

    def doubt(self, inode: Inode) -> None:
        """Nobody knows where the inode has its name, and whether that is durable."""
        inode.unsynced = {_SOMEWHERE: object()}

    async def sync(self, inode: Inode) -> None:
        """Make the directories durable in which names of the inode have come or gone, and their own names.

        Nothing is taken for durable before all of it is: another call meanwhile must not find less to do.
        """
        owed: list[tuple[Inode, bytes, object]] = []
        for each in inode.lineage():
            if not each.unsynced:
                break
            owed.extend((each, handle, change) for handle, change in each.unsynced.items())
        for handle, each in {handle: each for each, handle, _ in owed}.items():
            await self._sync_directory(each, handle)
        for each, handle, change in owed:
            if each.unsynced.get(handle) is change:
                del each.unsynced[handle]

    async def _sync_directory(self, inode: Inode, handle: bytes) -> None:
        if handle == _SOMEWHERE:
            await self._tree.sync_all()
            return
        parent = inode.parent
        if parent is not None and parent.handle == handle and self._is_known(parent):
            async with self._fds.using(parent) as fd:
                await self._tree.sync_dir(fd)
            return
        try:
            fd = await self._tree.reopen(handle)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return  # the directory is gone, and its names with it
        try:
            await self._tree.sync_dir(fd)
        finally:
            self._tree.close_fd(fd)
