"""What is run to find faults that a few random programs would miss: each scenario is short, and aims at something.

All of them are clean on the code as it is; each seeded fault of ``sim/mutants.py`` makes one of them complain.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import trio

from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.poolfile import create_pool
from cachefsd.media.ports import Changes, Durability, Intent, SlotState
from sim.backing import FsState, Inode
from sim.campaign import NESTED, Campaign, Change, Tally, bounded
from sim.crash import Image, Media
from sim.media import BLOCK, EMPTY_CATALOG
from sim.oracle import File, Model, Violation, overwritten, words
from sim.workloads import HALF
from sim.world import Client, Running, Setting, Step, check_accounts, examine, new_image, record

Scenario = Callable[[], Awaitable[Tally]]

PMEM = Setting()
TIGHT = Setting(slots=4)
ROOMY = Setting(slots=8)
"""a file does not fill half of it, so nothing is written back before its time"""
DISK = Setting(durability=Durability.DISK)
ROOMY_DISK = Setting(slots=8, durability=Durability.DISK)
HASTY_DISK = Setting(slots=8, durability=Durability.DISK, hasty=True)
TIGHT_DISK = Setting(slots=4, durability=Durability.DISK)
TIGHT_HASTY_DISK = Setting(slots=4, durability=Durability.DISK, hasty=True)
MANY = Setting(slots=12)
"""for groups of files"""
MANY_DISK = Setting(slots=12, durability=Durability.DISK)
AT_ONCE = Setting(slots=8, vector_min_blocks=1)
AT_ONCE_DISK = Setting(slots=6, durability=Durability.DISK, vector_min_blocks=1)

WRITE: Step = ("write", "a", 0, BLOCK)
WRITE_TWO: Step = ("write", "a", 0, 2 * BLOCK)
WRITE_ALL: Step = ("write", "a", 0, 3 * BLOCK)
FLUSH: Step = ("flush",)
START_FLUSH: Step = ("start_flush",)
EMPTY: Step = ("truncate", "a", 0)
CUT: Step = ("truncate", "a", BLOCK + HALF)
CUT_OFF: Step = ("truncate", "a", 2 * BLOCK)
GROW: Step = ("truncate", "a", 3 * BLOCK)
FSYNC: Step = ("fsync", "a")
READ: Step = ("read", "a")
START_READ: Step = ("start_read", "a")
UNLINK: Step = ("unlink", "a")
UTIMES: Step = ("utimes", "a")
RETIME: Step = ("retime", "a")
UTIMES_LATE: Step = ("utimes", "a", 11_000_000_000 * 10**9)
CATALOG_FULL: Step = ("fail", "catalog", 1, errno.ENOSPC, 2)
WAIT: Step = ("wait", 30)
CRASH: Step = ("crash", "all")
CLOSE: Step = ("close", "a")
EVICTING: tuple[Step, ...] = (("write", "b", 0, 3 * BLOCK), FLUSH)


EVICTED: list[Step] = [
    *(("write", "b", 0, 4 * BLOCK), FLUSH, ("close", "b"), WRITE, ("wait", 12.5), ("close", "a"), ("read", "b"))
]
"""The only block of ``a`` has been dropped from a full cache, and nothing has committed that."""
EVICTED_ASLEEP: list[Step] = [
    *(("write", "b", 0, 4 * BLOCK), FLUSH, ("close", "b"), ("write", "c", 0, BLOCK), ("wait", 45), ("close", "c")),
    *(WRITE, ("wait", 12.5), ("close", "a"), ("wait", 10), ("read", "b")),
]
"""The same of a file that was dormant by then. Nothing has committed that its block is clean, either."""
FILES: list[Step] = [WRITE, ("write", "b", 0, BLOCK), ("append", "c", HALF), ("append", "d", BLOCK + HALF)]
AGAIN: list[Step] = [("write", "b", 0, BLOCK), ("write", "c", 0, BLOCK), ("append", "d", HALF)]
FAILED_FSYNC: list[Step] = [("fail", "sync"), ("fsync", "b")]
CLOSE_ALL: list[Step] = [("close", name) for name in "abcd"]


def programs(
    *each: list[Step], setting: Setting = PMEM, seeds: int = 1, nested: int = NESTED, crashed: bool = True
) -> Scenario:
    """These programs with each of so many seeds, crashed everywhere or not at all."""

    async def run() -> Tally:
        tally = Tally()
        for seed in range(seeds):
            campaign = Campaign(setting, seed, nested)
            for steps in each:
                await campaign.program(steps, crashed=crashed)
            tally.operations += campaign.tally.operations
            tally.images |= campaign.tally.images
        return tally

    return run


# ---- changes of images, as media and strangers make them


def damage(name: str, block: int) -> Change:
    """One bit of the cached block is another. If it was dirty, the block is lost, which has to be said."""

    def change(image: Image, model: Model) -> tuple[Image, Model]:
        file = next(file for file in model.values() if file.name == name)
        content = bytearray(image.pool.content)
        slots = len(content) // (HEADER_SIZE + BLOCK)
        handles = {int(raw) for raw in image.catalog.files}
        newest = (-1, -1, 0)
        for slot in range(slots):
            w0, seq, file_id, place = struct.unpack_from("<4Q", content, slot * HEADER_SIZE)
            if w0 >> 56 and file_id in handles and file_id == file.token and place == block:
                newest = max(newest, (seq, slot, w0 >> 56))
        _, slot, state = newest
        assert slot >= 0, f"block {block} of {name} is not cached"
        content[slots * HEADER_SIZE + slot * BLOCK] ^= 1
        if state == SlotState.DIRTY * 0x55:
            model = {**model, file.token: file._replace(lost=file.lost | {block}, mtimes=frozenset())}
        return image._replace(pool=image.pool._replace(content=bytes(content))), model

    return change


def unreadable(name: str, block: int) -> Change:
    """The media of the cached block can't be read. If it was dirty, the block is lost, which has to be said."""

    def change(image: Image, model: Model) -> tuple[Image, Model]:
        damaged, model = damage(name, block)(image, model)
        data = len(image.pool.content) // (HEADER_SIZE + BLOCK) * HEADER_SIZE
        pairs = zip(image.pool.content[data:], damaged.pool.content[data:], strict=True)
        at = next(index for index, (old, new) in enumerate(pairs) if old != new)
        return image._replace(pool=image.pool._replace(unreadable=image.pool.unreadable | {at // BLOCK})), model

    return change


def rewrite(name: str) -> Change:
    """Somebody writes a file of the backing while nothing is mounted."""

    def change(image: Image, model: Model) -> tuple[Image, Model]:
        file = next(file for file in model.values() if file.name == name)
        inode = image.fs.inodes[file.ino]
        now = inode.ctime_ns + 1_000_000
        content = words(file.token, 999, 0, len(file.content))
        inode = inode._replace(content=content, mtime_ns=now, ctime_ns=now)
        file = file._replace(contents=(content,), mtimes=frozenset({now}))
        fs = image.fs._replace(inodes={**image.fs.inodes, file.ino: inode})
        return image._replace(fs=fs), {**model, file.token: file}

    return change


def remove(name: str) -> Change:
    """The backing loses a file while nothing is mounted."""

    def change(image: Image, model: Model) -> tuple[Image, Model]:
        ino = image.fs.names[name]
        fs: FsState = image.fs._replace(
            names={other: number for other, number in image.fs.names.items() if number != ino},
            inodes={number: inode for number, inode in image.fs.inodes.items() if number != ino},
        )
        return image._replace(fs=fs), model

    return change


def second_id(image: Image, model: Model) -> tuple[Image, Model]:
    """Earlier releases could leave this: the first file has been cut, and then was forgotten; its next user has made
    another id for its handle. A crash has brought the old versions back."""
    (file,) = model.values()
    inode = image.fs.inodes[file.ino]._replace(content=b"")
    records = dict(image.catalog.files)
    (first,) = records
    records[first + 1] = records[first]
    catalog = image.catalog._replace(files=records, settings={"next_file_id": b"%d" % (first + 2)})
    fs = image.fs._replace(inodes={**image.fs.inodes, file.ino: inode})
    return image._replace(fs=fs, catalog=catalog), {file.token: file._replace(contents=(b"",), mtimes=frozenset())}


STRANGER = 900
"""The token of what strangers write."""
COPY = "{}.cachefsd-conflict-20270115-1"
"""Where the cache's version of a file goes that strangers have changed."""


def _parted(image: Image, model: Model, name: str) -> tuple[int, Model]:
    """The inode number of a file, and a model in which the cache's version of it is a file of its own."""
    file = next(file for file in model.values() if file.name == name)
    copy = COPY.format(name)
    mine = file._replace(ino=-1, name=copy, names=frozenset({copy}))
    return image.fs.names[name], {**model, file.token: mine}


def _with_stranger(image: Image, model: Model, name: str, ino: int, size: int) -> tuple[Image, Model]:
    content = words(STRANGER, 1, 0, size)
    now = 1_700_000_000_000_000_000 + image.fs.clock + 10**6
    fs = image.fs
    fs = fs._replace(names={**fs.names, name: ino}, inodes={**fs.inodes, ino: Inode(content, now, now)})
    stranger = File(STRANGER, ino, name, frozenset({name}), (content,), mtimes=frozenset({now}))
    return image._replace(fs=fs), {**model, STRANGER: stranger}


def edit(name: str, size: int = 2 * BLOCK + 8) -> Change:
    """Somebody else gives a file of the backing other content, while data for it waits in the cache."""

    def change(image: Image, model: Model) -> tuple[Image, Model]:
        ino, model = _parted(image, model, name)
        return _with_stranger(image, model, name, ino, size)

    return change


def edit_of_all(name: str) -> Change:
    """The same where the cache has no data for the file: the other version is all that there is."""

    def change(image: Image, model: Model) -> tuple[Image, Model]:
        image, after = edit(name)(image, model)
        return image, {token: file for token, file in after.items() if file.ino >= 0}

    return change


def take(name: str) -> Change:
    """Somebody else removes it."""

    def change(image: Image, model: Model) -> tuple[Image, Model]:
        _, model = _parted(image, model, name)
        return remove(name)(image, model)

    return change


def replace_by_other(name: str) -> Change:
    """Somebody else puts another file in its place."""

    def change(image: Image, model: Model) -> tuple[Image, Model]:
        image, model = take(name)(image, model)
        return _with_stranger(image, model, name, 800, BLOCK)

    return change


def edit_of_part(name: str) -> Change:
    """Like :func:`edit`, of a file of which the cache has not all: what it lacks comes from the other version."""

    def change(image: Image, model: Model) -> tuple[Image, Model]:
        token = next(token for token, file in model.items() if file.name == name)
        image, model = edit(name, 3 * BLOCK)(image, model)
        beneath = overwritten(model[STRANGER].content, 0, model[token].content[:BLOCK])
        return image, {**model, token: model[token]._replace(contents=(beneath, model[token].content))}

    return change


# ---- what programs of steps cannot say


async def round_of_upkeep(client: Client) -> None:
    """Upkeep does a round, as it does early when slots are wanted."""
    await trio.sleep(0.1)  # it may not have begun yet
    client.running.engine.cache.upkeep.set()
    await trio.sleep(0.3)


async def drained(client: Client) -> None:
    """Nothing is dirty any more, though nobody asked for a writeback.

    :raises Violation:
    """
    if client.running.engine.dirty_bytes:
        raise Violation("writeback that failed is not tried again")


async def adds_up(client: Client) -> None:
    """:raises Violation: files and slots do not fit together."""
    check_accounts(client.running.engine, idle=False)


async def asleep(client: Client) -> None:
    """:raises Violation: a file that nobody uses is still awake."""
    cache = client.running.engine.cache
    if cache.files.by_id or not cache.files.dormant:
        raise Violation(f"{len(cache.files.by_id)} files are awake, {len(cache.files.dormant)} are dormant")


async def going_on(client: Client) -> None:
    """What was short of space for a while has not ended the cache.

    :raises Violation:
    """
    if client.running.engine.cache.health.failed is not None:
        raise Violation("the cache has failed, and its disk was just full")


async def cut_by_record(client: Client) -> None:
    """A truncate within the second block has got as far as its intent."""
    file, cached = await client._file("a")
    cache = client.running.engine.cache
    client._begin(file._replace(pending=file.content[: BLOCK + HALF]))
    intent = Intent(cached.file_id, cache.blocks.take_seq(), BLOCK + HALF, cache.now_ns())
    await cache.records.transact(lambda: Changes(add_intents=[intent]))


async def flip(client: Client) -> None:
    """A bit of a dirty block changes in memory; the loss has to be reported."""
    file, cached = await client._file("a")
    slot = cached.table.get(0)
    view = client.running.engine.cache.data
    view[slot * BLOCK] ^= 2
    client._ack(file._replace(lost=frozenset({0}), mtimes=frozenset()))


async def retimed() -> Tally:
    """A damaged block is not published again with a good checksum when the file gets another time."""
    trace = await record(new_image(ROOMY), ROOMY, [WRITE_ALL, FSYNC])
    image, model = damage("a", 0)(_arrived(trace.image, ROOMY, trace.log.events), trace.oracle.model)
    running = Running(image, ROOMY, random.Random(0))
    async with running.started(tasks=False) as engine:
        file = running.acquire(1, lambda: "a")
        await engine.attributes.set_mtime(file, 1)
    after = _arrived(image, ROOMY, running.log.events)
    await examine(after, ROOMY, model, drain=True)
    return Tally(3, {image.digest(), after.digest()})


async def catalog_lost() -> Tally:
    """Dirty blocks of files that the catalog does not know are kept: they are there when it is back."""
    trace = await record(new_image(ROOMY), ROOMY, [WRITE_ALL, FSYNC])
    image = _arrived(trace.image, ROOMY, trace.log.events)
    running = Running(image._replace(catalog=EMPTY_CATALOG), ROOMY, random.Random(0))
    async with running.started(tasks=True) as engine:
        await engine.flush()
        await trio.sleep(100)
    after = _arrived(image, ROOMY, running.log.events)._replace(catalog=image.catalog, fs=image.fs)
    await examine(after, ROOMY, trace.oracle.model, drain=True)
    return Tally(3, {image.digest(), after.digest()})


def _followed(image: Image, setting: Setting, log: list[Any]) -> Media:
    media = Media(image, setting.durability)
    for number, event in enumerate(log):
        media.follow(number, event)
    return media


def _arrived(image: Image, setting: Setting, log: list[Any]) -> Image:
    """The image after everything in the record has arrived."""
    media = _followed(image, setting, log)
    everything = {line: len(stores) for line, stores in media.lines.pending.items()}
    return media.image(everything, [True] * len(media.disk.pending))


async def stale_fill() -> Tally:
    """Old content that a write was waiting for is not merged with it after a truncate has cut it off."""
    tally = Tally()

    async def meddle(client: Client) -> None:
        file, cached = await client._file("a")
        engine = client.running.engine
        engine.cache.blocks.remove_all(cached)  # as eviction would
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.writer.write_slow, cached, HALF, words(file.token, 50, HALF, 8))
            await trio.sleep(client.rng.random())
            await engine.attributes.truncate(cached, 0)
            await engine.attributes.truncate(cached, 3 * BLOCK)
        found = await client.running.read(cached, 0, 3 * BLOCK)
        written = words(file.token, 50, HALF, 8)
        if found.replace(written, bytes(8)).strip(b"\0"):
            raise Violation("what a truncate has cut off is back")

    for seed in range(12):
        await record(new_image(PMEM), PMEM, [WRITE_ALL, FLUSH, ("call", meddle)], seed=seed)
        tally.operations += 5
    return tally


async def write_during_truncate() -> Tally:
    """A write that overlaps a truncate comes before it or after it, and that for good."""
    tally = Tally()
    for seed in range(12):
        seen: list[bytes] = []

        async def meddle(client: Client, seen: list[bytes] = seen) -> None:
            file, cached = await client._file("a")
            engine, data = client.running.engine, words(file.token, 50, BLOCK, BLOCK)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.attributes.truncate, cached, 0)
                await trio.sleep(3 * client.rng.random())
                if not engine.writer.write(cached, BLOCK, data):
                    await engine.writer.write_slow(cached, BLOCK, data)
            seen.append(await client.running.read(cached, 0, 3 * BLOCK))

        trace = await record(new_image(ROOMY_DISK), ROOMY_DISK, [WRITE, FSYNC, ("call", meddle)], seed=seed)
        media = _followed(trace.image, ROOMY_DISK, trace.log.events)
        (file,) = trace.oracle.model.values()
        file = file._replace(contents=(b"", seen[0]), mtimes=frozenset())
        for image in media.images(random.Random(seed)):
            await examine(image, ROOMY_DISK, {file.token: file}, drain=True)
            tally.images.add(image.digest())
        tally.operations += 4
    return tally


async def format_pool() -> Tally:
    """The superblock of a new pool is written after all of its headers are durably zero (O9)."""
    calls: list[tuple[int, int]] = []
    unsynced: dict[int, int] = {}
    pwrite, fsync, fdatasync = os.pwrite, os.fsync, os.fdatasync

    def watched_pwrite(fd: int, data: bytes, offset: int) -> int:
        if any(data[:8]):
            if unsynced.get(fd):
                raise Violation(f"O9: a superblock is written over {unsynced[fd]} bytes that are not durably zero")
            if sum(size for _, size in calls) < 4 << 20:
                raise Violation("O9: a superblock is written before the headers are zeroed")
            return pwrite(fd, data, offset)
        done = pwrite(fd, data, offset)
        calls.append((offset, done))
        unsynced[fd] = unsynced.get(fd, 0) + done
        return done

    def watched_sync(sync: Callable[[int], None]) -> Callable[[int], None]:
        def watched(fd: int) -> None:
            sync(fd)
            unsynced[fd] = 0

        return watched

    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(os, "pwrite", watched_pwrite),
        mock.patch.object(os, "fsync", watched_sync(fsync)),
        mock.patch.object(os, "fdatasync", watched_sync(fdatasync)),
    ):
        create_pool(Path(directory, "cache"), 4 << 20, volatile=True)
    return Tally(1)


