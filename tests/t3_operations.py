"""The handlers without a kernel: what they answer, what they count, and what they keep open."""

from __future__ import annotations

import errno
import inspect
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
from support_fs import below, ext4, ext4_area, file_system  # noqa: F401  (fixtures)

from cachefsd.core.options import EngineOptions
from cachefsd.core.recovery import recover
from cachefsd.fuse import directories
from cachefsd.fuse import inode as inode_module
from cachefsd.fuse.operations import Operations
from cachefsd.fuse.replies import FAULTS
from cachefsd.media.catalog import create_catalog, open_catalog
from cachefsd.media.pool import open_pool
from cachefsd.media.poolfile import create_pool

ROOT = pyfuse3.ROOT_INODE
CTX: Any = SimpleNamespace(uid=0, gid=0, pid=os.getpid(), umask=0o022)
NOTHING = {"uid": False, "gid": False, "mode": False, "size": False, "atime": False, "mtime": False}


def fields(*names: str) -> Any:
    """The SetattrFields that say that just these are to be set."""
    return SimpleNamespace(**{f"update_{name}": name in names for name in NOTHING})


@asynccontextmanager
async def operations(backing: Path, cache: Path) -> AsyncIterator[Operations]:
    if not cache.exists():
        info = create_pool(cache, 4 << 20, volatile=True)
        create_catalog(cache, info.uuid, info.slots)
    with open_pool(cache, volatile=True) as pool:
        catalog = open_catalog(cache, pool.uuid)
        try:
            async with below(backing) as lower:
                engine = await recover(pool, catalog, lower.backing, EngineOptions(), lower.data.run)
                result = Operations(engine, lower.tree)
                try:
                    yield result
                finally:
                    result.close()
                    engine.close()
        finally:
            catalog.close()


@pytest.fixture
async def ops(ext4_area: Path, tmp_path: Path) -> AsyncIterator[Operations]:  # noqa: F811
    async with operations(ext4_area, tmp_path / "cache") as result:
        yield result


@contextmanager
def failing(number: int) -> Iterator[None]:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        yield
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]


async def find(ops: Operations, name: bytes, parent: int = ROOT) -> int:
    """The node id of a name, looked up once."""
    number: int = (await ops.lookup(parent, name, CTX)).st_ino
    assert number
    return number


async def create(ops: Operations, name: bytes, parent: int = ROOT) -> int:
    info, entry = await ops.create(parent, name, 0o644, os.O_RDWR | os.O_EXCL, CTX)
    number: int = entry.st_ino
    assert handle_of(ops, number) == info.fh
    return number


def handle_of(ops: Operations, number: int) -> int:
    """The file handle of the only open of an inode."""
    (handle,) = (handle for handle, opened in ops._files.table.items() if opened.inode.number == number)
    return handle


def descriptors() -> int:
    """How many O_PATH descriptors this process has."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            flags = Path(f"/proc/self/fdinfo/{name}").read_text().split("flags:")[1].split()[0]
        except FileNotFoundError:
            continue
        count += bool(int(flags, 8) & os.O_PATH)
    return count


# ---- errors


HANDLERS = sorted(
    name
    for name, member in vars(Operations).items()
    if inspect.iscoroutinefunction(inspect.unwrap(member)) and name in vars(pyfuse3.Operations)
)
VALUES: dict[str, Any] = {
    "attr": pyfuse3.EntryAttributes(),
    "buf": b"x",
    "ctx": CTX,
    "datasync": False,
    "fields": fields("size", "mode"),
    "flags": 0,
    "mode": stat.S_IFREG | 0o600,
    "name": b"name",
    "name_new": b"new",
    "name_old": b"old",
    "new_name": b"new",
    "off": 0,
    "rdev": 0,
    "size": 10,
    "start_id": 0,
    "target": b"target",
    "token": object(),
    "value": b"",
}


def call(ops: Operations, name: str, number: int) -> Awaitable[Any]:
    """Call a handler for an inode, its file or its directory, with whatever else it wants."""
    handler = getattr(ops, name)
    arguments = []
    for word in inspect.signature(handler).parameters:
        if word == "fh" and name in ("read", "write", "flush", "fsync", "release"):
            arguments.append(handle_of(ops, number))
        elif word in ("inode", "fh") or "parent_inode" in word:
            arguments.append(number)
        elif word == "inode_list":
            arguments.append([(number, 1)])
        else:
            arguments.append(VALUES[word])
    result: Awaitable[Any] = handler(*arguments)
    return result


def test_all_of_the_protocol_is_there() -> None:
    """Every operation that the binding has, but for poll: the kernel knows that files are always ready."""
    all_ = {name for name, member in vars(pyfuse3.Operations).items() if inspect.iscoroutinefunction(member)}
    assert all_ - set(HANDLERS) == {"poll"}


class Broken:
    """Everything about it is a bug."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not this way")


