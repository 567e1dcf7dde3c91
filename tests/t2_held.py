"""A file that fails at recovery is set aside: its data is kept, the others are served, and it comes back."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from support_engine import BLOCK, PlainBacking, World

from cachefsd.backing.ports import BackingStat, LostFile, Place
from cachefsd.core import resolver
from cachefsd.core.cache import Cache
from cachefsd.core.engine import Engine
from cachefsd.core.files import CachedFile
from cachefsd.core.options import EngineOptions
from cachefsd.media.catalog import LmdbCatalog
from cachefsd.media.ports import CatalogFullError, Changes

OPTIONS = EngineOptions(retry_min_s=1.0, retry_max_s=4.0, dirty_age_s=1000.0)


async def prepared(directory: Path) -> tuple[World, bytes]:
    """Two files with dirty data, and the handle of the first one."""
    world = World(directory, slots=8, options=OPTIONS)
    async with world.started():
        for name in ("bad", "good"):
            await world.write(world.open(name), 0, name.encode() * 700)
        handle = world.open("bad").handle
    return world, handle


async def test_it_gives_its_error_and_keeps_its_data_and_others_are_served(
    tmp_path: Path, expect_logs: Callable[..., None], autojump_clock: trio.testing.MockClock
) -> None:
    expect_logs("set aside, the data stays")
    world, handle = await prepared(tmp_path)
    world.broken[handle] = errno.EIO
    async with world.started(tasks=True, shutdown=True) as engine:
        assert "1 files" in engine.notes()[0]
        with pytest.raises(OSError, match="Input/output error"):
            world.open("bad")
        bad = engine.find(handle)
        assert bad is not None
        with pytest.raises(OSError, match="Input/output error"):
            await engine.unlinking(bad)
        assert await world.read(world.open("good"), 0, 10**6) == b"good" * 700
        with pytest.raises(OSError, match="bad: Input/output error"):
            await engine.flush()
        assert world.path("good").read_bytes() == b"good" * 700
        assert world.path("bad").read_bytes() == b""
        await trio.sleep(30)
        (about,) = engine.status()["writeback"]["failing"]
        assert (about["path"], about["errno"], about["dirty_bytes"]) == ("bad", "EIO", BLOCK)
        assert 5 < about["tries"] < 15  # with pauses of up to four seconds
    async with world.started(tasks=True) as engine:
        with pytest.raises(OSError, match="Input/output error"):
            world.open("bad")
        del world.broken[handle]
        await trio.sleep(5)
        assert engine.status()["writeback"]["failing"] == []
        assert await world.read(world.open("bad"), 0, 10**6) == b"bad" * 700
        await world.write(world.open("bad"), 1, b"AD")
        await engine.flush()
        assert world.path("bad").read_bytes() == b"bAD" + b"bad" * 699


async def test_a_truncate_is_finished_later(
    tmp_path: Path, expect_logs: Callable[..., None], autojump_clock: trio.testing.MockClock
) -> None:
    expect_logs("set aside, the data stays")
    world, handle = await prepared(tmp_path)
    async with world.started(tasks=True) as engine:
        await engine.flush()
        await world.write(world.open("bad"), 0, b"BAD")
        await engine.attributes.truncate(world.open("bad"), 5)
    world.broken[handle] = errno.EACCES
    async with world.started(tasks=True) as engine:
        with pytest.raises(OSError, match="Permission denied"):
            world.open("bad")
        world.broken.clear()
        await trio.sleep(5)
        assert await world.read(world.open("bad"), 0, 10**6) == b"BADba"
        await engine.flush()
    assert world.path("bad").read_bytes() == b"BADba"


async def test_after_a_power_cut_its_stamp_is_not_trusted_by_the_next_start(
    tmp_path: Path, expect_logs: Callable[..., None]
) -> None:
    expect_logs("set aside, the data stays")
    world = World(tmp_path, slots=8, options=OPTIONS)
    path = world.path("a")
    path.write_bytes(b"old")
    async with world.started(epoch=b"before"):
        await world.write(world.open("a"), 0, b"new")
    os.utime(path, ns=(1, 1))  # what the power cut has taken back
    world.broken[b"%d" % path.stat().st_ino] = errno.EIO
    async with world.started(epoch=b"after") as engine:
        assert engine.cache.files.held
    world.broken.clear()
    async with world.started(epoch=b"after", tasks=True) as engine:
        assert engine.cache.records.conflicts == {}
        assert await world.read(world.open("a"), 0, 10) == b"new"
        await engine.flush()
    assert path.read_bytes() == b"new"
    assert [each.name for each in world.root.iterdir()] == ["a"]


async def test_a_bug_at_recovery_sets_aside_the_file_that_it_concerns(
    tmp_path: Path,
    expect_logs: Callable[..., None],
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect_logs("set aside, the data stays|a bug: the recovery of bad failed", count=2)
    world, handle = await prepared(tmp_path)
    settle, broken = resolver.settle, True

    def failing(cache: Cache, file: CachedFile, stat: BackingStat) -> None:
        if broken and file.handle == handle:
            raise struct.error("int too large")
        settle(cache, file, stat)

    monkeypatch.setattr(resolver, "settle", failing)
    async with world.started(tasks=True) as engine:
        await trio.sleep(10)
        assert await world.read(world.open("good"), 0, 10**6) == b"good" * 700
        with pytest.raises(OSError, match="int too large"):
            world.open("bad")
        broken = False
        await trio.sleep(10)
        assert await world.read(world.open("bad"), 0, 10**6) == b"bad" * 700
        assert [each["where"] for each in engine.status()["faults"]] == ["the recovery of bad"]


async def edited(directory: Path) -> World:
    """One file of three blocks of which the cache has a newer first one, and somebody has written all of it."""
    world = World(directory, slots=8, options=OPTIONS)
    world.path("a").write_bytes(b"1" * 3 * BLOCK)
    async with world.started() as engine:
        file = world.open("a")
        await world.write(file, 0, b"2" * BLOCK)
        await engine.writeback.write_out(file)
        await world.write(file, 0, b"3" * BLOCK)
    world.path("a").write_bytes(b"x" * 3 * BLOCK)
    return world


@pytest.mark.parametrize("failing_commit", [1, 2])
async def test_a_version_that_could_not_be_parted_is_parted_later(
    tmp_path: Path,
    expect_logs: Callable[..., None],
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    failing_commit: int,
) -> None:
    expect_logs("set aside, the data stays|was changed behind the mount")
    world = await edited(tmp_path)
    commit, left = LmdbCatalog.transact, failing_commit

    def failing(self: LmdbCatalog, changes: Changes) -> None:
        nonlocal left
        left -= any(record.name == b"a" or b"conflict" in record.name for record in changes.put)
        if left == 0:
            left -= 1
            raise CatalogFullError("no space left")
        commit(self, changes)

    monkeypatch.setattr(LmdbCatalog, "transact", failing)
    with suppress(OSError):  # the start itself may fail: the next one does the same again
        async with world.started(tasks=True) as engine:
            await trio.sleep(10)
            await check_parted(world, engine)
    assert left < 0
    async with world.started(tasks=True) as engine:
        await check_parted(world, engine)


async def check_parted(world: World, engine: Engine) -> None:
    (conflict,) = engine.cache.records.conflicts.values()
    await engine.flush()
    assert world.path("a").read_bytes() == b"x" * 3 * BLOCK
    assert world.path(conflict.copy).read_bytes() == b"3" * BLOCK + b"x" * 2 * BLOCK


async def test_a_file_that_got_no_name_when_it_was_created_again_gets_its_own_later(
    tmp_path: Path, expect_logs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash, or an error, between the record of the new file and its name."""
    expect_logs("set aside, the data stays|created again")
    world = World(tmp_path, slots=8, options=OPTIONS)
    async with world.started(epoch=b"before"):
        await world.write(world.open("a"), 0, b"a" * BLOCK)
    world.path("a").unlink()  # by a power cut
    recreate = PlainBacking.recreate

    async def failing(self: PlainBacking, lost: LostFile, note: Callable[[bytes, Place], Awaitable[None]]) -> None:
        await recreate(self, lost, note)
        world.path("a").unlink()
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(PlainBacking, "recreate", failing)
        async with world.started(epoch=b"after") as engine:
            assert engine.cache.files.held
    async with world.started(epoch=b"after") as engine:
        assert engine.cache.records.conflicts == {}
        await engine.writeback.write_out(next(iter(engine.cache.dirty)))
    assert [each.name for each in world.root.iterdir()] == ["a"]
    assert world.path("a").read_bytes() == b"a" * BLOCK
