"""Random operations on the mount and on plain ext4, with kills, remounts and flushes in between: no difference.

``HYPOTHESIS_PROFILE=dev`` and ``CACHEFSD_EXAMPLES=1000`` look further, from another start every time.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from support_daemon import Daemon, daemons, public_directory
from support_fs import drop_caches, loop_mounted
from support_posix import attempt, facts, tree
from support_strategies import NAME_MAX, TIMES, sizes

from cachefsd.backing import syscalls

EXAMPLES = int(os.environ.get("CACHEFSD_EXAMPLES", "") or 15)
BLOCK = 4096
MOST_RESTARTS = 2
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

ODD = os.fsdecode(b"\xff\xe4" + b"n" * (NAME_MAX - 2))  # no UTF-8, and as long as a name can be
names = st.sampled_from(["a", "b", "c", "d", "d/a", "d/b", "e", "e/a", ODD])
slots = st.sampled_from([0, 1, 2])
offsets = sizes(BLOCK, 50 * BLOCK) | st.sampled_from([10, 3 * BLOCK, 16 * BLOCK - 5])
lengths = st.one_of(st.sampled_from([1, 100, BLOCK, BLOCK + 1, 5 * BLOCK, 10 * BLOCK]), st.integers(1, 12 * BLOCK))
blocks = st.integers(0, 40)
flags = st.sampled_from([0, os.O_APPEND, os.O_TRUNC, os.O_EXCL | os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_TRUNC])


def pattern(number: int, length: int) -> bytes:
    """Bytes that tell where they belong; ``number`` is never used again."""
    return b"".join(b"%6d:%8d;" % (number, at) for at in range(0, length, 16))[:length]


def aligned(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


class Machine(RuleBasedStateMachine):
    """Two directories, the same is done to both. Descriptors are held open in pairs."""

    numbers = itertools.count()

    def __init__(self, daemon: Daemon, plain: Path) -> None:
        super().__init__()
        if not daemon.pid:  # an example has failed while it was down
            daemon.mount()
        name = f"example-{next(self.numbers)}"
        self.daemon = daemon
        self.roots = (daemon.path / name, plain / name)
        for root in self.roots:
            root.mkdir()
        self.beneath = daemon.backing / name
        self.held: dict[int, tuple[int, int]] = {}
        self.restarts = 0
        self.steps = 0
        self.writes = 0

    def same(self, call: Callable[[Path], Any]) -> Any:
        """Do it to both; what came of it must be the same."""
        self.steps += 1
        mount, plain = (attempt(call, root) for root in self.roots)
        assert mount == plain
        return mount

    def same_held(self, slot: int, call: Callable[[int], Any]) -> None:
        self.steps += 1
        mount, plain = (attempt(call, fd) for fd in self.held[slot])
        assert mount == plain

    def data(self, length: int) -> bytes:
        self.writes += 1
        return pattern(self.writes, length)

    # ---- data by name

    @rule(name=names, offset=offsets, length=lengths, extra=flags)
    def write(self, name: str, offset: int, length: int, extra: int) -> None:
        data = self.data(length)

        def write(root: Path) -> Any:
            fd = os.open(root / name, os.O_WRONLY | os.O_CREAT | extra, 0o640)
            try:
                return os.pwrite(fd, data, offset), facts(fd)
            finally:
                os.close(fd)

        self.same(write)

    @rule(name=names, block=blocks, count=st.integers(1, 9))
    def write_direct(self, name: str, block: int, count: int) -> None:
        memory = aligned(self.data(count * BLOCK))

        def write(root: Path) -> Any:
            fd = os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
            try:
                return os.pwritev(fd, [memory], block * BLOCK)
            finally:
                os.close(fd)

        self.same(write)

    @rule(name=names, offset=offsets, length=lengths)
    def write_mapped(self, name: str, offset: int, length: int) -> None:
        data = self.data(length)

        def write(root: Path) -> Any:
            fd = os.open(root / name, os.O_RDWR)
            try:
                end = min(os.fstat(fd).st_size, offset + length)
                if end <= offset:
                    return None
                with mmap.mmap(fd, end) as memory:
                    memory[offset:end] = data[: end - offset]
                    memory.flush()
                return end
            finally:
                os.close(fd)

        self.same(write)

    @rule(name=names, block=blocks)
    def read_direct(self, name: str, block: int) -> None:
        def read(root: Path) -> Any:
            fd = os.open(root / name, os.O_RDONLY | os.O_DIRECT)
            try:
                memory = mmap.mmap(-1, 4 * BLOCK)
                return os.preadv(fd, [memory], block * BLOCK), memory[:]
            finally:
                os.close(fd)

        self.same(read)

    @rule(name=names, size=offsets)
    def truncate(self, name: str, size: int) -> None:
        self.same(lambda root: (os.truncate(root / name, size), facts(root / name)))

    @rule(name=names, atime_ns=TIMES, mtime_ns=TIMES)
    def set_times(self, name: str, atime_ns: int, mtime_ns: int) -> None:
        def set_times(root: Path) -> Any:
            os.utime(root / name, ns=(atime_ns, mtime_ns))
            return os.stat(root / name).st_mtime_ns, facts(root / name)

        self.same(set_times)

    # ---- descriptors, which may outlive their names

    @rule(slot=slots, name=names, extra=flags)
    def open(self, slot: int, name: str, extra: int) -> None:
        self.close(slot)
        self.steps += 1
        fds = [attempt(os.open, root / name, os.O_RDWR | extra, 0o644) for root in self.roots]
        if all(isinstance(fd, int) for fd in fds):
            self.held[slot] = fds[0], fds[1]
        else:
            assert fds[0] == fds[1]

    @precondition(lambda self: self.held)
    @rule(slot=slots)
    def close(self, slot: int) -> None:
        for fd in self.held.pop(slot, ()):
            os.close(fd)

    @precondition(lambda self: self.held)
    @rule(pick=slots, offset=offsets, length=lengths)
    def write_held(self, pick: int, offset: int, length: int) -> None:
        data = self.data(length)
        self.same_held(self.pick(pick), lambda fd: (os.pwrite(fd, data, offset), facts(fd)))

    @precondition(lambda self: self.held)
    @rule(pick=slots, offset=offsets)
    def read_held(self, pick: int, offset: int) -> None:
        self.same_held(self.pick(pick), lambda fd: (os.pread(fd, 10 * BLOCK, offset), facts(fd)))

    @precondition(lambda self: self.held)
    @rule(pick=slots, size=offsets, sync=st.booleans())
    def truncate_held(self, pick: int, size: int, sync: bool) -> None:
        self.same_held(self.pick(pick), lambda fd: (os.ftruncate(fd, size), sync and os.fsync(fd), facts(fd)))

    def pick(self, number: int) -> int:
        return sorted(self.held)[number % len(self.held)]

    # ---- names and attributes

    @rule(name=names, new=names, how=st.sampled_from([0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]))
    def rename(self, name: str, new: str, how: int) -> None:
        def rename(root: Path) -> Any:
            fd = os.open(root, os.O_PATH)
            try:
                return syscalls.renameat2(fd, os.fsencode(name), fd, os.fsencode(new), how)
            finally:
                os.close(fd)

        self.same(rename)

    @rule(name=names)
    def unlink(self, name: str) -> None:
        self.same(lambda root: os.unlink(root / name))

    @rule(name=names, new=names)
    def link(self, name: str, new: str) -> None:
        self.same(lambda root: os.link(root / name, root / new))

    @rule(name=st.sampled_from(["d", "e", "c"]))
    def mkdir(self, name: str) -> None:
        self.same(lambda root: os.mkdir(root / name))

    @rule(name=st.sampled_from(["d", "e", "c"]))
    def rmdir(self, name: str) -> None:
        self.same(lambda root: os.rmdir(root / name))

    @rule(name=names, mode=st.sampled_from([0o600, 0o644, 0o755, 0o4711]), uid=st.sampled_from([0, 1234]))
    def change_attributes(self, name: str, mode: int, uid: int) -> None:
        self.same(lambda root: (os.chown(root / name, uid, -1), os.chmod(root / name, mode), facts(root / name)))

    @rule(name=names, seconds=st.integers(0, 2**31))
    def utime(self, name: str, seconds: int) -> None:
        times = (seconds * 10**9 + 123_456_789, seconds * 10**9 + 987_654_321)

        def utime(root: Path) -> Any:
            os.utime(root / name, ns=times)
            return os.stat(root / name).st_mtime_ns

        self.same(utime)

    # ---- what must not make a difference

    @rule(name=names)
    def fsync(self, name: str) -> None:
        def sync(root: Path) -> None:
            fd = os.open(root / name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        self.same(sync)

    @rule()
    def forget(self) -> None:
        """Make the kernel forget pages, names and inodes; and look at all of it."""
        drop_caches()
        self.compare()

    @precondition(lambda self: self.restarts < MOST_RESTARTS and self.steps > 8 * (self.restarts + 1))
    @rule(how=st.sampled_from(["kill", "kill", "remount", "flush", "flush and kill"]))
    def restart(self, how: str) -> None:
        self.restarts += 1
        if "flush" in how:
            self.daemon.flush()
            self.compare_beneath()
        if how != "flush":
            for slot in list(self.held):
                self.close(slot)
            before = self.times(self.roots[0])
            self.daemon.remount() if how == "remount" else self.daemon.kill_and_mount()
            assert self.times(self.roots[0]) == before
        self.compare()

    # ---- the end

    @staticmethod
    def times(root: Path) -> dict[str, int]:
        return {os.fspath(path.relative_to(root)): path.lstat().st_mtime_ns for path in root.rglob("*")}

    def compare(self) -> None:
        assert tree(self.roots[0]) == tree(self.roots[1])

    def compare_beneath(self) -> None:
        assert tree(self.beneath) == tree(self.roots[1])
        assert self.times(self.beneath) == self.times(self.roots[0])

    def teardown(self) -> None:
        try:
            self.compare()
            self.daemon.flush()
            self.compare_beneath()
        finally:
            for slot in list(self.held):
                self.close(slot)


CACHES: list[dict[str, Any]] = [
    {"size": "64M", "options": ("dirty_age=3600",)},
    {"size": "2304K", "options": ("dirty_age=0.05,full_timeout=600",)},
    {"size": "2304K", "disk": True, "options": ("dirty_age=0.2,full_timeout=600",)},
]


@pytest.fixture(params=CACHES, ids=["ample", "tiny", "tiny on disk"])
def sides(request: pytest.FixtureRequest) -> Iterator[tuple[Daemon, Path]]:
    """A daemon over a directory of an ext4, and another directory there."""
    with public_directory() as base, loop_mounted("ext4", base) as ext4, daemons(base) as make:
        (ext4 / "beneath").mkdir()
        (ext4 / "plain").mkdir()
        yield make(ext4 / "beneath", **request.param), ext4 / "plain"


@pytest.mark.timeout(1800)
def test_random_operations(sides: tuple[Daemon, Path]) -> None:
    run_state_machine_as_test(
        lambda: Machine(*sides),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
            deadline=None,
            # Nothing is kept between runs: what failed becomes a test of its own. Shrinking takes minutes here.
            database=None,
            phases=[Phase.generate] if os.environ.get("CI") else [Phase.generate, Phase.shrink],
        ),
    )
