"""Writers for t5_storm.py, each in a process of its own that outlives the daemon and knows what must be there.

``storm_writers.py KIND SEED`` obeys lines of JSON: ``["run", ROOT]`` works below a directory until the file system
fails, and says ``["ack"]`` after each step that was acknowledged, then ``["stopped", REASON]``. ``["check", ROOT]``
compares what is there with what was acknowledged, and says ``["checked"]``. ``["failed", TRACEBACK]`` means that
something is wrong.

Of an operation that the crash has met, each block is as before or as after it; which one, is found out by the next
check, and must then stay so. Every 8-byte word names its file, version and place.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support_sqlite import check_log, commit, connect, create_log, last_number

BLOCK = 4096
_PLACE_BITS, _VERSION_BITS = 26, 26


def image(file: int, version: int, offset: int, length: int) -> bytes:
    """What a version of a file has at ``offset``; ``file`` and ``version`` start at 1, so nothing looks like a hole."""
    first, last = offset // 8, (offset + length + 7) // 8
    words = np.arange(first, last, dtype="<u8")
    words |= np.uint64((file << _VERSION_BITS | version) << _PLACE_BITS)
    start = offset - 8 * first
    return words.tobytes()[start : start + length]


def name_of(word: bytes | bytearray) -> str:
    """For people: what a word is of."""
    number = int.from_bytes(word, "little")
    if not number:
        return "nothing"
    file, version = number >> _PLACE_BITS + _VERSION_BITS, number >> _PLACE_BITS & (1 << _VERSION_BITS) - 1
    place = number & (1 << _PLACE_BITS) - 1
    return f"file {file} version {version} byte {8 * place} (block {8 * place // BLOCK})"


@dataclass
class Write:
    """Of ``data``, at ``offset``."""

    offset: int
    data: bytes


@dataclass
class Truncate:
    size: int


Change = Write | Truncate


class Content:
    """What a file must contain: what was acknowledged, and perhaps a change that was not."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.data = bytearray()
        self.versions = 0
        self.pending: Change | None = None

    def image(self, offset: int, length: int) -> bytes:
        """Bytes of a version that there has not been."""
        self.versions += 1
        return image(self.file, self.versions, offset, length)

    def attempt(self, change: Change, call: Callable[[], Any]) -> None:
        """Make a change to the file; it is acknowledged if ``call`` returns."""
        self.pending = change
        call()
        self._apply(change)
        self.pending = None

    def _apply(self, change: Change) -> None:
        if isinstance(change, Truncate):
            del self.data[change.size :]
            self._extend(change.size)
        else:
            self._extend(change.offset)
            self.data[change.offset : change.offset + len(change.data)] = change.data

    def _extend(self, size: int) -> None:
        self.data.extend(bytes(max(0, size - len(self.data))))

    def settle(self, found: bytes, name: str) -> None:
        """Check what was found, which from now on is what must be there."""
        if found != self.data:
            if isinstance(self.pending, Truncate):
                self._apply(self.pending)
            elif self.pending is not None:
                self._settle_write(self.pending, found, name)
            self._compare(found, 0, self.data, name)
        self.pending = None

    def _settle_write(self, write: Write, found: bytes, name: str) -> None:
        end, before = write.offset + len(write.data), len(self.data)
        touched = range(write.offset // BLOCK, (end - 1) // BLOCK + 1)
        sizes = {before} | {size for block in touched if (size := min(end, (block + 1) * BLOCK)) > before}
        assert len(found) in sizes, f"{name} has {len(found)} bytes, not one of {sorted(sizes)}"
        after = Content(self.file)
        after.data = self.data[:]
        after._apply(write)
        self._extend(len(found))
        for block in touched:
            part = slice(block * BLOCK, min((block + 1) * BLOCK, len(found)))
            if found[part] == after.data[part]:
                self.data[part] = after.data[part]
            else:
                assert part.stop != len(found) or len(found) == before, f"{name} got longer without its last block"

    def _compare(self, found: bytes | bytearray, offset: int, expected: bytes | bytearray, name: str) -> None:
        if found == expected:
            return
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
        if at is None:
            raise AssertionError(f"{name} has {len(found)} bytes at {offset} instead of {len(expected)}")
        word = (offset + at) // 8 * 8 - offset
        raise AssertionError(
            f"{name} at byte {offset + at} (block {(offset + at) // BLOCK}): found {name_of(found[word : word + 8])}, "
            f"expected {name_of(expected[word : word + 8])}; {self.pending and type(self.pending).__name__}"
        )

    def verify(self, found: bytes | bytearray, offset: int, length: int, name: str) -> None:
        """Check what was read of it while nothing was pending."""
        self._compare(found, offset, self.data[offset : offset + length], name)


class Writer(ABC):
    def __init__(self, number: int, rng: random.Random) -> None:
        self.number = number
        self.rng = rng

    @abstractmethod
    def open(self, root: Path) -> None:
        """Begin to work below a directory."""

    @abstractmethod
    def step(self) -> None:
        """Do one thing; when it returns, that was acknowledged."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file system, also of one that is dead."""

    @abstractmethod
    def check(self, root: Path) -> None:
        """Look at everything that is there."""


class Blocks(Writer):
    """Overwrites random parts of one file, directly or through the page cache, and reads random parts back."""

    SIZE = 3 << 20

    def __init__(self, number: int, rng: random.Random) -> None:
        super().__init__(number, rng)
        self.name = f"blocks-{number}"
        self.content = Content(number)
        self.fds: list[int] = []

    def open(self, root: Path) -> None:
        for flags in (os.O_CREAT, os.O_DIRECT):
            self.fds.append(os.open(root / self.name, os.O_RDWR | flags, 0o600))

    def close(self) -> None:
        while self.fds:
            with contextlib.suppress(OSError):
                os.close(self.fds.pop())

    def step(self) -> None:
        rng, fd = self.rng, self.rng.choice(self.fds)
        length = rng.choice([512, BLOCK, BLOCK, BLOCK, 4 * BLOCK, 16 * BLOCK, rng.randrange(1, 6 * BLOCK)])
        unit = rng.choice([1, 512, BLOCK, BLOCK])
        offset = rng.randrange(self.SIZE - length) // unit * unit
        kind = rng.random()
        if kind < 0.2:
            self.content.verify(os.pread(fd, length, offset), offset, length, self.name)
        elif kind < 0.25:
            os.fsync(fd)
        else:
            data = self.content.image(offset, length)
            self.content.attempt(Write(offset, data), lambda: write_whole(fd, data, offset))

    def check(self, root: Path) -> None:
        path = root / self.name
        self.content.settle(path.read_bytes() if path.exists() else b"", self.name)


class Names(Writer):
    """Creates, writes, appends to, truncates, renames, links and removes files in two directories."""

    PATHS = tuple(f"{directory}/{name}" for directory in ("a", "b") for name in "uvwxyz")

    def __init__(self, number: int, rng: random.Random) -> None:
        super().__init__(number, rng)
        self.top = f"names-{number}"
        self.names: dict[str, Content] = {}
        self.pending: dict[str, Content] | None = None
        self.files = 0
        self.root = -1

    def open(self, root: Path) -> None:
        for directory in ("a", "b"):
            (root / self.top / directory).mkdir(parents=True, exist_ok=True)
        # Names are looked up from a descriptor: a path would lead to what lies beneath once the mount is gone.
        self.root = os.open(root / self.top, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        if self.root >= 0:
            with contextlib.suppress(OSError):
                os.close(self.root)
            self.root = -1

    def _rename(self, changed: dict[str, Content], call: Callable[[], Any]) -> None:
        self.pending = changed
        call()
        self.names, self.pending = changed, None

    @contextlib.contextmanager
    def _opened(self, path: str, flags: int):
        fd = os.open(path, flags, 0o600, dir_fd=self.root)
        try:
            yield fd
        finally:
            os.close(fd)

    def step(self) -> None:
        steps = [self._write] * 4 + [self._append] * 4 + [self._truncate] * 3 + [self._move] * 3
        steps += [self._unlink] * 2 + [self._link, self._rewrite, self._orphan, self._sync] + [self._read] * 2
        path = self.rng.choice(self.PATHS)
        if path not in self.names:
            self._create(path)
        self.rng.choice(steps)(path)

    def _create(self, path: str) -> None:
        self.files = self.files % 4000 + 1
        new = Content(self.files)

        def create() -> None:
            with self._opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL):
                pass

        self._rename({**self.names, path: new}, create)

    def _write(self, path: str) -> None:
        content, rng = self.names[path], self.rng
        offset = rng.randrange(min(len(content.data) + 3 * BLOCK, 50 * BLOCK))
        data = content.image(offset, rng.choice([1, 700, BLOCK, rng.randrange(1, 5 * BLOCK)]))
        with self._opened(path, os.O_WRONLY) as fd:
            content.attempt(Write(offset, data), lambda: write_whole(fd, data, offset))

    def _append(self, path: str) -> None:
        content = self.names[path]
        if len(content.data) > 60 * BLOCK:
            return
        offset = len(content.data)
        data = content.image(offset, self.rng.choice([100, BLOCK, self.rng.randrange(1, 5 * BLOCK)]))
        with self._opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            content.attempt(Write(offset, data), lambda: write_whole(fd, data, None))
            if self.rng.random() < 0.2:
                os.fsync(fd)

    def _truncate(self, path: str) -> None:
        content, rng = self.names[path], self.rng
        size = rng.choice([0, rng.randrange(len(content.data) + 1), rng.randrange(len(content.data) + 2 * BLOCK)])
        with self._opened(path, os.O_WRONLY) as fd:
            content.attempt(Truncate(size), lambda: os.ftruncate(fd, size))
            if rng.random() < 0.5:
                data = content.image(size, rng.randrange(1, 2 * BLOCK))
                content.attempt(Write(size, data), lambda: write_whole(fd, data, size))

    def _rewrite(self, path: str) -> None:
        content = self.names[path]
        opened: list[int] = []
        try:
            content.attempt(
                Truncate(0), lambda: opened.append(os.open(path, os.O_WRONLY | os.O_TRUNC, dir_fd=self.root))
            )
            data = content.image(0, self.rng.randrange(1, 6 * BLOCK))
            content.attempt(Write(0, data), lambda: write_whole(opened[0], data, 0))
        finally:
            for fd in opened:
                os.close(fd)

    def _move(self, path: str) -> None:
        new = self.rng.choice(self.PATHS)
        changed = dict(self.names)
        if changed.get(new) is not changed[path]:  # between two names of one file rename(2) does nothing
            changed[new] = changed.pop(path)
        self._rename(changed, lambda: os.rename(path, new, src_dir_fd=self.root, dst_dir_fd=self.root))

    def _unlink(self, path: str) -> None:
        changed = {name: content for name, content in self.names.items() if name != path}
        self._rename(changed, lambda: os.unlink(path, dir_fd=self.root))

    def _link(self, path: str) -> None:
        new = self.rng.choice(self.PATHS)
        if new not in self.names:
            changed = {**self.names, new: self.names[path]}
            self._rename(changed, lambda: os.link(path, new, src_dir_fd=self.root, dst_dir_fd=self.root))

    def _orphan(self, path: str) -> None:
        """The file goes on without its last name."""
        content = self.names[path]
        with self._opened(path, os.O_RDWR) as fd:
            self._unlink(path)
            offset = self.rng.randrange(len(content.data) + 1)
            data = content.image(offset, 3000)
            content.attempt(Write(offset, data), lambda: write_whole(fd, data, offset))
            content.verify(os.pread(fd, len(content.data), 0), 0, len(content.data), f"{path}, unlinked")

    def _sync(self, path: str) -> None:
        with self._opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)

    def _read(self, path: str) -> None:
        content = self.names[path]
        with self._opened(path, os.O_RDONLY | self.rng.choice([0, os.O_DIRECT])) as fd:
            content.verify(os.pread(fd, len(content.data) + 1, 0), 0, len(content.data), path)

    def check(self, root: Path) -> None:
        top = root / self.top
        found = {os.fspath(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir()}
        if self.pending is not None and found == set(self.pending):
            self.names = self.pending
        self.pending = None
        assert found == set(self.names), f"found {sorted(found)}, expected {sorted(self.names)}"
        inodes: dict[int, Content] = {}
        for path, content in self.names.items():
            assert inodes.setdefault((top / path).stat().st_ino, content) is content, f"{path} is another file's link"
            content.settle((top / path).read_bytes(), path)


class Database(Writer):
    """Commits to SQLite."""

    journal = ""

    def __init__(self, number: int, rng: random.Random) -> None:
        super().__init__(number, rng)
        self.name = f"database-{number}"
        self.commits = 0
        self.created = False
        self.connection: sqlite3.Connection | None = None

    def open(self, root: Path) -> None:
        if not self.created:
            for left in root.glob(f"{self.name}*"):
                left.unlink()
            create_log(root / self.name, self.journal)
            self.created = True
        self.connection = connect(root / self.name)
        assert last_number(self.connection) == self.commits

    def close(self) -> None:
        if self.connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self.connection.close()
            self.connection = None

    def step(self) -> None:
        assert self.connection is not None
        commit(self.connection, self.commits + 1)
        self.commits += 1

    def check(self, root: Path) -> None:
        if not self.created:
            return
        if os.path.ismount(root):
            self.commits = check_log(root / self.name, self.commits)
            return
        # SQLite repairs what it opens: the backing itself is left as it is.
        with tempfile.TemporaryDirectory() as copies:
            for path in root.glob(f"{self.name}*"):
                shutil.copy(path, copies)
            assert check_log(Path(copies) / self.name, self.commits) == self.commits


class Wal(Database):
    journal = "wal"


class Rollback(Database):
    journal = "delete"


KINDS: dict[str, type[Writer]] = {"blocks": Blocks, "names": Names, "wal": Wal, "rollback": Rollback}


def write_whole(fd: int, data: bytes, offset: int | None) -> None:
    """Write all of it; at the end of the file if there is no offset."""
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:]) if offset is None else os.pwrite(fd, data[done:], offset + done)


def say(*words: str) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def obey(writer: Writer, word: str, root: Path) -> None:
    if word == "check":
        writer.check(root)
        say("checked")
        return
    try:
        writer.open(root)
        while True:
            writer.step()
            say("ack")
    except (OSError, sqlite3.Error) as error:
        say("stopped", f"{type(error).__name__}: {error}")
    finally:
        writer.close()


def main() -> None:
    kind, number, seed = sys.argv[1:]
    writer = KINDS[kind](int(number), random.Random(seed))
    for line in sys.stdin:
        word, root = json.loads(line)
        try:
            obey(writer, word, Path(root))
        except BaseException:
            say("failed", traceback.format_exc())


if __name__ == "__main__":
    main()
