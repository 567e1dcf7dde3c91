"""One file of the backing: what goes past the page cache, what a sync tells, what a lost file becomes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from support_fs import (
    LARGEST,
    Below,
    area,
    below,
    drop_caches,
    ext4,
    ext4_area,
    file_system,
    frozen,
    largest_file,
    loop_mounted,
    pages_of,
    run,
    ticks,
)

from cachefsd.backing import blocking, handles, syscalls, treebacking
from cachefsd.backing.files import DirectFile
from cachefsd.backing.ports import Backing, BackingFile, LostFile, Piece, Place, Run, SmallWrite
from cachefsd.backing.tree import Caller
from cachefsd.filesystems import FUSE

__all__ = ["area", "ext4", "ext4_area", "file_system"]

BLOCK = 4096


def memory(data: bytes) -> memoryview:
    view = syscalls.aligned_memory(len(data), BLOCK)
    view[:] = data
    return view


async def write(file: DirectFile, offset: int, source: memoryview, places: Sequence[int] = ()) -> None:
    """Write all blocks of ``source`` as one run, in their order or in another."""
    await file.write_runs(source, [Run(offset, np.array(places or range(len(source) // BLOCK)))])


async def opened(lower: Below, name: str, *, write: bool) -> DirectFile:
    path = lower.path / name
    path.touch()
    fd = os.open(path, os.O_PATH)
    file = lower.backing.file(handles.file_handle(fd))
    os.close(fd)
    await file.open(write=write)
    return file


async def test_the_ports_are_implemented(area: Path) -> None:
    async with below(area) as lower:
        backing: Backing = lower.backing
        file: BackingFile = backing.file(b"")
        with pytest.raises(OSError, match="Stale file handle") as caught:
            await file.open(write=False)
        assert caught.value.errno == errno.ESTALE
        assert not file.writable


async def test_what_has_just_been_created_is_open_already(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To find it again by its handle would be another job of a worker."""
    async with below(area) as lower:
        old = await opened(lower, "old", write=True)
        found = await lower.tree.create(lower.tree.root_fd, b"new", 0o400, Caller(1000, 1000))

        def not_again(handle: bytes) -> int:
            raise AssertionError

        with monkeypatch.context() as patch:
            patch.setattr(lower.backing, "_opener", not_again)
            new = lower.backing.file(found.handle)
            assert new.writable
            await new.open(write=True)
        assert (new.direct, new.max_size) == (old.direct, old.max_size)
        await write(new, 0, memory(b"x" * BLOCK), [0])
        await new.sync()
        assert (area / "new").read_bytes() == b"x" * BLOCK
        assert not lower.backing.file(found.handle).writable  # it was there once
        for file in (old, new):
            file.close()
        os.close(found.fd)


async def test_blocks_and_tail_come_back_and_leave_no_pages(area: Path) -> None:
    blocks, tail = os.urandom(3 * BLOCK), os.urandom(100)
    async with below(area) as lower:
        file = await opened(lower, "f", write=True)
        source = memory(blocks)
        await write(file, 0, source, [1, 0, 2])
        await file.write_tail(3 * BLOCK, memoryview(tail))
        await file.set_mtime(1_234_567_890_123_456_789)
        await file.sync()
        assert pages_of(area / "f") == 0
        content = blocks[BLOCK : 2 * BLOCK] + blocks[:BLOCK] + blocks[2 * BLOCK :] + tail
        target = memory(bytes(8 * BLOCK))
        assert await file.read(0, [target[: 2 * BLOCK], target[2 * BLOCK :]]) == len(content)
        assert bytes(target[: len(content)]) == content
        assert (file.direct, file.direct_bytes, file.bounced_bytes) == (True, 3 * BLOCK + len(content), 100)
        status = await file.stat()
        assert status.size == len(content)
        assert status.mtime_ns == 1_234_567_890_123_456_789
        assert status.nlink == 1
        file.close()
    assert (area / "f").read_bytes() == content


