"""The inodes that the kernel knows, and how they lead to inodes of the backing.

A node id is the backing's inode number, so that ``st_ino`` is what it is beneath; only the root is 1, as the
protocol wants it, and an inode that is 1 beneath has the root's number instead. Inode numbers are used
again: an inode is known by its handle, and the kernel tells two of one number apart by the generation, which
is made of it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import pyfuse3

from cachefsd.backing.descriptors import Descriptors
from cachefsd.backing.ports import BackingStat
from cachefsd.backing.tree import Found, Tree
from cachefsd.core.engine import Engine
from cachefsd.core.files import CachedFile, Hints
from cachefsd.fuse.invalidation import CachedPages

_MAX_DESCRIPTORS = 65536  # each pins an inode of the backing, 1 KiB or so of kernel memory
_MAX_DEPTH = 1024
_SOMEWHERE = b""
"""In the place of a directory's handle: it is not known."""
_MAX_FORGOTTEN = 32768  # 200 bytes each
_MAX_NAMES = 4096  # per directory; 100 bytes each
_LISTED = (b"user.", b"security.", b"system.posix_acl_", b"trusted.")
"""Extended attributes that every file system lists which has them; others may keep secret ones."""
# What no file system takes for another name but for the case of its letters, or for none at all. Others have rules:
# Unicode's, the short names of FAT (LONGNA~1), dots at the end that do not count, or a length of 143.
_PLAIN = re.compile(rb"[A-Za-z0-9_.+-]{0,127}[A-Za-z0-9_+-]")


