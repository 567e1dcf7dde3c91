"""Files are replaced by rename, moved, cut, grown, appended to and removed, and each step is synced.

Step ``n`` follows from ``n`` and from what the steps before have made, so host and guest need to exchange numbers only.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab import guest
from lab.workloads import InOrder

BLOCK = 4096
NAMES = tuple("abcdef")
_TEMPORARY = "temporary"
_MOST_BLOCKS = 12


@dataclass(frozen=True, slots=True)
class File:
    """What a file holds: for each block the step that has written it (0: none), and how many bytes of that are left."""

    blocks: tuple[tuple[int, int], ...] = ()
    size: int = 0
    """bytes; the end of the last block"""

    def content(self) -> bytes:
        return b"".join(_block(step)[:left].ljust(BLOCK, b"\0") for step, left in self.blocks)[: self.size]

    def resized(self, size: int) -> File:
        """What is cut off never comes back: it is zeros when the file grows again."""
        blocks = list(self.blocks[: -(-size // BLOCK)])
        if blocks and size < self.size:
            step, left = blocks[-1]
            blocks[-1] = step, min(left, size - (len(blocks) - 1) * BLOCK)
        blocks += [(0, 0)] * (-(-size // BLOCK) - len(blocks))
        return File(tuple(blocks), size)

    def written(self, index: int, step: int) -> File:
        """With a whole block written by a step."""
        grown = self.resized(max(self.size, (index + 1) * BLOCK))
        return File((*grown.blocks[:index], (step, BLOCK), *grown.blocks[index + 1 :]), grown.size)


State = dict[str, File]


def _block(step: int) -> bytes:
    return f"{step:016d}".encode() * (BLOCK // 16)


@dataclass(frozen=True, slots=True)
class Step:
    number: int
    kind: str
    name: str
    other: str
    chance: int

    @classmethod
    def after(cls, state: State, number: int) -> Step:
        """Chosen at random, always the same way."""
        rng = random.Random(f"names {number}")
        name, other = rng.sample(NAMES, 2)
        kind = rng.choice(["replace", "replace", "move", "cut", "cut", "grow", "write", "write", "write", "remove"])
        if name not in state or state[name].size >= _MOST_BLOCKS * BLOCK or (kind == "cut" and not state[name].size):
            kind = "replace"
        return cls(number, kind, name, other, rng.randrange(1 << 20))

    def apply(self, state: State) -> State:
        """What is there after this step."""
        if self.kind in ("move", "remove"):
            rest = {name: file for name, file in state.items() if name != self.name}
            return rest if self.kind == "remove" else rest | {self.other: state[self.name]}
        return state | {self.name: self._made_of(state.get(self.name, File()))}

    def _made_of(self, file: File) -> File:
        match self.kind:
            case "replace":
                count = 1 + self.chance % 4
                return File(((self.number, BLOCK),) * count, count * BLOCK)
            case "cut":
                return file.resized(self.chance % file.size)
            case "grow":
                return file.resized(file.size + 1 + self.chance % (2 * BLOCK))
            case "write":
                return file.written(self._index(file), self.number)
        raise AssertionError(self.kind)

    def _index(self, file: File) -> int:
        """Which block "write" writes: one of the file, or the one behind its end. Never two: they may be torn apart."""
        return self.chance % (len(file.blocks) + 1)

    def do(self, root: Path, state: State) -> None:
        """Really, and durably."""
        path = root / self.name
        if self.kind in ("move", "remove"):
            os.rename(path, root / self.other) if self.kind == "move" else os.unlink(path)
            guest.sync(root)
            return
        before = state.get(self.name, File())
        after = self._made_of(before)
        match self.kind:
            case "replace":
                _change(root / _TEMPORARY, lambda fd: os.pwrite(fd, after.content(), 0), os.O_CREAT | os.O_TRUNC)
                os.rename(root / _TEMPORARY, path)
                guest.sync(root)
            case "cut" | "grow":
                _change(path, lambda fd: os.ftruncate(fd, after.size))
            case "write":
                _change(path, lambda fd: os.pwrite(fd, _block(self.number), self._index(before) * BLOCK))


def _change(path: Path, change: Callable[[int], object], flags: int = 0) -> None:
    fd = os.open(path, os.O_RDWR | flags)
    try:
        change(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def state_after(number: int) -> State:
    state: State = {}
    for each in range(1, number + 1):
        state = Step.after(state, each).apply(state)
    return state


# The last step.
Oracle = InOrder


def set_up(root: Path) -> None:
    pass


def load(root: Path, told: int, say: Callable[..., None]) -> None:
    number = told
    state = state_after(number)
    while True:
        number += 1
        step = Step.after(state, number)
        step.do(root, state)
        state = step.apply(state)
        say(number)


def check(root: Path, told: int) -> int:
    """Returns after which step this is: the one that was acknowledged last, or the next."""
    found = {entry.name: Path(entry).read_bytes() for entry in os.scandir(root) if entry.name != _TEMPORARY}
    before = state_after(told)
    step = Step.after(before, told + 1)
    after = step.apply(before)
    for number, state in ((told, before), (told + 1, after)):
        if found == {name: file.content() for name, file in state.items()}:
            return number
    wrong = {name: (len(found[name]), found[name][:16].decode()) for name in found}
    raise AssertionError(f"neither {before} nor, after {step}, {after}, but {wrong}")
