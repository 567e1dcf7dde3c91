"""Running the engine over simulated media: programs of operations that are recorded, and recovery of crash images."""

from __future__ import annotations

import errno
import functools
import itertools
import random
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio
import trio.testing
from trio._core import _run as trio_run

from cachefsd.backing.ports import BackingStat
from cachefsd.core.engine import Engine
from cachefsd.core.files import CachedFile, Hints, Life, Record
from cachefsd.core.options import EngineOptions
from cachefsd.core.recovery import recover
from cachefsd.core.slots import CLEAN, DIRTY, FREE, QUARANTINED, SET_ASIDE, Slots
from cachefsd.errors import UserError
from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.ports import Durability
from sim import log as events
from sim.backing import EMPTY_FS, ROOT_HANDLE, SimBacking, SimFs, handle_of
from sim.crash import SECTOR, Disk, Image
from sim.log import Log
from sim.media import BLOCK, EMPTY_CATALOG, SimCatalog, SimPool, format_pool
from sim.oracle import (
    Effect,
    File,
    Model,
    Oracle,
    Overlap,
    Violation,
    check_file,
    check_names,
    either_time,
    newest_version,
    overwritten,
    tell,
    words,
)

T = TypeVar("T")
Step = tuple[Any, ...]
"""(operation, arguments ...), see :class:`Client`"""


def simulate(fn: Callable[..., Any], *args: Any, seed: int = 0) -> Any:
    """``trio.run`` in virtual time, scheduled the same way every time."""
    vars(trio_run)["_ALLOW_DETERMINISTIC_SCHEDULING"] = True  # as trio's own tests of its determinism do
    trio_run._r.seed(seed)
    return trio.run(fn, *args, clock=trio.testing.MockClock(autojump_threshold=0), strict_exception_groups=True)


@dataclass(frozen=True)
class Setting:
    """What a simulation runs with."""

    slots: int = 6
    durability: Durability = Durability.PMEM
    sync_writes: bool = False
    fsync_takes_names: bool = False
    """Whether the backing's fsync of a file makes its names durable, as Linux' journaling file systems do"""
    hasty: bool = False
    """Whether the backing takes no time, so that writeback is faster than commits"""

    vector_min_blocks: int = Slots.vector_min_blocks
    """From how many blocks on a step is one of numpy; by default that is more than programs here have at once"""

    @property
    def options(self) -> EngineOptions:
        return EngineOptions(dirty_age_s=10.0, upkeep_s=20.0, full_timeout_s=60.0, sync_writes=self.sync_writes)


def new_image(setting: Setting) -> Image:
    """An empty cache over an empty directory."""
    return Image(format_pool(setting.slots), EMPTY_CATALOG, EMPTY_FS)


