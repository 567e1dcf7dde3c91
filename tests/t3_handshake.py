"""INIT's way between the kernel and libfuse, both played by sockets that keep messages apart as /dev/fuse does."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefsd.fuse.handshake import CONGESTION_THRESHOLD, MAX_BACKGROUND, WANTED, Handshake, amended

OTHER_FLAGS = 1 << 3 | 1 << 30


def init(offered: int) -> bytes:
    """A kernel's request: headers, then version 7.45, read-ahead, flags, flags2 and what is unused."""
    body = struct.pack("=IIIII44x", 7, 45, 131072, offered, 0)
    return struct.pack("=IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body


def answer(flags: int, background: int = 0, threshold: int = 0) -> bytes:
    """libfuse's answer: version 7.38, read-ahead, flags, limits and what is unused."""
    body = struct.pack("=IIIIHHII32x", 7, 38, 131072, flags, background, threshold, 1 << 20, 1)
    return struct.pack("=IiQ", 16 + len(body), 0, 2) + body


@pytest.fixture
def kernel() -> Iterator[tuple[socket.socket, int]]:
    """The kernel's end, and the descriptor that the daemon has."""
    ours, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = device.detach()
    with ours:
        yield ours, fd
        os.close(fd)


@pytest.mark.parametrize("offers", [True, False])
def test_what_the_kernel_offers_is_asked_for(kernel: tuple[socket.socket, int], offers: bool) -> None:
    end, fd = kernel
    before, device = sorted(os.listdir("/proc/self/fd")), os.fstat(fd).st_ino
    request = init(OTHER_FLAGS | WANTED * offers)
    end.send(request)
    handshake = Handshake(fd)
    handshake.begin()
    assert os.read(fd, 1 << 20) == request
    os.write(fd, answer(OTHER_FLAGS))
    handshake.finish()
    assert end.recv(1 << 20) == answer(OTHER_FLAGS | WANTED * offers, MAX_BACKGROUND, CONGESTION_THRESHOLD)
    # From here on nobody is in between, and nothing is left of it.
    assert os.fstat(fd).st_ino == device
    assert not os.get_inheritable(fd)
    assert sorted(os.listdir("/proc/self/fd")) == before
    handshake.close()


def test_a_kernel_that_is_gone_leaves_the_descriptor_as_it_is(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # reading fails
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(IsADirectoryError):
        Handshake(fd).begin()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert os.path.samestat(os.fstat(fd), tmp_path.stat())
    os.close(fd)


def test_an_answer_too_late_is_no_error(kernel: tuple[socket.socket, int]) -> None:
    end, fd = kernel
    end.send(init(WANTED))
    handshake = Handshake(fd)
    handshake.begin()
    os.read(fd, 1 << 20)
    os.write(fd, answer(0))
    end.close()
    handshake.finish()
    assert os.read(fd, 1) == b""


def test_what_is_too_short_for_flags_is_passed_on() -> None:
    error = struct.pack("=IiQ", 16, -71, 2)
    assert amended(init(WANTED), error) == error
    assert amended(init(WANTED)[:48], answer(0)) == answer(0)
