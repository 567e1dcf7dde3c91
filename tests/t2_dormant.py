"""Files that nobody uses are rows of tables: when they become that, how they wake, and that nothing is lost by it."""

from __future__ import annotations

import errno
import gc
import os
import random
import threading

import numpy as np
import pytest
import trio
from sim.oracle import Violation
from sim.world import check_accounts
from support_engine import BLOCK, World

from cachefsd.core.dormant import Rows
from cachefsd.core.files import CachedFile
from cachefsd.core.options import EngineOptions
from cachefsd.core.slots import CLEAN, FREE
from cachefsd.media.ports import CatalogError, CatalogFullError, Durability, hash_of_handle

CLASSES = [Durability.RAM, Durability.PMEM, Durability.DISK]
ROUND_S = 10.0  # more than a round of upkeep takes


def content(name: str, blocks: int = 1) -> bytes:
    return b"".join(f"{name} {number}".encode().ljust(BLOCK, b".") for number in range(blocks))


@pytest.fixture(params=CLASSES, ids=lambda d: d.value)
def world(tmp_path, request):
    return World(tmp_path, slots=200, durability=request.param)


async def fill(world, count, blocks=1):
    """So many clean files; the daemon is killed."""
    async with world.started(tasks=True) as engine:
        for number in range(count):
            await world.write(world.open(f"f{number}"), 0, content(f"f{number}", blocks))
        await engine.flush()
        await engine.cache.blocks.persist_frees()
        await engine.cache.blocks.persist()


def handle(world, name):
    return b"%d" % world.path(name).stat().st_ino


def objects():
    gc.collect()
    return sum(isinstance(each, CachedFile) for each in gc.get_objects())


async def test_a_start_makes_no_objects_of_clean_files(world):
    await fill(world, 50)
    del world.engine
    before = objects()
    async with world.started() as engine:
        assert objects() == before
        assert len(engine.cache.files.dormant) == 50
        check_accounts(engine)


async def test_a_file_that_is_used_wakes_with_its_blocks_and_no_other_does(world):
    await fill(world, 20, blocks=3)
    async with world.started() as engine:
        file = world.open("f7")
        assert await world.read(file, 0, 10**6) == content("f7", 3)
        assert world.backing.faults.calls["read"] == 0
        assert world.open("f7") is file
        assert file.ref_count == 2
        assert list(engine.cache.files.by_id.values()) == [file]
        assert engine.status()["files"] == {"in_memory": 1, "dormant": 19}
        check_accounts(engine)


@pytest.mark.parametrize("shutdown", [False, True])
async def test_dormant_files_outlive_kills_and_orderly_ends(world, shutdown):
    await fill(world, 10, blocks=2)
    for number in range(10):
        async with world.started(tasks=True, shutdown=shutdown) as engine:
            assert len(engine.cache.files.dormant) == 10
            assert await world.read(world.open(f"f{number}"), 0, 10**6) == content(f"f{number}", 2)
            assert world.backing.faults.calls["read"] == 0


async def test_files_that_something_is_owed_to_are_awake_after_a_start(world):
    await fill(world, 5, blocks=2)
    async with world.started() as engine:
        dirty, cut = world.open("f1"), world.open("f2")
        await world.write(dirty, 0, b"new")
        await engine.fsync(dirty)
        await engine.attributes.truncate(cut, 100)
        gone = world.open("f3")
        await engine.unlinking(gone)  # the unlink itself does not come
        await engine.cache.records.record(gone)
    async with world.started() as engine:
        assert len(engine.cache.files.dormant) == 2
        assert await world.read(world.open("f1"), 0, 3) == b"new"
        assert await world.read(world.open("f2"), 0, 10**6) == content("f2")[:100]
        assert await world.read(world.open("f3"), 0, 10**6) == content("f3", 2)
        check_accounts(engine)


