"""Who keeps a mount busy, as fuser(1) tells it. Only /proc and /sys are read: the mount itself might not answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cachefsd.fuse import mounts
from cachefsd.fuse.mounts import MountEntry

_PROC = Path("/proc")
_BLOCK = Path("/sys/block")
_MAX_NAMED = 5


def text_of(entry: MountEntry) -> str:
    """Those who use the mount and what for, as the end of a sentence."""
    found = [*_processes(entry), *_mounts(entry), *_loop_devices(entry)]
    if not found:
        return "somebody uses it whose processes you may not look at, or it is gone by now"
    more = len(found) - _MAX_NAMED
    return "; ".join(found[:_MAX_NAMED]) + (f"; and {more:,} more" if more > 0 else "")


def _processes(entry: MountEntry) -> Iterator[str]:
    pids = sorted(int(name) for name in os.listdir(_PROC) if name.isdigit())
    for pid in pids:
        uses = _uses(_PROC / f"{pid}", entry)
        if uses:
            yield f"{_name(pid)} (process {pid}) has {uses}"


def _name(pid: int) -> str:
    try:
        text = (_PROC / f"{pid}" / "comm").read_bytes().strip()
    except OSError:
        return "a process that has ended"
    return text.decode(errors="backslashreplace")


def _uses(process: Path, entry: MountEntry) -> str:
    for name, what in (("cwd", "its working directory there"), ("root", "its root directory there")):
        if _leads_below(process / name, entry):
            return what
    # What was found out about a process that has ended, or that is another user's, is nothing.
    with suppress(OSError):
        for link in (process / "fd").iterdir():
            if _leads_below(link, entry):
                return f"{os.readlink(link)} open"
    with suppress(OSError):
        for line in (process / "maps").read_bytes().splitlines():
            fields = line.split(None, 5)
            if len(fields) == 6 and _device(fields[3]) == entry.device:
                return f"{os.fsdecode(fields[5])} in its memory"
    return ""


def _leads_below(link: Path, entry: MountEntry) -> bool:
    try:
        return _is_below(os.readlink(link), entry.mountpoint)
    except OSError:
        return False


def _is_below(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(f"{mountpoint.rstrip('/')}/")


def _device(hexadecimal: bytes) -> str:
    major, _, minor = hexadecimal.partition(b":")
    return f"{int(major, 16)}:{int(minor, 16)}"


def _mounts(entry: MountEntry) -> Iterator[str]:
    for other in mounts.mounts():
        if other.parent_id == entry.mount_id:
            yield f"another file system is mounted on {other.mountpoint}"


def _loop_devices(entry: MountEntry) -> Iterator[str]:
    for device in sorted(_BLOCK.glob("loop*")):
        with suppress(OSError):
            path = os.fsdecode((device / "loop" / "backing_file").read_bytes()).removesuffix("\n")
            if _is_below(path, entry.mountpoint):
                yield f"/dev/{device.name} is a loop device over {path}"
