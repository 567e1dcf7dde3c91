"""The engine over real media and real files, deterministic: reads, writes, truncates, writeback, recovery."""

from __future__ import annotations

import errno
import itertools
import os
from array import array

import pytest
import trio
import trio.testing
from support_engine import BLOCK, PlainFile, World
from trio._core import _run as trio_run

from cachefsd.core import groups, passes
from cachefsd.core import steps as steps_of_passes
from cachefsd.core.options import EngineOptions
from cachefsd.core.slots import Slots
from cachefsd.media.ports import Durability, SlotState

CLASSES = [Durability.RAM, Durability.PMEM, Durability.DISK]


@pytest.fixture(params=CLASSES, ids=lambda d: d.value)
def world(tmp_path, request):
    return World(tmp_path, durability=request.param)


async def test_a_write_is_read_back_and_survives_a_kill(world):
    async with world.started():
        file = world.open("a")
        await world.write(file, 0, b"x" * BLOCK)
        await world.write(file, BLOCK + 10, b"tail")
        assert await world.read(file, 0, 10**6) == b"x" * BLOCK + bytes(10) + b"tail"
    assert world.path("a").read_bytes() == b""
    async with world.started() as engine:
        file = world.open("a")
        assert file.size == BLOCK + 14
        assert await world.read(file, 0, 10**6) == b"x" * BLOCK + bytes(10) + b"tail"
        assert engine.status()["recovery"]["clean"] is False


async def test_the_newest_version_wins(world):
    async with world.started():
        file = world.open("a")
        for number in range(30):
            await world.write(file, 0, bytes([number]) * BLOCK)
    async with world.started():
        assert await world.read(world.open("a"), 0, BLOCK) == bytes([29]) * BLOCK


async def test_flush_brings_everything_to_the_backing_with_its_mtime(world):
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, os.urandom(3 * BLOCK + 100))
        expected, mtime = await world.read(file, 0, 10**6), file.mtime_ns
        await engine.flush()
        status = engine.status()
        assert status["slots"]["dirty"] == 0
        assert status["slots"]["clean"] == 4
        assert status["writeback"]["bytes"] == 3 * BLOCK + 100
        assert status["writeback"]["bounced_bytes"] == 100
    assert world.path("a").read_bytes() == expected
    assert world.path("a").stat().st_mtime_ns == mtime


async def test_clean_blocks_survive_a_kill_when_the_backing_is_unchanged(world):
    async with world.started(tasks=True) as engine:
        await world.write(world.open("a"), 0, b"1" * BLOCK)
        await engine.flush()
    async with world.started() as engine:
        file = world.open("a")
        assert engine.status()["slots"]["clean"] == 1
        assert await world.read(file, 0, BLOCK) == b"1" * BLOCK
        assert engine.status()["requests"]["read_hits"] == 1
    assert world.backing.faults.calls["read"] == 0


async def test_clean_blocks_of_a_changed_file_are_dropped(world):
    async with world.started(tasks=True) as engine:
        await world.write(world.open("a"), 0, b"1" * BLOCK)
        await engine.flush()
    world.path("a").write_bytes(b"2" * BLOCK)
    async with world.started() as engine:
        file = world.open("a")
        assert await world.read(file, 0, BLOCK) == b"2" * BLOCK
        assert engine.status()["requests"]["read_misses"] == 1


async def test_a_clean_shutdown_is_noticed(world):
    async with world.started(shutdown=True):
        await world.write(world.open("a"), 0, b"1" * BLOCK)
    async with world.started() as engine:
        assert engine.status()["recovery"] == {
            "clean": True,
            "seconds": pytest.approx(0, abs=60),
            "blocks": 1,
        }
        assert await world.read(world.open("a"), 0, BLOCK) == b"1" * BLOCK


async def test_misses_are_promoted_and_then_hit(world):
    content = os.urandom(5 * BLOCK + 77)
    world.path("a").write_bytes(content)
    async with world.started() as engine:
        file = world.open("a")
        assert await world.read(file, 0, 10**6) == content
        assert await world.read(file, 100, 3 * BLOCK) == content[100 : 100 + 3 * BLOCK]
        status = engine.status()
        assert status["promotions"] == 6
        assert status["requests"]["read_misses"] == 1
        assert status["requests"]["read_hits"] == 1


async def test_a_read_larger_than_the_cache_goes_past_it(world):
    content = os.urandom(20 * BLOCK)
    world.path("a").write_bytes(content)
    async with world.started() as engine:
        assert await world.read(world.open("a"), 0, 10**6) == content
        assert engine.status()["requests"]["bypassed"] == 1
        assert engine.status()["slots"]["clean"] == 0


async def test_partial_writes_merge_with_the_backing(world):
    content = os.urandom(3 * BLOCK)
    world.path("a").write_bytes(content)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 100, b"abc")
        await world.write(file, BLOCK - 2, b"defg")
        expected = bytearray(content)
        expected[100:103] = b"abc"
        expected[BLOCK - 2 : BLOCK + 2] = b"defg"
        assert await world.read(file, 0, 10**6) == expected
        await engine.flush()
    assert world.path("a").read_bytes() == expected


async def test_eviction_takes_clean_blocks_and_never_dirty_ones(world):
    world.path("big").write_bytes(os.urandom(40 * BLOCK))
    async with world.started() as engine:
        dirty = world.open("dirty")
        await world.write(dirty, 0, b"d" * 3 * BLOCK)
        big = world.open("big")
        for block in range(40):
            await world.read(big, block * BLOCK, BLOCK)
        status = engine.status()
        assert status["slots"]["dirty"] == 3
        if world._durability is not Durability.DISK:
            assert status["evictions"] >= 30
        assert await world.read(dirty, 0, 3 * BLOCK) == b"d" * 3 * BLOCK


