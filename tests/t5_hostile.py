"""Damaged and forged caches: each is served or refused in one line, and never more than that.

A mutant of a good cache is opened, recovered, read, written to, flushed and left by a process of its own, which must
neither die nor hang nor say anything unexpected. What it refuses must be as it was, and nothing outside of the backing
may have changed. ``HOSTILE_MUTANTS`` sets how many there are of each kind, ``HOSTILE_SEED`` where they begin.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import stat
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
import trio
from support_posix import facts, tree

from cachefsd.backing import handles
from cachefsd.backing.mark import ATTRIBUTE
from cachefsd.backing.ports import BackingStat
from cachefsd.backing.tree import Caller, Tree
from cachefsd.core.engine import Engine
from cachefsd.core.files import CachedFile, Hints
from cachefsd.errors import UserError
from cachefsd.media.header import HEADER_SIZE, HeaderCodec
from cachefsd.media.ports import Changes, Intent, SlotState
from cachefsd.media.records import decode_record, encode_record
from cachefsd.media.superblock import HEADER_OFFSET, SUPERBLOCK_SIZE, Superblock
from cachefsd.service import caches, stack
from cachefsd.service.config import MountConfig, Options

COUNT = int(os.environ.get("HOSTILE_MUTANTS", "120"))
SEED = int(os.environ.get("HOSTILE_SEED", "1"))
DEADLINE_S = 100
SLOTS = 32
SIZE = (2 << 20) + SLOTS * 4096
NAMES = ("clean", "dirty", "cut", "lost", "gone")
NUMBERS = (
    0,
    1,
    2,
    4095,
    4096,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**52,
    2**62,
    2**63 - 2**48,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
SUPERBLOCK_FIELDS = (
    *("version", "incompat", "ro_compat", "generation", "incarnation", "seq_floor", "persisted_seq"),
    *("identity", "pool_uuid", "path_hint", "file_size", "block_size", "slots", "header_offset", "data_offset"),
)
REFUSED = 3

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="opening files by handle needs root")


# ---- what is done to each mutant, in a process of its own


async def work(config: MountConfig, do: Callable[[Engine, Tree], Any]) -> None:
    async with stack.assembled(config) as below, trio.open_nursery() as nursery:
        nursery.start_soon(below.engine.run)
        await do(below.engine, below.tree)
        nursery.cancel_scope.cancel()


def acquire(engine: Engine, tree: Tree, name: bytes) -> CachedFile:
    try:
        found = tree.create_file(tree.root_fd, name, 0o644, Caller(0, 0))
    except FileExistsError:
        found = tree.find(tree.root_fd, name)
    os.close(found.fd)
    status = found.stat
    about = BackingStat(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_nlink)
    hints = Hints(tree.root.handle, name, name, status.st_mode, status.st_uid, status.st_gid)
    return engine.acquire(found.handle, about, lambda: hints, engine.cache.backing.sync_all)


async def write(engine: Engine, file: CachedFile, offset: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        if engine.writer.write(file, offset + done, data[done:]):
            return
        done += await engine.writer.write_slow(file, offset + done, data[done:])


async def prepare(engine: Engine, tree: Tree) -> None:
    for name in NAMES:
        await write(engine, acquire(engine, tree, name.encode()), 0, name.encode() * 2000)
    await engine.flush()
    for name in NAMES[1:]:
        await write(engine, acquire(engine, tree, name.encode()), 4096, name.encode() * 1000)


async def use(engine: Engine, tree: Tree) -> None:
    for file in list(engine.cache.files.by_id.values()):
        for offset in (0, 4096, max(0, file.size - 1)):
            with contextlib.suppress(OSError):
                engine.reader.read(file, offset, 8192) or await engine.reader.read_slow(file, offset, 8192)
    for name in (*NAMES, "new"):
        try:
            file = acquire(engine, tree, name.encode())
            await write(engine, file, 100, b"new" * 3000)
            await engine.attributes.truncate(file, 4000)
        except OSError:
            pass
    with contextlib.suppress(OSError):
        await engine.flush()


def serve(config: MountConfig, output: Path) -> None:
    """What a daemon does between its start and its end, in a child; never returns."""
    status = 1
    try:
        sys.stdout = sys.stderr = open(output, "w")  # noqa: SIM115, for good; pytest's own do not write to 1 and 2
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        trio.run(work, config, use, strict_exception_groups=True)
        status = 0
    except UserError as error:
        print(error, flush=True)
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


# ---- the good cache


class Place:
    """A backing with something beside it, and a cache in memory that is put back before each mutant."""

    def __init__(self, base: Path, memory: Path) -> None:
        self.base = base
        self.backing, self.outside = base / "fs" / "backing", base / "fs" / "outside"
        for path in (self.backing, self.outside):
            path.mkdir(parents=True)
        (self.outside / "directory").mkdir()
        (self.outside / "file").write_bytes(b"of somebody else" * 1000)
        self.cache, self.good = memory / "cache", memory / "good"
        self.config = MountConfig(
            self.backing, self.backing, self.cache, volatile=True, options=Options(retry_min=0.01, retry_max=0.02)
        )
        caches.format_cache(self.cache, SIZE, 4096, volatile=True, progress=None, may_replace=None)
        trio.run(work, self.config, prepare)
        self.superblock = self.read_superblock()
        self.codec = HeaderCodec(self.superblock.pool_uuid, 4096)
        self.add_what_crashes_leave()
        shutil.copytree(self.cache, self.good)
        self.mark = os.getxattr(self.backing, ATTRIBUTE)
        kept = [self.backing / name for name in NAMES[:3]]
        self.files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}
        self.before = self.around()

    def read_superblock(self) -> Superblock:
        raw = (self.cache / "pool").read_bytes()[: 2 * SUPERBLOCK_SIZE]
        copies = [Superblock.unpack(raw[:SUPERBLOCK_SIZE]), Superblock.unpack(raw[SUPERBLOCK_SIZE:])]
        return max((copy for copy in copies if copy is not None), key=lambda copy: copy.generation)

    def add_what_crashes_leave(self) -> None:
        """An intent, a tombstone, and a file that the backing has lost."""
        catalog = stack.open_catalog(self.cache, self.superblock.pool_uuid)
        records = {record.name: record for record in catalog.files()}
        gone = replace(records[b"gone"], unlinked=True)
        intent = Intent(records[b"cut"].file_id, 1000, 5000, 7)
        catalog.transact(Changes(put=[gone], add_intents=[intent]))
        catalog.close()

    def around(self) -> Any:
        """All of what must not change."""
        times = {path: path.stat().st_mtime_ns for path in (self.outside, *self.outside.iterdir())}
        return facts(self.outside), tree(self.outside), times, sorted(os.listdir(self.backing.parent))

    def restore(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.copytree(self.good, self.cache)
        os.setxattr(self.backing, ATTRIBUTE, self.mark)  # each start has a session of its own
        for path in self.backing.iterdir():
            if path not in self.files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, (content, mtime_ns) in self.files.items():  # else they would be those of strangers
            path.write_bytes(content)
            os.utime(path, ns=(mtime_ns, mtime_ns))

    def cached(self) -> dict[str, Any]:
        """What a refusal must leave as it is; LMDB's lock file and our note are made anew by everybody."""
        found = {}
        for name in ("pool", "catalog", "catalog/data.mdb"):
            path = self.cache / name
            is_file = path.is_file() and not path.is_symlink()
            found[name] = (facts(path)[:2], path.read_bytes() if is_file else None)
        return found

    def run(self) -> tuple[int, str]:
        """Serve the cache in a child: how it ended, and what it said."""
        output = self.base / "output"
        pid = os.fork()
        if pid == 0:
            serve(self.config, output)
        child = os.pidfd_open(pid)
        try:
            in_time = bool(select.select([child], [], [], DEADLINE_S)[0])
            if not in_time:
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        finally:
            os.close(child)
        assert in_time, "it hangs"
        return os.waitstatus_to_exitcode(status), output.read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        yield Place(tmp_path_factory.mktemp("hostile"), Path(memory))


