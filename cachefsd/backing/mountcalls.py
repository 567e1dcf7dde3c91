"""System calls on mounts, as thin functions that raise :class:`OSError`."""

from __future__ import annotations

import os
from typing import Any

from cachefsd.backing.libc import AT_EMPTY_PATH, AT_FDCWD, check, ffi, libc

_MNT_DETACH = 2
_CLONE_NEWNS = 0x20000
_MS_REC = 1 << 14
_MS_SLAVE = 1 << 19
_UMOUNT_NOFOLLOW = 8
_SYS_OPEN_TREE = 428
_SYS_STATMOUNT = 457
_SYS_LISTMOUNT = 458
_LSMT_ROOT = (1 << 64) - 1
_STATMOUNT_SB_BASIC = 1
_MOUNTS_AT_ONCE = 256
_SYS_MOVE_MOUNT = 429
_OPEN_TREE_CLONE = 1
_AT_RECURSIVE = 0x8000
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_MOVE_MOUNT_BENEATH = 0x200

ffi.cdef(
    """
    int mount(const char *, const char *, const char *, unsigned long, const char *);
    int umount2(const char *, int);
    struct mnt_id_req { uint32_t size, spare; uint64_t mnt_id, param; };
    struct statmount { uint32_t size, spare; uint64_t mask; uint32_t major, minor; char rest[488]; };
    """
)
_open_tree = ffi.cast("long (*)(long, int, const char *, unsigned)", libc.syscall)
_move_mount = ffi.cast("long (*)(long, int, const char *, int, const char *, unsigned)", libc.syscall)
_listmount = ffi.cast("long (*)(long, struct mnt_id_req *, uint64_t *, size_t, unsigned)", libc.syscall)
_statmount = ffi.cast("long (*)(long, struct mnt_id_req *, struct statmount *, size_t, unsigned)", libc.syscall)


def mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes) -> None:
    """mount(2)."""
    check(libc.mount(source, target, kind, flags, data))


def unmount(target: bytes, *, lazy: bool = True, follow: bool = True) -> None:
    """Take the mount at ``target`` off; ``lazy``: at once, whoever still uses it."""
    check(libc.umount2(target, (_MNT_DETACH if lazy else 0) | (0 if follow else _UMOUNT_NOFOLLOW)))


def unmount_topmost(path: bytes) -> None:
    """The same for the topmost mount at ``path``, of which the last component may not be a symbolic link."""
    check(libc.umount2(path, _MNT_DETACH | _UMOUNT_NOFOLLOW))


def enter_private_namespace() -> None:
    """Give the calling thread, for the rest of its life, a copy of all mounts.

    What is unmounted in the copy stays mounted for everybody else.
    """
    check(libc.unshare(_CLONE_NEWNS))
    check(libc.mount(b"", b"/", ffi.NULL, _MS_REC | _MS_SLAVE, ffi.NULL))


def copy_mount(fd: int) -> int:
    """A descriptor of a copy of a mount, given a descriptor of its root; the copy is mounted nowhere yet (Linux 5.2).

    The copy goes with its descriptor, unless :func:`put_above` or :func:`put_beneath` gives it a place.
    """
    return check(_open_tree(_SYS_OPEN_TREE, fd, b"", AT_EMPTY_PATH | _OPEN_TREE_CLONE | os.O_CLOEXEC))


def copy_tree(path: bytes) -> int:
    """The same for the directory ``path`` as root, with everything that is mounted in it."""
    return check(_open_tree(_SYS_OPEN_TREE, AT_FDCWD, path, _AT_RECURSIVE | _OPEN_TREE_CLONE | os.O_CLOEXEC))


def put_above(copy: int, below: int) -> None:
    """Mount a :func:`copy_mount` over the root of another mount, given a descriptor of that."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    check(_move_mount(_SYS_MOVE_MOUNT, copy, b"", below, b"", flags))


def put_beneath(copy: int, above: int) -> None:
    """Mount a :func:`copy_mount` between the mount whose root is ``above`` and what that one covers (Linux 6.5).

    Nothing may be mounted over ``above``: the kernel would take the topmost mount instead.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH | _MOVE_MOUNT_BENEATH
    check(_move_mount(_SYS_MOVE_MOUNT, copy, b"", above, b"", flags))


def mounts_of(device: str) -> list[int]:
    """The mounts of the file system ``device`` (major:minor, as in mountinfo) that this namespace has: numbers that are
    never used again as long as the machine is up.

    :raises OSError: ENOSYS: the kernel is older than Linux 6.8.
    """
    found: list[int] = []
    ids: Any = ffi.new("uint64_t[]", _MOUNTS_AT_ONCE)
    last = 0
    while True:
        request = ffi.new("struct mnt_id_req *", {"size": 24, "mnt_id": _LSMT_ROOT, "param": last})
        count = check(_listmount(_SYS_LISTMOUNT, request, ids, _MOUNTS_AT_ONCE, 0))
        for number in ids[0:count]:
            about: Any = ffi.new("struct statmount *")
            request = ffi.new("struct mnt_id_req *", {"size": 24, "mnt_id": number, "param": _STATMOUNT_SB_BASIC})
            if _statmount(_SYS_STATMOUNT, request, about, ffi.sizeof("struct statmount"), 0) < 0:
                continue  # unmounted meanwhile
            if f"{about.major}:{about.minor}" == device:
                found.append(int(number))
        if count < _MOUNTS_AT_ONCE:
            return found
        last = ids[count - 1]