@pytest.mark.parametrize("blocks", [1, 4, 32], ids=lambda blocks: f"{blocks} at a time")
async def test_reading_a_large_file_once_leaves_what_is_used(tmp_path, blocks):
    """A block that its own read had brought counted as used twice: a backup displaced all that was in use."""
    world = World(tmp_path, slots=256)
    world.path("hot").write_bytes(os.urandom(16 * BLOCK))
    world.path("large").write_bytes(bytes(600 * BLOCK))
    async with world.started() as engine:
        hot, large = world.open("hot"), world.open("large")
        for _ in range(4):
            for block in range(16):
                await world.read(hot, block * BLOCK, BLOCK)
        for start in range(0, 600, blocks):
            await world.read(large, start * BLOCK, blocks * BLOCK)
        assert engine.cache.slots.evictions > 256
        assert hot.table.absent(0, 16) == []


async def test_dirty_files_that_nobody_has_open_keep_few_descriptors(tmp_path):
    """Each kept its own until it was written back: many small files over a slow backing used up the limit."""
    world = World(tmp_path, slots=64, options=EngineOptions(dirty_age_s=3600))
    async with world.started(tasks=True) as engine:
        world.backing._real.most_kept_open = 3
        files = []
        for number in range(10):
            file = world.open(f"{number}")
            await file.backing.open(write=True)
            engine.opened(file)
            await world.write(file, 0, b"data of %d" % number)
            engine.closed(file)
            files.append(file)
        assert [file.backing.writable for file in files] == [False] * 7 + [True] * 3
        engine.opened(files[9])  # one that is in use stays open, however many come after it
        for file in files[:5]:
            await file.backing.open(write=True)
            engine.opened(file)
            engine.closed(file)
        assert [file.backing.writable for file in files] == [False] * 2 + [True] * 3 + [False] * 4 + [True]
        engine.closed(files[9])
        await engine.flush()
        assert not any(file.backing.writable for file in files)
        assert not engine.cache.files.kept_open
    for number in range(10):
        assert world.path(f"{number}").read_bytes() == b"data of %d" % number


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("durability", CLASSES, ids=lambda d: d.value)
async def test_a_cache_of_very_few_slots_makes_progress(tmp_path, slots, durability, autojump_clock):
    world = World(tmp_path, slots=slots, durability=durability)
    expected = os.urandom(50 * BLOCK + 5)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, expected)
        assert await world.read(file, 0, 10**6) == expected
        await world.write(file, 3, b"over")
        expected = expected[:3] + b"over" + expected[7:]
        await engine.flush()
    assert world.path("a").read_bytes() == expected


async def test_truncate_both_ways(world):
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"x" * (3 * BLOCK))
        await engine.attributes.truncate(file, BLOCK + 10)
        assert await world.read(file, 0, 10**6) == b"x" * (BLOCK + 10)
        await engine.attributes.truncate(file, 2 * BLOCK)
        expected = b"x" * (BLOCK + 10) + bytes(BLOCK - 10)
        assert await world.read(file, 0, 10**6) == expected
        await world.write(file, 3 * BLOCK, b"end")
        expected += bytes(BLOCK) + b"end"
        assert await world.read(file, 0, 10**6) == expected
        await engine.flush()
    assert world.path("a").read_bytes() == expected


@pytest.mark.parametrize("sizes", [(10,), (BLOCK,), (3000, 1000), (1000, 5000), (0, 7000, 6000), (BLOCK + 1, 1)])
async def test_truncates_survive_a_kill_in_order(world, sizes):
    model = bytearray(b"x" * (3 * BLOCK))
    async with world.started() as engine:
        file = world.open("a")
        await world.write(file, 0, bytes(model))
        for size in sizes:
            await engine.attributes.truncate(file, size)
            model = bytearray(model[:size].ljust(size, b"\0"))
    async with world.started():
        file = world.open("a")
        assert file.size == len(model)
        assert await world.read(file, 0, 10**6) == model


async def test_what_was_written_after_a_truncate_survives_a_writeback_and_a_kill(world):
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"x" * (3 * BLOCK))
        await engine.attributes.truncate(file, 0)
        await world.write(file, 2 * BLOCK, b"new")
        await engine.flush()
        await world.write(file, 0, b"later")
    async with world.started():
        file = world.open("a")
        expected = b"later" + bytes(2 * BLOCK - 5) + b"new"
        assert await world.read(file, 0, 10**6) == expected


async def test_a_failed_truncate_changes_nothing(world):
    async with world.started() as engine:
        file = world.open("a")
        await world.write(file, 0, b"x" * (2 * BLOCK))
        world.backing.faults.fail["truncate"] = errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            await engine.attributes.truncate(file, 1)
        assert await world.read(file, 0, 10**6) == b"x" * (2 * BLOCK)
        await world.write(file, 0, b"y")
    async with world.started():
        assert await world.read(world.open("a"), 0, 10**6) == b"y" + b"x" * (2 * BLOCK - 1)


async def test_utimes_over_dirty_data_survives_kill_and_writeback(world):
    for round_ in range(2):
        async with world.started(tasks=True) as engine:
            file = world.open("a")
            await world.write(file, 0, b"x" * (2 * BLOCK))
            async with engine.attributes.changing(file):
                os.utime(world.path("a"), ns=(0, 1_000 + round_))
                await engine.attributes.set_mtime(file, 1_000 + round_)
            assert file.mtime_ns == 1_000 + round_
        async with world.started(tasks=True) as engine:
            file = world.open("a")
            assert file.mtime_ns == 1_000 + round_
            await engine.flush()
        assert world.path("a").stat().st_mtime_ns == 1_000 + round_


