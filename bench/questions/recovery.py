"""Question 9: how soon after a kill a file can be read again."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from bench.candidates import NATIVE, Served, running
from bench.disks import BLOCK
from bench.question import Bar, Figures, Question, Scale
from bench.sparsepool import FILES, crashed
from cachefsd.service import control

MILLIONS = (1, 8)
FIRST_READ, RECOVERY = "kill to first read [s]", "of that, recovery [s]"


def candidate(millions: int) -> str:
    return f"{millions} M dirty slots"


def measure(served: Served, scale: Scale) -> Figures:
    slots = int(served.candidate.name.split()[0]) * 1_000_000
    command = crashed(served, slots)
    with running(command, served.mountpoint) as daemon:
        began = time.monotonic()
        daemon.kill()
        daemon.wait()
        with running(command, served.mountpoint):
            with (served.mountpoint / f"file-{FILES // 2}").open("rb", buffering=0) as file:
                file.seek(-BLOCK, os.SEEK_END)
                data = file.read()
            took = time.monotonic() - began
            status = control.ask(served.mountpoint, "status")
    if data != bytes(BLOCK) or status["recovery"]["blocks"] != slots or not status["requests"]["read_hits"]:
        raise RuntimeError(f"not what was in the cache: {status['recovery']}, {status['requests']}")
    return {FIRST_READ: took, RECOVERY: status["recovery"]["seconds"]}


QUESTION = Question(
    number=9,
    title="recovery",
    about="From kill -9 to the first block read after a new start, with so many dirty blocks of 4 KiB in "
    f"{FILES} files, in random slots. Class ram, checksums on. The pool is sparse and its blocks are zeros: recovery "
    "reads headers, not data.",
    candidates=[replace(NATIVE, name=candidate(millions)) for millions in MILLIONS],
    measure=measure,
    bars=[
        *(Bar(FIRST_READ, millions, candidate=candidate(millions), at_most=True) for millions in MILLIONS),
        Bar(RECOVERY, 10, of=candidate(MILLIONS[0]), candidate=candidate(MILLIONS[1]), at_most=True),
    ],
)
