"""The backing of the simulator: a flat directory of regular files on a file system that promises what POSIX does.

What was written, truncated or named is seen at once and durable only after a sync; a crash keeps any part of the rest
(``sim/crash.py`` decides). A sync can fail: the error is reported once, and what it should have made durable counts
as clean afterwards, as Linux has it. All calls take virtual time.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import trio
from support_faults import write_in_steps

from cachefsd.backing.ports import BackingFile, BackingStat, LostFile, Place, Run, SmallWrite, Space
from cachefsd.times import KeptTimes
from sim import log as events
from sim.log import Log
from sim.media import BLOCK

ROOT_HANDLE = b"root"
LOST_FOUND = "lost+found.cachefsd/"
MAX_SIZE = 1 << 40


class Inode(NamedTuple):
    """A regular file as it is on the media or in memory; never changed, but replaced."""

    content: bytes = b""
    mtime_ns: int = 0
    ctime_ns: int = 0


class FsState(NamedTuple):
    """Names and inodes; an inode without a name is gone after a crash."""

    names: dict[str, int]
    inodes: dict[int, Inode]
    next_ino: int = 1
    clock: int = 0

    def key(self) -> tuple[Any, ...]:
        """The same for equal states."""
        return tuple(sorted(self.names.items())), tuple(sorted(self.inodes.items()))


EMPTY_FS = FsState({}, {})


def handle_of(ino: int) -> bytes:
    """Inode numbers are never used again here: the handle of a file that is gone is stale for ever."""
    return b"%d" % ino


# ---- operations, as they are recorded and applied: in memory at once, on the media when and if they arrive


def apply(inodes: dict[int, Inode], names: dict[str, int], operation: tuple[Any, ...]) -> None:
    """Do one recorded operation. One that does not fit (what it builds on was lost) does nothing."""
    kind = operation[0]
    if kind == "create":
        _, name, ino, inode = operation
        if name not in names:
            names[name] = ino
            inodes.setdefault(ino, inode)
    elif kind == "unlink":
        _, name, ino = operation
        if names.get(name) == ino:
            del names[name]
    elif kind == "rename":
        _, old, new, ino = operation
        if names.get(old) == ino:
            del names[old]
            names[new] = ino
    else:
        _apply_to_inode(inodes, operation)


def _apply_to_inode(inodes: dict[int, Inode], operation: tuple[Any, ...]) -> None:
    kind, ino = operation[0], operation[1]
    inode = inodes.get(ino)
    if inode is None:
        return
    if kind == "data":  # of one block
        _, _, offset, data = operation
        content = inode.content.ljust(offset, b"\0")
        inodes[ino] = inode._replace(content=content[:offset] + data + content[offset + len(data) :])
    elif kind == "extend":
        _, _, size, ctime = operation
        content = inode.content.ljust(size, b"\0")
        inodes[ino] = Inode(content, ctime, ctime)
    elif kind == "truncate":
        _, _, size, ctime = operation
        inodes[ino] = Inode(inode.content[:size].ljust(size, b"\0"), ctime, ctime)
    elif kind == "mtime":
        _, _, mtime, ctime = operation
        inodes[ino] = inode._replace(mtime_ns=mtime, ctime_ns=ctime)
    else:
        raise AssertionError(kind)


class Faults:
    """Which calls fail. ``at[name] = (n, errno, times)``: from the n-th call on, so many times."""

    def __init__(self, log: Log) -> None:
        self.at: dict[str, tuple[int, int, int]] = {}
        self.calls: Counter[str] = Counter()
        self._log = log

    def check(self, name: str) -> None:
        for key in (name, "any"):
            self.calls[key] += 1
            if key in self.at:
                first, number, times = self.at[key]
                if first <= self.calls[key] < first + times:
                    self._log.add(events.FAULT, name)
                    raise OSError(number, os.strerror(number))


class SimFs:
    """The live file system, and its record."""

    def __init__(self, log: Log, state: FsState, rng: random.Random, *, hasty: bool = False) -> None:
        self.names = dict(state.names)
        self.inodes = dict(state.inodes)
        self.next_ino = state.next_ino
        self.clock = state.clock
        self.log = log
        self.rng = rng
        self.faults = Faults(log)
        self.holders: Counter[int] = Counter()
        """open descriptors: they keep inodes without names"""
        self.opened: dict[SimFile, None] = {}
        self.left: Callable[[int], bytes] = lambda ino: self.inodes[ino].content
        """What is left of an inode's content after a failed sync"""
        self._hasty = hasty

    def tick(self) -> int:
        self.clock += 1
        return 1_700_000_000_000_000_000 + self.clock

    def do(self, *operation: Any) -> None:
        apply(self.inodes, self.names, operation)
        self.log.add(events.BACKING, operation)

    def links(self, ino: int) -> int:
        return sum(other == ino for other in self.names.values())

    def new_ino(self) -> int:
        """The number of a file that has no name yet: a crash takes it."""
        self.next_ino += 1
        return self.next_ino - 1

    def create(self, name: str, ino: int | None = None, content: bytes = b"") -> int:
        assert name not in self.names
        if ino is None:
            ino = self.new_ino()
        now = self.tick()
        self.do("create", name, ino, Inode(content, now, now))
        return ino

    async def sync_directory(self) -> None:
        """fsync of the directory: names come and gone before it are durable."""
        await self.pause()
        mark = len(self.log.events)
        await self.pause()
        self.faults.check("sync_directory")
        self.log.add(events.BACKING, ("sync_names", mark))

    async def pause(self) -> None:
        """Let virtual time pass: what else is ready comes first, or not."""
        if self._hasty:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(self.rng.random())


