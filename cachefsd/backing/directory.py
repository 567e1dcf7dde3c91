"""The backing as the engine sees it: files by handle, and a sync of everything."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Final

from cachefsd.backing import syscalls
from cachefsd.backing.aio import Aio
from cachefsd.backing.files import DirectFile, Opener
from cachefsd.backing.tree import Caller, Found, Tree
from cachefsd.backing.workers import Workers

LOST_AND_FOUND = b"lost+found.cachefsd"
_PAGE = 4096
_NAME_UNUSABLE = (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EINVAL, errno.ENAMETOOLONG)


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

    def file(self, handle: bytes) -> DirectFile:
        """See the port."""
        return DirectFile(handle, self._opener, self._aio, self._workers, self._block_size)

    def scratch(self, size: int) -> memoryview:
        """See the port."""
        return syscalls.aligned_memory(size, _PAGE)

    async def sync_all(self) -> None:
        """See the port."""
        await self._workers.run(syscalls.syncfs, self._tree.lock_fd)

    async def recreate(
        self, parent_handle: bytes, name: bytes, mode: int, uid: int, gid: int, fallback: bytes
    ) -> bytes:
        """See the port. Owner and mode are exactly these, whatever the directory's defaults are."""
        found = await self._workers.run(self._recreate, parent_handle, name, fallback, mode, uid, gid)
        return found.handle

    def _recreate(self, parent_handle: bytes, name: bytes, fallback: bytes, mode: int, uid: int, gid: int) -> Found:
        found = self._create_lost(parent_handle, name, fallback)
        try:
            syscalls.chown(found.fd, uid, gid)
            os.chmod(syscalls.proc_path(found.fd), mode & 0o7777)  # after chown, which takes setuid away
        finally:
            os.close(found.fd)
        return found

    def _create_lost(self, parent_handle: bytes, name: bytes, fallback: bytes) -> Found:
        try:
            parent = self._opener(parent_handle)
            try:
                self._tree.require_within(parent)
                return self._tree.create_file(parent, name, 0o600, Caller(0, 0))
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
            return self._tree.create_file(parent, _free_name(parent, fallback), 0o600, Caller(0, 0))
        finally:
            os.close(parent)


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
