"""Starting where a daemon has died: its mount stays, and answers with errors, until the next one serves.

What lies beneath a dead mount is older than what the cache holds. So nobody may see it, not even for the moment between
two mounts. In this order:

1. The backing is opened beneath the dead mount (:func:`open_beneath`): in a mount namespace of one thread, where the
   dead mount is taken off.
2. The new file system is mounted above the dead mount, and its mount is copied beneath that one (:func:`slip_beneath`).
   A kernel older than Linux 6.5 cannot do this. There it stays above, and the dead mount stays beneath until the end.
3. Once the new file system serves, the dead mount is taken off by its descriptor.

All of this takes the rights of root. Other users can only take the dead mount off first.
"""

from __future__ import annotations

import os
import threading
from typing import Final

from cachefsd.backing import mountcalls, syscalls
from cachefsd.errors import UserError
from cachefsd.fuse import mounts

ROOT: Final = syscalls.OpenHow(os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_NO_SYMLINKS)
"""Opens the root of the topmost mount. A symbolic link that has come to be there leads nowhere."""


def is_dead(mountpoint: str | os.PathLike[str], fstype: str) -> bool:
    """Whether the topmost mount at ``mountpoint`` is one of that type, and nobody serves it."""
    entry = mounts.find_mount(mountpoint)
    if entry is None or entry.fstype != fstype:
        return False
    try:
        fd = ROOT.openat2(-1, os.fsencode(entry.mountpoint))
    except OSError:
        return False
    try:
        return mounts.is_dead(fd)
    finally:
        os.close(fd)


def open_beneath(mountpoint: str | os.PathLike[str], fstype: str, path: str) -> int:
    """An O_PATH descriptor of the directory ``path`` as if no mount of that type were at ``mountpoint``.

    What is mounted in the directory is there as well, for as long as the descriptor is open. Needs Linux 5.2.

    :raises UserError: it cannot be opened.
    """
    outcome: list[int | OSError] = []

    def look() -> None:
        try:
            mountcalls.enter_private_namespace()
            # /proc/self is of the main thread, which has not left.
            while (entry := mounts.find_mount(mountpoint, thread=True)) is not None and entry.fstype == fstype:
                mountcalls.unmount_topmost(os.fsencode(entry.mountpoint))
            outcome.append(mountcalls.copy_tree(os.fsencode(path)))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=look, name="beneath")
    thread.start()
    thread.join()
    (found,) = outcome
    if isinstance(found, OSError):
        raise UserError(
            f"cannot open the backing {path} beneath the dead mount on {os.fspath(mountpoint)}: {found.strerror};"
            f" take that off with `cachefsd unmount {os.fspath(mountpoint)}`, then mount again"
        )
    return found


def reduce_stack(mountpoint: str | os.PathLike[str], fstype: str) -> None:
    """Of several dead mounts of that type, one above the other, leave only the lowest.

    :raises UserError: one of them can't be taken off.
    """
    last = None
    while (entry := mounts.find_mount(mountpoint)) is not None and entry.mount_id != last:
        below = next((each for each in mounts.mounts() if each.mount_id == entry.parent_id), None)
        if below is None or below.fstype != fstype or below.mountpoint != entry.mountpoint:
            break
        if not mounts.detach_if_dead(mountpoint, fstype):
            break
        last = entry.mount_id


def slip_beneath(path: str, dead: int) -> bool:
    """Move the mount that has just been made above the dead one beneath it; whether that was possible.

    :param path: where both are mounted
    :param dead: a descriptor of the root of the dead one
    :raises OSError: the new mount is neither there nor beneath. The dead one is as it was.
    """
    below = mounts.mount_of(dead)
    upper = ROOT.openat2(-1, os.fsencode(path))
    try:
        entry = mounts.mount_of(upper)
        if entry is None or below is None or entry.parent_id != below.mount_id:
            return False  # somebody has mounted something else above it
        try:
            copy = mountcalls.copy_mount(upper)
        except OSError:
            return False
        try:
            # The kernel puts a mount beneath the topmost one, which must be the dead one.
            mountcalls.unmount(syscalls.proc_path(upper))
            try:
                mountcalls.put_beneath(copy, dead)
            except OSError:
                mountcalls.put_above(copy, dead)
                return False
        finally:
            os.close(copy)
    finally:
        os.close(upper)
    return True
