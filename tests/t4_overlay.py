"""A backing whose file handles have more than 32 bytes: overlayfs with nfs_export. Those of NFS are long, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_daemon import MakeDaemon, cachefsd, make_daemon
from support_fs import overlay_mounted

from cachefsd.backing import handles

__all__ = ["make_daemon"]


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "overlay").mkdir()
    with overlay_mounted(tmp_path / "overlay") as merged:
        yield merged


def test_the_handles_are_long(overlay: Path) -> None:
    fd = os.open(overlay, os.O_PATH)
    try:
        assert len(handles.file_handle(fd)) > 32
    finally:
        os.close(fd)


def test_what_is_written_through_the_cache_is_found_again(make_daemon: MakeDaemon, overlay: Path) -> None:
    daemon = make_daemon(overlay, options=("dirty_age=3600",))
    new, changed = os.urandom(300_001), os.urandom(8192)
    (daemon.path / "new").write_bytes(new)
    with (daemon.path / "from below").open("r+b") as file:
        assert file.read(6) == b"oldold"
        file.seek(4096)
        file.write(changed)
    expected = (b"old" * 5000)[:4096] + changed + (b"old" * 5000)[12288:]
    assert (daemon.path / "from below").read_bytes() == expected

    daemon.kill_and_mount()
    assert (daemon.path / "new").read_bytes() == new
    assert (daemon.path / "from below").read_bytes() == expected

    (daemon.path / "new").rename(daemon.path / "directory" / "renamed")
    (daemon.path / "directory" / "below").rename(daemon.path / "above")
    os.truncate(daemon.path / "above", 5001)
    (daemon.path / "unlinked").write_bytes(new)
    (daemon.path / "unlinked").unlink()
    daemon.remount()
    assert daemon.status()["lost_ranges"] == 0
    assert (daemon.path / "directory" / "renamed").read_bytes() == new
    assert (daemon.path / "from below").read_bytes() == expected
    daemon.flush()
    assert daemon.status()["writeback"]["failing_files"] == 0
    assert (overlay / "directory" / "renamed").read_bytes() == new
    assert (overlay / "from below").read_bytes() == expected
    assert (overlay / "above").read_bytes() == (b"below" * 2000)[:5001]
    daemon.unmount()
    assert sorted(os.listdir(overlay)) == ["above", "directory", "from below"]


def test_a_file_of_the_lower_layer_that_is_only_read_and_then_written(make_daemon: MakeDaemon, overlay: Path) -> None:
    """The first write copies the file up; descriptors that were opened before show the old one for good."""
    daemon = make_daemon(overlay)
    with (daemon.path / "from below").open("rb", buffering=0) as reader:
        assert reader.read(6) == b"oldold"
        with (daemon.path / "from below").open("r+b") as writer:
            writer.write(b"fresh")
            writer.flush()
            os.fsync(writer.fileno())
        daemon.flush()
        assert os.pread(reader.fileno(), 6, 0) == b"freshd"
    assert (overlay / "from below").read_bytes()[:5] == b"fresh"


def test_another_overlay_is_not_taken_for_it(make_daemon: MakeDaemon, overlay: Path, tmp_path: Path) -> None:
    daemon = make_daemon(overlay)
    (daemon.path / "file").write_text("mine")
    daemon.unmount()
    (tmp_path / "second").mkdir()
    with overlay_mounted(tmp_path / "second") as other:
        words = ["--cache", daemon.cache, "--volatile"]
        done = cachefsd("mount", other, daemon.mountpoint, *words, check=False)
        assert "belongs to another backing" in done.stderr
    daemon.mount()
    assert (daemon.path / "file").read_text() == "mine"
