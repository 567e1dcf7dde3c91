"""Open regular files: what each of them has been told of errors, and what it makes durable.

One open(2) is one open file, whoever inherits or duplicates its descriptor: that is whom an error of writeback is
reported to, once, at the next fsync, or at a close before that.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from cachefsd.core.engine import Engine
from cachefsd.core.files import CachedFile
from cachefsd.fuse.inode import Inode
from cachefsd.fuse.inodes import Inodes
from cachefsd.fuse.invalidation import CachedPages, Invalidator
from cachefsd.fuse.privileges import stripped_by


class OpenFile:
    """One open of a regular file."""

    __slots__ = ("atime", "direct", "errors", "file", "inode", "strips", "synchronous", "writes")

    def __init__(self, inode: Inode, file: CachedFile, flags: int, uid: int) -> None:
        self.inode = inode
        self.file = file
        self.errors = file.errors.reader()
        self.writes = flags & os.O_ACCMODE != os.O_RDONLY
        self.atime = not flags & os.O_NOATIME
        """Reads through it move atime."""
        self.direct = bool(flags & os.O_DIRECT)
        """It goes past the page cache. Who asks for that by fcntl(2), later on, is not seen here."""
        self.synchronous = bool(flags & os.O_DSYNC)  # part of O_SYNC as well
        """Every write is followed by an fsync. Only open(2) can ask for that."""
        self.strips = stripped_by(uid)
        """What a write through it takes away of setuid and setgid."""


class OpenFiles:
    """The open ones, by file handle."""

    def __init__(self, engine: Engine, inodes: Inodes) -> None:
        self._engine: Final = engine
        self._inodes: Final = inodes
        self.table: Final[dict[int, OpenFile]] = {}
        self._next = 1
        self.invalidator: Final = Invalidator()
        self._descriptors: Final = inodes.fds.budget
        self._distinct = 0
        """Files that are open, each counted once."""

    def require_descriptors(self, file: CachedFile | None) -> None:
        """Make sure that one more open of a file (None: a new one) leaves enough descriptors for what is open already.

        :raises OSError: EMFILE, it does not.
        """
        if self._descriptors.short():
            self._engine.close_idle()
            self._inodes.fds.close_some()
        if self._distinct >= self._descriptors.most_files and (file is None or not file.open_count):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def add(self, inode: Inode, file: CachedFile, flags: int, uid: int) -> int:
        """A handle for one more open of the file, by a user."""
        number = self._next
        self._next += 1
        self.table[number] = opened = OpenFile(inode, file, flags, uid)
        self._distinct += not file.open_count
        self._engine.opened(file)
        inode.atime_due = True
        if opened.writes:
            if opened.direct:
                inode.direct_writers += 1
                if inode.pages is None:
                    inode.pages = CachedPages()
            else:
                inode.buffered_writers += 1
        return number

    def close(self, handle: int) -> None:
        """The handle is no longer used."""
        opened = self.table.pop(handle)
        self._engine.closed(opened.file)
        self._distinct -= not opened.file.open_count
        if opened.writes:
            inode = opened.inode
            if opened.direct:
                inode.direct_writers -= 1
                if not inode.direct_writers:
                    inode.pages = None
            else:
                inode.buffered_writers -= 1

    def close_all(self) -> None:
        """The file system is no longer mounted."""
        for handle in list(self.table):
            self.close(handle)

    async def written(self, opened: OpenFile, pages: CachedPages, offset: int, size: int) -> None:
        """A write has been published, in a file of which somebody writes with O_DIRECT: no page that is older may stay.

        To be called before the write is answered, and without an await between the two.
        """
        if not opened.direct:
            pages.note(offset, size)
            return
        inode = opened.inode
        # The kernel writes what came through the page cache by any open that can write. So while others have it open
        # for that, this may be such a write: then the page is there, and the kernel waits for our answer to it.
        patient = not inode.buffered_writers
        if pages.take(offset, size) and not await self.invalidator.drop(inode.number, offset, size, patient=patient):
            pages.note(offset, size)
        if not patient:
            pages.note(offset, size)

    def written_to(self, inode: Inode) -> bool:
        """Whether the inode is open for writing."""
        return any(each.inode is inode and each.writes for each in self.table.values())

    def check_at_close(self, handle: int) -> None:
        """What closing a descriptor says, as NFS has it: to who may have written, as nobody expects that closing
        fails what was only read; and without counting as told, for a child that closes what it inherited, as every
        exec does, must not take the report away from its parent's fsync.

        :raises OSError: an error of writeback that this open file has not been told of.
        """
        opened = self.table[handle]
        if opened.writes:
            _raise(opened.errors.peek())

    async def sync(self, handle: int) -> None:
        """Make data, attributes and names durable (P2).

        :raises OSError: they are not, or, once, an error of writeback.
        """
        opened = self.table[handle]
        inode, file = opened.inode, opened.file
        if inode.unsynced:
            file.needs_sync = True
        try:
            await self._engine.fsync(file)
            await self._inodes.names.sync(inode)
        except OSError:
            opened.errors.take()  # this is the report
            raise
        _raise(opened.errors.take())


def _raise(number: int) -> None:
    if number:
        raise OSError(number, os.strerror(number))