class Running:
    """An engine over an image, and everything beneath it."""

    engine: Engine

    def __init__(
        self, image: Image, setting: Setting, rng: random.Random, *, hasty: bool = False, epoch: bytes | None = None
    ) -> None:
        """``epoch``: that of an earlier start, if only the daemon has stopped since then, and not the machine."""
        self.log = Log()
        self.setting = setting
        self._rng = rng
        self.fs = SimFs(self.log, image.fs, rng, hasty=hasty)
        self.fs.left = self._left
        self._fs_before = image.fs
        before = image.catalog.settings.get("epoch", b"0")
        self.epoch = b"%d" % (int(before) + 1) if epoch is None else epoch
        check = self.fs.faults.check
        self.pool = SimPool(self.log, image.pool, setting.durability, check)
        self.catalog = SimCatalog(self.log, image.catalog, check)
        self._tasks_scope, self._tasks_ended = trio.CancelScope(), trio.Event()
        self._now = 1_800_000_000_000_000_000 + image.fs.clock * 1000

    def _left(self, ino: int) -> bytes:
        disk = Disk(self._fs_before, fsync_takes_names=self.setting.fsync_takes_names)
        for number, (kind, operation, _) in enumerate(self.log.events):
            if kind == events.BACKING:
                disk.do(number, operation)
        return disk.seen(ino)

    def now(self) -> int:
        self._now += 1
        return self._now

    async def run_blocking(self, fn: Callable[..., T], /, *args: object) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):  # as in production: once it is handed over its result is waited for
            mark = len(self.log.events)
            await self.fs.pause()
            self.log.job_mark = mark
            try:
                return fn(*args)
            finally:
                self.log.job_mark = None
                await self.fs.pause()
        raise AssertionError("a shield is not cancelled")

    @asynccontextmanager
    async def started(self, *, tasks: bool) -> AsyncIterator[Engine]:
        """Recover and run; leaving is a kill."""
        backing = SimBacking(self.fs)
        engine = None
        many, Slots.vector_min_blocks = Slots.vector_min_blocks, self.setting.vector_min_blocks
        try:
            engine = await recover(
                *(self.pool, self.catalog, backing, self.setting.options, self.run_blocking, self.now),
                epoch=self.epoch,
            )
            self.engine = engine
            if self.setting.slots > SECTOR // HEADER_SIZE:
                # Any order is as good. This one puts versions of a block into different sectors.
                free = engine.cache.slots.free.tolist()
                self._rng.shuffle(free)
                engine.cache.slots.free = array("i", free)
            async with trio.open_nursery() as nursery:
                if tasks:
                    nursery.start_soon(self._tasks)
                yield engine
                nursery.cancel_scope.cancel()
            if faults := engine.cache.stats.faults.listed():
                raise Violation(f"exceptions that nobody expected: {faults}")
        finally:
            Slots.vector_min_blocks = many
            if engine is not None:
                engine.close()
            self.pool.close()

    async def _tasks(self) -> None:
        with self._tasks_scope:
            await self.engine.run()
        self._tasks_ended.set()

    async def stop_tasks(self) -> None:
        """End writeback and upkeep, as before an orderly end."""
        self._tasks_scope.cancel()
        await self._tasks_ended.wait()

    # ---- what FUSE does

    def acquire(self, ino: int, name: Callable[[], str]) -> CachedFile:
        inode = self.fs.inodes[ino]
        stat = BackingStat(len(inode.content), inode.mtime_ns, inode.ctime_ns, self.fs.links(ino))

        def hints() -> Hints:
            known = name().encode()
            return Hints(ROOT_HANDLE, known, known, 0o100644, 0, 0)

        return self.engine.acquire(handle_of(ino), stat, hints, self.fs.sync_directory)

    async def read(self, file: CachedFile, offset: int, size: int) -> bytes:
        data = self.engine.reader.read(file, offset, size)
        if data is None:
            data = await self.engine.reader.read_slow(file, offset, size)
        return bytes(data)


# ---- programs


@dataclass
class Trace:
    """A program that was run: the record, and what users were told at every moment of it."""

    image: Image
    setting: Setting
    log: Log
    oracle: Oracle
    starts: list[int] = field(default_factory=list)
    """the event number at which each step began"""
    errors: list[str] = field(default_factory=list)
    epoch: bytes = b""
    """the one in which it ran"""