@pytest.mark.parametrize(
    "steps",
    [
        "write write",
        "write shrink",
        "write grow",
        "write empty",
        "write shrink grow",
        "write shrink write",
        "write shrink utime",
        "write grow utime",
        "write empty utime",
        "write same",
        "write flush shrink",
        "write flush grow",
        "write flush empty",
        "write flush empty utime",
        "write flush empty grow utime",
        "write flush utime",
        "write flush utime empty",
        "write flush utime write utime empty write",
        "write empty flush",
        "write empty utime flush",
    ],
)
async def test_the_mtime_survives_a_kill(world, steps):
    """However it came about, the file has the time that users last saw: also when the kill is repeated."""
    async with world.started(tasks="flush" in steps) as engine:
        file = world.open("a")
        for number, step in enumerate(steps.split()):
            if step == "write":
                await world.write(file, number, b"x" * (2 * BLOCK))
            elif step == "flush":
                await engine.flush()
            elif step == "utime":
                async with engine.attributes.changing(file):
                    os.utime(world.path("a"), ns=(0, 1_000 + number))
                    await engine.attributes.set_mtime(file, 1_000 + number)
            else:
                size = {"shrink": file.size - 10, "grow": file.size + 10, "empty": 0, "same": file.size}[step]
                await engine.attributes.truncate(file, size)
        # Class disk promises times at an fsync, as it does data.
        await engine.fsync(file)
        mtime, size = file.mtime_ns, file.size
    for _ in range(2):
        async with world.started():
            assert (world.open("a").mtime_ns, world.open("a").size) == (mtime, size)
    async with world.started(tasks=True) as engine:
        await engine.flush()
    status = world.path("a").stat()
    assert (status.st_mtime_ns, status.st_size) == (mtime, size)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "write", "write_tail", "sync", "set_mtime", "stat"])
async def test_a_failing_writeback_keeps_the_data_and_heals(tmp_path, call, number, autojump_clock, expect_logs):
    expect_logs("writeback failed")
    expect_logs("upkeep")
    world = World(tmp_path)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"x" * (2 * BLOCK) + b"y")
        world.backing.faults.fail[call] = number
        await trio.sleep(20)
        status = engine.status()
        assert status["slots"]["dirty"] == 3
        assert status["writeback"]["errors"] >= 2
        assert os.strerror(number) in status["writeback"]["last_error"]
        (failing,) = status["writeback"]["failing"]
        assert (failing["path"], failing["errno"]) == ("a", errno.errorcode[number])
        assert (failing["dirty_bytes"], failing["tries"]) == (3 * BLOCK, status["writeback"]["errors"])
        await engine.fsync(file)  # it is durable, though not in the backing
        assert file.errors.reader().take() == number
        with pytest.raises(OSError, match=os.strerror(number)):
            await engine.flush()
        assert await world.read(file, 0, 10**6) == b"x" * (2 * BLOCK) + b"y"
        world.backing.faults.fail.clear()
        await engine.flush()
        assert engine.status()["slots"]["dirty"] == 0
        assert engine.status()["writeback"]["failing"] == []
        assert engine.status()["writeback"]["last_error"] is None
    assert world.path("a").read_bytes() == b"x" * (2 * BLOCK) + b"y"


async def test_open_files_are_told_of_a_failure_once_and_of_newer_data_that_fails(
    tmp_path, autojump_clock, expect_logs
):
    expect_logs("writeback failed")
    world = World(tmp_path)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        first, second = file.errors.reader(), file.errors.reader()
        world.backing.faults.fail["write"] = errno.EIO
        await world.write(file, 0, b"x" * BLOCK)
        await trio.sleep(20)
        assert [first.take(), second.take()] == [errno.EIO] * 2
        assert file.errors.reader().take() == 0
        tries = file.failures
        await trio.sleep(300)
        assert file.failures > tries + 2
        assert [first.take(), second.take()] == [0, 0]  # the same data, tried again
        await world.write(file, BLOCK, b"y" * BLOCK)
        await trio.sleep(100)
        assert [first.take(), first.take()] == [errno.EIO, 0]
        world.backing.faults.fail["write"] = errno.ENOSPC
        await trio.sleep(100)
        assert first.take() == errno.ENOSPC
        world.backing.faults.fail.clear()
        await engine.flush()
        assert file.errors.reader().take() == 0
        assert second.take() == errno.ENOSPC  # it was open when that happened, and has not asked since
    assert world.path("a").read_bytes() == b"x" * BLOCK + b"y" * BLOCK


async def test_a_failed_sync_of_the_inode_is_told_to_all_open_files(tmp_path):
    world = World(tmp_path)
    async with world.started() as engine:
        file = world.open("a")
        other = file.errors.reader()
        engine.attributes.changed(file)
        world.backing.faults.fail_at["sync"] = (1, errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            await engine.sync_inode(file)
        assert [other.take(), other.take()] == [errno.EIO, 0]
        await engine.sync_inode(file)
        assert world.backing.faults.calls["sync"] == 2


async def test_a_sync_that_fails_once_makes_everything_be_written_again(tmp_path, autojump_clock, expect_logs):
    expect_logs("writeback failed")
    world = World(tmp_path)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"x" * (2 * BLOCK))
        world.backing.faults.fail_at["sync"] = (1, errno.EIO)
        await engine.flush()
        writes = [detail for name, detail in world.backing.faults.log if name == "write"]
        assert writes == [(0, 2)] * 2


async def test_an_error_that_a_user_sync_consumed_voids_the_pass(tmp_path, autojump_clock, expect_logs):
    expect_logs("writeback failed")
    world = World(tmp_path)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"x" * BLOCK)
        hold = world.backing.faults.hang["set_mtime"] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.flush)
            await trio.testing.wait_all_tasks_blocked()
            engine.attributes.changed(file)
            world.backing.faults.fail_at["sync"] = (1, errno.EIO)
            with pytest.raises(OSError, match="Input/output"):
                await engine.fsync(file)
            del world.backing.faults.hang["set_mtime"]
            hold.set()
        assert world.backing.faults.calls["write"] == 2


async def test_a_block_written_during_its_writeback_stays_dirty(world):
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        hold = world.backing.faults.hang["write"] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.flush)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await world.write(file, 0, b"2" * BLOCK)
            del world.backing.faults.hang["write"]
            hold.set()
        assert engine.status()["slots"]["dirty"] == 1
        assert world.path("a").read_bytes() == b"1" * BLOCK
        await engine.flush()
    assert world.path("a").read_bytes() == b"2" * BLOCK


