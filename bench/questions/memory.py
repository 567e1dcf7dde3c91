"""Question 10: the daemon's memory."""

from __future__ import annotations

import itertools
import subprocess
import time

from bench.candidates import Served, own
from bench.question import Bar, Figures, Question, Scale

SMALL_MIB, LARGE_MIB, BUSY_MIB = 64, 2048, 128
KEPT = "dirty_age=1000000,low_watermark=0.99,high_watermark=1"
SMALL = own(f"{SMALL_MIB} MiB, full", size_mib=SMALL_MIB, options=KEPT)
LARGE = own(f"{LARGE_MIB} MiB, full", size_mib=LARGE_MIB, options=KEPT)
BUSY = own("cachefsd", size_mib=BUSY_MIB)
RSS, BLOCKS = "RSS without the pool [MiB]", "cached blocks [1]"
PER_BLOCK, GROWTH = "RSS per cached block [bytes]", "growth while busy [MiB]"
RUN_S, QUICK_S = 600, 15
WARM_SHARE = 0.25
NAMES = 100


def measure(served: Served, scale: Scale) -> Figures:
    if served.candidate is BUSY:
        return {GROWTH: growth(served, scale.pick(RUN_S, QUICK_S)) / 2**20}
    size = LARGE_MIB if served.candidate is LARGE else SMALL_MIB
    with (served.directory / "file").open("wb", buffering=0) as file:
        piece = bytes(1 << 20)
        for _ in range(size * 9 // 10):
            file.write(piece)
    return {RSS: served.anonymous_bytes / 2**20, BLOCKS: served.status["slots"]["dirty"]}


def growth(served: Served, seconds: float) -> int:
    """Bytes that the daemon has more at the end than after a quarter of the time.

    Reads and writes of four times what fits, so that there are hits, misses, evictions and writeback; and files that
    come and go.
    """
    size = 4 * BUSY_MIB
    file = served.file(size)
    words = ("fio", "--name=busy", f"--filename={file}", "--rw=randrw", "--bs=4k", "--direct=1", "--ioengine=libaio")
    words += ("--iodepth=8", f"--size={size}m", "--norandommap", "--time_based", f"--runtime={seconds}")
    began = time.monotonic()
    load = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        warm = None
        for number in itertools.count():
            path = served.directory / f"name-{number % NAMES}"
            path.write_bytes(b"data" * number)
            if path.read_bytes() != b"data" * number:
                raise RuntimeError(f"{path} has another content")
            if number % 2:
                path.unlink()
            if warm is None and time.monotonic() - began > WARM_SHARE * seconds:
                warm = served.anonymous_bytes
            if load.poll() is not None:
                break
            time.sleep(0.01)
    finally:
        load.kill()
        load.wait()
    if load.returncode or warm is None:
        raise RuntimeError(f"fio ended with status {load.returncode}")
    return served.anonymous_bytes - warm


def derive(figures: dict[str, Figures]) -> None:
    small, large = figures[SMALL.name], figures[LARGE.name]
    more = (large[RSS] - small[RSS]) * 2**20
    large[PER_BLOCK] = more / (large[BLOCKS] - small[BLOCKS])


QUESTION = Question(
    number=10,
    title="memory",
    about="Anonymous memory of the daemon. Per cached block: what a full pool takes more than a small full one, by "
    f"blocks. Growth: from {WARM_SHARE:.0%} of a run of {RUN_S // 60} minutes to its end, with random reads and writes "
    "of four times the cache, and files that come and go. One round: it does not depend on the machine's speed.",
    candidates=[SMALL, LARGE, BUSY],
    measure=measure,
    derive=derive,
    rounds=1,
    bars=[
        Bar(PER_BLOCK, 40, candidate=LARGE.name, at_most=True),
        Bar(GROWTH, 1, at_most=True),
    ],
)
