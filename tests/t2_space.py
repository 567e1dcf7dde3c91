"""Room in the backing: what cannot be delivered is refused, and what was acknowledged is never lost for want of it."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
import trio
from support_engine import BLOCK, World
from support_fs import loop_mounted

from cachefsd.backing.ports import BackingStat
from cachefsd.core import space
from cachefsd.core.files import Hints
from cachefsd.core.options import EngineOptions

MARGIN = 1 << 20
SLOTS = 200


class Small(World):
    """A world whose backing has little space, and fails to take more than that."""

    def limit(self, blocks: int) -> None:
        """Let there be room for so many blocks, those in use included."""
        self.backing._real.capacity = MARGIN + blocks * BLOCK


@pytest.fixture
def world(tmp_path, monkeypatch) -> Small:
    monkeypatch.setattr(space, "_OWED_PER_MARGIN", 1 << 30)  # so that the last block can be predicted
    return Small(tmp_path, slots=SLOTS, options=EngineOptions(dirty_age_s=1000))


async def write_until_refused(world: World, file, start: int = 0) -> int:
    """Write one block after the other; how many there are when one is refused."""
    for number in range(start, SLOTS):
        try:
            await world.write(file, number * BLOCK, bytes([number % 251]) * BLOCK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return number
    raise AssertionError("never refused")


def content(blocks: int) -> bytes:
    return b"".join(bytes([number % 251]) * BLOCK for number in range(blocks))


async def test_what_has_no_room_is_refused_and_what_was_taken_arrives(world, autojump_clock):
    async with world.started(tasks=True) as engine:
        world.limit(20)
        await engine.space.ask()
        file = world.open("a")
        assert await write_until_refused(world, file) == 20
        assert file.size == 20 * BLOCK
        await world.write(file, 0, content(20))  # what has a place may be written at any time
        await engine.flush()
        await world.write(file, 0, content(20))
        assert await write_until_refused(world, file, 20) == 20
        await engine.flush()
        assert engine.status()["writeback"]["errors"] == 0
    assert world.path("a").read_bytes() == content(20)


async def test_cutting_and_unlinking_give_room_back(world, autojump_clock):
    async with world.started(tasks=True) as engine:
        world.limit(20)
        await engine.space.ask()
        file = world.open("a")
        assert await write_until_refused(world, file) == 20
        await engine.attributes.truncate(file, 5 * BLOCK)
        other = world.open("b")
        assert await write_until_refused(world, other) == 15
        await world.unlink("a")
        engine.release(file)
        assert await write_until_refused(world, other, 15) == 20
        await engine.flush()
    assert world.path("b").read_bytes() == content(20)


async def test_the_budget_counts_what_is_taken_while_the_backing_is_asked(world):
    async with world.started() as engine:
        world.limit(20)
        await engine.space.ask()
        assert engine.space.budget == 20
        file = world.open("a")
        hold = world.backing.faults.hang["space"] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.space.ask)
            await trio.testing.wait_all_tasks_blocked()
            await world.write(file, 0, content(7))
            hold.set()
        assert engine.space.budget == 13
        await engine.space.ask()
        assert engine.space.budget == 13
        assert engine.space.owed == 7 * BLOCK


async def test_what_is_owed_for_blocks_that_have_a_place_is_made_real_before_a_write_is_refused(world, autojump_clock):
    world.path("a").write_bytes(b"old" * 4096)
    async with world.started(tasks=True) as engine:
        world.limit(20)
        await engine.space.ask()
        file = world.open("a")
        await world.write(file, 0, content(3))  # nobody has looked whether they have a place
        assert engine.space.owed == 3 * BLOCK
        assert await write_until_refused(world, file, 3) == 20
        await engine.flush()
    assert world.path("a").read_bytes() == content(20)


async def test_overwriting_what_has_a_place_asks_once_however_full_the_backing_is(world, autojump_clock):
    world.path("a").write_bytes(bytes(50 * BLOCK))
    async with world.started(tasks=True) as engine:
        world.limit(0)
        await engine.space.ask()
        file = world.open("a")
        calls = world.backing.faults.calls
        before = calls["space"]
        for number in (30, *range(50)):
            await world.write(file, number * BLOCK, content(1))
        assert calls["allocated_until"] == 1
        assert calls["space"] == before
        assert engine.space.owed == 0
        await engine.flush()
    assert world.path("a").read_bytes() == content(1) * 50


async def test_copy_on_write_owes_every_dirty_block(tmp_path, autojump_clock, monkeypatch):
    monkeypatch.setattr(space, "_OWED_PER_MARGIN", 1 << 30)
    monkeypatch.setattr(space, "_COPY_MARGIN", MARGIN)
    world = Small(tmp_path, slots=SLOTS, options=EngineOptions(dirty_age_s=1000))
    world.path("a").write_bytes(bytes(10 * BLOCK))
    async with world.started() as engine:
        world.backing._real.overwrites_take_space = True
        world.limit(14)
        await engine.space.ask()
        file = world.open("a")
        for number in range(4):
            await world.write(file, number * BLOCK, b"x" * BLOCK)
        assert engine.space.owed == 4 * BLOCK
        await world.write(file, 0, b"y" * BLOCK)  # it is owed already
        with pytest.raises(OSError, match="space"):
            await world.write(file, 4 * BLOCK, b"x" * BLOCK)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_backing_that_others_have_filled(world, autojump_clock, expect_logs, number):
    """Nothing is lost, it is said, what takes space is refused at once, and all of it is delivered in the end."""
    expect_logs("writeback failed")
    world.path("old").write_bytes(content(3))
    async with world.started(tasks=True) as engine:
        file, old = world.open("a"), world.open("old")
        await world.write(file, 0, content(10))
        world.backing.faults.fail["write"] = number
        if number == errno.ENOSPC:
            world.limit(0)
        with pytest.raises(OSError, match=r"space|quota"):
            await engine.flush()
        (failing,) = engine.status()["writeback"]["failing"]
        assert (failing["path"], failing["errno"]) == ("a", errno.errorcode[number])
        began = trio.current_time()
        with pytest.raises(OSError, match="space") as caught:
            await world.write(file, 10 * BLOCK, b"x")
        assert caught.value.errno == number
        assert trio.current_time() - began < 10  # virtual: it did not wait for the deadline
        await world.write(file, 0, content(1))  # dirty already
        assert await world.read(file, 0, 10**6) == content(10)
        assert await world.read(old, 0, 10**6) == content(3)
        await trio.sleep(1000)
        world.backing.faults.fail.clear()
        world.limit(100)
        healed = trio.current_time()
        while engine.status()["slots"]["dirty"]:
            await trio.sleep(0.1)
        # Not only when the pause of 30 s between two tries is over, where the backing says so.
        assert trio.current_time() - healed < (3 if number == errno.ENOSPC else 40)
        await world.write(file, 10 * BLOCK, b"x")
        await engine.flush()
    assert world.path("a").read_bytes() == content(10) + b"x"


async def test_a_backing_that_cannot_be_asked_is_taken_to_have_room(world, autojump_clock):
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        world.backing.faults.fail["space"] = errno.EIO
        await engine.space.ask()
        await world.write(file, 0, content(30))
        del world.backing.faults.fail["space"]
        world.limit(0)
        await engine.space.ask()
        hold = world.backing.faults.hang["space"] = trio.Event()
        began = trio.current_time()
        for number in range(30, 60):
            await world.write(file, number * BLOCK, content(1))
        assert trio.current_time() - began < 20
        hold.set()
        del world.backing.faults.hang["space"]
        await trio.sleep(10)
        with pytest.raises(OSError, match="space"):
            await world.write(file, 60 * BLOCK, content(1))


async def test_a_restart_knows_what_is_owed(world):
    async with world.started() as engine:
        await world.write(world.open("a"), 0, content(10))
    async with world.started() as engine:
        world.limit(30)
        await engine.space.ask()
        assert engine.space.owed == 10 * BLOCK
        assert engine.space.budget == 20


async def test_a_full_disk_of_the_catalog_is_an_error_of_those_who_need_it(tmp_path, monkeypatch):
    monkeypatch.setattr("cachefsd.media.catalog._RESERVE", 64 << 10)
    with loop_mounted("ext4", tmp_path, size_mib=24, options=("-m", "0")) as disk:
        world = World(disk, slots=64)
        async with world.started(tasks=True) as engine:
            known = world.open("known")
            await world.write(known, 0, b"1" * BLOCK)
            with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while True:
                    filler.write(bytes(BLOCK))
            full, long_path = 0, Hints(b"", b"x", b"p" * 200 + b"/" + b"q" * 200, 0o100600, 0, 0)
            for number in range(400):
                world.path("x").touch(exist_ok=True)
                stat = BackingStat.of(world.path("x").stat())
                handle = b"%d" % (1 << 40 | number)
                file = engine.acquire(handle, stat, lambda: long_path, world.backing.sync_all)
                try:
                    await engine.cache.records.record(file)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    full += 1
                    if full > 3:
                        break
            assert full
            assert engine.status()["failed"] is None
            await world.write(known, 0, b"2" * BLOCK)  # it has a record
            (disk / "filler").unlink()
            await engine.cache.records.record(file)
            await world.write(known, BLOCK, b"3" * BLOCK)
            await world.engine.fsync(known)
        async with world.started():
            assert await world.read(world.open("known"), 0, 2 * BLOCK) == b"2" * BLOCK + b"3" * BLOCK