@pytest.mark.parametrize("handler", [name for name in HANDLERS if name not in ("access", "flush", "opendir")])
async def test_a_bug_is_an_error_of_that_request_only(ops: Operations, handler: str, expect_logs: Any) -> None:
    number = await create(ops, b"file")
    ops._reader = ops._writer = Broken()  # type: ignore[misc, assignment]
    ops._tree = ops._engine = ops._inodes._tree = ops._inodes._engine = Broken()  # type: ignore[misc, assignment]
    ops._directories._inodes = ops._files._engine = Broken()  # type: ignore[misc, assignment]
    ops._inodes.table[number].fd = -1
    ops._inodes.fds.using = Broken().__getattr__  # type: ignore[method-assign]
    expect_logs(f"a bug: {handler} failed", count=1)
    try:
        if handler == "forget":
            ops._inodes.forget = Broken().__getattr__  # type: ignore[method-assign]
            await call(ops, handler, number)  # there is nobody to tell
        else:
            with failing(errno.EIO):
                await call(ops, handler, number)
        assert handler in {fault["where"] for fault in FAULTS.listed()}
    finally:
        ops._inodes.table.clear()
        ops._files.table.clear()


@pytest.mark.parametrize(
    "handler", [name for name in HANDLERS if "inode" in str(inspect.signature(getattr(Operations, name)))]
)
async def test_an_inode_that_was_forgotten_is_stale(ops: Operations, handler: str) -> None:
    if handler == "forget":
        await ops.forget([(10**9, 1)])
        return
    with failing(errno.ESTALE):
        await call(ops, handler, 10**9)


async def test_what_the_kernel_says_is_passed_on(ops: Operations) -> None:
    number = await create(ops, b"file")
    with failing(errno.EEXIST):
        await create(ops, b"file")
    with failing(errno.ENOTDIR):
        await ops.mkdir(number, b"d", 0o700, CTX)
    await ops.mkdir(ROOT, b"d", 0o700, CTX)
    await ops.mkdir(await find(ops, b"d"), b"e", 0o700, CTX)
    with failing(errno.ENOTEMPTY):
        await ops.rmdir(ROOT, b"d", CTX)
    with failing(errno.EISDIR):
        await ops.unlink(ROOT, b"d", CTX)
    with failing(errno.ENODATA):
        await ops.getxattr(number, b"user.none", CTX)
    with failing(errno.EINVAL):
        await ops.rename(ROOT, b"file", ROOT, b"other", 1 << 3, CTX)
    with failing(errno.EINVAL):
        await ops.lookup(ROOT, b"a/b", CTX)


# ---- names


async def test_a_name_that_is_not_there_is_remembered_as_such(ops: Operations) -> None:
    entry = await ops.lookup(ROOT, b"none", CTX)
    assert entry.st_ino == 0
    assert entry.entry_timeout > 0


