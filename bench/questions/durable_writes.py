"""Question 1: durable random writes."""

from __future__ import annotations

from bench.candidates import BINDFS, CEILING, NATIVE, RCLONE, Served, null, own
from bench.fio import fio
from bench.question import Bar, Figures, Question, Scale

STOCK = null("stock")
CASES = {"depth 1 [IOPS]": (1, 1), "depth 16 [IOPS]": (16, 1), "4 jobs [IOPS]": (1, 4)}
"""depth and jobs"""


def measure(served: Served, scale: Scale) -> Figures:
    size = scale.pick(256, 64)
    file = served.file(size)
    figures = {}
    for name, (depth, jobs) in CASES.items():
        done = fio(file, "randwrite", size_mib=size, depth=depth, jobs=jobs, seconds=scale.seconds)
        figures[name] = done.iops
        served.settle()
    if not scale.quick and served.candidate.is_own:
        # Long enough that writeback, which starts after 5 s, is most of it.
        figures["depth 16 for 20 s [IOPS]"] = fio(file, "randwrite", size_mib=size, depth=16, seconds=20).iops
    return figures


QUESTION = Question(
    number=1,
    title="durable 4 KiB random write (O_DIRECT)",
    about="fio over one file that is there already; what is dirty is written back between the runs, but for the "
    "last one, in which it is as usual. *null* is a file system that does nothing, on the pump or on pyfuse3's "
    "stock loop.",
    candidates=[NATIVE, CEILING, own(), STOCK],
    measure=measure,
    bars=[
        Bar("depth 1 [IOPS]", 0.75, of=CEILING.name),
        Bar("depth 16 [IOPS]", 0.65, of=CEILING.name),
        Bar("4 jobs [IOPS]", 0.65, of=CEILING.name),
        Bar("depth 16 [IOPS]", 2.5, of=STOCK.name),
        Bar("depth 1 [IOPS]", 1, of=NATIVE.name),
        Bar("depth 16 [IOPS]", 1, of=NATIVE.name),
        Bar("4 jobs [IOPS]", 1, of=NATIVE.name),
    ],
    peers=[BINDFS, RCLONE],
)
