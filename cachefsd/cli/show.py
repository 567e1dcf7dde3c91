"""``status`` and progress for people. Imported when there are some: rich is large."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cachefsd.service.places import bytes_text

_SURVIVES = {
    "pmem": "writes survive power cuts",
    "disk": "fsyncs survive power cuts, writes survive the daemon",
    "ram": "nothing survives a power cut",
}
_MAX_SHOWN = 20
"""Files in trouble; ``--json`` has more."""


@contextlib.contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, of (done, total) bytes."""
    columns = (TextColumn(text), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_status(found: Iterable[dict[str, Any]]) -> None:
    """Print one table for each mount. Lines are as long as they are where it is not a terminal that shows them."""
    console = Console(highlight=False)
    for status in found:
        lines = list(_lines(status))
        if not console.is_terminal:
            width = max(len(name) for name, _ in lines)
            print(status["mountpoint"], *(f"{name:{width}}  {value}" for name, value in lines), sep="\n")
            continue
        table = Table.grid(padding=(0, 2))
        for name, value in lines:
            table.add_row(Text(name), Text(value))
        console.print(Text(status["mountpoint"], style="bold"))
        console.print(table)


def _lines(status: dict[str, Any]) -> Iterable[tuple[str, str]]:
    slots, requests, back = status["slots"], status["requests"], status["writeback"]
    recovery, size = status["recovery"], status["block_size"]
    yield "backing", status["backing"]
    yield "cache", f"{status['cache']}, {bytes_text(slots['total'] * size)} in blocks of {bytes_text(size)}"
    yield "pool", status["pool"]
    yield "durability", f"{status['durability']}: {_SURVIVES[status['durability']]}"
    if status["acknowledged"] != "at write":
        yield "", "after an fsync; until then the page cache has them (writeback_cache)"
    yield "daemon", f"process {status['pid']}, version {status['version']}"
    used = f"{_share(slots['dirty'], slots['total'])} dirty, {_share(slots['clean'], slots['total'])} clean"
    yield "slots", f"{used}, {slots['free']:,} of {slots['total']:,} free"
    if slots["quarantined"]:
        yield "quarantined", f"{slots['quarantined']:,} slots, set aside"
    yield "dirty", f"{bytes_text(status['dirty_bytes'])}, the oldest for {status['oldest_dirty_s']:.1f} s"
    space = status["space"]
    owed = bytes_text(space["owed_bytes"])
    yield "backing room", f"{bytes_text(space['room_bytes'])}, beyond {owed} for what is dirty"
    yield "reads", _hits(requests["read_hits"], requests["read_misses"])
    yield "writes", _hits(requests["write_hits"], requests["write_misses"])
    yield "moved", f"{status['promotions']:,} promotions, {status['evictions']:,} evictions"
    direct = f"{bytes_text(back['bytes'])} in {back['runs']:,} runs, {bytes_text(back['bounced_bytes'])} not direct"
    yield "writeback", direct
    if back["errors"]:
        last = back["last_error"]
        yield "errors", f"{back['errors']:,}, {f'the last: {last}' if last else 'all healed'}"
    for file in back["failing"][:_MAX_SHOWN]:
        yield "FAILING", f"{file['path']}: {file['error']}, {bytes_text(file['dirty_bytes'])}, {file['tries']} tries"
    if back["failing_files"] > _MAX_SHOWN:
        yield "", f"and {back['failing_files'] - _MAX_SHOWN:,} more files"
    for conflict in status.get("conflicts", [])[:_MAX_SHOWN]:
        text = f"{conflict['path']} was {conflict['why']} behind the mount; the cache's version is {conflict['copy']}"
        yield "CONFLICT", text.encode("utf-8", "backslashreplace").decode()
    if status.get("conflict_files", 0) > _MAX_SHOWN:
        yield "", f"and {status['conflict_files'] - _MAX_SHOWN:,} more files; `cachefsd resolve` lists them"
    start = "clean" if recovery["clean"] else "after a crash"
    yield "start", f"{start}, {recovery['blocks']:,} blocks in {recovery['seconds']:.2f} s"
    for lost in status["lost_blocks"][:_MAX_SHOWN]:
        yield "LOST", f"{lost['path']}: bytes {lost['from']} to {lost['to']}"
    if status["lost_ranges"] > _MAX_SHOWN:
        yield "", f"and {status['lost_ranges'] - _MAX_SHOWN:,} more places"
    if status["lost_unknown"]:
        yield "LOST", f"{status['lost_unknown']:,} blocks of unknown files, or none: their headers are damaged"
    if status["failed"]:
        yield "FAILED", status["failed"]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _hits(hits: int, misses: int) -> str:
    share = f" ({_share(hits, hits + misses)})" if hits + misses else ""
    return f"{hits:,} hits, {misses:,} misses{share}"
