"""Question 12: what the promise costs."""

from __future__ import annotations

from bench.candidates import Served, own
from bench.fio import fio
from bench.question import OWN, Bar, Figures, Question, Scale

UNCHECKED, PMEM = "no checksums", "pmem primitives"
WRITE, DEEP = "4 KiB write, depth 1 [IOPS]", "4 KiB write, depth 16 [IOPS]"
READ, LARGE = "4 KiB read hit, depth 16 [IOPS]", "1 MiB write [MiB/s]"


def measure(served: Served, scale: Scale) -> Figures:
    size = scale.pick(256, 64)
    file = served.file(size)
    figures = {}
    for name, depth in ((WRITE, 1), (DEEP, 16)):
        figures[name] = fio(file, "randwrite", size_mib=size, depth=depth, seconds=scale.seconds).iops
        served.settle()
    figures[READ] = fio(file, "randread", size_mib=size, depth=16, seconds=scale.seconds).iops
    figures[LARGE] = fio(file, "write", bs="1m", size_mib=size, seconds=scale.seconds).mib_s
    return figures


QUESTION = Question(
    number=12,
    title="the cost of the promise",
    about="The same with checksums that are not computed; and with stores that are flushed and fenced as in class "
    "pmem, on the memory of this machine. O_DIRECT.",
    candidates=[own(UNCHECKED, patch="no-checksums"), own(), own(PMEM, patch="pmem")],
    measure=measure,
    bars=[
        *(Bar(figure, 0.85, of=UNCHECKED) for figure in (WRITE, DEEP, READ, LARGE)),
        *(Bar(figure, 0.85, of=OWN, candidate=PMEM) for figure in (WRITE, DEEP, READ, LARGE)),
    ],
)
