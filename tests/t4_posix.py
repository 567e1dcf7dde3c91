"""Everything a program may do to files, on the mount and on plain ext4: both must give the same answers.

A *scenario* gets an empty directory and returns what it has seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support_daemon import ROOT, Daemon, MakeDaemon, daemons, make_daemon, public_directory, wait_until
from support_fs import drop_caches, loop_mounted
from support_posix import as_user, attempt, facts, tree

__all__ = ["make_daemon"]

ALICE, BOB, STAFF = (1001, 1001), (1002, 1002), 2000
Scenario = Callable[[Path], Any]
SCENARIOS: list[Scenario] = []
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


@pytest.fixture(scope="module", params=["", "writeback_cache"], ids=["plain", "writeback-cache"])
def sides(request: pytest.FixtureRequest) -> Iterator[tuple[Daemon, Path]]:
    """A mount over a directory of an ext4, and a plain directory of the same ext4."""
    with public_directory() as base, loop_mounted("ext4", base) as ext4, daemons(base) as make:
        (ext4 / "beneath").mkdir()
        (ext4 / "plain").mkdir()
        yield make(ext4 / "beneath", options=(request.param,)), ext4 / "plain"


_numbers = itertools.count()


def both(sides: tuple[Daemon, Path], function: Scenario) -> tuple[Any, Any]:
    """What a scenario sees on the mount and on ext4, with all that is left behind."""
    daemon, plain = sides
    name = f"{function.__name__}-{next(_numbers)}"
    results = []
    for root in (daemon.path / name, plain / name):
        root.mkdir()
        root.chmod(0o777)
        results.append((function(root), tree(root)))
    return results[0], results[1]


# ---- names


@scenario
def creating_and_removing_names(root: Path) -> Any:
    seen: list[Any] = []
    seen.append(attempt(os.mkdir, root / "d", 0o751))
    seen.append(attempt(os.mkdir, root / "d"))
    seen.append(attempt(os.mkdir, root / "none" / "d"))
    seen.append(attempt((root / "f").touch))
    seen.append(attempt(os.mkdir, root / "f" / "d"))
    seen.append(attempt(os.rmdir, root / "f"))
    seen.append(attempt(os.unlink, root / "d"))
    seen.append(attempt((root / "d" / "inner").touch))
    seen.append(attempt(os.rmdir, root / "d"))
    seen.append(attempt(os.unlink, root / "d" / "inner"))
    seen.append(facts(root / "d"))
    seen.append(attempt(os.rmdir, root / "d"))
    seen.append(attempt(os.rmdir, root / "d"))
    seen.append(attempt(os.unlink, root / "nothing"))
    seen.append(attempt(os.unlink, root / "f"))
    seen.append(attempt(os.stat, root / "f"))
    seen.append(facts(root))
    return seen


@scenario
def strange_names(root: Path) -> Any:
    names = [b"\xff\xfe", b"caf\xe9", "ü".encode(), b"new\nline", b" ", b"...", b"-rf", b"x" * 255]
    base = os.fsencode(root)
    seen: list[Any] = []
    for name in names:
        fd = os.open(base + b"/" + name, os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(fd, name)
        os.close(fd)
    seen.append(attempt(os.open, base + b"/" + b"x" * 256, os.O_CREAT))
    seen.append(attempt(os.stat, base + b"/" + b"x" * 256))
    seen.append(attempt(os.stat, base + b"/x" * 2000))
    seen.append(sorted(os.listdir(base)))
    seen.append(attempt(os.rename, base + b"/\xff\xfe", base + b"/\x80"))
    seen.append(sorted(os.listdir(base)))
    return seen


@scenario
def symbolic_links(root: Path) -> Any:
    seen: list[Any] = []
    os.symlink("target", root / "dangling")
    os.symlink(b"\xff" * 100, os.fsencode(root / "binary"))
    os.symlink("x" * 1000, root / "long")  # this ext4 has blocks of 1 KiB
    seen.append(os.readlink(root / "dangling"))
    seen.append(os.readlink(os.fsencode(root / "binary")))
    seen.append(len(os.readlink(root / "long")))
    seen.append(attempt(os.open, root / "dangling", os.O_RDONLY))
    seen.append(attempt(os.open, root / "dangling", os.O_RDONLY | os.O_NOFOLLOW))
    seen.append(attempt(os.open, root / "dangling", os.O_CREAT | os.O_EXCL))
    fd = os.open(root / "dangling", os.O_CREAT | os.O_WRONLY)
    os.close(fd)
    seen.append(facts(root / "target"))
    seen.append(attempt(os.readlink, root / "target"))
    seen.append(attempt(os.symlink, "x", root / "dangling"))
    os.lchown(root / "dangling", 3, 4)
    os.utime(root / "dangling", ns=(1, 2), follow_symlinks=False)
    seen.append((facts(root / "dangling"), os.lstat(root / "dangling").st_mtime_ns))
    os.symlink("loop", root / "loop")
    seen.append(attempt(os.stat, root / "loop"))
    return seen


@scenario
def hard_links(root: Path) -> Any:
    seen: list[Any] = []
    (root / "a").write_bytes(b"one")
    (root / "d").mkdir()
    os.link(root / "a", root / "d" / "b")
    seen.append((facts(root / "a"), os.path.samefile(root / "a", root / "d" / "b")))
    with (root / "d" / "b").open("ab") as file:
        file.write(b", two")
    seen.append((root / "a").read_bytes())
    os.truncate(root / "a", 4)
    seen.append((root / "d" / "b").read_bytes())
    seen.append(attempt(os.link, root / "a", root / "d" / "b"))
    seen.append(attempt(os.link, root / "d", root / "e"))
    seen.append(attempt(os.link, root / "none", root / "e"))
    os.symlink("a", root / "s")
    os.link(root / "s", root / "t", follow_symlinks=False)
    seen.append(os.readlink(root / "t"))
    os.unlink(root / "a")
    seen.append((facts(root / "d" / "b"), (root / "d" / "b").read_bytes()))
    os.rename(root / "d" / "b", root / "a")
    seen.append((facts(root / "a"), sorted(os.listdir(root / "d"))))
    return seen


def renameat2(old: Path, new: Path, flags: int) -> None:
    from cachefsd.backing.syscalls import renameat2 as call

    call(-100, os.fsencode(old), -100, os.fsencode(new), flags)


@scenario
def renames(root: Path) -> Any:
    seen: list[Any] = []
    for name in ("a", "b", "c"):
        (root / name).write_text(name)
    for name in ("d", "e", "full"):
        (root / name).mkdir()
    (root / "full" / "x").touch()
    rename = lambda old, new: attempt(os.rename, root / old, root / new)  # noqa: E731
    seen += [rename("a", "b"), (root / "b").read_text(), rename("a", "b"), rename("b", "d"), rename("d", "b")]
    seen += [rename("d", "e"), rename("e", "full"), rename("full", "full/x"), rename("full", "e"), rename("e", "e")]
    os.link(root / "b", root / "same")
    seen += [rename("b", "same"), facts(root / "b"), facts(root / "same")]
    two = lambda old, new, flags: attempt(renameat2, root / old, root / new, flags)  # noqa: E731
    seen += [two("b", "c", RENAME_NOREPLACE), two("b", "new", RENAME_NOREPLACE), two("new", "c", RENAME_EXCHANGE)]
    seen += [(root / "new").read_text(), (root / "c").read_text(), two("c", "e", RENAME_EXCHANGE), facts(root / "c")]
    seen += [two("c", "none", RENAME_EXCHANGE), two("c", "e", 8), two("c", "e", 3)]
    (root / "moved").mkdir()
    seen += [rename("c", "moved/c"), rename("moved/c/x", "moved/y"), rename("e", "moved/y"), sorted(os.listdir(root))]
    seen.append(attempt(os.listdir, root / "moved" / ".."))
    return seen


@scenario
def whiteouts(root: Path) -> Any:
    seen: list[Any] = []
    for name in ("a", "b", "lost"):
        (root / name).write_text(name)
    (root / "d").mkdir()
    root.chmod(0o777)
    two = lambda old, new, flags: attempt(renameat2, root / old, root / new, flags)  # noqa: E731
    with (root / "lost").open() as lost:
        seen += [two("a", "lost", 4), (root / "lost").read_text(), lost.read(), os.fstat(lost.fileno()).st_nlink]
    status = (root / "a").lstat()
    seen += [stat.S_IFMT(status.st_mode) == stat.S_IFCHR, status.st_rdev, sorted(os.listdir(root))]
    seen += [two("b", "lost", 4 | RENAME_NOREPLACE), two("b", "d/b", 4 | RENAME_NOREPLACE), two("b", "a", 4 | 2)]
    (root / "user").write_text("user")
    os.chown(root / "user", *ALICE)
    seen.append(as_user(*ALICE, [], two, "user", "d/new", 4))
    os.chmod(root / "d", 0o777)
    seen += [
        as_user(*ALICE, [], two, "user", "d/new", 4),
        (root / "user").lstat().st_uid,
        sorted(os.listdir(root / "d")),
    ]
    (root / "a").unlink()
    (root / "a").write_text("again")
    return [*seen, (root / "a").read_text()]


@scenario
def changing_nothing_moves_ctime(root: Path) -> Any:
    (root / "file").write_text("x")
    (root / "other").write_text("x")
    (root / "directory").mkdir()
    (root / "link").symlink_to("nowhere")
    os.chown(root / "other", *ALICE)
    os.chmod(root / "other", 0o666)
    moved = []
    for name, uid in (("file", 0), ("directory", 0), ("link", 0), ("other", 1001), ("other", 1002)):
        before = (root / name).lstat()
        time.sleep(0.03)
        chown = lambda name=name: os.chown(root / name, -1, -1, follow_symlinks=False)  # noqa: E731
        result = attempt(chown) if uid == 0 else as_user(uid, uid, [], chown)
        after = (root / name).lstat()
        moved.append((result, after.st_ctime_ns > before.st_ctime_ns, after.st_mtime_ns == before.st_mtime_ns))
        moved.append(after.st_mode == before.st_mode)
    return moved


@scenario
def a_file_replaced_while_it_is_open(root: Path) -> Any:
    (root / "a").write_bytes(b"old content")
    (root / "b").write_bytes(b"new")
    with (root / "a").open("r+b") as old:
        os.rename(root / "b", root / "a")
        old.seek(0, os.SEEK_END)
        old.write(b" goes on")
        old.flush()
        old.seek(0)
        return [old.read(), facts(old.fileno()), (root / "a").read_bytes(), facts(root / "a")]


@scenario
def an_unlinked_file_lives_while_it_is_open(root: Path) -> Any:
    seen: list[Any] = []
    with (root / "f").open("w+b") as file, (root / "f").open("rb") as reader:
        file.write(b"x" * 10_000)
        file.flush()
        os.unlink(root / "f")
        seen.append(facts(file.fileno()))
        file.seek(5000)
        file.write(b"y" * 100_000)
        file.flush()
        os.fsync(file.fileno())
        os.ftruncate(file.fileno(), 60_000)
        seen.append((facts(file.fileno()), reader.read() == b"x" * 5000 + b"y" * 55_000))
        (root / "f").write_bytes(b"another")
        seen.append((os.pread(file.fileno(), 3, 0), (root / "f").read_bytes()))
        os.fchmod(file.fileno(), 0o600)
        os.utime(file.fileno(), ns=(5, 6))
        seen.append((facts(file.fileno()), os.fstat(file.fileno()).st_mtime_ns))
        again = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR)
        os.pwrite(again, b"zz", 0)
        seen.append(os.pread(reader.fileno(), 3, 0))
        os.close(again)
    return seen


@scenario
def a_directory_removed_while_it_is_open(root: Path) -> Any:
    (root / "d").mkdir()
    fd = os.open(root / "d", os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir(root / "d")
    seen = [attempt(os.listdir, fd), attempt(os.mkdir, "x", dir_fd=fd), attempt(os.open, "y", os.O_CREAT, dir_fd=fd)]
    os.close(fd)
    return seen


@scenario
def special_files(root: Path) -> Any:
    seen: list[Any] = []
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    os.mknod(root / "regular", stat.S_IFREG | 0o644)
    with socket.socket(socket.AF_UNIX) as server:
        where = os.getcwd()
        os.chdir(root)
        server.bind("socket")
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            seen.append(attempt(client.connect, "socket"))
        os.chdir(where)
    for name in ("fifo", "null", "block", "regular", "socket"):
        seen.append(facts(root / name))
    with (root / "null").open("wb") as null:
        seen.append(null.write(b"nothing"))
    reader = os.open(root / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(root / "fifo", os.O_WRONLY)
    os.write(writer, b"through")
    seen.append(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    return seen


# ---- data


@scenario
def reads_and_writes_at_all_offsets(root: Path) -> Any:
    seen: list[Any] = []
    fd = os.open(root / "f", os.O_RDWR | os.O_CREAT)
    for offset, size in [(0, 1), (4095, 2), (4096, 4096), (10_000, 12_345), (3, 20_000), (50_000, 1), (8192, 131_072)]:
        os.pwrite(fd, bytes([offset % 251 + 1]) * size, offset)
        seen.append((os.fstat(fd).st_size, os.pread(fd, 300_000, 0)))
    seen += [os.pread(fd, 10, 139_260), os.pread(fd, 10, 139_264), os.pread(fd, 10, 1 << 40)]
    seen.append(attempt(os.pread, fd, 10, -1))
    os.close(fd)
    return seen


@scenario
def large_writes_and_reads(root: Path) -> Any:
    data = b"".join(number.to_bytes(8, "little") for number in range(1 << 20))
    (root / "f").write_bytes(data)
    whole = (root / "f").read_bytes() == data
    os.truncate(root / "f", 3_000_001)
    return [whole, (root / "f").read_bytes() == data[:3_000_001]]


@scenario
def sparse_files(root: Path) -> Any:
    seen: list[Any] = []
    with (root / "f").open("w+b") as file:
        fd = file.fileno()
        os.pwrite(fd, b"end", (1 << 40) + 5)
        os.pwrite(fd, b"middle", 1 << 30)
        seen += [os.fstat(fd).st_size, os.fstat(fd).st_blocks < 1000]
        seen += [os.pread(fd, 10, (1 << 40) + 3), os.pread(fd, 10, (1 << 30) - 2), os.pread(fd, 5, 0)]
        os.ftruncate(fd, (1 << 40) + 6)
        seen += [os.pread(fd, 10, (1 << 40) + 3)]
        os.ftruncate(fd, 2 << 30)
        seen += [os.pread(fd, 10, 1 << 30), os.pread(fd, 10, (2 << 30) - 5)]
        os.ftruncate(fd, 1)
        seen.append(attempt(os.ftruncate, fd, 1 << 60))
        seen.append(attempt(os.ftruncate, fd, -1))
        seen.append(os.fstat(fd).st_size)
    return seen


@scenario
def writing_where_no_file_can_end(root: Path) -> Any:
    fd = os.open(root / "f", os.O_RDWR | os.O_CREAT)
    try:
        seen = [attempt(os.pwrite, fd, b"x", 1 << 60), os.fstat(fd).st_size]
        largest = ((1 << 32) - 1) * 4096
        for before, size in ((1, 2), (100, 4096), (4096, 8192), (8192, 8192), (100_000, 200_000), (0, 1)):
            seen.append(attempt(os.pwrite, fd, b"y" * size, largest - before))
            seen.append((os.fstat(fd).st_size, os.pread(fd, size, largest - before) == b"y" * before))
        return seen
    finally:
        os.close(fd)


@scenario
def truncating_both_ways(root: Path) -> Any:
    seen: list[Any] = []
    path = root / "f"
    path.write_bytes(b"0123456789" * 2000)
    for size in (15_000, 15_500, 8192, 9000, 1, 0, 5000, 4096, 4097):
        os.truncate(path, size)
        seen.append((os.stat(path).st_size, path.read_bytes()))
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"ABC")
        seen.append(path.read_bytes())
    fd = os.open(path, os.O_RDONLY)
    seen.append(attempt(os.ftruncate, fd, 0))
    os.close(fd)
    seen.append(attempt(os.truncate, root, 0))
    return seen


@scenario
def opening(root: Path) -> Any:
    seen: list[Any] = []
    path = root / "f"
    seen.append(attempt(os.open, path, os.O_RDWR))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    os.write(fd, b"content")
    seen.append(attempt(os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
    again = os.open(path, os.O_RDWR | os.O_CREAT, 0o777)
    seen += [os.read(again, 100), facts(again)]
    shorter = os.open(path, os.O_WRONLY | os.O_TRUNC)
    seen += [facts(again), os.pread(fd, 100, 0)]
    os.write(shorter, b"new")
    created = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    seen += [facts(again), attempt(os.read, created, 1)]
    os.write(created, b"x")
    reader = os.open(path, os.O_RDONLY | os.O_TRUNC)
    seen += [facts(reader), attempt(os.write, reader, b"x")]
    seen.append(attempt(os.open, path, os.O_RDONLY | os.O_DIRECTORY))
    seen.append(attempt(os.open, root, os.O_WRONLY))
    only = os.open(path, os.O_PATH)
    seen += [attempt(os.read, only, 1), facts(only)]
    for number in (fd, again, shorter, created, reader, only):
        os.close(number)
    return seen


@scenario
def appending(root: Path) -> Any:
    path = root / "f"
    one = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    two = os.open(path, os.O_WRONLY | os.O_APPEND)
    for number in range(50):
        os.write(one, b"one%03d " % number)
        os.write(two, b"two%03d " % number * 40)
    os.pwrite(one, b"appended all the same", 0)
    os.truncate(path, 5000)
    os.write(two, b"end")
    os.close(one)
    os.close(two)
    return path.read_bytes()


@scenario
def appending_from_several_processes(root: Path) -> Any:
    path = root / "log"
    path.touch()

    def append(who: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        for number in range(200):
            os.write(fd, b"%d %04d %s\n" % (who, number, b"x" * (number % 90)))
        os.close(fd)

    children = []
    for who in range(3):
        if (pid := os.fork()) == 0:
            append(who)
            os._exit(0)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    lines = sorted(path.read_bytes().splitlines())
    path.unlink()
    return [statuses, len(lines), lines]


@scenario
def direct_io(root: Path) -> Any:
    seen: list[Any] = []
    memory = mmap.mmap(-1, 1 << 20)
    memory[:] = b"D" * (1 << 20)
    fd = os.open(root / "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    seen.append(os.pwritev(fd, [memory], 0))
    seen.append(os.pwritev(fd, [memoryview(memory)[:4096]], 8192))
    (root / "g").write_bytes(b"buffered" * 1000)
    other = os.open(root / "g", os.O_RDWR | os.O_DIRECT)
    seen.append(os.preadv(other, [memory], 4096))
    seen.append(bytes(memory[:3904]))
    seen.append(os.preadv(other, [memory], 1 << 20))
    os.close(other)
    os.close(fd)
    seen.append((root / "f").read_bytes() == b"D" * (1 << 20))
    memory.close()
    return seen


@scenario
def mapped_files(root: Path) -> Any:
    seen: list[Any] = []
    path = root / "f"
    path.write_bytes(b"." * 20_000)
    with path.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), 0)
        private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        shared[5000:5003] = b"abc"
        private[0:3] = b"xyz"
        shared.flush()
        seen.append((path.read_bytes(), private[:10], private[4998:5005]))
        os.pwrite(file.fileno(), b"WRITTEN", 10_000)
        seen.append(shared[9998:10_010])
        if (pid := os.fork()) == 0:
            shared[15_000:15_005] = b"child"
            shared.flush()
            os._exit(0)
        seen.append(os.waitpid(pid, 0)[1])
        seen.append(shared[14_999:15_006])
        private.close()
        shared.close()
    return [seen, path.read_bytes()]


@scenario
def synchronous_writes(root: Path) -> Any:
    seen: list[Any] = []
    for flag in (os.O_SYNC, os.O_DSYNC):
        fd = os.open(root / "f", os.O_RDWR | os.O_CREAT | flag)
        seen.append(os.pwrite(fd, b"sync" * 3000, 100))
        seen += [attempt(os.fsync, fd), attempt(os.fdatasync, fd), facts(fd)]
        os.close(fd)
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    seen.append(attempt(os.fsync, directory))
    os.close(directory)
    return seen


@scenario
def copying_by_the_kernel(root: Path) -> Any:
    seen: list[Any] = []
    (root / "a").write_bytes(b"copied" * 10_000)
    with (root / "a").open("rb") as source, (root / "b").open("wb") as target:
        done = 0
        while done < 60_000:
            done += os.copy_file_range(source.fileno(), target.fileno(), 60_000 - done)
        seen.append(done)
    with (root / "a").open("rb") as source, (root / "c").open("wb") as target:
        seen.append(os.sendfile(target.fileno(), source.fileno(), 0, 60_000))
    return seen


# ---- attributes


@scenario
def modes_and_owners(root: Path) -> Any:
    seen: list[Any] = []
    path = root / "f"
    path.write_text("data")
    for mode in (0, 0o777, 0o4755, 0o2755, 0o6711, 0o1644):
        os.chmod(path, mode)
        seen.append(facts(path))
    os.chmod(path, 0o6755)
    os.chown(path, *ALICE)
    seen.append(facts(path))
    os.chown(path, -1, 77)
    os.chown(path, 88, -1)
    seen.append(facts(path))
    old = os.umask(0o027)
    (root / "masked").touch(0o666)
    (root / "masked-d").mkdir()
    os.umask(old)
    (root / "d").mkdir()
    os.chmod(root / "d", 0o2775)
    os.chown(root / "d", 5, 6)
    (root / "d" / "inherits").touch()
    (root / "d" / "inherits-d").mkdir()
    seen += [facts(path) for path in sorted(root.rglob("*"))]
    return seen


@scenario
def times(root: Path) -> Any:
    seen: list[Any] = []
    path = root / "f"
    path.write_bytes(b"x" * 5000)
    os.utime(path, ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
    seen.append((os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns))
    with path.open("r+b") as file:
        before = os.stat(path).st_mtime_ns
        os.utime(file.fileno(), ns=(7, 8))
        seen.append(os.fstat(file.fileno()).st_mtime_ns)
        os.fsync(file.fileno())
        seen.append(os.fstat(file.fileno()).st_mtime_ns)
        time.sleep(0.02)
        file.write(b"y")
        file.flush()
        seen.append(os.stat(path).st_mtime_ns > before)
        changed = os.stat(path)
        time.sleep(0.02)
        os.fchmod(file.fileno(), 0o600)
        seen.append((os.stat(path).st_mtime_ns == changed.st_mtime_ns, os.stat(path).st_ctime_ns > changed.st_ctime_ns))
        changed = os.stat(path)
        time.sleep(0.02)
        os.link(path, root / "g")
        seen.append(os.stat(path).st_ctime_ns > changed.st_ctime_ns)
        changed = os.stat(path)
        time.sleep(0.02)
        os.rename(root / "g", root / "h")
        seen.append(os.stat(path).st_ctime_ns > changed.st_ctime_ns)
        changed = os.stat(path)
        time.sleep(0.02)
        os.ftruncate(file.fileno(), 10)
        seen.append((os.stat(path).st_mtime_ns > changed.st_mtime_ns, os.stat(path).st_ctime_ns > changed.st_ctime_ns))
        os.utime(path)
        seen.append(abs(os.stat(path).st_mtime - time.time()) < 5)
    (root / "d").mkdir()
    changed = os.stat(root / "d")
    time.sleep(0.02)
    (root / "d" / "x").touch()
    seen.append(os.stat(root / "d").st_mtime_ns > changed.st_mtime_ns)
    os.utime(root / "d", ns=(3, 4))
    seen.append((os.stat(root / "d").st_atime_ns, os.stat(root / "d").st_mtime_ns))
    seen.append(attempt(os.utime, path, (-1, -5)))
    seen.append(os.stat(path).st_mtime_ns)
    return seen


@scenario
def times_of_access(root: Path) -> Any:
    """By reads that are past the kernel's page cache: others are not seen."""
    path = root / "f"
    path.write_bytes(b"x" * 8192)
    memory = mmap.mmap(-1, 4096)
    moved = []

    def moves(act: Callable[[], object]) -> bool:
        before = path.stat()
        time.sleep(0.03)
        act()
        after = path.stat()
        assert (after.st_mtime_ns, after.st_ctime_ns) >= (before.st_mtime_ns, before.st_ctime_ns)
        return after.st_atime_ns > before.st_atime_ns

    def read(flags: int = 0) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | flags)
        try:
            os.preadv(fd, [memory], 0)
        finally:
            os.close(fd)

    def write() -> None:
        with path.open("r+b") as file:
            file.write(b"y")

    for act in (write, lambda: read(os.O_NOATIME), read, read, write, read, read):
        moved.append(moves(act))  # type: ignore[operator]
    old = path.stat()
    os.utime(path, ns=(10**9, old.st_mtime_ns))
    moved += [path.stat().st_atime_ns, moves(read), moves(read)]
    os.utime(path, ns=(time.time_ns() - 25 * 3600 * 10**9, 10**9))
    moved += [moves(read), moves(read), path.stat().st_mtime_ns]
    memory.close()
    return moved