async def test_dormant_files_are_evicted_and_their_records_deleted(world, autojump_clock):
    await fill(world, 150)
    async with world.started(tasks=True) as engine:
        await world.write(world.open("new"), 0, content("new", 190))
        check_accounts(engine, idle=False)
        left = sum(count > 0 for _, count, _ in engine.cache.files.dormant.files())
        assert left <= 10
        assert engine.cache.slots.counts[CLEAN] == left
        await trio.sleep(ROUND_S)
        await engine.flush()
        assert len(list(world.catalog.files())) == left + 1
        for number in range(0, 150, 10):
            assert await world.read(world.open(f"f{number}"), 0, BLOCK) == content(f"f{number}")
    async with world.started() as engine:
        check_accounts(engine)


async def test_the_record_of_an_evicted_file_stays_until_its_slots_are_durably_free(tmp_path):
    world = World(tmp_path, slots=20, durability=Durability.DISK)
    await fill(world, 1)
    async with world.started() as engine:
        slots = engine.cache.slots
        (place,) = np.flatnonzero(np.frombuffer(slots.state, np.uint8) == CLEAN).tolist()
        seen = []

        def sync():
            seen.append((slots.state[place], len(list(world.catalog.files()))))

        await world.write(world.open("new"), 0, content("new", 19))
        world.pool.sync = sync
        slots.give_back([slots.take_one()])
        assert [count for _, count, _ in engine.cache.files.dormant.files()] == [0]
        await engine._upkeep._delete_records()
        assert not engine.cache.files.dormant
        assert seen[0] == (FREE, 2)  # it was there when the FREE became durable
        assert len(list(world.catalog.files())) == 1


async def test_records_of_files_that_have_left_are_deleted_later_if_the_catalog_is_full(
    tmp_path, autojump_clock, monkeypatch, expect_logs
):
    expect_logs("upkeep: .*full")
    world = World(tmp_path, slots=8, durability=Durability.DISK)
    async with world.started(tasks=True) as engine:
        commit, full = world.catalog.transact, True

        def failing(changes):
            if full and changes.delete:
                raise CatalogFullError("the disk of the catalog is full")
            commit(changes)

        monkeypatch.setattr(world.catalog, "transact", failing)
        for _ in range(2):
            file = world.open("a")
            await world.write(file, 0, b"x" * BLOCK)
            await engine.attributes.truncate(file, 0)
            await engine.flush()
            engine.release(file)
            await trio.sleep(ROUND_S)
        assert len(list(world.catalog.files())) == 2  # the second user has waited in memory
        full = False
        await trio.sleep(ROUND_S)
        assert list(world.catalog.files()) == []


async def test_a_file_evicted_in_part_wakes_with_the_rest(world):
    await fill(world, 1, blocks=150)
    async with world.started() as engine:
        await world.write(world.open("other"), 0, content("other", 60))
        ((_, left, slots),) = engine.cache.files.dormant.files()
        assert 0 < left == len(slots) < 150
        file = world.open("f0")
        assert file.table.cached == left
        assert await world.read(file, 0, 10**6) == content("f0", 150)
        assert world.backing.faults.calls["read"] > 0
        assert await world.read(world.open("other"), 0, 10**6) == content("other", 60)


async def test_clean_blocks_of_a_changed_file_are_dropped_when_it_wakes(world):
    await fill(world, 2, blocks=2)
    world.path("f0").write_bytes(b"by somebody else")
    async with world.started() as engine:
        file = world.open("f0")
        assert not file.table.cached
        assert await world.read(file, 0, 10**6) == b"by somebody else"
        assert await world.read(world.open("f1"), 0, 10**6) == content("f1", 2)
        check_accounts(engine)


async def test_what_has_changed_is_known_when_the_file_wakes_again(world, autojump_clock):
    await fill(world, 1, blocks=2)
    world.path("f0").write_bytes(content("changed", 2))
    async with world.started(tasks=True) as engine:
        for _ in range(3):
            file = world.open("f0")
            assert await world.read(file, 0, 10**6) == content("changed", 2)
            engine.release(file)
            await trio.sleep(ROUND_S)
            assert len(engine.cache.files.dormant) == 1
        assert world.backing.faults.calls["read"] == 1


