"""The kernel's view of mounts: find one, drop a dead one, tune a new one.

Everything here reads /proc and /sys and never touches a mounted tree: a daemon that stats its own
mount waits for itself, and a mount whose daemon has died answers nothing but errors.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cachefsd.backing import mountcalls, syscalls
from cachefsd.errors import UserError

log = logging.getLogger(__name__)

SUBTYPE = "cachefsd"
FSTYPE = f"fuse.{SUBTYPE}"
"""What our mounts are called in the table of mounts."""


class BusyError(UserError):
    """Files of the mount are in use."""


_MOUNTINFO = Path("/proc/self/mountinfo")
_MOUNTINFO_OF_THREAD = Path("/proc/thread-self/mountinfo")
_BDI = Path("/sys/class/bdi")

_ALIVE_S = 5.0
READ_AHEAD_KIB = 1024
"""One request of max_write's size; the kernel's default of 128 KiB is an eighth of it. Reading what is not cached in
order: 280 MiB/s with the default, 580 with this, 600 from the disk itself."""
DIRTY_PERCENT = 50
"""How much of what may be dirty in the page cache of the whole machine one mount with ``writeback_cache`` may have. The
kernel allows a FUSE file system 1 %: random 4 KiB writes over 256 MiB came to 38,000 a second with that, and to 360,000
with this. Less than all of it: others can go on when a mount's daemon does not."""


class MountEntry(NamedTuple):
    """One line of /proc/self/mountinfo, decoded."""

    mount_id: int
    parent_id: int
    device: str
    """major:minor in decimal, as the names in /sys/class/bdi"""
    mountpoint: str
    fstype: str
    source: str
    options: frozenset[str]
    """of the mount and of the file system"""


def _decode(field: bytes) -> str:
    """Undo the kernel's octal escapes of white space and backslash."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))


def _parse(line: bytes) -> MountEntry:
    head, _, tail = line.partition(b" - ")
    mount_id, parent_id, device, _root, mountpoint, options, *_ = head.split(b" ")
    fstype, source, super_options = tail.split(b" ", 2)
    return MountEntry(
        int(mount_id),
        int(parent_id),
        device.decode(),
        _decode(mountpoint),
        _decode(fstype),
        _decode(source),
        frozenset(_decode(options + b"," + super_options).split(",")),
    )


def mounts(*, thread: bool = False) -> list[MountEntry]:
    """All mounts of this namespace that are reachable from our root; of the calling ``thread``'s, if it has its own."""
    text = (_MOUNTINFO_OF_THREAD if thread else _MOUNTINFO).read_bytes()
    return [_parse(line) for line in text.split(b"\n") if line]


def _absolute(path: str | os.PathLike[str]) -> str:
    """``path`` without symbolic links, its last component excepted: that one is not looked at."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)


def find_mount(mountpoint: str | os.PathLike[str], *, thread: bool = False) -> MountEntry | None:
    """The topmost mount at ``mountpoint``, or None when nothing is mounted exactly there; ``thread`` as above."""
    path = _absolute(mountpoint)
    stack = [entry for entry in mounts(thread=thread) if entry.mountpoint == path]
    covered = {entry.parent_id for entry in stack}
    return next((entry for entry in stack if entry.mount_id not in covered), None)


def holder_of(path: str, mountpoint: str, fstype: str, entries: list[MountEntry]) -> MountEntry | None:
    """The mount in which ``path``, an absolute one, would be found if no mount of that type were at ``mountpoint``.

    :param entries: all mounts, as the kernel lists them
    """
    found: MountEntry | None = None
    for entry in entries:
        if entry.fstype == fstype and entry.mountpoint == mountpoint:
            continue
        above = entry.mountpoint.rstrip("/")
        # Of several at one place, the last one is the topmost.
        if (path == above or path.startswith(f"{above}/")) and (
            found is None or len(entry.mountpoint) >= len(found.mountpoint)
        ):
            found = entry
    return found


def mount_of(fd: int) -> MountEntry | None:
    """The mount that a descriptor was opened on; None when it is not mounted any more, or not in our namespace."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines()
    (mount_id,) = [int(line.split()[1]) for line in lines if line.startswith("mnt_id:")]
    return next((entry for entry in mounts() if entry.mount_id == mount_id), None)