@scenario
def blocks_and_numbers(root: Path) -> Any:
    (root / "f").write_bytes(b"x" * 100_000)
    first = os.stat(root / "f")
    os.rename(root / "f", root / "g")
    with (root / "g").open("rb") as file:
        second = os.fstat(file.fileno())
    names = {entry.name: entry.inode() for entry in os.scandir(root)}
    return [
        first.st_ino == second.st_ino == names["g"],
        first.st_blocks * 512 >= 100_000,
        first.st_blksize,
        os.stat(root).st_dev == first.st_dev,
    ]


@scenario
def extended_attributes(root: Path) -> Any:
    seen: list[Any] = []
    path = root / "f"
    path.touch()
    seen.append(attempt(os.setxattr, path, "user.a", b"1"))
    seen.append(attempt(os.setxattr, path, "user.a", b"2", os.XATTR_CREATE))
    seen.append(attempt(os.setxattr, path, "user.b", b"2", os.XATTR_REPLACE))
    seen.append(attempt(os.setxattr, path, "user.b", b"\0bin\xff" * 100, os.XATTR_CREATE))
    seen.append(attempt(os.setxattr, path, "user.empty", b""))
    seen.append(attempt(os.setxattr, path, "user.a", b"3", os.XATTR_REPLACE))
    seen.append({name: os.getxattr(path, name) for name in sorted(os.listxattr(path))})
    seen.append(attempt(os.getxattr, path, "user.none"))
    seen.append(attempt(os.removexattr, path, "user.none"))
    seen.append(attempt(os.removexattr, path, "user.a"))
    seen.append(sorted(os.listxattr(path)))
    seen.append(attempt(os.setxattr, path, "trusted.t", b"root's"))
    seen.append(attempt(os.getxattr, path, "trusted.t"))
    seen.append(attempt(os.setxattr, path, "nonsense.x", b""))
    seen.append(attempt(os.setxattr, path, "user.big", b"x" * 60_000))
    seen.append(attempt(os.setxattr, path, "user." + "n" * 251, b""))
    os.symlink("f", root / "s")
    seen.append(attempt(os.setxattr, root / "s", "user.a", b"", follow_symlinks=False))
    seen.append(attempt(os.setxattr, root, "user.dir", b"d"))
    seen.append(attempt(os.getxattr, root, "user.dir"))
    return seen


