"""Question 3: random reads of what is cached."""

from __future__ import annotations

from bench.candidates import BINDFS, CEILING, NATIVE, RCLONE, Served, own
from bench.fio import fio
from bench.question import Bar, Figures, Question, Scale

CASES = {"depth 1 [IOPS]": 1, "depth 16 [IOPS]": 16}
BUFFERED = "buffered [IOPS]"


def measure(served: Served, scale: Scale) -> Figures:
    size = scale.pick(256, 64)
    file = served.file(size)
    figures = {}
    for name, depth in CASES.items():
        figures[name] = fio(file, "randread", size_mib=size, depth=depth, seconds=scale.seconds).iops
    file.read_bytes()
    warm = ("--invalidate=0",)  # by another program than the one before
    figures[BUFFERED] = fio(file, "randread", size_mib=size, direct=False, seconds=scale.seconds, extra=warm).iops
    if served.candidate.is_own and served.status["requests"]["read_misses"]:
        raise RuntimeError("what should have been hits were misses")
    return figures


QUESTION = Question(
    number=3,
    title="4 KiB random read hits",
    about="fio over a file that is in the cache and clean, O_DIRECT; then buffered, after another program has read "
    "the file and closed it.",
    candidates=[CEILING, own(), NATIVE],
    measure=measure,
    bars=[
        Bar("depth 1 [IOPS]", 0.85, of=CEILING.name),
        Bar("depth 16 [IOPS]", 0.8, of=CEILING.name),
        Bar(BUFFERED, 0.9, of=NATIVE.name),
    ],
    peers=[BINDFS, RCLONE],
)
