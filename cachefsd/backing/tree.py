"""The names beneath. Every access is relative to a descriptor, follows no link and leaves no file system.

A name is one component, as bytes. All methods raise :class:`OSError` with the errno that the kernel gave.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, NamedTuple

from cachefsd.backing import handles, mark, syscalls
from cachefsd.backing.latecloser import LateCloser
from cachefsd.backing.workers import Workers
from cachefsd.errors import UserError
from cachefsd.times import clamp

_RESOLVE: Final = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)
_FIND: Final = syscalls.OpenHow(os.O_PATH | os.O_NOFOLLOW, _RESOLVE)
_FIND_NOW: Final = syscalls.OpenHow(os.O_PATH | os.O_NOFOLLOW, _RESOLVE | syscalls.RESOLVE_CACHED)
_FIND_PARENT: Final = syscalls.OpenHow(os.O_PATH | os.O_DIRECTORY, _RESOLVE & ~syscalls.RESOLVE_BENEATH)
RENAME_WHITEOUT: Final = 4
"""A flag of renameat2(2): a character device 0:0 stays in the place of what is renamed."""
_MAX_DEPTH: Final = 4096
_CREATE: Final = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Caller(NamedTuple):
    """On whose behalf something is created: it becomes theirs, with their umask."""

    uid: int
    gid: int
    umask: int = 0


class Found(NamedTuple):
    """An inode: its attributes, the handle that finds it again, and an O_PATH descriptor.

    The descriptor belongs to the receiver; it is -1 where that is documented. ``xattrs`` are the names of its
    extended attributes; None where looking would have taken waiting, or does not tell.
    """

    stat: os.stat_result
    handle: bytes
    fd: int
    xattrs: frozenset[bytes] | None = None


Listed = Found | OSError | None
"""What is known of a name in a directory: None when it has vanished or leads to another device, the error when it could
not be looked at."""


class Tree:
    """A backing directory, opened before anything is mounted over it and locked against other daemons."""

    root_fd: int
    """O_PATH."""
    root: Found
    """The root itself, with ``root_fd`` as its descriptor."""
    device: int
    can_reopen: bool
    """Whether :meth:`reopen` works here: it takes CAP_DAC_READ_SEARCH and a file system that has handles."""

    def __init__(self, path: str, workers: Workers, root_fd: int = -1) -> None:
        """
        :param root_fd: an O_PATH descriptor of the root, which then belongs to the tree; by default ``path`` is opened
        :raises UserError: it cannot be opened, or another daemon caches it.
        """
        self.workers: Final = workers
        self._created: Final[dict[bytes, int]] = {}
        """By handle, for :meth:`take_created`."""
        self._reserved = b""
        """A name in the root that users neither see nor use."""
        self._closer: Final = LateCloser(workers)
        self.root_fd, self.lock_fd = _open_root(path, root_fd)
        try:
            self.root = Found(os.fstat(self.root_fd), handles.file_handle(self.root_fd), self.root_fd)
            self.device = self.root.stat.st_dev
            self.can_reopen = self._probe()
        except OSError as error:
            self.close()
            raise UserError(f"cannot use {path} as backing: {error.strerror}") from error

    def close(self) -> None:
        """Close the root and unlock it."""
        os.close(self.root_fd)
        os.close(self.lock_fd)
        self._closer.close_all()
        for fd in self._created.values():
            os.close(fd)

    def hide_mark(self) -> None:
        """Keep the mark of the backing from users. Its attribute always is; the name of a file only where it is one."""
        self._reserved = mark.FILE if mark.is_file(self.root_fd) else b""

    def close_fd(self, fd: int) -> None:
        """Close a descriptor that this class gave away, in a thread.

        The last one of an unlinked file frees its blocks, and may wait for the disk to do so.
        """
        self.workers.post(os.close, fd)

    def close_later(self, fd: int, *, accessed: bool = False) -> None:
        """The same, together with others: to wake a thread costs more than to close.

        ``accessed``: it is of a regular file that has been read, which its atime should say.
        """
        self._closer.close(fd, accessed=accessed)

    def access_later(self, handle: bytes) -> None:
        """Let atime of a regular file say that it has been read, in a thread and if that can be."""
        self.workers.post(self._access, handle)

    # ---- at once

    def lookup_now(self, dirfd: int, name: bytes) -> Found | None:
        """Find a name without waiting: None when it would take waiting.

        :raises OSError: ENOENT for a name known not to exist; EXDEV for a subvolume (None for a mount point).
        """
        try:
            return self._found(_FIND_NOW.openat2(dirfd, self._visible(dirfd, name)))
        except BlockingIOError:
            return None

    def stat_now(self, fd: int) -> os.stat_result:
        """The attributes of what a descriptor leads to: in memory while it is open, on local file systems."""
        return os.fstat(fd)

    # ---- finding, in threads

    async def lookup(self, dirfd: int, name: bytes) -> Found:
        """Find a name."""
        # Once it is open the rest takes no waiting. In the thread each call more would be one more fight for the
        # interpreter's lock, where many look at a time: git status found 3,700 names a second, 4,600 with this.
        return self._found(await self.workers.run(_FIND.openat2, dirfd, self._visible(dirfd, name)))

    async def names(self, dirfd: int, count: int = 0) -> tuple[list[bytes], list[Listed]]:
        """The names in a directory, without ``.`` and ``..``, in the order of the file system; and the first ``count``
        of them as :meth:`stat_many` has them."""
        return await self.workers.run(self._names, dirfd, count)

    async def stat_many(self, dirfd: int, names: Sequence[bytes]) -> list[Listed]:
        """Find each name, without a descriptor (-1)."""
        return await self.workers.run(self._stat_many, dirfd, names)

    async def reopen(self, handle: bytes) -> int:
        """An O_PATH descriptor by handle; ESTALE when the inode is no more, or where handles do not open."""
        return await self.workers.run(self.open_handle, handle)

    async def find_again(self, handle: bytes) -> Found:
        """An inode that was found before, by its handle; ESTALE when it is no more, or where handles do not open."""
        return await self.workers.run(lambda: self._found(self.open_handle(handle)))

    async def find_number(self, number: int) -> Found:
        """An inode by its number; ESTALE where there is none, or where that cannot be told.

        Of other file systems than ext4 and btrfs nothing is found. What is no directory is only found where the
        backing is a whole file system, for it could lie outside of the tree.
        """
        return await self.workers.run(self._find_number, number)

    async def sync_all(self) -> None:
        """Make all of the file system durable."""
        await self.workers.run(syscalls.syncfs, self.lock_fd)

    async def parent(self, dirfd: int) -> Found:
        """The directory above a directory; above the root, the root."""
        return await self.workers.run(self._parent, dirfd)

    async def readlink(self, fd: int) -> bytes:
        """Where a symbolic link leads."""
        return await self.workers.run(lambda: os.readlink(b"", dir_fd=fd))

    async def statfs(self) -> os.statvfs_result:
        """The state of the file system."""
        return await self.workers.run(os.statvfs, self.root_fd)

    # ---- creating and removing names

    async def create(self, dirfd: int, name: bytes, mode: int, caller: Caller) -> Found:
        """Create a regular file; EEXIST when the name is taken, be it by a dangling symbolic link.

        It is open for reading and writing then, until :meth:`take_created` has been called for it.
        """
        found, fd = await self.workers.run(self._create, dirfd, self._usable(dirfd, name), mode, caller)
        if fd >= 0:
            self._created[found.handle] = fd
        return found

    def keep_created(self, handle: bytes, fd: int) -> None:
        """Hand over a descriptor, open for reading and writing, for :meth:`take_created`."""
        before = self._created.pop(handle, -1)
        if before >= 0:
            os.close(before)
        self._created[handle] = fd

    def take_created(self, handle: bytes) -> int:
        """The descriptor of a file just created, which then belongs to the receiver; -1 when there is none."""
        return self._created.pop(handle, -1)

    async def mkdir(self, dirfd: int, name: bytes, mode: int, caller: Caller) -> Found:
        """Create a directory."""
        return await self._make(dirfd, name, caller, lambda: os.mkdir(name, mode, dir_fd=dirfd))

    async def mknod(self, dirfd: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Found:
        """Create a node of the type in ``mode``."""
        return await self._make(dirfd, name, caller, lambda: os.mknod(name, mode, rdev, dir_fd=dirfd))

    async def symlink(self, dirfd: int, name: bytes, target: bytes, caller: Caller) -> Found:
        """Create a symbolic link."""
        return await self._make(dirfd, name, caller, lambda: os.symlink(target, name, dir_fd=dirfd))

    async def link(self, fd: int, dirfd: int, name: bytes) -> Found:
        """Give an inode another name."""

        def link() -> Found:
            self.link_file(fd, dirfd, name)
            return self.find(dirfd, name)

        return await self.workers.run(link)

    def link_file(self, fd: int, dirfd: int, name: bytes) -> None:
        """:meth:`link` in the calling thread; ``fd`` may be of a file that has no name yet."""
        syscalls.link(fd, dirfd, self._usable(dirfd, name))

    async def unlink(self, dirfd: int, name: bytes) -> None:
        """Remove the name of something that is no directory."""
        await self.workers.run(lambda: os.unlink(self._visible(dirfd, name), dir_fd=dirfd))

    async def rmdir(self, dirfd: int, name: bytes) -> None:
        """Remove an empty directory."""
        await self.workers.run(lambda: os.rmdir(self._visible(dirfd, name), dir_fd=dirfd))

    async def rename(
        self, old_dirfd: int, old: bytes, new_dirfd: int, new: bytes, flags: int, caller: Caller | None = None
    ) -> None:
        """Rename, with the flags of renameat2(2). With RENAME_WHITEOUT ``caller`` is who gets what is left behind."""

        source, target = self._visible(old_dirfd, old), self._usable(new_dirfd, new)

        def rename() -> None:
            syscalls.renameat2(old_dirfd, source, new_dirfd, target, flags)

        def rename_for(caller: Caller) -> None:
            with _on_behalf_of(caller):
                rename()

        await (self.workers.run(rename) if caller is None else self.workers.run(rename_for, caller))

    async def sync_dir(self, fd: int) -> None:
        """Make a directory durable."""
        await self.workers.run(self._sync_dir, fd)

    # ---- attributes: the descriptor is O_PATH, where fchmod and the like do not work

    async def chmod(self, fd: int, mode: int) -> None:
        """Set the permissions."""
        await self.workers.run(os.chmod, syscalls.proc_path(fd), mode)

    async def chown(self, fd: int, uid: int, gid: int) -> None:
        """Set owner and group; -1 keeps."""
        await self.workers.run(syscalls.chown, fd, uid, gid)

    async def utimens(self, fd: int, atime_ns: int | None, mtime_ns: int | None) -> int:
        """Set the times; None keeps. What the mtime is then: the file system may keep another one."""
        return await self.workers.run(_utimens, fd, atime_ns, mtime_ns)

    # The mark is cachefsd's own.

    async def getxattr(self, fd: int, name: bytes) -> bytes:
        """The value of an extended attribute."""
        if self._is_mark(fd, name):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return await self.workers.run(os.getxattr, syscalls.proc_path(fd), name)

    async def setxattr(self, fd: int, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute."""
        if self._is_mark(fd, name):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        await self.workers.run(os.setxattr, syscalls.proc_path(fd), name, value, flags)

    async def listxattr(self, fd: int) -> list[bytes]:
        """The names of the extended attributes."""
        names = await self.workers.run(os.listxattr, syscalls.proc_path(fd))
        return [name for name in map(os.fsencode, names) if not self._is_mark(fd, name)]

    async def removexattr(self, fd: int, name: bytes) -> None:
        """Remove an extended attribute."""
        if self._is_mark(fd, name):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        await self.workers.run(os.removexattr, syscalls.proc_path(fd), name)

    def _create(self, dirfd: int, name: bytes, mode: int, caller: Caller) -> tuple[Found, int]:
        found = self.create_file(dirfd, name, mode, caller)
        try:
            # Not the one that created it: what is done through a descriptor counts as done by who opened it.
            return found, syscalls.reopen(found.fd, os.O_RDWR)
        except OSError:
            return found, -1  # who needs it will find out why

    def _access(self, handle: bytes) -> None:
        with suppress(OSError):
            fd = self.open_handle(handle)
            try:
                syscalls.access(fd)
            finally:
                os.close(fd)

    # ---- for this layer only: these block

    def find(self, dirfd: int, name: bytes) -> Found:
        """:meth:`lookup` in the calling thread, with the names of extended attributes."""
        return _with_xattrs(self._found(_FIND.openat2(dirfd, _component(name))))

    def create_file(self, dirfd: int, name: bytes, mode: int, caller: Caller) -> Found:
        """:meth:`create` in the calling thread."""
        with _on_behalf_of(caller):
            fd = os.open(_component(name), _CREATE, mode & 0o7777, dir_fd=dirfd)
        try:
            return _with_xattrs(self._found(syscalls.reopen(fd, os.O_PATH)))
        finally:
            os.close(fd)

    def open_handle(self, handle: bytes) -> int:
        """:meth:`reopen` in the calling thread."""
        if not handles.can_open(handle):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        fd = syscalls.open_by_handle_at(self.lock_fd, handle[1:], os.O_PATH)
        if os.fstat(fd).st_dev != self.device:  # another subvolume of btrfs
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def require_within(self, dirfd: int) -> None:
        """
        :raises OSError: ESTALE when a directory that was found by its handle is not in the tree, but somewhere else
            on the file system.
        """
        fd = os.dup(dirfd)
        try:
            for _ in range(_MAX_DEPTH):
                before = os.fstat(fd)
                if os.path.samestat(before, self.root.stat):
                    return
                above = self._parent(fd)
                os.close(fd)
                fd = above.fd
                if os.path.samestat(before, above.stat):
                    break
        except OSError as error:
            # ENOENT: the mount has the root of the tree as its own, and the directory is not below that.
            if error.errno not in (errno.EXDEV, errno.ENOENT):
                raise
        finally:
            os.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _visible(self, dirfd: int, name: bytes) -> bytes:
        """``name``, if it is one that users may find in a directory."""
        if self._reserved and name == self._reserved and dirfd == self.root_fd:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return _component(name)

    def _usable(self, dirfd: int, name: bytes) -> bytes:
        """``name``, if it is one that users may give in a directory."""
        if self._reserved and name == self._reserved and dirfd == self.root_fd:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return _component(name)

    def _is_mark(self, fd: int, name: bytes) -> bool:
        return fd == self.root_fd and name == os.fsencode(mark.ATTRIBUTE)

    def _find_number(self, number: int) -> Found:
        found = self._found(self.open_handle(handles.handle_of_number(self.root.handle, number)))
        try:
            if found.stat.st_ino != number or found.stat.st_nlink == 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            if stat.S_ISDIR(found.stat.st_mode):
                self.require_within(found.fd)
            elif not handles.is_whole(self.root_fd):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        except BaseException:
            os.close(found.fd)
            raise
        return found

    def _probe(self) -> bool:
        try:
            os.close(self.open_handle(self.root.handle))
        except OSError:
            return False
        return True

    def _found(self, fd: int) -> Found:
        """What ``fd`` leads to; closes it when that is out of bounds."""
        try:
            status = os.fstat(fd)
            if status.st_dev != self.device:  # a subvolume of btrfs has no mount point that openat2 would see
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return Found(status, handles.file_handle(fd), fd)
        except BaseException:
            os.close(fd)
            raise

    def _names(self, dirfd: int, count: int) -> tuple[list[bytes], list[Listed]]:
        fd = _open_directory(dirfd)
        try:
            names = [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)
        if self._reserved and dirfd == self.root_fd and self._reserved in names:
            names.remove(self._reserved)
        return names, self._stat_many(dirfd, names[:count])

    def _stat_many(self, dirfd: int, names: Sequence[bytes]) -> list[Listed]:
        result: list[Listed] = []
        for name in names:
            try:
                found = self.find(dirfd, name)
            except OSError as error:
                result.append(None if error.errno in (errno.ENOENT, errno.EXDEV) else error)
            else:
                os.close(found.fd)
                result.append(found._replace(fd=-1))
        return result

    def _parent(self, dirfd: int) -> Found:
        if os.path.samestat(os.fstat(dirfd), self.root.stat):
            return self._root_again()
        try:
            return self._found(_FIND_PARENT.openat2(dirfd, b".."))
        except OSError as error:
            # Once something is mounted over the root, the way up into it leads to what is mounted.
            if error.errno != errno.EXDEV or not self._in_root(dirfd):
                raise
            return self._root_again()

    def _in_root(self, dirfd: int) -> bool:
        fd = _open_directory(self.root_fd)
        try:
            with os.scandir(fd) as entries:
                return os.fstat(dirfd).st_ino in (entry.inode() for entry in entries)
        finally:
            os.close(fd)

    def _root_again(self) -> Found:
        return self._found(os.dup(self.root_fd))

    def _sync_dir(self, dirfd: int) -> None:
        fd = _open_directory(dirfd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    async def _make(self, dirfd: int, name: bytes, caller: Caller, make: Callable[[], None]) -> Found:
        def job() -> Found:
            self._usable(dirfd, name)
            with _on_behalf_of(caller):
                make()
            return self.find(dirfd, name)

        return await self.workers.run(job)


def _utimens(fd: int, atime_ns: int | None, mtime_ns: int | None) -> int:
    syscalls.utimens(fd, atime_ns, mtime_ns)
    return clamp(os.fstat(fd).st_mtime_ns)


def require_free(path: str) -> None:
    """
    :raises UserError: another daemon caches the directory, or it cannot be opened.
    """
    for fd in _open_root(path, -1):
        os.close(fd)


def _open_root(path: str, root_fd: int) -> tuple[int, int]:
    """The root, O_PATH, and the descriptor that holds its lock."""
    try:
        if root_fd < 0:
            root_fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot open the backing {path}: {error.strerror}") from error
    try:
        lock_fd = _open_directory(root_fd)
    except OSError as error:
        os.close(root_fd)
        raise UserError(f"cannot read the backing {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(root_fd)
        os.close(lock_fd)
        if error.errno == errno.EWOULDBLOCK:
            raise UserError(f"{path} is already cached by another daemon") from error
        raise UserError(f"cannot lock the backing {path}: {error.strerror}") from error
    return root_fd, lock_fd


def _with_xattrs(found: Found) -> Found:
    try:
        names = os.listxattr(syscalls.proc_path(found.fd))
    except OSError:
        return found
    return found._replace(xattrs=frozenset(map(os.fsencode, names)))


def _open_directory(dirfd: int) -> int:
    return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)


def _component(name: bytes) -> bytes:
    """``name``, if it is one name in one directory."""
    if b"/" in name or b"\0" in name or name in (b"", b".", b".."):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return name


@contextmanager
def _on_behalf_of(caller: Caller) -> Iterator[None]:
    with ExitStack() as context:
        context.enter_context(syscalls.umask(caller.umask))
        if os.geteuid() == 0 and (caller.uid, caller.gid) != (0, 0):
            context.enter_context(syscalls.acting_as(caller.uid, caller.gid))
        yield