async def test_a_write_during_a_fetch_is_not_overwritten_by_it(world):
    world.path("a").write_bytes(b"o" * BLOCK)
    async with world.started() as engine:
        file = world.open("a")
        hold = world.backing.faults.hang["read"] = trio.Event()
        result = []

        async def reader():
            result.append(await world.read(file, 0, BLOCK))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await world.write(file, 0, b"n" * BLOCK)
            hold.set()
        assert await world.read(file, 0, BLOCK) == b"n" * BLOCK
        assert result[0] in (b"o" * BLOCK, b"n" * BLOCK)
        assert engine.status()["slots"]["dirty"] == 1


async def test_a_full_cache_over_a_dead_backing_fails_writes_in_bounded_time(tmp_path, autojump_clock, expect_logs):
    expect_logs("writeback failed")
    world = World(tmp_path, options=EngineOptions(full_timeout_s=10))
    async with world.started(tasks=True):
        world.backing.faults.fail["write"] = errno.EIO
        file = world.open("a")
        began = trio.current_time()
        with pytest.raises(OSError, match="cache full") as caught:
            await _fill(world, file)
        assert caught.value.errno == errno.EIO
        assert trio.current_time() - began < 15
        assert await world.read(file, 0, BLOCK) == b"x" * BLOCK
        world.backing.faults.fail.clear()
        await trio.sleep(60)
        await world.write(file, 0, b"y" * BLOCK)


async def test_a_full_cache_over_a_hanging_backing_fails_writes_in_bounded_time(tmp_path, autojump_clock):
    world = World(tmp_path, options=EngineOptions(full_timeout_s=10))
    async with world.started(tasks=True):
        world.backing.faults.hang["write"] = trio.Event()
        file = world.open("a")
        with pytest.raises(OSError, match="cache full") as caught:
            await _fill(world, file)
        assert caught.value.errno == errno.EIO
        assert await world.read(file, 0, BLOCK) == b"x" * BLOCK


async def test_damaged_dirty_data_reads_as_eio_and_is_reported(world, expect_logs):
    expect_logs("damaged")
    async with world.started():
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await world.write(file, 0, b"2" * BLOCK + b"3" * BLOCK)
        await world.engine.fsync(file)
        slot = file.table.get(0)
        world.pool.view(slot)[100] ^= 1
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        with pytest.raises(OSError, match="the block is lost"):
            await world.read(file, 0, BLOCK)
        assert await world.read(file, BLOCK, BLOCK) == b"3" * BLOCK
        assert engine.status()["lost_blocks"] == [{"path": "a", "from": 0, "to": BLOCK}]
        assert engine.status()["slots"]["quarantined"] == 1
        await engine.flush()
        await world.write(file, 0, b"4" * BLOCK)
        assert await world.read(file, 0, BLOCK) == b"4" * BLOCK
        await engine.flush()
    assert world.path("a").read_bytes() == b"4" * BLOCK + b"3" * BLOCK


async def test_damaged_dirty_data_is_not_written_back(world, expect_logs):
    expect_logs("damaged")
    async with world.started():
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await world.engine.fsync(file)
        world.pool.view(file.table.get(0))[0] ^= 1
    async with world.started(tasks=True) as engine:
        await engine.flush()
        assert engine.status()["lost_blocks"]
    assert b"\x30" not in world.path("a").read_bytes()


async def test_damaged_clean_data_is_read_again(world, expect_logs):
    expect_logs("failed its checksum")
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await engine.flush()
        world.pool.view(file.table.get(0))[0] ^= 1
    async with world.started() as engine:
        assert await world.read(world.open("a"), 0, BLOCK) == b"1" * BLOCK
        assert engine.status()["lost_blocks"] == []


async def test_unlinked_files_are_reaped_and_do_not_come_back(world):
    async with world.started():
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await world.unlink("a")
        await world.write(file, BLOCK, b"2" * BLOCK)
        assert await world.read(file, 0, 10**6) == b"1" * BLOCK + b"2" * BLOCK
    async with world.started() as engine:
        assert engine.status()["slots"]["dirty"] == 0
        assert list(world.root.iterdir()) == []


async def test_slots_of_an_unlinked_file_come_back_after_a_sync_of_the_backing(world):
    async with world.started() as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await world.unlink("a")
        engine.release(file)
        assert engine.status()["slots"]["dirty"] == 1
        await engine.flush()
        assert engine.status()["slots"]["dirty"] == 0
        assert world.backing.faults.calls["sync_all"] >= 1
        assert world.backing.faults.calls["write"] == 0


async def test_a_file_whose_creation_the_backing_lost_is_created_again(world, expect_logs):
    expect_logs("created again")
    async with world.started():
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK + b"2")
        await world.engine.fsync(file)
    world.path("a").unlink()
    async with world.started(tasks=True, epoch=b"another boot") as engine:
        assert await world.read(world.open("a", create=False), 0, 10**6) == b"1" * BLOCK + b"2"
        await engine.flush()
    assert world.path("a").read_bytes() == b"1" * BLOCK + b"2"


async def test_a_lost_unlink_gives_the_file_back_with_its_data(world):
    async with world.started() as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await engine.unlinking(file)  # and the power goes before the backing's unlink is durable
    async with world.started():
        file = world.open("a", create=False)
        assert await world.read(file, 0, BLOCK) == b"1" * BLOCK
        assert not file.unlinked


async def test_dirty_blocks_of_unknown_files_are_set_aside(world, expect_logs):
    expect_logs("does not know")
    async with world.started():
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await world.engine.fsync(file)
        from cachefsd.media.ports import Changes

        world.catalog.transact(Changes(delete=[file.file_id]))
    for _ in range(2):
        async with world.started(shutdown=True) as engine:
            assert engine.status()["slots"]["quarantined"] == 1
            assert engine.status()["slots"]["free"] == 7


