"""System calls that the standard library lacks, as thin functions that raise :class:`OSError`."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from cachefsd.backing.libc import AT_EMPTY_PATH, AT_FDCWD, check, fail, ffi, libc

# linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_CACHED = 0x20

_SYS_OPENAT2 = 437  # the same on every architecture, as all numbers since 424
_AT_SYMLINK_FOLLOW = 0x400
_SYNC_FILE_RANGE_WAIT_BEFORE = 1
_UTIME_OMIT = (1 << 30) - 2
MAX_HANDLE_SIZE = 128
_FS_IOC_GETFSUUID = 0x80111500
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP_MAX_OFFSET = (1 << 64) - 1
_FIEMAP_EXTENT_LAST = 0x1
_FIEMAP_NOT_ITS_OWN = 0x2 | 0x4 | 0x2000  # unknown place, delayed allocation, shared
_STATX_BTIME = 0x800
_STATX_DIOALIGN = 0x2000
_CAP_DAC_OVERRIDE = 1
_CAP_MKNOD = 27
_PROT_READ, _MAP_SHARED = 1, 1
_PR_SET_IO_FLUSHER = 57
_CLONE_FS = 0x200
_CAPABILITY_VERSION_3 = 0x20080522

ffi.cdef(
    """
    struct open_how { uint64_t flags, mode, resolve; };
    struct file_handle { unsigned bytes; int type; unsigned char data[128]; };
    struct timespec { long sec, nsec; };
    struct fiemap_extent {
        uint64_t fe_logical, fe_physical, fe_length, fe_reserved64[2]; uint32_t fe_flags, fe_reserved[3];
    };
    struct fiemap {
        uint64_t fm_start, fm_length; uint32_t fm_flags, fm_mapped_extents, fm_extent_count, fm_reserved;
        struct fiemap_extent fm_extents[64];
    };
    struct fsuuid { uint8_t length; uint8_t uuid[16]; };
    struct statx_time { int64_t sec; uint32_t nsec; int32_t pad; };
    struct statx {
        uint32_t mask, blksize; uint64_t attributes; uint32_t nlink, uid, gid; uint16_t mode, pad;
        uint64_t ino, size, blocks, attributes_mask;
        struct statx_time atime, btime, ctime, mtime;
        uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
        uint64_t mnt_id; uint32_t dio_mem_align, dio_offset_align; uint64_t spare[12];
    };
    struct cap_header { uint32_t version; int pid; };
    struct cap_data { uint32_t effective, permitted, inheritable; };

    int name_to_handle_at(int, const char *, struct file_handle *, int *, int);
    int open_by_handle_at(int, struct file_handle *, int);
    int renameat2(int, const char *, int, const char *, unsigned);
    int linkat(int, const char *, int, const char *, int);
    int fchownat(int, const char *, unsigned, unsigned, int);
    int utimensat(int, const char *, struct timespec *, int);
    int statx(int, const char *, int, unsigned, struct statx *);
    int syncfs(int);
    int sync_file_range(int, int64_t, int64_t, unsigned);
    int ioctl(int, unsigned long, void *);
    int setfsuid(unsigned);
    int setfsgid(unsigned);
    int capget(struct cap_header *, struct cap_data *);
    int capset(struct cap_header *, struct cap_data *);
    int prctl(int, unsigned long, unsigned long, unsigned long, unsigned long);
    int malloc_trim(size_t);
    struct signal_stack { uintptr_t address; int flags; size_t size; };
    int sigaltstack(const struct signal_stack *, struct signal_stack *);
    void *mmap(void *, size_t, int, int, int, long);
    int munmap(void *, size_t);
    """
)
_openat2 = ffi.cast("long (*)(long, int, const char *, struct open_how *, size_t)", libc.syscall)


class OpenHow:
    """The flags of an :meth:`openat2` that is called again and again."""

    def __init__(self, flags: int, resolve: int) -> None:
        self._how = ffi.new("struct open_how *", {"flags": flags | os.O_CLOEXEC, "resolve": resolve})

    def openat2(self, dirfd: int, path: bytes) -> int:
        """Open ``path`` as seen from ``dirfd``; return the descriptor."""
        fd: int = _openat2(_SYS_OPENAT2, dirfd, path, self._how, 24)
        if fd < 0:
            raise fail()
        return fd


def name_to_handle_at(dirfd: int, name: bytes = b"") -> bytes:
    """The handle of ``name`` in a directory, or of the descriptor itself: its type (4 bytes) and its data."""
    handle: Any = ffi.new("struct file_handle *")
    handle.bytes = MAX_HANDLE_SIZE
    mount_id = ffi.new("int *")
    check(libc.name_to_handle_at(dirfd, name, handle, mount_id, 0 if name else AT_EMPTY_PATH))
    return bytes(ffi.buffer(handle, 8 + handle.bytes)[4:])


def open_by_handle_at(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open what :func:`name_to_handle_at` named; ``mount_fd`` may not be an O_PATH descriptor."""
    size = len(handle) - 4
    structure = ffi.new("struct file_handle *", {"bytes": size})
    ffi.buffer(structure)[4 : 8 + size] = handle
    return check(libc.open_by_handle_at(mount_fd, structure, flags | os.O_CLOEXEC))