@pytest.mark.parametrize("durability", CLASSES)
async def test_the_last_name_of_a_dormant_file_goes(tmp_path, durability, autojump_clock):
    world = World(tmp_path, slots=20, durability=durability)
    await fill(world, 2, blocks=2)
    gone = world.path("f0")
    hidden = tmp_path / "hidden"
    async with world.started() as engine:
        os.link(gone, hidden)
        await world.unlink("f0")
        check_accounts(engine)
        (record, _) = world.catalog.files()
        assert record.unlinked == (durability is Durability.DISK)
    os.link(hidden, gone)  # a power cut has lost the unlink
    hidden.unlink()
    async with world.started(tasks=True) as engine:
        assert await world.read(world.open("f0"), 0, 10**6) == content("f0", 2)
        engine.release(engine.find(handle(world, "f0")))
        await world.unlink("f0")
        await engine.flush()
        await trio.sleep(ROUND_S)
        assert [record.name for record in world.catalog.files()] == [b"f1"]
        assert engine.status()["slots"]["free"] == 18
        check_accounts(engine, idle=False)


# ---- falling asleep


async def test_files_fall_asleep_in_a_running_daemon(world, autojump_clock):
    before = objects()
    async with world.started(tasks=True) as engine:
        files = []
        for number in range(30):
            files.append(world.open(f"f{number}"))
            engine.opened(files[-1])
            await world.write(files[-1], 0, content(f"f{number}", 3))
            engine.closed(files[-1])
            engine.release(files[-1])
        kept = world.open("f5")
        await trio.sleep(2 * ROUND_S)
        assert list(engine.cache.files.by_id.values()) == [kept] == list(engine.cache.files.by_handle.values())
        assert len(engine.cache.files.dormant) == 29
        del files, kept
        assert objects() == before + 1
        check_accounts(engine, idle=False)
        for number in range(30):
            file = world.open(f"f{number}")
            assert await world.read(file, 0, 10**6) == content(f"f{number}", 3)
            assert file.mtime_ns == world.path(f"f{number}").stat().st_mtime_ns
        assert world.backing.faults.calls["read"] == 0
        assert not engine.cache.files.dormant


async def test_files_with_dirty_blocks_or_users_stay_awake(world, autojump_clock, expect_logs):
    expect_logs("writeback failed")
    async with world.started(tasks=True) as engine:
        world.backing.faults.fail["write"] = errno.EIO
        file = world.open("a")
        await world.write(file, 0, content("a"))
        engine.release(file)
        await trio.sleep(ROUND_S)
        assert engine.find(handle(world, "a")) is file
        world.backing.faults.fail.clear()
        await trio.sleep(5 * ROUND_S)
        assert not engine.cache.files.by_id
        file = world.open("a")
        await trio.sleep(ROUND_S)
        assert engine.find(handle(world, "a")) is file
        assert await world.read(file, 0, BLOCK) == content("a")


async def test_an_error_that_nobody_was_told_of_keeps_a_file_awake(world, autojump_clock):
    await fill(world, 1)
    async with world.started(tasks=True) as engine:
        file = world.open("f0")
        file.errors.record(errno.EIO)
        engine.release(file)
        await trio.sleep(ROUND_S)
        assert engine.find(handle(world, "f0")) is file
        assert world.open("f0").errors.reader().take() == errno.EIO
        engine.release(file)
        await trio.sleep(ROUND_S)
        assert not engine.cache.files.by_id


async def test_a_lost_block_keeps_a_file_awake(world, autojump_clock, expect_logs):
    expect_logs("the block is lost")
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, content("a", 2))
        engine.cache.integrity.lose(file, 1, file.table.get(1))
        engine.release(file)
        await engine.flush()
        file.errors.reader().take()
        await trio.sleep(ROUND_S)
        assert engine.find(handle(world, "a")) is file
        assert engine.status()["lost_blocks"][0]["from"] == BLOCK