@scenario
def privileges_go_when_a_file_is_changed(root: Path) -> Any:
    seen: list[Any] = []
    for number, change in enumerate(("write", "truncate", "chown", "append", "open-truncate")):
        path = root / f"f{number}"
        path.write_bytes(b"x" * 5000)
        os.chown(path, *ALICE)
        os.chmod(path, 0o6777)
        capability = bytes.fromhex("0100000200200000000000000000000000000000")
        os.setxattr(path, "security.capability", capability)

        def act(path: Path = path, change: str = change) -> Any:
            if change == "write":
                fd = os.open(path, os.O_WRONLY)
                os.write(fd, b"y")
                os.close(fd)
            elif change == "append":
                with path.open("ab") as file:
                    file.write(b"y")
            elif change == "truncate":
                os.truncate(path, 10)
            elif change == "open-truncate":
                os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
            else:
                os.chown(path, -1, ALICE[1])

        seen.append(attempt(as_user, *(ALICE if change == "chown" else BOB), [], act))
        seen += [facts(path), attempt(os.getxattr, path, "security.capability")]
    return seen


# ---- users


def probe(root: Path) -> list[Any]:
    """What somebody may do in a directory."""
    seen: list[Any] = []
    for name in ("open", "mine", "group", "closed"):
        path = root / name
        seen.append((name, attempt(lambda path=path: path.read_bytes())))
        seen.append(attempt(os.close, attempt(os.open, path, os.O_WRONLY)) if os.access(path, os.W_OK) else "no")
        seen.append([os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)])
        seen.append(attempt(os.chmod, path, 0o666) if name == "closed" else None)
    seen.append(attempt(os.listdir, root / "private"))
    seen.append(facts(root / "private" / "x"))
    seen.append(attempt((root / "private" / "new").touch))
    seen.append(attempt(os.unlink, root / "sticky" / "roots"))
    seen.append(attempt(os.rename, root / "sticky" / "roots", root / "sticky" / "x"))
    who = f"{os.getuid()}-{os.getgroups()}"
    seen.append(attempt((root / "sticky" / who).touch))
    seen.append(facts(root / "sticky" / who))
    seen.append(attempt((root / "shared" / who).touch))
    seen.append(attempt(os.mkdir, root / "shared" / f"{who}-d"))
    seen += [facts(root / "shared" / who), facts(root / "shared" / f"{who}-d")]
    seen.append(attempt(os.chown, root / "sticky" / who, 0, -1))
    seen.append(attempt(os.chown, root / "sticky" / who, -1, STAFF))
    seen.append(attempt(os.mknod, root / "sticky" / f"{who}-null", stat.S_IFCHR, os.makedev(1, 3)))
    seen.append(attempt(os.chmod, root / "shared" / who, 0o2777))
    seen.append(facts(root / "shared" / who))
    return seen


