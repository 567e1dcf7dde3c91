"""Four writers of single blocks of one file, half of them direct. Every block is one version, as a whole."""

from __future__ import annotations

import mmap
import os
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lab.workloads import all_at_once

BLOCK = 4096
BLOCKS = 2048
WRITERS = 4  # each with every fourth block
_SECTOR = 512
_STAMP = struct.Struct("<QQQ")  # block, version, sector


class Oracle:
    """Per block a version, and 0 for none.

    Versions of one writer grow: one that was not acknowledged is the only one above the last that was.
    """

    def __init__(self, rng: random.Random) -> None:
        self.acknowledged = 0
        self._rng = rng
        self._versions = [0] * BLOCKS
        self._last = [0] * WRITERS

    def hear(self, *words: int) -> None:
        block, version = words
        assert version > self._last[block % WRITERS]
        self._versions[block] = self._last[block % WRITERS] = version
        self.acknowledged += 1

    def told(self) -> list[list[int]]:
        return [self._versions, self._last, [self._rng.getrandbits(32)]]

    def settle(self, found: dict[str, int]) -> None:
        for block, version in found.items():
            self._versions[int(block)] = version
            self._last[int(block) % WRITERS] = version


def set_up(root: Path) -> None:
    # Of a new file only fsync makes the name durable.
    fd = os.open(root / "file", os.O_RDWR | os.O_CREAT)
    os.fsync(fd)
    os.close(fd)


def load(root: Path, told: list[list[int]], say: Callable[..., None]) -> None:
    _, last, (seed,) = told

    def writer(number: int) -> None:
        rng = random.Random(seed + number)
        memory = mmap.mmap(-1, BLOCK)
        fd = os.open(root / "file", os.O_RDWR | (os.O_DIRECT if number % 2 else 0))
        version = last[number]
        while True:
            version += 1
            block = rng.randrange(number, BLOCKS, WRITERS)
            memory[:] = content(block, version)
            assert os.pwritev(fd, [memory], block * BLOCK) == BLOCK
            say(block, version)

    all_at_once(*(partial(writer, number) for number in range(WRITERS)))


def content(block: int, version: int) -> bytes:
    """What a version of a block consists of: words that tell block, version and place."""
    return b"".join((_STAMP.pack(block, version, sector) * 22)[:_SECTOR] for sector in range(BLOCK // _SECTOR))


def check(root: Path, told: list[list[int]]) -> dict[int, int]:
    """Returns what is newer than acknowledged: at most one block of each writer."""
    versions, last, _ = told
    found = versions_in(root / "file")
    ahead = {block: version for block, version in enumerate(found) if version != versions[block]}
    for block, version in ahead.items():
        assert version > last[block % WRITERS], f"block {block}: version {version} instead of {versions[block]}"
    assert len({block % WRITERS for block in ahead}) == len(ahead), ahead
    return ahead


def versions_in(path: Path) -> list[int]:
    """The versions of all blocks of a file. Every block is one version as a whole, or zeros."""
    data = path.read_bytes()
    assert len(data) % BLOCK == 0
    found = [0] * BLOCKS
    for block in range(len(data) // BLOCK):
        piece = data[block * BLOCK : (block + 1) * BLOCK]
        if any(piece):
            found[block] = _STAMP.unpack_from(piece)[1]
            assert piece == content(block, found[block]), f"block {block} is no version of itself"
    return found
