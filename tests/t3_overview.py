"""What is found of mounts: those that answer, hang, are dead or were left; none of it takes long."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefsd.cli import trouble
from cachefsd.fuse.mounts import MountEntry
from cachefsd.media.pool import open_pool
from cachefsd.media.ports import SlotState
from cachefsd.service import overview, places
from cachefsd.service.caches import format_cache

NOBODY = 1 << 30
"""No process has this number."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    for module in (places, overview):
        monkeypatch.setattr(module, "runtime_directory", lambda: path)
    monkeypatch.setattr(overview.mounts, "mounts", lambda **_: [])
    return path


def dirty_cache(path: Path, *, clean: bool) -> Path:
    format_cache(path, 4 << 20, 4096, volatile=True, progress=None, may_replace=None)
    with open_pool(path, volatile=True) as pool:
        pool.mark_open()
        pool.publish(0, SlotState.DIRTY, 1, 1, 0, 0, 0, 4096)
        if clean:
            pool.mark_clean(1)
    return path


def note(mountpoint: str, cache: Path, pid: int = NOBODY) -> None:
    about = {"mountpoint": mountpoint, "backing": "/b", "cache": os.fspath(cache), "pid": pid}
    places.note_path(Path(mountpoint)).write_text(json.dumps(about))


@pytest.fixture
def silent(run: Path) -> Iterator[str]:
    """A daemon that takes connections and says nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(places.socket_path(Path("/silent"))))
        listener.listen(8)
        yield "/silent"


def entry(mountpoint: str, options: str = "user_id=0") -> MountEntry:
    return MountEntry(1, 0, "0:99", mountpoint, "fuse.cachefsd", "/b", frozenset(options.split(",")))


def test_nothing_is_found(run: Path) -> None:
    assert overview.all_mounts() == []
    assert overview.one_mount(Path("/nowhere")) is None


def test_a_daemon_that_hangs_comes_first_and_soon(silent: str, tmp_path: Path, run: Path) -> None:
    cache = dirty_cache(tmp_path / "cache", clean=False)
    note(silent, cache, os.getpid())
    note("/left", dirty_cache(tmp_path / "left", clean=True))
    began = time.monotonic()
    found = overview.all_mounts()
    assert time.monotonic() - began < 60
    assert [status["state"] for status in found] == ["silent", "unmounted"]
    assert found[0]["dirty_bytes"] == 4096
    assert trouble.exit_status(found) == 3
    said = trouble.sentence(found[0])
    assert said.startswith(f"/silent: THE DAEMON (process {os.getpid()}) DOES NOT ANSWER; 4.0 KiB dirty in {cache}.")
    assert overview.one_mount(Path(silent)) == found[0]


def test_what_was_left_dirty_is_told(run: Path, tmp_path: Path) -> None:
    note("/died", dirty_cache(tmp_path / "died", clean=False))
    note("/left", dirty_cache(tmp_path / "left", clean=True))
    found = overview.all_mounts()
    assert [status["state"] for status in found] == ["dead", "unmounted"]
    assert trouble.exit_status(found) == 4
    assert trouble.exit_status(found[1:]) == 0
    assert trouble.sentence(found[0]).startswith("/died: NOT MOUNTED, its daemon has died; 4.0 KiB dirty in ")
    command = f"cachefsd mount /b /left --cache {tmp_path}/left"
    said = trouble.sentence(found[1])
    assert said == f"/left: not mounted; 4.0 KiB dirty in {tmp_path}/left. To write it back: `{command}`"


def test_notes_of_which_nothing_is_left_go(run: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    format_cache(clean, 4 << 20, 4096, volatile=True, progress=None, may_replace=None)
    note("/clean", clean)
    note("/gone", tmp_path / "gone")
    note("/ending", tmp_path / "gone", os.getpid())  # its daemon has unmounted, and has not ended yet
    places.note_path(Path("/odd")).write_text("garbage")
    assert overview.all_mounts() == []
    assert {path.name for path in run.iterdir()} == {
        places.note_path(Path("/ending")).name,
        places.note_path(Path("/odd")).name,
    }


@pytest.mark.parametrize(("number", "state"), [(107, "dead"), (103, "dead"), (None, "foreign"), (5, "silent")], ids=str)
def test_a_mount_without_a_daemon(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, state: str
) -> None:
    place = os.fspath(tmp_path)

    def statvfs(path: str) -> Any:
        assert path == place
        if number is not None:
            raise OSError(number, os.strerror(number))

    note(place, dirty_cache(tmp_path / "cache", clean=False))
    monkeypatch.setattr(overview.mounts, "mounts", lambda **_: [entry(place)])
    monkeypatch.setattr(os, "statvfs", statvfs)
    (found,) = overview.all_mounts()
    assert found["state"] == state
    assert found["mounted"]
    if state != "foreign":
        assert found["dirty_bytes"] == 4096
    assert place in trouble.sentence(found)


def test_a_mount_that_hangs_without_a_daemon(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(overview, "_ALL_S", 0.05)
    monkeypatch.setattr(overview.mounts, "mounts", lambda **_: [entry("/hangs")])
    monkeypatch.setattr(os, "statvfs", lambda _: gate.wait())
    try:
        (found,) = overview.all_mounts()
    finally:
        gate.set()
    assert found["state"] == "silent"
    assert "its cache is not known" in trouble.sentence(found)


def test_a_user_sees_only_their_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry("/mine", "user_id=7"), entry("/root"), entry("/other", "user_id=70")]
    monkeypatch.setattr(overview.mounts, "mounts", lambda **_: entries)
    monkeypatch.setattr(os, "statvfs", lambda _: None)
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert [status["mountpoint"] for status in overview.all_mounts()] == ["/mine"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert len(overview.all_mounts()) == 3


def test_the_command_that_is_shown_can_be_pasted() -> None:
    status = {"state": "dead", "mountpoint": "/a b", "backing": "/a b", "cache": "/c'd", "mounted": True}
    assert "`cachefsd mount '/a b' --cache '/c'\"'\"'d'`" in trouble.sentence(status)
    assert "cannot be read" in trouble.sentence(status)