@scenario
def several_users(root: Path) -> Any:
    for name, owner, mode in (
        ("open", (0, 0), 0o666),
        ("mine", ALICE, 0o600),
        ("group", (0, STAFF), 0o660),
        ("closed", (0, 0), 0o600),
    ):
        (root / name).write_text(name)
        os.chown(root / name, *owner)
        os.chmod(root / name, mode)
    for name, owner, mode in (
        ("private", ALICE, 0o700),
        ("sticky", (0, 0), 0o1777),
        ("shared", (0, STAFF), 0o2775),
    ):
        (root / name).mkdir()
        os.chown(root / name, *owner)
        os.chmod(root / name, mode)
    (root / "private" / "x").touch()
    (root / "sticky" / "roots").touch()
    return [as_user(*who, groups, probe, root) for who, groups in ((ALICE, []), (BOB, []), (BOB, [STAFF]))]


@scenario
def access_control_lists(root: Path) -> Any:
    seen: list[Any] = []

    def acl(*words: Any) -> None:
        done = subprocess.run(["setfacl", *words], capture_output=True, text=True, check=False)
        seen.append(done.returncode)

    def show(path: Path) -> None:
        command = ["getfacl", "--omit-header", "--numeric", "--absolute-names", path]
        seen.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    path = root / "f"
    path.write_text("secret")
    path.chmod(0o600)
    os.chown(path, *ALICE)
    seen.append(as_user(*BOB, [], attempt, path.read_text))
    acl("-m", f"u:{BOB[0]}:r", path)
    show(path)
    seen.append(facts(path))
    seen.append(as_user(*BOB, [], attempt, path.read_text))
    seen.append(as_user(*BOB, [], attempt, path.write_text, "x"))
    acl("-m", f"u:{BOB[0]}:rw,g:{STAFF}:r", path)
    seen.append(as_user(*BOB, [], attempt, path.write_text, "bob's"))
    os.chmod(path, 0o640)
    show(path)
    seen.append(as_user(*BOB, [], attempt, path.write_text, "x"))
    acl("-b", path)
    show(path)
    (root / "d").mkdir()
    acl("-d", "-m", f"u:{BOB[0]}:rwx,g::r-x,o::---", root / "d")
    show(root / "d")
    (root / "d" / "file").touch(0o666)
    (root / "d" / "dir").mkdir()
    show(root / "d" / "file")
    show(root / "d" / "dir")
    seen += [facts(root / "d" / "file"), facts(root / "d" / "dir")]
    os.chmod(root / "d" / "file", 0o2755)
    os.chown(root / "d" / "file", BOB[0], STAFF)
    seen.append(as_user(*BOB, [], attempt, subprocess.call, ["setfacl", "-m", "u:7:r", root / "d" / "file"]))
    seen.append(facts(root / "d" / "file"))
    return seen


