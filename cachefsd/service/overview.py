"""How all mounts of a user are doing, those that nobody serves and those whose daemon hangs included.

Nothing here waits longer than it is told, whatever a daemon, a mount or a disk does: each place is looked at by a
thread of its own, which is left behind when the time is over.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cachefsd.errors import NobodyError, SilentError, UserError
from cachefsd.fuse import mounts
from cachefsd.fuse.mounts import MountEntry
from cachefsd.media.offline import Look, look, paths_of
from cachefsd.service import caches, control
from cachefsd.service.places import default_cache, note_path, runtime_directory, socket_path

_ASK_S = 1.0
"""A daemon that is well answers in milliseconds."""
_ALL_S = 1.3
"""for all of it: with the start of Python less than 2 s"""
_MAX_FILES = 1000

SERVING, SILENT, DEAD, FOREIGN, UNMOUNTED, OFFLINE = "serving", "silent", "dead", "foreign", "unmounted", "offline"
"""The states of a mount. ``silent``: its daemon does not answer. ``dead``: its daemon has died. ``foreign``: it is
served, but by a daemon of another user. ``unmounted``: it is not mounted any more, and dirty data is in its cache.
``offline``: a cache by itself."""

Status = dict[str, Any]


def all_mounts() -> list[Status]:
    """Each mount of this user, or of all users for root, and what was left unmounted with dirty data."""
    own = {socket_path(Path(entry.mountpoint)): entry for entry in mounts.mounts() if _is_ours(entry)}
    paths = {path.with_suffix(".sock") for kind in ("*.sock", "*.json") for path in runtime_directory().glob(kind)}
    found = _examine([(path, own.get(path)) for path in sorted(paths | own.keys())])
    return sorted(found, key=lambda status: (status["state"] in (SERVING, FOREIGN, UNMOUNTED), status["mountpoint"]))


def one_mount(mountpoint: Path) -> Status | None:
    """The same of one mount point, a path without links; None where nothing is known of it."""
    entry = mounts.find_mount(mountpoint)
    ours = entry if entry is not None and entry.fstype == mounts.FSTYPE else None
    found = _examine([(socket_path(mountpoint), ours)])
    return found[0] if found else None


def _is_ours(entry: MountEntry) -> bool:
    user = os.geteuid()
    return entry.fstype == mounts.FSTYPE and (user == 0 or f"user_id={user}" in entry.options)


def _examine(places: list[tuple[Path, MountEntry | None]]) -> list[Status]:
    deadline = time.monotonic() + _ALL_S
    found: list[Status] = [{} for _ in places]
    threads = [
        threading.Thread(target=_look_at, args=(path, entry, status, deadline), daemon=True)
        for (path, entry), status in zip(places, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    # A copy: a thread that was left behind may still add something.
    return [dict(status) for status in found if status.get("state")]


def _look_at(path: Path, entry: MountEntry | None, status: Status, deadline: float) -> None:
    note = _read_note(path)
    if entry is not None:
        status |= {"state": SILENT, "mountpoint": entry.mountpoint, "backing": entry.source, "mounted": True}
    with suppress(UserError, OSError):
        _fill(path, entry, note, status, deadline)


def _fill(path: Path, entry: MountEntry | None, note: Status, status: Status, deadline: float) -> None:
    about = {"mountpoint": f"the mount of {path}"} | note
    if entry is not None:
        about |= {"mountpoint": entry.mountpoint, "backing": entry.source}
    try:
        answer = control.ask_socket(path, about["mountpoint"], "status", patience_s=_ASK_S)
    except SilentError:
        state = SILENT
    except NobodyError:
        state = _unserved(entry)
    else:
        status |= {"state": SERVING, "mounted": entry is not None} | answer
        return
    if state == UNMOUNTED:
        _fill_unmounted(path, note, status, deadline)
        return
    status |= about | {"state": state, "mounted": entry is not None}
    if state != FOREIGN and (cache := _cache_of(about)) is not None:
        status["cache"] = os.fspath(cache)
        status |= numbers(look(cache, deadline - 0.1))


def _unserved(entry: MountEntry | None) -> str:
    """The state of a mount whose socket nobody listens at."""
    if entry is None:
        return UNMOUNTED
    try:
        os.statvfs(entry.mountpoint)  # if it hangs, so it is left at that
    except OSError as error:
        return DEAD if error.errno in (errno.ENOTCONN, errno.ECONNABORTED) else SILENT
    return FOREIGN


def _fill_unmounted(path: Path, note: Status, status: Status, deadline: float) -> None:
    """Say what waits in the cache of a mount that is no more. A note of one where nothing waits is of no use."""
    if _lives(note.get("pid", 0)) or "cache" not in note:
        return
    try:
        found = look(Path(note["cache"]), deadline - 0.1)
    except UserError:
        found = None
    if found is None or (found.slots.complete and not found.slots.dirty):
        path.with_suffix(".json").unlink(missing_ok=True)
        return
    if found.used_by is None:  # another mount has it, and speaks for itself
        state = UNMOUNTED if found.superblock.clean else DEAD
        status |= note | numbers(found) | {"state": state, "mounted": False}


def _read_note(path: Path) -> Status:
    try:
        note = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) and isinstance(note.get("mountpoint"), str) else {}


def _lives(pid: int) -> bool:
    """Whether there is such a process. One that has ended, and for which nobody has waited, is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _cache_of(about: Status) -> Path | None:
    """The cache of a mount that does not answer: as noted, or the one that it has unless told otherwise."""
    if "cache" in about:
        return Path(about["cache"])
    cache = default_cache(Path(about["backing"])) if "backing" in about else None
    return cache if cache is not None and caches.exists(cache) else None


