"""The backing as the engine sees it: files by handle, and a sync of everything."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from cachefsd.backing import syscalls
from cachefsd.backing.aio import Aio
from cachefsd.backing.descriptors import Descriptors
from cachefsd.backing.files import DirectFile, Opener
from cachefsd.backing.ports import LostFile, Space
from cachefsd.backing.tree import Caller, Tree
from cachefsd.backing.workers import Workers

LOST_AND_FOUND = b"lost+found.cachefsd"
_PAGE = 4096
_COPY_ON_WRITE = (0x9123683E, 0xCA451A4E, 0x2FC12FC1, 0x3434, 0x794C7630)  # btrfs, bcachefs, zfs, nilfs, overlay
_NAME_UNUSABLE = (
    *(errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EINVAL, errno.ENAMETOOLONG),
    errno.EXDEV,  # XFS: a directory of another project
)
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR)  # what open(2) says of O_TMPFILE where it does not exist
_FUSE = 0x65735546  # its handles lead to what is in memory, and most servers know no others
_MOST_KEPT_OPEN = 1024  # to open a file again takes 0.1 ms: not worth more descriptors
T = TypeVar("T")


class Directory:
    """A :class:`~cachefsd.backing.ports.Backing` over a tree.

    ``workers`` do the data and the syncs; they are others than those of the tree, so that no metadata waits
    behind a slow sync. ``opener`` finds inodes where the kernel cannot open handles.
    """

    def __init__(self, tree: Tree, aio: Aio, workers: Workers, block_size: int, opener: Opener | None = None) -> None:
        self._tree: Final = tree
        self._aio: Final = aio
        self._workers: Final = workers
        self._block_size: Final = block_size
        self._opener: Final = opener or tree.open_handle
        kind = syscalls.file_system_type(tree.root_fd)
        self.overwrites_take_space: Final = kind in _COPY_ON_WRITE
        self._descriptors: Final = Descriptors()
        enough = max(1, min(_MOST_KEPT_OPEN, self._descriptors.limit // 8))
        self.most_kept_open: Final = enough if tree.can_reopen and kind != _FUSE else sys.maxsize

    def file(self, handle: bytes) -> DirectFile:
        """See the port. What the tree has just created is open already: to find it again takes longer."""
        scarce = self._descriptors.in_reserve
        file = DirectFile(handle, self._opener, self._aio, self._workers, self._block_size, scarce)
        fd = self._tree.take_created(handle)
        if fd >= 0:
            file.adopt(fd)
        return file

    def scratch(self, size: int) -> memoryview:
        """See the port."""
        return syscalls.aligned_memory(size, _PAGE)

    async def space(self) -> Space:
        """See the port."""
        status = await self._tree.statfs()
        unit = status.f_frsize or status.f_bsize
        return Space(status.f_blocks * unit, status.f_bavail * unit, unit)

    async def sync_all(self) -> None:
        """See the port."""
        await self._workers.run(syscalls.syncfs, self._tree.lock_fd)

    async def recreate(self, lost: LostFile, note: Callable[[bytes], Awaitable[None]]) -> None:
        """See the port. Owner and mode are exactly these, whatever the directory's defaults are."""
        fd, named = await self._workers.run(self._create_lost, lost)
        try:
            await self._workers.run(_own, fd, lost)
            await note(syscalls.file_handle(fd))
            if not named:
                await self._workers.run(self._at_place, lost, lambda dirfd, name: self._tree.link_file(fd, dirfd, name))
        finally:
            self._tree.close_fd(fd)

    def _create_lost(self, lost: LostFile) -> tuple[int, bool]:
        """A descriptor of a new file, and whether it had to get a name at once."""
        try:
            return self._at_place(lost, lambda dirfd, _: _unnamed(dirfd)), False
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise

        def create(dirfd: int, name: bytes) -> int:
            return self._tree.create_file(dirfd, name, 0o600, Caller(0, 0)).fd

        return self._at_place(lost, create), True

    def _at_place(self, lost: LostFile, act: Callable[[int, bytes], T]) -> T:
        """Call ``act`` with the directory and the name of a lost file, or with those in lost+found."""
        try:
            parent = self._opener(lost.parent_handle)
            try:
                self._tree.require_within(parent)
                return act(parent, lost.name)
            finally:
                os.close(parent)
        except OSError as error:
            if error.errno not in _NAME_UNUSABLE:
                raise
        root = self._tree.root_fd
        with suppress(FileExistsError):
            os.mkdir(LOST_AND_FOUND, 0o700, dir_fd=root)
        parent = self._tree.find(root, LOST_AND_FOUND).fd
        try:
            return act(parent, _free_name(parent, lost.fallback))
        finally:
            os.close(parent)


def _unnamed(dirfd: int) -> int:
    return os.open(b".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=dirfd)


def _own(fd: int, lost: LostFile) -> None:
    syscalls.chown(fd, lost.uid, lost.gid)
    os.chmod(syscalls.proc_path(fd), lost.mode & 0o7777)  # after chown, which takes setuid away


def _free_name(dirfd: int, name: bytes) -> bytes:
    """``name``, or what it becomes by a number behind it: what an earlier loss has left there stays."""
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)
    try:
        taken = {os.fsencode(entry) for entry in os.listdir(fd)}
    finally:
        os.close(fd)
    number, free = 0, name
    while free in taken:
        number += 1
        free = b"%s.%d" % (name, number)
    return free