# ---- locks, space


@scenario
def locks(root: Path) -> Any:
    seen: list[Any] = []
    path = root / "f"
    path.write_bytes(b"0123456789")

    def try_locks() -> list[Any]:
        with path.open("r+b") as file:
            return [
                attempt(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB),
                attempt(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB, 3, 0),
                attempt(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB, 3, 5),
            ]

    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX, 4, 0)
        seen.append(as_user(0, 0, [], try_locks))
    seen.append(as_user(0, 0, [], try_locks))
    return seen


@scenario
def file_system_figures(root: Path) -> Any:
    figures = os.statvfs(root)
    return [figures.f_bsize, figures.f_frsize, figures.f_blocks, figures.f_files, figures.f_namemax]


# ---- directories


@scenario
def listings_are_complete(root: Path) -> Any:
    for number in range(1000):
        (root / f"name-{number:04}-{'x' * (number % 200)}").touch()
    first = sorted(os.listdir(root))
    seen = [first, first == sorted(set(first))]
    with os.scandir(root) as entries:
        for index, entry in enumerate(entries):
            if index % 3 == 0:
                os.unlink(entry.path)
            if index % 100 == 50:
                (root / f"added-{index}").touch()
    seen.append(len(os.listdir(root)))
    shutil.rmtree(root)
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    return [seen[:2]]


