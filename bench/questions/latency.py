"""Question 7: how long a hit takes while the backing is busy."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.candidates import Served, own
from bench.question import Bar, Figures, Question, Scale

BLOCK = 4096
CACHE_MIB = 128
SLOW_IOPS, BACKUP_IOPS, HANGING_IOPS = 150, 2000, 1
HANGING_READERS = 8
DIRTY_SHARE = 0.85
"""of the slots, when the cache is full; the rest is the file that is read"""
BELOW, ABOVE = (0.1, 0.4), (0.55, DIRTY_SHARE)
"""shares of dirty slots, on both sides of the high watermark"""
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


class Requests:
    """Random direct requests of one block to a file, one at a time; their latencies in µs."""

    def __init__(self, path: Path, size_mib: int, seed: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        self._page = mmap.mmap(-1, BLOCK)
        self._page[:] = os.urandom(BLOCK)
        self._rng = random.Random(seed)
        self._blocks = size_mib << 20 >> 12

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._page.close()

    def read(self, more: Callable[[], bool]) -> list[float]:
        """As long as there are to be more."""
        return self._run(more, lambda at: os.preadv(self._fd, [self._page], at))

    def write(self, count: int) -> list[float]:
        left = iter(range(count))
        return self._run(lambda: next(left, None) is not None, lambda at: os.pwrite(self._fd, self._page, at))

    def _run(self, more: Callable[[], bool], request: Callable[[int], int]) -> list[float]:
        clock, blocks, choose = time.perf_counter, self._blocks, self._rng.randrange
        latencies = []
        while more():
            at = choose(blocks) * BLOCK
            began = clock()
            done = request(at)
            latencies.append((clock() - began) * 1e6)
            if done != BLOCK:
                raise RuntimeError(f"{done} bytes instead of {BLOCK}")
        return latencies


def percentiles(what: str, latencies: list[float]) -> Figures:
    ordered = sorted(latencies)
    return {f"{what}, {name} [µs]": ordered[int(share * len(ordered))] for name, share in PERCENTILES.items()}


def for_seconds(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() < until


@contextlib.contextmanager
def reading(*paths: Path, block: str) -> Iterator[Callable[[], bool]]:
    """Programs that read files; whether all of them are at it."""
    words = ("of=/dev/null", f"bs={block}", "iflag=direct", "status=none")
    readers = [subprocess.Popen(["dd", f"if={path}", *words]) for path in paths]
    try:
        yield lambda: all(reader.poll() is None for reader in readers)
    finally:
        for reader in readers:
            reader.kill()
        for reader in readers:
            reader.wait()


def measure(served: Served, scale: Scale) -> Figures:
    hot_mib = CACHE_MIB // 16
    hot = served.file(hot_mib, "hot")
    backup = beneath(served, "backup", 10 * CACHE_MIB)
    hanging = [beneath(served, f"hanging-{number}", 1) for number in range(HANGING_READERS)]
    with Requests(hot, hot_mib, 1) as hits:
        figures = percentiles("idle", hits.read(for_seconds(scale.seconds)))
        misses = served.status["requests"]["read_misses"]
        figures |= drain(served, hits, scale.seconds)
        served.settle()
        if served.status["requests"]["read_misses"] != misses:
            raise RuntimeError("what should have been hits were misses")
        with served.disk.slow(BACKUP_IOPS), reading(backup, block="1M") as busy:
            figures |= percentiles("backup", hits.read(busy))
        hits.read(for_seconds(0.5))
        misses = served.status["requests"]["read_misses"]
        with served.disk.slow(HANGING_IOPS), reading(*hanging, block="4k") as busy:
            figures |= percentiles("hanging", hits.read(for_seconds(scale.seconds)))
            if not busy():
                raise RuntimeError("the reads did not hang")
        if served.status["requests"]["read_misses"] > misses + HANGING_READERS * (scale.seconds + 10):
            raise RuntimeError("what should have been hits were misses")
    return figures


def beneath(served: Served, name: str, size_mib: int) -> Path:
    """A file that the cache has never seen."""
    piece = os.urandom(1 << 20)
    with (served.disk.directory / name).open("wb", buffering=0) as output:
        for _ in range(size_mib):
            output.write(piece)
    served.disk.sync()
    return served.directory / name


def drain(served: Served, hits: Requests, seconds: float) -> Figures:
    """Fill the cache with what reaches the disk in small runs; then hits while it does."""
    slots = served.status["slots"]["total"]
    with (
        served.disk.slow(SLOW_IOPS),
        Requests(served.directory / "dirty", 8 * CACHE_MIB, 2) as writes,
    ):
        figures: Figures = {}
        for what, (start, end) in {"writes below the watermark": BELOW, "writes above it": ABOVE}.items():
            writes.write(max(0, int(start * slots) - served.status["slots"]["dirty"]))
            figures |= percentiles(what, writes.write(int((end - start) * slots)))
        before = served.status
        figures |= percentiles("draining", hits.read(for_seconds(seconds)))
        after = served.status
    if not after["writeback"]["bytes"] > before["writeback"]["bytes"] or not after["dirty_bytes"]:
        raise RuntimeError("the cache was not draining all the time")
    return figures


QUESTION = Question(
    number=7,
    title="latency of hits while the backing is busy",
    about=f"Random 4 KiB reads of a cached file, O_DIRECT, one at a time: *idle*; *draining*: {DIRTY_SHARE:.0%} of the "
    f"slots were made dirty by random writes, and writeback takes them to a disk of {SLOW_IOPS} requests a second; "
    f"*backup*: dd reads 10 times the cache ({CACHE_MIB} MiB) from a disk of {BACKUP_IOPS} requests a second; "
    f"*hanging*: {HANGING_READERS} programs read uncached files on a disk of {HANGING_IOPS} request a second. And the "
    "writes that fill the cache, on both sides of the high watermark (50 %).",
    candidates=[own(size_mib=CACHE_MIB).on_loop(4096)],
    measure=measure,
    bars=[
        *(
            Bar(f"{what}, p99 [µs]", 3, of_figure="idle, p99 [µs]", at_most=True)
            for what in ("draining", "backup", "hanging")
        ),
        Bar("writes above it, p99 [µs]", 3, of_figure="writes below the watermark, p99 [µs]", at_most=True),
    ],
)
