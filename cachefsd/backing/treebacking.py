"""The backing as the engine sees it: files by handle, and a sync of everything."""

from __future__ import annotations

import errno
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import count, takewhile
from typing import Final, TypeVar

from cachefsd.backing import blocking, handles, syscalls
from cachefsd.backing.aio import Aio
from cachefsd.backing.descriptors import Descriptors
from cachefsd.backing.files import DirectFile, Finish, write_small
from cachefsd.backing.opened import Closer, Opener
from cachefsd.backing.ports import BackingFile, BackingStat, LostFile, Place, SmallWrite, Space
from cachefsd.backing.tree import Caller, Tree
from cachefsd.backing.workers import Workers
from cachefsd.filesystems import BCACHEFS, BTRFS, EXT, F2FS, FUSE, NILFS, OVERLAY, TMPFS, XFS, ZFS, file_system_type
from cachefsd.times import FIRST_NS, LAST_NS, PROBE_NS, KeptTimes, clamp

LOST_AND_FOUND = b"lost+found.cachefsd"
_PAGE = 4096
_COPY_ON_WRITE = (BTRFS, BCACHEFS, ZFS, NILFS, OVERLAY)
_NAME_UNUSABLE = (
    *(errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EINVAL, errno.ENAMETOOLONG),
    errno.EXDEV,  # XFS: a directory of another project
)
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR)  # what open(2) says of O_TMPFILE where it does not exist
# File systems whose syncfs does what fsync does for each file, and whose files tell afterwards of errors of their own
# data. That of a FUSE or network file system may not reach the server.
_SYNCFS_IS_COMPLETE = (EXT, XFS, BTRFS, F2FS, TMPFS)
_SYNCFS_TELLS = (5, 18)  # earlier kernels hide an error of the journal from syncfs
_COPY_BYTES = 1 << 20
_MOST_KEPT_OPEN = 1024  # to open a file again takes 0.1 ms: not worth more descriptors
T = TypeVar("T")