@scenario
def listings_from_random_positions(root: Path) -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    libc.readdir.argtypes = libc.telldir.argtypes = libc.closedir.argtypes = (ctypes.c_void_p,)
    libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
    for number in range(300):
        (root / f"name-{number}").touch()
    directory = libc.opendir(os.fsencode(root))

    def name() -> bytes:
        entry = libc.readdir(directory)
        return ctypes.string_at(entry + 19) if entry else b""

    try:
        places: list[tuple[int, bytes]] = []
        while True:
            place, found = libc.telldir(directory), name()
            if not found:
                break
            places.append((place, found))
        same = True
        for place, found in [*places[::-7], *places[::5]]:
            libc.seekdir(directory, place)
            same &= name() == found
        libc.seekdir(directory, places[40][0])
        rest = [name() for _ in places[40:]]
        return [len(places), same, rest == [found for _, found in places[40:]], name()]
    finally:
        libc.closedir(directory)


@scenario
def trees_are_copied_and_removed(root: Path) -> Any:
    source = Path(os.__file__).parent / "json"
    subprocess.run(["cp", "-a", source, root / "copy"], check=True)
    with contextlib.chdir(root):
        subprocess.run(["tar", "cf", "archive.tar", "copy"], check=True)
        subprocess.run(["rm", "-r", "copy"], check=True)
        subprocess.run(["tar", "xf", "archive.tar"], check=True)
        os.unlink("archive.tar")
    return subprocess.run(["diff", "-r", source, root / "copy"], check=False).returncode


