"""Question 13: small buffered writes."""

from __future__ import annotations

from bench.candidates import BINDFS, CEILING, MERGERFS, NATIVE, Served, own
from bench.fio import fio
from bench.question import Bar, Figures, Question, Scale

GATHERED = own("cachefsd, writeback_cache", options="writeback_cache")
CASES = {"random [IOPS]": "randwrite", "sequential [IOPS]": "write"}
SYNCED = "sequential, fsync after each 64 [IOPS]"


def measure(served: Served, scale: Scale) -> Figures:
    size = scale.pick(256, 64)
    file = served.file(size)
    figures = {}
    for name, rw in CASES.items():
        figures[name] = fio(file, rw, size_mib=size, direct=False, seconds=scale.seconds).iops
        served.settle()
    every = ("--fsync=64",)
    figures[SYNCED] = fio(file, "write", size_mib=size, direct=False, seconds=scale.seconds, extra=every).iops
    return figures


QUESTION = Question(
    number=13,
    title="small buffered writes",
    about="fio, 4 KiB, over a file that is there already. What cachefsd has acknowledged is durable in its cache; with "
    "the option writeback_cache, and natively, it is in the page cache until an fsync.",
    candidates=[NATIVE, GATHERED, own(), CEILING],
    measure=measure,
    bars=[Bar(name, 0.7, of=NATIVE.name, candidate=GATHERED.name) for name in CASES],
    peers=[BINDFS, MERGERFS],
)
