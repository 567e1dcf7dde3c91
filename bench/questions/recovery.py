"""Question 9: how soon after a kill a file can be read again."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from bench.candidates import NATIVE, Served, own, running
from bench.disks import Absent
from bench.question import Bar, Figures, Question, Scale
from bench.sparsepool import grow
from cachefsd.service import control

FILES = 64
FIRST_POOL_MIB = 64
TMPFS_BYTES_PER_SLOT = 128
"""of headers and of what else is in memory"""
MILLIONS = (1, 8)
FIRST_READ, RECOVERY = "kill to first read [s]", "of that, recovery [s]"


def candidate(millions: int) -> str:
    return f"{millions} M dirty slots"


def measure(served: Served, scale: Scale) -> Figures:
    slots = int(served.candidate.name.split()[0]) * 1_000_000
    usage = os.statvfs(served.memory)
    if usage.f_bavail * usage.f_frsize < slots * TMPFS_BYTES_PER_SLOT:
        raise Absent("not enough memory for the headers")
    # Nothing is written back: it is in the pool only.
    options = "dirty_age=1000000,low_watermark=0.99,high_watermark=1"
    places = {"disk": served.disk.directory, "mnt": served.mountpoint, "memory": served.memory}
    command = [part.format_map(places) for part in own(size_mib=FIRST_POOL_MIB, options=options).command]
    with running(command, served.mountpoint) as first:
        for number in range(FILES):
            (served.mountpoint / f"file-{number}").write_bytes(bytes(4096))
        first.kill()
        first.wait()
    grow(served.memory / "cache", slots, seed=1)
    with running(command, served.mountpoint) as crashed:
        began = time.monotonic()
        crashed.kill()
        crashed.wait()
        with running(command, served.mountpoint):
            with (served.mountpoint / f"file-{FILES // 2}").open("rb", buffering=0) as file:
                file.seek(-4096, os.SEEK_END)
                data = file.read()
            took = time.monotonic() - began
            status = control.ask(served.mountpoint, "status")
    if data != bytes(4096) or status["recovery"]["blocks"] != slots or not status["requests"]["read_hits"]:
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
