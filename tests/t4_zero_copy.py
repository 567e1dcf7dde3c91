"""Writeback goes from the map to the disk by direct I/O, and leaves nothing in the page cache."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from support_daemon import MakeDaemon, make_daemon
from support_fs import loop_mounted, pages_of

__all__ = ["make_daemon"]
GIB = 1 << 30


def write_by_fio(path: Path, size: int, *, direct: bool) -> None:
    command = ["fio", "--name=fill", f"--filename={path}", "--rw=write", "--bs=1M", f"--size={size}"]
    subprocess.run([*command, f"--direct={int(direct)}", "--ioengine=psync"], check=True, capture_output=True)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_a_gibibyte_is_written_back_without_a_copy(make_daemon: MakeDaemon, tmp_path: Path, direct: bool) -> None:
    space = os.statvfs("/dev/shm")
    if space.f_bavail * space.f_frsize < 3 * GIB:
        pytest.skip("/dev/shm has less than 3 GiB")
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
        loop_mounted("ext4", Path(memory), size_mib=1300) as ext4,
    ):
        daemon = make_daemon(ext4, size="1200M")
        path, beneath = daemon.path / "file", ext4 / "file"
        write_by_fio(path, GIB, direct=direct)
        daemon.flush()
        status = daemon.status()
        written = status["writeback"]
        # Random data written twice would be counted twice: at least all of it, and none of it by a copy.
        assert written["bytes"] >= GIB
        assert written["direct_bytes"] == written["bytes"]
        assert written["bounced_bytes"] == 0
        assert pages_of(beneath) == 0
        assert beneath.stat().st_size == GIB
        # The kernel had the mapped pages read by the device: what is on the disk is what was written.
        assert subprocess.run(["cmp", path, beneath], check=False).returncode == 0
        daemon.destroy()


def test_only_the_end_of_a_file_is_copied(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as ext4:
        daemon = make_daemon(ext4, options=("dirty_age=3600",))  # not in the middle of it
        (daemon.path / "file").write_bytes(b"x" * ((8 << 20) + 1234))
        daemon.flush()
        written = daemon.status()["writeback"]
        assert written["bounced_bytes"] == 1234
        assert written["direct_bytes"] == 8 << 20
        assert pages_of(ext4 / "file") == 0
        assert (ext4 / "file").read_bytes() == b"x" * ((8 << 20) + 1234)
        daemon.destroy()


def test_reads_that_miss_go_by_direct_io_into_the_map(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as ext4:
        (ext4 / "file").write_bytes(os.urandom(8 << 20))
        content = (ext4 / "file").read_bytes()
        subprocess.run(["umount", ext4], check=True)
        subprocess.run(["mount", "-o", "loop", tmp_path / "ext4.img", ext4], check=True)
        daemon = make_daemon(ext4)
        assert (daemon.path / "file").read_bytes() == content
        status = daemon.status()
        assert status["promotions"] == 2048
        assert status["requests"]["read_misses"] > 0
        assert pages_of(ext4 / "file") == 0
        daemon.destroy()