class Client:
    """Does the steps of a program, one after the other, as the only user of the file system.

    Files are known by small names; what the operations are is what the methods are.
    """

    def __init__(self, running: Running, oracle: Oracle, rng: random.Random) -> None:
        self.running = running
        self.oracle = oracle
        self.rng = rng
        self._version = newest_version(oracle.model)
        self._moves_to = ""
        """the new name of a file that is renamed beside other operations"""
        self._open: dict[int, CachedFile] = {}
        """by token: files that the kernel refers to"""
        self._unsynced: set[int] = set()
        self._nursery: trio.Nursery | None = None
        self.told: list[OSError] = []
        """errors beside those that end a step: of what was not waited for, and short writes"""

    async def run(self, steps: list[Step], trace: Trace) -> None:
        """Do all steps; errors are noted, and the program goes on."""
        async with self.at_work():
            for step in steps:
                trace.starts.append(len(self._log.events))
                try:
                    await self.do(step)
                except OSError as error:
                    trace.errors.append(f"{step}: {error}")

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """What steps start and do not wait for ends with the block."""
        async with trio.open_nursery() as self._nursery:
            yield
            self._nursery.cancel_scope.cancel()

    async def do(self, step: Step) -> None:
        """:raises OSError: of the engine or the backing."""
        await getattr(self, f"do_{step[0]}")(*step[1:])

    @property
    def _log(self) -> Log:
        return self.running.log

    @property
    def _engine(self) -> Engine:
        return self.running.engine

    # ---- telling the oracle

    def _begin(self, *files: File) -> None:
        self.oracle.note(len(self._log.events), *files)
        self._log.add(events.BEGIN)

    def _ack(self, *files: File) -> None:
        self._log.add(events.ACK)
        self.oracle.note(len(self._log.events), *files)

    def _at(self, name: str) -> File | None:
        return next((file for file in self.oracle.model.values() if file.name == name), None)

    # ---- files

    async def _file(self, name: str) -> tuple[File, CachedFile]:
        """Open a file, created if need be."""
        file = self._at(name)
        if file is None:
            token = max(self.oracle.model, default=0) + 1
            file = File(token, self.running.fs.next_ino, name, frozenset({name, None}))
            self._begin(file)
            ino = self.running.fs.create(name)
            self._unsynced.add(token)
            file = file._replace(mtimes=frozenset({self.running.fs.inodes[ino].mtime_ns}))
            self._ack(file)
        cached = self._open.get(file.token)
        if cached is None:
            token = file.token
            cached = self.running.acquire(file.ino, lambda: self.oracle.model[token].name or name)
            self._open[token] = cached
            self._engine.opened(cached)
            await cached.backing.open(write=True)
        return file, cached

    async def _change(
        self,
        file: File,
        cached: CachedFile,
        after: bytes,
        act: Callable[[], Any],
        acknowledged: Callable[[], File],
    ) -> None:
        """An operation that changes content; ``acknowledged`` says what is then known of the file."""
        if file.pending is not None:
            await self._look(file)  # nobody has seen yet what became of the last one, and it matters to this one
            raise OSError(errno.EAGAIN, "only a look this time")
        self._begin(file._replace(pending=after, mtimes=frozenset()))
        try:
            await act()
        except OSError:
            with suppress(OSError):
                await self._look(file._replace(pending=after))
            raise
        if cached.size != len(after):
            raise Violation(f"file {file.token} has {cached.size} bytes instead of {len(after)}")
        self._ack(acknowledged())

    async def _look(self, file: File) -> None:
        """An operation was broken off, perhaps half-way: users see how far it came, and may rely on that.

        :raises Violation: they see neither the old nor the new.
        """
        cached = self._open.get(file.token)
        if cached is None:
            return
        now = await self.running.read(cached, 0, 1 << 30)
        check_file(file._replace(contents=file.contents[-1:]), now)
        if self._engine.cache.health.failed is None:
            self._ack(self.oracle.broken_off(file, now))
        elif file.pending is not None:  # nobody knows what a commit that has failed leaves
            contents = (*file.contents, file.pending, now)
            self._ack(file._replace(contents=contents, pending=None, mtimes=frozenset()))

    async def do_look(self) -> None:
        """See what became of operations that were cancelled."""
        for file in list(self.oracle.model.values()):
            if file.pending is not None:
                await self._look(file)

    async def do_write(self, name: str, offset: int, size: int) -> None:
        """Write ``size`` bytes at ``offset``."""
        file, cached = await self._file(name)
        self._version += 1
        data = words(file.token, self._version, offset, size)
        after = overwritten(file.content, offset, data)

        await self._change(
            file,
            cached,
            after,
            lambda: self._write(cached, offset, data),
            lambda: self.oracle.written(file, offset, data, cached.mtime_ns),
        )

    async def _write(self, cached: CachedFile, offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            if self._engine.writer.write(cached, offset + done, data[done:]):
                return
            done += await self._engine.writer.write_slow(cached, offset + done, data[done:])
            if done < len(data):
                self.told.append(OSError(errno.EIO, "a short write"))

    async def do_append(self, name: str, size: int) -> None:
        """Write at the end."""
        file, _ = await self._file(name)
        await self.do_write(name, len(file.content), size)

    async def do_truncate(self, name: str, size: int) -> None:
        """Set the size."""
        file, cached = await self._file(name)
        after = file.content[:size].ljust(size, b"\0")

        def acknowledged() -> File:
            return self.oracle.truncated(file, size, cached.mtime_ns)

        await self._change(file, cached, after, lambda: self._engine.attributes.truncate(cached, size), acknowledged)

    async def do_utimes(self, name: str, start_ns: int = 10**18, *, with_data: bool = False) -> None:
        """Set the modification time; ``with_data``: of dirty data only, as the kernel's writeback cache does."""
        file, cached = await self._file(name)
        mtime = start_ns + self.rng.randrange(10**9)
        self._begin(file._replace(mtimes=frozenset()))
        await self._set_mtime(file, cached, mtime, with_data=with_data)
        self._ack(file._replace(mtimes=either_time(file.mtimes, frozenset({mtime}))))

    async def _set_mtime(self, file: File, cached: CachedFile, mtime: int, *, with_data: bool) -> None:
        if not (with_data and await self._engine.attributes.set_mtime_of_dirty(cached, mtime)):
            async with self._engine.attributes.changing(cached):
                self.running.fs.do("mtime", file.ino, mtime, self.running.fs.tick())  # as FUSE does, on the inode
                await self._engine.attributes.set_mtime(cached, mtime)
            self._engine.attributes.changed(cached)

    async def do_retime(self, name: str) -> None:
        """Set the modification time of dirty data."""
        await self.do_utimes(name, with_data=True)

    async def do_fsync(self, name: str) -> None:
        """Make data, inode and names durable."""
        file, cached = await self._file(name)
        if file.token in self._unsynced:
            cached.needs_sync = True
        self._begin(file)
        await self._engine.fsync(cached)
        changes: dict[str, Any] = {"contents": file.contents[-1:], "mtimes": frozenset({cached.mtime_ns})}
        if file.token in self._unsynced:
            await self.running.fs.sync_directory()
            self._names_are_durable()
        self._ack(self.oracle.model[file.token]._replace(**changes))

    async def do_beside(self, *steps: Step) -> None:
        """Do several operations on one file at once, each of them begun a little after the one before."""
        (name,) = {step[1] for step in steps}
        file, cached = await self._file(name)
        if file.pending is not None:
            await self._look(file)
            raise OSError(errno.EAGAIN, "only a look this time")
        if any(step[0] == "rename" for step in steps):
            names = (f"moved-{number}" for number in itertools.count())
            self._moves_to = next(name for name in names if name not in self.running.fs.names)
            file = file._replace(names=file.names | {self._moves_to})  # from the beginning on, or not yet
        operations = [self._overlapping(-1 - index, file, cached, *step) for index, step in enumerate(steps)]
        overlap = Overlap(file, [effect for effect, _ in operations])
        errors: list[OSError] = []

        async def one(index: int, act: Callable[[], Awaitable[None]], after: float) -> None:
            await trio.sleep(after)
            self._begin(overlap.begin(index))
            try:
                await act()
            except OSError as error:
                errors.append(error)
                return
            self._ack(overlap.end(index))

        async with trio.open_nursery() as nursery:
            after = 0.0
            for index, (_, act) in enumerate(operations):
                nursery.start_soon(one, index, act, after)
                after += 2 * self.rng.random()
        seen = await self.running.read(cached, 0, 1 << 30)
        if errors:
            check_file(overlap.now(), seen)
            file = self._moved(overlap.broken())
            if self._engine.cache.health.failed is None:
                file = self.oracle.broken_off(file, seen)
            self._ack(file)
            raise errors[0]
        self._ack(self._moved(overlap.ended(seen, cached.mtime_ns)))

    def _moved(self, file: File) -> File:
        """``file`` after operations that may have renamed it."""
        at = next((name for name, ino in self.running.fs.names.items() if ino == file.ino), None)
        return file._replace(name=at)

    def _overlapping(
        self, then: int, file: File, cached: CachedFile, operation: str, _: str, *arguments: int
    ) -> tuple[Effect, Callable[[], Awaitable[None]]]:
        """What an operation of :meth:`do_beside` makes of the file, and how it is done."""
        oracle, engine = self.oracle, self._engine
        if operation == "write":
            offset, size = arguments
            self._version += 1
            data = words(file.token, self._version, offset, size)
            effect = Effect(
                lambda file: oracle.written(file, offset, data, then), lambda old: overwritten(old, offset, data)
            )
            return effect, lambda: self._write(cached, offset, data)
        if operation == "truncate":
            (size,) = arguments
            return (
                Effect(lambda file: oracle.truncated(file, size, then), lambda old: old[:size].ljust(size, b"\0")),
                lambda: engine.attributes.truncate(cached, size),
            )
        if operation in ("utimes", "retime"):
            mtime = 1_000_000_000_000_000_000 + self.rng.randrange(10**9)
            with_data = operation == "retime"
            return (
                Effect(lambda file: file._replace(mtimes=either_time(file.mtimes, frozenset({then})))),
                lambda: self._set_mtime(file, cached, mtime, with_data=with_data),
            )
        if operation == "flush":
            return Effect(lambda file: file), engine.flush
        if operation == "rename":
            return Effect(lambda file: file), lambda: self._move(file, cached, self._moves_to)
        assert operation == "fsync", operation
        return Effect(lambda file: file._replace(contents=file.contents[-1:])), lambda: engine.fsync(cached)

    async def _move(self, file: File, cached: CachedFile, new: str) -> None:
        await self.running.fs.pause()
        self._unsynced.add(file.token)
        self.running.fs.do("rename", file.name, new, file.ino)
        self._engine.attributes.changed(cached)

    async def do_sync_directory(self) -> None:
        """fsync of the directory."""
        await self.running.fs.sync_directory()
        self._names_are_durable()

    def _names_are_durable(self) -> None:
        self._unsynced.clear()
        self._ack(*(file._replace(names=frozenset({file.name})) for file in self.oracle.model.values()))

    async def do_read(self, name: str) -> None:
        """Read all of it: users must see what they wrote."""
        file, cached = await self._file(name)
        found = await self.running.read(cached, 0, 1 << 30)
        if found != file.content:
            check_file(file._replace(contents=file.contents[-1:]), found)

    async def do_start_read(self, name: str) -> None:
        """Have all of it read while the program goes on."""
        _, cached = await self._file(name)

        async def read() -> None:
            with suppress(OSError):
                await self.running.read(cached, 0, 1 << 30)

        assert self._nursery is not None
        self._nursery.start_soon(read)
        await trio.sleep(self.rng.random())

    async def do_close(self, name: str) -> None:
        """Close it, and let the kernel forget it."""
        file = self._at(name)
        if file is not None and file.token in self._open:
            self._forget(file.token)

    def _forget(self, token: int) -> None:
        cached = self._open.pop(token)
        self._engine.closed(cached)
        self._engine.release(cached)

    async def do_unlink(self, name: str) -> None:
        """Remove the name, and close the file."""
        file = self._at(name)
        if file is not None:
            await self._lose(file, lambda: self.running.fs.do("unlink", name, file.ino))

    async def do_rename(self, old: str, new: str) -> None:
        """Give the file at ``old`` the name ``new``, whatever was there."""
        file, target = self._at(old), self._at(new)
        if file is None or file == target:
            return
        moved = file._replace(name=new, names=file.names | {new})
        self._begin(file._replace(names=moved.names))
        self._unsynced.add(file.token)

        def act() -> None:
            self.running.fs.do("rename", old, new, file.ino)

        if target is not None:
            await self._lose(target, act)
        else:
            await self.running.fs.pause()
            act()
        if file.token in self._open:
            self._engine.attributes.changed(self._open[file.token])
        self._ack(moved)

    async def _lose(self, file: File, act: Callable[[], None]) -> None:
        engine = self._engine
        self._begin(file._replace(names=file.names | {None}, going=True))
        cached = engine.find(handle_of(file.ino))
        try:
            if cached is not None:
                await engine.unlinking(cached)
            try:
                await self.running.fs.pause()
                self.running.fs.faults.check("unlink")
                act()
            except BaseException:
                if cached is not None:
                    await engine.unlink_failed(cached)
                raise
        except BaseException:
            if engine.cache.health.failed is None:  # else a tombstone may be there all the same
                self._ack(file)
            raise
        if cached is not None:
            engine.unlinked(cached)
            engine.attributes.changed(cached)
        if file.token in self._open:
            self._forget(file.token)
        # What it held does not change any more: it may come back with that, if the unlink is lost.
        self._ack(file._replace(name=None, names=file.names | {None}))

    # ---- time and faults

    async def do_flush(self) -> None:
        """Write back everything, and sync."""
        self._begin()
        mark = dict(self.oracle.model)
        await self._engine.flush()
        self._unsynced.clear()
        self._ack(
            *(
                file._replace(
                    names=frozenset({file.name}),
                    contents=file.contents[-1:],
                    mtimes=file.mtimes if len(file.mtimes) == 1 else frozenset(),
                )
                for token, file in self.oracle.model.items()
                if mark.get(token) == file
            )
        )

    async def do_start_flush(self) -> None:
        """Have everything written back while the program goes on."""

        async def flush() -> None:
            try:
                await self._engine.flush()
            except OSError as error:
                self.told.append(error)

        assert self._nursery is not None
        self._nursery.start_soon(flush)
        await trio.sleep(self.rng.random())

    async def do_wait(self, seconds: float) -> None:
        """Let time pass."""
        await trio.sleep(seconds)

    async def do_call(self, fn: Callable[[Client], Awaitable[None]]) -> None:
        """Something out of the ordinary, which only one scenario needs."""
        await fn(self)

    async def do_fail(self, call: str, after: int = 1, number: int = errno.EIO, times: int = 1) -> None:
        """The ``after``-th call from now on of this kind fails, and so do the ones after it, so many in all."""
        faults = self.running.fs.faults
        faults.at[call] = (faults.calls[call] + after, number, times)

    async def do_heal(self) -> None:
        """No more faults."""
        self.running.fs.faults.at.clear()

    async def do_shutdown(self) -> None:
        """An orderly end: writeback and upkeep stop, and the cache is marked clean. Nothing may follow."""
        for token in list(self._open):
            self._forget(token)
        await self.running.stop_tasks()
        await self._engine.shutdown()


async def record(
    image: Image,
    setting: Setting,
    steps: list[Step],
    model: Model | None = None,
    seed: int = 0,
    epoch: bytes | None = None,
) -> Trace:
    """Run a program over an image, and kill it at its end.

    :raises Violation: users see something else than what they wrote.
    """
    rng = random.Random(seed)
    running = Running(image, setting, rng, hasty=setting.hasty, epoch=epoch)
    oracle = Oracle(setting.durability, model, sync_writes=setting.sync_writes)
    trace = Trace(image, setting, running.log, oracle, epoch=running.epoch)
    try:
        async with running.started(tasks=True):
            await Client(running, oracle, rng).run(steps, trace)
    except ExceptionGroup as group:
        first = first_of(group)
        if isinstance(first, AssertionError):
            raise Violation(f"an assertion of the engine fails: {first}") from first
        raise first from None
    return trace


def first_of(group: BaseExceptionGroup[Any]) -> BaseException:
    """What a nursery was ended by, out of its wrapping: a violation if there is one."""
    violations, others = group.split(Violation)
    found: BaseException = violations or others or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


# ---- after a crash


@dataclass
class Findings:
    """What recovery made of an image."""

    log: Log
    contents: dict[str, bytes]
    """by name, zeros where blocks are lost"""
    lost: dict[str, frozenset[int]]
    """by name: blocks that read as EIO"""
    told: list[tuple[str, int, int]]
    """losses in ``status``: path, first byte and the one behind the last"""
    quarantined: int
    clean: dict[str, dict[int, bytes]]
    """by name and block: the valid bytes of blocks that recovery has kept as clean"""
    dirty: dict[str, dict[int, bytes]]
    """likewise those that the backing has yet to get"""
    refused: bool = False
    """nothing was recovered: a slot that was set aside was the last one, and a truncate needs one to be finished"""


async def examine(
    image: Image, setting: Setting, model: Model | None, *, drain: bool, seed: int = 0, epoch: bytes | None = None
) -> Findings:
    """Recover an image and check all that is promised; with ``drain`` also what then reaches the backing. Without a
    ``model`` nothing is promised, it is only told what is found.

    :raises Violation:
    """
    running = Running(image, setting, random.Random(seed), hasty=True, epoch=epoch)
    contents: dict[int, bytes] = {}
    damaged: dict[int, frozenset[int]] = {}
    blocks: dict[int, tuple[dict[int, bytes], dict[int, bytes]]] = {}
    try:
        async with running.started(tasks=False) as engine:
            recovered = len(running.log.events)
            for held in engine.cache.files.held:
                if image.torn and "no free slot to finish a truncate with" in str(held.held):
                    return Findings(running.log, {}, {}, [], image.torn, {}, {}, refused=True)
                raise Violation(f"file {held.file_id} is set aside: {held.held}")
            opened: dict[int, CachedFile] = {}
            for name, ino in list(running.fs.names.items()):
                if ino not in opened:
                    opened[ino] = running.acquire(ino, functools.partial(str, name))
                    blocks[ino] = _cached_blocks(engine, opened[ino])
                    contents[ino], damaged[ino] = await _read_all(running, opened[ino])
            if model is not None:
                found = check_names(model, image.fs, running.fs.names, contents)
                for token, ino in found.items():
                    check_file(model[token], contents[ino], damaged[ino])
                    _check_mtime(model[token], opened[ino])
                check_accounts(engine, damaged=image.torn + sum(len(file.lost) for file in model.values()))
            if drain:
                await _drain(running, engine, opened, contents, damaged)
            status = engine.status()
    except UserError as error:
        raise Violation(f"recovery refuses: {error}") from error
    except ExceptionGroup as group:
        raise first_of(group) from None
    del running.log.events[recovered:]
    names = running.fs.names.items()
    return Findings(
        running.log,
        {name: contents[ino] for name, ino in names},
        {name: damaged[ino] for name, ino in names if damaged[ino]},
        [(loss["path"], loss["from"], loss["to"]) for loss in status["lost_blocks"]],
        status["slots"]["quarantined"],
        {name: blocks[ino][0] for name, ino in names},
        {name: blocks[ino][1] for name, ino in names},
    )


def _cached_blocks(engine: Engine, file: CachedFile) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """The valid bytes of a file's clean and of its dirty blocks."""
    cache = engine.cache
    by_state: dict[int, dict[int, bytes]] = {CLEAN: {}, DIRTY: {}, QUARANTINED: {}}
    for numbers, slots in file.table.walk():
        for block, slot in zip(numbers.tolist(), slots.tolist(), strict=True):
            length = int(cache.pool.scan(slot, 1).length[0])
            by_state[cache.slots.state[slot]][block] = bytes(cache.data[slot * BLOCK :][:length])
    return by_state[CLEAN], by_state[DIRTY]


async def _read_all(running: Running, file: CachedFile) -> tuple[bytes, frozenset[int]]:
    """All of a file, and the blocks that read as EIO, as zeros."""
    try:
        return await running.read(file, 0, 1 << 30), frozenset()
    except OSError:
        pass
    parts: list[bytes] = []
    lost: set[int] = set()
    for block in range((file.size + BLOCK - 1) // BLOCK):
        size = min(BLOCK, file.size - block * BLOCK)
        try:
            parts.append(await running.read(file, block * BLOCK, size))
        except OSError:
            parts.append(bytes(size))
            lost.add(block)
    return b"".join(parts), frozenset(lost)


def _check_mtime(file: File, cached: CachedFile) -> None:
    if file.mtimes and file.pending is None and cached.mtime_ns not in file.mtimes:
        raise Violation(f"file {file.token} has mtime {cached.mtime_ns}, may be {sorted(file.mtimes)}")


def check_accounts(engine: Engine, *, damaged: int = 0, idle: bool = True) -> None:
    """What the engine believes of its slots and files must add up. ``damaged``: so many slots may be quarantined;
    ``idle``: no operation and no pass is under way.

    :raises Violation:
    """
    slots, cache = engine.cache.slots, engine.cache
    states = [list(slots.state).count(state) for state in range(4)]
    if states[1:] != slots.counts[1:]:
        raise Violation(f"slots by state are {states[1:]}, counted {slots.counts[1:]}")
    quarantined = sum(slots.owner[slot] != SET_ASIDE for slot in slots.quarantined())
    if quarantined > damaged:
        raise Violation(f"{quarantined} slots are quarantined, and {damaged} were damaged")
    live: set[int] = set()
    for file in cache.files.by_id.values():
        dirty = 0
        for blocks, places in file.table.walk():
            for block, slot in zip(blocks.tolist(), places.tolist(), strict=True):
                if slots.owner[slot] != file.file_id or slots.block[slot] != block or slot in live:
                    raise Violation(f"slot {slot} is not that of block {block} of file {file.file_id}")
                live.add(slot)
                dirty += slots.state[slot] == DIRTY
        if dirty != file.dirty:
            raise Violation(f"file {file.file_id} has {dirty} dirty blocks, counted {file.dirty}")
    _check_dormant(engine, live)
    for file in {**cache.files.by_id, **{id(each): each for each in cache.files.by_handle.values()}}.values():
        _check_file_accounts(engine, file, idle=idle)
    idle_slots = [*slots.free, *slots.untouched, *slots.retired, *slots.superseded[0::2]]
    used = len(idle_slots) + sum(state != FREE for state in slots.state)
    if len(set(idle_slots)) != len(idle_slots) or live & set(idle_slots) or used > cache.pool.slots:
        raise Violation("a slot is in two places")
    if idle:
        if used != cache.pool.slots:
            raise Violation(f"{cache.pool.slots - used} slots are neither live nor free")
        if any(slots.pins):
            raise Violation("a slot is pinned, and nobody uses it")
        guards = bytearray(cache.pool.slots)
        for slot in [*slots.superseded[1::2], *slots._unguard_next]:
            guards[slot] += 1
        if guards != slots.guarded:
            raise Violation("a slot is guarded against a predecessor that it has not")
        if cache.blocks.lock.locked() or cache.records.lock.locked():
            raise Violation("a lock of the cache is held")


def _check_dormant(engine: Engine, live: set[int]) -> None:
    """Dormant files have a record and slots of their own, and are no objects. Their slots are added to ``live``."""
    cache, seen = engine.cache, 0
    for file_id, left, places in cache.files.dormant.files():
        seen += 1
        own = places.tolist()
        gone = not own and file_id not in cache.files.leaving_dormant
        if left != len(own) or gone or live.intersection(own):
            raise Violation(f"dormant file {file_id} has slots {own}, counted {left}")
        live.update(own)
        if file_id in cache.files.by_id or file_id not in cache.files.dormant:
            raise Violation(f"file {file_id} is dormant and awake, or neither")
    if seen != len(cache.files.dormant):
        raise Violation(f"{seen} files are dormant, counted {len(cache.files.dormant)}")


def _check_file_accounts(engine: Engine, file: CachedFile, *, idle: bool) -> None:
    who = f"file {file.file_id}"
    if (file in engine.cache.dirty) != bool(file.dirty or file.intents):
        raise Violation(f"{who} is due without owing anything, or the other way round")
    settled = file.record is Record.CURRENT and file.life is Life.USABLE and file.tombstone == file.unlinked
    if file.ready and not (settled and engine.cache.health.failed is None):
        raise Violation(f"{who} takes writes, and must not")
    if (file.held is not None) != (file.life is Life.HELD) or (file in engine.cache.files.held) != (
        file.held is not None
    ):
        raise Violation(f"{who} is set aside without a reason, or the other way round")
    if idle and (file.fetches or file.lock.locked() or file.record_lock.locked() or file.life is Life.CUT):
        raise Violation(f"{who} is held by an operation that is over")


def _without(content: bytes, lost: frozenset[int], size: int) -> bytes:
    """``content`` with zeros for blocks that are lost, and as long as it would be with them."""
    whole = bytearray(content.ljust(size, b"\0") if lost else content)
    for block in lost:
        part = slice(block * BLOCK, min((block + 1) * BLOCK, size))
        whole[part] = bytes(part.stop - part.start)
    return bytes(whole)


async def _drain(
    running: Running,
    engine: Engine,
    opened: dict[int, CachedFile],
    contents: dict[int, bytes],
    damaged: dict[int, frozenset[int]],
) -> None:
    """Everything reaches the backing, and is the same there."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        with trio.move_on_after(10_000) as scope:
            await engine.flush()
        if scope.cancelled_caught:
            raise Violation("writeback does not end")
        nursery.cancel_scope.cancel()
    if engine.dirty_bytes:
        raise Violation(f"{engine.dirty_bytes} bytes are still dirty after a flush")
    for ino, content in contents.items():
        beneath = _without(running.fs.inodes[ino].content, damaged[ino], len(content))
        if beneath != content:
            raise Violation(f"the backing of inode {ino} has {tell(beneath)} instead of {tell(content)}")
        file = opened[ino]
        if running.fs.inodes[ino].mtime_ns != file.mtime_ns and not damaged[ino]:
            raise Violation(f"the backing of inode {ino} has another mtime than its users see")