@pytest.mark.parametrize("function", SCENARIOS, ids=lambda function: function.__name__)
def test_the_mount_answers_as_ext4_does(sides: tuple[Daemon, Path], function: Scenario) -> None:
    if function is writing_where_no_file_can_end and "writeback_cache" in sides[0].options:
        return  # the kernel hears of it when it hands the write over, see t4_writeback_cache.py
    ours, theirs = both(sides, function)
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]


def test_what_was_seen_on_the_mount_is_in_the_backing(sides: tuple[Daemon, Path]) -> None:
    daemon, _ = sides
    (daemon.path / "last").write_bytes(b"word")
    seen = tree(daemon.path)
    daemon.flush()
    assert tree(daemon.backing) == seen
    daemon.remount()
    assert tree(daemon.path) == seen
    assert "a bug" not in daemon.log()


def test_a_directory_of_100_000_entries(make_daemon: MakeDaemon) -> None:
    names = {f"{number:06}" for number in range(100_000)}
    with contextlib.ExitStack() as undo:
        memory = Path(undo.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        ext4 = undo.enter_context(loop_mounted("ext4", memory, size_mib=512, options=("-N", "120000")))
        (ext4 / "many").mkdir()
        for name in names:
            os.mknod(ext4 / "many" / name)
        daemon = make_daemon(ext4)
        undo.callback(daemon.destroy)
        os.chdir(daemon.path / "many")
        undo.callback(os.chdir, ROOT)
        listed = os.listdir(".")
        assert len(listed) == len(names)
        assert set(listed) == names
        added = {f"new-{number}" for number in range(1000)}
        for name in added:
            os.mknod(name)
        removed = set(sorted(names)[::100])
        for name in removed:
            os.unlink(name)
        done = subprocess.run(["ls", "-lU"], capture_output=True, text=True, check=True).stdout
        assert {line.split()[-1] for line in done.splitlines()[1:]} == names - removed | added


def test_a_damaged_inode_costs_only_itself(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    image, below = tmp_path / "image", tmp_path / "below"
    below.mkdir()
    subprocess.run(["mkfs.ext4", "-q", image, "64M"], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, below], check=True)
    for name in ("good", "bad", "fine"):
        (below / name).write_text(name)
    subprocess.run(["umount", below], check=True)
    subprocess.run(["debugfs", "-w", "-R", "clri bad", image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop,errors=continue", image, below], check=True)
    try:
        daemon = make_daemon(below)
        for _ in range(3):
            assert set(os.listdir(daemon.path)) >= {"good", "bad", "fine"}
            with pytest.raises(OSError):  # noqa: PT011  (EUCLEAN, EIO or ESTALE, as the kernel has it)
                os.stat(daemon.path / "bad")
            assert (daemon.path / "good").read_text() == "good"
        daemon.unmount()
        daemon.destroy()
    finally:
        subprocess.run(["umount", "--lazy", below], check=True)


def test_times_of_access_reach_the_backing(make_daemon: MakeDaemon) -> None:
    """When the kernel forgets a file, without a change of its other times, and at the end."""
    daemon = make_daemon()
    names = [f"{number}" for number in range(20)]
    for name in names:
        (daemon.backing / name).write_text(name)
        os.utime(daemon.backing / name, ns=(10**9, 2 * 10**9))
    before = {name: (daemon.backing / name).stat() for name in names}
    for name in names:
        assert (daemon.path / name).read_text() == name
    seen = {name: (daemon.path / name).stat().st_atime_ns for name in names}
    assert min(seen.values()) > max(status.st_ctime_ns for status in before.values())
    drop_caches()
    wait_until(lambda: (daemon.backing / "0").stat().st_atime_ns > 10**9, "an atime that is handed on")
    daemon.unmount()
    for name in names:
        status = (daemon.backing / name).stat()
        assert status.st_atime_ns >= seen[name]
        assert (status.st_mtime_ns, status.st_ctime_ns) == (before[name].st_mtime_ns, before[name].st_ctime_ns)
