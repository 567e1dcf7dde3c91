"""Many small files are written back together: one sync for all, errors for whom they concern, nobody held up."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from support_engine import BLOCK, PlainBacking, PlainFile, World

from cachefsd.core import groups
from cachefsd.core.options import EngineOptions
from cachefsd.media.ports import Durability

FILES = 6
PATIENT = EngineOptions(dirty_age_s=5, retry_min_s=1000, retry_max_s=1000)


async def written(world, count=FILES):
    """So many small files, none of which fills its last block."""
    files = [world.open(f"f{number}") for number in range(count)]
    for number, file in enumerate(files):
        await world.write(file, 0, bytes([number + 1]) * (number % 3 * BLOCK + 100))
    return files


def check_backing(world, *numbers):
    for number in numbers:
        assert world.path(f"f{number}").read_bytes() == bytes([number + 1]) * (number % 3 * BLOCK + 100)


def dirty(files):
    return [number for number, file in enumerate(files) if file.dirty]


@pytest.mark.parametrize("durability", [Durability.RAM, Durability.DISK], ids=lambda each: each.value)
async def test_one_sync_and_two_transactions_are_for_all(tmp_path, autojump_clock, monkeypatch, durability):
    world = World(tmp_path, slots=40, durability=durability)
    async with world.started(tasks=True) as engine:
        files = await written(world)
        commits, commit = [], world.catalog.transact
        monkeypatch.setattr(
            world.catalog, "transact", lambda changes: (commits.append(len(changes.put)), commit(changes))
        )
        await engine.flush()
        assert engine.dirty_bytes == 0
        calls = world.backing.faults.calls
        assert (calls["sync_all"], calls["sync"]) == (2, 0)  # and the one that a flush ends with
        assert [count for count in commits if count] == [FILES, FILES]  # to announce it, and to note what it has done
        check_backing(world, *range(FILES))
        assert [os.stat(world.path(f"f{number}")).st_mtime_ns for number in range(FILES)] == [
            file.mtime_ns for file in files
        ]
        assert engine.status()["writeback"]["bytes"] == sum(file.size for file in files)
        assert not any(engine.cache.slots.pins)
        assert not any(file.lock.locked() for file in files)
    async with world.started() as engine:
        assert engine.dirty_bytes == 0
        assert await world.read(world.open("f1"), 0, 2 * BLOCK) == b"\2" * (BLOCK + 100)


async def test_a_write_that_fails_concerns_one_file(tmp_path, autojump_clock, expect_logs):
    expect_logs("writeback failed", count=1)
    world = World(tmp_path, slots=40, options=PATIENT)
    async with world.started(tasks=True) as engine:
        files = await written(world)
        readers = [file.errors.reader() for file in files]
        world.backing.faults.fail_at["write_tail"] = (3, errno.EIO)
        await trio.sleep(10)
        assert dirty(files) == [2]
        assert [reader.take() for reader in readers] == [0, 0, errno.EIO, 0, 0, 0]
        assert engine.status()["writeback"]["failing_files"] == 1
        check_backing(world, 0, 1, 3, 4, 5)
        await engine.flush()
        assert not dirty(files)
        check_backing(world, 2)


async def test_a_failed_sync_of_everything_concerns_whom_their_own_sync_tells(tmp_path, autojump_clock, expect_logs):
    expect_logs("writeback failed|a sync of the backing failed", count=2)
    world = World(tmp_path, slots=40, options=PATIENT)
    async with world.started(tasks=True) as engine:
        files = await written(world)
        readers = [file.errors.reader() for file in files]
        world.backing.faults.fail_at["sync_all"] = (1, errno.EIO)
        world.backing.faults.fail_at["sync"] = (5, errno.EIO)
        await trio.sleep(10)
        assert dirty(files) == [4]
        assert world.backing.faults.calls["sync"] == FILES
        assert [reader.take() for reader in readers] == [0, 0, 0, 0, errno.EIO, 0]
        tails = [detail for name, detail in world.backing.faults.log if name == "write_tail"]
        await engine.flush()
        assert [detail for name, detail in world.backing.faults.log if name == "write_tail"] == [*tails, (BLOCK, 100)]
        assert not dirty(files)


async def test_an_error_that_a_user_sync_consumed_voids_one_file(tmp_path, autojump_clock, expect_logs):
    expect_logs("writeback failed", count=1)
    world = World(tmp_path, slots=40, options=PATIENT)
    async with world.started(tasks=True) as engine:
        files = await written(world)
        hold = world.backing.faults.hang["sync_all"] = trio.Event()
        await trio.sleep(5)
        await trio.testing.wait_all_tasks_blocked()
        engine.attributes.changed(files[1])
        world.backing.faults.hang["sync_all"].set()
        world.backing.faults.hang["stat"] = trio.Event()
        world.backing.faults.fail_at["sync"] = (1, errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            await engine.fsync(files[1])
        world.backing.faults.hang["stat"].set()
        hold.set()
        await trio.sleep(5)
        assert dirty(files) == [1]


@pytest.mark.parametrize("call", ["write_tail", "set_mtime"])
async def test_a_file_that_hangs_holds_no_other_up(tmp_path, autojump_clock, call):
    world = World(tmp_path, slots=40, options=PATIENT)
    async with world.started(tasks=True) as engine:
        files = await written(world)
        hold = trio.Event()
        plain = getattr(PlainFile, call)

        async def hangs(file, *args):
            if file.handle == files[2].handle:
                await hold.wait()
            await plain(file, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PlainFile, call, hangs)
            await trio.sleep(5 + groups.PATIENCE_S + 1)
            assert dirty(files) == [2]  # those behind it have got passes of their own
            assert files[2].lock.locked()
            check_backing(world, 0, 1, 3, 4, 5)
            hold.set()
            await trio.sleep(1)
        assert not dirty(files)
        check_backing(world, 2)
        assert not any(engine.cache.slots.pins)


async def test_a_file_that_somebody_else_changes_is_left_out(tmp_path, autojump_clock):
    world = World(tmp_path, slots=40, options=PATIENT)
    async with world.started(tasks=True) as engine:
        files = await written(world)
        async with files[3].lock:
            await trio.sleep(6)
            assert dirty(files) == [3]
        await trio.sleep(1)
        assert not dirty(files)
        assert engine.status()["writeback"]["errors"] == 0


async def test_what_is_written_meanwhile_stays_dirty(tmp_path, autojump_clock):
    world = World(tmp_path, slots=40, options=PATIENT)
    async with world.started(tasks=True):
        files = await written(world)
        hold = world.backing.faults.hang["sync_all"] = trio.Event()
        await trio.sleep(5)
        await trio.testing.wait_all_tasks_blocked()
        await world.write(files[1], 0, b"new")
        await world.write(files[4], files[4].size, b"more")
        del world.backing.faults.hang["sync_all"]
        hold.set()
        await trio.testing.wait_all_tasks_blocked()
        assert dirty(files) == [1, 4]
        check_backing(world, 0, 1, 2, 3, 4, 5)
        await trio.sleep(6)
        assert not dirty(files)
        assert world.path("f1").read_bytes().startswith(b"new\2")
        assert world.path("f4").read_bytes().endswith(b"\5more")


async def test_where_a_sync_of_everything_takes_longer_each_file_is_synced(tmp_path, autojump_clock, monkeypatch):
    """Others may have much dirty data on the same file system. After a while it is tried again."""
    world = World(tmp_path, slots=40, options=EngineOptions(dirty_age_s=1))
    async with world.started(tasks=True) as engine:
        calls = world.backing.faults.calls
        sync_all = type(world.backing).sync_all

        async def slowly(backing):
            await trio.sleep(20)
            await sync_all(backing)

        with monkeypatch.context() as patch:
            patch.setattr(type(world.backing), "sync_all", slowly)
            await written(world)
            await trio.sleep(25)
        assert (calls["sync"], engine.dirty_bytes) == (0, 0)
        await written(world)
        await trio.sleep(5)
        assert (calls["sync"], engine.dirty_bytes) == (FILES, 0)
        await trio.sleep(20 * groups.FADE_S)
        await written(world)
        await trio.sleep(5)
        assert (calls["sync"], engine.dirty_bytes) == (FILES, 0)


async def test_the_work_for_a_file_does_not_grow_with_their_number(tmp_path, autojump_clock, monkeypatch):
    """Each file is looked at once, also while others fail and have no name."""
    world = World(tmp_path, slots=1200, options=EngineOptions(dirty_age_s=1000, high_watermark=1, low_watermark=0.9))
    async with world.started(tasks=True) as engine:
        looked_at, plain = [], engine.writeback._next
        monkeypatch.setattr(engine.writeback, "_next", lambda now: looked_at.append(plain(now)) or looked_at[-1])
        files = [world.open(f"f{number}") for number in range(1000)]
        for file in files:
            await world.write(file, 0, b"x")
        await engine.flush()
        assert engine.dirty_bytes == 0
        found = [file for file in looked_at if file is not None]
        assert len(set(found)) == 1000
        assert len(found) <= 1002  # the first one also when it was not yet due
        assert not engine.writeback._again
        assert engine.cache.dirty.take() is None


async def test_a_flush_reports_a_file_that_fails_again_and_again(tmp_path, autojump_clock, expect_logs):
    expect_logs("writeback failed", count=1)
    world = World(tmp_path, slots=40)
    async with world.started(tasks=True) as engine:
        files = await written(world)
        plain = PlainFile.write_tail

        async def fails(file, *args):
            if file.handle == files[2].handle:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            await plain(file, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PlainFile, "write_tail", fails)
            with pytest.raises(OSError, match="f2: Input/output error"):
                await engine.flush()
            assert dirty(files) == [2]
        await engine.flush()
        assert not dirty(files)


async def test_a_group_has_no_more_files_open_than_there_are_descriptors_for(tmp_path, autojump_clock, monkeypatch):
    monkeypatch.setattr(PlainBacking, "most_kept_open", 32)
    world = World(tmp_path, slots=100, options=EngineOptions(writeback_jobs=1))  # no pressure before the flush
    sizes, plain = [], PlainBacking.finish_files
    async with world.started(tasks=True) as engine:

        async def finish_files(backing, files, *, synced):
            sizes.append(len(files))
            return await plain(backing, files, synced=synced)

        monkeypatch.setattr(type(world.backing), "finish_files", finish_files)
        await written(world, 12)
        await engine.flush()
        assert (sizes, engine.dirty_bytes) == ([4, 4, 4], 0)
