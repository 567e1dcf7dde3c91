"""Bad media: data of the pool that can't be read, and slots that can't be written.

A load or store there would end the process. So nothing may be loaded that has not been read since the start, and
nothing stored where no system call has written. Here a load succeeds: what is served of an unreadable slot was loaded.
"""

from __future__ import annotations

import errno

import pytest
import trio
from support_engine import BLOCK, World

from cachefsd.core.files import CachedFile
from cachefsd.core.options import EngineOptions
from cachefsd.media.ports import Durability
from cachefsd.service.caches import contents

pytestmark = pytest.mark.usefixtures("_expected")


@pytest.fixture(params=list(Durability), ids=lambda durability: durability.value)
def world(request, tmp_path) -> World:
    return World(tmp_path, slots=12, durability=request.param)


@pytest.fixture
def _expected(expect_logs) -> None:
    expect_logs("can't be read|data in the cache is damaged|failed its checksum|is on bad media|are on bad media")


async def filled(world: World, *, clean: bool) -> dict[int, int]:
    """A file of three blocks; which slots they are in."""
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK + b"2" * BLOCK + b"3" * BLOCK)
        await engine.fsync(file)
        if clean:
            await engine.flush()
        return {block: file.table.get(block) for block in range(3)}


async def test_a_lost_block_is_not_delivered(world):
    slots = await filled(world, clean=False)
    world.unreadable = {slots[1]}
    async with world.started(tasks=True) as engine:
        with pytest.raises(OSError, match="lost"):
            await world.read(world.open("a"), BLOCK, 50)
        await engine.flush()
        assert not await engine.is_delivered()
        assert contents(world.pool).dirty == 1


async def overwrite_all(world: World, file: CachedFile, text: bytes) -> None:
    """So often that every slot that may be used has been."""
    for _ in range(8):
        await world.write(file, 0, text * 3 * BLOCK)
        await world.engine.fsync(file)
        await world.engine.flush()


@pytest.mark.parametrize("look", ["read", "read of many", "scrub", "writeback", "part of it written", "time", "cut"])
async def test_an_unreadable_dirty_block_is_lost_and_all_else_is_served(world, look):
    slots = await filled(world, clean=False)
    world.unreadable = {slots[1]}
    async with world.started(tasks=look in ("scrub", "writeback")) as engine:
        file = world.open("a")
        if look == "scrub":
            with trio.fail_after(10):
                while not engine.status()["lost_ranges"]:
                    await trio.sleep(0.01)
        elif look == "writeback":
            await engine.flush()
            assert world.path("a").read_bytes() == b"1" * BLOCK + bytes(BLOCK) + b"3" * BLOCK
        elif look == "part of it written":
            with pytest.raises(OSError, match="lost"):
                await world.write(file, BLOCK + 10, b"x" * 10)
        elif look == "time":
            await engine.write_out(file)
        elif look == "cut":
            await engine.attributes.truncate(file, BLOCK + 100)
            await engine.attributes.truncate(file, 3 * BLOCK)
            await world.write(file, 2 * BLOCK, b"3" * BLOCK)
        elif look == "read of many":
            engine.cache.slots.vector_min_blocks = 2
            with pytest.raises(OSError, match="lost"):
                await world.read(file, 0, 3 * BLOCK)
        with pytest.raises(OSError, match="lost") as caught:
            await world.read(file, BLOCK, 50)
        assert caught.value.errno == errno.EIO
        assert await world.read(file, 0, BLOCK) == b"1" * BLOCK
        assert await world.read(file, 2 * BLOCK, BLOCK) == b"3" * BLOCK
        [loss] = engine.status()["lost_blocks"]
        assert loss["path"] == "a"
        assert loss["from"] == BLOCK


async def test_the_slot_of_a_lost_block_is_not_used_again_nor_after_a_restart(world):
    slots = await filled(world, clean=False)
    world.unreadable = {slots[1]}
    for lost_before in (1, 0):
        async with world.started(tasks=True) as engine:
            file = world.open("a")
            if lost_before:
                with pytest.raises(OSError, match="lost"):
                    await world.read(file, BLOCK, BLOCK)
            await overwrite_all(world, file, b"4")
            assert await world.read(file, 0, 3 * BLOCK) == b"4" * 3 * BLOCK
            await engine.cache.blocks.persist_frees()
            status = engine.status()
            assert status["slots"]["quarantined"] == 1
            assert engine.cache.slots.quarantined() == [slots[1]]
            assert (status["lost_blocks"], status["lost_unknown"]) == ([], 0)
    assert world.path("a").read_bytes() == b"4" * 3 * BLOCK


