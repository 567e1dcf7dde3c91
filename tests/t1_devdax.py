"""A pool on a device: its record, what sysfs must say, and the life of a pool there.

The real thing is in the lab (tests/lab/scenarios/devdax.py). Here a file stands for the device; of the code only
``describe``, which asks the kernel, does not run over it, and has tests of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from cachefsd.errors import ForeignError, InUseError, UnfinishedError, UserError
from cachefsd.media import daxdevice, poolfile
from cachefsd.media.catalog import open_catalog
from cachefsd.media.daxdevice import DeviceFacts, describe, open_device
from cachefsd.media.medium import DeviceMedium
from cachefsd.media.pool import MappedPool, open_pool
from cachefsd.media.poolfile import create_pool, erase
from cachefsd.media.poolrecord import RECORD_SIZE, PoolRecord
from cachefsd.media.ports import Durability, SlotState
from cachefsd.media.superblock import HEADER_OFFSET, SUPERBLOCK_SIZE, Superblock, SuperblockPair
from cachefsd.service import caches

BLOCK = 4096
ALIGNMENT = 2 << 20
SIZE = 3 * ALIGNMENT
DATA_OFFSET = 2 << 20
SLOTS = (SIZE - DATA_OFFSET) // BLOCK


@dataclass
class StandIn:
    """A file in the place of a device."""

    path: Path
    bad: tuple[range, ...] = ()

    def content(self) -> bytes:
        return self.path.read_bytes()

    def change(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn(tmp_path / "dax0.0")
    made.path.write_bytes(bytes(SIZE))
    made.path.chmod(0o600)
    monkeypatch.setattr(daxdevice, "describe", lambda status, path: DeviceFacts(status.st_size, ALIGNMENT, made.bad))
    return made


@pytest.fixture
def cache(tmp_path: Path, device: StandIn) -> Path:
    create_pool(tmp_path / "cache", None, device=device.path, volatile=True)
    return tmp_path / "cache"


def opened(cache: Path) -> MappedPool:
    return open_pool(cache, volatile=True, persistence=Durability.PMEM)


def publish(pool: MappedPool, slot: int, seq: int, state: SlotState = SlotState.DIRTY) -> None:
    pool.publish(slot, state, seq, 7, slot, 0xABCDEF, 5, BLOCK)


def refused(cache: Path, device: StandIn) -> str:
    """Why the cache can't be opened; nothing has changed, and nothing stays locked."""
    before = device.content() if device.path.is_file() else b"", (cache / "pool").read_bytes()
    with pytest.raises(UserError) as caught:
        opened(cache)
    assert (device.content() if device.path.is_file() else b"", (cache / "pool").read_bytes()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the record

RECORD = PoolRecord(Path("/dev/dax0.0"), bytes(range(16)))
NAME = Path("/cache/pool")


def test_a_record_reads_back() -> None:
    raw = RECORD.pack()
    assert len(raw) == RECORD_SIZE
    assert PoolRecord.unpack(raw, NAME) == RECORD
    odd = PoolRecord(Path(os.fsdecode(b"/dev/\xff \n" + b"x" * 3000)), bytes(16))
    assert PoolRecord.unpack(odd.pack(), NAME) == odd


def test_a_record_of_a_path_that_is_too_long_is_not_made() -> None:
    with pytest.raises(OSError, match="too long"):
        PoolRecord(Path("/" + "x" * RECORD_SIZE), bytes(16)).pack()


def test_every_damaged_bit_of_a_record_is_noticed() -> None:
    raw = RECORD.pack()
    for position in [*range(64), *range(64, RECORD_SIZE, 97), RECORD_SIZE - 1]:
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[position] ^= 1 << bit
            if position < 8:
                assert PoolRecord.unpack(bytes(damaged), NAME) is None  # no record, and no pool either
            else:
                with pytest.raises(UserError, match="damaged"):
                    PoolRecord.unpack(bytes(damaged), NAME)


@pytest.mark.parametrize("length", [8, 100, RECORD_SIZE - 1])
def test_a_record_that_was_cut_is_damaged(length: int) -> None:
    with pytest.raises(UserError, match="damaged"):
        PoolRecord.unpack(RECORD.pack()[:length], NAME)


def forged(version: int = 1, length: int = 11, path: bytes = b"/dev/dax0.0") -> bytes:
    """A record with a right checksum."""
    covered = (b"cachedev" + struct.pack("<II", version, length) + bytes(16) + path).ljust(RECORD_SIZE - 8, b"\0")
    return covered + struct.pack("<Q", xxhash.xxh3_64_intdigest(covered))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (forged(version=2), "format version 2"),
        (forged(length=0), "names none"),
        (forged(length=12), "names none"),
        (forged(length=2**32 - 1), "names none"),
        (forged(path=b"dev/dax0.0/"), "names none"),
        (forged(path=b"/dev/d\0x0.0"), "names none"),
    ],
)
def test_a_record_that_says_what_cannot_be(raw: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        PoolRecord.unpack(raw, NAME)
    assert PoolRecord.unpack(forged(), NAME) == PoolRecord(Path("/dev/dax0.0"), bytes(16))


# ---- what the kernel says


class Sysfs:
    """What sysfs says of a namespace of device-dax on a region of persistent memory; its device is /dev/null."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.region = base / "devices/ndbus0/region0"
        self.namespace = self.region / "dax0.0"
        self.device = self.namespace / "null"
        self.char = base / "char"
        for path in (self.device, self.char, base / "bus/nd", base / "bus/dax", base / "bus/other"):
            path.mkdir(parents=True)
        status = os.stat("/dev/null")
        self.link = self.char / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        self.link.symlink_to(self.device)
        self.bus = base / "bus"
        for path, bus in ((self.device, "dax"), (self.namespace, "nd"), (self.region, "nd")):
            (path / "subsystem").symlink_to(self.bus / bus)
        for path, text in {
            self.device / "size": SIZE,
            self.device / "align": ALIGNMENT,
            self.namespace / "resource": "0x100200000",
            self.region / "resource": "0x100000000",
            self.region / "devtype": "nd_pmem",
            self.region.parent / "provider": "ACPI.NFIT",
        }.items():
            path.write_text(f"{text}\n")
        (self.region / "badblocks").touch()
        monkeypatch.setattr(daxdevice, "_SYS_CHAR", self.char)

    def relink(self, of: Path, bus: str) -> None:
        (of / "subsystem").unlink()
        (of / "subsystem").symlink_to(self.bus / bus)

    def describe(self) -> DeviceFacts:
        return describe(os.stat("/dev/null"), Path("/dev/null"))


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    return Sysfs(tmp_path, monkeypatch)


def test_a_namespace_on_persistent_memory(sysfs: Sysfs) -> None:
    assert sysfs.describe() == DeviceFacts(SIZE, ALIGNMENT, ())


def test_media_errors_are_counted_from_the_beginning_of_the_namespace(sysfs: Sysfs) -> None:
    first = (2 << 20) // 512  # sector of the region where the namespace begins
    last = first + SIZE // 512
    lines = [(0, 8), (first - 2, 3), (first + 8, 1), (first + 100, 16), (last - 1, 5), (last, 1)]
    (sysfs.region / "badblocks").write_text("".join(f"{sector} {count}\n" for sector, count in lines))
    assert sysfs.describe().bad == (
        range(512),
        range(4096, 4608),
        range(51200, 59392),
        range(SIZE - 512, SIZE),
    )


def test_what_is_no_device_dax_by_its_bus(sysfs: Sysfs) -> None:
    sysfs.relink(sysfs.device, "other")
    with pytest.raises(UserError, match="not a device of device-dax"):
        sysfs.describe()


@pytest.mark.parametrize("what", ["bus", "devtype"])
def test_memory_that_is_set_aside_and_volatile_is_refused(sysfs: Sysfs, what: str) -> None:
    if what == "bus":
        sysfs.relink(sysfs.region, "other")
    else:
        (sysfs.region / "devtype").write_text("nd_volatile\n")
    with pytest.raises(UserError, match="not persistent memory"):
        sysfs.describe()


def test_memory_of_which_stores_are_not_durable_is_refused(sysfs: Sysfs) -> None:
    (sysfs.region.parent / "provider").write_text("virtio-pmem\n")
    with pytest.raises(UserError, match="not durable before the host has flushed"):
        sysfs.describe()


def test_a_second_node_of_a_device_is_refused(sysfs: Sysfs) -> None:
    """Locks belong to nodes."""
    sysfs.device.rename(sysfs.namespace / "zero")
    sysfs.link.unlink()
    sysfs.link.symlink_to(sysfs.namespace / "zero")
    with pytest.raises(UserError, match="another node of /dev/zero"):
        sysfs.describe()


def test_what_sysfs_does_not_say_is_one_line(sysfs: Sysfs) -> None:
    (sysfs.device / "size").unlink()
    with pytest.raises(UserError, match="can't open the device: No such file") as caught:
        open_device(Path("/dev/null"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """What is no device of device-dax."""
    made = {name: tmp_path / name for name in ("missing", "file", "directory", "fifo", "socket", "link", "dangling")}
    made["file"].write_bytes(bytes(SIZE))
    made["directory"].mkdir()
    os.mkfifo(made["fifo"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(made["socket"]))
    made["link"].symlink_to("/dev/null")
    made["dangling"].symlink_to("nowhere")
    return made | {name: Path("/dev") / name for name in ("null", "zero", "full", "tty")}


def test_what_is_no_device_dax_is_refused_and_not_even_opened(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []
    os_open = os.open

    def watched(path: Any, how: int, *arguments: Any, **keywords: Any) -> int:
        if path in places.values():
            flags.append(how)
        return os_open(path, how, *arguments, **keywords)

    monkeypatch.setattr(os, "open", watched)
    for name, path in places.items():
        with pytest.raises(UserError, match=r"not a device of device-dax|No such file") as caught:
            create_pool(tmp_path / "cache", None, device=path, volatile=True)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "cache").exists(), name
    assert len(flags) == len(places)
    assert all(how & os.O_PATH for how in flags)


# ---- opening it


def test_a_device_is_owned_by_one(device: StandIn) -> None:
    first = DeviceMedium(device.path)
    with pytest.raises(InUseError, match="in use by another cache"):
        DeviceMedium(device.path)
    first.close()
    DeviceMedium(device.path).close()


def test_a_symbolic_link_to_a_device_is_not_followed(device: StandIn, cache: Path) -> None:
    aside = device.path.with_name("aside")
    device.path.rename(aside)
    device.path.symlink_to(aside)
    with pytest.raises(UserError, match="symbolic links"):
        opened(cache)


@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_a_device_that_others_may_write_to_is_refused(device: StandIn, cache: Path, bits: int) -> None:
    device.path.chmod(0o600 | bits)
    assert "others may write to it" in refused(cache, device)
    device.path.chmod(0o600)
    opened(cache).close()


def test_a_device_that_others_may_read_becomes_private(device: StandIn, cache: Path) -> None:
    device.path.chmod(0o644)
    opened(cache).close()
    assert device.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_a_device_of_another_user_is_refused(device: StandIn, cache: Path) -> None:
    os.chown(device.path, 1001, 1001)
    assert "belongs to another user" in refused(cache, device)


# ---- format


def test_all_of_a_device_is_used_unless_told_otherwise(device: StandIn, tmp_path: Path) -> None:
    device.change(SIZE - 3, b"old")
    seen: list[tuple[int, int]] = []
    info = create_pool(
        tmp_path / "a" / "cache",
        None,
        device=device.path,
        volatile=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (info.path, info.size, info.slots) == (device.path, SIZE, SLOTS)
    assert seen[-1] == (SIZE, SIZE)
    assert not any(device.content()[HEADER_OFFSET:SIZE])
    assert (tmp_path / "a" / "cache" / "pool").read_bytes() == PoolRecord(device.path, info.uuid).pack()
    assert (tmp_path / "a" / "cache" / "pool").stat().st_mode & 0o777 == 0o600


def test_a_part_of_a_device_leaves_the_rest_alone(device: StandIn, tmp_path: Path) -> None:
    device.change(2 * ALIGNMENT, b"mine" * (ALIGNMENT // 4))
    assert create_pool(tmp_path / "cache", 2 * ALIGNMENT, device=device.path, volatile=True).slots == 512
    with opened(tmp_path / "cache") as pool:
        pool.write(511, bytes(BLOCK))
        with pytest.raises(IndexError):
            pool.write(512, bytes(BLOCK))
    assert device.content()[2 * ALIGNMENT :] == b"mine" * (ALIGNMENT // 4)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (SIZE + ALIGNMENT, "the device has 6291456"),
        (SIZE - BLOCK, "multiple of 2097152"),
        (ALIGNMENT, "too small"),
    ],
)
def test_sizes_that_cannot_be(device: StandIn, tmp_path: Path, size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_pool(tmp_path / "cache", size, device=device.path, volatile=True)
    assert not (tmp_path / "cache").exists()
    assert not any(device.content())


@pytest.mark.parametrize("offset", [0, 4096, HEADER_OFFSET, ALIGNMENT - 1])
def test_a_device_that_holds_something_is_not_formatted(device: StandIn, tmp_path: Path, offset: int) -> None:
    device.change(offset, b"\1")
    before = device.content()
    with pytest.raises(UserError, match="there is a pool or something else already"):
        create_pool(tmp_path / "cache", None, device=device.path, volatile=True)
    assert device.content() == before
    assert not (tmp_path / "cache" / "pool").exists()


def test_the_superblock_comes_after_durable_zeros_and_a_durable_record(
    device: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O9, and: no device is a pool that no directory names."""
    done: list[str] = []
    for name in ("write", "sync"):
        original = getattr(DeviceMedium, name)

        def watched(medium: Any, *arguments: Any, name: str = name, original: Any = original) -> None:
            original(medium, *arguments)
            kind = {"sync": "sync", "write": "superblock" if arguments and any(arguments[0][:8]) else "zeros"}[name]
            if done[-1:] != [kind]:
                done.append(kind)

        monkeypatch.setattr(DeviceMedium, name, watched)
    fsync, fdatasync = os.fsync, os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (fdatasync(fd), done.append(f"record {os.fstat(fd).st_size}")))
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), done.append("directory")))
    create_pool(tmp_path / "cache", None, device=device.path, volatile=True)
    begun = ["zeros", "sync", "record 4096", "directory", "directory"]
    assert done == begun + ["superblock", "sync"] * 2


