"""Blocks whose only copy is damaged: they read as EIO, are listed by path and place, and heal by being replaced."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from support_engine import BLOCK, World

from cachefsd.core.engine import Engine
from cachefsd.core.files import CachedFile
from cachefsd.media.ports import Changes, Durability


@pytest.fixture(params=list(Durability), ids=lambda durability: durability.value)
def world(request, tmp_path) -> World:
    return World(tmp_path, slots=12, durability=request.param)


@pytest.fixture(autouse=True)
def _expected(expect_logs) -> None:
    expect_logs("data in the cache is damaged")


async def write_then_damage(world: World, file: CachedFile, data: bytes, *blocks: int) -> None:
    """Write ``data`` at the start of a file, and flip a bit of some of its blocks behind the engine's back."""
    await world.write(file, 0, data)
    await world.engine.fsync(file)
    for block in blocks:
        world.pool.view(file.table.get(block))[7] ^= 1


def listed(engine: Engine) -> list[tuple[str, int, int]]:
    status = engine.status()
    assert status["lost_ranges"] == len(status["lost_blocks"])
    return [(loss["path"], loss["from"], loss["to"]) for loss in status["lost_blocks"]]


async def check_lost(world: World, file: CachedFile, *blocks: int) -> None:
    """These blocks of a file read as EIO, and no others."""
    for block in range(-(-file.size // BLOCK)):
        if block not in blocks:
            await world.read(file, block * BLOCK, 1)
            continue
        with pytest.raises(OSError, match="lost") as caught:
            await world.read(file, block * BLOCK, 1)
        assert caught.value.errno == errno.EIO


async def test_what_is_lost_is_listed_by_path_and_place_also_after_a_restart(world):
    async with world.started() as engine:
        file = world.open("a")
        await write_then_damage(world, file, b"x" * 6 * BLOCK, 1, 2, 4)
        assert listed(engine) == []  # nobody has looked
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        told = file.errors.reader()
        await check_lost(world, file, 1, 2, 4)
        expected = [("a", BLOCK, 3 * BLOCK), ("a", 4 * BLOCK, 5 * BLOCK)]
        assert listed(engine) == expected
        assert [told.take(), told.take()] == [errno.EIO, 0]
        await engine.flush()
        assert listed(engine) == expected
    assert world.path("a").read_bytes().count(b"x") == 3 * BLOCK
    for shutdown in (False, True, False):
        async with world.started(shutdown=shutdown) as engine:
            assert listed(engine) == expected  # before anybody has used the file
            assert engine.status()["slots"]["quarantined"] == 3
            await check_lost(world, world.open("a"), 1, 2, 4)
    world.path("a").rename(world.path("b"))
    async with world.started(tasks=True) as engine:
        file = world.open("b", create=False)
        await check_lost(world, file, 1, 2, 4)
        assert listed(engine)[0][0] == "b"


async def test_a_change_of_the_backing_file_does_not_bring_old_content_back_for_a_lost_block(world):
    """Found here: lost blocks were dropped with the clean ones, and read as what the backing has."""
    world.path("a").write_bytes(b"old" * BLOCK)
    async with world.started():
        file = world.open("a")
        await write_then_damage(world, file, b"x" * BLOCK, 0)
    async with world.started():
        await check_lost(world, world.open("a"), 0)
    with world.path("a").open("ab") as backing:
        backing.write(b"more")
    async with world.started() as engine:
        await check_lost(world, world.open("a"), 0)
        assert listed(engine) == [("a", 0, BLOCK)]


async def test_overwriting_whole_blocks_heals_them(world):
    async with world.started():
        file = world.open("a")
        await write_then_damage(world, file, b"x" * 3 * BLOCK, 0, 1)
    async with world.started() as engine:
        file = world.open("a")
        await check_lost(world, file, 0, 1)
        with pytest.raises(OSError, match="lost"):
            await world.write(file, 10, b"part")
        await world.write(file, 0, b"y" * BLOCK)
        assert listed(engine) == [("a", BLOCK, 2 * BLOCK)]
        await engine.fsync(file)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        assert listed(engine) == [("a", BLOCK, 2 * BLOCK)]
        await world.write(file, BLOCK, b"z" * BLOCK)
        assert listed(engine) == []
        await engine.flush()
    content = b"y" * BLOCK + b"z" * BLOCK + b"x" * BLOCK
    assert world.path("a").read_bytes() == content
    async with world.started() as engine:
        assert listed(engine) == []
        assert engine.status()["slots"]["quarantined"] == 0
        assert await world.read(world.open("a"), 0, 10**6) == content


async def test_a_file_does_not_become_shorter_by_the_loss_of_its_end(world):
    """Found by reading recovery: the size came from dirty blocks only, and the loss was as if never written."""
    async with world.started():
        file = world.open("a")
        await write_then_damage(world, file, b"x" * (2 * BLOCK + 100), 1, 2)
    for _ in range(2):
        async with world.started(tasks=True) as engine:
            file = world.open("a")
            await check_lost(world, file, 1, 2)
            assert file.size == 2 * BLOCK + 100
            assert listed(engine) == [("a", BLOCK, 2 * BLOCK + 100)]
            await engine.flush()


async def test_cutting_lost_blocks_off_heals_them(world):
    async with world.started():
        file = world.open("a")
        await write_then_damage(world, file, b"x" * 4 * BLOCK, 2, 3)
    async with world.started() as engine:
        file = world.open("a")
        await check_lost(world, file, 2, 3)
        await engine.attributes.truncate(file, 3 * BLOCK)
        assert listed(engine) == [("a", 2 * BLOCK, 3 * BLOCK)]
        await engine.attributes.truncate(file, 2 * BLOCK)
        assert listed(engine) == []
        await engine.attributes.truncate(file, 4 * BLOCK)
        assert await world.read(file, 0, 10**6) == b"x" * 2 * BLOCK + bytes(2 * BLOCK)
    async with world.started() as engine:
        assert listed(engine) == []
        assert await world.read(world.open("a"), 0, 10**6) == b"x" * 2 * BLOCK + bytes(2 * BLOCK)


@pytest.mark.parametrize("flush", [False, True])
async def test_a_cut_within_a_lost_block_is_not_undone_by_a_restart(world, flush):
    async with world.started():
        file = world.open("a")
        await write_then_damage(world, file, b"x" * 2 * BLOCK, 1)
    async with world.started(tasks=flush) as engine:
        file = world.open("a")
        await check_lost(world, file, 1)
        await engine.attributes.truncate(file, BLOCK + 100)
        await check_lost(world, file, 1)
        if flush:
            await engine.flush()  # from then on no intent says the size
    for _ in range(2):
        async with world.started() as engine:
            file = world.open("a")
            assert file.size == BLOCK + 100
            await check_lost(world, file, 1)
            assert listed(engine) == [("a", BLOCK, BLOCK + 100)]


async def test_a_crash_right_after_the_intent_of_a_cut_within_a_lost_block(world, monkeypatch):
    async with world.started():
        file = world.open("a")
        await write_then_damage(world, file, b"x" * 2 * BLOCK, 1)
    async with world.started() as engine:
        file = world.open("a")
        await check_lost(world, file, 1)
        monkeypatch.setattr(engine.attributes, "_cut", None)
        with pytest.raises(TypeError):
            await engine.attributes.truncate(file, BLOCK + 100)
        monkeypatch.undo()
    for _ in range(2):
        async with world.started() as engine:
            file = world.open("a")
            assert file.size == BLOCK + 100
            await check_lost(world, file, 1)
            assert listed(engine) == [("a", BLOCK, BLOCK + 100)]


@pytest.mark.parametrize("ending", ["reaped", "crash", "crash before the unlink"])
async def test_an_unlinked_file_takes_its_losses_with_it(world, ending):
    async with world.started():
        file = world.open("a")
        await write_then_damage(world, file, b"x" * BLOCK, 0)
    async with world.started() as engine:
        file = world.open("a")
        await check_lost(world, file, 0)
        if ending == "crash before the unlink":
            await engine.unlinking(file)
        else:
            await world.unlink("a")
            engine.release(file)
            if ending == "reaped":
                await engine.flush()
                assert listed(engine) == []
    async with world.started() as engine:
        if ending == "crash before the unlink":
            assert listed(engine) == [("a", 0, BLOCK)]
            await check_lost(world, world.open("a", create=False), 0)
        else:
            assert listed(engine) == []
            assert engine.status()["slots"]["quarantined"] == 0
            assert list(world.root.iterdir()) == []


async def test_a_damaged_header_is_a_loss_of_an_unknown_file(world, expect_logs):
    expect_logs("damaged headers")
    async with world.started():
        file = world.open("a")
        await world.write(file, 0, b"x" * 2 * BLOCK)
        await world.engine.fsync(file)
        slot = file.table.get(0)
    offset = 8192 + 64 * slot + 16  # within the header, see docs/format.md
    with (world.cache_dir / "pool").open("r+b") as pool:
        pool.seek(offset)
        byte = pool.read(1)[0]
        pool.seek(offset)
        pool.write(bytes([byte ^ 1]))
    for _ in range(2):
        async with world.started() as engine:
            status: dict[str, Any] = engine.status()
            assert (status["lost_unknown"], status["lost_blocks"]) == (1, [])
            assert status["slots"]["quarantined"] == 1


async def test_blocks_of_a_file_that_the_catalog_does_not_know_are_listed_by_its_number(world, expect_logs):
    expect_logs("does not know")
    async with world.started():
        file = world.open("a")
        await world.write(file, BLOCK, b"x" * BLOCK)
        await world.engine.fsync(file)
        world.catalog.transact(Changes(delete=[file.file_id]))
    async with world.started() as engine:
        assert listed(engine) == [(f"file {file.file_id}, of which the catalog has no record", BLOCK, 2 * BLOCK)]
        assert engine.status()["lost_unknown"] == 0


async def test_a_lost_file_that_the_backing_has_lost_too_is_still_reported(world, expect_logs):
    expect_logs("created again")
    async with world.started():
        file = world.open("a")
        await write_then_damage(world, file, b"x" * BLOCK, 0)
    async with world.started():
        await check_lost(world, world.open("a"), 0)
    world.path("a").unlink()
    async with world.started(epoch=b"another boot") as engine:
        assert listed(engine) == [("a", 0, BLOCK)]
        await check_lost(world, world.open("a", create=False), 0)
