"""A backing knows its cache: no other cache, and no copy of it, is accepted while it may have something."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support_daemon import Daemon, MakeDaemon, cachefsd, make_daemon
from t4_cli import mount_refused, refused

from cachefsd.backing import mark as marks
from cachefsd.fuse import mounts, takeover
from cachefsd.service.binding import epoch

__all__ = ["make_daemon"]
LAZY = ("dirty_age=3600",)


def mark_of(daemon: Daemon) -> marks.Mark | None:
    fd = os.open(daemon.backing, os.O_PATH)
    try:
        return marks.read(fd)
    finally:
        os.close(fd)


def test_another_cache_is_refused_and_not_made(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon(options=LAZY)
    mark = mark_of(daemon)
    assert mark is not None
    assert mark.cache == os.fspath(daemon.cache)
    assert marks.ATTRIBUTE not in os.listxattr(daemon.path)
    (daemon.path / "file").write_text("precious")
    daemon.unmount()
    assert mark_of(daemon) == mark
    words = (daemon.backing, daemon.mountpoint, "--cache", tmp_path / "typo", "--volatile")
    said = refused("mount", *words, "--size", "16M")
    assert os.fspath(daemon.cache) in said
    assert not (tmp_path / "typo").exists()
    cachefsd("format", tmp_path / "typo", "--size", "16M")
    assert os.fspath(daemon.cache) in refused("mount", *words)
    assert os.fspath(daemon.cache) in refused("mount", *words, "--without-cache", "0" * 32)
    assert mounts.find_mount(daemon.mountpoint) is None
    daemon.mount()
    assert (daemon.path / "file").read_text() == "precious"
    daemon.unmount()
    cachefsd("mount", *words, "--without-cache", mark.uuid)
    assert (daemon.path / "file").read_text() == ""
    cachefsd("unmount", daemon.mountpoint)
    assert mark_of(daemon) is None  # nothing was written


def test_the_mark_goes_when_the_backing_has_everything(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=LAZY)
    (daemon.path / "file").write_text("data")
    daemon.kill_and_mount()
    assert mark_of(daemon) is not None
    daemon.unmount("--flush")
    assert mark_of(daemon) is None
    daemon.mount()
    assert mark_of(daemon) is not None
    daemon.unmount()
    assert mark_of(daemon) is None


@pytest.mark.parametrize("flushed", [False, True])
def test_an_older_copy_of_a_cache_is_refused(make_daemon: MakeDaemon, tmp_path: Path, flushed: bool) -> None:
    daemon = make_daemon(options=LAZY)
    (daemon.path / "file").write_text("old")
    daemon.unmount()
    copy = tmp_path / "copy"
    shutil.copytree(daemon.cache, copy)
    for _ in range(2):
        daemon.mount()
        (daemon.path / "file").write_text("newer")
        daemon.unmount(*(["--flush"] if flushed else []))
    said = refused("mount", daemon.backing, daemon.mountpoint, "--cache", copy, "--volatile")
    assert "copy" in said
    daemon.mount()
    assert (daemon.path / "file").read_text() == "newer"


def test_a_start_that_was_cut_off_between_catalog_and_mark_is_no_copy(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=LAZY)
    before = os.getxattr(daemon.backing, marks.ATTRIBUTE)
    (daemon.path / "file").write_text("data")
    daemon.kill_and_mount()
    daemon.kill()
    os.setxattr(daemon.backing, marks.ATTRIBUTE, before)  # the new mark did not arrive
    daemon.mount()
    assert (daemon.path / "file").read_text() == "data"


def test_a_damaged_mark_is_refused(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    os.setxattr(daemon.backing, marks.ATTRIBUTE, b"\xff")
    assert "damaged" in mount_refused(daemon, "--size", "16M")
    assert not daemon.cache.exists()
    os.removexattr(daemon.backing, marks.ATTRIBUTE)
    daemon.mount()


def test_what_a_reboot_has_emptied_is_not_waited_for(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    mark = marks.Mark("a" * 32, "/dev/shm/gone", "b" * 32, "then", boot="of another boot")
    os.setxattr(daemon.backing, marks.ATTRIBUTE, mark.text().encode())
    assert "volatile" in daemon.mount().stderr + daemon.log()
    mark = marks.Mark("a" * 32, "/dev/shm/gone", "b" * 32, "then")
    daemon.unmount()
    os.setxattr(daemon.backing, marks.ATTRIBUTE, mark.text().encode())
    assert "/dev/shm/gone" in mount_refused(daemon)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root opens what is beneath a dead mount")
@pytest.mark.parametrize("over", [False, True])
def test_the_epoch_is_the_same_beneath_a_dead_mount(make_daemon: MakeDaemon, over: bool) -> None:
    """Else the start after a crash would not know that a file was changed behind the mount."""
    daemon = make_daemon(mount=False, over=over)

    def epoch_of(fd: int) -> bytes:
        try:
            return epoch(fd, daemon.backing, daemon.mountpoint)
        finally:
            os.close(fd)

    before = epoch_of(os.open(daemon.backing, os.O_PATH))
    assert before
    daemon.start_and_wait()
    daemon.kill()
    fd = takeover.open_beneath(daemon.mountpoint, mounts.FSTYPE, os.fspath(daemon.backing))
    assert epoch_of(fd) == before