async def test_one_of_the_last_descriptors_is_not_kept_for_a_tail(ext4_area: Path) -> None:
    path = ext4_area / "file"
    path.touch()
    async with below(ext4_area) as lower:
        file = lower.backing.file((await lower.tree.lookup(lower.tree.root_fd, b"file")).handle)
        scarce = False
        file._scarce = lambda _: scarce  # type: ignore[misc]
        await file.open(write=True)
        opened = file._opened
        assert opened is not None
        for turn, scarce in enumerate((False, True, True)):
            await file.write_tail(0, memoryview(b"tail %d" % turn))
            assert opened.tail >= 0
            await file.sync()
            assert (opened.tail < 0) is scarce
            assert path.read_bytes() == b"tail %d" % turn
        file.close()


async def test_tails_and_blocks_take_turns_at_one_place(area: Path) -> None:
    async with below(area) as lower:
        file = await opened(lower, "f", write=True)
        target = memory(bytes(2 * BLOCK))
        for turn in range(1, 6):
            await file.write_tail(BLOCK, memoryview(bytes([turn]) * 10 * turn))
            assert await file.read(BLOCK, [target[:BLOCK]]) == (10 * turn if turn == 1 else BLOCK)
            assert bytes(target[: 10 * turn]) == bytes([turn]) * 10 * turn
            block = memory(bytes([100 + turn]) * BLOCK)
            await write(file, BLOCK, block)
            assert await file.read(0, [target]) == 2 * BLOCK
            assert bytes(target[BLOCK:]) == bytes(block)
        await file.truncate(BLOCK + 5)
        await file.sync()
        assert pages_of(area / "f") == 0
        assert await file.read(BLOCK, [target]) == 5
        file.close()
    assert (area / "f").read_bytes() == bytes(BLOCK) + b"i" * 5


@pytest.mark.parametrize("size", [0, 1, 512, 1024, BLOCK - 1, BLOCK, BLOCK + 512, 3 * BLOCK])
async def test_a_read_ends_with_the_file(area: Path, size: int) -> None:
    content = os.urandom(size)
    (area / "f").write_bytes(content)
    async with below(area) as lower:
        file = await opened(lower, "f", write=False)
        target = memory(bytes(3 * BLOCK))
        assert await file.read(0, [target[:BLOCK], target[BLOCK:]]) == size
        assert bytes(target[:size]) == content
        file.close()


@pytest.mark.parametrize("bounds", [[0, 2500], [0, 1, 1100, 2300, 2400]], ids=["one run", "several"])
async def test_more_views_than_one_request_takes(ext4_area: Path, bounds: list[int]) -> None:
    count = bounds[-1]
    data = os.urandom(count * BLOCK)
    async with below(ext4_area) as lower:
        file = await opened(lower, "f", write=True)
        source, target = memory(data), memory(bytes(len(data)))
        # Backwards, so that no two are adjacent in memory.
        cut = [slice(i * BLOCK, (i + 1) * BLOCK) for i in reversed(range(count))]
        backwards = np.arange(count)[::-1]
        await file.write_runs(source, [Run(a * BLOCK, backwards[a:b]) for a, b in itertools.pairwise(bounds)])
        assert await file.read(0, [target[part] for part in cut]) == len(data)
        assert bytes(target) == data
        file.close()