def judge(place: Place, before: dict[str, Any]) -> bool:
    """Run the mutant; whether it was served."""
    code, said = place.run()
    assert code in (0, REFUSED), f"ended with {code}: {said}"
    assert "Traceback" not in said
    assert place.around() == place.before, "something outside of the backing was changed"
    if code == REFUSED:
        assert said.count("\n") == 1, said
        # An intent that the backing refuses to fulfil is found out while recovering, which is as a crash then.
        assert "the backing fails for" in said or place.cached() == before, f"it was written to, though refused: {said}"
    return code == 0


# ---- the mutants


def damage(rng: random.Random, raw: bytearray, start: int, stop: int) -> None:
    """Change bytes in a range in one of the ways in which media or programs do it."""
    at = rng.randrange(start, stop)
    how = rng.randrange(5)
    if how == 0:
        raw[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        length = min(rng.randrange(1, 65), stop - at)
        raw[at : at + length] = rng.randbytes(length)
    elif how == 2:
        at = at // 8 * 8
        raw[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
    elif how == 3:
        at = at // 2 * 2
        raw[at : at + 2] = struct.pack("<H", rng.choice((0, 1, 2, 8, 15, 16, 17, 4095, 4096, 65535)))
    else:
        length = min(512, stop - at)
        source = rng.randrange(start, stop - length + 1)
        raw[at : at + length] = raw[source : source + length]


def damaged_superblocks(place: Place, rng: random.Random) -> None:
    """Both copies say the same wrong thing with a good checksum, or either is garbage."""
    with open(place.cache / "pool", "r+b") as file:
        raw = bytearray(file.read(SUPERBLOCK_SIZE))
        if rng.random() < 0.7:
            block, geometry = place.superblock, place.superblock.geometry
            name = rng.choice(SUPERBLOCK_FIELDS)
            if name in ("identity", "pool_uuid", "path_hint"):
                value: Any = rng.randbytes(16)
            else:
                value = rng.choice(NUMBERS)
                value &= 2**32 - 1 if name in ("version", "block_size") else 2**64 - 1
            if hasattr(geometry, name):
                block = replace(block, geometry=replace(geometry, **{name: value}))
            else:
                block = replace(block, **{name: value})
            raw = bytearray(block.pack())
            file.seek(0)
            file.write(raw + raw)
        else:
            damage(rng, raw, 0, SUPERBLOCK_SIZE)
            file.seek(0)
            file.write(raw + (raw if rng.random() < 0.5 else b""))


def damaged_headers(place: Place, rng: random.Random) -> None:
    with open(place.cache / "pool", "r+b") as file:
        for _ in range(rng.randrange(1, 8)):
            slot = rng.randrange(SLOTS)
            file.seek(HEADER_OFFSET + rng.randrange(SLOTS) * HEADER_SIZE)
            raw = bytearray(file.read(HEADER_SIZE))
            _, seq, file_id, block, checksum, mtime, place_word, _ = struct.unpack("<8Q", raw)
            if rng.random() < 0.7:
                values = [seq, file_id, block, checksum, mtime]
                for _ in range(rng.randrange(1, 3)):
                    values[rng.randrange(5)] = rng.choice(NUMBERS)
                state, length = rng.choice(list(SlotState)), rng.choice((place_word >> 32, 1, 4095, 4096))
                seq, file_id, block, checksum, mtime = values
                body = place.codec.body(seq, file_id, block, checksum, mtime, slot, length)
                raw[:] = struct.pack("<Q", place.codec.state_word(state, seq, slot)) + body
            else:
                damage(rng, raw, 0, HEADER_SIZE)
            file.seek(HEADER_OFFSET + slot * HEADER_SIZE)
            file.write(raw)


def damaged_records(place: Place, rng: random.Random) -> None:
    """Good LMDB, bad values."""
    env = lmdb.Environment(os.fspath(place.cache / "catalog"), map_size=0, max_dbs=4, lib_version=0)
    with env.begin(write=True) as txn:
        for _ in range(rng.randrange(1, 4)):
            name = rng.choice([b"files", b"files", b"files", b"intents", b"settings"])
            database = env.open_db(name, txn)
            with txn.cursor(database) as cursor:
                key, value = rng.choice(list(cursor) or [(b"\0" * 8, b"")])
            how = rng.randrange(4)
            if name == b"files" and how:
                with contextlib.suppress(ValueError, struct.error):  # an earlier change has made it unreadable
                    value = forged_record(place, rng, key, value)
            elif name == b"intents" and how:
                key = struct.pack(">QQ", rng.choice((1, 2, 3, 4, *NUMBERS)), rng.choice(NUMBERS))
                value = struct.pack("<Qq", rng.choice(NUMBERS), rng.choice((-(2**63), -1, 0, 2**63 - 1)))
            elif how == 3:
                key = rng.randbytes(rng.randrange(1, 20))
            else:
                raw = bytearray(value) or bytearray(1)
                damage(rng, raw, 0, len(raw))
                value = bytes(raw[: rng.choice((len(raw), rng.randrange(len(raw) + 1)))])
            if not (name == b"settings" and how == 0):
                txn.put(key, value, db=database)
            else:
                txn.put(
                    rng.choice([b"next_file_id", b"policy"]),
                    rng.choice([b"", b"-1", b"x", b"\xb2", b"9" * 30]),
                    db=database,
                )
    env.close()


def forged_record(place: Place, rng: random.Random, key: bytes, value: bytes) -> bytes:
    record = decode_record(struct.unpack(">Q", key)[0], value)
    outside = [handle_of(path) for path in (place.outside, place.outside / "directory", place.backing.parent)]
    names = [b"..", b".", b"", b"a/b", b"../outside/new", b"/etc/new", b"n\0", b"n" * 256, b"clean", b"new", b"\xff\n"]
    nonsense = [b"", b"\1", b"\1" + bytes(12), rng.randbytes(17), b"\0" + rng.randbytes(16), b"\1" + b"\xff" * 150]
    field = rng.choice(["handle", "parent_handle", "name", "path", "mode", "uid", "attr_seq", "mtime_ns", "stamp"])
    wrong: Any = {
        "handle": rng.choice([*outside, *nonsense]),
        "parent_handle": rng.choice([*outside, *nonsense]),
        "name": rng.choice(names),
        "path": rng.choice(names),
        "mode": rng.choice([0, 0o107777, 0o40755, 0o120777, 2**32 - 1]),
        "uid": rng.choice([0, 1000, 2**32 - 1]),
        "attr_seq": rng.choice(NUMBERS),
        "mtime_ns": rng.choice([-(2**63), -1, 2**63 - 1]),
        "stamp": None,
    }[field]
    changes = {field: wrong}
    if field in ("parent_handle", "name"):
        changes["handle"] = b"\1" + bytes(12)  # of no inode: it has to be created again
    return encode_record(replace(record, **changes))


def handle_of(path: Path) -> bytes:
    fd = os.open(path, os.O_PATH)
    try:
        return handles.file_handle(fd)
    finally:
        os.close(fd)


def damaged_lmdb(place: Place, rng: random.Random) -> None:
    """The raw file: mostly where LMDB keeps its structure."""
    path = place.cache / "catalog" / "data.mdb"
    raw = bytearray(path.read_bytes())
    pages = len(raw) // 4096
    for _ in range(rng.randrange(1, 4)):
        page = rng.randrange(pages) * 4096
        how = rng.randrange(6)
        if how == 0:
            damage(rng, raw, page, page + 16)
        elif how == 1:
            damage(rng, raw, page + 16, page + 64)
        elif how == 2:
            damage(rng, raw, page, page + 512)
        elif how == 3:
            damage(rng, raw, page, page + 4096)
        elif how == 4:
            other = rng.randrange(pages) * 4096
            raw[page : page + 4096] = raw[other : other + 4096]
        else:
            # In a meta page, where one word leads everywhere: sizes, flags, depths, roots, last page, transaction.
            at = rng.randrange(2) * 4096 + rng.randrange(16, 16 + 136) // 8 * 8
            raw[at : at + 8] = struct.pack("<Q", rng.choice((*NUMBERS, *range(pages + 2))))
    path.write_bytes(raw)


def damaged_files(place: Place, rng: random.Random) -> None:
    """Not the contents, but the files themselves."""
    name = rng.choice(["pool", "catalog/data.mdb", "catalog/lock.mdb", "lock"])
    path = place.cache / name
    how = rng.randrange(8)
    if how == 0:
        os.truncate(path, rng.randrange(path.stat().st_size + 1))
    elif how == 1:
        os.truncate(path, path.stat().st_size + rng.choice((1, 4096, 2**24)))
    elif how == 2:
        path.chmod(rng.choice((0o666, 0o620, 0o602)))
    elif how == 3:
        os.chown(path, 1000, 1000)
    elif how == 4 and path.parent == place.cache / "catalog":
        path.parent.chmod(0o777)
    else:
        path.unlink()
        if how == 5:
            path.symlink_to(place.outside / "file")
        elif how == 6:
            os.mkfifo(path, 0o600)
        elif how == 7:
            path.mkdir(mode=0o700)


KINDS = [damaged_superblocks, damaged_headers, damaged_records, damaged_lmdb, damaged_files]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mutate", KINDS, ids=lambda kind: kind.__name__)
def test_mutants_are_served_or_refused(place: Place, mutate: Callable[[Place, random.Random], None]) -> None:
    served = 0
    for number in range(SEED, SEED + COUNT):
        place.restore()
        mutate(place, random.Random(f"{mutate.__name__} {number}"))
        before = place.cached()
        try:
            served += judge(place, before)
        except AssertionError as error:
            raise AssertionError(f"HOSTILE_SEED={number}: {error}") from error
    print(f"{mutate.__name__}: {COUNT} mutants from HOSTILE_SEED={SEED}, {served} served")


def test_the_good_cache_is_served(place: Place) -> None:
    place.restore()
    assert judge(place, place.cached())
    # What was synced and is not there any more was removed by somebody.
    names = [name.partition(".")[0] for name in sorted(os.listdir(place.backing))]
    assert names == ["clean", "cut", "dirty", "gone", "lost", "lost", "new"]
    assert (place.backing / "dirty").stat().st_size == 4000
    assert stat.S_IMODE((place.cache / "pool").stat().st_mode) == 0o600
