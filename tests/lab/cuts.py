"""Power cuts under workloads, and what must be found after each."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from lab import guest
from lab.machine import Guest, GuestError, Lab, Machine
from lab.workloads import Oracle, all_at_once

PMEM, SLOW, FILES = Path("/mnt/pmem"), Path("/mnt/slow"), Path("/mnt/files")
CACHE = PMEM / "cache"
POOL = "8M"
"""less than what the workloads touch: blocks are written back, evicted and fetched again all the time"""

_ACKNOWLEDGEMENTS = (20, 400)
"""of all workloads together, from boot to cut"""
_PATIENCE_S = 1800.0
_RECOVERIES_CUT = 0.2
_FLUSHES_CUT = 0.25
_BACKING_CHECKED = 0.2
"""how often, besides the last time; it takes as long as all the rest"""
_RECOVERS = b"recovers\n"
_DIRTY_AGES = (0.2, 3600.0)
"""in seconds: writeback runs all the time, or the cache fills up"""


def run_cuts(lab: Lab, workloads: tuple[str, ...], cuts: int) -> dict[str, Any]:
    """Cut the power ``cuts`` times under all of ``workloads`` at once; returns figures.

    After each cut everything acknowledged must be there, through the cache; sometimes, and in the end, also in the
    backing after a flush; and in the end in the backing alone after one more cut.
    """
    trial = Trial(lab.machine(nvdimm_mib=128, disks_mib={"slow": 256}), lab.rng, workloads)
    with trial.machine.boot(lab.rng) as running:
        running.call(set_up)
        running.call(begin, workloads)
        trial.load_until_cut(running)
    for cut in range(1, cuts + 1):
        if cut == 2 or lab.rng.random() < _RECOVERIES_CUT:  # once at least, in short runs too
            trial.cut_recovery()
        with trial.machine.boot(lab.rng) as running:
            running.call(serve, lab.rng.choice(_DIRTY_AGES))
            trial.check(running)
            if cut == cuts or lab.rng.random() < _BACKING_CHECKED:
                running.call(flush_and_check_backing, trial.told())
                trial.figures["backing_checked"] += 1
            if cut < cuts:
                trial.load_until_cut(running)
        print(f"  cut {cut}: {trial.figures}", file=sys.stderr, flush=True)
    # A flush that has returned needs neither the cache nor an orderly end.
    with trial.machine.boot(lab.rng) as running:
        running.call(check_backing_alone, trial.told())
    acknowledged = {name: oracle.acknowledged for name, oracle in trial.oracles.items()}
    assert all(acknowledged.values()), f"not every workload got to work: {acknowledged}"
    return {"cuts": cuts, **trial.figures, "acknowledged": acknowledged}


class Trial:
    """One machine with a mount at :data:`FILES`, and what must be in it."""

    def __init__(self, machine: Machine, rng: random.Random, workloads: tuple[str, ...]) -> None:
        self._rng = rng
        self.machine = machine
        self.oracles: dict[str, Oracle] = {name: _module(name).Oracle(rng) for name in workloads}
        self.figures = dict.fromkeys(("recoveries_cut", "flushes_cut", "backing_checked", "sectors_lost"), 0)

    def told(self) -> dict[str, Any]:
        return {name: oracle.told() for name, oracle in self.oracles.items()}

    def check(self, running: Guest) -> None:
        for name, found in running.call(check, self.told()).items():
            self.oracles[name].settle(found)

    def load_until_cut(self, running: Guest) -> None:
        """The power goes after a random number of acknowledgements."""
        wanted = self._rng.randint(*_ACKNOWLEDGEMENTS)
        loading = running.start(load, self.told())
        deadline = time.monotonic() + _PATIENCE_S
        while self.machine.acknowledged.read_bytes().count(b"\n") < wanted:
            assert time.monotonic() < deadline, "the guest gets on too slowly"
            _require_running(running, loading, "the workloads")
        if self._rng.random() < _FLUSHES_CUT:
            flushing = running.start(flush)
            time.sleep(self._rng.uniform(0, 3))
            self.figures["flushes_cut"] += _is_running(running, flushing)
        time.sleep(self._rng.uniform(0, 0.3))
        self._cut()
        for line in self.machine.acknowledged.read_bytes().split(b"\n")[:-1]:
            name, *words = line.decode().split()
            self.oracles[name].hear(*map(int, words))

    def cut_recovery(self) -> None:
        """The power goes while a daemon recovers, if the moment is hit."""
        with self.machine.boot(self._rng) as running:
            recovering = running.start(stop_in_recovery, self._rng.uniform(0, 0.5))
            while not (said := self.machine.acknowledged.read_bytes()).endswith(b"\n"):
                _require_running(running, recovering, "the daemon")
            self._cut()
        self.figures["recoveries_cut"] += said == _RECOVERS

    def _cut(self) -> None:
        self.machine.cut()
        self.figures["sectors_lost"] = sum(disk.lost for disk in self.machine.disks.values())


def _is_running(running: Guest, call: int) -> bool:
    try:
        running.wait(call, 0.05)
    except TimeoutError:
        return True
    return False


def _require_running(running: Guest, call: int, what: str) -> None:
    if not _is_running(running, call):
        raise GuestError(f"{what} have ended")


def _module(workload: str) -> Any:
    return importlib.import_module(f"lab.workloads.{workload}")


# ---- in the guest


def set_up() -> None:
    guest.make_namespace("fsdax", "-M", "mem")
    guest.make_file_system("ext4", guest.PMEM)
    guest.make_file_system("ext4", guest.disk("slow"))
    mount_file_systems()
    guest.run("cachefsd", "format", CACHE, "--size", POOL)
    guest.run("cachefsd", "mount", SLOW, FILES, "--cache", CACHE)
    durability = json.loads(guest.run("cachefsd", "status", "--json", FILES))["durability"]
    assert durability == "pmem", durability


def begin(workloads: list[str]) -> None:
    """What workloads need once, below the mount."""
    for name in workloads:
        (FILES / name).mkdir()
        _module(name).set_up(FILES / name)
    os.sync()  # of the backing, where the directories are: they, too, are durable only then


def mount_file_systems() -> None:
    FILES.mkdir(exist_ok=True)
    guest.mount(guest.PMEM, PMEM, "dax=always")
    guest.mount(guest.disk("slow"), SLOW)


def serve(dirty_age: float) -> None:
    """Mount after a cut."""
    mount_file_systems()
    guest.run("cachefsd", "mount", SLOW, FILES, "--cache", CACHE, "-o", f"dirty_age={dirty_age}")


def stop_in_recovery(delay: float) -> None:
    """Mount after a cut, hold the daemon ``delay`` seconds after its recovery began, and tell whether that goes on."""
    mount_file_systems()
    with _acknowledging() as port:
        daemon = subprocess.Popen(["cachefsd", "mount", SLOW, FILES, "--cache", CACHE, "--foreground"])
        # The pool is mapped, then recovered, then there is a mount.
        maps = Path(f"/proc/{daemon.pid}/maps")
        while f"{CACHE}/pool" not in maps.read_text():
            assert daemon.poll() is None
        time.sleep(delay)
        daemon.send_signal(signal.SIGSTOP)  # nothing gets on until the power has gone
        os.write(port, b"serves\n" if f" {FILES} fuse" in Path("/proc/mounts").read_text() else _RECOVERS)
        daemon.wait()


def load(told: dict[str, Any]) -> None:
    """All workloads at once, until the power goes."""

    def work(name: str) -> None:
        def say(*words: int) -> None:
            os.write(port, f"{name} {' '.join(map(str, words))}\n".encode())

        _module(name).load(FILES / name, told[name], say)

    with _acknowledging() as port:
        all_at_once(*(partial(work, name) for name in told))


@contextlib.contextmanager
def _acknowledging() -> Any:
    """The port to the host: what a write that has returned has written is there."""
    port = os.open("/dev/virtio-ports/acknowledged", os.O_WRONLY)
    try:
        yield port
    finally:
        os.close(port)


def flush() -> None:
    guest.run("cachefsd", "flush", FILES)


def check(told: dict[str, Any]) -> dict[str, Any]:
    return _check(FILES, told)


def _check(root: Path, told: dict[str, Any]) -> dict[str, Any]:
    return {name: _module(name).check(root / name, what) for name, what in told.items()}


def flush_and_check_backing(told: dict[str, Any]) -> None:
    flush()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    _check_copy(told)


def check_backing_alone(told: dict[str, Any]) -> None:
    mount_file_systems()
    _check_copy(told)


def _check_copy(told: dict[str, Any]) -> None:
    """Check the backing, by a copy: SQLite and fsck write, and nothing but the daemon may write to a backing."""
    copy = Path("/var/tmp/copy")
    subprocess.run(["rm", "-rf", copy], check=True)
    guest.run("cp", "-a", "--sparse=always", SLOW, copy)
    _check(copy, told)
