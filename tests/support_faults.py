"""A backing that fails on request: a thin layer over the real one."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence

import trio

from cachefsd.backing.ports import BackingStat, Run, SmallWrite, Space


class Faults:
    """Which calls fail. ``fail["write"] = errno.EIO`` fails every write until the entry is removed;
    ``fail_at["sync"] = (3, errno.EIO)`` only the third from now; ``hang`` holds the calls named in it."""

    def __init__(self) -> None:
        self.fail: dict[str, int | Exception] = {}
        self.fail_at: dict[str, tuple[int, int | Exception]] = {}
        self.hang: dict[str, trio.Event] = {}
        self.broken: dict[bytes, int] = {}
        """by handle: files that can't be opened"""
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[str, object]] = []

    async def passing(self, name: str, detail: object = None) -> None:
        self.calls[name] += 1
        self.log.append((name, detail))
        if name in self.hang:
            await self.hang[name].wait()
        if name in self.fail_at:
            left, number = self.fail_at.pop(name)
            if left > 1:
                self.fail_at[name] = (left - 1, number)
            else:
                raise _error(number)
        if name in self.fail:
            raise _error(self.fail[name])


def _error(what: int | Exception) -> Exception:
    return type(what)(*what.args) if isinstance(what, Exception) else OSError(what, os.strerror(what))


class FaultyFile:
    def __init__(self, real, faults: Faults) -> None:
        self._real = real
        self._faults = faults
        self.sync_failures = 0

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    async def open(self, *, write: bool) -> None:
        await self._faults.passing("open")
        if number := self._faults.broken.get(self._real.handle):
            raise OSError(number, os.strerror(number))
        await self._real.open(write=write)

    async def read(self, offset: int, views: Sequence[memoryview]) -> int:
        await self._faults.passing("read", offset)
        return await self._real.read(offset, views)

    async def write_runs(self, memory: memoryview, runs: Sequence[Run]) -> None:
        passed, failure = [], None
        for run in runs:
            try:
                await self._faults.passing("write", (run.offset, len(run.places)))
            except OSError as error:
                failure = failure or error
            else:
                passed.append(run)
        await self._real.write_runs(memory, passed)
        if failure is not None:
            raise failure

    async def write_tail(self, offset: int, data: memoryview) -> None:
        await self._faults.passing("write_tail", (offset, len(data)))
        await self._real.write_tail(offset, data)

    async def truncate(self, size: int) -> BackingStat:
        await self._faults.passing("truncate", size)
        return await self._real.truncate(size)

    async def set_mtime(self, mtime_ns: int) -> None:
        await self._faults.passing("set_mtime", mtime_ns)
        await self._real.set_mtime(mtime_ns)

    async def sync(self) -> None:
        try:
            await self._faults.passing("sync")
        except OSError:
            self.sync_failures += 1
            raise
        await self._real.sync()

    async def allocated_until(self, offset: int) -> int:
        await self._faults.passing("allocated_until", offset)
        return await self._real.allocated_until(offset)

    async def stat(self):
        await self._faults.passing("stat")
        return await self._real.stat()


class FaultyMedium:
    """What a pool is read from and written to beside its map, with bad places: byte offsets where reading fails, and
    where writing does, with its errno."""

    def __init__(self, real) -> None:
        self._real = real
        self.unreadable: set[int] = set()
        self.unwritable: dict[int, int] = {}

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def read(self, buffer, offset: int) -> int:
        if any(offset <= bad < offset + len(buffer) for bad in self.unreadable):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real.read(buffer, offset)

    def write(self, data, offset: int) -> None:
        for bad, number in self.unwritable.items():
            if offset <= bad < offset + len(data):
                raise OSError(number, os.strerror(number))
        self._real.write(data, offset)


async def write_in_steps(memory: memoryview, write: SmallWrite, file) -> OSError | None:
    """A small write to ``file`` by the methods that a pass uses; its error."""
    try:
        if not file.writable:
            await file.open(write=True)
        if write.runs:
            await file.write_runs(memory, write.runs)
        if write.tail is not None:
            offset, start, length = write.tail
            await file.write_tail(offset, memory[start : start + length])
        await file.set_mtime(write.mtime_ns)
    except OSError as error:
        return error.with_traceback(None)
    return None


async def finished(file, synced: bool) -> BackingStat | OSError:
    """What a small file looks like when it is durable, or its error, by the methods that a pass uses."""
    try:
        if not synced:
            await file.sync()
        stat: BackingStat = await file.stat()
    except OSError as error:
        return error.with_traceback(None)
    return stat


class FaultyBacking:
    """Wraps a ``Backing``; all its files share one :class:`Faults`."""

    def __init__(self, real) -> None:
        self._real = real
        self.faults = Faults()

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def file(self, handle: bytes) -> FaultyFile:
        return FaultyFile(self._real.file(handle), self.faults)

    async def write_files(self, memory, waiting, written) -> None:
        while waiting:
            write = waiting.popleft()
            written.append((write, await write_in_steps(memory, write, write.file)))

    async def finish_files(self, files, *, synced: bool) -> list[BackingStat | OSError]:
        return [await finished(file, synced) for file in files]

    async def space(self) -> Space:
        await self.faults.passing("space")
        space: Space = await self._real.space()
        return space

    async def sync_all(self) -> None:
        await self.faults.passing("sync_all")
        await self._real.sync_all()
