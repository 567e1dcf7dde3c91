"""What the candidates are measured with, in the guest."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.lab.candidates import CANDIDATES, FILES, ONE_FILE, Candidate, slow_disk

BLOCK = 4096
FIO_TIMEOUT_S = 600.0


def measure(name: str, delay_ms: int, workloads: list[str], seconds: float, file_mib: int, seed: int) -> dict[str, Any]:
    """One round of one candidate: a cell for each of ``workloads``; an error in one leaves the others."""
    cells: dict[str, Any] = {}
    with slow_disk(delay_ms), CANDIDATES[name]() as candidate:
        bench = Bench(candidate, seconds, file_mib, random.Random(seed))
        bench.fill()
        candidate.drain()
        for workload in workloads:
            if name in ONE_FILE and workload in MANY_FILES:
                continue
            print(f"{name}, {delay_ms} ms: {workload}", flush=True)
            before = cpu_seconds(candidate.daemon), time.monotonic()
            try:
                cell = WORKLOADS[workload](bench)
            except Exception:
                cells[workload] = {"error": traceback.format_exc()}
                continue
            spent = (time.monotonic() - before[1], *cpu_seconds(candidate.daemon))
            busy, daemon = (round((after - at) / spent[0], 3) for after, at in zip(spent[1:], before[0], strict=True))
            cells[workload] = cell | {"cpus_busy": busy, "daemon_cpus": daemon}
        return {"proof": candidate.proof, "cells": cells}


def cpu_seconds(pid: int | None) -> tuple[float, float]:
    """CPU time that the whole machine has spent so far, and that a process has."""
    ticks = os.sysconf("SC_CLK_TCK")
    # user, nice, system, idle, iowait, irq, softirq: proc(5)
    machine = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    process = 0
    if pid is not None:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        process = int(fields[11]) + int(fields[12])
    return (sum(machine) - machine[3] - machine[4]) / ticks, process / ticks


class Bench:
    """One file that is there from the beginning, and places for others."""

    def __init__(self, candidate: Candidate, seconds: float, file_mib: int, rng: random.Random) -> None:
        self.candidate = candidate
        self.rng = rng
        self._seconds = seconds
        self._file = FILES / "file"
        self._file_mib = file_mib

    def fill(self) -> None:
        with self._file.open("wb", buffering=0) as file:
            for _ in range(self._file_mib):
                file.write(self.rng.randbytes(1 << 20))
            os.fsync(file.fileno())

    def fio(self, *words: str) -> dict[str, float]:
        """Operations a second, and the median of their latencies in µs; the time of an fsync is one of its own."""
        command = [
            *("fio", "--name=cell", f"--filename={self._file}", f"--size={self._file_mib}m", "--norandommap"),
            *(f"--randseed={self.rng.getrandbits(32)}", "--time_based", f"--runtime={self._seconds}"),
            *("--output-format=json", "--eta=never", *words),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=FIO_TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"fio: status {done.returncode}: {done.stderr}")
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        if job["error"]:
            raise RuntimeError(f"fio: error {job['error']}")
        cell = {"per_second": job["read"]["iops"] + job["write"]["iops"]}
        cell["p50_us"] = job["write"]["clat_ns"]["percentile"]["50.000000"] / 1000
        if job["sync"].get("total_ios"):
            cell["sync_p50_us"] = job["sync"]["lat_ns"]["percentile"]["50.000000"] / 1000
        return cell

    def repeat(self, step: Callable[[int], object]) -> dict[str, float]:
        """Do steps, one after the other, while there is time."""
        count, began = 0, time.monotonic()
        while time.monotonic() - began < self._seconds:
            step(count)
            count += 1
        return {"per_second": count / (time.monotonic() - began)}

    def sqlite(self, journal: str) -> dict[str, float]:
        """Transactions of one row each, that are durable when they return."""
        database = sqlite3.connect(FILES / f"{journal}.db", isolation_level=None)
        (mode,) = database.execute(f"PRAGMA journal_mode={journal}").fetchone()
        if mode != journal:
            raise RuntimeError(f"SQLite's journal is {mode}")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, text)")
        cell = self.repeat(lambda number: database.execute("INSERT INTO rows VALUES (?, ?)", (number, "x" * 100)))
        database.close()
        return cell

    def small_files(self) -> dict[str, float]:
        """Create a file, write 4 KiB, fsync, close, as fs_mark does."""
        directory = FILES / "small"
        directory.mkdir()
        data = self.rng.randbytes(BLOCK)

        def create(number: int) -> None:
            fd = os.open(directory / f"{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(fd, data)
            os.fsync(fd)
            os.close(fd)

        return self.repeat(create)

    def burst(self) -> dict[str, float]:
        """Write a quarter of the file, blocks in random order, and fsync: until that returns, and until the disk has
        it."""
        self.candidate.drain()
        count = (self._file_mib << 20) // BLOCK
        blocks = self.rng.sample(range(count), count // 4)
        data = self.rng.randbytes(BLOCK)
        began = time.monotonic()
        fd = os.open(self._file, os.O_WRONLY)
        for block in blocks:
            os.pwrite(fd, data, block * BLOCK)
        os.fsync(fd)
        acknowledged = time.monotonic() - began
        os.close(fd)
        self.candidate.drain()
        return {"acknowledged_s": acknowledged, "drained_s": time.monotonic() - began}


_RANDOM = ("--rw=randwrite", "--bs=4k")
_DIRECT = ("--ioengine=libaio", "--direct=1")

WORKLOADS: dict[str, Callable[[Bench], dict[str, float]]] = {
    "fsync": lambda bench: bench.fio(*_RANDOM, "--ioengine=psync", "--fsync=1"),
    "fdatasync16": lambda bench: bench.fio(*_RANDOM, "--ioengine=psync", "--fdatasync=16"),
    "direct1": lambda bench: bench.fio(*_RANDOM, *_DIRECT, "--iodepth=1"),
    "direct16": lambda bench: bench.fio(*_RANDOM, *_DIRECT, "--iodepth=16"),
    "mix": lambda bench: bench.fio("--rw=randrw", "--rwmixread=70", "--bs=4k", *_DIRECT, "--iodepth=4"),
    "sequential": lambda bench: bench.fio("--rw=write", "--bs=1m", *_DIRECT, "--iodepth=1"),
    "sqlite-wal": lambda bench: bench.sqlite("wal"),
    "sqlite-rollback": lambda bench: bench.sqlite("delete"),
    "small-files": lambda bench: bench.small_files(),
    "burst": lambda bench: bench.burst(),
}
MANY_FILES = {"sqlite-wal", "sqlite-rollback", "small-files", "burst"}
"""Workloads that need more than one file, or something to drain."""
