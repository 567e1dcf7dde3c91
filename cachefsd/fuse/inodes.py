"""The inodes that the kernel knows, and how they lead to inodes of the backing.

A node id is the backing's inode number, so that ``st_ino`` is what it is beneath; only the root is 1, as the
protocol wants it, and an inode that is 1 beneath has the root's number instead. Inode numbers are used
again: an inode is known by its handle, and the kernel tells two of one number apart by the generation, which
is made of it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Final

import pyfuse3

from cachefsd.backing.ports import BackingStat
from cachefsd.backing.tree import Found, Tree
from cachefsd.core.engine import Engine
from cachefsd.core.files import CachedFile
from cachefsd.fuse.inode import Inode
from cachefsd.fuse.inodefds import InodeDescriptors
from cachefsd.fuse.namesync import NameSync

_MAX_FORGOTTEN = 32768  # 200 bytes each
_LISTED = (b"user.", b"security.", b"system.posix_acl_", b"trusted.")
"""Extended attributes that every file system lists which has them; others may keep secret ones."""


class Inodes:
    """The table of inodes by node id."""

    def __init__(self, engine: Engine, tree: Tree) -> None:
        self._engine: Final = engine
        self._tree: Final = tree
        self.fds: Final = InodeDescriptors(tree, self._unpinned)
        self.names: Final = NameSync(tree, self.fds, self._is_known)
        self._root_number = tree.root.stat.st_ino
        self.root: Final = Inode(pyfuse3.ROOT_INODE, tree.root, None, b"")
        self.root.fd = tree.root_fd
        self.root.lookups = 1  # the kernel never forgets it
        self.table: Final[dict[int, Inode]] = {pyfuse3.ROOT_INODE: self.root}
        self._forgotten: dict[int, tuple[bytes, Inode | None, bytes]] = {}
        """By node id: handle, directory and name of what the kernel has forgotten, the last ones of it. Users may still
        have handles of the mount for it (open_by_handle_at, NFS)."""

    def get(self, number: int) -> Inode:
        """The inode with this node id; ESTALE when there is none (an NFS client's, forgotten)."""
        inode = self.table.get(number)
        if inode is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return inode

    async def bring_back(self, number: int) -> Inode:
        """The inode with this node id, counted as one lookup, also when the kernel has forgotten it.

        :raises OSError: ESTALE when it is no more, or cannot be found by its number.
        """
        inode = self.table.get(number)
        if inode is not None:
            inode.lookups += 1
            return inode
        known = self._forgotten.get(number)
        if known is not None:
            handle, parent, name = known
            with suppress(OSError):
                found = await self._tree.find_again(handle)
                if found.stat.st_nlink:
                    return self.remember(found, parent, name)
                self._tree.close_fd(found.fd)
        beneath = number if number != self._root_number else pyfuse3.ROOT_INODE
        found = await self._tree.find_number(beneath)
        if number in self.table:
            return self.remember(found, None, b"")
        inode = self.remember(found, self.root, b"")
        self.names.doubt(inode)
        return inode

    def number_of(self, found: Found) -> int:
        """The node id of what was found."""
        number = found.stat.st_ino
        if number == self._root_number:
            return pyfuse3.ROOT_INODE
        return self._root_number if number == pyfuse3.ROOT_INODE else number

    # ---- what the kernel knows

    def remember(self, found: Found, parent: Inode | None, name: bytes) -> Inode:
        """The inode of what was found, counted as one lookup; takes over the descriptor.

        ``parent`` and ``name`` say where it was found: None where that is not by name.
        """
        if parent is not None:
            parent.has_name(name)
        number = self.number_of(found)
        self._forgotten.pop(number, None)
        inode = self.table.get(number)
        if inode is not None and inode.handle != found.handle:
            # Somebody else has removed the file beneath and the number is used again. The kernel sees that by
            # the generation, and has yet to forget both.
            lookups = inode.lookups
            self._drop(inode)
            inode = self._new(number, found, parent, name)
            inode.lookups = lookups
        elif inode is None:
            inode = self._new(number, found, parent, name)
        else:
            inode.stat = found.stat
            self.fds.take(inode, found.fd)
            if inode.set_aside:
                self._use_again(inode)
            if parent is not None:
                inode.parent, inode.name = parent, name
        inode.lookups += 1
        return inode

    def forget(self, number: int, lookups: int) -> None:
        """The kernel has forgotten so many lookups."""
        inode = self.table.get(number)
        if inode is None or inode is self.root:
            return
        inode.lookups -= lookups
        if inode.lookups <= 0 and not inode.pins:
            if inode.stat.st_nlink and inode.name:
                self._forgotten[number] = inode.handle, inode.parent, inode.name
                if len(self._forgotten) > _MAX_FORGOTTEN:
                    del self._forgotten[next(iter(self._forgotten))]
            self._drop(inode)

    def close(self) -> None:
        """Forget everything: the file system is no longer mounted."""
        for inode in list(self.table.values()):
            if inode is not self.root:
                self._drop(inode)

    def _new(self, number: int, found: Found, parent: Inode | None, name: bytes) -> Inode:
        inode = self.table[number] = Inode(number, found, parent, name)
        self.fds.take(inode, found.fd)
        if inode.is_file and self._engine.find(inode.handle) is not None:
            inode.set_aside = self._engine.is_held(inode.handle)
            if not inode.set_aside:
                self._acquire(inode)
        return inode

    def _use_again(self, inode: Inode) -> None:
        """If the engine lets a file be used again: the cache says its size and times from now on."""
        if not self._engine.is_held(inode.handle):
            inode.set_aside = False
            if inode.file is None and self._engine.find(inode.handle) is not None:
                self._acquire(inode)

    def _drop(self, inode: Inode) -> None:
        """Take an inode out of the table; what operations use of it stays open until the last of them has ended."""
        del self.table[inode.number]
        if not inode.pins:
            self._let_go(inode)

    def _unpinned(self, inode: Inode) -> None:
        """The last operation that used an inode has ended: what was put off until then."""
        if not self._is_known(inode):
            self._let_go(inode)
        elif inode.lookups <= 0:
            self._drop(inode)

    def _is_known(self, inode: Inode) -> bool:
        return self.table.get(inode.number) is inode

    def _let_go(self, inode: Inode) -> None:
        if inode.file is not None:
            self._engine.release(inode.file)
            inode.file = None
        if inode.fd >= 0:
            self.fds.give_up(inode)
        elif inode.atime_owed and self._tree.can_reopen and inode.stat.st_nlink:
            self._tree.access_later(inode.handle)
            inode.atime_owed = False

    # ---- files

    async def file(self, inode: Inode) -> CachedFile:
        """The inode's regular file as the engine knows it."""
        if inode.file is None:
            async with self.fds.using(inode) as fd:
                if inode.file is None:
                    # Now, and not by what an earlier look has found: writes may have come in between.
                    inode.stat = self._tree.stat_now(fd)
                    self._acquire(inode)
        assert inode.file is not None
        return inode.file

    def _acquire(self, inode: Inode) -> None:
        status = inode.stat
        about = BackingStat.of(status)
        inode.file = self._engine.acquire(inode.handle, about, inode.hints, lambda: self.names.sync(inode))

    # ---- what they are like

    def current_stat(self, inode: Inode) -> bool:
        """Look at the inode again, where that takes no waiting; whether it did."""
        if inode.fd < 0:
            return False
        inode.stat = self._tree.stat_now(inode.fd)
        if inode.set_aside:
            self._use_again(inode)
        return True

    def changed(self, inode: Inode) -> None:
        """The backing inode has been changed in more than its data."""
        if inode.file is not None:
            self._engine.attributes.changed(inode.file)

    async def may_have_xattr(self, inode: Inode, name: bytes) -> bool:
        """False when it is known, or found out now, that the inode has no such extended attribute."""
        if not name.startswith(_LISTED):
            return True
        names = inode.xattrs
        if names is None:
            changes = inode.xattr_changes
            try:
                async with self.fds.using(inode) as fd:
                    names = frozenset(await self._tree.listxattr(fd))
            except OSError as error:
                if error.errno != errno.ENOTSUP:
                    return True
                names = frozenset()
            if changes == inode.xattr_changes:
                inode.xattrs = names
        return name in names

    def xattr_changed(self, inode: Inode) -> None:
        """Extended attributes of the inode have been set or removed."""
        inode.xattr_names_changed()
        self.changed(inode)