async def test_without_direct_io(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffered_only(monkeypatch)
    content = os.urandom(2 * BLOCK + 7)
    async with below(area) as lower:
        file = await opened(lower, "f", write=True)
        source, target = memory(content), memory(bytes(3 * BLOCK))
        await write(file, 0, source, [1, 0])
        await file.write_tail(2 * BLOCK, source[2 * BLOCK :])
        assert pages_of(area / "f") > 0
        await file.sync()
        assert pages_of(area / "f") == 0
        views = [target[BLOCK : 2 * BLOCK], target[:BLOCK], target[2 * BLOCK :]]
        assert await file.read(0, views) == len(content)
        assert pages_of(area / "f") == 0
        assert bytes(target[: len(content)]) == content
        assert (file.direct, file.direct_bytes, file.bounced_bytes) == (False, 0, 2 * len(content))
        file.close()


@pytest.mark.parametrize(
    ("answer", "direct"),
    [
        (None, True),
        (syscalls.DirectIo(512, 512), True),
        (syscalls.DirectIo(4, BLOCK), True),
        (syscalls.DirectIo(4, 2 * BLOCK), False),
        (syscalls.DirectIo(0, 0), False),
    ],
)
async def test_alignment_decides(
    ext4_area: Path, monkeypatch: pytest.MonkeyPatch, answer: syscalls.DirectIo | None, direct: bool
) -> None:
    monkeypatch.setattr(syscalls, "direct_io", lambda fd: answer)
    async with below(ext4_area) as lower:
        file = await opened(lower, "f", write=False)
        assert file.direct is direct
        file.close()


async def test_opening_for_writing_later(area: Path) -> None:
    (area / "f").write_bytes(b"x" * BLOCK)
    async with below(area) as lower:
        file = await opened(lower, "f", write=False)
        assert not file.writable
        with pytest.raises(OSError, match="Bad file descriptor"):
            await write(file, 0, memory(bytes(BLOCK)))
        targets = [memory(bytes(BLOCK)) for _ in range(20)]
        async with trio.open_nursery() as nursery:
            for target in targets:
                nursery.start_soon(file.read, 0, [target])
            nursery.start_soon(lambda: file.open(write=True))
            nursery.start_soon(lambda: file.open(write=True))
        assert file.writable
        assert [bytes(target) for target in targets] == [b"x" * BLOCK] * 20
        await write(file, 0, memory(b"y" * BLOCK))
        file.close()
        assert not file.writable
        with pytest.raises(OSError, match="not open"):
            await file.sync()
        await file.open(write=False)
        assert await file.read(0, [targets[0]]) == BLOCK
        assert bytes(targets[0]) == b"y" * BLOCK
        file.close()


async def test_no_descriptor_is_left(ext4_area: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with below(ext4_area) as lower:
        for _ in range(20):
            file = await opened(lower, "f", write=False)
            await file.open(write=True)
            await file.write_tail(0, memoryview(b"tail"))
            file.close()
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_fifo_is_not_opened(ext4_area: Path) -> None:
    os.mkfifo(ext4_area / "p")
    async with below(ext4_area) as lower:
        fd = os.open(ext4_area / "p", os.O_PATH)
        file = lower.backing.file(handles.file_handle(fd))
        os.close(fd)
        with pytest.raises(OSError, match="not a regular file"):
            await file.open(write=True)


async def test_an_unlinked_file_goes_on_and_ends(area: Path) -> None:
    async with below(area) as lower:
        file = await opened(lower, "f", write=True)
        (area / "f").unlink()
        await write(file, 0, memory(b"z" * BLOCK))
        assert (await file.stat()).nlink == 0
        await file.sync()
        file.close()
        await lower.data.run(drop_caches)
        with pytest.raises(OSError, match="Stale file handle"):
            await file.open(write=False)


@pytest.mark.parametrize("failing", ["direct", "tail"])
async def test_a_failed_sync_is_counted_and_asked_again(
    ext4_area: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    asked: list[str] = []
    errors = [OSError(errno.EIO, "lost"), None]
    plain = os.fsync

    def fsync(fd: int) -> None:
        flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
        asked.append("direct" if flags & os.O_DIRECT else "tail")
        if asked[-1] == failing and errors and (error := errors.pop(0)) is not None:
            raise error
        plain(fd)

    async with below(ext4_area) as lower:
        file = await opened(lower, "f", write=True)
        monkeypatch.setattr(os, "fsync", fsync)
        await write(file, 0, memory(bytes(BLOCK)))
        await file.write_tail(BLOCK, memoryview(b"t"))
        results: list[str] = []

        async def sync() -> None:
            before = file.sync_failures
            try:
                await file.sync()
            except OSError:
                results.append("failed")
            else:
                results.append("clean" if file.sync_failures == before else "warned")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync)
            nursery.start_soon(sync)
        assert sorted(results) == ["failed", "warned"]
        assert file.sync_failures == 1
        assert asked == ["direct", "tail", "direct", "tail"]
        await sync()
        assert results[-1] == "clean"
        assert asked[4:] == ["direct"]
        file.close()


async def test_no_room_is_an_error_of_the_write(ext4_area: Path) -> None:
    async with below(ext4_area) as lower:
        file = await opened(lower, "f", write=True)
        chunk = memory(bytes(8 << 20))

        async def fill() -> None:
            for index in range(64):
                await write(file, index * len(chunk), chunk)

        with pytest.raises(OSError, match="No space left"):
            await fill()
        (ext4_area / "f").unlink()
        file.close()


def buffered_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be opened for direct I/O."""
    plain = syscalls.reopen

    def refuse(fd: int, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return plain(fd, flags)

    monkeypatch.setattr(syscalls, "reopen", refuse)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("failing", range(4))
async def test_one_run_of_many_fails_and_the_others_are_written(
    area: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, failing: int
) -> None:
    if not direct:
        buffered_only(monkeypatch)
    data = os.urandom(8 * BLOCK)
    async with below(area) as lower:
        file = await opened(lower, "f", write=True)
        source = memory(data)
        places = [0, 2 * BLOCK, 4 * BLOCK]
        places.insert(failing, LARGEST - BLOCK)  # its first block fits: what is left of it is tried again, and fails
        runs = [Run(place, np.array([2 * i + 1, 2 * i])) for i, place in enumerate(places)]
        with largest_file(LARGEST), pytest.raises(OSError, match="File too large"):
            await file.write_runs(source, runs)
        assert (file.direct, file.direct_bytes + file.bounced_bytes) == (direct, 6 * BLOCK)
        target = memory(bytes(2 * BLOCK))
        for place, run in zip(places, runs, strict=True):
            end = place + 2 * BLOCK if place < LARGEST - BLOCK else LARGEST
            assert await file.read(place, [target]) == (2 * BLOCK if end < LARGEST else BLOCK)
            blocks = (data[i * BLOCK : (i + 1) * BLOCK] for i in run.places.tolist())
            assert bytes(target[: end - place]) == b"".join(blocks)[: end - place]
        assert (await file.stat()).size == LARGEST
        file.close()


async def test_runs_that_fit_are_written_to_a_full_disk(tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path, size_mib=8) as mountpoint:
        async with below(mountpoint) as lower:
            file = await opened(lower, "f", write=True)
            await write(file, 0, memory(bytes(2 * BLOCK)))
            with (mountpoint / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while True:
                    filler.write(bytes(BLOCK))
            os.sync()
            source = memory(b"1" * BLOCK + b"2" * BLOCK)
            where = ((0, 0), (1 << 30, 0), (BLOCK, 1), (1 << 31, 1))
            with pytest.raises(OSError, match="No space left"):
                await file.write_runs(source, [Run(offset, np.array([place])) for offset, place in where])
            target = memory(bytes(2 * BLOCK))
            assert await file.read(0, [target]) == 2 * BLOCK
            assert bytes(target) == bytes(source)
            file.close()


async def test_a_disk_that_hangs_stops_nothing_else(ext4: Path, ext4_area: Path) -> None:
    (ext4_area / "other").write_bytes(b"o" * BLOCK)
    done: list[str] = []
    async with below(ext4_area) as lower:
        file = await opened(lower, "f", write=True)
        other = await opened(lower, "other", write=False)

        async def note(name: str, call: Callable[..., object], *args: object) -> None:
            await call(*args)  # type: ignore[misc]
            done.append(name)

        async with trio.open_nursery() as nursery:
            with frozen(ext4):
                nursery.start_soon(note, "write", write, file, 0, memory(bytes(BLOCK)))
                nursery.start_soon(note, "truncate", file.truncate, BLOCK)
                await ticks(20)
                file.close()  # the descriptors stay until the write is over
                target = memory(bytes(BLOCK))
                assert await other.read(0, [target]) == BLOCK
                assert bytes(target) == b"o" * BLOCK
                assert (await lower.tree.names(lower.tree.root_fd))[0] != []
                await ticks(20)
                assert done == []
        assert sorted(done) == ["truncate", "write"]
        other.close()
    assert (ext4_area / "f").stat().st_size == BLOCK


async def test_sync_all(area: Path) -> None:
    async with below(area) as lower:
        (area / "f").write_bytes(b"x" * BLOCK)
        await lower.backing.sync_all()
        with open(area / "f", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # drops clean pages only
        assert pages_of(area / "f") == 0


def kind_of(path: Path) -> str:
    """The file system's type, by the name of its mount point (see support_fs)."""
    return path.parent.name


async def test_what_a_file_has_space_for(area: Path) -> None:
    async with below(area) as lower:
        file = await opened(lower, "f", write=True)
        assert await file.allocated_until(0) == 0
        await write(file, 0, memory(b"x" * 4 * BLOCK))
        await write(file, 8 * BLOCK, memory(b"x" * 4 * BLOCK))
        await file.sync()
        assert await file.allocated_until(0) == 4 * BLOCK
        assert await file.allocated_until(3 * BLOCK) == 4 * BLOCK
        assert await file.allocated_until(4 * BLOCK) == 4 * BLOCK
        assert await file.allocated_until(8 * BLOCK) == 12 * BLOCK
        assert await file.allocated_until(100 * BLOCK) == 100 * BLOCK
        for number in range(200):  # more extents than one question brings
            await write(file, (100 + number * 2) * BLOCK, memory(b"x" * BLOCK))
        for number in range(200):
            await write(file, (101 + number * 2) * BLOCK, memory(b"y" * BLOCK))
        await file.sync()
        assert await file.allocated_until(100 * BLOCK) == 500 * BLOCK
        file.close()


async def test_what_is_shared_is_no_space_of_the_file(area: Path) -> None:
    if kind_of(area) == "ext4":
        pytest.skip("ext4 shares nothing")
    async with below(area) as lower:
        file = await opened(lower, "f", write=True)
        await write(file, 0, memory(b"x" * 4 * BLOCK))
        await file.sync()
        run("cp", "--reflink=always", area / "f", area / "copy")
        await lower.backing.sync_all()
        assert await file.allocated_until(0) == 0
        file.close()


async def test_the_space_that_there_is(area: Path) -> None:
    async with below(area) as lower:
        status = os.statvfs(area)
        space = await lower.backing.space()
        assert (space.total, space.unit) == (status.f_blocks * status.f_frsize, status.f_frsize)
        assert 0 < space.available < space.total
        assert lower.backing.overwrites_take_space == (kind_of(area) == "btrfs")


async def test_how_many_idle_files_may_stay_open(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with below(area) as lower:
        assert lower.tree.can_reopen == (os.geteuid() == 0)

        def again() -> treebacking.TreeBacking:
            return treebacking.TreeBacking(lower.tree, lower.aio, lower.data, BLOCK)

        for limit, most in ((200, 25), (100_000, 1024)):
            monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
            assert again().most_kept_open == (most if lower.tree.can_reopen else sys.maxsize)
        # FUSE has handles, which are good for as long as the kernel has the inode in memory.
        monkeypatch.setattr(treebacking, "file_system_type", lambda _: FUSE)
        assert again().most_kept_open == sys.maxsize


def handle_of(path: Path) -> bytes:
    fd = os.open(path, os.O_PATH)
    try:
        return handles.file_handle(fd)
    finally:
        os.close(fd)


async def recreate(backing: Backing, parent: bytes, mode: int) -> bytes:
    """The handle of a lost file, created again as ``f``."""
    found: list[bytes] = []

    async def note(handle: bytes, place: Place) -> None:
        assert place in (Place(b"f", aside=False), Place(b"file-1", aside=True), Place(b"file-1.1", aside=True))
        found.append(handle)

    await backing.recreate(LostFile(parent, b"f", b"file-1", mode, 7, 8), note)
    (handle,) = set(found)
    return handle


async def test_a_copy_of_another_file_gets_the_first_number_that_is_free(area: Path) -> None:
    (area / "f").write_bytes(b"x" * 10_000)
    (area / "f").chmod(0o604)
    (area / "f.copy-1").write_text("taken")
    noted: list[tuple[bytes, Place]] = []

    async def note(handle: bytes, place: Place) -> None:
        assert not (area / "f.copy-2").exists()
        noted.append((handle, place))

    async with below(area) as lower:
        for size, beneath in ((12_000, handle_of(area / "f")), (5_000, handle_of(area / "f")), (300, b"")):
            lost = LostFile(handle_of(area), b"f.copy", b"f.copy", 0o640, 0, 0, True, size, beneath, size, beneath)
            (area / "f.copy-2").unlink(missing_ok=True)
            await lower.backing.recreate(lost, note)
            copied = min(size, 10_000) if beneath else 0
            assert (area / "f.copy-2").read_bytes() == b"x" * copied + bytes(size - copied)
            assert (area / "f.copy-2").stat().st_mode & 0o777 == (0o604 if beneath else 0o640)
            handle, place = noted.pop()
            assert place == Place(b"f.copy-2", aside=False)
            file = lower.backing.file(handle)
            assert file.writable  # it was handed over open
            file.close()
    assert (area / "f.copy-1").read_text() == "taken"


async def test_a_lost_file_returns_to_its_place(area: Path) -> None:
    (area / "d").mkdir()
    os.chown(area / "d", 5, 6)
    (area / "d").chmod(0o2700)
    async with below(area) as lower:
        handle = await recreate(lower.backing, handle_of(area / "d"), 0o104751)
        status = (area / "d" / "f").stat()
        assert (status.st_mode, status.st_uid, status.st_gid, status.st_size) == (0o104751, 7, 8, 0)
        assert handle == handle_of(area / "d" / "f")


async def test_a_lost_file_has_no_name_before_it_is_noted(area: Path) -> None:
    async def fail(handle: bytes, place: Place) -> None:
        assert not list(area.iterdir())
        raise OSError(errno.EIO, "the catalog fails")

    async with below(area) as lower:
        with pytest.raises(OSError, match="the catalog fails"):
            await lower.backing.recreate(LostFile(handle_of(area), b"f", b"file-1", 0o100600, 7, 8), fail)
    assert not list(area.iterdir())


async def test_where_files_need_names_a_lost_file_gets_its_own_at_once(
    area: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dirfd: int) -> int:
        raise OSError(errno.EOPNOTSUPP, "no files without names")  # as open(2) does on NFS

    monkeypatch.setattr(treebacking, "_unnamed", refuse)
    async with below(area) as lower:
        handle = await recreate(lower.backing, handle_of(area), 0o100640)
    assert handle == handle_of(area / "f")
    assert (area / "f").stat().st_mode == 0o100640


@pytest.mark.parametrize("reason", ["taken", "parent gone", "no parent", "parent is a file"])
async def test_a_lost_file_without_a_place_goes_to_lost_and_found(area: Path, reason: str) -> None:
    (area / "d").mkdir()
    (area / "d" / "f").write_bytes(b"present")
    parent = handle_of(area / "d")
    if reason == "parent gone":
        (area / "d" / "f").unlink()
        (area / "d").rmdir()
        drop_caches()
    elif reason == "no parent":
        parent = b""
    elif reason == "parent is a file":
        parent = handle_of(area / "d" / "f")
    async with below(area) as lower:
        first = await recreate(lower.backing, parent, 0o100640)
        second = await recreate(lower.backing, parent, 0o100640)
    lost = area / "lost+found.cachefsd"
    assert [handle_of(lost / "file-1"), handle_of(lost / "file-1.1")] == [first, second]
    assert (lost / "file-1").stat().st_mode == 0o100640
    assert lost.stat().st_mode == 0o40700
    if reason == "taken":
        assert (area / "d" / "f").read_bytes() == b"present"


async def test_no_size_beyond_the_largest_is_possible(area: Path) -> None:
    path = area / "file"
    path.touch()
    async with below(area) as lower:
        file = lower.backing.file(handle_of(path))
        await file.open(write=True)
        largest = file.max_size
        assert largest > 1 << 40
        await file.truncate(largest & -4096)
        assert path.stat().st_size == largest & -4096
        if largest < (1 << 63) - 4096:
            with pytest.raises(OSError, match="too large"):
                await file.truncate(largest + 1)
        await file.truncate(0)
        file.close()


def small(file: DirectFile, content: memoryview, runs: Sequence[Run], tail: Piece | None) -> SmallWrite:
    assert len(content)
    return SmallWrite(file, runs, tail, 1_700_000_000_000_000_000)


async def test_many_files_are_written_in_one_job_and_asked_for_their_errors(area: Path) -> None:
    """Some are open, some for reading only, some not at all; nothing stays in the page cache."""
    async with below(area) as lower:
        assert lower.backing.sync_all_tells_files
        content = memory(b"a" * BLOCK + b"b" * BLOCK + b"c" * BLOCK)
        files = [await opened(lower, f"f{number}", write=number == 0) for number in range(3)]
        direct = files[1].direct
        files[2].close()
        writes = [
            small(files[0], content, [Run(0, np.array([1])), Run(2 * BLOCK, np.array([2, 0]))], None),
            small(files[1], content, [], Piece(0, BLOCK, 200)),
            small(files[2], content, [Run(0, np.array([0]))], Piece(BLOCK, 2 * BLOCK, 100)),
        ]
        waiting, written = deque(writes), list[tuple[SmallWrite, OSError | None]]()
        await lower.backing.write_files(content, waiting, written)
        assert written == [(write, None) for write in writes]
        assert not waiting
        assert [file.direct for file in files] == [direct, direct, False]
        await lower.backing.sync_all()
        stats = await lower.backing.finish_files(files, synced=True)
        expected = [b"b" * BLOCK + bytes(BLOCK) + b"c" * BLOCK + b"a" * BLOCK, b"b" * 200, b"a" * BLOCK + b"c" * 100]
        for number, (stat, data) in enumerate(zip(stats, expected, strict=True)):
            path = lower.path / f"f{number}"
            assert not isinstance(stat, OSError)
            assert (stat.size, stat.mtime_ns) == (len(data), 1_700_000_000_000_000_000)
            assert not pages_of(path)
            assert path.read_bytes() == data
            assert files[number].bounced_bytes == len(data) - (BLOCK if number == 0 else 0)
        # Who opens such a file afterwards gets direct I/O again, where there is any.
        await files[2].open(write=True)
        assert files[2].direct == files[0].direct
        for file in files:
            file.close()


async def test_a_write_of_many_that_fails_has_its_own_error(area: Path) -> None:
    async with below(area) as lower:
        content = memory(b"a" * BLOCK)
        files = [await opened(lower, f"f{number}", write=True) for number in range(3)]
        files[1].close()
        files[1].handle = b""
        writes = [small(file, content, [Run(0, np.array([0]))], None) for file in files]
        written: list[tuple[SmallWrite, OSError | None]] = []
        await lower.backing.write_files(content, deque(writes), written)
        assert [error and error.errno for _, error in written] == [None, errno.ESTALE, None]
        assert (lower.path / "f2").read_bytes() == b"a" * BLOCK
        for file in (files[0], files[2]):
            file.close()


async def test_a_file_that_is_being_synced_is_left_to_a_pass_of_its_own(
    area: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with below(area) as lower:
        content = memory(b"a" * BLOCK)
        files_ = [await opened(lower, f"f{number}", write=True) for number in range(2)]
        entered, go_on, plain = threading.Event(), threading.Event(), blocking.sync

        def slowly(*args: Any) -> None:
            entered.set()
            assert go_on.wait(10)
            plain(*args)

        monkeypatch.setattr(blocking, "sync", slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(files_[0].sync)
            try:
                while not entered.is_set():
                    await trio.sleep(0.001)
                waiting = deque(small(file, content, [Run(0, np.array([0]))], None) for file in files_)
                written: list[tuple[SmallWrite, OSError | None]] = []
                await lower.backing.write_files(content, waiting, written)
            finally:
                go_on.set()
        assert [write.file for write in waiting] == files_[:1]
        assert [(write.file, error) for write, error in written] == [(files_[1], None)]
        for file in files_:
            file.close()


@pytest.mark.parametrize("synced", [True, False])
async def test_an_error_of_writing_back_is_told_to_its_file(
    area: Path, monkeypatch: pytest.MonkeyPatch, synced: bool
) -> None:
    async with below(area) as lower:
        content = memory(b"a" * BLOCK)
        files_ = [await opened(lower, f"f{number}", write=True) for number in range(3)]
        writes = deque(small(file, content, [], Piece(0, 0, 100)) for file in files_)
        await lower.backing.write_files(content, writes, [])
        bad = (lower.path / "f1").stat().st_ino
        owner, name = (syscalls, "writeback_error") if synced else (os, "fsync")
        plain, asked = getattr(owner, name), list[int]()

        def told(fd: int) -> None:
            asked.append(os.fstat(fd).st_ino)
            plain(fd)
            if asked[-1] == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, told)
            results = await lower.backing.finish_files(files_, synced=synced)
        assert [isinstance(result, OSError) for result in results] == [False, True, False]
        assert [file.sync_failures for file in files_] == [0, 1, 0]
        assert {(lower.path / f"f{number}").stat().st_ino for number in range(3)} == set(asked)
        assert not isinstance((await lower.backing.finish_files(files_, synced=synced))[1], OSError)
        for file in files_:
            file.close()


async def test_the_kernel_tells_each_descriptor_of_an_error_that_syncfs_has_met(tmp_path: Path) -> None:
    """A loop device over a sparse file on a full tmpfs takes no data: each descriptor hears of it once."""
    with contextlib.ExitStack() as undo:
        memory_fs = tmp_path / "memory"
        memory_fs.mkdir()
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        run("mount", "-t", "tmpfs", "-o", "size=24M", "tmpfs", memory_fs)
        undo.callback(run, "umount", "--lazy", memory_fs)
        top = undo.enter_context(loop_mounted("ext4", memory_fs, size_mib=64))
        fds = {}
        for name in ("small", "large", "other"):
            fds[name] = os.open(top / name, os.O_RDWR | os.O_CREAT)
            undo.callback(os.close, fds[name])
        os.pwrite(fds["small"], b"x" * 100, 0)
        os.fsync(fds["small"])
        with (memory_fs / "ballast").open("wb") as ballast, suppress(OSError):
            while True:
                ballast.write(bytes(1 << 20))
                ballast.flush()
        second = os.open(top / "large", os.O_RDWR)
        undo.callback(os.close, second)
        os.pwrite(fds["large"], b"y" * (4 << 20), 0)
        with suppress(OSError):
            syscalls.syncfs(fds["other"])
        for fd in (fds["large"], second):
            with pytest.raises(OSError, match=r"Input/output|No space"):
                syscalls.writeback_error(fd)
            syscalls.writeback_error(fd)  # once
        syscalls.writeback_error(fds["small"])
