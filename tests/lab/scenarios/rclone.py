"""The same program on rclone's VFS cache and on cachefsd, under the same power cuts: what was fsynced, and is it there?

Both have half of the NVDIMM, as ext4 with DAX, for their cache, and a slow disk each beneath. The program creates
files, appends to a log and overwrites blocks of a file, and says so through the port when fsync (and of a new file that
of its directory) has returned. Of cachefsd everything must be there; of rclone it is counted.
``CUTS`` in the environment says how often (default 5).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lab import guest
from lab.machine import Guest, Lab, Machine
from lab.workloads import all_at_once
from lab.workloads.blocks import BLOCK, content

CUTS = int(os.environ.get("CUTS") or 5)
WRITES_BEFORE_CUT = (30, 200)
PATIENCE_S = 900.0
NVDIMM_MIB = 256
SYSTEMS = ("rclone", "cachefsd")
OVERWRITTEN_BLOCKS = 16
ACKNOWLEDGEMENT = struct.Struct("<QQ")  # index in SYSTEMS, number of the write
WRITE_BACK_S = 5  # of rclone by default
RCLONE_ADDRESS = "127.0.0.1:5572"
OUTCOMES = ("missing", "older", "damaged")


def run(lab: Lab) -> dict[str, Any]:
    machine = lab.machine(nvdimm_mib=NVDIMM_MIB, disks_mib=dict.fromkeys(SYSTEMS, 256))
    facts: dict[str, Any] = {system: dict.fromkeys(("acknowledged", "blocks", *OUTCOMES), 0) for system in SYSTEMS}
    seed = 0
    acknowledged: list[int] = []
    for number in range(CUTS + 1):
        with machine.boot(lab.rng) as running:
            if number == 0:
                facts["version"] = running.call(set_up)
            running.call(serve)
            if number > 0:
                running.call(settle)
                for system, count in zip(SYSTEMS, acknowledged, strict=True):
                    found = running.call(losses, f"{place(system, 'files')}/{number - 1}", seed, count)
                    facts[system]["acknowledged"] += count
                    for name, value in found.items():
                        facts[system][name] += value
                    if system == "cachefsd":
                        assert not any(found[outcome] for outcome in OUTCOMES), f"cut {number}: {found}"
            if number < CUTS:
                seed = lab.rng.getrandbits(32)
                acknowledged = write_until_cut(running, machine, number, seed, lab.rng)
    return {"cuts": CUTS, **facts}


def write_until_cut(running: Guest, machine: Machine, number: int, seed: int, rng: random.Random) -> list[int]:
    """Let the program write to both for a random while; the power must go right afterwards.

    Returns how many of its writes were acknowledged to each.
    """
    wanted = rng.randint(*WRITES_BEFORE_CUT)
    writing = running.start(write, number, seed)
    deadline = time.monotonic() + PATIENCE_S
    while min(count_acknowledged(machine.acknowledged)) < wanted:
        assert time.monotonic() < deadline, "the guest writes too slowly"
        with contextlib.suppress(TimeoutError):
            running.wait(writing, 0.1)
            raise AssertionError("the program has ended")
    time.sleep(rng.uniform(0, 1))
    machine.cut()
    return count_acknowledged(machine.acknowledged)


def count_acknowledged(path: Path) -> list[int]:
    counts = [0] * len(SYSTEMS)
    data = path.read_bytes()
    for system, number in ACKNOWLEDGEMENT.iter_unpack(data[: len(data) - len(data) % ACKNOWLEDGEMENT.size]):
        assert number == counts[system] + 1
        counts[system] = number
    return counts


def plan(seed: int) -> Iterator[tuple[int, str, int]]:
    """The writes of the program, without end: their numbers from 1, and which block of which file they write."""
    rng = random.Random(seed)
    log_blocks = itertools.count()
    for number in itertools.count(1):
        kind = rng.choice(("create", "append", "overwrite"))
        if kind == "create":
            yield number, f"new-{number}", 0
        elif kind == "append":
            yield number, "log", next(log_blocks)
        else:
            yield number, "overwritten", rng.randrange(OVERWRITTEN_BLOCKS)


# ---- in the guest


def place(system: str, what: str) -> Path:
    """Where a system has its ``cache`` (a file system on the NVDIMM), its ``disk``, and its ``files``."""
    return Path("/mnt", f"{system}-{what}")


def set_up() -> str:
    guest.make_namespace("fsdax", "-M", "mem")
    for system, half in make_halves().items():
        guest.make_file_system("ext4", half)
        guest.make_file_system("ext4", guest.disk(system))
    mount_file_systems()
    guest.run("cachefsd", "format", place("cachefsd", "cache") / "cache", "--size", "64M")
    return guest.run("rclone", "version").splitlines()[0]


def make_halves() -> dict[str, Path]:
    """A device with DAX for each system; both are there already when this boot has made them."""
    sectors = int(Path("/sys/class/block", guest.PMEM.name, "size").read_text()) // len(SYSTEMS) // BLOCK * BLOCK
    halves = {system: Path("/dev/mapper", system) for system in SYSTEMS}
    for index, (system, half) in enumerate(halves.items()):
        if not half.exists():
            table = f"0 {sectors} linear {guest.PMEM} {index * sectors}"
            guest.run("dmsetup", "create", system, "--table", table)
    return halves


def mount_file_systems() -> None:
    for system, half in make_halves().items():
        if not place(system, "files").exists():  # not in this boot yet
            place(system, "files").mkdir()
            guest.mount(half, place(system, "cache"), "dax=always")
            guest.mount(guest.disk(system), place(system, "disk"))


def serve() -> None:
    from support_daemon import cachefsd, wait_until

    from cachefsd.fuse.mounts import find_mount

    mount_file_systems()
    ours = [place("cachefsd", "disk"), place("cachefsd", "files"), "--cache", place("cachefsd", "cache") / "cache"]
    cachefsd("mount", *ours, "-o", f"dirty_age={WRITE_BACK_S}")
    options = ["--vfs-cache-mode", "full", "--cache-dir", place("rclone", "cache"), "--rc", "--rc-no-auth"]
    with Path("/var/log/rclone").open("ab") as log:
        subprocess.Popen(
            ["rclone", "mount", place("rclone", "disk"), place("rclone", "files"), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"HOME": "/root", "RCLONE_RC_ADDR": RCLONE_ADDRESS},
        )
    wait_until(lambda: find_mount(place("rclone", "files")) is not None, "rclone's mount", pause_s=1)


def settle() -> None:
    """Everything that the caches have found again is written back."""
    from support_daemon import cachefsd, wait_until

    def uploaded() -> bool:
        request = urllib.request.Request(f"http://{RCLONE_ADDRESS}/vfs/stats", data=b"")
        with urllib.request.urlopen(request) as reply:
            cache = json.load(reply)["diskCache"]
        return not cache["uploadsQueued"] and not cache["uploadsInProgress"]

    wait_until(uploaded, "rclone's uploads", pause_s=1)
    time.sleep(2 * WRITE_BACK_S)  # for what it might put into its queue late
    wait_until(uploaded, "rclone's uploads", pause_s=1)
    cachefsd("flush", place("cachefsd", "files"))


def write(number: int, seed: int) -> None:
    """Run the program on both until the power goes."""
    port = os.open("/dev/virtio-ports/acknowledged", os.O_WRONLY)

    def one(index: int) -> None:
        files = place(SYSTEMS[index], "files") / f"{number}"
        work(files, seed, lambda done: os.write(port, ACKNOWLEDGEMENT.pack(index, done)))

    all_at_once(*(partial(one, index) for index in range(len(SYSTEMS))))


def work(directory: Path, seed: int, acknowledge: Callable[[int], object]) -> None:
    """Write what the plan says, each write synced, and so is each name."""
    directory.mkdir()
    guest.sync(directory.parent)
    kept = {name: os.open(directory / name, os.O_RDWR | os.O_CREAT) for name in ("log", "overwritten")}
    guest.sync(directory)
    for number, name, block in plan(seed):
        fd = kept[name] if name in kept else os.open(directory / name, os.O_RDWR | os.O_CREAT)
        assert os.pwrite(fd, content(block, number), block * BLOCK) == BLOCK
        os.fsync(fd)
        if name not in kept:
            os.close(fd)
            guest.sync(directory)
        acknowledge(number)


def losses(directory: str, seed: int, acknowledged: int) -> dict[str, int]:
    """How many different blocks were acknowledged, and how many of them are not there as they should be, and why.

    One write more than was acknowledged may be there.
    """
    writes = {number: (name, block) for number, name, block in itertools.islice(plan(seed), acknowledged + 1)}
    newest = {where: number for number, where in writes.items() if number <= acknowledged}
    counts = dict.fromkeys(("blocks", *OUTCOMES), 0)
    for where, number in newest.items():
        counts["blocks"] += 1
        found = version_of(Path(directory), *where)
        if found == 0:
            counts["missing"] += 1
        elif writes.get(found) != where:
            counts["damaged"] += 1
        elif found < number:
            counts["older"] += 1
    return counts


def version_of(directory: Path, name: str, block: int) -> int:
    """The number of the write that a block is from; 0: there is no such file or block, or zeros; -1: of no write."""
    try:
        with (directory / name).open("rb") as file:
            data = os.pread(file.fileno(), BLOCK, block * BLOCK)
    except FileNotFoundError:
        return 0
    if not any(data):
        return 0
    found = int.from_bytes(data[8:16], "little")
    return found if data == content(block, found) else -1
