"""Bytes of the pool that go bad while the daemon is down: what is lost reads as EIO, is listed, and heals."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support_daemon import Daemon, MakeDaemon, cachefsd, make_daemon

__all__ = ["make_daemon"]
BLOCK = 4096


def flip(daemon: Daemon, content: bytes) -> None:
    """Change one bit of the only place in the pool that holds ``content``."""
    pool = daemon.cache / "pool"
    at = pool.read_bytes().index(content) + len(content) // 2
    with pool.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def listed(daemon: Daemon) -> list[tuple[str, int, int]]:
    return [(loss["path"], loss["from"], loss["to"]) for loss in daemon.status()["lost_blocks"]]


def read_blocks(path: Path) -> list[bytes | int]:
    """Each block of a file, or the errno that it gave."""
    found: list[bytes | int] = []
    with path.open("rb", buffering=0) as file:
        while True:
            try:
                block = os.pread(file.fileno(), BLOCK, len(found) * BLOCK)
            except OSError as error:
                found.append(error.errno)
                continue
            if not block:
                return found
            found.append(block)


@pytest.mark.parametrize("disk", [False, True], ids=["ram", "disk"])
def test_flipped_bits(make_daemon: MakeDaemon, disk: bool) -> None:
    daemon = make_daemon(disk=disk, options=("dirty_age=3600",), size="16M")
    blocks: list[bytes | int] = [os.urandom(BLOCK) for _ in range(7)]
    (daemon.path / "d").mkdir()
    path = daemon.path / "d" / "file"
    with path.open("wb", buffering=0) as file:
        file.write(b"".join(block for block in blocks if isinstance(block, bytes)))
        os.fsync(file.fileno())
    daemon.kill()
    for number in (1, 2, 4, 6):
        block, blocks[number] = blocks[number], errno.EIO
        assert isinstance(block, bytes)
        flip(daemon, block)
    expected = [("d/file", start * BLOCK, end * BLOCK) for start, end in ((1, 3), (4, 5), (6, 7))]

    daemon.mount()
    assert read_blocks(path) == blocks
    assert listed(daemon) == expected
    text = cachefsd("status", daemon.mountpoint).stdout
    for name, start, end in expected:
        assert f"{name}: bytes {start} to {end}" in text
    daemon.flush()
    daemon.kill_and_mount()
    assert listed(daemon) == expected
    assert read_blocks(path) == blocks

    with path.open("r+b", buffering=0) as file:
        blocks[1] = os.urandom(BLOCK)
        assert os.pwrite(file.fileno(), blocks[1], BLOCK) == BLOCK
        assert listed(daemon) == [("d/file", start * BLOCK, end * BLOCK) for start, end in ((2, 3), (4, 5), (6, 7))]
        file.truncate(4 * BLOCK)
        os.fsync(file.fileno())
    del blocks[4:]
    assert listed(daemon) == [("d/file", 2 * BLOCK, 3 * BLOCK)]
    daemon.kill_and_mount()
    assert read_blocks(path) == blocks
    assert listed(daemon) == [("d/file", 2 * BLOCK, 3 * BLOCK)]
    path.unlink()
    daemon.flush()
    daemon.remount()
    assert listed(daemon) == []
    assert daemon.status()["slots"]["quarantined"] == 0
    daemon.unmount()