class TreeBacking:
    """A :class:`~cachefsd.backing.ports.Backing` over a tree.

    ``workers`` do the data and the syncs; they are others than those of the tree, so that no metadata waits
    behind a slow sync. ``opener`` finds inodes where the kernel cannot open handles.
    """

    def __init__(self, tree: Tree, aio: Aio, workers: Workers, block_size: int, opener: Opener | None = None) -> None:
        self._tree: Final = tree
        self._aio: Final = aio
        self._workers: Final = workers
        self._closer: Final = Closer(workers)
        self._block_size: Final = block_size
        self._opener: Final = opener or tree.open_handle
        kind = file_system_type(tree.root_fd)
        self.times: Final = _probe_times(tree.root_fd)
        self.overwrites_take_space: Final = kind in _COPY_ON_WRITE
        self._tells_files: Final = kind in _SYNCFS_IS_COMPLETE and _kernel() >= _SYNCFS_TELLS
        self._descriptors: Final = Descriptors()
        enough = max(1, min(_MOST_KEPT_OPEN, self._descriptors.limit // 8))
        # The handles of FUSE lead to what is in memory, and most servers know no others.
        self.most_kept_open: Final = enough if tree.can_reopen and kind != FUSE else sys.maxsize

    @property
    def sync_all_tells_files(self) -> bool:
        """See the port."""
        return self._tells_files

    def file(self, handle: bytes) -> DirectFile:
        """See the port. What the tree has just created is open already: to find it again takes longer."""
        scarce = self._descriptors.in_reserve
        file = DirectFile(handle, self._opener, self._aio, self._workers, self._closer, self._block_size, scarce)
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

    async def write_files(
        self, memory: memoryview, waiting: deque[SmallWrite], written: list[tuple[SmallWrite, OSError | None]]
    ) -> None:
        """See the port: all in one job of a worker. What somebody else syncs or opens just now stays ``waiting``."""
        held: list[DirectFile] = []
        free: list[SmallWrite] = []
        busy: list[SmallWrite] = []
        for write in waiting:
            assert isinstance(write.file, DirectFile)
            if write.file.begin_small():
                held.append(write.file)
                free.append(write)
            else:
                busy.append(write)
        waiting.clear()
        waiting.extend(free)
        try:
            await self._workers.run(write_small, memory, waiting, written)
        finally:
            for file in held:
                file.end_small()
            waiting.extend(busy)

    async def finish_files(self, files: Sequence[BackingFile], *, synced: bool) -> list[BackingStat | OSError]:
        """See the port: all in one job of a worker."""
        begun: list[tuple[DirectFile, Finish]] = []
        results: list[BackingStat | OSError] = []
        try:
            for file in files:
                assert isinstance(file, DirectFile)
                begun.append((file, await file.begin_finish()))
            opened = [(descriptors.main, descriptors.tail) for _, descriptors in begun]
            results = await self._workers.run(blocking.sync_files, opened, synced)
        finally:
            unknown: list[BackingStat | OSError] = [OSError(errno.EINTR, os.strerror(errno.EINTR))] * len(begun)
            for (each, descriptors), result in zip(begun, results or unknown, strict=True):
                each.end_finish(descriptors, result)
        return results

    async def recreate(self, lost: LostFile, note: Callable[[bytes, Place], Awaitable[None]]) -> None:
        """See the port. Owner and mode are exactly these, whatever the directory's defaults are."""
        fd, place, named = await self._workers.run(self._create_lost, lost)
        try:
            await self._workers.run(self._copy_content, fd, lost)
            handle = handles.file_handle(fd)
            # Where handles do not open nothing else would find it.
            self._tree.keep_created(handle, await self._workers.run(syscalls.reopen, fd, os.O_RDWR))
            await self._workers.run(self._own, fd, lost)
            await note(handle, place)
            if not named:
                _, linked = await self._workers.run(
                    self._at_place, lost, lambda dirfd, name: self._tree.link_file(fd, dirfd, name)
                )
                if linked != place:
                    await note(handle, linked)
        finally:
            self._tree.close_fd(fd)

    def _create_lost(self, lost: LostFile) -> tuple[int, Place, bool]:
        """A descriptor of a new file, its place, and whether it had to be put there at once."""
        try:
            return *self._at_place(lost, lambda dirfd, _: _unnamed(dirfd)), False
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise

        def create(dirfd: int, name: bytes) -> int:
            return self._tree.create_file(dirfd, name, 0o600, Caller(0, 0)).fd

        return *self._at_place(lost, create), True

    def _copy_content(self, fd: int, lost: LostFile) -> None:
        """Give a new file its size and what it gets of another one, durably."""
        if not lost.size and not lost.copy_of:
            return
        with ExitStack() as undo:
            target = syscalls.reopen(fd, os.O_WRONLY)
            undo.callback(os.close, target)
            if lost.copy_of:
                try:
                    beneath = self._opener(lost.copy_of)
                except OSError as error:
                    if error.errno not in _NAME_UNUSABLE:
                        raise
                else:
                    undo.callback(os.close, beneath)
                    source = syscalls.reopen(beneath, os.O_RDONLY)
                    undo.callback(os.close, source)
                    _copy(source, target, lost.copy_size)
            os.ftruncate(target, lost.size)
            os.fsync(target)

    def _own(self, fd: int, lost: LostFile) -> None:
        uid, gid, mode = lost.uid, lost.gid, lost.mode
        if lost.like:
            with suppress(OSError):
                other = self._opener(lost.like)
                try:
                    about = os.fstat(other)
                finally:
                    os.close(other)
                uid, gid, mode = about.st_uid, about.st_gid, about.st_mode
        syscalls.chown(fd, uid, gid)
        os.chmod(syscalls.proc_path(fd), mode & 0o7777)  # after chown, which takes setuid away

    def _at_place(self, lost: LostFile, act: Callable[[int, bytes], T]) -> tuple[T, Place]:
        """Call ``act`` with the directory and the name of a lost file, or with those in lost+found."""
        try:
            parent = self._opener(lost.parent_handle)
            try:
                self._tree.require_within(parent)
                name = _numbered(parent, lost.name) if lost.numbered else lost.name
                return act(parent, name), Place(name, aside=False)
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
            name = _numbered(parent, lost.fallback) if lost.numbered else _free_name(parent, lost.fallback)
            return act(parent, name), Place(name, aside=True)
        finally:
            os.close(parent)


def _kernel() -> tuple[int, int]:
    """The first two numbers of the kernel's version."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(takewhile(str.isdigit, minor)))


def _copy(source: int, target: int, size: int) -> None:
    """Copy the first ``size`` bytes, as far as there are some; shared where the file system can."""
    done = 0
    while done < size:
        try:
            copied = os.copy_file_range(source, target, size - done, done, done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            copied = os.pwrite(target, os.pread(source, min(_COPY_BYTES, size - done), done), done)
        if not copied:
            return
        done += copied


def _numbered(dirfd: int, name: bytes) -> bytes:
    """``name`` with the first number behind it that is free."""
    for number in count(1):
        numbered = b"%s-%d" % (name, number)
        try:
            os.stat(numbered, dir_fd=dirfd, follow_symlinks=False)
        except FileNotFoundError:
            break
    return numbered


def _unnamed(dirfd: int) -> int:
    return os.open(b".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=dirfd)


def _probe_times(dirfd: int) -> KeptTimes:
    """What the file system makes of times, as a file without a name shows, which nobody sees and no crash leaves."""
    times = KeptTimes()
    with suppress(OSError):  # it has no such files, or is read only: then what is set on files will show
        fd = _unnamed(dirfd)
        try:
            found = [_time_kept(fd, ns) for ns in (FIRST_NS, LAST_NS, PROBE_NS)]
        finally:
            os.close(fd)
        times.probed(*found)
    return times


def _time_kept(fd: int, ns: int) -> int:
    syscalls.utimens(fd, None, ns)
    return clamp(os.fstat(fd).st_mtime_ns)


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
