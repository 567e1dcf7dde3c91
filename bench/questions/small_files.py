"""Question 14: how fast many small files are written back."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.candidates import NATIVE, Served, own
from bench.question import Bar, Figures, Question, Scale
from cachefsd.service import control

FILES, MANY, FEW = 3000, 15000, 150
SIZE = 200
SLOW_IOPS = 150
SLOW = " (slow disk)"
RATE, RATE_MANY = "files written back [1/s]", f"{MANY:,} files written back [1/s]"
REQUESTS = "requests to the disk [1/file]"
CACHE = own(options="dirty_age=1000000,low_watermark=0.99,high_watermark=1")
NATIVE_SLOW, CACHE_SLOW = NATIVE.on_loop(512, SLOW), CACHE.on_loop(512, SLOW)


def measure(served: Served, scale: Scale) -> Figures:
    slow = served.candidate.loop_mib is not None
    if not served.candidate.is_own:
        if not slow:
            return {RATE: synced(served, scale.pick(FILES, FILES // 3))}
        with served.disk.slow(SLOW_IOPS):
            return {RATE: synced(served, scale.pick(FEW, FEW // 3))}
    if not slow:
        rate, _ = flushed(served, "some", FILES)
        return {RATE: rate, RATE_MANY: flushed(served, "many", MANY)[0]}
    create(served.directory / "some", scale.pick(FILES, FILES // 3), sync=False)
    with served.disk.slow(SLOW_IOPS):
        rate, requests = flush(served, scale.pick(FILES, FILES // 3))
        return {RATE: rate, REQUESTS: requests}


def create(directory: Path, count: int, *, sync: bool) -> None:
    directory.mkdir()
    data = b"x" * SIZE
    for number in range(count):
        fd = os.open(directory / f"{number}", os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(fd, data)
        if sync:
            os.fsync(fd)
        os.close(fd)


def synced(served: Served, count: int) -> float:
    """Files a second, each with an fsync."""
    began = time.monotonic()
    create(served.directory / "synced", count, sync=True)
    return count / (time.monotonic() - began)


def flushed(served: Served, name: str, count: int) -> tuple[float, float]:
    create(served.directory / name, count, sync=False)
    return flush(served, count)


def flush(served: Served, count: int) -> tuple[float, float]:
    """Files a second, and requests to the disk for each of them."""
    dirty = served.status["slots"]["dirty"]
    if dirty != count:
        raise RuntimeError(f"{dirty} blocks are dirty, and not one of each of {count} files")
    requests, began = served.disk.requests(), time.monotonic()
    control.ask(served.mountpoint, "flush")
    took = time.monotonic() - began
    return count / took, (served.disk.requests() - requests) / count


QUESTION = Question(
    number=14,
    title="writeback of small files",
    about=f"{FILES:,} files of {SIZE} bytes are created, with watermarks and age that keep them in the cache, and then "
    "flushed. *native*: each is created, written and synced, one after the other. On the machine's disk, and on a loop "
    f"device of {SLOW_IOPS} requests a second. Requests are those that the loop device has completed. "
    f"{MANY:,} files take five times as long as {FILES:,} if the work for each does not grow with their number.",
    candidates=[NATIVE, CACHE, NATIVE_SLOW, CACHE_SLOW],
    measure=measure,
    bars=[
        Bar(RATE, 5, of=NATIVE.name),
        Bar(RATE, 5, candidate=CACHE_SLOW.name, of=NATIVE_SLOW.name),
        Bar(REQUESTS, 1.2, candidate=CACHE_SLOW.name, at_most=True),
        Bar(RATE_MANY, 0.8, of_figure=RATE),
    ],
)
