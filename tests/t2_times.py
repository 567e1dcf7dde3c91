"""Times that users set: what is seen at once is what is seen after writeback, a crash and a restart."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support_engine import BLOCK, World
from support_strategies import EXT4_LAST_S, TIMES, YEAR_1850, YEAR_2500
from t0_times import linux

from cachefsd.core.files import CachedFile
from cachefsd.media.ports import Durability
from cachefsd.times import FIRST_NS, LAST_NS, NS, PROBE_NS, KeptTimes, clamp

SYSTEMS = {
    "ext4": (-(1 << 31), EXT4_LAST_S, 1),
    "ext3": (-(1 << 31), (1 << 31) - 1, NS),
    "fat": (315532800, 4354819198, 2 * NS),
    "smb": (-(1 << 31), EXT4_LAST_S, 100),
}


def world_on(directory: Path, system: str, *, probed: bool, durability: Durability) -> World:
    """Files keep times as those of the file system do; it is asked at the start or not."""
    world = World(directory, durability=durability)
    first_s, last_s, granularity = SYSTEMS[system]
    world.keep = lambda ns: linux(ns, first_s, last_s, granularity)
    world.times = KeptTimes()
    if probed:
        world.times.probed(*(clamp(world.keep(ns)) for ns in (FIRST_NS, LAST_NS, PROBE_NS)))
    return world


async def set_time(world: World, file: CachedFile, ns: int) -> None:
    """As FUSE does it."""
    ns = clamp(ns)
    if await world.engine.attributes.set_mtime_of_dirty(file, ns):
        return
    await file.backing.open(write=True)
    async with world.engine.attributes.changing(file):
        await file.backing.set_mtime(ns)
        await world.engine.attributes.set_mtime(file, ns, (await file.backing.stat()).mtime_ns)


@pytest.mark.parametrize("probed", [True, False], ids=["probed", "learning"])
@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.tuples(st.sampled_from(["write", "flush", "crash", "cut"]), TIMES), min_size=1, max_size=5),
    durability=st.sampled_from(list(Durability)),
)
def test_what_is_seen_at_once_is_seen_ever_after(system, probed, steps, durability):
    async def run(directory: Path) -> None:
        world = world_on(directory, system, probed=probed, durability=durability)
        seen = None
        for step, ns in [*steps, ("crash", 0)]:
            async with world.started(tasks=True) as engine:
                file = world.open("a")
                if seen is not None:
                    assert file.mtime_ns == seen
                if step == "write":
                    await world.write(file, 0, b"1" * BLOCK)
                elif step == "cut":
                    await engine.attributes.truncate(file, 100)
                await set_time(world, file, ns)
                seen = file.mtime_ns
                assert FIRST_NS <= seen <= LAST_NS
                assert seen == world.keep(clamp(ns))
                if step == "flush":
                    await engine.flush()
                    assert file.mtime_ns == seen
                    assert world.path("a").stat().st_mtime_ns == seen
                await engine.fsync(file)

    with tempfile.TemporaryDirectory() as directory:
        trio.run(run, Path(directory))


async def test_what_is_written_gets_times_that_the_backing_can_keep(tmp_path):
    world = world_on(tmp_path, "ext3", probed=True, durability=Durability.RAM)
    world.now = 1_700_000_001_234_567_890
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        assert file.mtime_ns == 1_700_000_001 * NS
        await engine.attributes.truncate(file, 10)
        await world.write(file, 0, b"1" * 20)
        assert file.mtime_ns == 1_700_000_001 * NS
        await engine.flush()
    assert world.path("a").stat().st_mtime_ns == 1_700_000_001 * NS


async def test_writeback_shows_what_the_backing_makes_of_times(tmp_path):
    world = world_on(tmp_path, "fat", probed=False, durability=Durability.RAM)
    world.now = PROBE_NS
    async with world.started(tasks=True) as engine:
        file = world.open("a")
        await world.write(file, 0, b"1" * BLOCK)
        await engine.flush()
        seen = file.mtime_ns
        assert seen == world.path("a").stat().st_mtime_ns == PROBE_NS - PROBE_NS % (2 * NS)
        assert engine.cache.backing.times.granularity == 2 * NS
        await world.write(file, 0, b"1" * BLOCK)  # from now on it is known
        assert file.mtime_ns == seen


@pytest.mark.parametrize("year_s", [YEAR_1850, YEAR_2500, 10_413_792_000])
async def test_a_file_with_any_time_keeps_its_clean_blocks(tmp_path, year_s):
    """A stamp has to be equal to what is looked up later."""
    world = World(tmp_path)
    world.path("a").write_bytes(b"1" * BLOCK)
    os.utime(world.path("a"), (year_s, year_s))
    async with world.started():
        file = world.open("a")
        assert await world.read(file, 0, BLOCK) == b"1" * BLOCK
        await world.write(file, BLOCK, b"2")
    async with world.started() as engine:
        file = world.open("a")
        assert file.table.get(0) >= 0
        assert await world.read(file, 0, BLOCK) == b"1" * BLOCK
        assert engine.status()["promotions"] == 0
