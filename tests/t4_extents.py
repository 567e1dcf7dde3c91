"""Pools on file systems that copy on write: a store into the map must never need space."""

from __future__ import annotations

import os
import subprocess
import traceback
from pathlib import Path

import pytest
from support_fs import loop_mounted, run

from cachefsd.errors import UserError
from cachefsd.filesystems import file_system_type
from cachefsd.media import extents
from cachefsd.media.pool import open_pool
from cachefsd.media.poolfile import create_pool
from cachefsd.media.ports import Durability

SIZE = 8 << 20


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_stores_into_a_new_pool_need_no_space(tmp_path: Path, kind: str) -> None:
    """They are made in a child process: one that needs space and gets none dies."""
    with loop_mounted(kind, tmp_path) as mounted:
        create_pool(mounted / "cache", SIZE, volatile=False)
        with open_pool(mounted / "cache") as pool:
            assert (pool.durability, pool.notes) == (Durability.DISK, [])
        fill(mounted / "filler")
        os.sync()
        child = os.fork()
        if not child:
            status = 1
            try:
                with open_pool(mounted / "cache") as pool:
                    for round_ in range(3):
                        for slot in range(pool.slots):
                            pool.write(slot, bytes([round_ + 1]) * 4096)
                        pool.sync()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_pool_that_shares_its_space_is_told_of(tmp_path: Path) -> None:
    with loop_mounted("xfs", tmp_path) as mounted:
        create_pool(mounted / "cache", SIZE, volatile=False)
        run("cp", "--reflink=always", mounted / "cache/pool", mounted / "copy")
        with open_pool(mounted / "cache") as pool:
            [note] = pool.notes
        assert "shares space" in note
        assert "\n" not in note
        run("cp", "--reflink=never", mounted / "copy", mounted / "cache/whole")
        os.replace(mounted / "cache/whole", mounted / "cache/pool")  # as the note says
        os.chmod(mounted / "cache/pool", 0o600)
        with open_pool(mounted / "cache") as pool:
            assert pool.notes == []


def test_a_snapshot_of_a_pool_is_told_of(tmp_path: Path) -> None:
    with loop_mounted("btrfs", tmp_path) as mounted:
        run("btrfs", "subvolume", "create", mounted / "volume")
        create_pool(mounted / "volume/cache", SIZE, volatile=False)
        with open_pool(mounted / "volume/cache") as pool:
            assert pool.notes == []
        run("btrfs", "subvolume", "snapshot", mounted / "volume", mounted / "snapshot")
        with open_pool(mounted / "volume/cache") as pool:
            assert "shares space" in pool.notes[0]


def test_a_pool_that_is_copied_on_write_is_told_of(tmp_path: Path) -> None:
    """It was made elsewhere and copied here."""
    with loop_mounted("btrfs", tmp_path) as mounted:
        create_pool(tmp_path / "cache", SIZE, volatile=True)
        run("cp", "-a", tmp_path / "cache", mounted / "cache")
        with open_pool(mounted / "cache") as pool:
            [note] = pool.notes
        assert "btrfs, which copies it on write" in note


def test_an_interrupted_format_is_finished_in_place(tmp_path: Path) -> None:
    with loop_mounted("btrfs", tmp_path) as mounted:
        (mounted / "cache").mkdir(mode=0o700)
        (mounted / "cache/pool").write_bytes(bytes(SIZE // 2))
        (mounted / "cache/pool").chmod(0o600)
        create_pool(mounted / "cache", SIZE, volatile=False)
        with open_pool(mounted / "cache") as pool:
            assert pool.notes == []


def test_a_file_system_that_copies_on_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here but btrfs, which can do without: this one is called by the name of another."""
    fd = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(extents, "_COPY_ON_WRITE", {file_system_type(fd): "zfs"})
    os.close(fd)
    with pytest.raises(UserError, match="zfs copies on write") as caught:
        create_pool(tmp_path / "cache", SIZE, volatile=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache/pool").exists()


def test_a_file_with_holes_is_no_pool(tmp_path: Path) -> None:
    subprocess.run(["truncate", "-s", str(SIZE), tmp_path / "f"], check=True)
    with (tmp_path / "f").open("r+b") as file:
        with pytest.raises(OSError, match="space for zeros"):
            extents.require_allocated(file.fileno(), SIZE)
        file.write(bytes(SIZE))
        os.fsync(file.fileno())
        extents.require_allocated(file.fileno(), SIZE)
