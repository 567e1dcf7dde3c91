"""What ``status`` and ``unmount`` say of mounts that are not served, and of caches by themselves, in sentences."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from cachefsd.media.offline import Look
from cachefsd.service import overview
from cachefsd.service.places import bytes_text

_MAX_SHOWN = 20

EXIT_SILENT = 3
EXIT_DEAD = 4


def exit_status(found: list[dict[str, Any]]) -> int:
    """The exit status of ``status``: what is worst decides."""
    states = {status["state"] for status in found}
    if overview.DEAD in states:
        return EXIT_DEAD
    return EXIT_SILENT if overview.SILENT in states else 0


def sentence(status: dict[str, Any]) -> str:
    """One line for a mount that is in any state but ``serving``."""
    return f"{status['mountpoint']}: {_SAID[status['state']](status)}"


def _silent(status: dict[str, Any]) -> str:
    pid = status.get("pid")
    process, kill = (f" (process {pid})", f"`kill -KILL {pid}`") if pid else ("", "kill it")
    return (
        f"THE DAEMON{process} DOES NOT ANSWER; {_dirty(status)}."
        f" If it does not recover: {kill}, and mount again. What was acknowledged is in the cache"
    )


def _dead(status: dict[str, Any]) -> str:
    what = "DEAD MOUNT, its daemon has died" if status.get("mounted") else "NOT MOUNTED, its daemon has died"
    return f"{what}; {_dirty(status)}. Mount it again: `{_command(status)}`"


def _unmounted(status: dict[str, Any]) -> str:
    return f"not mounted; {_dirty(status)}. To write it back: `{_command(status)}`"


def _foreign(status: dict[str, Any]) -> str:
    return "served by the daemon of another user, who can ask it"


_SAID = {
    overview.SILENT: _silent,
    overview.DEAD: _dead,
    overview.UNMOUNTED: _unmounted,
    overview.FOREIGN: _foreign,
}


def _dirty(status: dict[str, Any]) -> str:
    if "cache" not in status:
        return "its cache is not known"
    if "dirty_bytes" not in status:
        return f"its cache {status['cache']} cannot be read"
    least = "" if status["complete"] else "at least "
    return f"{least}{bytes_text(status['dirty_bytes'])} dirty in {status['cache']}"


def _command(status: dict[str, Any]) -> str:
    words = ["cachefsd", "mount", status["backing"]]
    if status["mountpoint"] != status["backing"]:
        words.append(status["mountpoint"])
    if "cache" in status:
        words += ["--cache", status["cache"]]
    return shlex.join(words)


def left_behind(status: dict[str, Any], left: Look | None) -> str:
    """What ``unmount`` says: how much stays dirty and where, and what is to be seen now.

    ``status`` is what was known before; ``left`` what its cache holds now, if that could be read.
    """
    said = f"{status['mountpoint']} is unmounted"
    if "cache" not in status:
        return f"{said}; its cache is not known"
    if left is None:
        return f"{said}; its cache {status['cache']} cannot be read"
    dirty = left.slots.dirty * left.superblock.geometry.block_size
    if not dirty and left.slots.complete:
        return f"{said}; the backing has everything"
    least = "" if left.slots.complete else "at least "
    said += f"; {least}{bytes_text(dirty)} stay dirty in {status['cache']}"
    if status["mountpoint"] == status["backing"]:
        said += f", and {status['mountpoint']} shows the older content of the backing until it is mounted again"
    return said


def lines_of_cache(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A cache by itself, as names and values."""
    slots, size = status["slots"], status["block_size"]
    yield "backing", status["backing"] or "none yet"
    yield "pool", f"{status['pool']}, {bytes_text(slots['total'] * size)} in blocks of {bytes_text(size)}"
    if status["used_by"] is not None:
        yield "in use", f"by process {status['used_by']}, so these numbers change"
    else:
        yield "stopped", "in order" if status["stopped_in_order"] else "NOT in order: the next mount recovers"
    yield "slots", f"{slots['dirty']:,} dirty, {slots['clean']:,} clean, {slots['free']:,} free of {slots['total']:,}"
    yield "dirty", f"{bytes_text(status['dirty_bytes'])} in {status['dirty_files']:,} files"
    for file in status["files"][:_MAX_SHOWN]:
        yield "", f"{file['path'] or 'file {}'.format(file['file_id'])}: {bytes_text(file['dirty_bytes'])}"
    if status["dirty_files"] > _MAX_SHOWN:
        yield "", f"and {status['dirty_files'] - _MAX_SHOWN:,} more files"
    if slots["quarantined"]:
        yield "quarantined", f"{slots['quarantined']:,} slots, set aside"
    if status["lost_bytes"]:
        yield "LOST", f"{bytes_text(status['lost_bytes'])} of files"
    if status["lost_unknown"]:
        yield "LOST", f"{status['lost_unknown']:,} blocks of unknown files, or none: their headers are damaged"