class Stop(Exception):
    pass


def stop(*_: object) -> None:
    raise Stop


@pytest.mark.parametrize("when", ["in the middle", "before the record", "before the superblocks", "between them"])
def test_an_interrupted_format_is_unusable_and_can_be_done_again(
    device: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    cache = tmp_path / "cache"
    device.change(SIZE - 100, b"old")
    with monkeypatch.context() as patch:
        if when == "before the record":
            patch.setattr(poolfile, "_note_device", stop)
        elif when == "before the superblocks":
            patch.setattr(SuperblockPair, "format", stop)
        elif when == "between them":
            patch.setattr(DeviceMedium, "sync", lambda medium: any(device.content()[:8192]) and stop())
        progress = stop if when == "in the middle" else None
        with pytest.raises(Stop):
            create_pool(cache, None, device=device.path, volatile=True, progress=progress)
    if when == "between them":
        with opened(cache) as pool:  # all that counts was durable
            assert pool.notes
        return
    with pytest.raises(UnfinishedError, match="never finished formatting"):
        opened(cache)
    asked: list[object] = []
    caches.format_cache(
        cache,
        None,
        BLOCK,
        device=device.path,
        volatile=True,
        progress=None,
        may_replace=lambda *what: asked.append(what),
    )
    assert asked == []
    with opened(cache) as pool:
        open_catalog(cache, pool.uuid).close()


# ---- the life of a pool there


def test_slots_survive_reopening(device: StandIn, cache: Path) -> None:
    data = os.urandom(2 * BLOCK)
    with opened(cache) as pool:
        assert (pool.place, pool.slots, pool.was_clean) == (os.fspath(device.path), SLOTS, True)
        pool.bind(b"identity", b"/srv/data")
        pool.mark_open()
        pool.write(SLOTS - 2, data)
        pool.fence()
        publish(pool, SLOTS - 2, 5)
        publish(pool, SLOTS - 1, 6)
        pool.fence()
        pool.set_state(SLOTS - 1, SlotState.CLEAN)
        pool.sync()
    with opened(cache) as pool:
        assert (pool.was_clean, pool.incarnation, pool.path_hint) == (False, 2, b"/srv/data")
        found = pool.scan(0, SLOTS)
        assert list(found.state[-2:]) == [SlotState.DIRTY, SlotState.CLEAN]
        assert not found.state[:-2].any()
        assert not found.unreadable.any()
        assert bytes(pool.view(SLOTS - 2, 2)) == data
        pool.mark_clean(100)
    with opened(cache) as pool:
        assert (pool.was_clean, pool.seq_floor) == (True, 100)


def test_a_second_open_is_refused_by_either_lock(device: StandIn, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(cache, other)
    with opened(cache):
        assert "in use by another daemon" in refused(cache, device)
        assert f"{device.path}: the device is in use by another cache" in refused(other, device)
        with pytest.raises(InUseError, match="in use by another cache"):
            create_pool(tmp_path / "third", None, device=device.path, volatile=True)
        assert not (tmp_path / "third").exists()
    opened(other).close()


def test_closing_unlocks_and_not_before_all_views_are_released(device: StandIn, cache: Path) -> None:
    pool = opened(cache)
    view = pool.view(0)
    with pytest.raises(BufferError):
        pool.close()
    assert "in use" in refused(cache, device)
    view.release()
    pool.close()
    DeviceMedium(device.path).close()
    opened(cache).close()


@pytest.mark.parametrize("newer", [True, False])
def test_one_damaged_superblock_is_repaired_and_reported(device: StandIn, cache: Path, newer: bool) -> None:
    device.change(0 if newer else SUPERBLOCK_SIZE, b"\xff")
    with opened(cache) as pool:
        assert len(pool.notes) == 1
        assert not pool.was_clean
    with opened(cache) as pool:
        assert pool.notes == []


def test_both_superblocks_damaged(device: StandIn, cache: Path) -> None:
    device.change(100, b"\xff")
    device.change(SUPERBLOCK_SIZE + 100, b"\xff")
    assert "both superblocks" in refused(cache, device)


def test_a_device_that_is_missing_keeps_its_record(device: StandIn, cache: Path) -> None:
    aside = device.path.with_name("aside")
    device.path.rename(aside)
    assert f"{device.path}: can't open the device: No such file or directory" in refused(cache, device)
    aside.rename(device.path)
    opened(cache).close()


def test_a_device_that_was_formatted_since_is_refused(device: StandIn, cache: Path, tmp_path: Path) -> None:
    erase(medium := DeviceMedium(device.path))
    medium.close()
    create_pool(tmp_path / "other", None, device=device.path, volatile=True)
    assert "holds another pool than that of the cache" in refused(cache, device)
    device.change(0, b"\xff")  # nor is anything repaired there
    assert "holds another pool than that of the cache" in refused(cache, device)
    opened(tmp_path / "other").close()


def test_a_device_that_was_made_anew_is_refused(device: StandIn, cache: Path) -> None:
    device.path.write_bytes(bytes(SIZE))
    assert "never finished formatting" in refused(cache, device)
    device.path.write_bytes(b"other" * (SIZE // 5))
    assert "not a pool of cachefsd: the device was formatted or made anew" in refused(cache, device)


def test_a_device_that_became_smaller_is_refused(device: StandIn, cache: Path) -> None:
    os.truncate(device.path, SIZE - ALIGNMENT)
    assert "cut, extended or replaced" in refused(cache, device)
    os.truncate(device.path, SIZE + ALIGNMENT)
    opened(cache).close()


def test_a_damaged_record_leads_nowhere(device: StandIn, cache: Path) -> None:
    with (cache / "pool").open("r+b") as file:
        file.seek(40)
        file.write(b"X")
    assert "the record of the pool's device is damaged" in refused(cache, device)


def test_without_libpmem_nothing_is_opened(device: StandIn, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cachefsd.media.mapping._LIBPMEM", "libpmem-that-is-not-there.so.1")
        assert "libpmem1" in refused(cache, device)
    opened(cache).close()


def test_a_cache_in_memory_must_be_asked_for(device: StandIn) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        cache = Path(name) / "cache"
        with pytest.raises(UserError, match="nothing on tmpfs survives a power cut"):
            create_pool(cache, None, device=device.path, volatile=False)
        assert not (cache / "pool").exists()
        assert not any(device.content())
        create_pool(cache, None, device=device.path, volatile=True)
        with pytest.raises(UserError, match="nothing on tmpfs survives a power cut"):
            open_pool(cache, persistence=Durability.PMEM)
        with opened(cache) as pool:
            assert pool.durability is Durability.RAM


# ---- media errors


def test_headers_in_bad_blocks_are_unreadable_and_nothing_else(device: StandIn, cache: Path) -> None:
    with opened(cache) as pool:
        for slot in range(SLOTS):
            publish(pool, slot, slot + 1)
    start = HEADER_OFFSET + 100 * 64
    device.bad = (range(start, start + 512),)
    with opened(cache) as pool:
        found = pool.scan(10, SLOTS - 10)
    numbers = np.arange(10, SLOTS)
    piece = (numbers >= 64) & (numbers < 128)  # what shares 4 KiB with it
    assert (found.unreadable == piece).all()
    assert (found.seq[~piece] == numbers[~piece] + 1).all()
    assert (found.state[~piece] == SlotState.DIRTY).all()


def test_blocks_in_bad_blocks_are_lost_if_only_the_pool_had_them(device: StandIn, cache: Path) -> None:
    states = [SlotState.FREE, SlotState.CLEAN, SlotState.DIRTY, SlotState.QUARANTINED] * 4
    with opened(cache) as pool:
        for slot, state in enumerate(states):
            if state is not SlotState.FREE:
                publish(pool, slot, slot + 1, state)
    device.bad = (
        range(DATA_OFFSET + 3 * BLOCK + 512, DATA_OFFSET + 7 * BLOCK + 1),  # slots 3 to 7
        range(DATA_OFFSET + 13 * BLOCK, DATA_OFFSET + 14 * BLOCK),  # slot 13
    )
    with opened(cache) as pool:
        parts = [pool.scan(first, 5) for first in (0, 5, 10)]
    state = np.concatenate([part.state for part in parts])
    unreadable = np.concatenate([part.unreadable for part in parts])
    damaged = [3, 4, 5, 6, 7, 13]
    for slot in range(15):
        owed = states[slot] in (SlotState.DIRTY, SlotState.QUARANTINED)
        if slot in damaged and owed:
            assert state[slot] == SlotState.QUARANTINED
            assert not unreadable[slot]
        else:
            assert unreadable[slot] == (slot in damaged)
            assert unreadable[slot] or state[slot] == states[slot]


def test_a_superblock_in_a_bad_block_leaves_the_other_in_force_and_refuses(device: StandIn, cache: Path) -> None:
    device.bad = (range(512),)
    assert "can't repair a superblock" in cannot_open(cache)
    device.bad = ()
    opened(cache).close()


def cannot_open(cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(cache)
    return str(caught.value)


# ---- replacing what is there

Held = caches.Content | UserError


def replace(cache: Path, device: StandIn | None, agree: bool = True) -> list[tuple[Path, Held]]:
    """Format over what is there; what was asked."""
    asked: list[tuple[Path, Held]] = []

    def may_replace(place: Path, held: Held) -> None:
        asked.append((place, held))
        if not agree:
            raise UserError("kept")

    size = None if device else 4 << 20
    path = device.path if device else None
    with contextlib.nullcontext() if agree else pytest.raises(UserError, match="kept"):
        caches.format_cache(cache, size, BLOCK, device=path, volatile=True, progress=None, may_replace=may_replace)
    return asked


def fill(cache: Path, dirty: int) -> None:
    with opened(cache) as pool:
        pool.bind(b"identity", b"/srv/data")
        for slot in range(dirty):
            publish(pool, slot, slot + 1)


def test_a_cache_is_replaced_by_another_on_the_same_device(device: StandIn, cache: Path) -> None:
    fill(cache, 3)
    assert replace(cache, device) == [(cache, caches.Content(3, 0, BLOCK, "/srv/data"))]
    with opened(cache) as pool:
        assert not pool.scan(0, SLOTS).state.any()
        open_catalog(cache, pool.uuid).close()


def test_a_cache_that_is_kept_is_whole(device: StandIn, cache: Path) -> None:
    fill(cache, 3)
    before = device.content()
    assert len(replace(cache, device, agree=False)) == 1
    assert device.content() == before
    with opened(cache) as pool:
        assert caches.contents(pool).dirty == 3


def test_a_cache_that_moves_off_a_device_leaves_nothing_there(device: StandIn, cache: Path, tmp_path: Path) -> None:
    fill(cache, 3)
    assert replace(cache, None) == [(cache, caches.Content(3, 0, BLOCK, "/srv/data"))]
    with opened(cache) as pool:
        assert pool.place == os.fspath(cache / "pool")
    assert not any(device.content()[:ALIGNMENT])
    assert replace(tmp_path / "other", device) == []


def test_a_device_says_whose_pool_it_holds(device: StandIn, cache: Path, tmp_path: Path) -> None:
    fill(cache, 3)
    other, before = tmp_path / "other", device.content()
    expected = [(device.path, caches.Content(3, 0, BLOCK, "/srv/data"))]
    assert replace(other, device, agree=False) == expected
    assert device.content() == before
    assert not caches.exists(other)
    opened(cache).close()
    assert replace(other, device) == expected
    assert "holds another pool" in refused(cache, device)
    opened(other).close()


@pytest.mark.parametrize("offset", [0, 1 << 20])
def test_something_else_on_a_device_is_asked_about(device: StandIn, tmp_path: Path, offset: int) -> None:
    device.change(offset, b"PMEMOBJ")
    before = device.content()
    ((place, held),) = replace(tmp_path / "cache", device, agree=False)
    assert place == device.path
    assert isinstance(held, ForeignError)
    assert device.content() == before
    replace(tmp_path / "cache", device)
    opened(tmp_path / "cache").close()


def test_a_damaged_pool_on_a_device_is_asked_about(device: StandIn, cache: Path, tmp_path: Path) -> None:
    device.change(100, b"\xff")
    device.change(SUPERBLOCK_SIZE + 100, b"\xff")
    ((place, held),) = replace(tmp_path / "other", device, agree=False)
    assert place == device.path
    assert "both superblocks" in str(held)
    assert not isinstance(held, ForeignError)
    # Of the cache itself: once for the cache, once for what would be lost on the device.
    assert [place for place, _ in replace(cache, device)] == [cache, device.path]
    opened(cache).close()


@pytest.mark.parametrize(("size", "name"), [(SIZE - BLOCK, "dax0.0"), (None, "missing")])
def test_nothing_is_given_up_for_a_pool_that_cannot_be(
    device: StandIn, cache: Path, size: int | None, name: str
) -> None:
    with pytest.raises(UserError, match=r"multiple of|No such file"):
        caches.format_cache(
            cache,
            size,
            BLOCK,
            device=device.path.with_name(name),
            volatile=True,
            progress=None,
            may_replace=lambda *_: None,
        )
    opened(cache).close()


def test_a_cache_whose_device_is_missing_is_asked_about(device: StandIn, cache: Path) -> None:
    aside = device.path.with_name("aside")
    device.path.rename(aside)
    ((place, held),) = replace(cache, None, agree=False)
    assert place == cache
    assert "No such file" in str(held)
    aside.rename(device.path)
    opened(cache).close()


def test_an_erased_pool_is_never_valid_with_lost_headers(device: StandIn, cache: Path) -> None:
    """Whatever of the erasure a crash lets through."""
    fill(cache, 100)
    medium = DeviceMedium(device.path)
    syncs = 0

    def look() -> None:
        nonlocal syncs
        syncs += 1
        assert [Superblock.unpack(device.content()[at:][:SUPERBLOCK_SIZE]) for at in (0, SUPERBLOCK_SIZE)] == [None] * 2
        assert any(device.content()[HEADER_OFFSET:ALIGNMENT]) == (syncs == 1)

    medium.sync = look  # type: ignore[method-assign]
    erase(medium)
    medium.close()
    assert syncs == 2
