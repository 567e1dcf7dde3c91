"""Exceptions that nobody expects, as a bug raises them: they concern one file or one job, and never end the engine."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Callable
from typing import Any

import pytest
import trio
from support_engine import BLOCK, World

from cachefsd.core.faults import Faults
from cachefsd.core.options import EngineOptions
from cachefsd.media.ports import Durability

BUG = struct.error("int too large to convert")
TEXT = "error: int too large to convert"
LATER = EngineOptions(dirty_age_s=5, retry_min_s=1, retry_max_s=4)


def faults_of(world: World) -> dict[str, int]:
    """How often each kind of work has failed."""
    listed = world.engine.status()["faults"]
    assert all(fault["error"] == TEXT for fault in listed)
    return {fault["where"]: fault["count"] for fault in listed}


@pytest.mark.parametrize("call", ["open", "write", "write_tail", "sync", "set_mtime", "stat"])
async def test_a_bug_in_a_writeback_concerns_that_file_only(
    tmp_path, call: str, autojump_clock, expect_logs: Callable[..., None]
) -> None:
    expect_logs("a bug: writeback of a failed", count=1)
    expect_logs("writeback failed, the data stays in the cache: a: error: int too large", count=1)
    expect_logs("a bug: the stamp of a failed")
    world = World(tmp_path, slots=16, options=LATER)
    async with world.started(tasks=True) as engine:
        await world.write(world.open("a"), 0, b"x" * BLOCK + b"y")
        world.backing.faults.fail[call] = BUG
        await trio.sleep(60)
        (failing,) = engine.status()["writeback"]["failing"]
        assert (failing["path"], failing["errno"]) == ("a", "EIO")
        assert failing["tries"] >= 10
        assert faults_of(world)["writeback of a"] >= 10
        with pytest.raises(OSError, match="int too large"):
            await engine.flush()
        world.backing.faults.fail.clear()
        await world.write(world.open("b"), 0, b"z" * BLOCK)
        await engine.flush()
        assert engine.status()["writeback"]["failing"] == []
    assert world.path("a").read_bytes() == b"x" * BLOCK + b"y"
    assert world.path("b").read_bytes() == b"z" * BLOCK


@pytest.mark.parametrize("durability", [Durability.RAM, Durability.DISK])
async def test_a_bug_in_the_catalog_keeps_the_data(
    tmp_path, durability: Durability, autojump_clock, monkeypatch, expect_logs: Callable[..., None]
) -> None:
    expect_logs("a bug: ")
    expect_logs("writeback failed")
    world = World(tmp_path, slots=16, durability=durability, options=LATER)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"x" * BLOCK)
        commit = world.catalog.transact
        broken = True

        def failing(changes: Any) -> None:
            if broken:
                raise BUG
            commit(changes)

        monkeypatch.setattr(world.catalog, "transact", failing)
        await trio.sleep(60)
        assert engine.status()["slots"]["dirty"] == 1
        with pytest.raises(struct.error):
            await world.write(world.open("b"), 0, b"y" * BLOCK)  # its first record; FUSE makes EIO of it
        broken = False
        await world.write(world.open("b"), 0, b"y" * BLOCK)
        await engine.flush()
    assert world.path("a").read_bytes() == b"x" * BLOCK
    assert world.path("b").read_bytes() == b"y" * BLOCK


async def test_bugs_in_upkeep_hold_up_neither_each_other_nor_the_rest(
    tmp_path, autojump_clock, monkeypatch, expect_logs: Callable[..., None]
) -> None:
    expect_logs("a bug: upkeep failed", count=1)
    expect_logs("a bug: the account of space failed", count=1)
    world = World(tmp_path, slots=16, options=LATER)
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"x" * BLOCK)
        world.backing.faults.fail["sync_all"] = BUG
        world.backing.faults.fail["space"] = BUG
        await world.unlink("a")
        engine.release(file)
        await trio.sleep(30)
        assert faults_of(world)["upkeep"] >= 5
        assert faults_of(world)["the account of space"] >= 2
        assert engine.status()["slots"]["dirty"] == 1
        world.backing.faults.fail.clear()
        await trio.sleep(100)
        assert engine.status()["slots"]["dirty"] == 0
        await world.write(world.open("b"), 0, b"y" * BLOCK)
        await engine.flush()
    assert world.path("b").read_bytes() == b"y" * BLOCK


async def test_a_bug_in_the_scrub_does_not_end_it(
    tmp_path, autojump_clock, monkeypatch, expect_logs: Callable[..., None]
) -> None:
    world = World(tmp_path, slots=16, options=LATER)
    async with world.started():
        for name in "abc":
            await world.write(world.open(name), 0, name.encode() * BLOCK)
    expect_logs("a bug: the check of recovered data failed", count=1)
    async with world.started(tasks=True) as engine:
        verify, calls = engine.cache.integrity.verify, 0

        def failing(*words: Any) -> bool:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise BUG
            return verify(*words)

        monkeypatch.setattr(engine.cache.integrity, "verify", failing)
        await trio.sleep(1)
        assert calls == 3
        assert faults_of(world) == {"the check of recovered data": 1}


async def test_a_bug_in_the_schedule_of_writeback_is_tried_again(
    tmp_path, autojump_clock, monkeypatch, expect_logs: Callable[..., None]
) -> None:
    expect_logs("a bug: the schedule of writeback failed", count=1)
    world = World(tmp_path, slots=16, options=LATER)
    async with world.started(tasks=True) as engine:
        start_due, calls = engine.writeback._start_due, 0

        def failing(nursery: trio.Nursery) -> float:
            nonlocal calls
            calls += 1
            if calls <= 3:
                raise BUG
            return start_due(nursery)

        monkeypatch.setattr(engine.writeback, "_start_due", failing)
        await world.write(world.open("a"), 0, b"x" * BLOCK)
        await engine.flush()
        assert calls > 3
    assert world.path("a").read_bytes() == b"x" * BLOCK


async def test_a_bug_at_the_end_leaves_a_cache_that_is_recovered(
    tmp_path, autojump_clock, monkeypatch, expect_logs: Callable[..., None]
) -> None:
    expect_logs("a bug: the end of the cache failed", count=1)
    expect_logs("not marked clean", count=1)
    world = World(tmp_path, slots=16, options=LATER)
    async with world.started(shutdown=True):
        await world.write(world.open("a"), 0, b"x" * BLOCK)

        def failing(next_seq: int) -> None:
            raise BUG

        monkeypatch.setattr(world.pool, "mark_clean", failing)
    async with world.started() as engine:
        assert not engine.status()["recovery"]["clean"]
        assert await world.read(world.open("a"), 0, BLOCK) == b"x" * BLOCK


async def test_a_job_that_fails_is_begun_again_later_each_time(autojump_clock, expect_logs) -> None:
    expect_logs("a bug: it failed", count=1)
    faults, begun = Faults(), []

    async def job() -> None:
        begun.append(trio.current_time())
        if len(begun) < 5:
            raise ExceptionGroup("of a nursery", [BUG])

    await faults.keep("it", job)
    pauses = [later - earlier for earlier, later in itertools.pairwise(begun)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert faults.listed() == [{"where": "it", "error": TEXT, "count": 4}]


async def test_a_cancellation_is_no_fault(autojump_clock) -> None:
    faults = Faults()
    with trio.move_on_after(1) as scope:
        await faults.keep("it", trio.sleep_forever)
    assert scope.cancelled_caught
    assert faults.count == 0


def test_kinds_of_faults_are_bounded(expect_logs) -> None:
    expect_logs("a bug: ")
    faults = Faults()
    for number in range(300):
        error = faults.note(f"job {number}", BUG)
        assert error.errno == errno.EIO
    assert len(faults.listed()) == 100
    assert faults.count == 300
