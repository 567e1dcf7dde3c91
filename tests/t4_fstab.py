"""The helpers of mount(8) and umount(8), called as those do; mount(8) itself calls them in the lab."""

from __future__ import annotations

import configparser
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support_daemon import PATIENCE_S, ROOT, Daemon, MakeDaemon, cachefsd, is_gone, make_daemon, wait_until
from support_fs import loop_mounted

from cachefsd.fuse import mounts
from cachefsd.service.config import parse_options

__all__ = ["make_daemon"]
EXAMPLE = ROOT / "systemd" / "fstab.example"
GENERATOR = Path("/lib/systemd/system-generators/systemd-fstab-generator")
# What util-linux 2.38 makes of a line with all of it.
OF_MOUNT = "rw,relatime,nosuid,noexec,nodev,nofail,_netdev,user"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs ``cachefsd`` by one of its names."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program = directory / "cachefsd"
    program.write_text(f"#!{sys.executable} -P\nfrom cachefsd.cli.main import main\n\nmain()\n")
    program.chmod(0o755)
    for name in ("mount.fuse.cachefsd", "umount.fuse.cachefsd"):
        (directory / name).symlink_to(program)

    def run(name: str, *words: str | os.PathLike[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [directory / name, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        )

    return run


def mount(run: Run, daemon: Daemon, options: str = "") -> None:
    words = f"{OF_MOUNT},cache={daemon.cache},size=16M,volatile,dirty_age=3600{options}"
    done = run("mount.fuse.cachefsd", daemon.backing, daemon.mountpoint, "-v", "-o", words)
    assert done.returncode == 0, done.stderr
    daemon.pid = daemon.ask("status")["pid"]


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert done.stderr.startswith("cachefsd: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    return make_daemon(mount=False)


def test_mounted_with_the_options_of_fstab(run: Run, daemon: Daemon) -> None:
    mount(run, daemon)
    entry = mounts.find_mount(daemon.mountpoint)
    assert entry is not None
    assert {"nosuid", "nodev", "noexec", "rw"} <= entry.options
    assert entry.source == str(daemon.backing)
    (daemon.path / "file").write_bytes(b"x" * 5000)
    assert (daemon.backing / "file").read_bytes() == b""


def test_unmounted_when_the_daemon_has_let_go_of_everything(run: Run, daemon: Daemon) -> None:
    """umount(8) alone comes back while the daemon still has files open beneath: those could not be unmounted next."""
    mount(run, daemon)
    (daemon.path / "file").write_bytes(b"kept")
    pid = daemon.pid
    done = run("umount.fuse.cachefsd", daemon.mountpoint, "-v")
    assert done.returncode == 0, done.stderr
    assert is_gone(pid)
    assert mounts.find_mount(daemon.mountpoint) is None
    mount(run, daemon)
    status = daemon.ask("status")
    assert status["recovery"]["clean"]
    assert status["dirty_bytes"] == 4096
    assert (daemon.path / "file").read_bytes() == b"kept"


def test_a_busy_mount_stays_unless_lazily_unmounted(run: Run, daemon: Daemon) -> None:
    mount(run, daemon)
    with (daemon.path / "file").open("wb", buffering=0) as file:
        assert "busy" in refused(run("umount.fuse.cachefsd", daemon.mountpoint))
        file.write(b"still served")
        assert (daemon.path / "file").read_bytes() == b"still served"
        assert run("umount.fuse.cachefsd", daemon.mountpoint, "-l").returncode == 0
        assert mounts.find_mount(daemon.mountpoint) is None
    wait_until(lambda: is_gone(daemon.pid), "the daemon's end")


def test_a_dead_mount_is_unmounted(run: Run, daemon: Daemon) -> None:
    mount(run, daemon)
    daemon.kill()
    assert run("umount.fuse.cachefsd", daemon.mountpoint).returncode == 0
    assert mounts.find_mount(daemon.mountpoint) is None


def test_unmounting_by_force_does_not_ask_a_daemon_that_hangs(run: Run, daemon: Daemon) -> None:
    mount(run, daemon)
    (daemon.path / "file").write_bytes(b"acknowledged")
    pid = daemon.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        done = run("umount.fuse.cachefsd", daemon.mountpoint, "-l", "-f")
        assert done.returncode == 0, done.stderr
        assert mounts.find_mount(daemon.mountpoint) is None
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: is_gone(pid), "the daemon's end")
    mount(run, daemon)
    assert (daemon.path / "file").read_bytes() == b"acknowledged"


OF_REMOUNT = "relatime,remount,user_id=0,group_id=0,default_permissions,allow_other,cache=/else,x-systemd.automount"


def remounted(run: Run, daemon: Daemon, program: str, word: str) -> subprocess.CompletedProcess[str]:
    """What mount(8) and /sbin/mount.fuse call, and what people do."""
    if program == "cachefsd mount":
        return run("cachefsd", "mount", daemon.mountpoint, "-o", f"remount,{word}")
    return run(program, daemon.backing, daemon.mountpoint, "-o", f"{word},{OF_REMOUNT}")


@pytest.mark.parametrize("program", ["mount.fuse.cachefsd", "cachefsd", "cachefsd mount"])
def test_remounted_read_only_and_back(run: Run, daemon: Daemon, program: str) -> None:
    mount(run, daemon)
    pid = daemon.pid
    (daemon.path / "file").write_bytes(b"before")
    with (daemon.path / "file").open("ab"):
        said = refused(remounted(run, daemon, program, "ro"))
        assert "open for writing" in said
        assert f"(process {os.getpid()}) has {daemon.path}/file open" in said
    done = remounted(run, daemon, program, "ro")
    assert (done.returncode, done.stderr) == (0, "")
    entry = mounts.find_mount(daemon.mountpoint)
    assert entry is not None
    assert {"ro", "nosuid", "nodev", "noexec"} <= entry.options
    assert (daemon.path / "file").read_bytes() == b"before"
    with pytest.raises(OSError, match="Read-only"):
        (daemon.path / "file").write_bytes(b"after")
    cachefsd("flush", daemon.mountpoint)  # the cache still writes to the backing
    assert (daemon.backing / "file").read_bytes() == b"before"
    assert remounted(run, daemon, program, "rw").returncode == 0
    (daemon.path / "file").write_bytes(b"after")
    assert daemon.ask("status")["pid"] == pid


def test_a_remount_says_what_it_does_not_change(run: Run, daemon: Daemon) -> None:
    mount(run, daemon)
    done = run("cachefsd", "mount", daemon.backing, daemon.mountpoint, "-o", "remount,ro,dirty_age=9,sync")
    assert done.returncode == 0
    assert "does not change dirty_age, sync" in done.stderr


def test_a_remount_over_a_read_only_backing_is_refused(run: Run, daemon: Daemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as backing:
        subprocess.run(["mount", "-o", "remount,ro", backing], check=True)
        daemon.backing = backing
        for place in (daemon.mountpoint, backing):
            daemon.mountpoint = place
            mount(run, daemon)
            said = refused(run("cachefsd", "mount", daemon.mountpoint, "-o", "remount,rw"))
            assert f"the backing {backing} is read-only" in said
            assert run("umount.fuse.cachefsd", daemon.mountpoint).returncode == 0


def test_what_is_not_mounted_is_not_remounted(run: Run, daemon: Daemon) -> None:
    done = run("mount.fuse.cachefsd", daemon.backing, daemon.mountpoint, "-o", "remount,ro")
    assert "cachefsd is not mounted on" in refused(done)


def test_mount_itself_remounts(run: Run, daemon: Daemon) -> None:
    """Without a helper, as it does where none is installed."""
    mount(run, daemon)
    for word in ("ro", "rw"):
        subprocess.run(["mount", "--internal-only", "-o", f"remount,{word}", daemon.mountpoint], check=True)
        entry = mounts.find_mount(daemon.mountpoint)
        assert entry is not None
        assert word in entry.options


def test_mounted_as_mount_fuse_does_it(run: Run, daemon: Daemon) -> None:
    words = f"rw,dev,suid,cache={daemon.cache},size=16M,volatile"
    done = run("cachefsd", daemon.backing, daemon.mountpoint, "-o", words)
    assert done.returncode == 0, done.stderr
    daemon.pid = daemon.ask("status")["pid"]


def test_mount_fake_does_nothing(run: Run, daemon: Daemon) -> None:
    done = run("mount.fuse.cachefsd", daemon.backing, daemon.mountpoint, "-f", "-o", f"rw,cache={daemon.cache}")
    assert (done.returncode, done.stderr) == (0, "")
    assert mounts.find_mount(daemon.mountpoint) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mount.fuse.cachefsd", "/a"], "takes the backing and the mount point"),
        (["mount.fuse.cachefsd", "/a", "/b", "-x"], "-x not recognized"),
        (["mount.fuse.cachefsd", "/does not exist", "/tmp", "-o", "rw"], "/does not exist does not exist"),
        (["mount.fuse.cachefsd", "/tmp", "/tmp", "-o", "rw,catche=/c"], "did you mean 'cache'"),
        (["umount.fuse.cachefsd"], "takes the mount point"),
        (["umount.fuse.cachefsd", "/"], "cachefsd is not mounted on /"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(run: Run, words: list[str], said: str) -> None:
    assert said in refused(run(*words))


def test_the_current_directory_runs_nothing(run: Run, daemon: Daemon, tmp_path: Path) -> None:
    """The daemon in the background was whatever called itself cachefsd in the directory where root happened to be."""
    trap = tmp_path / "trap" / "cachefsd"
    trap.mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        (trap / name).write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    words = ["--cache", daemon.cache, "--size", "16M", "--volatile"]
    done = run("cachefsd", "mount", daemon.backing, daemon.mountpoint, *words, cwd=trap.parent)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "sprung").exists()
    daemon.pid = daemon.ask("status")["pid"]


# ---- the lines that we show


def lines() -> list[str]:
    return [line.lstrip("#") for line in EXAMPLE.read_text().splitlines() if "fuse.cachefsd cache=" in line]


def test_the_readme_shows_the_line_of_the_example() -> None:
    local, _ = lines()
    assert f"\n{local}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("number", "target"), [(0, "local-fs.target"), (1, "remote-fs.target")])
def test_systemd_orders_the_lines_as_the_example_says(tmp_path: Path, number: int, target: str) -> None:
    if not GENERATOR.exists():
        pytest.skip("no systemd-fstab-generator")
    line = lines()[number]
    backing, mountpoint, _, options, *_ = line.split()
    assert parse_options([options]).places == {"cache": "/mnt/pmem/cache"}
    (tmp_path / "fstab").write_text(f"{line}\n")
    subprocess.run([GENERATOR, *[tmp_path] * 3], env={"SYSTEMD_FSTAB": str(tmp_path / "fstab")}, check=True)
    assert (tmp_path / f"{target}.requires" / "srv-data.mount").exists()
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=["="])
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read(tmp_path / "srv-data.mount")
    assert parser["Unit"]["Before"] == target
    # That a local one waits for its backing goes without saying.
    named = {"/mnt/pmem"} if number == 0 else {"/mnt/pmem", backing}
    assert set(parser["Unit"]["RequiresMountsFor"].split()) == named
    assert parser["Mount"]["What"] == backing
    assert parser["Mount"]["Where"] == mountpoint