def detach_dead(mountpoint: str | os.PathLike[str]) -> None:
    """Take the topmost mount off ``mountpoint`` at once, whoever still uses it and whether it answers or not.

    :raises UserError: it can't be taken off.
    """
    detach(mountpoint, lazy=True)


def detach(mountpoint: str | os.PathLike[str], *, lazy: bool) -> None:
    """The same, but unless ``lazy`` only if nobody uses it.

    :raises BusyError: somebody does.
    :raises UserError: it can't be taken off.
    """
    if os.geteuid() == 0:
        try:
            mountcalls.unmount(os.fsencode(_absolute(mountpoint)), lazy=lazy, follow=False)
        except OSError as error:
            kind = BusyError if error.errno == errno.EBUSY else UserError
            raise kind(f"cannot unmount {os.fspath(mountpoint)}: {error.strerror}") from None
        return
    # For users it is setuid.
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", _absolute(mountpoint)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError("fusermount3 is not installed (Debian: apt install fuse3)") from None
    if done.returncode != 0:
        reason = os.fsdecode(done.stderr).strip().replace("\n", "; ")
        kind = BusyError if os.strerror(errno.EBUSY) in reason else UserError
        raise kind(f"cannot unmount {os.fspath(mountpoint)}: {reason or 'fusermount3 failed'}")


def detach_if_dead(mountpoint: str | os.PathLike[str], fstype: str) -> bool:
    """Take the topmost mount off ``mountpoint`` if it is one of that type that nobody serves; whether it was.

    :raises UserError: it can't be taken off.
    """
    entry = find_mount(mountpoint)
    if entry is None or entry.fstype != fstype:
        return False
    # The descriptor stands for this very mount: another one, served by another daemon, may take its place any time.
    try:
        fd = os.open(_absolute(mountpoint), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not is_dead(fd):
            return False
        if os.geteuid() == 0:
            with suppress(OSError):  # somebody else was faster
                mountcalls.unmount(syscalls.proc_path(fd))
        else:
            detach_dead(mountpoint)
    finally:
        os.close(fd)
    return True


def detach_all_dead(mountpoint: str | os.PathLike[str], fstype: str) -> bool:
    """The same for all of those that lie one above the other; whether there was any.

    :raises UserError: one of them can't be taken off.
    """
    last = None
    while (entry := find_mount(mountpoint)) is not None and entry.mount_id != last:
        if not detach_if_dead(mountpoint, fstype):
            break
        last = entry.mount_id
    return last is not None


def is_dead(fd: int) -> bool:
    """Whether nobody serves the mount of a descriptor any more. One that hangs is somebody's."""
    outcome: list[int | None] = []
    own = os.dup(fd)  # it may outlive the caller's

    def look() -> None:
        try:
            os.fstatvfs(own)
        except OSError as error:
            outcome.append(error.errno)
        finally:
            os.close(own)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_ALIVE_S)
    # ECONNABORTED: it died while we asked.
    return outcome in ([errno.ENOTCONN], [errno.ECONNABORTED])


def tune(entry: MountEntry, *, writeback_cache: bool) -> dict[str, int]:
    """Raise the kernel's small defaults for a mount of ours. Not before INIT is answered: that sets them anew.

    Returns what was set, by name; a value that can't be set (not root, /sys not writable) is left out.
    """
    wanted = {"read_ahead_kb": READ_AHEAD_KIB}
    if writeback_cache:
        wanted["max_ratio"] = DIRTY_PERCENT
    done = {}
    for name, value in wanted.items():
        path = _BDI / entry.device / name
        try:
            path.write_text(f"{value}\n", encoding="ascii")
        except OSError as error:
            log.info("%s stays as it is: %s", path, error.strerror)
        else:
            done[name] = value
    return done