def numbers(found: Look) -> Status:
    """A look at a cache in the words of ``status``."""
    block_size, slots = found.superblock.geometry.block_size, found.slots
    return {
        "pool": os.fspath(found.pool),
        "block_size": block_size,
        "slots": {
            "total": found.superblock.geometry.slots,
            "free": slots.free,
            "clean": slots.clean,
            "dirty": slots.dirty,
            "quarantined": slots.out_of_use,
        },
        "dirty_bytes": slots.dirty * block_size,
        "lost_bytes": slots.lost * block_size,
        "lost_unknown": slots.unknown,
        "stopped_in_order": found.superblock.clean,
        "complete": slots.complete,
    }


def one_cache(cache: Path) -> Status:
    """The status of a cache by itself, or that of the daemon that uses it.

    :raises UserError: there is none, or it cannot be read.
    """
    found = look(cache)
    if found.used_by is not None:
        for note in _notes():
            if note.get("cache") == os.fspath(cache):
                status = one_mount(Path(note["mountpoint"]))
                if status is not None and status["state"] in (SERVING, SILENT):
                    return status
    block_size = found.superblock.geometry.block_size
    paths = paths_of(cache, found)
    files = [
        {"path": os.fsdecode(paths.get(file_id, b"")), "file_id": file_id, "dirty_bytes": count * block_size}
        for file_id, count in sorted(found.slots.dirty_files.items(), key=lambda item: -item[1])[:_MAX_FILES]
    ]
    return {
        "state": OFFLINE,
        "cache": os.fspath(cache),
        "backing": os.fsdecode(found.superblock.path_hint),
        "used_by": found.used_by,
        **numbers(found),
        "dirty_files": len(found.slots.dirty_files),
        "files": files,
    }


def _notes() -> Iterator[Status]:
    for path in runtime_directory().glob("*.json"):
        if note := _read_note(path):
            yield note


def left_in(mountpoint: Path, cache: Path, *, patience_s: float = 1.0) -> Look | None:
    """What a cache holds after its daemon has ended; None where that cannot be told in that time.

    The note of its mount goes if nothing that it could tell of is left.
    """
    with suppress(UserError):
        found = look(cache, time.monotonic() + patience_s)
        if not found.slots.dirty and found.slots.complete:
            note_path(mountpoint).unlink(missing_ok=True)
        return found
    return None
