"""The disk of the lab's machines: a cut that lost nothing would test nothing, and one that lost too much would lie."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from lab.disk import SECTOR, Disk

SECTORS = 64


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with closing(Disk(tmp_path / "disk.img", 1)) as result:
        yield result


def fill(disk: Disk, byte: bytes) -> None:
    disk.write(SECTOR, byte * SECTOR * SECTORS)


def content(disk: Disk) -> list[bytes]:
    """The bytes of the filled sectors, each of which has one value."""
    data = disk.read(SECTOR, SECTOR * SECTORS)
    pieces = [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)]
    assert all(piece == piece[:1] * SECTOR for piece in pieces)
    return [piece[:1] for piece in pieces]


def test_what_was_flushed_is_kept(disk: Disk) -> None:
    fill(disk, b"a")
    disk.flush()
    for seed in range(10):
        disk.lose_power(random.Random(seed))
        assert content(disk) == [b"a"] * SECTORS
    assert disk.lost == 0


def test_what_was_not_flushed_is_read_until_the_power_goes(disk: Disk) -> None:
    fill(disk, b"a")
    disk.flush()
    fill(disk, b"b")
    assert content(disk) == [b"b"] * SECTORS
    assert disk.read(0, SECTOR) == disk.read(SECTOR * (SECTORS + 1), SECTOR) == bytes(SECTOR)


def test_a_cut_loses_none_some_or_all_of_what_was_not_flushed(disk: Disk) -> None:
    outcomes = set()
    for seed in range(20):
        fill(disk, b"a")
        disk.flush()
        fill(disk, b"b")
        before = disk.lost
        disk.lose_power(random.Random(seed))
        left = content(disk)
        assert disk.lost - before == left.count(b"a") == SECTORS - left.count(b"b")
        outcomes.add("".join(sorted({value.decode() for value in left})))
    assert outcomes == {"a", "ab", "b"}
