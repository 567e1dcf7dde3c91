"""The power goes at random moments while a program writes: what was acknowledged is there when it is back.

The pool is smaller than the file, so that blocks are written back, evicted and fetched again all the time, and the
disk beneath loses what was not flushed. ``CUTS`` in the environment says how often (default 3).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lab import guest
from lab.machine import Guest, Lab, Machine

CUTS = int(os.environ.get("CUTS") or 3)
WRITES_BEFORE_CUT = (50, 1500)
RECOVERIES_CUT = 0.25
PATIENCE_S = 900.0
PMEM, SLOW, FILES = Path("/mnt/pmem"), Path("/mnt/slow"), Path("/mnt/files")
BLOCK = 4096
BLOCKS = 2048
POOL = "4M"
WRITERS = 4  # each with every fourth block
ACKNOWLEDGEMENT = struct.Struct("<QQ")  # block, version


class Ledger:
    """What the guest has said, and what must be found: per block a version, and 0 for none.

    Versions of one writer grow: one that was not acknowledged is the only one above the last that was.
    """

    def __init__(self) -> None:
        self.versions = [0] * BLOCKS
        self.last = [0] * WRITERS
        self.count = 0

    def read(self, acknowledged: Path) -> None:
        """Take in what has left the guest before the cut."""
        data = acknowledged.read_bytes()
        for block, version in ACKNOWLEDGEMENT.iter_unpack(data[: len(data) - len(data) % ACKNOWLEDGEMENT.size]):
            assert version > self.last[block % WRITERS]
            self.versions[block] = self.last[block % WRITERS] = version
            self.count += 1

    def settle(self, ahead: dict[str, int]) -> None:
        """Versions that were found without having been acknowledged have to stay, from now on."""
        for block, version in ahead.items():
            self.versions[int(block)] = version
            self.last[int(block) % WRITERS] = version


def run(lab: Lab) -> dict[str, Any]:
    machine = lab.machine(nvdimm_mib=128, disks_mib={"slow": 256})
    ledger = Ledger()
    recoveries_cut = 0
    with machine.boot(lab.rng) as running:
        running.call(set_up)
        write_until_cut(running, machine, ledger, lab.rng)
    for cut in range(1, CUTS + 1):
        if lab.rng.random() < RECOVERIES_CUT:
            recoveries_cut += 1
            with machine.boot(lab.rng) as running:
                running.start(serve)
                time.sleep(lab.rng.uniform(0, 20))
        with machine.boot(lab.rng) as running:
            running.call(serve)
            ledger.settle(running.call(check, ledger.versions, ledger.last))
            if cut < CUTS:
                write_until_cut(running, machine, ledger, lab.rng)
            else:
                running.call(flush_and_check_backing, ledger.versions)
    # A flush that has returned needs neither the cache nor an orderly end.
    with machine.boot(lab.rng) as running:
        running.call(check_backing_alone, ledger.versions)
    return {
        "cuts": CUTS,
        "recoveries_cut": recoveries_cut,
        "acknowledged": ledger.count,
        "disk_flushes": machine.disks["slow"].flushes,
        "sectors_lost": machine.disks["slow"].lost,
    }


def write_until_cut(running: Guest, machine: Machine, ledger: Ledger, rng: random.Random) -> None:
    """Let the writers write for a random while; the power must go right afterwards."""
    wanted = rng.randint(*WRITES_BEFORE_CUT) * ACKNOWLEDGEMENT.size
    writing = running.start(write, ledger.last, rng.getrandbits(32))
    deadline = time.monotonic() + PATIENCE_S
    while machine.acknowledged.stat().st_size < wanted:
        assert time.monotonic() < deadline, "the guest writes too slowly"
        with contextlib.suppress(TimeoutError):
            running.wait(writing, 0.1)
            raise AssertionError("the writers have ended")
    time.sleep(rng.uniform(0, 0.3))
    machine.cut()
    ledger.read(machine.acknowledged)


# ---- in the guest


def set_up() -> None:
    from support_daemon import cachefsd

    guest.make_namespace("fsdax", "-M", "mem")
    guest.make_file_system("ext4", guest.PMEM)
    guest.make_file_system("ext4", guest.disk("slow"))
    mount_file_systems()
    cachefsd("format", PMEM / "cache", "--size", POOL)
    cachefsd("mount", SLOW, FILES, "--cache", PMEM / "cache", "-o", "dirty_age=0.2")
    # Of a new file only fsync makes the name durable.
    fd = os.open(FILES / "file", os.O_RDWR | os.O_CREAT)
    os.fsync(fd)
    os.close(fd)


def mount_file_systems() -> None:
    FILES.mkdir(exist_ok=True)
    guest.mount(guest.PMEM, PMEM, "dax=always")
    guest.mount(guest.disk("slow"), SLOW)


def serve() -> None:
    """Mount after a cut."""
    from support_daemon import cachefsd

    mount_file_systems()
    cachefsd("mount", SLOW, FILES, "--cache", PMEM / "cache", "-o", "dirty_age=0.2")


def write(last: list[int], seed: int) -> None:
    """Write until the power goes. Each write is acknowledged through the port when it has returned."""
    port = os.open("/dev/virtio-ports/acknowledged", os.O_WRONLY)
    failures: list[Exception] = []

    def writer(number: int) -> None:
        rng = random.Random(seed + number)
        memory = mmap.mmap(-1, BLOCK)
        fd = os.open(FILES / "file", os.O_RDWR | (os.O_DIRECT if number % 2 else 0))
        version = last[number]
        while True:
            version += 1
            block = rng.randrange(number, BLOCKS, WRITERS)
            memory[:] = images(np.array([block], "<u8"), np.array([version], "<u8")).tobytes()
            assert os.pwritev(fd, [memory], block * BLOCK) == BLOCK
            os.write(port, ACKNOWLEDGEMENT.pack(block, version))

    def guarded(number: int) -> None:
        try:
            writer(number)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raise failures[0]


def images(blocks: npt.NDArray[np.uint64], versions: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """What versions of blocks consist of: words that tell block, version and place; one row for each."""
    words = np.arange(BLOCK // 8, dtype="<u8") * np.uint64(0x9E3779B97F4A7C15)
    rows = words ^ (versions * np.uint64(0xD1B54A32D192ED03) + blocks * np.uint64(0x8CB92BA72F3D8DD7))[:, None]
    rows[:, 0], rows[:, 1] = blocks, versions
    return rows


def check(versions: list[int], last: list[int]) -> dict[int, int]:
    """Check the file through the cache; returns what is newer than acknowledged: at most one block of each writer."""
    found = versions_in(FILES / "file")
    ahead = {block: version for block, version in enumerate(found) if version != versions[block]}
    for block, version in ahead.items():
        assert version > last[block % WRITERS], f"block {block}: version {version} instead of {versions[block]}"
    assert len({block % WRITERS for block in ahead}) == len(ahead), ahead
    return ahead


def flush_and_check_backing(versions: list[int]) -> None:
    from support_daemon import cachefsd
    from support_fs import drop_caches

    cachefsd("flush", FILES)
    drop_caches()
    assert versions_in(SLOW / "file") == versions


def check_backing_alone(versions: list[int]) -> None:
    mount_file_systems()
    assert versions_in(SLOW / "file") == versions


def versions_in(path: Path) -> list[int]:
    """The versions of all blocks of a file. Every block is one version as a whole, or zeros."""
    data = path.read_bytes()
    assert len(data) % BLOCK == 0
    rows = np.frombuffer(data.ljust(BLOCKS * BLOCK, b"\0"), "<u8").reshape(BLOCKS, -1)
    blocks = np.arange(BLOCKS, dtype="<u8")
    whole = (rows == images(blocks, rows[:, 1])).all(axis=1) | ~rows.any(axis=1)
    assert whole.all(), f"blocks {blocks[~whole].tolist()} are no version of themselves"
    found: list[int] = rows[:, 1].tolist()
    return found
