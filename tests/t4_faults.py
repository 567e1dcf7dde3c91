"""A backing that is full, broken, read-only or does not answer: nothing is lost, it is said, and it heals."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support_daemon import Daemon, MakeDaemon, cachefsd, make_daemon, wait_until
from support_fs import drop_caches, frozen, loop_mounted, run, slow_reads

__all__ = ["make_daemon"]
BLOCK = 4096
BROKEN = {errno.EIO, errno.ENOSPC}
"""What bad blocks give, depending on the kernel."""
OPTIONS = ("dirty_age=0.1,retry_min=0.1,retry_max=0.2,full_timeout=2",)


def failing(daemon: Daemon) -> bool:
    return daemon.status()["writeback"]["errors"] > 0


def fill_up(path: Path) -> None:
    """Let a file take all the space that there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(BLOCK))


def outcome(call: Callable[..., object], *arguments: object) -> int | None:
    """The errno that a call gave, if it did."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return None


def fsync_error(path: Path) -> int | None:
    """What a new open file is told."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return outcome(os.fsync, fd)
    finally:
        outcome(os.close, fd)


def write_and_close(path: Path, content: bytes) -> None:
    """That closing the file may report an error of writeback by then is nothing to this one."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        assert os.pwrite(fd, content, 0) == len(content)
    finally:
        outcome(os.close, fd)


def check_kept_and_healed(daemon: Daemon, path: Path, content: bytes, codes: set[int], beneath: Path) -> Iterator[None]:
    """The data stays and the error shows, also over a crash; after the ``yield``, when the fault is gone, it drains."""
    wait_until(lambda: failing(daemon), "an error of writeback")
    status = daemon.status()
    assert status["dirty_bytes"] >= len(content)
    (about,) = status["writeback"]["failing"]
    code = getattr(errno, about["errno"])
    assert code in codes
    assert (about["path"], about["dirty_bytes"]) == (path.name, len(content))
    assert path.name in status["writeback"]["last_error"]
    assert os.strerror(code) in status["writeback"]["last_error"]
    text = cachefsd("status", daemon.mountpoint).stdout
    assert "FAILING" in text
    assert path.name in text
    assert path.read_bytes() == content
    daemon.kill_and_mount()
    assert path.read_bytes() == content
    wait_until(lambda: failing(daemon), "an error of writeback after the restart")
    told = os.open(path, os.O_RDONLY)
    assert outcome(os.fsync, told) in codes
    yield
    wait_until(lambda: daemon.status()["dirty_bytes"] == 0, "writeback")
    assert daemon.status()["writeback"]["failing"] == []
    outcome(os.fsync, told)  # by now it may have failed in another way, which was news
    assert outcome(os.fsync, told) is None
    assert fsync_error(path) is None
    assert outcome(os.close, told) is None
    assert path.read_bytes() == content
    daemon.unmount()
    assert beneath.read_bytes() == content


def test_a_full_backing(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path, size_mib=32, options=("-m", "0")) as ext4:
        daemon = make_daemon(ext4, options=("dirty_age=3600",))
        content = os.urandom(40 * BLOCK)
        (daemon.path / "file").write_bytes(content)
        filler = ext4 / "filler"
        fill_up(filler)
        daemon.unmount()
        daemon.options = OPTIONS
        daemon.mount()
        phases = check_kept_and_healed(daemon, daemon.path / "file", content, {errno.ENOSPC}, ext4 / "file")
        next(phases)
        filler.unlink()
        next(phases, None)


def test_a_backing_that_has_become_read_only(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as ext4:
        daemon = make_daemon(ext4, options=("dirty_age=3600",))
        content = os.urandom(10 * BLOCK)
        (daemon.path / "file").write_bytes(content)
        daemon.unmount()
        run("mount", "-o", "remount,ro", ext4)
        daemon.options = OPTIONS
        daemon.mount()
        with pytest.raises(OSError, match="Read-only"):
            (daemon.path / "file").open("r+b")
        with pytest.raises(OSError, match="Read-only"):
            (daemon.path / "new").touch()
        phases = check_kept_and_healed(daemon, daemon.path / "file", content, {errno.EROFS}, ext4 / "file")
        next(phases)
        run("mount", "-o", "remount,rw", ext4)
        next(phases, None)


@contextlib.contextmanager
def breakable(directory: Path, size: int = 1 << 20) -> Iterator[tuple[Path, Path]]:
    """An ext4 with a file of so many bytes whose blocks cannot be written, as long as another file is there.

    It is on a loop device over a file on a tmpfs. The blocks are holes of that file, and the tmpfs is full.
    Of 4 KiB, as pages are: the loop device takes a write that is done in part, up to a hole, for done.
    """
    memory = directory / "memory"
    memory.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64M", "none", memory)
    with contextlib.ExitStack() as undo:
        undo.callback(run, "umount", "--lazy", memory)
        ext4 = undo.enter_context(loop_mounted("ext4", memory, size_mib=40, options=("-b", "4096")))
        run("fallocate", "--length", "40M", memory / "ext4.img")  # the journal must not break as well
        (ext4 / "file").write_bytes(b"\xff" * size)
        os.sync()
        extents = run("filefrag", "-b1", "-v", ext4 / "file").splitlines()
        for line in extents:
            fields = line.replace(":", " ").replace("..", " ").split()
            if fields and fields[0].isdigit():
                start, length = int(fields[3]), int(fields[5])
                run("fallocate", "--punch-hole", "--offset", str(start), "--length", str(length), memory / "ext4.img")
        fill_up(memory / "filler")
        yield ext4, memory / "filler"


def test_a_backing_with_bad_blocks(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with breakable(tmp_path) as (ext4, fault):
        daemon = make_daemon(ext4, options=OPTIONS)
        content = os.urandom(1 << 20)
        write_and_close(daemon.path / "file", content)
        phases = check_kept_and_healed(daemon, daemon.path / "file", content, BROKEN, ext4 / "file")
        next(phases)
        fault.unlink()
        next(phases, None)


def test_an_error_is_reported_once_to_each_open_file(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with breakable(tmp_path) as (ext4, fault):
        daemon = make_daemon(ext4, options=OPTIONS)
        path = daemon.path / "file"
        one, other, closed = (os.open(path, os.O_RDWR) for _ in range(3))
        inherited = os.dup(one)  # the same open file
        os.pwrite(one, b"1" * BLOCK, 0)
        wait_until(lambda: failing(daemon), "an error of writeback")
        # This process has started others since, whose closing of what they inherit must not count.
        assert outcome(os.fsync, one) in BROKEN
        assert outcome(os.fsync, one) is None  # the data is durable in the cache
        assert outcome(os.close, inherited) is None
        assert outcome(os.close, closed) in BROKEN
        assert fsync_error(path) is None  # it has been seen
        path.read_bytes()
        assert len(daemon.status()["writeback"]["failing"]) == 1
        assert outcome(os.fsync, other) in BROKEN
        assert outcome(os.close, other) is None
        synchronous = os.open(path, os.O_RDWR | os.O_SYNC)
        os.pwrite(synchronous, b"2" * BLOCK, BLOCK)
        assert daemon.status()["dirty_bytes"] == 2 * BLOCK
        # That has to fail as well before it is news.
        wait_until(lambda: outcome(os.fsync, one) in BROKEN, "another error of writeback")
        assert outcome(os.pwrite, synchronous, b"3" * BLOCK, 2 * BLOCK) in BROKEN
        assert os.pread(synchronous, BLOCK, 2 * BLOCK) == b"3" * BLOCK
        outcome(os.close, synchronous)
        outcome(os.close, one)
        fault.unlink()
        wait_until(lambda: daemon.status()["dirty_bytes"] == 0, "writeback")
        assert fsync_error(path) is None
        daemon.unmount()
        assert (ext4 / "file").read_bytes()[: 3 * BLOCK] == b"1" * BLOCK + b"2" * BLOCK + b"3" * BLOCK


def test_a_full_cache_over_a_broken_backing(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with breakable(tmp_path, size=8 << 20) as (ext4, fault):
        daemon = make_daemon(ext4, size="4M", options=OPTIONS)
        written = write_until_it_fails(daemon.path / "file", BROKEN)
        slots = daemon.status()["slots"]
        assert slots["dirty"] == written // BLOCK
        assert slots["dirty"] > slots["total"] * 0.9
        data = b"".join(bytes([number % 256]) * BLOCK for number in range(written // BLOCK))
        with (daemon.path / "file").open("rb") as file:
            assert file.read(written) == data
        fault.unlink()
        daemon.flush()
        daemon.unmount()
        assert (ext4 / "file").read_bytes()[:written] == data


def _aligned(number: int) -> memoryview:
    memory = mmap.mmap(-1, BLOCK)
    memory[:] = bytes([number % 256]) * BLOCK
    return memoryview(memory)


WRITER = """
import os, sys, mmap
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
memory, written = mmap.mmap(-1, 4096), 0
try:
    while True:
        memory[:] = bytes([written // 4096 % 256]) * 4096
        written += os.pwritev(fd, [memory], written)
except OSError as error:
    print(written, error.errno)
"""


def write_until_it_fails(path: Path, codes: set[int]) -> int:
    """Write blocks from the start of a file until the file system gives one of these errors; how many bytes it took.

    In a process of its own, which may hang as long as the backing does without this one hanging too.
    """
    done = subprocess.run([sys.executable, "-c", WRITER, path], capture_output=True, text=True, timeout=180, check=True)
    written, found = map(int, done.stdout.split())
    assert found in codes, os.strerror(found)
    return written


CACHED = """
import os, sys, mmap
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
memory = mmap.mmap(-1, 4096)
for number in range(int(sys.argv[2]) // 4096):
    assert os.preadv(fd, [memory], number * 4096) == 4096
    assert memory[:] == bytes([number % 256]) * 4096
"""


def test_a_full_cache_over_a_backing_that_does_not_answer(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as ext4:
        daemon = make_daemon(ext4, size="4M", options=OPTIONS)
        (daemon.path / "file").touch()
        with frozen(ext4):
            written = write_until_it_fails(daemon.path / "file", {errno.EIO})
            subprocess.run([sys.executable, "-c", CACHED, daemon.path / "file", str(written)], timeout=180, check=True)
            assert daemon.status()["dirty_bytes"] > 0
        daemon.flush()
        assert (ext4 / "file").stat().st_size == written
        daemon.unmount()


def test_a_slow_disk_does_not_hold_up_what_is_cached(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as ext4:
        (ext4 / "large").write_bytes(os.urandom(1 << 20))
        drop_caches()
        daemon = make_daemon(ext4)
        (daemon.path / "cached").write_bytes(b"c" * 100_000)
        cached = os.open(daemon.path / "cached", os.O_RDWR | os.O_DIRECT)
        missing = os.open(daemon.path / "large", os.O_RDONLY)
        done = threading.Event()

        def miss() -> None:
            for offset in (0, 400_000, 800_000):
                os.pread(missing, 1, offset)
            done.set()

        hits = 0
        with slow_reads(ext4):
            reader = threading.Thread(target=miss)
            reader.start()
            while not done.is_set():
                os.preadv(cached, [_aligned(0)], hits % 20 * BLOCK)
                os.pwritev(cached, [_aligned(hits)], hits % 20 * BLOCK)
                hits += 1
            reader.join()
        os.close(cached)
        os.close(missing)
        # One read of the disk takes a second: three would have gone by with three that had to wait for it.
        assert hits > 30
        daemon.unmount("--flush")


def test_a_cache_directory_that_is_full(make_daemon: MakeDaemon) -> None:
    """The pool is allocated in full beforehand, and so is what the catalog can need for its files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "none", memory], check=True)
        try:
            daemon = make_daemon(mount=False, size="16M")
            daemon.cache = Path(memory) / "cache"
            daemon.mount()
            fill_up(Path(memory) / "filler")
            content = os.urandom(1 << 20)
            outcome = None
            try:
                (daemon.path / "file").write_bytes(content)
            except OSError as error:
                outcome = error.errno
            if outcome is None:
                assert (daemon.path / "file").read_bytes() == content
            else:
                assert outcome == errno.EIO
                assert daemon.status()["failed"]
            daemon.destroy()
            (Path(memory) / "filler").unlink()
            daemon.mount()
            if outcome is None:
                assert (daemon.path / "file").read_bytes() == content
            (daemon.path / "other").write_bytes(content)
            assert (daemon.path / "other").read_bytes() == content
            daemon.destroy()
        finally:
            subprocess.run(["umount", "--lazy", memory], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="finding files by their handles again needs root")
def test_more_dirty_files_than_descriptors(make_daemon: MakeDaemon) -> None:
    """Each dirty file kept one until it was written back: users, and a recovery, got EMFILE."""
    daemon = make_daemon(options=("dirty_age=3600",), mount=False)
    limit = ("prlimit", "--nofile=256:256")

    def serve() -> None:
        child = daemon.start(before=limit)
        wait_until(lambda: child.poll() is not None or daemon.is_served_by(child), "a daemon that serves")

    serve()
    content = {f"{number}": b"%d" % number * 100 for number in range(600)}
    for name, data in content.items():
        (daemon.path / name).write_bytes(data)
    daemon.kill()
    serve()
    for name, data in content.items():
        assert (daemon.path / name).read_bytes() == data
        assert not (daemon.backing / name).stat().st_size
    daemon.flush()
    for name, data in content.items():
        assert (daemon.backing / name).read_bytes() == data
    assert daemon.status()["writeback"]["errors"] == 0
