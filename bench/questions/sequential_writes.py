"""Question 5: large sequential writes."""

from __future__ import annotations

from bench.candidates import BINDFS, CEILING, MERGERFS, NATIVE, RCLONE, Served, own
from bench.fio import fio
from bench.question import Bar, Figures, Question, Scale

CASES = {
    f"{size}, {kind} [MiB/s]": (bs, kind == "direct")
    for size, bs in (("1 MiB", "1m"), ("128 KiB", "128k"))
    for kind in ("buffered", "direct")
}
COPIED = "new file, synced at the end [MiB/s]"


def measure(served: Served, scale: Scale) -> Figures:
    size = scale.pick(256, 64)
    file = served.file(size)
    figures = {}
    for name, (bs, direct) in CASES.items():
        if direct and not served.candidate.direct:
            continue
        figures[name] = fio(file, "write", bs=bs, size_mib=size, direct=direct, seconds=scale.seconds).mib_s
        served.settle()
    if served.candidate is not CEILING:  # it has one file only
        synced = ("--end_fsync=1",)
        new = served.directory / "new"
        figures[COPIED] = fio(new, "write", bs="1m", size_mib=size, direct=False, extra=synced).mib_s
    return figures


QUESTION = Question(
    number=5,
    title="sequential write",
    about="fio, one request at a time, over a file that is there already, without fsync: what cachefsd has "
    "acknowledged is durable in its cache, what the others have (but for O_DIRECT) is in the page cache. "
    "And a new file with an fsync at its end. bindfs forwards O_DIRECT; mergerfs cannot.",
    candidates=[NATIVE, CEILING, own(), BINDFS, MERGERFS],
    measure=measure,
    bars=[
        *(Bar(name, 0.7, of=CEILING.name) for name in CASES),
        *(
            Bar(name, 1, of=peer.name)
            for name, (_, direct) in CASES.items()
            for peer in (BINDFS, MERGERFS)
            if peer.direct or not direct
        ),
    ],
    peers=[RCLONE],
)
