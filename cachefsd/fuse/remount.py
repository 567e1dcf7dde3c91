"""``mount -o remount``: the flags of a mount that the kernel keeps, as ``ro``, are changed while it serves."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from cachefsd.backing import mountcalls
from cachefsd.errors import UserError
from cachefsd.fuse import mounts
from cachefsd.fuse.mounts import BusyError, MountEntry

_MS_REMOUNT = 32
_SET = {
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "dirsync": 128,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "lazytime": 1 << 25,
}
_CLEAR = {
    "rw": "ro",
    "suid": "nosuid",
    "dev": "nodev",
    "exec": "noexec",
    "atime": "noatime",
    "diratime": "nodiratime",
    "norelatime": "relatime",
    "nostrictatime": "strictatime",
    "nolazytime": "lazytime",
}
_ATIME = {"noatime", "relatime", "strictatime"}
"""Of these there is one."""

WORDS = {*_SET, *_CLEAR}
"""The words of mount(8) that a remount changes."""


def remount(entry: MountEntry, words: Iterable[str]) -> None:
    """Change the flags that ``words`` name, and leave the others. Needs root.

    :raises BusyError: it is to be read-only, and files are open for writing.
    :raises UserError: it cannot be done.
    """
    wanted = new_flags(entry.options, words)
    if "ro" in entry.options and "ro" not in wanted and _backing_is_read_only(entry):
        raise UserError(f"cannot remount {entry.mountpoint}: the backing {entry.source} is read-only")
    flags = _MS_REMOUNT
    for word in wanted:
        flags |= _SET[word]
    try:
        mountcalls.mount(os.fsencode(entry.source), os.fsencode(entry.mountpoint), entry.fstype.encode(), flags, b"")
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(f"cannot remount {entry.mountpoint}: files in it are open for writing") from None
        hint = "; only root can" if isinstance(error, PermissionError) else ""
        raise UserError(f"cannot remount {entry.mountpoint}: {error.strerror}{hint}") from None


def new_flags(options: Iterable[str], words: Iterable[str]) -> set[str]:
    """What is set of the flags after ``words``, of which later ones win, on a mount that has ``options``."""
    flags = set(options) & _SET.keys()
    for word in words:
        if word in _ATIME:
            flags -= _ATIME
        if word in _SET:
            flags.add(word)
        else:
            flags.discard(_CLEAR[word])
    return flags


def _backing_is_read_only(entry: MountEntry) -> bool:
    if entry.source == entry.mountpoint:  # the backing is what is covered
        return any(other.mount_id == entry.parent_id and "ro" in other.options for other in mounts.mounts())
    try:
        return bool(os.statvfs(Path(entry.source)).f_flag & os.ST_RDONLY)
    except OSError:
        return False
