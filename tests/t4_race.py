"""Several processes want one cache: whoever gets it serves it, and the others are told so in one line."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support_daemon import ROOT, Daemon, MakeDaemon, cachefsd, is_gone, make_daemon, wait_until

from cachefsd.errors import InUseError
from cachefsd.fuse import mounts
from cachefsd.media.cachedir import PrivateDirectory
from cachefsd.media.catalog import open_catalog
from cachefsd.media.pool import open_pool
from cachefsd.media.poolfile import POOL
from cachefsd.service import caches

__all__ = ["make_daemon"]
RACERS = 4
SIZE = 16 << 20
TOLD = ("in use by another daemon", "is busy: cachefsd is mounted there already", "already cached by another daemon")


def start(*words: str | os.PathLike[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cachefsd", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def outcomes(racers: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        said = [racer.communicate(timeout=100)[1] for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
    return [(racer.returncode, text) for racer, text in zip(racers, said, strict=True)]


def race(daemon: Daemon, *, separate: bool) -> None:
    """Mount the cache by several processes at once; one has won, and its daemon is ``daemon``'s."""
    places = [daemon.mountpoint]
    if separate:
        places = [daemon.mountpoint.parent / f"mnt-{number}" for number in range(RACERS)]
        for place in places:
            place.mkdir(exist_ok=True)
    words = ["--cache", daemon.cache, "--size", "16M", "--volatile", "-o", "dirty_age=3600"]
    racers = [start("mount", daemon.backing, places[number % len(places)], *words) for number in range(RACERS)]
    ended = outcomes(racers)
    winners = [number for number, (code, _) in enumerate(ended) if code == 0]
    assert len(winners) == 1, ended
    for code, said in ended:
        if code:
            lines = [line for line in said.splitlines() if "took the dead mount off" not in line]
            assert len(lines) == 1, said
            assert any(words in said for words in TOLD), said
    daemon.mountpoint = places[winners[0] % len(places)]
    daemon.pid = daemon.status()["pid"]
    serving = [
        entry for entry in mounts.mounts() if entry.fstype == mounts.FSTYPE and entry.mountpoint in map(str, places)
    ]
    assert [entry.mountpoint for entry in serving] == [str(daemon.mountpoint)]


@pytest.mark.parametrize("separate", [False, True], ids=["one mount point", "mount points of their own"])
def test_of_many_mounts_at_once_one_serves(make_daemon: MakeDaemon, separate: bool) -> None:
    daemon = make_daemon(mount=False)
    for number in range(3):  # the first of them also has to make the cache
        race(daemon, separate=separate)
        (daemon.path / f"file-{number}").write_text(f"written in round {number}")
        assert sorted(path.name for path in daemon.path.iterdir()) == [f"file-{n}" for n in range(number + 1)]
        daemon.kill()
        if separate:
            mounts.detach_dead(daemon.mountpoint)
    daemon.mount()
    assert [(daemon.path / f"file-{n}").read_text() for n in range(3)] == [f"written in round {n}" for n in range(3)]


def test_of_many_formats_at_once_none_breaks_what_another_makes(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for _ in range(3):
        racers = [start("format", cache, "--size", "16M", "--yes") for _ in range(RACERS)]
        ended = outcomes(racers)
        assert any(code == 0 for code, _ in ended), ended
        for code, said in ended:
            if code:
                assert said.count("\n") == 1
                assert "in use by another daemon" in said
        with open_pool(cache) as pool:
            open_catalog(cache, pool.uuid).close()  # they belong together


def test_a_mounted_cache_is_not_formatted(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    (daemon.path / "file").write_text("mine")
    before = (daemon.cache / "pool").stat().st_ino
    done = cachefsd("format", daemon.cache, "--size", "16M", "--volatile", "--discard-dirty", "--yes", check=False)
    assert done.returncode == 1
    assert f"in use by another daemon (process {daemon.pid})" in done.stderr
    assert (daemon.cache / "pool").stat().st_ino == before
    daemon.kill_and_mount()
    assert (daemon.path / "file").read_text() == "mine"


def test_unmounts_and_mounts_at_once(make_daemon: MakeDaemon) -> None:
    """Whatever they meet: in the end the next mount serves everything."""
    daemon = make_daemon(options=("dirty_age=3600",))
    for number in range(3):
        (daemon.path / f"file-{number}").write_text("kept")
        words = ["--cache", daemon.cache, "--volatile", "-o", "dirty_age=3600"]
        racers = [start("unmount", daemon.mountpoint)]
        racers += [start("mount", daemon.backing, daemon.mountpoint, *words) for _ in range(2)]
        ended = outcomes(racers)
        assert ended[0][0] == 0, ended
        assert all(said.count("\n") == (code != 0) for code, said in ended), ended
        wait_until(functools.partial(is_gone, daemon.pid), "the end of the daemon that was unmounted")
        if sum(code == 0 for code, _ in ended[1:]):
            daemon.pid = daemon.status()["pid"]
        else:
            daemon.mount()
        assert sorted(path.name for path in daemon.path.iterdir()) == [f"file-{n}" for n in range(number + 1)]


# ---- the same without chance: what happens between two steps


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    make(path)
    return path


def make(path: Path, may_replace: Callable[..., None] | None = None) -> None:
    caches.format_cache(path, SIZE, 4096, volatile=True, progress=None, may_replace=may_replace)


def test_a_pool_replaced_between_open_and_lock_is_not_served(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = PrivateDirectory.open_file

    def slow_open(directory: PrivateDirectory, name: str, flags: int) -> int:
        fd = open_file(directory, name, flags)
        if name == POOL:
            (cache / "new").write_bytes(b"another one")
            (cache / "new").rename(cache / POOL)
        return fd

    monkeypatch.setattr(PrivateDirectory, "open_file", slow_open)
    with pytest.raises(InUseError, match="replaced a moment ago"):
        open_pool(cache, volatile=True)


def test_while_a_format_asks_nobody_else_gets_the_cache(cache: Path) -> None:
    uuids = []

    def may_replace(*_: object) -> None:
        for attempt in (lambda: open_pool(cache, volatile=True), lambda: make(cache, may_replace)):
            with pytest.raises(InUseError, match="in use"):
                attempt()

    with open_pool(cache, volatile=True) as pool:
        uuids.append(pool.uuid)
    make(cache, may_replace)
    with open_pool(cache, volatile=True) as pool:
        uuids.append(pool.uuid)
        open_catalog(cache, pool.uuid).close()
        with pytest.raises(InUseError, match="in use"):
            make(cache, may_replace)
    assert uuids[0] != uuids[1]


def test_a_mount_that_serves_is_not_taken_for_a_dead_one(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One daemon finds a dead mount, and before it takes it off another one has done so and serves."""
    daemon = make_daemon()
    daemon.kill()
    is_dead = mounts.is_dead

    def slowly(fd: int) -> bool:
        found = is_dead(fd)
        daemon.mount()
        return found

    monkeypatch.setattr(mounts, "is_dead", slowly)
    mounts.detach_if_dead(daemon.mountpoint, mounts.FSTYPE)
    assert not daemon.status()["recovery"]["clean"]
    (daemon.path / "file").write_text("served")
    assert (daemon.path / "file").read_text() == "served"
