"""A file that fails at recovery is set aside: its data is kept, the others are served, and it comes back."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from support_engine import BLOCK, World

from cachefsd.core.options import EngineOptions

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
        await engine.truncate(world.open("bad"), 5)
    world.broken[handle] = errno.EACCES
    async with world.started(tasks=True) as engine:
        with pytest.raises(OSError, match="Permission denied"):
            world.open("bad")
        world.broken.clear()
        await trio.sleep(5)
        assert await world.read(world.open("bad"), 0, 10**6) == b"BADba"
        await engine.flush()
    assert world.path("bad").read_bytes() == b"BADba"
