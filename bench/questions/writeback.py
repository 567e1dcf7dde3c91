"""Question 6: how dirty blocks reach the disk."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace

from bench import machine
from bench.candidates import NATIVE, Served, own
from bench.fio import fio
from bench.question import Bar, Figures, Question, Scale

RAW = replace(NATIVE, name="raw O_DIRECT")
COPY = replace(NATIVE, name="read()/write() copy")
LOOP = own("cachefsd (as usual)").on_loop(512)
TIMES = 10
OVERWRITTEN_MIB = 16
SEQUENTIAL, RANDOM = "sequential [MiB/s]", "random [MiB/s]"
CPU, CPU_RANDOM = "CPU [s/GiB]", "CPU, random [s/GiB]"
RUNS, REACHED = "runs, random [1/GiB]", f"overwritten {TIMES} x: reached the disk [times]"


def measure(served: Served, scale: Scale) -> Figures:
    size = scale.pick(512, 128)
    if served.candidate is RAW:
        file = served.file(size)
        words = ("--end_fsync=1",)
        return {SEQUENTIAL: fio(file, "write", bs="1m", depth=8, size_mib=size, extra=words).mib_s}
    if served.candidate is COPY:
        return copy(served, size)
    if served.candidate is LOOP:
        return overwrite(served)
    return drain(served, size)


def copy(served: Served, size_mib: int) -> Figures:
    """What a copy from memory takes with dd."""
    file = served.file(size_mib)
    source = served.memory / "source"
    source.write_bytes(file.read_bytes())
    served.settle()
    cpu, began = machine.busy_s(), time.monotonic()
    subprocess.run(["dd", f"if={source}", f"of={file}", "bs=1M", "conv=notrunc,fsync", "status=none"], check=True)
    took, used = time.monotonic() - began, machine.busy_s() - cpu
    return {SEQUENTIAL: size_mib / took, CPU: used / size_mib * 1024}


def drain(served: Served, size_mib: int) -> Figures:
    """Make a whole file dirty, in order and in random order, and flush it."""
    file = served.file(size_mib)
    fio(file, "write", bs="1m", size_mib=size_mib)
    sequential, cpu, _ = flush(served, size_mib)
    fio(file, "randwrite", depth=16, size_mib=size_mib)
    random, cpu_random, runs = flush(served, size_mib)
    return {SEQUENTIAL: sequential, CPU: cpu, RANDOM: random, CPU_RANDOM: cpu_random, RUNS: runs}


def flush(served: Served, size_mib: int) -> tuple[float, float, float]:
    """MiB/s, CPU seconds per GiB and runs per GiB of a flush, for which ``size_mib`` must be dirty."""
    before = served.status
    if before["dirty_bytes"] != size_mib << 20:
        raise RuntimeError(f"{before['dirty_bytes']} bytes are dirty, and not {size_mib} MiB")
    cpu, began = machine.busy_s(), time.monotonic()
    served.settle()
    took, used = time.monotonic() - began, machine.busy_s() - cpu
    runs = served.status["writeback"]["runs"] - before["writeback"]["runs"]
    return size_mib / took, used / size_mib * 1024, runs / size_mib * 1024


def overwrite(served: Served) -> Figures:
    """Every block of a file several times, in random order; then what the device has got of it."""
    file = served.file(OVERWRITTEN_MIB)
    before = served.disk.bytes_written()
    fio(file, "randwrite", depth=16, size_mib=OVERWRITTEN_MIB, extra=(f"--loops={TIMES}",))
    served.settle()
    return {REACHED: (served.disk.bytes_written() - before) / (OVERWRITTEN_MIB << 20)}


QUESTION = Question(
    number=6,
    title="writeback",
    about="A whole file is made dirty, by 1 MiB or by random 4 KiB writes, with watermarks and age that keep it in the "
    "cache; then it is flushed. CPU is that of the whole machine, kernel threads that write pages out included; "
    "checksums are verified. *raw O_DIRECT*: fio, 1 MiB at depth 8 and an fsync. "
    f"*read()/write() copy*: dd from memory, with an fsync. Overwritten {TIMES} x: "
    f"{OVERWRITTEN_MIB} MiB, options as they come, and what the device (a loop device) got, metadata included.",
    candidates=[RAW, own(options="dirty_age=1000000,low_watermark=0.99,high_watermark=1"), COPY, LOOP],
    measure=measure,
    bars=[
        Bar(SEQUENTIAL, 0.85, of=RAW.name),
        Bar(RANDOM, 0.85, of=RAW.name, of_figure=SEQUENTIAL),
        Bar(CPU, 0.5, of=COPY.name, at_most=True),
        Bar(RUNS, 1100, at_most=True),
        Bar(REACHED, 1.2, candidate=LOOP.name, at_most=True),
    ],
)
