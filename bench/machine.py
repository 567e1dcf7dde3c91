"""The machine that is measured on: what it is, and how it is kept from adding its own sleep to the figures."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STAT = Path("/proc/stat")
_PM_QOS = Path("/dev/cpu_dma_latency")


def description(*, polls: bool) -> dict[str, Any]:
    """For the report; ``polls`` is what :func:`awake` has said."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "idle": "poll" if polls else "halt",
    }


def busy_s() -> float:
    """CPU time that all processors have spent on anything, kernel threads and interrupts included, since the boot."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def awake() -> Iterator[bool]:
    """Idle processors poll and do not halt until the end of the block: False where we may not ask for it.

    A request that waits for another process halts its processor. In a guest that leaves the guest: a write of 4 KiB
    at depth 1 took 43 us with it and 20 us without, one of the null file system 23 and 12 us, so that the virtual
    machine's way to wake up was half of what was measured. The kernel's interface for it, until it is closed:
    Documentation/power/pm_qos_interface.rst.
    """
    try:
        fd = os.open(_PM_QOS, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        os.write(fd, (0).to_bytes(4, "little"))  # microseconds
        yield True
    finally:
        os.close(fd)