async def test_an_inode_that_is_not_synced_is_so_when_the_file_wakes(world, autojump_clock):
    await fill(world, 1)
    async with world.started(tasks=True) as engine:
        file = world.open("f0")
        engine.attributes.changed(file)
        engine.release(file)
        await trio.sleep(ROUND_S)
        assert not engine.cache.files.by_id
        syncs = world.backing.faults.calls["sync"]
        file = world.open("f0")
        await engine.fsync(file)
        assert world.backing.faults.calls["sync"] == syncs + 1
        await engine.fsync(file)
        assert world.backing.faults.calls["sync"] == syncs + 1


# ---- what is rare


def same_hash(monkeypatch):
    """All handles have one hash."""
    for module in ("cachefsd.media.records", "cachefsd.core.dormant"):
        monkeypatch.setattr(f"{module}.hash_of_handle", lambda _: 7)


async def test_files_whose_handles_have_one_hash_stay_apart_after_a_start(world, monkeypatch):
    await fill(world, 3)
    same_hash(monkeypatch)
    async with world.started() as engine:
        assert len(engine.cache.files.by_id) == 3
        assert not engine.cache.files.dormant
        for number in range(3):
            assert await world.read(world.open(f"f{number}"), 0, BLOCK) == content(f"f{number}")


async def test_files_whose_handles_have_one_hash_do_not_sleep_together(world, autojump_clock, monkeypatch):
    same_hash(monkeypatch)
    async with world.started(tasks=True) as engine:
        for number in range(3):
            file = world.open(f"f{number}")
            await world.write(file, 0, content(f"f{number}"))
            engine.release(file)
        await engine.flush()
        await trio.sleep(ROUND_S)
        assert len(engine.cache.files.by_id) == 2
        assert len(engine.cache.files.dormant) == 1
        assert engine.find(b"of no file") is None
        assert len(engine.cache.files.dormant) == 1
        for number in range(3):
            assert await world.read(world.open(f"f{number}"), 0, BLOCK) == content(f"f{number}")


async def test_a_file_that_wakes_does_not_hide_another_one_with_its_handle(world):
    """The backing has given the handle of a file that is gone to another one, which recovery has made."""
    await fill(world, 1)
    async with world.started() as engine:
        ((file_id, _, _),) = engine.cache.files.dormant.files()
        other = CachedFile(handle(world, "f0"), world.backing.file(handle(world, "f0")))
        other.ref_count = 1
        engine.cache.files.by_handle[other.handle] = other
        woken = engine.cache.files.find_id(file_id)
        assert woken.handle == other.handle
        assert engine.find(other.handle) is other
        engine.cache.blocks.remove_all(woken)
        engine.cache.files.forget(woken)
        await engine._upkeep._delete_records()
        assert engine.find(other.handle) is other
        assert not engine.cache.files.by_id


async def test_a_record_that_cannot_be_read_is_a_failure_of_the_cache(world, monkeypatch, expect_logs):
    expect_logs("the cache has failed")
    await fill(world, 2)
    async with world.started() as engine:

        def unreadable(_):
            raise CatalogError("the catalog cannot be read")

        monkeypatch.setattr(world.catalog, "record", unreadable)
        with pytest.raises(OSError, match="cannot be read") as caught:
            world.open("f0")
        assert caught.value.errno == errno.EIO
        assert engine.path_of(handle(world, "f0")) == b""
        monkeypatch.undo()
        assert len(engine.cache.files.dormant) == 2
        file = world.open("f0")
        assert await world.read(file, 0, BLOCK) == content("f0")
        assert not engine.writer.write(file, 0, content("f0"))
        with pytest.raises(OSError, match="has failed"):
            await engine.writer.write_slow(file, 0, content("f0"))


