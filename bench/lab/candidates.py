"""What is compared, in the guest: each candidate is set up, proven to be what it says, drained, and taken down.

All of them share one slow disk (a virtio disk beneath dm-delay) and one NVDIMM (a namespace of mode fsdax). Nobody
cleans up after an error: the machine is started afresh then.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import guest

SLOW_DISK = guest.disk("slow")
SLOW, CACHED, FAST = (Path("/dev/mapper") / name for name in ("slow", "cached", "fast"))
META = Path("/dev/mapper/meta")
FILES, BACKING, PMEM = Path("/mnt/files"), Path("/mnt/backing"), Path("/mnt/pmem")
PATIENCE_S = 600.0
_META_SECTORS = 8 << 11  # of dm-cache: it wants 4 MiB and 16 bytes for each block

NO_DISK = {"ext4-DAX", "null FUSE"}
"""Candidates that do not use the slow disk: they are measured at one delay."""
ONE_FILE = {"null FUSE"}
"""Candidates that have one file and no room for others, and nothing to drain."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file system at FILES. ``drain`` returns when the slow disk has everything."""

    drain: Callable[[], None]
    proof: str
    """What shows that it is what it says, in its own words."""
    daemon: int | None = None
    """The process that does its work, if it is one."""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE_S} s")
        time.sleep(0.005)


def set_up() -> dict[str, str]:
    """Once in each machine; returns what it is."""
    guest.make_namespace("fsdax", "-M", "mem")
    for module in ("dm-delay", "dm-writecache", "dm-cache", "dm-cache-smq", "bcache"):
        guest.run("modprobe", module)
    fio = guest.run("fio", "--version").strip()
    return {"kernel": platform.release(), "python": platform.python_version(), "fio": fio}


@contextmanager
def slow_disk(delay_ms: int) -> Iterator[None]:
    """SLOW: every read, write and flush of the disk comes ``delay_ms`` later."""
    _wipe(SLOW_DISK)
    _map("slow", f"delay {SLOW_DISK} 0 {delay_ms}", _sectors(SLOW_DISK))
    yield
    _unmap("slow")


def latency_ms(delay_ms: int) -> float:
    """What a 4 KiB read of the slow disk takes: dm-delay counts in ticks of the kernel's clock, of 4 ms here."""
    count = 32
    with slow_disk(delay_ms):
        began = time.monotonic()
        guest.run("dd", f"if={SLOW}", "of=/dev/null", "bs=4k", f"count={count}", "iflag=direct")
        return round((time.monotonic() - began) / count * 1000, 2)


# ---- the candidates


@contextmanager
def cachefsd() -> Iterator[Candidate]:
    """The cache on ext4 with DAX, over ext4 on the slow disk."""
    from cachefsd.service import control

    _mkfs(guest.PMEM)
    _mkfs(SLOW)
    with _mounted(guest.PMEM, PMEM, "dax=always"), _mounted(SLOW, BACKING):
        space = os.statvfs(PMEM)
        pool_mib = (space.f_bavail * space.f_frsize >> 20) - 24  # what is left is for the catalog
        FILES.mkdir(exist_ok=True)
        guest.run("cachefsd", "format", PMEM / "cache", "--size", f"{pool_mib}M")
        # dm-writecache writes nothing back below its high watermark, however old it is.
        guest.run("cachefsd", "mount", BACKING, FILES, "--cache", PMEM / "cache", "-o", "dirty_age=3600")
        status = control.ask(FILES, "status")
        _demand(status["durability"] == "pmem", f"class {status['durability']}")
        proof = f"durability {status['durability']}, pool of {pool_mib} MiB"
        yield Candidate(lambda: control.ask(FILES, "flush"), proof, status["pid"])
        guest.run("cachefsd", "unmount", FILES)