async def test_one_sync_of_the_backing_serves_the_names_of_all_recovered_files(tmp_path, autojump_clock):
    world = World(tmp_path, slots=20, options=EngineOptions(writeback_jobs=1))
    async with world.started():
        for number in range(5):
            await world.write(world.open(f"file {number}"), 0, b"x" * BLOCK)
    async with world.started(tasks=True) as engine:
        await engine.flush()
        assert engine.dirty_bytes == 0
        assert world.backing.faults.calls["sync_all"] == 2  # and the one that a flush ends with


async def test_records_of_files_without_slots_are_deleted(world):
    async with world.started(tasks=True, shutdown=True) as engine:
        for number in range(3):
            file = world.open(f"f{number}")
            await world.write(file, 0, b"1" * BLOCK)
            await engine.flush()
            await engine.attributes.truncate(file, 0)
            engine.release(file)
        await engine.flush()  # class disk: a truncate owes the backing a sync
    assert {r.file_id for r in await _records(world)} == set()


async def _fill(world, file):
    for block in range(20):
        await world.write(file, block * BLOCK, b"x" * BLOCK)


async def _records(world):
    async with world.started():
        return list(world.catalog.files())


async def test_young_dirty_data_stays_and_old_is_written(tmp_path, autojump_clock):
    world = World(tmp_path, options=EngineOptions(dirty_age_s=5))
    async with world.started(tasks=True) as engine:
        await world.write(world.open("a"), 0, b"1" * BLOCK)
        await trio.sleep(4)
        assert engine.status()["slots"]["dirty"] == 1
        assert engine.status()["oldest_dirty_s"] == pytest.approx(4, abs=0.1)
        await trio.sleep(2)
        assert engine.status()["slots"]["dirty"] == 0
        assert engine.status()["oldest_dirty_s"] == 0


def keep_busy(engine):
    """From now on requests come all the time."""
    requests = itertools.count()
    engine.writeback.requests = lambda: next(requests)


class Slowly:
    """Each pass takes a second; how many there have been together at most."""

    def __init__(self, engine, patch):
        self.together = 0
        patch.setattr(groups, "GROUP_FILES_MIN", 1000)  # files one by one

        async def slowly(backing, mtime_ns):
            self.together = max(self.together, len(engine.writeback._active))
            await trio.sleep(1)

        patch.setattr(PlainFile, "set_mtime", slowly)


@pytest.mark.parametrize("busy", [False, True])
async def test_what_is_only_old_gives_way_to_requests(tmp_path, autojump_clock, monkeypatch, busy):
    """One file at a time, then a pause; a flush does not wait for those."""
    world = World(tmp_path, slots=100, options=EngineOptions(dirty_age_s=5))
    async with world.started(tasks=True) as engine:
        slowly = Slowly(engine, monkeypatch)
        if busy:
            keep_busy(engine)
        for number in range(20):
            await world.write(world.open(f"f{number}"), 0, b"x" * BLOCK)
        await trio.sleep(5 + 10)
        assert slowly.together == (1 if busy else 8)
        written = 20 - engine.dirty_bytes // BLOCK
        # A pass of a second leaves time for 10 of them, and the pauses take one.
        assert written == (9 if busy else 20)
        await engine.flush()
        assert engine.dirty_bytes == 0
        assert slowly.together == 8


async def test_above_the_high_watermark_it_gives_way_until_it_is_crowded(tmp_path, autojump_clock, monkeypatch):
    world = World(tmp_path, slots=100, options=EngineOptions(dirty_age_s=1000))
    async with world.started(tasks=True) as engine:
        slowly = Slowly(engine, monkeypatch)
        keep_busy(engine)
        for number in range(60):
            await world.write(world.open(f"f{number}"), 0, b"x" * BLOCK)
        await trio.sleep(10)
        assert slowly.together == 1
        assert 49 <= engine.dirty_bytes // BLOCK <= 52
        for number in range(60, 85):
            await world.write(world.open(f"f{number}"), 0, b"x" * BLOCK)
        await trio.sleep(2)
        assert slowly.together == 8
        assert engine.dirty_bytes // BLOCK < 75


async def test_who_waits_for_a_slot_does_not_wait_for_pauses(tmp_path, autojump_clock, monkeypatch):
    world = World(tmp_path, slots=100, options=EngineOptions(dirty_age_s=1000))
    async with world.started(tasks=True) as engine:
        monkeypatch.setattr(engine.writeback, "_crowded_mark", 1000)
        slowly = Slowly(engine, monkeypatch)
        keep_busy(engine)
        for number in range(100):
            await world.write(world.open(f"f{number}"), 0, b"x" * BLOCK)
        assert slowly.together <= 1
        for number in range(100, 110):
            await world.write(world.open(f"f{number}"), 0, b"x" * BLOCK)
        assert slowly.together == 8


async def test_a_file_that_hangs_does_not_hold_up_the_others_while_users_are_busy(tmp_path, autojump_clock):
    world = World(tmp_path, options=EngineOptions(dirty_age_s=5))
    async with world.started(tasks=True) as engine:
        keep_busy(engine)
        world.backing.faults.hang["sync"] = trio.Event()
        await world.write(world.open("bad"), 0, b"b" * BLOCK)
        await trio.sleep(7)
        world.backing.faults.hang.clear()
        await world.write(world.open("file"), 0, b"a" * BLOCK)
        await trio.sleep(13)
        assert engine.status()["slots"]["dirty"] == 1
        assert world.path("file").read_bytes() == b"a" * BLOCK


async def test_an_unlinked_file_that_is_open_does_not_hold_up_the_others(tmp_path, autojump_clock):
    world = World(tmp_path, options=EngineOptions(dirty_age_s=5))
    async with world.started(tasks=True):
        file = world.open("file")  # before the other goes: its inode number must not be used again
        await world.write(world.open("temporary"), 0, b"t" * BLOCK)
        await world.unlink("temporary")
        await trio.sleep(100)
        await world.write(file, 0, b"a" * BLOCK)
        await trio.sleep(6)
        assert world.path("file").read_bytes() == b"a" * BLOCK