async def test_a_lost_slot_that_can_be_read_again_is_used_again(world):
    slots = await filled(world, clean=False)
    world.unreadable = {slots[1]}
    async with world.started():
        with pytest.raises(OSError, match="lost"):
            await world.read(world.open("a"), BLOCK, BLOCK)
    world.unreadable = set()
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        with pytest.raises(OSError, match="lost"):  # what is lost does not come back
            await world.read(file, BLOCK, BLOCK)
        await overwrite_all(world, file, b"4")
        assert engine.status()["slots"]["quarantined"] == 0


@pytest.mark.parametrize("look", ["read", "part of it written", "scrub"])
async def test_an_unreadable_clean_block_is_brought_from_the_backing(world, look):
    slots = await filled(world, clean=True)
    world.unreadable = {slots[1]}
    expected = b"1" * BLOCK + b"2" * BLOCK + b"3" * BLOCK
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        if look == "part of it written":
            await world.write(file, BLOCK, b"x" * 10)
            expected = expected[:BLOCK] + b"x" * 10 + expected[BLOCK + 10 :]
        elif look == "scrub":
            with trio.fail_after(10):
                while file.table.get(1) >= 0:
                    await trio.sleep(0.01)
        assert await world.read(file, 0, 3 * BLOCK) == expected
        assert engine.status()["lost_blocks"] == []
        await overwrite_all(world, file, b"5")
        await engine.cache.blocks.persist_frees()
        assert engine.cache.slots.quarantined() == [slots[1]]
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await overwrite_all(world, file, b"6")
        assert await world.read(file, 0, 3 * BLOCK) == b"6" * 3 * BLOCK
        assert engine.cache.slots.quarantined() == [slots[1]]
        status = engine.status()
        assert (status["lost_blocks"], status["lost_unknown"]) == ([], 0)


async def test_class_disk_a_version_that_no_commit_covers_is_lost_if_it_cannot_be_read(tmp_path):
    world = World(tmp_path, durability=Durability.DISK)
    async with world.started() as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await engine.fsync(file)
        await world.write(file, 0, b"2" * BLOCK)
        world.unreadable = {file.table.get(0)}
    async with world.started():
        with pytest.raises(OSError, match="lost"):  # an older version would be one that was overwritten
            await world.read(world.open("a"), 0, BLOCK)


@pytest.mark.parametrize("many", [1, 16])
async def test_class_disk_free_slots_are_written_by_a_system_call_before_the_first_store(tmp_path, monkeypatch, many):
    world = World(tmp_path, slots=12, durability=Durability.DISK)
    await filled(world, clean=True)
    async with world.started(tasks=True) as engine:
        engine.cache.slots.vector_min_blocks = many
        prepared: set[int] = set()
        stored: list[int] = []
        write, prepare = world.pool.write, world.pool.prepare

        def note_write(slot: int, data: bytes) -> None:
            places = set(range(slot, slot + len(data) // BLOCK))
            assert places <= prepared
            stored.extend(places)
            write(slot, data)

        def note_prepare(slot: int, count: int = 1) -> None:
            prepare(slot, count)
            assert prepared.isdisjoint(range(slot, slot + count))
            prepared.update(range(slot, slot + count))

        monkeypatch.setattr(world.pool, "write", note_write)
        monkeypatch.setattr(world.pool, "prepare", note_prepare)
        file = world.open("a")
        await overwrite_all(world, file, b"4")
        world.path("b").write_bytes(b"b" * 6 * BLOCK)
        other = world.open("b")
        for _ in range(3):
            assert await world.read(other, 0, 6 * BLOCK) == b"b" * 6 * BLOCK
            await world.write(other, 0, b"b" * 6 * BLOCK)
            await engine.flush()
        assert set(stored) == set(range(12))


async def test_class_disk_a_slot_that_cannot_be_written_is_set_aside(tmp_path):
    world = World(tmp_path, slots=12, durability=Durability.DISK)
    world.unwritable = {3: errno.EIO, 7: errno.EIO}
    for _ in range(2):
        async with world.started(tasks=True) as engine:
            file = world.open("a")
            await overwrite_all(world, file, b"4")
            assert engine.cache.slots.quarantined() == [3, 7]
            await engine.flush()
            assert await engine.is_delivered()  # such slots hold nothing
            assert contents(world.pool).dirty == 0
        assert world.path("a").read_bytes() == b"4" * 3 * BLOCK


async def test_class_disk_slots_without_space_are_used_when_there_is_some(tmp_path):
    world = World(
        tmp_path, slots=12, durability=Durability.DISK, options=EngineOptions(full_timeout_s=0.2, dirty_age_s=999)
    )
    world.unwritable = dict.fromkeys(range(3, 12), errno.ENOSPC)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * 3 * BLOCK)
        world.medium.unwritable.clear()
        await world.write(file, 3 * BLOCK, b"2" * 3 * BLOCK)
        assert await world.read(file, 0, 6 * BLOCK) == b"1" * 3 * BLOCK + b"2" * 3 * BLOCK
        await engine.flush()
        assert engine.cache.slots.quarantined() == []
