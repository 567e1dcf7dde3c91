"""Question 10: the daemon's memory, and the time that it takes to start over many files."""

from __future__ import annotations

import itertools
import subprocess
import time
from dataclasses import replace

from bench.candidates import NATIVE, Served, anonymous_bytes, own, running
from bench.question import Bar, Figures, Question, Scale
from bench.sparsepool import crashed, small_files
from cachefsd.service import control

BUSY_MIB = 128
BUSY = own(size_mib=BUSY_MIB)
SLOTS = {"10,000 blocks": 10_000, "4,000,000 blocks": 4_000_000}
SMALL, LARGE = SLOTS
FILES = {"1,000 clean files": 1_000, "100,000 clean files": 100_000}
FEW, MANY = FILES
FILES_MIB = 512
"""of the pool of both"""
START = "start [s]"
PER_FILE, START_PER_FILE = "RSS per cached file [bytes]", "start per cached file [us]"
RSS = "RSS without the pool [MiB]"
PER_BLOCK, GROWTH = "RSS per cached block [bytes]", "growth while busy [MiB]"
RUN_S, QUICK_S = 600, 15
WARM_SHARE = 0.25
NAMES = 100
LONGEST = 160_000
"""bytes of the files that come and go, of all lengths from the start: a request's buffer is touched as far as the
longest that was ever in it, and with ever longer files that was half of what grew"""


def measure(served: Served, scale: Scale) -> Figures:
    if served.candidate is BUSY:
        return {GROWTH: growth(served, scale.pick(RUN_S, QUICK_S)) / 2**20}
    if served.candidate.name in FILES:
        return start(served, FILES[served.candidate.name])
    command = crashed(served, SLOTS[served.candidate.name])
    with running(command, served.mountpoint) as daemon:
        return {RSS: anonymous_bytes(daemon.pid) / 2**20}


def start(served: Served, files: int) -> Figures:
    """Memory after a start over so many small files that are all clean, and how long it takes until it serves."""
    command = small_files(served, files, FILES_MIB)
    began = time.monotonic()
    with running(command, served.mountpoint) as daemon:
        took = time.monotonic() - began
        status = control.ask(served.mountpoint, "status")
        if status["recovery"]["blocks"] != files or not status["recovery"]["clean"]:
            raise RuntimeError(f"not what was in the cache: {status['recovery']}")
        return {RSS: anonymous_bytes(daemon.pid) / 2**20, START: took}


def growth(served: Served, seconds: float) -> int:
    """Bytes that the daemon has more at the end than after a quarter of the time.

    Reads and writes of four times what fits, so that there are hits, misses, evictions and writeback; and files that
    come and go.
    """
    size = 4 * BUSY_MIB
    file = served.file(size)
    words = ("fio", "--name=busy", f"--filename={file}", "--rw=randrw", "--bs=4k", "--direct=1", "--ioengine=libaio")
    words += ("--thread", "--iodepth=8", f"--size={size}m", "--norandommap", "--time_based", f"--runtime={seconds}")
    assert served.daemon is not None
    began = time.monotonic()
    load = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        warm = None
        for number in itertools.count():
            path = served.directory / f"name-{number % NAMES}"
            data = bytes([number % 256]) * (number * 7919 % LONGEST)
            path.write_bytes(data)
            if path.read_bytes() != data:
                raise RuntimeError(f"{path} has another content")
            if number % 2:
                path.unlink()
            if warm is None and time.monotonic() - began > WARM_SHARE * seconds:
                warm = anonymous_bytes(served.daemon.pid)
            if load.poll() is not None:
                break
            time.sleep(0.01)
    finally:
        load.kill()
        load.wait()
    if load.returncode or warm is None:
        raise RuntimeError(f"fio ended with status {load.returncode}")
    return anonymous_bytes(served.daemon.pid) - warm


def derive(figures: dict[str, Figures]) -> None:
    if LARGE in figures:
        more = figures[LARGE][RSS] - figures[SMALL][RSS]
        figures[LARGE][PER_BLOCK] = more * 2**20 / (SLOTS[LARGE] - SLOTS[SMALL])
    if MANY in figures:
        more, files = figures[MANY][RSS] - figures[FEW][RSS], FILES[MANY] - FILES[FEW]
        figures[MANY][PER_FILE] = more * 2**20 / files
        figures[MANY][START_PER_FILE] = (figures[MANY][START] - figures[FEW][START]) * 1e6 / files


QUESTION = Question(
    number=10,
    title="memory",
    about="Anonymous memory of the daemon. Per cached block: what many cached blocks take more than few, made as for "
    f"question 9. Growth: from {WARM_SHARE:.0%} of a run of {RUN_S // 60} minutes to its end, with random reads and "
    "writes of four times the cache, and files that come and go. Per cached file: what a start over many small files, "
    "all clean, takes more than one over few. One round: it hardly depends on the machine's speed.",
    candidates=[*(replace(NATIVE, name=name) for name in (*SLOTS, *FILES)), BUSY],
    measure=measure,
    derive=derive,
    rounds=1,
    bars=[
        Bar(PER_BLOCK, 40, candidate=LARGE, at_most=True),
        Bar(GROWTH, 1, at_most=True),
        Bar(PER_FILE, 1024, candidate=MANY, at_most=True),
        Bar(START_PER_FILE, 50, candidate=MANY, at_most=True),
    ],
)