def renameat2(old_dirfd: int, old: bytes, new_dirfd: int, new: bytes, flags: int) -> None:
    """rename(2) with the flags RENAME_NOREPLACE (1), RENAME_EXCHANGE (2) and RENAME_WHITEOUT (4)."""
    check(libc.renameat2(old_dirfd, old, new_dirfd, new, flags))


def link(fd: int, dirfd: int, name: bytes) -> None:
    """Give the inode of a descriptor another name.

    AT_EMPTY_PATH asks for CAP_DAC_READ_SEARCH; without it the link in /proc leads there too.
    """
    if libc.linkat(fd, b"", dirfd, name, AT_EMPTY_PATH) < 0:
        if ffi.errno != errno.ENOENT:  # this is how the kernel refuses it
            raise fail()
        check(libc.linkat(AT_FDCWD, proc_path(fd), dirfd, name, _AT_SYMLINK_FOLLOW))


def chown(fd: int, uid: int, gid: int) -> None:
    """chown of the inode of a descriptor, even O_PATH; -1 keeps."""
    check(libc.fchownat(fd, b"", uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, AT_EMPTY_PATH))


def utimens(fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set the times of the inode of a descriptor, even O_PATH; None keeps."""
    times = ffi.new(
        "struct timespec[2]",
        [(0, _UTIME_OMIT) if ns is None else divmod(ns, 10**9) for ns in (atime_ns, mtime_ns)],
    )
    check(libc.utimensat(fd, b"", times, AT_EMPTY_PATH))


def proc_path(fd: int) -> bytes:
    """A path that leads to the inode of a descriptor, even O_PATH, and nowhere else."""
    return b"/proc/self/fd/%d" % fd


def reopen(fd: int, flags: int) -> int:
    """A new descriptor for the inode of ``fd``."""
    return os.open(proc_path(fd), flags | os.O_CLOEXEC)


def access(fd: int) -> None:
    """Move atime of the regular file of a descriptor, even O_PATH. A map does it as a read does, without I/O."""
    readable = reopen(fd, os.O_RDONLY)
    try:
        memory = libc.mmap(ffi.NULL, 1, _PROT_READ, _MAP_SHARED, readable, 0)
        if int(ffi.cast("intptr_t", memory)) == -1:
            raise fail()
        check(libc.munmap(memory, 1))
    finally:
        os.close(readable)


class DirectIo(NamedTuple):
    """What O_DIRECT asks of a file, in bytes; 0 when the file cannot do it."""

    memory_align: int
    offset_align: int


def direct_io(fd: int) -> DirectIo | None:
    """The alignments of O_DIRECT for a file; None when the kernel or the file system does not tell."""
    status = _statx(fd, _STATX_DIOALIGN)
    if not status.mask & _STATX_DIOALIGN:
        return None
    return DirectIo(status.dio_mem_align, status.dio_offset_align)


def make_direct(fd: int) -> bool:
    """Let an open descriptor do direct I/O; False when its file system refuses."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def spare_atime(fd: int) -> None:
    """Let reads by an open descriptor not move atime, where that is allowed: to the owner and to root."""
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NOATIME)


def birth_ns(fd: int) -> int:
    """When the inode was created, in nanoseconds; 0 when the file system does not tell."""
    status = _statx(fd, _STATX_BTIME)
    return int(status.btime.sec * 10**9 + status.btime.nsec) if status.mask & _STATX_BTIME else 0


def _statx(fd: int, mask: int) -> Any:
    status = ffi.new("struct statx *")
    check(libc.statx(fd, b"", AT_EMPTY_PATH, mask, status))
    return status