SCENARIOS: dict[str, Scenario] = {
    "overwrites": programs([WRITE, WRITE, ("write", "a", HALF, BLOCK), WRITE, WRITE], setting=TIGHT),
    "overwrites, at once": programs(
        [WRITE_ALL, ("write", "a", HALF, 2 * BLOCK), WRITE, WRITE_ALL, WRITE_TWO, WRITE_ALL], setting=AT_ONCE
    ),
    "overwrites, tight": programs(
        [WRITE_ALL, ("write", "b", 0, 2 * BLOCK), READ, ("write", "c", 0, 3 * BLOCK), ("read", "b"), READ],
        setting=TIGHT,
    ),
    "two files, tight": programs(
        [WRITE_ALL, FLUSH, ("write", "b", 0, 3 * BLOCK), FLUSH, READ, ("read", "b"), WRITE, READ], setting=TIGHT
    ),
    "slots in flight": programs(
        [WRITE_ALL, START_FLUSH, WRITE_ALL, ("write", "b", 0, 3 * BLOCK), WAIT], setting=ROOMY, seeds=20, crashed=False
    ),
    "eviction, disk": programs(
        [WRITE, FLUSH, WRITE, FLUSH, ("write", "b", 0, 3 * BLOCK), ("wait", 2)], setting=TIGHT_DISK, seeds=2
    ),
    "eviction, at once, disk": programs(
        [WRITE_TWO, FLUSH, WRITE_TWO, FLUSH, ("write", "b", 0, 3 * BLOCK), ("wait", 2)], setting=AT_ONCE_DISK, seeds=2
    ),
    "freed after a start, at once, disk": programs(
        [WRITE_ALL, FSYNC, ("crash", "all"), WRITE_ALL, FSYNC, WRITE_ALL, FSYNC, WRITE_ALL], setting=AT_ONCE_DISK
    ),
    "writes during commits, disk": programs(
        [WRITE_ALL, ("wait", 1.5), WRITE, ("wait", 0.5), WRITE_ALL, ("wait", 1), WRITE], setting=DISK
    ),
    "overwrites, disk": programs(
        [WRITE, WRITE, FSYNC, WRITE, ("write", "a", HALF, BLOCK), FSYNC, WRITE_ALL], setting=TIGHT_DISK
    ),
    "writeback": programs([WRITE_ALL, FLUSH], [("append", "a", HALF), FLUSH, ("append", "a", HALF), START_FLUSH, WAIT]),
    "writeback of two files": programs([WRITE_ALL, ("write", "b", 0, BLOCK + HALF), FLUSH, ("close", "a"), READ]),
    "overwrite during writeback": programs([WRITE_ALL, START_FLUSH, WRITE, WAIT], seeds=2),
    "writeback of a closed file": programs([WRITE, ("close", "a"), ("wait", 20)]),
    "writeback of many files": programs(
        [*FILES, FLUSH], [*FILES, *CLOSE_ALL, ("wait", 30)], [*FILES, FLUSH, *AGAIN, FLUSH], setting=MANY
    ),
    "writeback of many files, disk": programs(
        [*FILES, FLUSH], [*FILES, FLUSH, *AGAIN, START_FLUSH, WAIT], setting=MANY_DISK
    ),
    "writeback of many files at once, disk": programs(
        [*FILES, START_FLUSH, *AGAIN, START_FLUSH, WAIT, *AGAIN, START_FLUSH, WAIT],
        setting=MANY_DISK,
        seeds=8,
        crashed=False,
    ),
    "overwrite during writeback of many files": programs([*FILES, START_FLUSH, *AGAIN, WAIT], setting=MANY, seeds=2),
    "truncate during writeback of many files": programs(
        [*FILES, START_FLUSH, EMPTY, ("truncate", "d", HALF), WAIT], setting=MANY, seeds=2
    ),
    "truncates before writeback of many files": programs(
        [*FILES, FLUSH, EMPTY, ("truncate", "c", 0), ("write", "b", 0, BLOCK), ("truncate", "d", HALF), FLUSH],
        setting=MANY,
    ),
    "syncs of everything overlap": programs(
        [("write", "e", 0, BLOCK), ("unlink", "e"), *FILES, START_FLUSH, *AGAIN, START_FLUSH, WAIT],
        setting=MANY,
        seeds=6,
        crashed=False,
    ),
    "write of one of many files fails": programs(
        *([*FILES, ("fail", "write", number), FLUSH] for number in (1, 3)),
        [*FILES, ("fail", "set_mtime", 2), START_FLUSH, WAIT],
        setting=MANY,
    ),
    "sync of many files fails": programs(
        [*FILES, ("fail", "sync_all"), FLUSH],
        [*FILES, *CLOSE_ALL, ("fail", "sync_all"), ("fail", "sync", 2), ("wait", 60)],
        setting=MANY,
        seeds=3,
    ),
    "sync of many files fails for a user": programs(
        *(
            [*FILES, UTIMES, ("utimes", "b"), START_FLUSH, ("wait", seconds), *FAILED_FSYNC, WAIT]
            for seconds in (2, 4, 6, 8)
        ),
        setting=MANY,
        seeds=2,
    ),
    "truncate": programs(
        [WRITE_ALL, FLUSH, EMPTY],
        [WRITE, WRITE, EMPTY],
        [WRITE_ALL, FLUSH, ("write", "a", 2 * BLOCK, BLOCK), EMPTY],
        setting=ROOMY,
    ),
    "truncate, two crashes": programs([WRITE_ALL, FLUSH, EMPTY], setting=ROOMY, nested=2),
    "truncate, disk": programs([WRITE_ALL, FSYNC, EMPTY], [WRITE_ALL, FSYNC, CUT, FLUSH], setting=ROOMY_DISK),
    "truncate, fast backing, disk": programs(
        [WRITE_ALL, FSYNC, CUT, FLUSH], [WRITE_ALL, FSYNC, EMPTY, FLUSH], setting=HASTY_DISK
    ),
    "truncate within a block": programs(
        [WRITE_ALL, CUT, GROW, READ],
        [WRITE_ALL, FLUSH, READ, CUT, GROW, READ],
        [WRITE_ALL, FLUSH, WRITE_ALL, CUT, GROW],
    ),
    "truncate, then larger": programs([WRITE_ALL, FLUSH, EMPTY, GROW], [WRITE_ALL, FLUSH, EMPTY, GROW, FSYNC]),
    "truncate during writeback": programs([WRITE_ALL, START_FLUSH, EMPTY, WAIT], seeds=2),
    "truncate during a read": programs(
        [WRITE_ALL, FLUSH, ("write", "b", 0, 4 * BLOCK), FLUSH, START_READ, EMPTY, GROW, WAIT, READ],
        [WRITE_ALL, FLUSH, ("write", "b", 0, 4 * BLOCK), FLUSH, START_READ, EMPTY, WAIT, GROW, READ],
        seeds=40,
        setting=TIGHT,
        crashed=False,
    ),
    "write during a read": programs(
        [WRITE_ALL, FLUSH, ("write", "b", 0, 4 * BLOCK), FLUSH, START_READ, WRITE_ALL, WAIT, READ],
        setting=TIGHT,
        seeds=20,
        crashed=False,
    ),
    "write during a read, at once": programs(
        [WRITE_ALL, FLUSH, ("write", "b", 0, 4 * BLOCK), FLUSH, START_READ, WRITE_ALL, WAIT, READ],
        setting=replace(TIGHT, vector_min_blocks=1),
        seeds=20,
        crashed=False,
    ),
    "stale fill": stale_fill,
    "write during truncate": write_during_truncate,
    "time during truncate": programs(
        [WRITE_ALL, ("beside", EMPTY, UTIMES)],
        [WRITE_ALL, ("beside", RETIME, EMPTY)],
        [WRITE_ALL, FSYNC, ("beside", EMPTY, UTIMES), FSYNC, FLUSH],
        setting=ROOMY_DISK,
        seeds=3,
    ),
    "truncate during truncate": programs(
        [WRITE_ALL, ("beside", EMPTY, GROW)], [WRITE_ALL, FSYNC, ("beside", EMPTY, GROW)], setting=ROOMY_DISK, seeds=3
    ),
    "write beside truncate": programs(
        [WRITE_ALL, ("beside", EMPTY, ("write", "a", HALF, BLOCK)), FSYNC],
        [WRITE_ALL, FLUSH, ("beside", CUT, ("write", "a", 2 * BLOCK, BLOCK))],
        setting=ROOMY_DISK,
        seeds=3,
    ),
    "truncate fails": programs([WRITE_ALL, FLUSH, ("fail", "truncate"), EMPTY, WRITE]),
    "size by fsync": programs([GROW, FSYNC], [WRITE, FLUSH, GROW, FSYNC]),
    "partial last block": programs(
        [
            ("write", "b", 0, 4 * BLOCK),
            FLUSH,
            ("write", "a", 0, HALF),
            FLUSH,
            ("write", "b", 0, 4 * BLOCK),
            FLUSH,
            READ,
            ("write", "a", BLOCK, HALF),
            READ,
        ],
        setting=TIGHT,
    ),
    "writeback, one block again": programs([WRITE_ALL, FLUSH, WRITE]),
    "damaged block, cut": programs([WRITE_ALL, ("call", cut_by_record), ("crash", "all", damage("a", 1))]),
    "times, two lives": programs([WRITE_ALL, FLUSH, CUT_OFF, FLUSH, CRASH, WRITE, FSYNC]),
    "times": programs(
        [WRITE_ALL, CUT_OFF, FLUSH],
        [WRITE_ALL, UTIMES, FSYNC],
        [WRITE, FLUSH, UTIMES, FSYNC],
        [WRITE_ALL, FLUSH, WRITE, UTIMES, FSYNC, FLUSH],
        [WRITE_ALL, START_FLUSH, UTIMES, FSYNC, WAIT, WRITE, FSYNC],
    ),
    "times with the data": programs(
        [WRITE_ALL, RETIME, FSYNC],
        [WRITE_ALL, FLUSH, WRITE, RETIME, FSYNC, FLUSH],
        [WRITE_ALL, START_FLUSH, RETIME, FSYNC, WAIT, WRITE, RETIME, FSYNC],
        [WRITE_ALL, CUT_OFF, RETIME, FSYNC],
    ),
    "times after 2262": programs(
        [WRITE_ALL, UTIMES_LATE, FSYNC],
        [WRITE_ALL, FLUSH, UTIMES_LATE, FLUSH, READ, WRITE, UTIMES_LATE],
        [WRITE_ALL, CUT_OFF, FLUSH, CUT, UTIMES_LATE, FLUSH],
    ),
    "unlink": programs([WRITE, UNLINK, ("sync_directory",)], [WRITE, UNLINK, FLUSH], [WRITE, UNLINK, ("wait", 50)]),
    "unlink fails": programs([WRITE, ("fail", "unlink"), UNLINK, ("write", "a", BLOCK, BLOCK), FSYNC]),
    "rename": programs([WRITE, FLUSH, ("rename", "a", "b"), FLUSH], [WRITE, ("rename", "a", "b"), WRITE, ("wait", 20)]),
    "shutdown": programs([WRITE, WRITE, ("shutdown",)], [WRITE_ALL, FLUSH, UNLINK, ("shutdown",)]),
    "two lives": programs(
        [WRITE_ALL, ("write", "b", 0, BLOCK), CRASH, ("write", "c", 0, BLOCK), WRITE, ("crash", "none"), WRITE, READ],
        [WRITE_ALL, FLUSH, EMPTY, FLUSH, CRASH, WRITE],
    ),
    "write fails": programs(
        [("fail", "write"), WRITE_ALL, FLUSH], [WRITE_ALL, ("fail", "write", 1, errno.ENOSPC, 2), START_FLUSH, WAIT]
    ),
    "sync fails": programs(
        [WRITE_ALL, ("fail", "sync"), FLUSH], [WRITE_ALL, ("fail", "sync", 1, errno.EIO, 2), START_FLUSH, WAIT], seeds=3
    ),
    "sync fails for a user": programs(
        [WRITE, FLUSH, WRITE_ALL, UTIMES, START_FLUSH, ("fail", "sync"), FSYNC, WAIT], seeds=3
    ),
    "errors, then none": programs([("fail", "write", 1, errno.EIO, 2), WRITE, ("wait", 300), ("call", drained)]),
    "no space, then some": programs([("fail", "write", 1, errno.ENOSPC, 2), WRITE, ("wait", 300), ("call", drained)]),
    "catalog full for a while": programs(
        [CATALOG_FULL, WRITE, ("call", going_on), WRITE_ALL, WRITE_ALL, FSYNC, FLUSH, ("call", drained)],
        [WRITE_ALL, CATALOG_FULL, START_FLUSH, WAIT, ("call", going_on), FLUSH, ("call", drained)],
        [WRITE_ALL, FLUSH, CATALOG_FULL, CUT_OFF, ("call", going_on), CUT_OFF, CUT_OFF, FLUSH],
        [WRITE_ALL, CUT_OFF, CATALOG_FULL, UTIMES, ("call", going_on), FSYNC, FLUSH],
        [WRITE_ALL, CATALOG_FULL, UNLINK, ("call", going_on), UNLINK, ("wait", 50)],
    ),
    "damage in flight": programs([WRITE_ALL, ("call", flip), FLUSH]),
    "damage in flight, many files": programs([WRITE_ALL, *FILES[1:], ("call", flip), FLUSH], setting=MANY),
    "damaged dirty block, another time": retimed,
    "damaged dirty block": programs([WRITE_ALL, ("crash", "all", damage("a", 1)), FLUSH, READ, WRITE_ALL, FLUSH]),
    "damaged dirty block, merged": programs(
        [WRITE_ALL, ("crash", "all", damage("a", 1)), ("write", "a", BLOCK + HALF, HALF), FLUSH],
        [WRITE_ALL, ("crash", "all", damage("a", 0)), UTIMES, FLUSH],
    ),
    "damaged clean block": programs([WRITE_ALL, FLUSH, ("crash", "all", damage("a", 1)), READ]),
    "damaged dirty block, tight": programs(
        [
            WRITE,
            ("crash", "all", damage("a", 0)),
            ("write", "b", 0, 3 * BLOCK),
            FLUSH,
            ("write", "b", 0, 3 * BLOCK),
            FLUSH,
            ("write", "c", 0, 3 * BLOCK),
            ("crash", "all"),
        ],
        setting=TIGHT,
    ),
    "forgotten, then used again, disk": programs(
        [*EVICTED, EMPTY],
        [*EVICTED, UNLINK, ("sync_directory",)],
        [*EVICTED, ("call", round_of_upkeep)],
        [*EVICTED, CUT, FSYNC, ("wait", 30), WRITE, FSYNC],
        setting=TIGHT_HASTY_DISK,
        seeds=3,
    ),
    "forgotten while dormant, then used again, disk": programs(
        [*EVICTED_ASLEEP, EMPTY],
        [*EVICTED_ASLEEP, UNLINK, ("sync_directory",)],
        [*EVICTED_ASLEEP, CUT, FSYNC, ("wait", 30), WRITE, FSYNC],
        setting=TIGHT_HASTY_DISK,
        seeds=3,
    ),
    "two ids of a handle": programs([WRITE_ALL, FSYNC, ("crash", "all", second_id), READ], setting=ROOMY),
    "changed by a stranger, then by a user, disk": programs(
        [WRITE_ALL, FLUSH, ("crash", "all", rewrite("a")), UTIMES, ("call", round_of_upkeep)],
        [WRITE_ALL, FLUSH, ("crash", "all", rewrite("a")), READ, ("call", round_of_upkeep)],
        setting=HASTY_DISK,
        seeds=3,
    ),
    "damaged committed block, disk": programs([WRITE, FSYNC, ("crash", "all", damage("a", 0)), READ], setting=DISK),
    "dormant files, tight": programs(
        [WRITE_TWO, FLUSH, CRASH, ("call", asleep), *EVICTING, ("call", adds_up), READ, ("read", "b")],
        [WRITE_TWO, FLUSH, CLOSE, WAIT, ("call", asleep), *EVICTING, ("call", adds_up), READ, ("read", "b")],
        [WRITE_TWO, FLUSH, CLOSE, WAIT, WRITE, FSYNC, CLOSE, WAIT, *EVICTING, READ, ("call", adds_up)],
        setting=TIGHT,
    ),
    "dormant files, evicted in part": programs(
        [
            *(("write", "a", 0, 70 * BLOCK), FLUSH, CLOSE, WAIT, ("call", asleep)),
            *(("write", "b", 0, 20 * BLOCK), ("call", adds_up), READ, ("read", "b"), ("call", adds_up)),
        ],
        setting=Setting(slots=80),
        crashed=False,
    ),
    "dormant files": programs(
        [WRITE_TWO, FLUSH, CLOSE, WAIT, ("call", asleep), UTIMES, ("call", adds_up), CLOSE, WAIT, FSYNC],
        [WRITE_TWO, ("fail", "write", 1, errno.EIO, 9), CLOSE, WAIT, ("call", adds_up), READ],
        [WRITE_TWO, FLUSH, CRASH, EMPTY, FLUSH, CLOSE, WAIT, READ],
        setting=ROOMY,
    ),
    "dormant files, unlinked, disk": programs(
        [WRITE_TWO, CLOSE, WAIT, ("call", asleep), UNLINK, ("sync_directory",), ("wait", 50)],
        [WRITE_TWO, FLUSH, CRASH, UNLINK, ("sync_directory",), WRITE, FSYNC],
        setting=ROOMY_DISK,
    ),
    "unreadable block": programs(
        [WRITE_ALL, FLUSH, ("crash", "all", unreadable("a", 1)), READ, WRITE_ALL, WRITE_ALL, FLUSH, WRITE_ALL],
        [WRITE_ALL, ("crash", "all", unreadable("a", 1)), FLUSH, READ, WRITE_ALL, FLUSH, WRITE_ALL, FLUSH, WRITE_ALL],
        [WRITE_ALL, ("crash", "all", unreadable("a", 0)), ("write", "a", HALF, HALF), UTIMES, FLUSH],
    ),
    "unreadable block, disk": programs(
        [WRITE_ALL, FLUSH, ("crash", "all", unreadable("a", 1)), READ, WRITE_ALL, FSYNC, WRITE_ALL, FLUSH, WRITE_ALL],
        [WRITE_ALL, FSYNC, ("crash", "all", unreadable("a", 1)), FLUSH, READ, WRITE_ALL, FLUSH, WRITE_ALL, FSYNC],
        setting=DISK,
    ),
    "changed by a stranger": programs([WRITE_ALL, FLUSH, ("crash", "all", rewrite("a")), READ]),
    "edited after a kill": programs(  # a power cut before that is found out hides it
        [WRITE_ALL, FSYNC, ("crash", "kill", edit("a"))],
        [WRITE_ALL, CUT, FSYNC, ("crash", "kill", edit("a"))],
        [WRITE_ALL, FLUSH, CUT, ("crash", "kill", edit_of_all("a"))],
        [WRITE_ALL, UTIMES, ("crash", "all"), WRITE, ("crash", "kill", edit("a"))],
        [WRITE_ALL, FSYNC, ("crash", "kill", take("a"))],
        [WRITE_ALL, FSYNC, ("crash", "kill", replace_by_other("a"))],
        setting=ROOMY,
        crashed=False,
    ),
    "edited behind the mount": programs(
        [WRITE_ALL, FLUSH, WRITE, ("crash", "kill", edit("a"))],
        [WRITE_ALL, FLUSH, WRITE, ("crash", "all", edit("a")), FLUSH],
        setting=ROOMY,
    ),
    "edited after an orderly end": programs(
        [WRITE_ALL, ("shutdown",), ("crash", "none", edit("a"))],
        [WRITE_ALL, FLUSH, WRITE, UTIMES, ("shutdown",), ("crash", "none", edit("a", BLOCK))],
        [WRITE_ALL, CUT, ("shutdown",), ("crash", "none", edit("a", 3 * BLOCK))],
        setting=ROOMY,
    ),
    "edited, and the cache has not all of it": programs(
        [WRITE_ALL, FLUSH, ("write", "b", 0, 4 * BLOCK), FLUSH, WRITE, ("crash", "kill", edit_of_part("a"))],
        setting=TIGHT,
    ),
    "removed behind the mount": programs(
        [WRITE_ALL, FLUSH, WRITE, ("crash", "all", take("a"))],
        [WRITE_ALL, FLUSH, WRITE, ("crash", "all", replace_by_other("a"))],
        setting=ROOMY,
    ),
    "no strangers": programs(
        [WRITE_ALL, FSYNC, UTIMES, WRITE, FLUSH, UTIMES, WRITE],
        [WRITE_ALL, FLUSH, GROW, WRITE, CUT, WRITE, ("crash", "kill"), WRITE, START_FLUSH, UTIMES, WAIT],
        [WRITE_ALL, START_FLUSH, UTIMES, GROW, WAIT, ("crash", "some"), WRITE, ("crash", "kill"), FLUSH],
        [WRITE_ALL, FLUSH, ("close", "a"), ("crash", "all"), UTIMES, WRITE, FSYNC],
        setting=ROOMY,
    ),
    "no strangers, many files": programs([*FILES, FLUSH, *AGAIN, START_FLUSH, WAIT], setting=MANY),
    "no strangers, and a power cut": programs(
        [WRITE, FLUSH, UTIMES, ("wait", 50), WRITE, ("crash", "none"), READ, ("crash", "kill"), READ],
        [WRITE, FLUSH, UTIMES, ("wait", 50), ("crash", "none"), WRITE, ("crash", "kill"), READ],
        setting=ROOMY,
    ),
    "lost by the backing": programs([WRITE_ALL, FLUSH, WRITE, ("crash", "all", take("a"))]),
    "catalog lost": catalog_lost,
    "format": format_pool,
}


async def run(name: str) -> Tally:
    """:raises Violation: the scenario has found something."""
    try:
        return await bounded(SCENARIOS[name], steps=1_000_000)
    except Violation as violation:
        raise Violation(f"{violation}\n  scenario: {name}") from None