@contextmanager
def dm_writecache() -> Iterator[Candidate]:
    """ext4 on dm-writecache in its mode for persistent memory."""
    _wipe(guest.PMEM)
    _map("cached", f"writecache p {SLOW} {guest.PMEM} 4096 0", _sectors(SLOW))

    def is_empty_after_flush() -> bool:
        guest.run("dmsetup", "message", CACHED, "0", "flush")
        # error, blocks, free blocks, blocks under writeback: Documentation/admin-guide/device-mapper/writecache.rst
        error, blocks, free, writing = guest.run("dmsetup", "status", CACHED).split()[3:7]
        _demand(error == "0", f"dm-writecache with error {error}")
        return blocks == free and writing == "0"

    def drain() -> None:
        # ext4 may write something at any time, its own lazy initialisation for one.
        wait_until(is_empty_after_flush, "an empty dm-writecache")

    table = guest.run("dmsetup", "table", CACHED)
    _demand(" writecache p " in table, table)
    _mkfs(CACHED)
    with _mounted(CACHED, FILES):
        yield Candidate(_after_sync(drain), table.strip())
    _unmap("cached")


@contextmanager
def dm_cache() -> Iterator[Candidate]:
    """ext4 on dm-cache with policy smq, writing back; its metadata is on the NVDIMM too."""
    _wipe(guest.PMEM)
    _map("meta", f"linear {guest.PMEM} 0", _META_SECTORS)
    _map("fast", f"linear {guest.PMEM} {_META_SECTORS}", _sectors(guest.PMEM) - _META_SECTORS)

    def table(policy: str) -> str:
        return f"cache {META} {FAST} {SLOW} 64 1 writeback {policy} 0"

    def status() -> list[str]:
        # ... metadata block size, used/total, cache block size, used/total, read hits, read misses, write hits,
        # write misses, demotions, promotions, dirty: Documentation/admin-guide/device-mapper/cache.rst
        return guest.run("dmsetup", "status", CACHED).split()

    def drain() -> None:
        guest.run("dmsetup", "reload", CACHED, "--table", f"0 {_sectors(SLOW)} {table('cleaner')}")
        guest.run("dmsetup", "resume", CACHED)
        wait_until(lambda: status()[13] == "0", "a clean dm-cache")
        guest.run("blockdev", "--flushbufs", SLOW)
        guest.run("dmsetup", "reload", CACHED, "--table", f"0 {_sectors(SLOW)} {table('smq')}")
        guest.run("dmsetup", "resume", CACHED)

    _map("cached", table("smq"), _sectors(SLOW))
    words = status()
    _demand(words[2] == "cache" and {"writeback", "smq", "rw"} <= set(words[14:]), " ".join(words))
    _mkfs(CACHED)
    with _mounted(CACHED, FILES):
        yield Candidate(_after_sync(drain), " ".join(words))
    _unmap("cached")
    _unmap("fast")
    _unmap("meta")


