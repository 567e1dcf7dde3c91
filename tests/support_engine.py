"""The engine over a real pool, a real catalog and real files, without threads: every run is the same.

``PlainBacking`` implements the backing port with plain system calls in the loop itself. Its handles are inode
numbers, found by scanning the directory: good enough for one flat directory, and it follows renames.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from support_faults import FaultyBacking, FaultyMedium, finished, write_in_steps

from cachefsd.backing.ports import BackingStat, LostFile, Place, Run, Space
from cachefsd.core.engine import Engine
from cachefsd.core.files import CachedFile, Hints
from cachefsd.core.options import EngineOptions
from cachefsd.core.recovery import recover
from cachefsd.media.catalog import create_catalog, open_catalog
from cachefsd.media.pool import open_pool
from cachefsd.media.poolfile import create_pool
from cachefsd.media.ports import Durability
from cachefsd.times import KeptTimes

BLOCK = 4096
PLENTY = 1 << 50
DATA_START = 2 << 20  # see docs/format.md


class PlainFile:
    direct = True
    max_size = 1 << 60

    def __init__(self, root: Path, handle: bytes, keep: Callable[[int], int]) -> None:
        self._root = root
        self._keep = keep
        self.handle = handle
        self._fd = -1
        self.writable = False
        self.sync_failures = self.direct_bytes = self.bounced_bytes = 0

    async def open(self, *, write: bool) -> None:
        await trio.lowlevel.checkpoint()
        if self._fd >= 0 and (self.writable or not write):
            return
        for name in os.listdir(self._root):
            if os.lstat(self._root / name).st_ino == int(self.handle):
                self.close()
                self._fd = os.open(self._root / name, os.O_RDWR if write else os.O_RDONLY)
                self.writable = write
                return
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    async def read(self, offset: int, views: Sequence[memoryview]) -> int:
        await trio.lowlevel.checkpoint()
        assert offset % BLOCK == 0
        return os.preadv(self._fd, views, offset)

    async def write_runs(self, memory: memoryview, runs: Sequence[Run]) -> None:
        await trio.lowlevel.checkpoint()
        for offset, places in runs:
            assert offset % BLOCK == 0
            views = [memory[at * BLOCK : (at + 1) * BLOCK] for at in places.tolist()]
            assert os.pwritev(self._fd, views, offset) == len(places) * BLOCK
        await trio.lowlevel.checkpoint()

    async def write_tail(self, offset: int, data: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        assert os.pwrite(self._fd, data, offset) == len(data)

    async def truncate(self, size: int) -> BackingStat:
        await trio.lowlevel.checkpoint()
        os.ftruncate(self._fd, size)
        return await self.stat()

    async def set_mtime(self, mtime_ns: int) -> None:
        os.utime(self._fd, ns=(os.fstat(self._fd).st_atime_ns, self._keep(mtime_ns)))

    async def sync(self) -> None:
        await trio.lowlevel.checkpoint()

    async def allocated_until(self, offset: int) -> int:
        await trio.lowlevel.checkpoint()
        size = -(-os.fstat(self._fd).st_size // BLOCK) * BLOCK  # tests make no holes
        return max(offset, size)

    async def stat(self) -> BackingStat:
        await trio.lowlevel.checkpoint()
        st = os.fstat(self._fd)
        return BackingStat.of(st)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self.writable = -1, False


class PlainBacking:
    overwrites_take_space = False
    most_kept_open = 1024

    def __init__(self, root: Path, times: KeptTimes, keep: Callable[[int], int]) -> None:
        """``times`` is what is known of how files keep times, ``keep`` is how they do."""
        self.root = root
        self.capacity = PLENTY
        self.times = times
        self._keep = keep

    def file(self, handle: bytes) -> PlainFile:
        return PlainFile(self.root, handle, self._keep)

    def scratch(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    async def space(self) -> Space:
        await trio.lowlevel.checkpoint()
        used = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in self.root.iterdir())
        return Space(PLENTY, max(0, self.capacity - used), BLOCK)

    async def sync_all(self) -> None:
        await trio.lowlevel.checkpoint()

    sync_all_tells_files = True

    async def write_files(self, memory, waiting, written) -> None:
        while waiting:
            write = waiting.popleft()
            written.append((write, await write_in_steps(memory, write, write.file)))

    async def finish_files(self, files, *, synced: bool) -> list[BackingStat | OSError]:
        return [await finished(file, synced) for file in files]

    async def recreate(self, lost: LostFile, note: Callable[[bytes, Place], Awaitable[None]]) -> None:
        path, number = self.root / os.fsdecode(lost.name), 0
        while lost.numbered and (number == 0 or path.exists()):
            number += 1
            path = self.root / f"{os.fsdecode(lost.name)}-{number}"
        if path.exists():
            path = self.root / os.fsdecode(lost.fallback)
        content = b""
        for other in self.root.iterdir():
            if b"%d" % other.stat().st_ino == lost.copy_of:
                content = other.read_bytes()[: lost.copy_size]
        path.touch(exist_ok=False)
        path.write_bytes(content.ljust(lost.size, b"\0"))
        await note(b"%d" % path.stat().st_ino, Place(os.fsencode(path.name), aside=False))


async def run_inline(fn: Callable[..., Any], *args: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return fn(*args)


class World:
    """One cache over one directory, started, crashed and started again at will."""

    def __init__(
        self,
        directory: Path,
        *,
        slots: int = 8,
        durability: Durability = Durability.RAM,
        options: EngineOptions | None = None,
    ) -> None:
        self.cache_dir = directory / "cache"
        self.root = directory / "backing"
        self.root.mkdir(exist_ok=True)
        self.options = options or EngineOptions()
        self._durability = durability
        if not self.cache_dir.exists():
            info = create_pool(self.cache_dir, DATA_START + slots * BLOCK, volatile=True)
            assert info.slots == slots
            create_catalog(self.cache_dir, info.uuid, info.slots)
        self.times = KeptTimes.exact()
        self.keep: Callable[[int], int] = lambda ns: ns
        self.now = 1_700_000_000_000_000_000
        self.unreadable: set[int] = set()
        """slots whose data can't be read from the next start on; a load would succeed here"""
        self.unwritable: dict[int, int] = {}
        """slots whose data can't be written by system calls, and the errno"""
        self.engine: Engine
        self.backing: FaultyBacking
        self.broken: dict[bytes, int] = {}
        """by handle: files that can't be opened, from the next start on"""

    def _now(self) -> int:
        self.now += 1
        return self.now

    @asynccontextmanager
    async def started(
        self, *, tasks: bool = False, shutdown: bool = False, epoch: bytes = b"one boot"
    ) -> AsyncIterator[Engine]:
        """A running engine; leaving is a kill unless ``shutdown``. ``tasks``: with writeback and upkeep."""
        pool = open_pool(self.cache_dir, volatile=True, persistence=self._durability)
        self.medium = medium = pool._medium = FaultyMedium(pool._medium)
        medium.unreadable = {DATA_START + slot * BLOCK for slot in self.unreadable}
        medium.unwritable = {DATA_START + slot * BLOCK: number for slot, number in self.unwritable.items()}
        catalog = open_catalog(self.cache_dir, pool.uuid)
        self.backing = FaultyBacking(PlainBacking(self.root, self.times, self.keep))
        self.backing.faults.broken = self.broken
        self.pool, self.catalog = pool, catalog
        engine = None
        try:
            engine = await recover(pool, catalog, self.backing, self.options, run_inline, self._now, epoch)
            self.engine = engine
            async with trio.open_nursery() as nursery:
                if tasks:
                    nursery.start_soon(engine.run)
                yield engine
                nursery.cancel_scope.cancel()
            if shutdown:
                await engine.shutdown()
        finally:
            if engine is not None:
                engine.close()
            catalog.close()
            pool.close()

    def path(self, name: str) -> Path:
        return self.root / name

    def open(self, name: str, *, create: bool = True) -> CachedFile:
        """Acquire a file of the backing as FUSE does."""
        path = self.path(name)
        if create and not path.exists():
            path.touch()
        st = path.stat()
        stat = BackingStat.of(st)
        hints = Hints(b"", name.encode(), name.encode(), st.st_mode, st.st_uid, st.st_gid)
        return self.engine.acquire(b"%d" % st.st_ino, stat, lambda: hints, self.backing.sync_all)

    async def write(self, file: CachedFile, offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            if self.engine.writer.write(file, offset + done, data[done:]):
                return
            done += await self.engine.writer.write_slow(file, offset + done, data[done:])

    async def read(self, file: CachedFile, offset: int, size: int) -> bytes:
        data = self.engine.reader.read(file, offset, size)
        if data is None:
            data = await self.engine.reader.read_slow(file, offset, size)
        return bytes(data)

    async def unlink(self, name: str) -> None:
        file = self.engine.find(b"%d" % self.path(name).stat().st_ino)
        if file is not None:
            await self.engine.unlinking(file)
        self.path(name).unlink()
        if file is not None:
            self.engine.unlinked(file)
