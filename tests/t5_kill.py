"""kill -9 of the daemon at any moment: the next mount has every acknowledged write.

Writers are processes that note in shared memory what they are about to do and what was acknowledged.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support_daemon import PATIENCE_S, ROOT, Daemon, MakeDaemon, make_daemon, wait_until

from cachefsd.fuse import mounts

__all__ = ["make_daemon"]

BLOCK = 4096
BLOCKS = 1024
WRITERS = 3
ROUNDS = 3
STAMP = struct.Struct("<IIQ")  # block, version, a mix of both: no torn block looks whole


class Ledger:
    """Numbers shared by processes: for each thing that is written, the version tried and the one acknowledged."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, 16 * size)
        words = memoryview(self._memory).cast("Q")
        self.tried, self.acknowledged = words[:size], words[size:]

    def progress(self) -> int:
        return sum(self.acknowledged)


def image(block: int, version: int, size: int = BLOCK) -> bytes:
    if not version:
        return bytes(size)
    return (STAMP.pack(block, version, block * 0x9E3779B97F4A7C15 + version & (1 << 64) - 1) * (size // 16 + 1))[:size]


def write_whole(fd: int, data: bytes) -> None:
    """``os.write`` until all is written: the kernel splits writes, and of one that a crash meets half may be done."""
    while data:
        data = data[os.write(fd, data) :]


def is_of_the_crash(error: OSError, mountpoint: Path) -> bool:
    """Whether this is what the kernel answers when it finds the daemon dead, or dying.

    EIO is when the daemon is killed while the kernel copies a request to or from its memory (fs/fuse/dev.c).
    """
    if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
        return True
    if error.errno == errno.EIO:
        deadline = time.monotonic() + PATIENCE_S  # a thread of it may be in the middle of a sync of the backing
        while time.monotonic() < deadline:
            time.sleep(0.01)
            with contextlib.suppress(FileNotFoundError):
                try:
                    (mountpoint / "no such file").lstat()
                except OSError as later:
                    if later.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                        return True
    return False


@contextmanager
def writing(mountpoint: Path, *writers: Callable[[], None]) -> Iterator[None]:
    """Processes that write until the daemon is dead, or the block ends."""
    children = []
    with tempfile.TemporaryFile("w+") as failures:
        for writer in writers:
            if (pid := os.fork()) == 0:
                try:
                    while True:
                        writer()
                except OSError as error:
                    if is_of_the_crash(error, mountpoint):
                        os._exit(0)
                    traceback.print_exc(file=failures)
                except BaseException:
                    traceback.print_exc(file=failures)
                finally:
                    failures.flush()
                    os._exit(1)
            children.append(pid)
        try:
            yield
        finally:
            time.sleep(0.05)
            statuses = []
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                statuses.append(os.waitpid(pid, 0)[1])
            failures.seek(0)
            assert set(statuses) <= {0, signal.SIGKILL}, failures.read()


def crash(daemon: Daemon, ledger: Ledger, rng: random.Random, *writers: Callable[[], None]) -> None:
    """Let writers write for a while, kill the daemon, and mount again."""
    before = ledger.progress()
    with writing(daemon.path, *writers):
        wait_until(lambda: ledger.progress() > before + 20, "writing")
        time.sleep(rng.uniform(0, 0.7))
        daemon.kill()
    daemon.mount()
    assert not daemon.status()["recovery"]["clean"]


# ---- overwriting


def overwriter(path: Path, ledger: Ledger, number: int, seed: float, *, direct: bool) -> Callable[[], None]:
    """Overwrites random blocks that belong to this writer, some of them partly, some several at once."""
    own = random.Random(seed)
    memory = mmap.mmap(-1, 8 * BLOCK)

    def write() -> None:
        fd = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
        while True:
            first = own.randrange(number, BLOCKS - 8 * WRITERS, WRITERS)
            count = own.choice([1, 1, 1, 4])
            for index in range(count):
                block = first + index * WRITERS
                version = ledger.acknowledged[block] + 1
                ledger.tried[block] = version
                memory[:BLOCK] = image(block, version)
                assert os.pwritev(fd, [memoryview(memory)[:BLOCK]], block * BLOCK) == BLOCK
                ledger.acknowledged[block] = version

    return write


def check_blocks(path: Path, ledger: Ledger) -> None:
    data = path.read_bytes().ljust(BLOCKS * BLOCK, b"\0")
    for block in range(BLOCKS):
        found = data[block * BLOCK : (block + 1) * BLOCK]
        allowed = range(ledger.acknowledged[block], ledger.tried[block] + 1)
        versions = [version for version in allowed if found == image(block, version)]
        assert versions, f"block {block} is none of versions {allowed}"
        ledger.tried[block] = ledger.acknowledged[block] = versions[0]


@pytest.mark.parametrize(
    ("size", "options", "disk"),
    [
        ("64M", ("dirty_age=3600",), False),
        ("64M", ("dirty_age=0",), False),
        ("4M", ("full_timeout=600",), False),
        ("16M", ("dirty_age=0.1,full_timeout=600",), True),
    ],
    ids=["all stays dirty", "written back at once", "small cache", "class disk"],
)
def test_overwrites(
    make_daemon: MakeDaemon, rng: random.Random, size: str, options: tuple[str, ...], disk: bool
) -> None:
    daemon = make_daemon(size=size, options=options, disk=disk)
    ledger = Ledger(BLOCKS)
    path = daemon.path / "file"
    path.touch()
    for _ in range(ROUNDS):
        writers = [overwriter(path, ledger, n, rng.random(), direct=n != 0) for n in range(WRITERS)]
        crash(daemon, ledger, rng, *writers)
        check_blocks(path, ledger)
    daemon.unmount("--flush")
    check_blocks(daemon.backing / "file", ledger)


# ---- appending, truncating


def test_appends_and_their_sizes(make_daemon: MakeDaemon, rng: random.Random) -> None:
    daemon = make_daemon(options=("dirty_age=0.2",))
    ledger = Ledger(WRITERS)

    def appender(number: int) -> Callable[[], None]:
        own = random.Random(rng.random())

        def append() -> None:
            fd = os.open(daemon.path / f"log-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            while True:
                size = own.randrange(1, 9000)
                at = ledger.acknowledged[number]
                ledger.tried[number] = at + size
                data = bytes((at + index) * 7 % 251 for index in range(size))
                write_whole(fd, data)
                ledger.acknowledged[number] = at + size

        return append

    def check(directory: Path) -> None:
        for number in range(WRITERS):
            data = (directory / f"log-{number}").read_bytes()
            assert ledger.acknowledged[number] <= len(data) <= ledger.tried[number]
            assert data == bytes(index * 7 % 251 for index in range(len(data)))
            ledger.acknowledged[number] = ledger.tried[number] = len(data)

    for _ in range(ROUNDS):
        crash(daemon, ledger, rng, *(appender(number) for number in range(WRITERS)))
        check(daemon.path)
    daemon.unmount("--flush")
    check(daemon.backing)


def test_what_was_cut_off_never_comes_back(make_daemon: MakeDaemon, rng: random.Random) -> None:
    """Version n of the file is n % 50 + 1 KiB of bytes n, made by a truncate to nothing and a write."""
    daemon = make_daemon(options=("dirty_age=0.1",))
    ledger = Ledger(1)
    path = daemon.path / "file"

    def content(version: int) -> bytes:
        return bytes([version % 256]) * ((version % 50 + 1) * 1024)

    path.write_bytes(content(0))

    def rewrite() -> None:
        while True:
            version = ledger.acknowledged[0] + 1
            ledger.tried[0] = version
            how = os.O_TRUNC if version % 2 else 0
            fd = os.open(path, os.O_WRONLY | how)
            if not how:
                os.ftruncate(fd, 0)
            write_whole(fd, content(version))
            os.close(fd)
            ledger.acknowledged[0] = version

    def check(where: Path) -> None:
        data = where.read_bytes()
        acknowledged, tried = ledger.acknowledged[0], ledger.tried[0]
        cut_off = tried > acknowledged and content(tried).startswith(data)
        assert cut_off or data == content(acknowledged), (data[:1], len(data), acknowledged, tried)

    for _ in range(ROUNDS + 2):
        crash(daemon, ledger, rng, rewrite)
        check(path)
        rewritten = ledger.acknowledged[0] = ledger.tried[0] = ledger.tried[0] + 1
        path.write_bytes(content(rewritten))
    daemon.unmount("--flush")
    check(daemon.backing / "file")


# ---- names


def test_files_replaced_by_rename_are_whole(make_daemon: MakeDaemon, rng: random.Random) -> None:
    daemon = make_daemon(options=("dirty_age=0.1",))
    ledger = Ledger(WRITERS)

    def content(number: int, version: int) -> bytes:
        return b"%d %d\n" % (number, version) * (version % 700 + 1)

    def replacer(number: int) -> Callable[[], None]:
        def replace() -> None:
            while True:
                version = ledger.acknowledged[number] + 1
                ledger.tried[number] = version
                new = daemon.path / f"new-{number}"
                new.write_bytes(content(number, version))
                os.rename(new, daemon.path / f"file-{number}")
                ledger.acknowledged[number] = version

        return replace

    def check(directory: Path) -> None:
        for number in range(WRITERS):
            data = (directory / f"file-{number}").read_bytes()
            allowed = range(ledger.acknowledged[number], ledger.tried[number] + 1)
            versions = [version for version in allowed if data == content(number, version)]
            assert versions, (data[:20], allowed)
            ledger.tried[number] = ledger.acknowledged[number] = versions[0]

    for _ in range(ROUNDS):
        crash(daemon, ledger, rng, *(replacer(number) for number in range(WRITERS)))
        check(daemon.path)
    daemon.unmount("--flush")
    check(daemon.backing)
    assert {path.name for path in daemon.backing.iterdir()} <= {
        f"{kind}-{number}" for kind in ("new", "file") for number in range(WRITERS)
    }


def test_removed_files_stay_removed_and_others_stay(make_daemon: MakeDaemon, rng: random.Random) -> None:
    daemon = make_daemon(options=("dirty_age=0.1",))
    ledger = Ledger(2)  # [0] created up to, [1] removed up to

    def come_and_go() -> None:
        number = ledger.acknowledged[0]
        while True:
            ledger.tried[0] = number + 1
            (daemon.path / f"{number}").write_bytes(image(number, 1, 3000 + number % 3000))
            os.link(daemon.path / f"{number}", daemon.path / f"{number}-linked")
            number += 1
            ledger.acknowledged[0] = number
            while (oldest := ledger.acknowledged[1]) < number - 10:
                ledger.tried[1] = oldest + 1
                os.unlink(daemon.path / f"{oldest}")
                ledger.acknowledged[1] = oldest + 1

    def check(directory: Path) -> None:
        created, removed = ledger.acknowledged[0], ledger.acknowledged[1]
        for number in range(created):
            expected = image(number, 1, 3000 + number % 3000)
            assert (directory / f"{number}-linked").read_bytes() == expected
            if number < removed:
                assert not (directory / f"{number}").exists()
            elif number >= ledger.tried[1]:
                assert (directory / f"{number}").read_bytes() == expected

    for _ in range(ROUNDS):
        crash(daemon, ledger, rng, come_and_go)
        check(daemon.path)
        # What was half done is done again.
        number, oldest = ledger.acknowledged[0], ledger.acknowledged[1]
        for name in (f"{number}", f"{number}-linked", f"{oldest}"):
            (daemon.path / name).unlink(missing_ok=True)
        ledger.acknowledged[1] = ledger.tried[1] = oldest + 1
    daemon.unmount("--flush")
    check(daemon.backing)


def test_times_survive(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    written, touched = daemon.path / "written", daemon.path / "touched"
    written.write_bytes(b"x" * 10_000)
    touched.write_bytes(b"y" * 10_000)
    os.utime(touched, ns=(1, 1_234_567_890_123_456_789))
    times = [path.stat().st_mtime_ns for path in (written, touched)]
    for _ in range(2):
        daemon.kill_and_mount()
        assert [path.stat().st_mtime_ns for path in (written, touched)] == times
    daemon.flush()
    assert [(daemon.backing / path.name).stat().st_mtime_ns for path in (written, touched)] == times
    daemon.kill_and_mount()
    assert [path.stat().st_mtime_ns for path in (written, touched)] == times


# ---- finding files again


def test_files_are_found_by_handle_wherever_they_went(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    (daemon.path / "d").mkdir()
    (daemon.path / "d" / "a").write_bytes(b"a" * 5000)
    (daemon.path / "b").write_bytes(b"b" * 5000)
    daemon.kill()
    subprocess.run(["fusermount3", "-u", "-z", daemon.mountpoint], check=True)
    (daemon.backing / "d" / "a").rename(daemon.backing / "elsewhere")
    (daemon.backing / "d").rename(daemon.backing / "e")
    daemon.mount()
    assert (daemon.path / "elsewhere").read_bytes() == b"a" * 5000
    assert (daemon.path / "b").read_bytes() == b"b" * 5000


def test_clean_blocks_survive_unless_the_backing_has_changed(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    for name in ("same", "changed", "replaced"):
        (daemon.backing / name).write_bytes(name.encode() * 5000)
        assert (daemon.path / name).read_bytes() == name.encode() * 5000
    assert daemon.status()["promotions"] > 0
    daemon.kill()
    subprocess.run(["fusermount3", "-u", "-z", daemon.mountpoint], check=True)
    with (daemon.backing / "changed").open("r+b") as file:
        file.write(b"CHANGED")
    (daemon.backing / "new").write_bytes(b"another")
    (daemon.backing / "new").rename(daemon.backing / "replaced")
    daemon.mount()
    assert (daemon.path / "same").read_bytes() == b"same" * 5000
    assert daemon.status()["promotions"] == 0
    assert daemon.status()["requests"]["read_hits"] > 0
    assert (daemon.path / "changed").read_bytes() == b"CHANGED" + b"changed" * 4999
    assert (daemon.path / "replaced").read_bytes() == b"another"
    assert daemon.status()["promotions"] > 0


# ---- the start


def test_killed_while_it_recovers(make_daemon: MakeDaemon, rng: random.Random) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    for number in range(100):
        (daemon.path / f"{number}").write_bytes(image(number, 1, 20_000))
    places = [daemon.backing, daemon.mountpoint, "--cache", daemon.cache]
    for _ in range(5):
        daemon.kill()
        starting = subprocess.Popen(
            [sys.executable, "-m", "cachefsd", "mount", *places, "--volatile", "--foreground"],
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        time.sleep(0.5 + rng.uniform(0, 0.6))
        starting.kill()
        starting.wait()
        daemon.mount()
        for number in range(100):
            assert (daemon.path / f"{number}").read_bytes() == image(number, 1, 20_000)


def waits_for_a_mount(pid: int) -> bool:
    """Whether a thread of the process waits for the answer of a FUSE file system."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return any(
            (task / "wchan").read_text() == "request_wait_answer" for task in Path(f"/proc/{pid}/task").iterdir()
        )
    return False


def is_mounting_or_serving(daemon: Daemon, child: subprocess.Popen[str]) -> bool:
    return waits_for_a_mount(child.pid) or daemon.is_served_by(child)


def test_killed_as_soon_as_it_is_mounted(make_daemon: MakeDaemon) -> None:
    """A daemon that asked its own mount whether it served could not be killed while it waited for the answer."""
    daemon = make_daemon(mount=False, size="8M")
    for _ in range(5):
        child = daemon.start()
        wait_until(daemon.is_mounted, "the mount", pause_s=0)
        wait_until(functools.partial(is_mounting_or_serving, daemon, child), "service", pause_s=0)
        daemon.kill()
        child.wait()
        mounts.detach_dead(daemon.mountpoint)


def test_a_start_does_not_read_the_data(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(size="512M", options=("dirty_age=3600",), disk=True)
    with (daemon.path / "file").open("wb") as file:
        for _ in range(300):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
    daemon.kill()
    subprocess.run(["fusermount3", "-u", "-z", daemon.mountpoint], check=True)
    pool = daemon.cache / "pool"
    fd = os.open(pool, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    child = daemon.start()
    read = 0
    while True:
        now = int(Path(f"/proc/{child.pid}/io").read_text().split("read_bytes:")[1].split()[0])
        if daemon.is_mounted():
            break
        read = now  # after the mount the background check reads as well, so this was the last to count
    wait_until(lambda: daemon.is_served_by(child), "service")
    assert daemon.ask("status")["recovery"]["blocks"] == 300 * 256
    # Headers are 64 bytes for each 4096 of data.
    assert read < 150 << 20