@contextmanager
def bcache() -> Iterator[Candidate]:
    """ext4 on bcache, writing back; nothing goes past the cache for being sequential, or because it is busy."""
    _wipe(guest.PMEM)
    # Of the usual buckets of 512 KiB there would be fewer than it wants (more than 512).
    geometry = ("--block", "4k", "--bucket", "128k")
    made = guest.run("make-bcache", "--writeback", *geometry, "-C", guest.PMEM, "-B", SLOW)
    (cache_set,) = set(re.findall(r"Set UUID:\s+(\S+)", made))
    set_directory = Path("/sys/fs/bcache") / cache_set
    for device in (guest.PMEM, SLOW):
        with contextlib.suppress(OSError):  # udev may have been faster
            Path("/sys/fs/bcache/register").write_text(str(device))
    knobs = Path("/sys/block") / SLOW.resolve().name / "bcache"
    wait_until(lambda: (knobs / "cache").exists() and (knobs / "dev").exists(), "a backing device with a cache")
    device = Path("/dev") / (knobs / "dev").resolve().name
    wait_until(device.exists, f"{device}")
    (knobs / "sequential_cutoff").write_text("0")
    for kind in ("read", "write"):
        (set_directory / f"congested_{kind}_threshold_us").write_text("0")
    mode, state = ((knobs / name).read_text().strip() for name in ("cache_mode", "state"))
    _demand("[writeback]" in mode and state in ("clean", "dirty"), f"{mode}, {state}")

    # The thread that writes back sleeps for half a minute after each round: too long to wait for in a drain.
    (knobs / "writeback_delay").write_text("0")

    def drain() -> None:
        usual = (knobs / "writeback_percent").read_text()
        (knobs / "writeback_percent").write_text("0")  # as fast as it can
        wait_until(lambda: (knobs / "state").read_text().strip() == "clean", "a clean bcache")
        guest.run("blockdev", "--flushbufs", SLOW)
        (knobs / "writeback_percent").write_text(usual)

    _mkfs(device)
    with _mounted(device, FILES):
        yield Candidate(_after_sync(drain), f"cache_mode {mode}, state {state}")
    (knobs / "stop").write_text("1")
    wait_until(lambda: not knobs.exists(), "the end of the bcache device")
    (set_directory / "stop").write_text("1")
    wait_until(lambda: not set_directory.exists(), "the end of the cache set")
    for device in (SLOW, guest.PMEM):
        _wipe(device)  # or udev would start them again when it sees them


@contextmanager
def slow() -> Iterator[Candidate]:
    """ext4 on the slow disk."""
    _mkfs(SLOW)
    with _mounted(SLOW, FILES):
        yield Candidate(os.sync, guest.run("dmsetup", "table", SLOW).strip())


@contextmanager
def dax() -> Iterator[Candidate]:
    """ext4 with DAX on the NVDIMM: how fast it could be if there were nothing but fast memory."""
    _mkfs(guest.PMEM)
    with _mounted(guest.PMEM, FILES, "dax=always"):
        (mount,) = (line for line in Path("/proc/mounts").read_text().splitlines() if f" {FILES} " in line)
        _demand("dax=always" in mount, mount)
        yield Candidate(os.sync, mount)


@contextmanager
def null_fuse() -> Iterator[Candidate]:
    """One file of a FUSE file system in Python, on cachefsd's own request loop, that does nothing: what FUSE costs."""
    FILES.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "bench.nullfs", FILES], stdout=subprocess.DEVNULL)
    wait_until(FILES.is_mount, "the null file system")
    yield Candidate(lambda: None, "bench/nullfs.py", process.pid)
    guest.run("umount", FILES)
    process.wait(PATIENCE_S)


CANDIDATES: dict[str, Callable[[], AbstractContextManager[Candidate]]] = {
    "cachefsd": cachefsd,
    "dm-writecache": dm_writecache,
    "dm-cache": dm_cache,
    "bcache": bcache,
    "slow disk": slow,
    "ext4-DAX": dax,
    "null FUSE": null_fuse,
}

# ---- devices and file systems


def _demand(holds: Any, found: str) -> None:
    if not holds:
        raise RuntimeError(f"not what it should be: {found}")


def _after_sync(drain: Callable[[], None]) -> Callable[[], None]:
    """Page cache and journal first."""

    def both() -> None:
        os.sync()
        drain()

    return both


def _sectors(device: Path) -> int:
    return int(guest.run("blockdev", "--getsz", device))


def _map(name: str, target: str, sectors: int) -> None:
    guest.run("dmsetup", "create", name, "--table", f"0 {sectors} {target}")


def _unmap(name: str) -> None:
    guest.run("dmsetup", "remove", "--retry", name)


def _wipe(device: Path) -> None:
    """So that nothing is taken for what was here before: the superblocks of all candidates are in the first MiB."""
    with device.open("r+b", buffering=0) as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())


def _mkfs(device: Path) -> None:
    guest.run("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=1", device)


@contextmanager
def _mounted(device: Path, mountpoint: Path, options: str = "defaults") -> Iterator[None]:
    guest.mount(device, mountpoint, options)
    yield
    guest.run("umount", mountpoint)