@pytest.mark.parametrize("call", ["write", "sync"])
async def test_a_file_that_fails_or_hangs_does_not_hold_up_the_others(tmp_path, autojump_clock, call, expect_logs):
    world = World(tmp_path, options=EngineOptions(dirty_age_s=5, retry_min_s=1000, retry_max_s=1000))
    async with world.started(tasks=True):
        if call == "write":
            world.backing.faults.fail_at["write"] = (1, errno.EIO)
            expect_logs("writeback failed", count=1)
        else:
            world.backing.faults.hang["sync"] = trio.Event()
        await world.write(world.open("bad"), 0, b"b" * BLOCK)
        await trio.sleep(100)
        world.backing.faults.hang.clear()
        await world.write(world.open("file"), 0, b"a" * BLOCK)
        await trio.sleep(6)
        assert world.engine.status()["slots"]["dirty"] == 1
        assert world.path("file").read_bytes() == b"a" * BLOCK


async def test_the_high_watermark_starts_writeback_and_the_low_one_stops_it(tmp_path, autojump_clock):
    world = World(tmp_path, slots=100, options=EngineOptions(dirty_age_s=1000))
    async with world.started(tasks=True) as engine:
        for number in range(49):
            await world.write(world.open(f"f{number}"), 0, b"1" * BLOCK)
        await trio.sleep(1)
        assert engine.status()["slots"]["dirty"] == 49
        for number in range(49, 60):
            await world.write(world.open(f"f{number}"), 0, b"1" * BLOCK)
        await trio.sleep(1)
        assert 40 <= engine.status()["slots"]["dirty"] <= 45


async def test_writeback_goes_in_block_order_and_in_runs(world):
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        for block in (5, 2, 4, 3, 0):
            await world.write(file, block * BLOCK, bytes([block + 1]) * BLOCK)
        await engine.flush()
        writes = [detail for name, detail in world.backing.faults.log if name == "write"]
        assert writes == [(0, 1), (2 * BLOCK, 4)]
        assert engine.status()["writeback"]["runs"] == 2


@pytest.mark.parametrize("failing", range(1, 6))
async def test_a_run_that_fails_leaves_all_dirty_and_the_others_written(world, autojump_clock, failing, expect_logs):
    expect_logs("writeback failed", count=1)
    world.options = EngineOptions(retry_min_s=1000, retry_max_s=1000)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        for block in (0, 2, 4, 6):
            await world.write(file, block * BLOCK, bytes([block + 1]) * BLOCK)
        await world.write(file, 8 * BLOCK, b"tail")
        call, number = ("write", failing) if failing < 5 else ("write_tail", 1)
        world.backing.faults.fail_at[call] = (number, errno.EIO)
        await trio.sleep(100)
        assert engine.status()["slots"]["dirty"] == 5
        present = world.path("a").read_bytes()
        for number, block in enumerate((0, 2, 4, 6), start=1):
            written = present[block * BLOCK : (block + 1) * BLOCK]
            assert (written == bytes([block + 1]) * BLOCK) == (number != failing)
        assert not any(engine.cache.slots.pins)
        await engine.flush()
        assert engine.status()["slots"]["dirty"] == 0
        assert not any(engine.cache.slots.pins)
    assert world.path("a").read_bytes()[6 * BLOCK :] == b"\7" * BLOCK + bytes(BLOCK) + b"tail"


