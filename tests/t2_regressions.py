"""What the crash simulator has found, each in the smallest run that shows it (see sim/)."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio
from sim.campaign import Campaign
from sim.media import BLOCK
from sim.world import Running, Setting, new_image, simulate

from cachefsd.core.files import CachedFile
from cachefsd.media.ports import Durability
from cachefsd.media.records import decode_record

T = TypeVar("T")
DISK = Setting(slots=6, durability=Durability.DISK)
A_WHILE = 5.0
"""Virtual seconds: everything that can go on has gone on then, and no time-out is near."""


class Gated(Running):
    """Jobs of worker threads that are held at a gate are done when the test says so, one after the other."""

    def __init__(self, setting: Setting = DISK) -> None:
        super().__init__(new_image(setting), setting, random.Random(0), hasty=True)
        self.held: str | None = None
        """The name of the function whose calls are held."""
        self.waiting: list[trio.Event] = []

    async def run_blocking(self, fn: Callable[..., T], /, *args: object) -> T:
        if fn.__name__ == self.held:
            self.waiting.append(trio.Event())
            await self.waiting[-1].wait()
        return await super().run_blocking(fn, *args)

    @asynccontextmanager
    async def holding(self, name: str) -> AsyncIterator[None]:
        """Hold calls of ``name``; leaving lets them go, and everything go on."""
        self.held = name
        yield
        self.held = None
        while self.waiting:
            self.waiting.pop(0).set()
        await trio.sleep(A_WHILE)

    def create(self, name: str) -> CachedFile:
        """A new file, open."""
        file = self.acquire(self.fs.create(name), lambda: name)
        self.engine.opened(file)
        return file

    async def write(self, file: CachedFile, data: bytes, offset: int = 0) -> None:
        if not self.engine.writer.write(file, offset, data):
            assert await self.engine.writer.write_slow(file, offset, data) == len(data)


def test_a_record_is_deleted_only_when_its_slots_are_durably_free() -> None:
    async def run() -> None:
        running = Gated()
        async with running.started(tasks=False) as engine, trio.open_nursery() as nursery:
            files = [running.create(name) for name in "ab"]
            for file in files:
                await running.write(file, bytes(range(128)))
            await engine.cache.blocks.persist()
            first, second = files

            def forget(file: CachedFile) -> None:
                engine.cache.blocks.remove_all(file)
                engine.closed(file)
                engine.release(file)

            forget(first)
            async with running.holding("sync"):
                nursery.start_soon(engine._upkeep._delete_records)
                await trio.sleep(A_WHILE)
                forget(second)  # after the sync has begun: its FREE is not covered
            assert list(running.catalog.state.files) == [second.file_id]
            await engine._upkeep._delete_records()
            assert not running.catalog.state.files

    simulate(run)


def test_a_truncate_is_not_forgotten_before_the_file_that_recovery_made_again_has_a_durable_name(
    expect_logs: Callable[..., None],
) -> None:
    expect_logs("not in the backing any more: created again|damaged headers")
    steps = [("truncate", "a", 3 * BLOCK), ("write", "a", 0, BLOCK), ("truncate", "a", 2 * BLOCK)]
    simulate(lambda: Campaign(Setting(), nested=1).program(steps))


def test_a_pass_writes_nothing_to_the_backing_that_the_pool_may_still_lose() -> None:
    async def run() -> None:
        running = Gated()
        async with running.started(tasks=False) as engine, trio.open_nursery() as nursery:
            file = running.create("a")
            data = bytes(range(128))
            await running.write(file, data)
            async with running.holding("sync"):
                nursery.start_soon(engine.writeback.write_out, file)
                await trio.sleep(A_WHILE)
                assert running.fs.inodes[int(file.handle)].content == b""
            assert running.fs.inodes[int(file.handle)].content == data
            assert not file.dirty

    simulate(run)


def test_a_pass_that_waits_for_the_catalog_does_not_take_a_tombstone_back() -> None:
    async def run() -> None:
        running = Gated()
        async with running.started(tasks=True) as engine, trio.open_nursery() as nursery:
            file = running.create("a")
            await running.write(file, bytes(range(128)))
            async with running.holding("transact"):
                nursery.start_soon(engine.unlinking, file)  # its tombstone is being committed
                await trio.sleep(A_WHILE)
                nursery.start_soon(engine.writeback.write_out, file)  # its record comes next
                await trio.sleep(A_WHILE)
                assert len(running.waiting) == 1
            assert not file.dirty
            assert decode_record(file.file_id, running.catalog.state.files[file.file_id]).unlinked

    simulate(run)