async def test_a_new_directory_knows_its_names(ops: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was never in it is not looked for, and what has come to it in whatever way is found."""
    new = (await ops.mkdir(ROOT, b"new", 0o755, CTX)).st_ino
    other = (await ops.mkdir(ROOT, b"other", 0o755, CTX)).st_ino
    file = await create(ops, b"created", new)
    await ops.mkdir(new, b"made", 0o755, CTX)
    await ops.mknod(new, b"node", stat.S_IFREG | 0o644, 0, CTX)
    await ops.symlink(new, b"link", b"target", CTX)
    await ops.link(file, new, b"linked", CTX)
    await create(ops, b"a", ROOT)
    await create(ops, b"b", other)
    await create(ops, b"c", new)
    await ops.rename(ROOT, b"a", new, b"moved", 0, CTX)
    await ops.rename(new, b"c", other, b"c", 0, CTX)
    await ops.rename(new, b"moved", other, b"b", pyfuse3.RENAME_EXCHANGE, CTX)
    for parent, names in (
        (new, {b"created", b"made", b"node", b"link", b"linked", b"moved"}),
        (other, {b"b", b"c"}),
    ):
        for name in names:
            await find(ops, name, parent)
    assert (await ops.lookup(new, b"c", CTX)).st_ino == 0

    async def no_lookup(dirfd: int, name: bytes) -> None:
        raise AssertionError(f"{name!r} is looked for")

    with monkeypatch.context() as patch:
        patch.setattr(ops._tree, "lookup", no_lookup)
        patch.setattr(ops._tree, "lookup_now", no_lookup)
        for name in (b"never", b"b"):
            assert (await ops.lookup(new, name, CTX)).st_ino == 0
    await ops.unlink(other, b"c", CTX)
    assert (await ops.lookup(other, b"c", CTX)).st_ino == 0


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        (b"Name", b"nAME"),
        ("\N{KELVIN SIGN}".encode(), b"k"),
        (b"longname.txt", b"LONGNA~1.TXT"),
        (b"a.", b"a"),
        (b"a", b"x" * 256),
    ],
)
async def test_whether_two_names_are_the_same_is_for_the_backing_to_say(
    ops: Operations, monkeypatch: pytest.MonkeyPatch, there: bytes, asked: bytes
) -> None:
    new = (await ops.mkdir(ROOT, b"new", 0o755, CTX)).st_ino
    await ops.mkdir(new, there, 0o755, CTX)
    looked_for: list[bytes] = []

    def lookup_now(dirfd: int, name: bytes) -> None:
        looked_for.append(name)
        raise FileNotFoundError

    monkeypatch.setattr(ops._tree, "lookup_now", lookup_now)
    assert (await ops.lookup(new, asked, CTX)).st_ino == 0
    assert looked_for == [asked]


async def test_a_directory_of_very_many_names_does_not_keep_them(
    ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inode_module, "_MAX_NAMES", 3)
    new = (await ops.mkdir(ROOT, b"new", 0o755, CTX)).st_ino
    for number in range(5):
        assert (ops._table[new].names is None) == (number > 3)
        await ops.mkdir(new, b"%d" % number, 0o755, CTX)
    await find(ops, b"0", new)
    assert (await ops.lookup(new, b"9", CTX)).st_ino == 0


async def test_lookups_are_counted(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    (ext4_area / "file").write_bytes(b"data")
    handle = None
    for _ in range(3):
        number = await find(ops, b"file")
        handle = ops._table[number].handle
    await ops.forget([(number, 2)])
    assert ops._table[number].handle == handle
    opened = (await ops.open(number, os.O_RDONLY, CTX)).fh
    assert bytes(await ops.read(opened, 0, 10)) == b"data"
    await ops.release(opened)
    assert ops._engine.find(handle) is not None
    await ops.forget([(number, 1)])
    assert set(ops._table) == {ROOT}
    assert await find(ops, b"file") == number
    assert ops._table[number].file is not None  # its block is still cached


async def test_entries_of_a_directory_are_counted_as_far_as_they_fit(
    ops: Operations,
    ext4_area: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {b"%d" % number for number in range(100)}
    for name in names:
        (ext4_area / os.fsdecode(name)).touch()
    listed: list[bytes] = []
    room = 7

    def reply(token: Any, name: bytes, attributes: Any, next_id: int) -> bool:
        nonlocal room
        room -= 1
        if room < 0:
            return False
        listed.append(name)
        ids.append(next_id)
        return True

    monkeypatch.setattr(directories.pyfuse3, "readdir_reply", reply)
    handle = await ops.opendir(ROOT, CTX)
    ids = [0]
    token: Any = object()
    while True:
        before = len(listed)
        await ops.readdir(handle, ids[-1], token)
        if len(listed) == before:
            break
        room = 7
        assert sum(inode.lookups for inode in ops._table.values() if inode.number != ROOT) == len(
            [name for name in listed if name not in (b".", b"..")]
        )
    assert len(listed) == 102
    assert set(listed) == names | {b".", b".."}
    # A name that has gone since is left out; one that came shows at the next start.
    (ext4_area / "0").unlink()
    (ext4_area / "new").touch()
    listed.clear()
    room = 1000
    ids.append(2)
    while ids[-1] < 102:
        await ops.readdir(handle, ids[-1], token)
    assert set(listed) == names - {b"0"}
    assert len(listed) == 99
    listed.clear()
    await ops.readdir(handle, 0, token)
    assert set(listed) == names - {b"0"} | {b"new", b".", b".."}
    await ops.releasedir(handle)


class Reply:
    """A reply to a listing: the names in it, with what was said of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.entries: dict[bytes, Any] = {}
        self.room = room
        self.last = 0
        monkeypatch.setattr(directories.pyfuse3, "readdir_reply", self._add)

    def _add(self, token: Any, name: bytes, attributes: Any, next_id: int) -> bool:
        if len(self.entries) == self.room:
            return False
        self.entries[name] = attributes
        self.last = next_id
        return True

    async def listed(self, ops: Operations, handle: Any, start: int) -> list[bytes]:
        self.entries.clear()
        token: Any = object()
        await ops.readdir(handle, start, token)
        return list(self.entries)


async def test_an_entry_that_cannot_be_looked_at_is_listed_by_name(
    ops: Operations,
    ext4_area: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("good", "bad", "fine"):
        (ext4_area / name).touch()
    find_now, find_there = ops._tree.lookup_now, ops._tree.find

    def fails(find: Any) -> Any:
        def found(dirfd: int, name: bytes) -> Any:
            if name == b"bad":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return find(dirfd, name)

        return found

    monkeypatch.setattr(ops._tree, "lookup_now", fails(find_now))
    monkeypatch.setattr(ops._tree, "find", fails(find_there))
    before = descriptors()
    reply = Reply(monkeypatch, 100)
    handle = await ops.opendir(ROOT, CTX)
    for _ in range(2):
        assert set(await reply.listed(ops, handle, 0)) == {b".", b"..", b"good", b"bad", b"fine"}
        assert stat.S_ISREG(reply.entries[b"good"].st_mode)
        assert reply.entries[b"bad"].st_mode == 0
        await ops.forget([(reply.entries[b"bad"].st_ino, 1)])  # this is what the kernel makes of it
    for start in (2, 1, 4, 3):  # seeks: one or two at a time
        await reply.listed(ops, handle, start)
    await ops.releasedir(handle)
    with failing(errno.EIO):
        await find(ops, b"bad")
    await ops.forget([(number, inode.lookups) for number, inode in ops._table.items() if number != ROOT])
    await trio.sleep(0.05)
    await ops._tree.workers.run(lambda: None)
    assert descriptors() == before


async def test_a_seek_looks_at_one_entry(ops: Operations, ext4_area: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for number in range(200):
        (ext4_area / f"{number}").touch()
    reply = Reply(monkeypatch, 30)
    handle = await ops.opendir(ROOT, CTX)
    listed = await reply.listed(ops, handle, 0)
    while reply.entries:
        listed += await reply.listed(ops, handle, reply.last)
    assert len(listed) == len(set(listed)) == 202
    looks = 0
    find_now, find_there = ops._tree.lookup_now, ops._tree.find

    def counted(find: Any) -> Any:
        def found(dirfd: int, name: bytes) -> Any:
            nonlocal looks
            looks += 1
            return find(dirfd, name)

        return found

    monkeypatch.setattr(ops._tree, "lookup_now", counted(find_now))
    monkeypatch.setattr(ops._tree, "find", counted(find_there))
    for start in (150, 20, 199, 77):
        assert await reply.listed(ops, handle, start) == [listed[start]]
    assert 4 <= looks <= 8  # in the loop, or in a thread where that would have waited
    # From there on more and more, and the whole of it.
    again, sizes = [listed[77]], [1]
    while reply.entries:
        again += await reply.listed(ops, handle, reply.last)
        sizes.append(len(reply.entries))
    assert again == listed[77:]
    assert sizes[:6] == [1, 2, 4, 8, 16, 30]
    # What has vanished is passed over: an empty reply would be the end.
    for name in listed[50:60]:
        (ext4_area / os.fsdecode(name)).unlink()
    assert (await reply.listed(ops, handle, 50))[0] == listed[60]
    assert await reply.listed(ops, handle, 202) == []
    await ops.releasedir(handle)


async def test_an_inode_number_that_is_used_again_is_another_inode(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    path = ext4_area / "file"
    path.write_bytes(b"old")
    first = await ops.lookup(ROOT, b"file", CTX)
    handle = (await ops.open(first.st_ino, os.O_RDONLY, CTX)).fh
    assert bytes(await ops.read(handle, 0, 10)) == b"old"
    await ops.release(handle)
    await ops.forget([(first.st_ino, 1)])
    first = await ops.lookup(ROOT, b"file", CTX)
    path.unlink()  # behind the mount
    ops._inodes.fds.close(ops._table[first.st_ino])  # an open descriptor would keep the inode
    # The descriptor is closed by a thread, and the number is free only then.
    with trio.fail_after(60):
        path.write_bytes(b"new")
        while (number := path.stat().st_ino) != first.st_ino:
            path.rename(ext4_area / f"other-{number}")
            await trio.sleep(0.001)
            path.write_bytes(b"new")
    second = await ops.lookup(ROOT, b"file", CTX)
    assert second.st_ino == first.st_ino
    assert second.generation != first.generation
    handle = (await ops.open(second.st_ino, os.O_RDONLY, CTX)).fh
    assert bytes(await ops.read(handle, 0, 10)) == b"new"
    await ops.release(handle)
    await ops.forget([(second.st_ino, 1)])
    assert second.st_ino in ops._table  # the kernel has two to forget
    await ops.forget([(second.st_ino, 1)])
    assert second.st_ino not in ops._table


async def test_an_inode_in_use_keeps_its_descriptor_when_its_number_is_used_again(
    ops: Operations,
    ext4_area: Path,  # noqa: F811
) -> None:
    (ext4_area / "file").write_bytes(b"old")
    (ext4_area / "other").write_bytes(b"new")
    old = ops._table[await find(ops, b"file")]
    file = await ops._inodes.file(old)
    other = await ops._tree.lookup(ops._tree.root_fd, b"other")
    # As if the number had been used again: file systems do that only when the descriptor is closed, but others may not.
    status = list(other.stat)
    status[1] = old.number
    async with ops._inodes.fds.using(old) as fd, ops._inodes.fds.using(old):
        new = ops._inodes.remember(other._replace(stat=os.stat_result(status)), ops._inodes.root, b"file")
        assert ops._table[old.number] is new is not old
        await trio.sleep(0.05)  # what is closed later is closed by now
        await ops._tree.workers.run(lambda: None)
        assert os.fstat(fd).st_ino == old.number
        assert file.ref_count == 1
    assert (old.fd, old.file, file.ref_count) == (-1, None, 0)
    assert new.fd == other.fd


async def test_the_way_up(ops: Operations) -> None:
    await ops.mkdir(ROOT, b"d", 0o700, CTX)
    inner = await find(ops, b"d")
    assert (await ops.lookup(inner, b".", CTX)).st_ino == inner
    assert (await ops.lookup(inner, b"..", CTX)).st_ino == ROOT
    assert (await ops.lookup(ROOT, b"..", CTX)).st_ino == ROOT


async def test_a_renamed_file_is_known_by_its_new_path(ops: Operations) -> None:
    number = await create(ops, b"file")
    await ops.mkdir(ROOT, b"d", 0o700, CTX)
    await ops.rename(ROOT, b"file", await find(ops, b"d"), b"moved", 0, CTX)
    assert ops._table[number].path() == b"d/moved"
    await ops.rename(ROOT, b"d", ROOT, b"e", 0, CTX)
    assert ops._table[number].path() == b"e/moved"
    other = await create(ops, b"other")
    await ops.rename(ROOT, b"other", await find(ops, b"e"), b"moved", pyfuse3.RENAME_EXCHANGE, CTX)
    assert ops._table[number].path() == b"other"
    assert ops._table[other].path() == b"e/moved"


# ---- times of access


@pytest.mark.parametrize("mode", ["noatime", "relatime", "strictatime"])
async def test_which_reads_move_atime(ops: Operations, ext4_area: Path, mode: str) -> None:  # noqa: F811
    ops._atimes._never, ops._atimes._always = mode == "noatime", mode == "strictatime"
    path = ext4_area / "file"
    path.write_bytes(b"data")
    number = await find(ops, b"file")

    async def moves(flags: int = 0) -> bool:
        before = (await ops.getattr(number, CTX)).st_atime_ns
        handle = (await ops.open(number, os.O_RDONLY | flags, CTX)).fh
        assert bytes(await ops.read(handle, 0, 10)) == b"data"
        await ops.release(handle)
        return bool((await ops.getattr(number, CTX)).st_atime_ns > before)

    assert not await moves(os.O_NOATIME)
    assert await moves() is (mode != "noatime")
    assert await moves() is (mode == "strictatime")
    entry = await ops.getattr(number, CTX)
    entry.st_atime_ns -= 25 * 3600 * 10**9
    entry.st_mtime_ns -= 26 * 3600 * 10**9
    await ops.setattr(number, entry, fields("atime", "mtime"), None, CTX)
    assert (await ops.getattr(number, CTX)).st_atime_ns == entry.st_atime_ns
    assert await moves() is (mode != "noatime")
    await write(ops, number, CTX)
    assert path.stat().st_atime_ns == entry.st_atime_ns  # it is not told of each
    ops._inodes.fds.close(ops._table[number])
    await ops.forget([(number, 1)])
    with trio.fail_after(30):
        while mode != "noatime" and path.stat().st_atime_ns == entry.st_atime_ns:
            await trio.sleep(0.01)


# ---- descriptors


async def test_descriptors_are_bounded_and_come_back(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    for number in range(60):
        (ext4_area / f"{number}").write_bytes(b"%d" % number)
    ops._inodes.fds._max_open = 16
    before = descriptors()
    numbers = [await find(ops, b"%d" % number) for number in range(60)]
    await ops._tree.workers.run(lambda: None)  # what is closed is closed by a thread
    assert descriptors() - before <= 16 + 8
    for index, number in enumerate(numbers):
        assert (await ops.getattr(number, CTX)).st_size == len(str(index))
        handle = (await ops.open(number, os.O_RDONLY, CTX)).fh
        assert bytes(await ops.read(handle, 0, 10)) == b"%d" % index
        await ops.release(handle)


async def test_too_many_open_files_are_refused_before_anything_is_done(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    (ext4_area / "there").write_bytes(b"data")
    ops._inodes.fds.budget.most_files = 3  # type: ignore[misc]
    first = await create(ops, b"0")
    for name in (b"1", b"2"):
        await create(ops, name)
    with failing(errno.EMFILE):
        await create(ops, b"3")
    assert not (ext4_area / "3").exists()
    number = await find(ops, b"there")
    with failing(errno.EMFILE):
        await ops.open(number, os.O_RDONLY, CTX)
    again = (await ops.open(first, os.O_RDONLY, CTX)).fh  # it is open, so this takes nothing
    for handle, opened in list(ops._files.table.items()):
        if opened.inode.number == first:
            await ops.fsync(handle, False)
            await ops.release(handle)
    assert again not in ops._files.table
    handle = (await ops.open(number, os.O_RDONLY, CTX)).fh
    assert bytes(await ops.read(handle, 0, 10)) == b"data"
    with failing(errno.EMFILE):
        await create(ops, b"3")


async def test_what_is_kept_open_is_closed_first(
    ops: Operations,
    ext4_area: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(30):
        (ext4_area / f"{number}").touch()
        await find(ops, b"%d" % number)
    file = await create(ops, b"idle")
    await ops.write(handle_of(ops, file), 0, b"dirty")
    await ops.release(handle_of(ops, file))
    assert len(ops._engine.cache.files.kept_open) == 1
    before = descriptors()
    monkeypatch.setattr(ops._inodes.fds.budget, "short", lambda: True)
    for _ in range(40):
        handle = (await ops.open(await find(ops, b"0"), os.O_RDONLY, CTX)).fh
        assert not ops._engine.cache.files.kept_open
        await ops.release(handle)
    await ops._tree.workers.run(lambda: None)
    assert descriptors() <= before - 25
    monkeypatch.setattr(ops._inodes.fds.budget, "in_reserve", lambda fd: True)
    for number in range(30):  # each that comes has others closed
        await find(ops, b"%d" % number)
    assert len(ops._inodes.fds._open) <= 12


async def test_a_file_without_a_name_keeps_its_descriptor(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    number = await create(ops, b"file")
    await ops.write(handle_of(ops, number), 0, b"x" * 10_000)
    await ops.unlink(ROOT, b"file", CTX)
    ops._inodes.fds._max_open = 16
    for index in range(60):
        (ext4_area / f"{index}").touch()
        await find(ops, b"%d" % index)
    entry = await ops.getattr(number, CTX)
    assert (entry.st_size, entry.st_nlink) == (10_000, 0)
    assert bytes(await ops.read(handle_of(ops, number), 9_990, 100)) == b"x" * 10
    await ops.setattr(number, entry, fields("mode"), None, CTX)
    await ops.release(handle_of(ops, number))
    await ops.forget([(number, 1)])
    assert number not in ops._table


async def test_nothing_stays_open(ext4_area: Path, tmp_path: Path) -> None:  # noqa: F811
    before = len(os.listdir("/proc/self/fd"))
    async with operations(ext4_area, tmp_path / "cache") as ops:
        for name in (b"a", b"b"):
            number = await create(ops, name)
            await ops.write(handle_of(ops, number), 0, b"x" * 5000)
        await ops.opendir(ROOT, CTX)
        with failing(errno.EEXIST):
            await create(ops, b"a")
        await ops.unlink(ROOT, b"b", CTX)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- durability


async def test_an_fsync_reaches_the_directories_that_names_came_to(ops: Operations) -> None:
    synced: list[int] = []
    sync_dir = ops._tree.sync_dir

    async def count(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        await sync_dir(fd)

    ops._tree.sync_dir = count  # type: ignore[method-assign]
    root = os.fstat(ops._tree.root_fd).st_ino
    number = await create(ops, b"file")
    await ops.fsync(handle_of(ops, number), False)
    assert synced == [root]
    await ops.write(handle_of(ops, number), 0, b"x")
    await ops.fsync(handle_of(ops, number), True)
    assert synced == [root]  # its name is durable already
    await ops.mkdir(ROOT, b"d", 0o700, CTX)
    inner = await find(ops, b"d")
    await ops.rename(ROOT, b"file", inner, b"file", 0, CTX)
    await ops.fsync(handle_of(ops, number), False)
    assert sorted(synced) == sorted([root, root, inner])


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC, 0])
async def test_a_write_with_o_sync_is_followed_by_an_fsync(ops: Operations, flag: int) -> None:
    """It was not: in class disk, such a write was acknowledged before it was durable, and so was the file's name."""
    number = await create(ops, b"file")
    committed = []
    commit = ops._engine.cache.blocks.persist

    async def count() -> None:
        committed.append(ops._engine.cache.blocks.next_seq - 1)
        await commit()

    ops._engine.cache.blocks.persist = count  # type: ignore[method-assign]
    handle = (await ops.open(number, os.O_RDWR | flag, CTX)).fh
    assert ops._table[number].unsynced
    await ops.write(handle, 0, b"x" * 4096)
    assert committed == ([ops._engine.cache.blocks.next_seq - 1] if flag else [])
    assert bool(ops._table[number].unsynced) == (not flag)


async def test_a_failed_sync_of_a_directory_is_tried_again(ops: Operations) -> None:
    number = await create(ops, b"file")
    sync_dir = ops._tree.sync_dir

    async def fail(_: int) -> None:
        raise OSError(errno.EIO, "injected")

    ops._tree.sync_dir = fail  # type: ignore[method-assign]
    with failing(errno.EIO):
        await ops.fsync(handle_of(ops, number), False)
    with failing(errno.EIO):
        await ops.fsync(handle_of(ops, number), False)
    ops._tree.sync_dir = sync_dir  # type: ignore[method-assign]
    await ops.fsync(handle_of(ops, number), False)


async def test_setuid_is_durably_gone_before_the_write(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    """The kernel sends a chmod before a write to such a file; the data is durable at once (O10)."""
    number = await create(ops, b"file")
    entry = await ops.getattr(number, CTX)
    entry.st_mode = stat.S_IFREG | 0o4755
    await ops.setattr(number, entry, fields("mode"), None, CTX)
    file = ops._table[number].file
    assert file is not None
    assert file.needs_sync
    entry.st_mode = stat.S_IFREG | 0o755
    await ops.setattr(number, entry, fields("mode"), None, CTX)
    assert not file.needs_sync
    assert stat.S_IMODE((ext4_area / "file").stat().st_mode) == 0o755


async def test_names_are_not_taken_for_durable_while_they_are_being_synced(ops: Operations) -> None:
    """Of two files in a new directory the second must wait for the directory's own name, too."""
    await ops.mkdir(ROOT, b"d", 0o700, CTX)
    parent = await find(ops, b"d")
    numbers = [await create(ops, name, parent) for name in (b"one", b"two")]
    sync_dir, root = ops._tree.sync_dir, os.fstat(ops._tree.root_fd).st_ino
    gate = trio.Event()
    tell, told = trio.open_memory_channel[str](10)

    async def slow(fd: int) -> None:
        if os.fstat(fd).st_ino == root:
            await tell.send("syncing")
            await gate.wait()
        await sync_dir(fd)

    ops._tree.sync_dir = slow  # type: ignore[method-assign]

    async def fsync(number: int) -> None:
        await ops.fsync(handle_of(ops, number), False)
        await tell.send("done")

    async with trio.open_nursery() as nursery:
        for number in (*numbers, numbers[0]):
            nursery.start_soon(fsync, number)
        assert [await told.receive() for _ in range(3)] == ["syncing"] * 3
        gate.set()
    assert [told.receive_nowait() for _ in range(3)] == ["done"] * 3


# ---- privileges that go with a change (O10)

STRANGER: Any = SimpleNamespace(uid=1001, gid=1001, pid=os.getpid(), umask=0o022)
CAPABILITY = b"security.capability"
CAP_NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")


async def create_with(ops: Operations, name: bytes, mode: int) -> int:
    """The node id of a file with this mode that is not open."""
    number = await create(ops, name)
    await ops.release(handle_of(ops, number))
    entry = await ops.getattr(number, CTX)
    entry.st_mode = stat.S_IFREG | mode
    await ops.setattr(number, entry, fields("mode"), None, CTX)
    return number


async def write(ops: Operations, number: int, ctx: Any) -> None:
    info = await ops.open(number, os.O_WRONLY, ctx)
    assert await ops.write(info.fh, 0, b"x" * 4096) == 4096
    await ops.release(info.fh)


@pytest.mark.parametrize(
    ("mode", "left"), [(0o4755, 0o755), (0o2755, 0o755), (0o6775, 0o775), (0o2745, 0o2745), (0o6745, 0o2745)]
)
async def test_a_write_strips_setuid_and_setgid(ops: Operations, ext4_area: Path, mode: int, left: int) -> None:  # noqa: F811
    """Whatever the kernel has asked for before; without the group's execution setgid means mandatory locks."""
    number = await create_with(ops, b"file", mode)
    await write(ops, number, CTX)
    assert stat.S_IMODE((ext4_area / "file").stat().st_mode) == mode  # root keeps them
    await write(ops, number, STRANGER)
    assert stat.S_IMODE((ext4_area / "file").stat().st_mode) == left
    assert stat.S_IMODE((await ops.getattr(number, CTX)).st_mode) == left


async def test_a_write_strips_what_was_set_after_the_open(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    number = await create_with(ops, b"file", 0o777)
    await ops.link(number, ROOT, b"other", CTX)
    assert await find(ops, b"other") == number
    info = await ops.open(number, os.O_WRONLY, STRANGER)
    await ops.write(info.fh, 0, b"x" * 4096)
    entry = await ops.getattr(number, CTX)
    entry.st_mode = stat.S_IFREG | 0o6777
    await ops.setattr(number, entry, fields("mode"), None, CTX)
    await ops.setxattr(number, CAPABILITY, CAP_NET_RAW, CTX)
    assert os.getxattr(ext4_area / "other", CAPABILITY) == CAP_NET_RAW
    await ops.write(info.fh, 0, b"x" * 4096)
    assert stat.S_IMODE((ext4_area / "other").stat().st_mode) == 0o777
    assert os.listxattr(ext4_area / "other") == []
    file = ops._table[number].file
    assert file is not None
    assert not file.needs_sync  # durably


async def test_capabilities_go_with_a_write_by_root_too(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    number = await create_with(ops, b"file", 0o755)
    await ops.setxattr(number, CAPABILITY, CAP_NET_RAW, CTX)
    await write(ops, number, CTX)
    assert os.listxattr(ext4_area / "file") == []


async def test_a_write_that_cannot_strip_fails(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    number = await create_with(ops, b"file", 0o4777)
    await ops.setxattr(number, CAPABILITY, CAP_NET_RAW, CTX)
    chmod, removexattr = ops._tree.chmod, ops._tree.removexattr

    async def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "injected")

    info = await ops.open(number, os.O_WRONLY, STRANGER)
    for name, original in (("chmod", chmod), ("removexattr", removexattr)):
        setattr(ops._tree, name, fail)
        with failing(errno.EIO):
            await ops.write(info.fh, 0, b"x" * 4096)
        with failing(errno.EIO):
            await ops.setattr(number, await ops.getattr(number, CTX), fields("size"), None, STRANGER)
        setattr(ops._tree, name, original)
        assert await ops.read(info.fh, 0, 4096) == b""
    await ops.write(info.fh, 0, b"x" * 4096)
    assert stat.S_IMODE((ext4_area / "file").stat().st_mode) == 0o777
    assert os.listxattr(ext4_area / "file") == []


async def test_writes_ask_once_for_capabilities(ops: Operations) -> None:
    number = await create_with(ops, b"file", 0o2745)
    await ops.setxattr(number, b"user.a", b"", CTX)
    listxattr, calls = ops._tree.listxattr, 0

    async def counted(fd: int) -> list[bytes]:
        nonlocal calls
        calls += 1
        return await listxattr(fd)

    ops._tree.listxattr = counted  # type: ignore[method-assign]
    info = await ops.open(number, os.O_WRONLY, STRANGER)
    for _ in range(50):
        await ops.write(info.fh, 0, b"x" * 4096)
    assert calls == 1
    await ops.setxattr(number, b"user.b", b"", CTX)
    for _ in range(50):
        await ops.write(info.fh, 0, b"x" * 4096)
    assert calls == 2


async def test_where_there_are_no_extended_attributes_none_are_asked_for_again(ops: Operations) -> None:
    number = await create_with(ops, b"file", 0o755)
    ops._table[number].xattrs = None
    calls = 0

    async def unsupported(_: int) -> list[bytes]:
        nonlocal calls
        calls += 1
        raise OSError(errno.ENOTSUP, "injected")

    ops._tree.listxattr = unsupported  # type: ignore[method-assign]
    await write(ops, number, STRANGER)
    await write(ops, number, STRANGER)
    assert calls == 1


async def test_a_request_for_nothing_strips_for_who_may_write(ops: Operations, ext4_area: Path) -> None:  # noqa: F811
    """The kernel sends it before a write; ``chown(path, -1, -1)``, which anybody may call, is the same."""
    number = await create_with(ops, b"file", 0o4755)
    entry = await ops.getattr(number, CTX)
    for ctx in (STRANGER, CTX):
        await ops.setattr(number, entry, fields(), None, ctx)
        assert stat.S_IMODE((ext4_area / "file").stat().st_mode) == 0o4755
    reader = await ops.open(number, os.O_RDONLY, STRANGER)
    await ops.setattr(number, entry, fields(), None, STRANGER)
    assert stat.S_IMODE((ext4_area / "file").stat().st_mode) == 0o4755
    await ops.release(reader.fh)
    writer = await ops.open(number, os.O_WRONLY, CTX)
    answer = await ops.setattr(number, entry, fields(), None, STRANGER)
    assert stat.S_IMODE((ext4_area / "file").stat().st_mode) == stat.S_IMODE(answer.st_mode) == 0o755
    await ops.release(writer.fh)
    entry.st_mode, entry.st_uid = stat.S_IFREG | 0o4755, STRANGER.uid
    await ops.setattr(number, entry, fields("uid"), None, CTX)
    await ops.setattr(number, entry, fields("mode"), None, CTX)
    await ops.setattr(number, entry, fields(), None, STRANGER)
    assert stat.S_IMODE((ext4_area / "file").stat().st_mode) == 0o755


async def test_a_file_that_was_set_aside_has_its_size_when_it_is_in_use_again(
    ops: Operations, expect_logs: Callable[..., None]
) -> None:
    """Until then nobody changes its time: that would be taken for a change behind the mount."""
    expect_logs("set aside, the data stays")
    number = await create(ops, b"x")
    fh = handle_of(ops, number)
    await ops.write(fh, 0, b"x" * 5000)
    handle = ops._inodes.get(number).handle
    await ops.release(fh)
    await ops.forget([(number, 1)])
    file = ops._engine.find(handle)
    assert file is not None
    ops._engine.cache.files.hold(file, OSError(errno.EIO, "as at a recovery"))
    number = await find(ops, b"x")
    entry = await ops.getattr(number, CTX)
    assert entry.st_size == 0
    entry.st_mtime_ns = 10**18
    with failing(errno.EIO):
        await ops.setattr(number, entry, fields("mtime"), None, CTX)
    assert (await ops.getattr(number, CTX)).st_mtime_ns > 10**18
    entry.st_mode = stat.S_IFREG | 0o600
    await ops.setattr(number, entry, fields("mode"), None, CTX)
    ops._engine.cache.files.let_go(file)
    assert (await ops.getattr(number, CTX)).st_size == 5000
    await ops.setattr(number, entry, fields("mtime"), None, CTX)
    assert (await ops.getattr(number, CTX)).st_mtime_ns == 10**18
