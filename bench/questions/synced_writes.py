"""Question 2: writes that must be durable, one at a time, against the disk itself."""

from __future__ import annotations

from bench.candidates import NATIVE, RCLONE, Served, own
from bench.fio import Result, fio
from bench.question import Bar, Figures, Question, Scale

SLOW_IOPS = 150
SLOW_MIB = 512
SLOW = " (slow disk)"
SYNCED, DSYNC = "write + fsync [IOPS]", "O_DSYNC write [IOPS]"


def measure(served: Served, scale: Scale) -> Figures:
    size = scale.pick(64, 16)
    file = served.file(size)

    def run(*words: str) -> Result:
        return fio(file, "randwrite", size_mib=size, direct=False, seconds=scale.seconds, extra=words)

    if served.candidate.loop_mib is not None:
        with served.disk.slow(SLOW_IOPS):
            return {SYNCED: run("--fsync=1").iops}
    figures = {SYNCED: run("--fsync=1").iops}
    served.settle()
    return figures | {DSYNC: run("--sync=dsync").iops}


QUESTION = Question(
    number=2,
    title="4 KiB writes made durable one at a time",
    about="fio, buffered random writes over a file that is there already, each followed by fsync, or with O_DSYNC. "
    f"The slow disk is ext4 on a loop device that is throttled to {SLOW_IOPS} requests a second. rclone answers "
    "fsync without doing anything.",
    candidates=[NATIVE, own(), NATIVE.on_loop(SLOW_MIB, SLOW), own().on_loop(SLOW_MIB, SLOW)],
    measure=measure,
    bars=[
        Bar(SYNCED, 1.2, of=NATIVE.name),
        Bar(DSYNC, 2, of=NATIVE.name),
        Bar(SYNCED, 100, of=NATIVE.name + SLOW, candidate=own().name + SLOW),
    ],
    peers=[RCLONE],
)
