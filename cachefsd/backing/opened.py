"""The descriptors of a regular file of the backing: opened, counted and closed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

import trio

from cachefsd.backing import syscalls
from cachefsd.backing.workers import Workers

Opener = Callable[[bytes], int]
"""From a handle to an O_PATH descriptor that belongs to the receiver. It may block: it runs in a thread."""

ANY_SIZE: Final = (1 << 63) - 1


class Opened:
    """What is open of a file. Closed in a thread, and only when the last operation on it is over.

    A close in the loop could wait for the disk (the last one of an unlinked file frees its blocks), and one
    during an operation could let that go to another file that got the same number.
    """

    def __init__(self, main: int, *, direct: bool, writable: bool, small: bool = False) -> None:
        self.main = main
        self.direct = direct
        self.writable = writable
        self.small = small
        """Opened for one small write: through the page cache, although direct I/O may be possible."""
        self.tail = -1
        """A second descriptor, through the page cache, when ``main`` is direct; -1 until it is needed."""
        self.tail_users = 0
        """Writes through it that are under way."""
        self.users = 0
        """Operations on it that are under way."""
        self.doomed = False
        self.max_size = _max_size(main)
        syscalls.spare_atime(main)  # users' reads move it, by way of Tree, and not what the cache brings for itself

    @property
    def buffered(self) -> int:
        """What is written to by way of the page cache; -1 until it is opened."""
        return self.tail if self.direct else self.main

    def close_all(self) -> None:
        """Close, in a thread, what no operation uses."""
        for fd in (self.main, self.tail):
            if fd >= 0:
                os.close(fd)


class Closer:
    """Closes descriptors in a thread, together with others: to wake one for each costs more than to close it."""

    def __init__(self, workers: Workers) -> None:
        self._workers: Final = workers
        self._unused: list[Opened] = []

    def retire(self, opened: Opened) -> None:
        """Close soon after the last operation on it is over. No new one may begin."""
        opened.doomed = True
        if not opened.users:
            self._close(opened)

    def end_use(self, opened: Opened) -> None:
        """An operation on it is over, which has counted itself among its users."""
        opened.users -= 1
        if opened.doomed and not opened.users:
            self._close(opened)

    def _close(self, opened: Opened) -> None:
        self._unused.append(opened)
        if len(self._unused) == 1:
            trio.lowlevel.spawn_system_task(self._close_soon)

    async def _close_soon(self) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()
        unused, self._unused = self._unused, []
        self._workers.post(_close_all, unused)


def _close_all(unused: list[Opened]) -> None:
    for each in unused:
        each.close_all()


def open_file(path: int, block_size: int, *, write: bool, small: bool = False) -> Opened:
    """Open the inode of an O_PATH descriptor, in a thread, for direct I/O by blocks where that can be.

    ``small``: for one small write, through the page cache. It takes an O_PATH descriptor, since opening a FIFO or a
    device for I/O could hang or have effects.

    :raises OSError: it cannot be opened.
    """
    if not syscalls.is_regular(path):
        raise OSError(errno.ESTALE, "not a regular file any more")
    mode = os.O_RDWR if write else os.O_RDONLY
    if small:
        return Opened(reopen(path, mode), direct=False, writable=write, small=True)
    if _can_be_direct(path, block_size):
        try:
            return Opened(reopen(path, mode | os.O_DIRECT), direct=True, writable=write)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return Opened(reopen(path, mode), direct=False, writable=write)


def adopt_file(fd: int, block_size: int) -> Opened:
    """What is open already, for reading and writing, as :func:`open_file` would have opened it."""
    direct = _can_be_direct(fd, block_size) and syscalls.make_direct(fd)
    return Opened(fd, direct=direct, writable=True)


def _can_be_direct(path: int, block_size: int) -> bool:
    needs = syscalls.direct_io(path)
    return needs is None or 0 < max(needs) <= block_size


def reopen(path: int, flags: int) -> int:
    """Open once more what a descriptor leads to.

    The kernel has checked what users may do. Without root's rights the daemon itself may be refused: what was
    written to a file before it was made read-only must reach it all the same, so its owner lends it the right.
    """
    try:
        return syscalls.reopen(path, flags)
    except PermissionError:
        status = os.fstat(path)
        if os.geteuid() == 0 or os.geteuid() != status.st_uid:
            raise
        name, mode = syscalls.proc_path(path), status.st_mode & 0o7777
        os.chmod(name, mode | 0o600)
        try:
            return syscalls.reopen(path, flags)
        finally:
            os.chmod(name, mode)


_likely_max_size = ANY_SIZE


def _max_size(fd: int) -> int:
    """How long the file could be: lseek knows, and refuses to go further.

    It is a property of the file system and of how the inode was made, so mostly what it was for the last file.
    """
    global _likely_max_size
    likely = _likely_max_size
    if not (_reaches(fd, likely) and (likely == ANY_SIZE or not _reaches(fd, likely + 1))):
        low, high = 0, ANY_SIZE
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _reaches(fd, middle) else (low, middle - 1)
        _likely_max_size = likely = low
    return likely


def _reaches(fd: int, offset: int) -> bool:
    try:
        os.lseek(fd, offset, os.SEEK_SET)
    except OSError:
        return False
    return True
