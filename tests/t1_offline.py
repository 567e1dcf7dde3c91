"""A look at a cache changes nothing, and sees what the headers say."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support_fs import run

from cachefsd.cli import trouble
from cachefsd.errors import UserError
from cachefsd.media import medium, offline
from cachefsd.media.catalog import open_catalog
from cachefsd.media.daxdevice import DeviceFacts
from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.medium import FileMedium
from cachefsd.media.offline import look, paths_of
from cachefsd.media.pool import open_pool
from cachefsd.media.poolreader import open_readonly
from cachefsd.media.poolrecord import PoolRecord
from cachefsd.media.ports import NO_FILE, Changes, FileRecord, SlotState
from cachefsd.service import caches, overview
from cachefsd.service.caches import format_cache

SIZE = 8 << 20


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """One with three dirty slots of two files, a clean one, a lost one and one that is set aside; in use when a crash
    came."""
    path = tmp_path / "cache"
    format_cache(path, SIZE, 4096, volatile=True, progress=None, may_replace=None)
    with open_pool(path, volatile=True) as pool:
        pool.bind(b"identity", b"/srv/data")
        pool.mark_open()
        states = [SlotState.DIRTY, SlotState.DIRTY, SlotState.DIRTY, SlotState.CLEAN, SlotState.QUARANTINED]
        for slot, state in enumerate(states):
            pool.publish(slot, state, slot + 1, 1 + slot // 2, slot, 0, 0, 4096)
        pool.publish(5, SlotState.QUARANTINED, 6, NO_FILE, 5, 0, 0, 4096)
        catalog = open_catalog(path, pool.uuid)
        catalog.transact(Changes(put=[FileRecord(1, b"one", path=b"a/one"), FileRecord(2, b"two", path=b"two")]))
        catalog.close()
    return path


def everything(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in (path, *path.rglob("*")):
        status = one.lstat()
        about = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        found[os.fspath(one)] = (*about, one.read_bytes() if one.is_file() else os.listdir(one))
    return found


def test_it_counts_and_changes_nothing(cache: Path) -> None:
    cache.chmod(0o755)
    (cache / "pool").chmod(0o644)
    before = everything(cache)
    found = look(cache)
    paths = paths_of(cache, found)
    status = overview.one_cache(cache)
    assert everything(cache) == before
    slots = found.slots
    assert (slots.dirty, slots.clean, slots.lost, slots.set_aside, slots.unknown) == (3, 1, 1, 1, 0)
    assert slots.free == found.superblock.geometry.slots - 6
    assert not found.superblock.clean
    assert slots.complete
    assert found.used_by is None
    assert paths == {1: b"a/one", 2: b"two"}
    assert status["state"] == "offline"
    assert status["backing"] == "/srv/data"
    assert (status["dirty_bytes"], status["lost_bytes"], status["lost_unknown"]) == (3 * 4096, 4096, 0)
    assert status["slots"]["quarantined"] == 2
    assert [(file["path"], file["dirty_bytes"]) for file in status["files"]] == [("a/one", 8192), ("two", 4096)]


@pytest.fixture(params=["open to others", "modes without w", "a mount without w"])
def guarded(request: pytest.FixtureRequest, cache: Path) -> Iterator[Path]:
    """The cache, with modes that a daemon would change, or where writing fails."""
    if request.param == "a mount without w":
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        run("mount", "--bind", cache, cache)
        try:
            run("mount", "-o", "remount,bind,ro", cache)
            yield cache
        finally:
            run("umount", cache)
        return
    directories, files = (0o755, 0o644) if request.param == "open to others" else (0o500, 0o400)
    for path in (cache, *cache.rglob("*")):
        path.chmod(directories if path.is_dir() else files)
    yield cache
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "a superblock is damaged"])
def test_a_pool_that_is_open_to_be_read_is_left_as_it_is(guarded: Path, damaged: bool) -> None:
    if damaged and os.access(guarded / "pool", os.W_OK):
        with (guarded / "pool").open("r+b") as file:
            file.seek(100)
            file.write(b"\xff" * 64)
    before = everything(guarded)
    with open_readonly(guarded) as pool:
        headers = pool.scan(0, pool.slots)
        data = [pool.read(slot) for slot in range(pool.slots)]
        content = caches.contents(pool)
        assert (pool.identity, pool.path_hint, pool.was_clean) == (b"identity", b"/srv/data", False)
        status = overview.one_cache(guarded)
    assert everything(guarded) == before
    assert list(headers.state[:6]) == [2, 2, 2, 1, 3, 3]
    assert data == [bytes(4096)] * len(data)
    assert (content.dirty, content.clean) == (4, 1)  # what is lost is owed, and what is set aside is nothing
    assert status["dirty_bytes"] == 3 * 4096


def test_what_is_set_aside_is_not_called_lost(tmp_path: Path) -> None:
    """Of a slot on bad media nobody misses anything, mounted or not."""
    path = tmp_path / "cache"
    format_cache(path, SIZE, 4096, volatile=True, progress=None, may_replace=None)
    with open_pool(path, volatile=True) as pool:
        pool.mark_open()
        pool.publish(3, SlotState.QUARANTINED, 1, NO_FILE, 3, 0, 0, 4096)
        assert caches.contents(pool).dirty == 0
    status = overview.one_cache(path)
    assert (status["lost_bytes"], status["lost_unknown"], status["slots"]["quarantined"]) == (0, 0, 1)
    said = dict(trouble.lines_of_cache(status))
    assert said["quarantined"] == "1 slots, set aside"
    assert "LOST" not in said

    with open_pool(path, volatile=True) as pool:
        pool.publish(4, SlotState.QUARANTINED, 2, 7, 0, 0, 0, 4096)
    said = dict(trouble.lines_of_cache(overview.one_cache(path)))
    assert said["quarantined"] == "2 slots, set aside"
    assert said["LOST"] == "4.0 KiB of files"

    with (path / "pool").open("r+b") as file:  # the header of slot 5
        file.seek(8192 + 5 * HEADER_SIZE)
        file.write(b"\xff" * HEADER_SIZE)
    lines = list(trouble.lines_of_cache(overview.one_cache(path)))
    assert [value for name, value in lines if name == "LOST"] == [
        "4.0 KiB of files",
        "1 blocks of unknown files, or none: their headers are damaged",
    ]


def test_it_needs_no_lock_and_takes_none(cache: Path) -> None:
    with open_pool(cache, volatile=True):
        found = look(cache)
        assert found.used_by == os.getpid()
        assert found.slots.dirty == 3
        assert paths_of(cache, found) == {}  # the catalog may be changing
        assert overview.one_cache(cache)["used_by"] == os.getpid()
    with open_pool(cache, volatile=True):
        pass


def test_without_its_catalog_it_still_counts(cache: Path) -> None:
    (cache / "catalog" / "data.mdb").write_bytes(b"garbage")
    status = overview.one_cache(cache)
    assert status["dirty_files"] == 2
    assert [file["path"] for file in status["files"]] == ["", ""]


def test_a_damaged_superblock_is_not_repaired(cache: Path) -> None:
    with (cache / "pool").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 64)
    before = (cache / "pool").read_bytes()
    assert look(cache).slots.dirty == 3
    assert (cache / "pool").read_bytes() == before


def test_headers_that_cannot_be_read_are_counted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = FileMedium.read

    def fail(file: FileMedium, buffer: bytearray | memoryview, offset: int) -> int:
        if offset >= 8192:
            raise OSError(number, os.strerror(number))
        return read(file, buffer, offset)

    monkeypatch.setattr(FileMedium, "read", fail)
    number = errno.EIO
    found = look(cache)
    assert found.slots.unknown == found.superblock.geometry.slots
    number = errno.ENOMEM
    with pytest.raises(UserError, match="can't read the pool: Cannot allocate memory"):
        look(cache)


def test_it_ends_in_time(cache: Path) -> None:
    found = look(cache, time.monotonic() - 1)
    assert not found.slots.complete
    assert found.slots.dirty == 0


@pytest.mark.parametrize("content", [None, b"", b"something else" * 1000])
def test_what_is_no_cache(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "pool").write_bytes(content)
    with pytest.raises(UserError):
        look(tmp_path)


def test_a_device_is_read_through_a_map(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is a file here; it is examined as one of device-dax is."""
    device = cache.parent / "device"
    (cache / "pool").rename(device)
    uuid = look_at_file(device).superblock.pool_uuid
    (cache / "pool").write_bytes(PoolRecord(device, uuid).pack())
    facts = DeviceFacts(SIZE, 4096, (range(8192, 8192 + 512),))
    monkeypatch.setattr(medium, "examine", lambda _: facts)
    found = look(cache)
    assert found.slots.unknown == 4096 // HEADER_SIZE
    assert found.slots.free == found.superblock.geometry.slots - found.slots.unknown
    data = found.superblock.geometry.data_offset
    bad = tuple(range(data + slot * 4096, data + slot * 4096 + 512) for slot in (1, 5))
    facts = DeviceFacts(SIZE, 4096, bad)
    found = look(cache)
    assert (found.slots.dirty, found.slots.lost, found.slots.set_aside, found.slots.unknown) == (2, 2, 1, 0)
    facts = DeviceFacts(SIZE, 4096, ())
    before = device.read_bytes()
    found = look(cache)
    assert (found.pool, found.slots.dirty) == (device, 3)
    assert device.read_bytes() == before


def look_at_file(device: Path) -> offline.Look:
    place = device.parent / "as file"
    place.mkdir()
    (place / "pool").hardlink_to(device)
    return look(place)
