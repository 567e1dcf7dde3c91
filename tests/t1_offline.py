"""A look at a cache changes nothing, and sees what the headers say."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cachefsd.errors import UserError
from cachefsd.media import offline
from cachefsd.media.catalog import open_catalog
from cachefsd.media.daxdevice import DeviceFacts
from cachefsd.media.medium import FileMedium
from cachefsd.media.offline import look, paths_of
from cachefsd.media.pool import open_pool
from cachefsd.media.poolrecord import PoolRecord
from cachefsd.media.ports import Changes, FileRecord, SlotState
from cachefsd.service import overview
from cachefsd.service.caches import format_cache

SIZE = 8 << 20


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """One with three dirty slots of two files, a clean and a lost one, in use when a crash came."""
    path = tmp_path / "cache"
    format_cache(path, SIZE, 4096, volatile=True, progress=None, may_replace=None)
    with open_pool(path, volatile=True) as pool:
        pool.bind(b"identity", b"/srv/data")
        pool.mark_open()
        states = [SlotState.DIRTY, SlotState.DIRTY, SlotState.DIRTY, SlotState.CLEAN, SlotState.QUARANTINED]
        for slot, state in enumerate(states):
            pool.publish(slot, state, slot + 1, 1 + slot // 2, slot, 0, 0, 4096)
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
    assert (found.dirty, found.clean, found.quarantined, found.damaged) == (3, 1, 1, 0)
    assert found.free == found.superblock.geometry.slots - 5
    assert not found.superblock.clean
    assert found.complete
    assert found.used_by is None
    assert paths == {1: b"a/one", 2: b"two"}
    assert status["state"] == "offline"
    assert status["backing"] == "/srv/data"
    assert (status["dirty_bytes"], status["lost_bytes"]) == (3 * 4096, 4096)
    assert [(file["path"], file["dirty_bytes"]) for file in status["files"]] == [("a/one", 8192), ("two", 4096)]


def test_it_needs_no_lock_and_takes_none(cache: Path) -> None:
    with open_pool(cache, volatile=True):
        found = look(cache)
        assert found.used_by == os.getpid()
        assert found.dirty == 3
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
    assert look(cache).dirty == 3
    assert (cache / "pool").read_bytes() == before


def test_headers_that_cannot_be_read_are_counted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = FileMedium.read

    def fail(medium: FileMedium, buffer: bytearray | memoryview, offset: int) -> int:
        if offset >= 8192:
            raise OSError(number, os.strerror(number))
        return read(medium, buffer, offset)

    monkeypatch.setattr(FileMedium, "read", fail)
    number = errno.EIO
    found = look(cache)
    assert found.damaged == found.superblock.geometry.slots
    number = errno.ENOMEM
    with pytest.raises(UserError, match="can't read the pool: Cannot allocate memory"):
        look(cache)


def test_it_ends_in_time(cache: Path) -> None:
    found = look(cache, time.monotonic() - 1)
    assert not found.complete
    assert found.dirty == 0


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
    monkeypatch.setattr(offline, "examine", lambda _: facts)
    assert look(cache).damaged == look(cache).superblock.geometry.slots
    monkeypatch.setattr(offline, "examine", lambda _: DeviceFacts(SIZE, 4096, ()))
    before = device.read_bytes()
    found = look(cache)
    assert (found.pool, found.dirty) == (device, 3)
    assert device.read_bytes() == before


def look_at_file(device: Path) -> offline.Look:
    place = device.parent / "as file"
    place.mkdir()
    (place / "pool").hardlink_to(device)
    return look(place)