@pytest.mark.parametrize("seconds_per_run", [0.007, 0.0001])
async def test_a_slow_disk_gets_few_runs_at_a_time_and_a_fast_one_many(
    tmp_path, autojump_clock, monkeypatch, seconds_per_run
):
    world = World(tmp_path, slots=600)
    sizes, flying, most = [], 0, 0
    disk, plain = trio.Lock(), PlainFile.write_runs

    async def timed(file, memory, runs):
        nonlocal flying, most
        sizes.append(len(runs))
        flying += len(runs)
        most = max(most, flying)
        async with disk:
            await trio.sleep(seconds_per_run * len(runs))
        await plain(file, memory, runs)
        flying -= len(runs)

    monkeypatch.setattr(PlainFile, "write_runs", timed)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        for block in range(0, 1000, 2):
            await world.write(file, block * BLOCK, block.to_bytes(4) * (BLOCK // 4))
        await engine.flush()
        content = world.path("a").read_bytes()
        assert all(content[at * BLOCK : at * BLOCK + 4] == at.to_bytes(4) for at in range(0, 1000, 2))
        assert sum(sizes) == 500
        if seconds_per_run == 0.007:  # 150 a second
            assert (max(sizes), most) == (4, 8)
        else:
            assert (max(sizes), most) == (32, 64)


@pytest.mark.parametrize(("seconds_per_pass", "sizes"), [(0.2, [256] * 15), (0.01, [256, 512, 1024, 1024, 1024])])
async def test_a_pass_of_a_slow_disk_is_short_and_one_of_a_fast_disk_grows(
    tmp_path, autojump_clock, monkeypatch, seconds_per_pass, sizes
):
    monkeypatch.setattr(passes, "PASS_BLOCKS_MIN", 256)
    monkeypatch.setattr(passes, "PASS_BLOCKS_MAX", 1024)
    monkeypatch.setattr(passes, "PASS_SHARE", 1)
    world = World(tmp_path, slots=4000)
    written, plain_write, plain_sync = [0], PlainFile.write_runs, PlainFile.sync

    async def write_runs(file, memory, runs):
        written[-1] += sum(len(run.places) for run in runs)
        await plain_write(file, memory, runs)

    async def sync(file):
        await trio.sleep(seconds_per_pass)
        written.append(0)
        await plain_sync(file)

    monkeypatch.setattr(PlainFile, "write_runs", write_runs)
    monkeypatch.setattr(PlainFile, "sync", sync)
    async with world.started(tasks=True) as engine:
        await world.write(world.open("a"), 0, bytes(3840 * BLOCK))
        await engine.flush()
        assert engine.status()["slots"]["dirty"] == 0
    assert [size for size in written if size] == sizes


async def test_no_step_of_a_pass_holds_the_loop_for_many_blocks(tmp_path, monkeypatch):
    world = World(tmp_path, slots=3000)
    blocks = 0
    most: dict[str, int] = {}

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task):
            nonlocal blocks
            blocks = 0

    def counted(owner, name, number=lambda *_: 1):
        plain = getattr(owner, name)

        def call(*args):
            nonlocal blocks
            blocks += number(*args)
            most[name] = max(most.get(name, 0), blocks)
            return plain(*args)

        monkeypatch.setattr(owner, name, call)

    async with world.started(tasks=True) as engine:
        await world.write(world.open("a"), 0, bytes(3000 * BLOCK))
        counted(world.pool, "set_states", lambda slots, _: len(slots))
        counted(steps_of_passes, "xxh3_64_intdigest")
        trio.lowlevel.add_instrument(steps := Steps())
        try:
            await engine.flush()
        finally:
            trio.lowlevel.remove_instrument(steps)
        assert engine.status()["slots"]["dirty"] == 0
    assert most == {"set_states": 512, "xxh3_64_intdigest": 128}


@pytest.mark.parametrize("durability", CLASSES, ids=lambda d: d.value)
async def test_blocks_written_while_others_become_clean_stay_dirty(tmp_path, monkeypatch, durability):
    world = World(tmp_path, slots=1000, durability=durability)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * (300 * BLOCK))
        plain, calls = world.pool.set_states, 0

        def watched(slots, state):
            nonlocal calls
            if state == SlotState.CLEAN:
                calls += 1
                if calls == 1:
                    nursery.start_soon(world.write, file, 100 * BLOCK, b"2" * (150 * BLOCK))
            plain(slots, state)

        async with trio.open_nursery() as nursery:
            monkeypatch.setattr(world.pool, "set_states", watched)
            await engine.write_out(file)
        monkeypatch.undo()
        assert file.dirty == 150
        assert file in engine.cache.dirty
        assert world.path("a").read_bytes() == b"1" * (300 * BLOCK)
        await engine.flush()
        assert file.dirty == 0
    assert world.path("a").read_bytes() == b"1" * (100 * BLOCK) + b"2" * (150 * BLOCK) + b"1" * (50 * BLOCK)


def everything_of(engine, file):
    slots = engine.cache.slots
    return {
        "arrays": [bytes(each) for each in (slots.state, slots.verified, slots.guarded, slots.pins)],
        "owners": (slots.owner.tolist(), slots.block.tolist()),
        "waiting": (slots.free.tolist(), slots.retired, slots.superseded),
        "counts": (slots.counts, file.dirty, file.table.cached, engine.cache.blocks.next_seq, slots.evictions),
        "table": [
            (int(b), int(s)) for blocks, places in file.table.walk() for b, s in zip(blocks, places, strict=True)
        ],
        "policy": slots.policy.dump(0),
    }


