"""Damaged media in the simulator: one bit of the pool is another. What is lost is told, nothing else changes (P5)."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable

import pytest
from sim.campaign import images_after
from sim.crash import Image
from sim.media import BLOCK
from sim.workloads import HALF
from sim.world import Findings, Setting, examine, new_image, record, simulate

from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.ports import Durability, SlotState

SETTINGS = (Setting(slots=8), Setting(slots=8, durability=Durability.DISK))
STATES = {int(state) * 0x55: state for state in SlotState}


async def everything_arrived(setting: Setting) -> Image:
    """A pool with clean, dirty and free slots: a's block 1 is dirty, the others clean; all of b is dirty."""
    steps = [
        ("write", "a", 0, 3 * BLOCK),
        ("flush",),
        ("write", "a", BLOCK, BLOCK),
        ("write", "b", 0, BLOCK + HALF),
        ("fsync", "a"),
        ("fsync", "b"),
    ]
    trace = await record(new_image(setting), setting, steps)
    return images_after(trace, random.Random(0), 2)[1]


def flipped(image: Image, offset: int, bit: int) -> Image:
    content = bytearray(image.pool.content)
    content[offset] ^= 1 << bit
    return image._replace(pool=image.pool._replace(content=bytes(content)))


def freed(image: Image, slot: int) -> Image:
    content = bytearray(image.pool.content)
    content[slot * HEADER_SIZE : slot * HEADER_SIZE + 8] = bytes(8)
    return image._replace(pool=image.pool._replace(content=bytes(content)))


def header(image: Image, slot: int) -> tuple[SlotState, str, int]:
    """State, name of the file and block."""
    w0, _, file_id, block = struct.unpack_from("<4Q", image.pool.content, slot * HEADER_SIZE)
    return STATES[w0 >> 56], "?ab"[file_id], block


def with_zeros(contents: dict[str, bytes], name: str, block: int) -> dict[str, bytes]:
    content = contents[name]
    part = slice(block * BLOCK, min((block + 1) * BLOCK, len(content)))
    return {**contents, name: content[: part.start] + bytes(part.stop - part.start) + content[part.stop :]}


async def look(image: Image, setting: Setting) -> Findings:
    return await examine(image, setting, None, drain=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.durability.value)
def test_a_changed_bit_of_data_loses_its_block_and_nothing_else(
    setting: Setting, expect_logs: Callable[..., None]
) -> None:
    expect_logs("failed its checksum: dropped|data in the cache is damaged, the block is lost")
    seen: list[SlotState] = []

    async def run() -> None:
        image = await everything_arrived(setting)
        whole = await look(image, setting)
        rng = random.Random(1)
        for slot, _ in itertools.product(range(setting.slots), range(4)):
            state, name, block = header(image, slot)
            at = setting.slots * HEADER_SIZE + slot * BLOCK + rng.randrange(BLOCK)
            found = await look(flipped(image, at, rng.randrange(8)), setting)
            seen.append(state)
            if state is not SlotState.DIRTY:
                assert (found.contents, found.lost, found.told, found.quarantined) == (whole.contents, {}, [], 0)
                continue
            assert found.lost == {name: {block}}
            assert found.contents == with_zeros(whole.contents, name, block)
            assert found.told == [(name, block * BLOCK, min((block + 1) * BLOCK, len(whole.contents[name])))]
            assert found.quarantined == 1

    simulate(run)
    assert {state: seen.count(state) // 4 for state in (SlotState.CLEAN, SlotState.DIRTY)} == {
        SlotState.CLEAN: 2,
        SlotState.DIRTY: 3,
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.durability.value)
def test_a_changed_bit_of_a_header_sets_its_slot_aside_and_changes_nothing_else(
    setting: Setting, expect_logs: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows what such a slot held: its file is as if the slot were not there, and that is told."""
    expect_logs("1 damaged headers: their slots are set aside|not in the backing any more: created again")

    async def run() -> int:
        image = await everything_arrived(setting)
        whole, aside = await look(image, setting), 0
        rng = random.Random(1)
        for slot in range(setting.slots):
            state, _, _ = header(image, slot)
            without = await look(freed(image, slot), setting)
            for byte in range(HEADER_SIZE):
                caplog.clear()
                found = await look(flipped(image, slot * HEADER_SIZE + byte, rng.randrange(8)), setting)
                if state is SlotState.FREE and byte != 7:  # of a free header only the state matters
                    assert (found.contents, found.quarantined) == (whole.contents, 0)
                    assert not caplog.records
                    continue
                assert found.contents == without.contents
                assert not found.lost
                assert found.quarantined == 1
                assert "1 damaged headers" in caplog.text
                aside += 1
        return aside

    # Five live slots, and three free ones of which only the state byte matters.
    assert simulate(run) == 5 * HEADER_SIZE + 3
