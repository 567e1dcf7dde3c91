"""What may be found after a crash, as far as users were told: the oracle of the simulator.

Every 8-byte word that is written names its file, the write and its place, so whatever turns up where it does not belong
says where it comes from. The oracle knows nothing of how the cache works: it hears of operations when they begin and
when they are acknowledged.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from cachefsd.media.ports import Durability
from sim.backing import LOST_FOUND, FsState
from sim.log import Violation
from sim.media import BLOCK

WORD = struct.Struct("<HHI")  # file, write, word of the file


def words(token: int, version: int, offset: int, size: int) -> bytes:
    """What write number ``version`` stores in ``size`` bytes of file ``token`` at ``offset``: words of 8 bytes."""
    first, last = offset // 8, (offset + size + 7) // 8
    data = b"".join(WORD.pack(token, version, word) for word in range(first, last))
    return data[offset - first * 8 :][:size]


def overwritten(content: bytes, offset: int, data: bytes) -> bytes:
    """``content`` with ``data`` written at ``offset``."""
    return content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]


def token_of(content: bytes) -> int:
    """Which file the first word that is not zero belongs to; 0 if there is none."""
    for at in range(0, len(content) - 7, 8):
        token, _, _ = WORD.unpack_from(content, at)
        if token:
            return int(token)
    return 0


def tell(data: bytes) -> str:
    """Content for people: runs of (file, write), Z for zeros."""
    seen: list[str] = []
    for at in range(0, len(data), 8):
        word = data[at : at + 8]
        if not word.strip(b"\0"):
            text = "Z"
        elif len(word) < 8:
            text = word.hex()
        else:
            token, version, place = WORD.unpack(word)
            text = f"{token}.{version}" + ("" if place == at // 8 else f"@{place}")
        if seen and seen[-1].split("*")[0] == text:
            count = int(seen[-1].partition("*")[2] or 1)
            seen[-1] = f"{text}*{count + 1}"
        else:
            seen.append(text)
    return f"{len(data)}[{' '.join(seen)}]"


class File(NamedTuple):
    """What is known of one file; never changed, but replaced.

    ``contents``: what it may hold, the newest last; in class ``disk`` all since the last fsync, else one.
    ``pending``: what it holds when the operation under way is done. ``mtimes`` likewise; empty: not known.
    ``names``: where it may be found, None: nowhere. ``name``: where it is, as far as acknowledged.
    """

    token: int
    ino: int
    name: str | None
    names: frozenset[str | None]
    contents: tuple[bytes, ...] = (b"",)
    pending: bytes | None = None
    mtimes: frozenset[int] = frozenset()
    going: bool = False
    """its last name is being removed"""
    lost: frozenset[int] = frozenset()
    """blocks whose loss must be reported, or may be, because a fault was injected"""
    either: tuple[File, ...] = ()
    """While operations overlap: the file is one of these. Their contents count, those of this one do not."""

    @property
    def content(self) -> bytes:
        """What users see."""
        return self.contents[-1]


Model = dict[int, File]
"""by token"""


def check_file(file: File, found: bytes, damaged: frozenset[int] = frozenset()) -> None:
    """Content and size of a file after a crash. ``damaged``: blocks that read as EIO, zeros in ``found``.

    :raises Violation:
    """
    if file.either:
        _check_either(file.either, found, damaged)
        return
    if file.pending is not None and len(file.pending) < len(file.content) and not file.lost:
        # A truncate is there or not: it never cuts a part of what it has to cut.
        size = len(file.pending)
        cut = dict.fromkeys(content[:size].ljust(size, b"\0") for content in file.contents)
        whole = file._replace(pending=None)
        _check_either((whole, whole._replace(contents=(*cut, file.pending))), found, damaged)
        return
    states = [*file.contents, *([file.pending] if file.pending is not None else [])]
    if damaged - file.lost:
        raise Violation(
            f"file {file.token}: blocks {sorted(damaged - file.lost)} are reported lost, and nothing was damaged"
        )
    if found in states and not damaged:
        return
    sizes = [len(state) for state in states]
    size = len(found)
    if size not in sizes and not (min(sizes) < size < max(sizes) and size % BLOCK == 0):
        raise Violation(f"file {file.token}: {tell(found)} has a size that it never had; may be {_tell_all(states)}")
    wholes = [content.ljust(size, b"\0") for content in file.contents]
    if file.pending is not None:
        # What is cut off goes with the size: zeros in its place are neither before nor after.
        cut = len(file.pending) < len(file.content)
        wholes.append(file.pending if cut else file.pending.ljust(size, b"\0"))
    for block in range((size + BLOCK - 1) // BLOCK):
        part = slice(block * BLOCK, min((block + 1) * BLOCK, size))
        if block not in damaged and not any(found[part] == whole[part] for whole in wholes):
            raise Violation(
                f"file {file.token}, block {block}: {tell(found[part])} in {tell(found)}; may be {_tell_all(states)}"
            )


def _check_either(files: Iterable[File], found: bytes, damaged: frozenset[int]) -> None:
    told: Violation | None = None
    for file in files:
        try:
            check_file(file, found, damaged)
            return
        except Violation as violation:
            told = violation
    assert told is not None
    raise told


def _tell_all(states: list[bytes]) -> str:
    return " or ".join(tell(state) for state in states)


def newest_version(model: Model) -> int:
    """The number of the last write that any content comes from."""
    contents = [content for file in model.values() for content in file.contents]
    words = (WORD.unpack_from(content, at) for content in contents for at in range(0, len(content) - 7, 8))
    return max((version for _, version, _ in words), default=0)


def must_exist(file: File) -> bool:
    """Whether the file may not be missing after a crash: it has data, and nobody removes it."""
    if file.either:
        return all(must_exist(one) for one in file.either)
    if None not in file.names:
        return True
    if file.name is None or file.going:
        return False
    states = [*file.contents, *([file.pending] if file.pending is not None else [])]
    return all(content.strip(b"\0") for content in states)


def check_names(model: Model, before: FsState, names: dict[str, int], contents: dict[int, bytes]) -> dict[int, int]:
    """Where files are after a crash; token → inode number of each that is there.

    ``before``: the backing as the crash has left it, ``names`` and ``contents`` (by inode number): as recovery has it.

    :raises Violation:
    """
    places: dict[int, set[str]] = {}
    for name, ino in names.items():
        places.setdefault(ino, set()).add(name)
    by_ino = {file.ino: file for file in model.values()}
    found: dict[int, int] = {}
    for ino, where in places.items():
        file = by_ino.get(ino)
        if file is None:
            file = model.get(token_of(contents[ino]))
            if file is None:
                if contents[ino].strip(b"\0"):
                    raise Violation(f"{sorted(where)} is nobody's file: {tell(contents[ino])}")
                continue  # an empty file that was created again: its content may have been cut
            if file.ino in before.inodes:
                raise Violation(f"{sorted(where)} has the content of file {file.token}, which is still there")
        elif token_of(contents[ino]) not in (0, file.token):
            raise Violation(f"file {file.token} holds another file's data: {tell(contents[ino])}")
        if file.token in found:
            raise Violation(f"file {file.token} is there twice")
        found[file.token] = ino
        recreated = ino != file.ino
        for name in where:
            if name not in file.names and not (recreated and name.startswith(LOST_FOUND)):
                raise Violation(f"file {file.token} is at {name!r}, may be at {sorted(map(str, file.names))}")
    for file in model.values():
        if file.token not in found and must_exist(file):
            raise Violation(f"file {file.token} is gone, with {_tell_all(list(file.contents))}")
    return found


def either_time(one: frozenset[int], other: frozenset[int]) -> frozenset[int]:
    """One of these times, or any where one is not known."""
    return one | other if one and other else frozenset()


class Effect(NamedTuple):
    """What an operation makes of a file."""

    done: Callable[[File], File]
    """the file after it is acknowledged; its mtime is any number that no other operation has"""
    pending: Callable[[bytes], bytes] | None = None
    """the content after it, of an operation that changes that"""


class Overlap:
    """Operations on one file that overlap: it is as if they had come one after the other, in any order in which none
    comes before one that was over when it began."""

    def __init__(self, file: File, effects: list[Effect]) -> None:
        self._file = file
        self._effects = effects
        self._begun: dict[int, frozenset[int]] = {}
        """by index of what has begun: what was over then"""
        self._over: set[int] = set()

    def begin(self, index: int) -> File:
        """What the file may be from now on: the operation has begun."""
        self._begun[index] = frozenset(self._over)
        return self.now()

    def end(self, index: int) -> File:
        """What the file may be from now on: the operation is acknowledged."""
        self._over.add(index)
        return self.now()

    def now(self) -> File:
        """What the file may be after a crash now."""
        found: dict[File, None] = {}
        for order in self._orders():
            file = self._after(order)
            found[file] = None
            for index in self._begun.keys() - set(order):
                pending = self._effects[index].pending
                if pending is not None:
                    found[file._replace(pending=pending(file.content))] = None
        return self._file._replace(either=tuple(found), mtimes=frozenset())

    def ended(self, seen: bytes, mtime: int) -> File:
        """What the file is once all are over, and users see ``seen``.

        :raises Violation: in no order they come to that.
        """
        possible = [self._after(order) for order in self._orders()]
        contents: dict[bytes, None] = {}
        for file in possible:
            if file.content == seen:
                contents.update(dict.fromkeys(file.contents))
        if not contents:
            raise Violation(
                f"file {self._file.token}: {tell(seen)} after operations that overlapped; may be "
                + _tell_all([file.content for file in possible])
            )
        del contents[seen]
        known = all(len(file.mtimes) == 1 for file in possible)
        return self._file._replace(contents=(*contents, seen), mtimes=frozenset({mtime} if known else ()))

    def broken(self) -> File:
        """The file if of all that has begun anything may have happened."""
        states: dict[bytes, None] = {}
        for file in self.now().either:
            states |= dict.fromkeys(file.contents if file.pending is None else (*file.contents, file.pending))
        return self._file._replace(contents=tuple(states), mtimes=frozenset())

    def _orders(self) -> Iterator[tuple[int, ...]]:
        for count in range(len(self._over), len(self._begun) + 1):
            for order in itertools.permutations(sorted(self._begun), count):
                if self._over <= set(order) and all(
                    self._begun[later].isdisjoint(order[place:]) for place, later in enumerate(order)
                ):
                    yield order

    def _after(self, order: tuple[int, ...]) -> File:
        file = self._file
        for index in order:
            file = self._effects[index].done(file)
        return file


class Oracle:
    """Hears of operations, and keeps what could be found at every moment of the record."""

    def __init__(self, durability: Durability, model: Model | None = None, *, sync_writes: bool = False) -> None:
        self._forgetful = durability is Durability.DISK and not sync_writes
        self.model: Model = dict(model or {})
        self.history: list[tuple[int, Model]] = [(0, dict(self.model))]
        """(event number, the model from then on)"""

    def at(self, number: int) -> Model:
        """The model when ``number`` events had happened."""
        low, high = 0, len(self.history)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.history[middle][0] <= number else (low, middle)
        return self.history[low][1]

    def note(self, number: int, *files: File) -> None:
        """From event ``number`` on these files are as given."""
        for file in files:
            self.model[file.token] = file
        self.history.append((number, dict(self.model)))

    def written(self, file: File, offset: int, data: bytes, mtime: int) -> File:
        """``file`` after a write is acknowledged."""
        if self._forgetful:
            return self.acknowledged(file, overwritten(file.content, offset, data), mtime)
        # A size that was not durable before is no more so now, unless the write reaches there.
        contents = tuple(dict.fromkeys(overwritten(content, offset, data) for content in file.contents))
        return self.acknowledged(file, contents[-1], mtime)._replace(contents=contents)

    def truncated(self, file: File, size: int, mtime: int) -> File:
        """``file`` after a truncate is acknowledged."""
        after = file.content[:size].ljust(size, b"\0")
        now = self.acknowledged(file, after, mtime)
        if size >= len(file.content):
            # Nothing but an fsync makes a size durable that no data asks for.
            return now._replace(contents=(*file.contents, after), mtimes=either_time(file.mtimes, now.mtimes))
        # The cut is durable; which version of what it leaves is there is as open as before.
        cut = {content[:size].ljust(size, b"\0") for content in file.contents} - {after}
        return now._replace(contents=(*sorted(cut), after))

    def broken_off(self, file: File, now: bytes) -> File:
        """``file`` after an operation was broken off that has left it as ``now``."""
        last = (len(now.rstrip(b"\0")) + 7) // 8 * 8
        # A size that was not durable before is no more so now, but for what has data.
        sizes = {} if self._forgetful else dict.fromkeys(now[: max(last, len(content))] for content in file.contents)
        found = self.acknowledged(file, now, 0)
        return found._replace(contents=(*(size for size in sizes if size != now), *found.contents), mtimes=frozenset())

    def acknowledged(self, file: File, content: bytes, mtime: int, **changes: Any) -> File:
        """``file`` after an operation that changed its content is acknowledged."""
        contents = (*file.contents, content) if self._forgetful else (content,)
        # Where writes are forgotten the backing may have the time of the writeback that a crash has met.
        mtimes: frozenset[int] = frozenset() if self._forgetful else frozenset({mtime})
        return file._replace(contents=contents, pending=None, mtimes=mtimes, **changes)