def file_system_uuid(fd: int) -> bytes:
    """The UUID of the file system of ``fd`` (not O_PATH); empty when the kernel does not tell."""
    buffer: Any = ffi.new("struct fsuuid *")
    if libc.ioctl(fd, _FS_IOC_GETFSUUID, buffer) < 0:
        return b""
    return bytes(buffer.uuid[0 : buffer.length])


def allocated_until(fd: int, offset: int) -> int:
    """Where the space ends that the file has from ``offset`` on, and has for itself alone (FIEMAP).

    ``offset`` where there is none, or where the file system does not tell.
    """
    request: Any = ffi.new("struct fiemap *")
    while True:
        request.fm_start, request.fm_length, request.fm_flags = offset, _FIEMAP_MAX_OFFSET - offset, 0
        request.fm_extent_count = len(request.fm_extents)
        if libc.ioctl(fd, _FS_IOC_FIEMAP, request) < 0:
            return offset
        for extent in request.fm_extents[0 : request.fm_mapped_extents]:
            if extent.fe_logical > offset or extent.fe_flags & _FIEMAP_NOT_ITS_OWN:
                return offset
            offset = int(extent.fe_logical + extent.fe_length)
            if extent.fe_flags & _FIEMAP_EXTENT_LAST:
                return offset
        if not request.fm_mapped_extents:
            return offset


def syncfs(fd: int) -> None:
    """Make the whole file system of ``fd`` (not O_PATH) durable."""
    check(libc.syncfs(fd))


def writeback_error(fd: int) -> None:
    """Wait for the pages of a file that are on their way to the disk, and start none.

    :raises OSError: writing it has failed, and this descriptor has not been told of it yet.
    """
    check(libc.sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WAIT_BEFORE))


def set_io_flusher() -> None:
    """Tell the kernel that this process writes its dirty pages: it must not wait for them to get memory."""
    check(libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0))


_signal_stack: mmap.mmap | None = None


def set_signal_stack(size: int) -> None:
    """Let the handlers of signals in the calling thread have so many bytes of stack."""
    global _signal_stack
    stack = mmap.mmap(-1, size)
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(stack)))
    check(libc.sigaltstack(ffi.new("struct signal_stack *", (address, 0, size)), ffi.NULL))
    _signal_stack = stack  # for as long as the process lives


def trim_heap() -> None:
    """Give memory back to the kernel that was freed, where the C library can."""
    with suppress(AttributeError):
        libc.malloc_trim(0)


_thread = threading.local()


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Let the calling thread, and no other one, create with this umask until the end of the block.

    The kernel then ignores it where the directory has a default ACL, as it should.
    """
    if not getattr(_thread, "has_own_umask", False):
        check(libc.unshare(_CLONE_FS))
        _thread.has_own_umask = True
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """Let the calling thread create files that belong to ``uid`` and ``gid``, until the end of the block.

    The thread keeps the right to write in any directory and to make device nodes: whether the caller may is
    the kernel's decision, which it took knowing the caller's supplementary groups. It does not keep
    CAP_FSETID, so it gives nobody a setgid file of a group that is not theirs.
    """
    header = ffi.new("struct cap_header *", {"version": _CAPABILITY_VERSION_3})
    before = ffi.new("struct cap_data[2]")
    check(libc.capget(header, before))
    during = ffi.new("struct cap_data[2]")
    old_gid = libc.setfsgid(gid)
    old_uid = libc.setfsuid(uid)
    try:
        # Neither call reports failure; asking for an impossible id changes nothing and tells the present one.
        if _fsid(libc.setfsgid) != gid or _fsid(libc.setfsuid) != uid:
            raise PermissionError(errno.EPERM, f"cannot act as user {uid} and group {gid}")
        check(libc.capget(header, during))
        during[0].effective |= during[0].permitted & (1 << _CAP_DAC_OVERRIDE | 1 << _CAP_MKNOD)
        check(libc.capset(header, during))
        yield
    finally:
        libc.setfsuid(old_uid)
        libc.setfsgid(old_gid)
        check(libc.capset(header, before))


def _fsid(setter: Any) -> int:
    return int(setter(0xFFFFFFFF)) & 0xFFFFFFFF


def is_regular(fd: int) -> bool:
    """Whether a descriptor leads to a regular file."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def aligned_memory(size: int, alignment: int) -> memoryview:
    """``size`` zero bytes that begin at a multiple of ``alignment``."""
    memory = bytearray(size + alignment - 1)
    start = -int(ffi.cast("uintptr_t", ffi.from_buffer(memory))) % alignment
    return memoryview(memory)[start : start + size]
