"""Direct and buffered I/O on one file at a time: who reads after a direct write has ended sees what it wrote."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_daemon import Daemon, MakeDaemon, make_daemon, wait_until
from support_fs import drop_caches

from cachefsd.fuse import dropper

__all__ = ["make_daemon"]
SIZE = 64 << 10
_LIBC = ctypes.CDLL(None, use_errno=True)
_SETUP, _GETEVENTS, _SUBMIT = (206, 208, 209) if platform.machine() == "x86_64" else (0, 4, 2)
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438


class Iocb(ctypes.Structure):
    _fields_ = (
        *(("data", ctypes.c_uint64), ("key", ctypes.c_uint32), ("flags", ctypes.c_uint32)),
        *(("opcode", ctypes.c_uint16), ("priority", ctypes.c_uint16), ("fd", ctypes.c_uint32)),
        *(("buffer", ctypes.c_uint64), ("size", ctypes.c_uint64), ("offset", ctypes.c_int64)),
        *(("reserved", ctypes.c_uint64), ("more", ctypes.c_uint32), ("eventfd", ctypes.c_uint32)),
    )


class Asynchronous:
    """Writes by io_submit. From memory that is not there yet: the kernel has dropped the file's pages by then, and
    others have time to read them again."""

    def __init__(self, source: Path) -> None:
        self._context = ctypes.c_uint64(0)
        self._source = source
        assert _LIBC.syscall(_SETUP, 8, ctypes.byref(self._context)) == 0

    def write(self, fd: int, byte: int, offset: int = 0) -> None:
        """Write SIZE bytes and wait for the end."""
        with self._source.open("wb") as file:
            file.write(bytes([byte]) * SIZE)
            file.flush()
            os.fsync(file.fileno())
        source = os.open(self._source, os.O_RDWR)
        try:
            os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(source, SIZE) as memory:
                view = ctypes.c_char.from_buffer(memory)
                request = Iocb(opcode=1, fd=fd, buffer=ctypes.addressof(view), size=SIZE, offset=offset)
                requests, events = (ctypes.c_void_p * 1)(ctypes.addressof(request)), (ctypes.c_uint64 * 4)()
                assert _LIBC.syscall(_SUBMIT, self._context, 1, requests) == 1
                assert _LIBC.syscall(_GETEVENTS, self._context, 1, 1, events, None) == 1
                assert events[2] == SIZE
                del view
        finally:
            os.close(source)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Another program reads the beginning of a file all the time."""
    code = "import os,sys\nf=os.open(sys.argv[1],0)\nprint(flush=True)\nwhile 1: os.pread(f,int(sys.argv[2]),0)"
    command = [sys.executable, "-c", code, os.fspath(path), str(SIZE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.read(1) == b"\n"
            yield
        finally:
            reader.kill()


@pytest.mark.parametrize("options", ["", "writeback_cache"])
@pytest.mark.parametrize("first", ["direct", "buffered", "mapped", "writer"])
def test_a_read_after_an_asynchronous_direct_write_sees_it(
    make_daemon: MakeDaemon, tmp_path: Path, options: str, first: str
) -> None:
    daemon = make_daemon(options=(options, "dirty_age=3600"))
    path = daemon.path / "file"
    path.write_bytes(bytes(SIZE))
    aio = Asynchronous(tmp_path / "source")
    with contextlib.ExitStack() as undo:

        def opened(flags: int) -> int:
            fd = os.open(path, flags)
            undo.callback(os.close, fd)
            return fd

        before = opened(os.O_RDWR if first == "writer" else os.O_RDONLY) if first != "direct" else -1
        direct = opened(os.O_RDWR | os.O_DIRECT)
        buffered = before if before >= 0 else opened(os.O_RDONLY)
        mapped = undo.enter_context(mmap.mmap(buffered, SIZE, prot=mmap.PROT_READ)) if first == "mapped" else None
        undo.enter_context(reading(path))
        stale = []
        for byte in range(1, 21):
            aio.write(direct, byte)
            seen = mapped[:] if mapped is not None else os.pread(buffered, SIZE, 0)
            if seen != bytes([byte]) * SIZE:
                stale.append(byte)
    assert stale == []
    daemon.unmount("--flush")
    assert (daemon.backing / "file").read_bytes() == bytes([20]) * SIZE


def helper_of(daemon: Daemon) -> int:
    """The process that drops pages for a daemon, or 0."""
    for child in Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split():
        if dropper.__file__.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return 0


def test_who_has_the_file_alone_needs_no_help(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    path = daemon.path / "file"
    path.write_bytes(bytes(4 * SIZE))
    aio = Asynchronous(tmp_path / "source")
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        aio.write(direct, 1)
        assert not helper_of(daemon)
        with path.open("rb") as file:
            assert os.pread(file.fileno(), SIZE, 0) == b"\1" * SIZE
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            aio.write(direct, 2, 2 * SIZE)  # not where somebody has read, nor just ahead of it
    finally:
        os.close(direct)


def test_small_writes_by_both_of_one_page_all_stay(make_daemon: MakeDaemon) -> None:
    """A program that writes through the page cache is not undone by what is dropped for another one."""
    daemon = make_daemon(options=("writeback_cache",))
    path = daemon.path / "file"
    path.write_bytes(bytes(SIZE))
    memory = mmap.mmap(-1, 4096)
    direct, buffered = os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDWR)
    try:
        for number in range(1, 51):
            os.pwrite(buffered, bytes([number]) * 100, 0)
            memory[:] = bytes([number]) * 4096
            os.pwritev(direct, [memory], 8192)
            os.pwrite(buffered, bytes([number]) * 100, 8192 + 200)
            memory[:512] = bytes([255 - number]) * 512
            os.pwritev(direct, [memoryview(memory)[:512]], 8192 + 1024)
        want = bytearray(bytes([50]) * 4096)
        want[1024:1536] = bytes([205]) * 512
        assert os.pread(buffered, 4096, 8192) == want
        assert os.pread(buffered, 101, 0) == bytes([50]) * 100 + b"\0"
    finally:
        os.close(direct)
        os.close(buffered)
        memory.close()
    daemon.flush()
    assert (daemon.backing / "file").read_bytes()[8192:12288] == want


def connection_of(pid: int) -> int:
    """A descriptor for the connection to the kernel that a process has."""
    process = _LIBC.syscall(_PIDFD_OPEN, pid, 0)
    assert process >= 0
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == "/dev/fuse":
                    fd: int = _LIBC.syscall(_PIDFD_GETFD, process, int(name), 0)
                    assert fd >= 0
                    return fd
    finally:
        os.close(process)
    raise AssertionError("it has none")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_kill_while_the_kernel_waits_for_a_page_ends_all(make_daemon: MakeDaemon) -> None:
    """Somebody reads a page, and its read is not answered. The process that was to drop that page can't be killed now,
    but it sees that the daemon has gone, and ends the connection: the reader gets its error, and all are gone."""
    daemon = make_daemon()
    path = daemon.path / "file"
    path.write_bytes(bytes(SIZE))
    node, device = path.stat().st_ino, daemon.path.stat().st_dev
    drop_caches()
    connection = connection_of(daemon.pid)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [str(theirs.fileno()), str(connection), str(os.minor(device))]
    code = (
        "import os,sys\nf=os.open(sys.argv[1],0)\nprint(flush=True)\nsys.stdin.read()\n"
        "try: os.pread(f,4096,0)\nexcept OSError as e: sys.exit(e.errno)"
    )
    # This process has nothing open there: it could not start another, which closes what it inherits.
    reader = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    helper = subprocess.Popen(
        [sys.executable, "-I", "-S", dropper.__file__, *words], pass_fds=(theirs.fileno(), connection)
    )
    os.close(connection)
    theirs.close()
    try:
        assert reader.stdout is not None
        assert reader.stdin is not None
        assert reader.stdout.read(1) == b"\n"
        os.kill(daemon.pid, signal.SIGSTOP)
        reader.stdin.close()
        wait_until(lambda: state_of(reader.pid) == "D", "a reader that waits for its page")
        ours.settimeout(0.5)
        ours.send(dropper.REQUEST.pack(1, node, 0, 4096))
        with pytest.raises(TimeoutError):
            ours.recv(dropper.ANSWER.size)
        ours.close()  # as when the daemon is killed
        helper.wait(30)
        assert reader.wait(30) in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
    finally:
        daemon.destroy()
        ours.close()
        for process in (reader, helper):
            process.kill()
            process.wait()
        if reader.stdout is not None:
            reader.stdout.close()