class Inode:
    """One inode of the backing that the kernel may refer to."""

    __slots__ = (
        "atime_due",
        "atime_ns",
        "atime_owed",
        "buffered_writers",
        "direct_writers",
        "fd",
        "file",
        "generation",
        "handle",
        "lookups",
        "name",
        "names",
        "number",
        "pages",
        "parent",
        "pins",
        "set_aside",
        "stat",
        "unsynced",
        "xattr_changes",
        "xattrs",
    )

    def __init__(self, number: int, found: Found, parent: Inode | None, name: bytes) -> None:
        self.number = number
        self.handle = found.handle
        self.generation = zlib.crc32(found.handle)
        self.stat = found.stat
        """The backing inode when it was last looked at."""
        self.fd = -1
        """O_PATH, or -1: :meth:`Inodes.using` opens it."""
        self.pins = 0
        """Operations under way that use ``fd``."""
        self.lookups = 0
        """How often the kernel was told of the inode, less what it has forgotten."""
        self.atime_due = True
        """The next read may have to move atime."""
        self.atime_ns = 0
        """When it was last read here, as far as that counts."""
        self.atime_owed = False
        """The backing has not been told of that."""
        self.direct_writers = 0
        """How many opens of it can write and have O_DIRECT."""
        self.buffered_writers = 0
        """How many can write and do not have it."""
        self.pages: CachedPages | None = None
        """While there are direct writers: what has come to the kernel's page cache meanwhile."""
        self.file: CachedFile | None = None
        """Of a regular file, from its first use on, or from the start if the cache holds data of it."""
        self.set_aside = False
        """Of a regular file: when the kernel was told of it, the engine had data of it and let nobody use it."""
        self.parent = parent
        self.name = name
        """The directory and name by which it was last found."""
        self.names: set[bytes] | None = None
        """Of a directory that was made through this mount: every name that has been in it since, in small letters, so
        that others need not be looked for. None where that is not known, or not worth knowing."""
        self.unsynced: dict[bytes, object] = {}
        """Handles of directories in which its names may not be durable, each with a token of the last change there."""
        if parent is not None:
            self.name_changed(parent)  # at first nobody knows
        self.xattrs = found.xattrs
        """Names of its extended attributes, None when not known. The kernel asks for some of them again and again,
        every write has to know of one, and they are hardly ever there."""
        self.xattr_changes = 0
        """What has been listed before one of them is out of date."""

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file: only those are cached."""
        return stat.S_ISREG(self.stat.st_mode)

    def hints(self) -> Hints:
        """What helps to create the file again if the backing loses it."""
        handle = b"" if self.parent is None else self.parent.handle
        status = self.stat
        return Hints(handle, self.name, self.path(), status.st_mode, status.st_uid, status.st_gid)

    def name_changed(self, parent: Inode) -> None:
        """A name of the inode has come to the directory ``parent``, or gone from it."""
        self.unsynced[parent.handle] = object()

    def has_name(self, name: bytes) -> None:
        """A name has come to this directory, or is there."""
        if self.names is not None:
            self.names.add(name.lower())
            if len(self.names) > _MAX_NAMES or not _PLAIN.fullmatch(name):
                self.names = None

    def lacks_name(self, name: bytes) -> bool:
        """Whether it is known that this directory has no such name."""
        return self.names is not None and name.lower() not in self.names and _PLAIN.fullmatch(name) is not None

    def xattr_names_changed(self) -> None:
        """One of its extended attributes has come or gone, or may have."""
        self.xattrs = None
        self.xattr_changes += 1

    def lineage(self) -> Iterator[Inode]:
        """The inode and the directories above it, without the root, as far as they are known."""
        at = self
        for _ in range(_MAX_DEPTH):
            if at.parent is None:
                return
            yield at
            at = at.parent

    def path(self) -> bytes:
        """A path from the root, as far as it is known; a rename above may have made it old."""
        return b"/".join(reversed([inode.name for inode in self.lineage()]))


class Inodes:
    """The table of inodes by node id, and their descriptors."""

    def __init__(self, engine: Engine, tree: Tree) -> None:
        self._engine: Final = engine
        self._tree: Final = tree
        self.descriptors: Final = Descriptors()
        self._max_descriptors = max(16, min(_MAX_DESCRIPTORS, self.descriptors.limit // 2))
        self._with_fd: dict[Inode, None] = {}
        """Inodes with a descriptor of their own, the one that was used longest ago first."""
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
        # Nobody knows where it has its name, and whether that is durable.
        inode.unsynced = {_SOMEWHERE: object()}
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
            self.take(inode, found.fd)
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
        self.take(inode, found.fd)
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

    def _let_go(self, inode: Inode) -> None:
        if inode.file is not None:
            self._engine.release(inode.file)
            inode.file = None
        if inode.fd >= 0:
            self._with_fd.pop(inode, None)
            # The kernel forgets many, one after the other.
            self._tree.close_later(inode.fd, accessed=inode.atime_owed)
            inode.fd, inode.atime_owed = -1, False
        elif inode.atime_owed and self._tree.can_reopen and inode.stat.st_nlink:
            self._tree.access_later(inode.handle)
            inode.atime_owed = False

    # ---- files

    async def file(self, inode: Inode) -> CachedFile:
        """The inode's regular file as the engine knows it."""
        if inode.file is None:
            async with self.using(inode) as fd:
                if inode.file is None:
                    # Now, and not by what an earlier look has found: writes may have come in between.
                    inode.stat = self._tree.stat_now(fd)
                    self._acquire(inode)
        assert inode.file is not None
        return inode.file

    def _acquire(self, inode: Inode) -> None:
        status = inode.stat
        about = BackingStat.of(status)
        inode.file = self._engine.acquire(inode.handle, about, inode.hints, lambda: self.sync_names(inode))

    # ---- descriptors

    @asynccontextmanager
    async def using(self, inode: Inode) -> AsyncIterator[int]:
        """The inode's O_PATH descriptor, kept open until the end of the block.

        :raises OSError: ESTALE when the inode is no more.
        """
        inode.pins += 1
        try:
            if inode.fd < 0:
                self.take(inode, await self._reopen(inode))
            elif inode in self._with_fd:
                del self._with_fd[inode]
                self._with_fd[inode] = None
            yield inode.fd
        finally:
            inode.pins -= 1
            if not inode.pins:
                if self.table.get(inode.number) is not inode:
                    self._let_go(inode)
                elif inode.lookups <= 0:
                    self._drop(inode)

    def current_stat(self, inode: Inode) -> bool:
        """Look at the inode again, where that takes no waiting; whether it did."""
        if inode.fd < 0:
            return False
        inode.stat = self._tree.stat_now(inode.fd)
        if inode.set_aside:
            self._use_again(inode)
        return True

    async def sync_names(self, inode: Inode) -> None:
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
        if parent is not None and parent.handle == handle and self.table.get(parent.number) is parent:
            async with self.using(parent) as fd:
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
                async with self.using(inode) as fd:
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

    def take(self, inode: Inode, fd: int) -> None:
        """Make ``fd`` the inode's descriptor unless it has one; -1 is none."""
        if fd < 0:
            return
        if inode.fd >= 0:
            os.close(fd)  # not the last one, so there is nothing to wait for
            return
        inode.fd = fd
        self._with_fd[inode] = None
        if len(self._with_fd) > self._max_descriptors or self.descriptors.in_reserve(fd):
            self.close_some()

    def close_some(self) -> None:
        """Close the descriptors not used for longest, but for what could not be opened again: an eighth, or more."""
        if not self._tree.can_reopen:
            return
        surplus = max(len(self._with_fd) // 8 + 1, len(self._with_fd) - self._max_descriptors * 7 // 8)
        idle = [inode for inode in self._with_fd if not inode.pins and inode.stat.st_nlink]
        for inode in idle[:surplus]:
            self._close(inode)

    def _close(self, inode: Inode) -> None:
        self._with_fd.pop(inode, None)
        self._tree.close_fd(inode.fd)
        inode.fd = -1

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