@pytest.mark.parametrize("durability", CLASSES, ids=lambda d: d.value)
async def test_many_blocks_at_once_leave_what_one_by_one_leaves(tmp_path, monkeypatch, rng, durability):
    monkeypatch.setattr(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    left = []
    seed = rng.random()
    for many in (1, 10**9):
        monkeypatch.setattr(Slots, "vector_min_blocks", many)
        rng.seed(seed)
        trio_run._r.seed(seed)
        (tmp_path / f"{many}").mkdir()
        world = World(tmp_path / f"{many}", slots=600, durability=durability)
        content, limit = bytearray(), 500 * BLOCK
        seen = []
        async with world.started() as engine:
            file = world.open("a")
            for _ in range(60):
                offset, size = rng.randrange(limit - BLOCK), rng.choice((1, BLOCK, 9 * BLOCK, 250 * BLOCK))
                if rng.random() < 0.5:
                    offset -= offset % BLOCK
                size = min(size, limit - offset)
                match rng.choice(("write", "write", "read", "flush", "truncate", "others")):
                    case "write":
                        data = rng.randbytes(size)
                        await world.write(file, offset, data)
                        content.extend(bytes(max(0, offset - len(content))))
                        content[offset : offset + size] = data
                    case "read":
                        assert await world.read(file, offset, size) == content[offset : offset + size]
                    case "flush":
                        await engine.write_out(file)
                    case "truncate":
                        await engine.attributes.truncate(file, len(content) * 3 // 4)
                        del content[len(content) * 3 // 4 :]
                    case "others":  # evicts
                        other = world.open("b")
                        await world.write(other, 0, rng.randbytes(90 * BLOCK))
                        await engine.write_out(other)
                assert await world.read(file, 0, limit) == content
                seen.append(everything_of(engine, file))
        async with world.started():
            assert await world.read(world.open("a"), 0, limit) == content
        left.append(seen)
    for one, other in zip(*left, strict=True):
        assert one == other


@pytest.mark.parametrize("offset", [2**40, 2**50 + 5])
async def test_far_offsets(world, offset):
    async with world.started():
        file = world.open("a")
        await world.write(file, offset, b"far")
        assert file.size == offset + 3
        assert await world.read(file, offset - 10, 100) == bytes(10) + b"far"
    async with world.started():
        file = world.open("a")
        assert file.size == offset + 3
        assert await world.read(file, offset, 3) == b"far"


async def test_catalog_failure_stops_acknowledging(world, monkeypatch, expect_logs):
    expect_logs("the cache has failed")
    from cachefsd.media.ports import CatalogError

    async with world.started() as engine:
        first = world.open("a")
        await world.write(first, 0, b"1" * BLOCK)

        def broken(changes):
            raise CatalogError("no")

        monkeypatch.setattr(world.catalog, "transact", broken)
        with pytest.raises(OSError, match="no"):
            await world.write(world.open("b"), 0, b"2" * BLOCK)
        with pytest.raises(OSError, match="failed"):
            await world.write(first, 0, b"3" * BLOCK)
        assert await world.read(first, 0, BLOCK) == b"1" * BLOCK
        assert engine.status()["failed"] == "no"


async def test_class_disk_a_failing_sync_stops_acknowledging(tmp_path, monkeypatch, expect_logs):
    expect_logs("the cache has failed")
    world = World(tmp_path, durability=Durability.DISK)
    async with world.started() as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)

        def broken():
            raise OSError(errno.EIO, "disk gone")

        monkeypatch.setattr(world.pool, "sync", broken)
        with pytest.raises(OSError, match="disk gone"):
            await engine.fsync(file)
        with pytest.raises(OSError, match="failed"):
            await engine.fsync(file)


async def test_no_slots_are_none(world):
    async with world.started() as engine:
        free = engine.cache.slots.reusable
        await world.write(world.open("a"), 0, b"1" * BLOCK)
        assert engine.cache.slots.take(0) == array("i")
        assert len(engine.cache.slots.take(free - 1)) == free - 1


async def test_class_disk_torn_uncommitted_versions_fall_back_to_the_committed_one(tmp_path):
    world = World(tmp_path, durability=Durability.DISK)
    async with world.started() as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await engine.fsync(file)
        await world.write(file, 0, b"2" * BLOCK)
        world.pool.view(file.table.get(0))[2000:] = bytes(BLOCK - 2000)  # half of it did not reach the disk
    async with world.started() as engine:
        assert await world.read(world.open("a"), 0, BLOCK) == b"1" * BLOCK
        assert engine.status()["lost_blocks"] == []


async def test_what_the_backing_could_never_hold_is_refused(world):
    async with world.started():
        file = world.open("a")
        with pytest.raises(OSError, match="larger than the backing") as caught:
            await world.write(file, 1 << 60, b"12")
        assert caught.value.errno == errno.EFBIG
        assert file.size == 0
        await world.write(file, (1 << 60) - 2, b"12")
        assert file.size == 1 << 60


@pytest.mark.parametrize("how", ["time", "same size"])
async def test_nothing_is_published_between_the_intent_of_a_truncate_and_its_end(tmp_path, how):
    world = World(tmp_path)
    async with world.started() as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * 2 * BLOCK)
        backing, held, reached = file.backing, trio.Event(), trio.Event()

        class Held:
            def __getattr__(self, name):
                return getattr(backing, name)

            async def truncate(self, size):
                reached.set()
                await held.wait()
                return await backing.truncate(size)

        file.backing = Held()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.attributes.truncate, file, 0)
            await reached.wait()
            seq = engine.cache.blocks.next_seq
            if how == "time":
                nursery.start_soon(engine.attributes.set_mtime_of_dirty, file, 5)
            else:
                nursery.start_soon(engine.attributes.truncate, file, 2 * BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            assert engine.cache.blocks.next_seq == seq
            with pytest.raises(AssertionError):
                engine.cache.blocks.commit(file, 0, [bytes(BLOCK)], array("i", [7]), BLOCK, 1)
            held.set()
        assert await world.read(file, 0, 10**6) == (b"" if how == "time" else bytes(2 * BLOCK))
    async with world.started():
        file = world.open("a")
        assert await world.read(file, 0, 10**6) == (b"" if how == "time" else bytes(2 * BLOCK))


@pytest.mark.parametrize(("before", "size"), [(1, 2), (BLOCK, 2 * BLOCK), (100, BLOCK), (BLOCK + 7, 9 * BLOCK)])
async def test_a_write_across_the_largest_offset_writes_what_fits(world, before, size):
    async with world.started() as engine:
        file = world.open("a")
        await file.backing.open(write=True)
        end = file.backing.max_size
        data = bytes(range(1, 256)) * (size // 255 + 1)
        assert not engine.writer.write(file, end - before, data[:size])
        assert await engine.writer.write_slow(file, end - before, data[:size]) == before
        assert file.size == end
        assert await world.read(file, end - before, size) == data[:before]
        with pytest.raises(OSError, match="larger than the backing") as caught:
            await engine.writer.write_slow(file, end, data[:size])
        assert caught.value.errno == errno.EFBIG


async def test_a_truncate_that_is_still_to_be_confirmed_hides_no_change_behind_the_mount(world, expect_logs):
    """An orderly end has stamped the file as the truncate has left it."""
    expect_logs("changed behind the mount")
    world.path("a").write_bytes(b"1" * 3 * BLOCK)
    async with world.started(shutdown=True) as engine:
        file = world.open("a")
        await engine.attributes.truncate(file, BLOCK + 10)
        await world.write(file, 0, b"2")
    with world.path("a").open("r+b") as backing:
        backing.write(b"EDIT")
    async with world.started(tasks=True) as engine:
        await engine.flush()
    (copy,) = world.root.glob("a.cachefsd-conflict-*")
    assert copy.read_bytes() == b"2" + b"1" * (BLOCK + 9)
    assert world.path("a").read_bytes() == b"EDIT" + b"1" * (BLOCK + 6)


async def test_a_hole_of_the_cached_version_stays_a_hole_in_its_copy(world, expect_logs):
    expect_logs("changed behind the mount")
    world.path("a").write_bytes(b"1" * BLOCK)
    async with world.started(shutdown=True):
        await world.write(world.open("a"), 3 * BLOCK, b"2")
    with world.path("a").open("ab") as backing:
        backing.write(b"appended")
    async with world.started(tasks=True) as engine:
        await engine.flush()
    (copy,) = world.root.glob("a.cachefsd-conflict-*")
    assert copy.read_bytes() == b"1" * BLOCK + bytes(2 * BLOCK) + b"2"
    assert world.path("a").read_bytes() == b"1" * BLOCK + b"appended"