async def test_the_path_of_a_dormant_file_is_known_in_every_thread(world):
    await fill(world, 2)
    async with world.started() as engine:
        found: list[bytes] = []
        handles = [handle(world, "f1"), b"of no file"]
        thread = threading.Thread(target=lambda: found.extend(map(engine.path_of, handles)))
        thread.start()
        thread.join()
        assert found == [b"f1", b""]
        assert not engine.cache.files.by_id
        world.open("f1")
        assert engine.path_of(handle(world, "f1")) == b"f1"


async def test_the_scrub_wakes_only_a_file_whose_block_is_damaged(world, autojump_clock, expect_logs):
    expect_logs("failed its checksum: dropped")
    await fill(world, 10, blocks=2)
    async with world.started(tasks=True) as engine:
        slots = engine.cache.slots
        place = next(slot for slot in range(200) if slots.state[slot] == CLEAN and slots.block[slot] == 1)
        owner = slots.owner[place]
        engine.cache.data[place * BLOCK] ^= 1
        await trio.sleep(ROUND_S)
        assert engine.cache.slots.counts[CLEAN] == 19
        assert not slots.unverified(0, 200)
        assert len(engine.cache.files.dormant) == 10  # it has fallen asleep again
        assert {left for file_id, left, _ in engine.cache.files.dormant.files() if file_id == owner} == {1}
        check_accounts(engine, idle=False)
        for number in range(10):
            assert await world.read(world.open(f"f{number}"), 0, 10**6) == content(f"f{number}", 2)


@pytest.mark.parametrize("seed", range(6))
async def test_tables_that_are_joined_keep_what_is_there(tmp_path, autojump_clock, seed):
    """Files come, sleep, wake, are written, evicted and removed in random order, in many rounds."""
    rng = random.Random(seed)
    world = World(tmp_path, slots=100, options=EngineOptions(dirty_age_s=0.1, upkeep_s=0.1))
    expected: dict[str, bytes] = {}
    async with world.started(tasks=True) as engine:
        for _ in range(60):
            for _ in range(rng.randrange(12)):
                name = f"f{rng.randrange(40)}"
                if name in expected and rng.random() < 0.1:
                    os.link(world.path(name), tmp_path / f"{name} {rng.random()}")  # its inode number is not used again
                    await world.unlink(name)
                    del expected[name]
                    continue
                file = world.open(name)
                if name not in expected or rng.random() < 0.4:
                    expected[name] = content(f"{name} {rng.random()}", rng.randrange(1, 6))
                    await engine.attributes.truncate(file, 0)
                    await world.write(file, 0, expected[name])
                assert await world.read(file, 0, 10**6) == expected[name]
                engine.release(file)
            await trio.sleep(1)
            check_accounts(engine, idle=False)
            most = max((len(rows) for rows in engine.cache.files.dormant._tables), default=0)
            assert most <= 2 * 40
        assert engine.cache.slots.evictions
        await trio.sleep(ROUND_S)
        assert not engine.cache.files.by_id


def test_rows_find_what_they_have():
    ids, hashes = np.array([3, 5, 9], np.uint64), np.array([2**64 - 1, 0, 7], np.uint64)
    rows = Rows(ids, hashes, np.array([1, 2, 1], np.int32), np.array([4, 0, 2, 6], np.int32), np.zeros(3, np.bool_))
    assert [rows.row_of(number) for number in (0, 3, 4, 5, 9, 10, 2**63)] == [-1, 0, -1, 1, 2, -1, -1]
    assert [rows.find(number) for number in (0, 1, 7, 8, 2**64 - 1)] == [1, -1, 2, -1, 0]
    assert [rows.slots_of(row).tolist() for row in range(3)] == [[4], [0, 2], [6]]
    rows.left[1] = 0
    assert rows.row_of(5) == rows.find(0) == -1


async def test_the_accounts_notice_a_slot_too_many(world):
    """What the tests above rely on."""
    await fill(world, 2)
    async with world.started() as engine:
        engine.cache.files.dormant._tables[0].left[0] += 1
        with pytest.raises(Violation, match="dormant"):
            check_accounts(engine)
    assert hash_of_handle(b"a") != hash_of_handle(b"b")