class SimFile:
    """A :class:`cachefsd.backing.ports.BackingFile`."""

    direct = True
    max_size = MAX_SIZE

    def __init__(self, fs: SimFs, handle: bytes) -> None:
        self.fs = fs
        self.handle = handle
        self.ino = int(handle)
        self.writable = False
        self.untold = False
        """A sync of everything has lost some of its data, and it has not been told yet."""
        self.sync_failures = self.direct_bytes = self.bounced_bytes = 0
        self._open = False

    async def open(self, *, write: bool) -> None:
        if self._open and (self.writable or not write):
            return
        await self.fs.pause()
        self.fs.faults.check("open")
        if not self.fs.links(self.ino) and not self.fs.holders[self.ino]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if not self._open:
            self.fs.holders[self.ino] += 1
            self.fs.opened[self] = None
        self._open = True
        self.writable = self.writable or write

    def _inode(self) -> Inode:
        if not self._open:
            raise OSError(errno.EBADF, "not open")
        return self.fs.inodes[self.ino]

    async def read(self, offset: int, views: Sequence[memoryview]) -> int:
        assert offset % BLOCK == 0
        self._inode()
        await self.fs.pause()
        self.fs.faults.check("read")
        done = 0
        for view in views:
            piece = self._inode().content[offset + done : offset + done + len(view)]
            view[: len(piece)] = piece
            done += len(piece)
            if len(piece) < len(view):
                break
        await self.fs.pause()
        self.direct_bytes += done
        return done

    async def write_runs(self, memory: memoryview, runs: Sequence[Run]) -> None:
        assert not any(offset % BLOCK for offset, _ in runs)
        views = [[memory[at * BLOCK : (at + 1) * BLOCK] for at in run.places.tolist()] for run in runs]
        self.direct_bytes += await self._write([(run.offset, part) for run, part in zip(runs, views, strict=True)])

    async def write_tail(self, offset: int, data: memoryview) -> None:
        self.bounced_bytes += await self._write([(offset, [data])])

    async def _write(self, runs: Sequence[tuple[int, list[memoryview]]]) -> int:
        """How many bytes were written; the error of the first that failed is raised when the others are there."""
        self._inode()
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await self.fs.pause()
            # Block by block, and half of them later: whatever is in the slots then goes to the disk.
            pieces: list[tuple[int, memoryview]] = []
            failure: OSError | None = None
            for offset, views in runs:
                try:
                    self.fs.faults.check("write")
                except OSError as error:
                    failure = failure or error
                    continue
                for view in views:
                    for start in range(0, len(view), BLOCK):
                        pieces.append((offset, view[start : start + BLOCK]))
                        offset += len(pieces[-1][1])
            later = [piece for piece in pieces if self.fs.rng.random() < 0.5]
            self._write_now([piece for piece in pieces if piece not in later])
            await self.fs.pause()
            self._write_now(later)
        if failure is not None:
            raise failure
        return sum(len(view) for _, view in pieces)

    def _write_now(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        for offset, view in pieces:
            end, data = offset + len(view), bytes(view)
            # Size and times are metadata and take their own way: they may arrive without the data.
            self.fs.do("extend", self.ino, max(end, len(self._inode().content)), self.fs.tick())
            self.fs.do("data", self.ino, offset, data)

    async def truncate(self, size: int) -> BackingStat:
        self._inode()
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await self.fs.pause()
            self.fs.faults.check("truncate")
            self.fs.do("truncate", self.ino, size, self.fs.tick())
            await self.fs.pause()
        return self._stat()

    async def set_mtime(self, mtime_ns: int) -> None:
        self._inode()
        await self.fs.pause()
        self.fs.faults.check("set_mtime")
        self.fs.do("mtime", self.ino, mtime_ns, self.fs.tick())

    async def sync(self) -> None:
        self._inode()
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await self.fs.pause()
            mark = len(self.fs.log.events)
            await self.fs.pause()
            try:
                self.tell()
                self.fs.faults.check("sync")
            except OSError:
                self.sync_failures += 1
                self.lose(mark)
                raise
            self.fs.log.add(events.BACKING, ("sync", self.ino, mark))

    def tell(self) -> None:
        """:raises OSError: a sync of everything has failed since for this file; each descriptor is told once."""
        untold, self.untold = self.untold, False
        if untold:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def tell_of_sync_all(self) -> None:
        """As :meth:`tell`, by one who has not synced the file itself."""
        try:
            self.tell()
        except OSError:
            self.sync_failures += 1
            raise

    def lose(self, mark: int) -> bool:
        """A sync has failed: of what was written before it, some has arrived, and the rest never will. The page cache
        drops it sooner or later; here at once. Whether any was lost."""
        seed = self.fs.rng.getrandbits(32)
        self.fs.log.add(events.BACKING, ("sync_failed", self.ino, mark, seed))
        inode = self._inode()
        size = len(inode.content)
        left = self.fs.left(self.ino)[:size].ljust(size, b"\0")
        self.fs.inodes[self.ino] = inode._replace(content=left)
        return left != inode.content

    async def allocated_until(self, offset: int) -> int:
        self._inode()
        await trio.lowlevel.checkpoint()
        return offset  # it does not tell

    async def stat(self) -> BackingStat:
        self._inode()
        await self.fs.pause()
        self.fs.faults.check("stat")
        return self._stat()

    def _stat(self) -> BackingStat:
        inode = self._inode()
        return BackingStat(len(inode.content), inode.mtime_ns, inode.ctime_ns, self.fs.links(self.ino))

    def close(self) -> None:
        if self._open:
            self.fs.holders[self.ino] -= 1
            del self.fs.opened[self]
        self._open = self.writable = False


class SimBacking:
    """A :class:`cachefsd.backing.ports.Backing` that is never full."""

    overwrites_take_space = False
    most_kept_open = 1024

    def __init__(self, fs: SimFs) -> None:
        self.fs = fs
        self.times = KeptTimes.exact()

    def file(self, handle: bytes) -> SimFile:
        return SimFile(self.fs, handle)

    def scratch(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    async def space(self) -> Space:
        await trio.lowlevel.checkpoint()
        return Space(MAX_SIZE, MAX_SIZE, BLOCK)

    async def sync_all(self) -> None:
        await self.fs.pause()
        mark = len(self.fs.log.events)
        await self.fs.pause()
        try:
            self.fs.faults.check("sync_all")
        except OSError:
            # It does not say whose data it was; the descriptors of each file that was hit are told when they are asked.
            for file in list(self.fs.opened):
                if self.fs.rng.random() < 0.5 and file.lose(mark):
                    file.untold = True
            raise
        self.fs.log.add(events.BACKING, ("sync_all", mark))

    sync_all_tells_files = True

    async def write_files(
        self, memory: memoryview, waiting: deque[SmallWrite], written: list[tuple[SmallWrite, OSError | None]]
    ) -> None:
        while waiting:
            write = waiting.popleft()
            written.append((write, await write_in_steps(memory, write, write.file)))

    async def finish_files(self, files: Sequence[BackingFile], *, synced: bool) -> list[BackingStat | OSError]:
        results: list[BackingStat | OSError] = []
        for file in files:
            assert isinstance(file, SimFile)
            try:
                if synced:
                    await self.fs.pause()
                    file.tell_of_sync_all()
                else:
                    await file.sync()
                results.append(await file.stat())
            except OSError as error:
                results.append(error.with_traceback(None))
        return results

    async def recreate(self, lost: LostFile, note: Callable[[bytes, Place], Awaitable[None]]) -> None:
        await self.fs.pause()
        self.fs.faults.check("recreate")
        content = b""
        if lost.copy_of and int(lost.copy_of) in self.fs.inodes and self.fs.links(int(lost.copy_of)):
            content = self.fs.inodes[int(lost.copy_of)].content[: lost.copy_size]
        ino = self.fs.new_ino()
        wanted = self._wanted(lost)
        await note(handle_of(ino), self._place(wanted))
        await self.fs.pause()
        self.fs.faults.check("recreate")
        linked = self._wanted(lost)
        # What it holds is durable: whenever it is there, it is there with that.
        self.fs.create(linked, ino, content.ljust(lost.size, b"\0"))
        if linked != wanted:
            await note(handle_of(ino), self._place(linked))

    def _wanted(self, lost: LostFile) -> str:
        mark = "-" if lost.numbered else "."
        wanted, number = os.fsdecode(lost.name), int(lost.numbered)
        if lost.numbered:
            wanted += "-1"
        if lost.parent_handle != ROOT_HANDLE or (wanted in self.fs.names and not lost.numbered):
            wanted = LOST_FOUND + os.fsdecode(lost.fallback) + ("-1" if lost.numbered else "")
        base = wanted.removesuffix("-1") if lost.numbered else wanted
        while wanted in self.fs.names:
            number += 1
            wanted = f"{base}{mark}{number}"
        return wanted

    @staticmethod
    def _place(name: str) -> Place:
        return Place(os.fsencode(name.removeprefix(LOST_FOUND)), name.startswith(LOST_FOUND))
