"""Question 4: reads of what is not cached."""

from __future__ import annotations

from bench.candidates import NATIVE, Served, own
from bench.disks import drop_caches
from bench.fio import fio
from bench.question import Bar, Figures, Question, Scale

RANDOM, SEQUENTIAL = "random, depth 16 [IOPS]", "sequential, 1 MiB [MiB/s]"


def measure(served: Served, scale: Scale) -> Figures:
    size = scale.pick(512, 96)
    for name in ("random", "sequential"):
        # Beneath the mount: the cache has never seen it.
        with (served.disk.directory / name).open("wb", buffering=0) as output:
            piece = bytes(range(256)) * 4096
            for _ in range(size):
                output.write(piece)
    drop_caches()
    # Each block once, and no longer than so many seconds: the second time it would be a hit.
    limit = (f"--runtime={round(1000 * scale.seconds)}ms",)
    figures = {RANDOM: fio(served.directory / "random", "randread", size_mib=size, depth=16, extra=limit).iops}
    drop_caches()
    sequential = fio(served.directory / "sequential", "read", size_mib=size, bs="1m", direct=False)
    figures[SEQUENTIAL] = sequential.mib_s
    if served.candidate.is_own and served.status["requests"]["read_hits"] > served.status["requests"]["read_misses"]:
        raise RuntimeError("most reads were hits")
    return figures


QUESTION = Question(
    number=4,
    title="read misses",
    about="fio over files that the cache has never seen and the page cache has dropped, on the machine's disk: random "
    "4 KiB with O_DIRECT, each block once; and in order, buffered.",
    candidates=[NATIVE, own(size_mib=1280)],
    measure=measure,
    bars=[Bar(RANDOM, 0.5, of=NATIVE.name), Bar(SEQUENTIAL, 0.8, of=NATIVE.name)],
)
