"""Files that are changed in the bare backing while their dirty data waits: both versions are kept, and told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support_daemon import Daemon, MakeDaemon, cachefsd, make_daemon
from t4_cli import refused

from cachefsd.service import control

__all__ = ["make_daemon"]
LAZY = ("dirty_age=3600",)
CACHED, EDIT = "from the cache\n", "edited on another machine, longer than the cached one\n"


def listed(daemon: Daemon) -> list[dict[str, object]]:
    found: list[dict[str, object]] = daemon.status()["conflicts"]
    return found


def copy_of(daemon: Daemon, name: str) -> Path:
    (copy,) = daemon.path.glob(f"{name}.cachefsd-conflict-*-1")
    return copy


def parted(make_daemon: MakeDaemon, *, killed: bool = False, over: bool = False) -> Daemon:
    """A mount with a file in a directory that both sides have written."""
    daemon = make_daemon(options=LAZY, over=over)
    (daemon.path / "d").mkdir()
    (daemon.path / "d" / "file").write_text(CACHED)
    (daemon.path / "d" / "file").chmod(0o640)
    (daemon.path / "other").write_text("nobody touches this\n")
    if killed:
        daemon.kill()
    else:
        daemon.unmount()
    (daemon.backing / "d" / "file").write_text(EDIT)
    said = daemon.mount().stderr
    assert "conflict" in said
    assert "d/file" in said
    return daemon


@pytest.mark.parametrize("killed", [False, True])
def test_both_versions_are_kept_and_told(make_daemon: MakeDaemon, killed: bool) -> None:
    daemon = parted(make_daemon, killed=killed)
    copy = copy_of(daemon, "d/file")
    assert (daemon.path / "d" / "file").read_text() == EDIT
    assert copy.read_text() == CACHED
    assert copy.stat().st_mode & 0o777 == 0o640
    assert (daemon.path / "other").read_text() == "nobody touches this\n"
    (conflict,) = listed(daemon)
    assert (conflict["path"], conflict["why"]) == ("d/file", "changed")
    assert conflict["copy"] == f"d/{copy.name}"
    assert "CONFLICT" in cachefsd("status", daemon.mountpoint).stdout
    assert copy.name in cachefsd("resolve").stdout
    for _ in range(2):  # it stays listed, and is not found again
        daemon.unmount("--flush")
        assert (daemon.backing / "d" / "file").read_text() == EDIT
        assert (daemon.backing / "d" / copy.name).read_text() == CACHED
        daemon.mount()
        assert listed(daemon) == [conflict]


@pytest.mark.parametrize(("keep", "content", "copies"), [("both", EDIT, 1), ("backing", EDIT, 0), ("cache", CACHED, 0)])
def test_a_choice_is_done_and_stays(make_daemon: MakeDaemon, keep: str, content: str, copies: int) -> None:
    daemon = parted(make_daemon)
    file = daemon.path / "d" / "file"
    assert "no conflict" in refused("resolve", daemon.path / "other", "--keep", keep)
    assert "name one file" in refused("resolve", daemon.path, "--keep", keep)
    assert "is not on a mount" in refused("resolve", daemon.cache, "--keep", keep)
    assert "d/file" in cachefsd("resolve", file).stdout
    cachefsd("resolve", file, "--keep", keep)
    for _ in range(2):
        assert listed(daemon) == []
        assert "no conflicts" in cachefsd("resolve", daemon.path).stdout
        assert file.read_text() == content
        assert len(list((daemon.path / "d").iterdir())) == 1 + copies
        daemon.kill_and_mount()
    assert "no conflict" in refused("resolve", file, "--keep", keep)


def test_a_removed_file_and_a_replaced_one(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=LAZY)
    for name in ("removed", "replaced"):
        (daemon.path / name).write_text(CACHED)
    daemon.unmount()
    (daemon.backing / "removed").unlink()
    (daemon.backing / "new").write_text(EDIT)
    (daemon.backing / "new").rename(daemon.backing / "replaced")
    daemon.mount()
    assert not (daemon.path / "removed").exists()
    assert (daemon.path / "replaced").read_text() == EDIT
    for name in ("removed", "replaced"):
        assert copy_of(daemon, name).read_text() == CACHED
    assert {conflict["why"] for conflict in listed(daemon)} == {"removed"}
    cachefsd("resolve", daemon.path / "removed", "--keep", "cache")
    assert (daemon.path / "removed").read_text() == CACHED
    daemon.unmount("--flush")
    assert (daemon.backing / "removed").read_text() == CACHED


def test_what_did_not_change_is_no_conflict(make_daemon: MakeDaemon) -> None:
    """Whatever is done through the mount, and to owners, modes and names beneath."""
    daemon = make_daemon(options=("dirty_age=0.05",))
    for number in range(20):
        path = daemon.path / f"file-{number}"
        path.write_text("first\n")
        if number % 2:
            os.utime(path, (1, 1))
        if number % 3 == 0:
            path.write_text("second, longer\n")
        if number % 5 == 0:
            os.truncate(path, 3)
            os.truncate(path, 10_000)
        path.chmod(0o600)
        with path.open("a") as file:
            file.write("more\n")
        if number % 4 == 0:
            path.rename(daemon.path / f"renamed-{number}")
    contents = {path.name: path.read_bytes() for path in daemon.path.iterdir()}
    for crash in (True, False, True):
        daemon.kill() if crash else daemon.unmount()
        for path in daemon.backing.iterdir():
            path.chmod(0o640)
        daemon.mount()
        assert listed(daemon) == []
        assert {path.name: path.read_bytes() for path in daemon.path.iterdir()} == contents
        for path in daemon.path.iterdir():
            with path.open("a") as file:
                file.write("and more\n")
            contents[path.name] += b"and more\n"


def test_links_in_the_way_of_a_choice_are_not_followed(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = parted(make_daemon)
    outside = tmp_path / "outside"
    (daemon.path / "d").rename(daemon.path / "elsewhere")
    outside.mkdir()
    (outside / copy_of(daemon, "elsewhere/file").name).write_text("of somebody else")
    (daemon.path / "d").symlink_to(outside)
    for keep in ("cache", "backing"):
        said = refused("resolve", daemon.path / "elsewhere" / ".." / "d", "--keep", keep)
        assert "conflict" in said or "not on a mount" in said
    (conflict,) = listed(daemon)
    with pytest.raises(Exception, match=r"resolve|moved"):
        resolve_first(daemon)
    assert listed(daemon) == [conflict]
    assert [path.read_text() for path in outside.iterdir()] == ["of somebody else"]


def resolve_first(daemon: Daemon) -> None:
    from cachefsd.service import conflicts

    (one,) = conflicts.listed(daemon.mountpoint, "")
    conflicts.resolve(daemon.mountpoint, one, "backing")


def test_the_daemon_checks_what_it_is_told(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    for arguments in ({"id": 7}, {"id": "7"}, {"name": 7}, {}):
        with pytest.raises(Exception, match="conflict"):
            control.ask(daemon.mountpoint, "forget-conflict", arguments=arguments)
    with pytest.raises(Exception, match="no such command"):
        control.ask(daemon.mountpoint, "status", arguments={"id": 7})
    assert json.loads(cachefsd("status", daemon.mountpoint, "--json").stdout)["conflict_files"] == 0
