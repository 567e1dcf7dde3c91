"""The command line on real mounts: what works, and what each mistake is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support_daemon import PATIENCE_S, ROOT, Daemon, MakeDaemon, cachefsd, is_gone, make_daemon, wait_until
from support_fs import loop_mounted

from cachefsd import __version__
from cachefsd.cli import trouble
from cachefsd.fuse import mounts
from cachefsd.media.pool import open_pool
from cachefsd.media.ports import NO_FILE, SlotState
from cachefsd.service.places import note_path, runtime_directory, socket_path

__all__ = ["make_daemon"]


def refused(*arguments: str | os.PathLike[str]) -> str:
    """What a command that must fail says: one line."""
    done = cachefsd(*arguments, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.startswith("cachefsd: "), done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def mount_refused(daemon: Daemon, *arguments: str) -> str:
    words = [*arguments, *(["--volatile"] if "--volatile" not in arguments else [])]
    said = refused("mount", daemon.backing, daemon.mountpoint, "--cache", daemon.cache, *words)
    assert mounts.find_mount(daemon.mountpoint) is None
    return said


# ---- what works


def test_help_and_version() -> None:
    assert cachefsd("--version").stdout == f"cachefsd, version {__version__}\n"
    for command in ("format", "mount", "status", "flush", "unmount"):
        assert command in cachefsd("--help").stdout
        assert f"Usage: cachefsd {command}" in cachefsd(command, "--help").stdout


def test_a_bare_command_prints_its_help_as_help() -> None:
    done = cachefsd(check=False)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == cachefsd("--help").stdout
    assert "\n  unmount " in done.stdout


def test_the_exit_statuses_are_documented_and_the_service_agrees() -> None:
    readme, said = (ROOT / "README.md").read_text(), " ".join(cachefsd("--help").stdout.split())
    for number, text in ((1, "failed"), (2, "the command line"), (trouble.EXIT_SILENT, "a daemon does not answer")):
        assert f"\n| {number} | {text}" in readme
        assert f"{number} {text}" in said
    assert f"\n| {trouble.EXIT_DEAD} | `status`: the daemon of a mount has died |" in readme
    assert "\nRestartPreventExitStatus=2\n" in (ROOT / "systemd" / "cachefsd@.service").read_text()


def test_the_readme_names_packages_that_the_tests_install_too() -> None:
    (line,) = re.findall(r"^apt-get install (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    known = set((ROOT / ".ci" / "packages").read_text().split())
    assert set(line.split()) <= known
    assert {"fuse3", "libaio1", "libpmem1", "python3-dev"} <= set(line.split())


def test_data_goes_through_the_cache_and_reaches_the_backing_when_flushed(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    (daemon.path / "file").write_bytes(b"a" * 10_000)
    assert (daemon.path / "file").read_bytes() == b"a" * 10_000
    assert (daemon.backing / "file").read_bytes() == b""
    assert daemon.status()["dirty_bytes"] == 3 * 4096
    daemon.flush()
    assert (daemon.backing / "file").read_bytes() == b"a" * 10_000
    status = daemon.status()
    assert status["dirty_bytes"] == 0
    assert status["writeback"]["direct_bytes"] == 8192
    assert status["writeback"]["bounced_bytes"] == 10_000 - 8192
    daemon.unmount()
    assert mounts.find_mount(daemon.mountpoint) is None


def test_mounted_over_the_backing_itself(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(over=True)
    (daemon.path / "file").write_text("through")
    daemon.kill()
    with pytest.raises(OSError, match="not connected"):
        os.listdir(daemon.path)
    assert "dead mount" in daemon.mount().stderr + daemon.log()
    assert (daemon.path / "file").read_text() == "through"
    daemon.unmount("--flush")
    assert (daemon.backing / "file").read_text() == "through"


def test_status_for_programs(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    (daemon.path / "file").write_bytes(b"x" * 4096)
    status = daemon.status()
    assert status["mountpoint"] == str(daemon.mountpoint)
    assert status["backing"] == str(daemon.backing)
    assert status["cache"] == str(daemon.cache)
    assert not is_gone(status["pid"])
    assert status["durability"] == "ram"
    assert status["block_size"] == 4096
    slots = status["slots"]
    assert slots["total"] == sum(slots[state] for state in ("free", "clean", "dirty", "quarantined"))
    assert set(status["requests"]) == {"read_hits", "read_misses", "write_hits", "write_misses", "bypassed"}
    numbers = {"bytes", "direct_bytes", "bounced_bytes", "runs", "errors", "failing_files"}
    assert set(status["writeback"]) == {*numbers, "last_error", "failing"}
    assert set(status["recovery"]) == {"clean", "seconds", "blocks"}
    assert status["requests"]["write_misses"] == 1
    assert {"dirty_bytes", "oldest_dirty_s", "promotions", "evictions"} <= set(status)
    assert status["version"] == __version__


def test_status_for_people_and_of_all_mounts(make_daemon: MakeDaemon) -> None:
    one, other = make_daemon(), make_daemon(disk=True)
    assert "fsyncs survive power cuts" in cachefsd("status", other.mountpoint).stdout
    everything = cachefsd("status", check=False).stdout  # others of this machine may be dead
    assert str(one.mountpoint) in everything
    assert str(other.mountpoint) in everything
    listed = {status["mountpoint"] for status in json.loads(cachefsd("status", "--json", check=False).stdout)}
    assert {str(one.mountpoint), str(other.mountpoint)} <= listed


def test_dirty_data_stays_in_the_cache_when_unmounted(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    (daemon.path / "file").write_bytes(b"kept")
    daemon.unmount()
    assert (daemon.backing / "file").read_bytes() == b""
    daemon.mount()
    assert daemon.status()["recovery"] == pytest.approx({"clean": True, "seconds": 1, "blocks": 1}, abs=30)
    assert (daemon.path / "file").read_bytes() == b"kept"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "fusermount3"])
def test_every_orderly_end_leaves_a_clean_cache(make_daemon: MakeDaemon, how: str) -> None:
    daemon = make_daemon()
    (daemon.path / "file").write_bytes(b"kept")
    pid = daemon.pid
    if how == "fusermount3":
        subprocess.run(["fusermount3", "-u", daemon.mountpoint], check=True)
    else:
        os.kill(pid, signal.Signals[how])
    wait_until(lambda: is_gone(pid), "the daemon's end")
    assert mounts.find_mount(daemon.mountpoint) is None
    assert not socket_path(daemon.mountpoint).exists()
    daemon.mount()
    assert daemon.status()["recovery"]["clean"]
    assert (daemon.path / "file").read_bytes() == b"kept"


def test_after_a_kill_the_next_mount_recovers(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    (daemon.path / "file").write_bytes(b"acknowledged")
    daemon.kill_and_mount()
    assert not daemon.status()["recovery"]["clean"]
    assert (daemon.path / "file").read_bytes() == b"acknowledged"


def test_in_the_foreground_it_logs_to_the_terminal(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    words = ["mount", daemon.backing, daemon.mountpoint, "--cache", daemon.cache, "--size", "16M", "--volatile"]
    command = [sys.executable, "-m", "cachefsd", *words, "--foreground"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    daemon.pid = server.pid
    wait_until(lambda: mounts.find_mount(daemon.mountpoint) is not None, "the mount")
    (daemon.path / "file").write_bytes(b"data")
    server.send_signal(signal.SIGTERM)
    _, said = server.communicate(timeout=PATIENCE_S)
    assert server.returncode == 0
    assert "4096 bytes are still dirty, and kept" in said


def test_the_default_cache_is_found_again(make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = make_daemon(mount=False)
    if os.geteuid() != 0:
        monkeypatch.setenv("XDG_STATE_HOME", str(daemon.cache.parent))
    cachefsd("mount", daemon.backing, daemon.mountpoint, "--size", "16M")
    status = daemon.status()
    daemon.pid = status["pid"]
    try:
        (daemon.path / "file").write_bytes(b"kept")
        daemon.unmount()
        cachefsd("mount", daemon.backing, daemon.mountpoint)
        daemon.pid = daemon.status()["pid"]
        assert (daemon.path / "file").read_bytes() == b"kept"
    finally:
        daemon.destroy()
        shutil.rmtree(status["cache"])


def test_a_busy_mount_is_not_unmounted(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    with (daemon.path / "file").open("w") as file:
        said = refused("unmount", daemon.mountpoint)
        assert "busy" in said
        assert f"(process {os.getpid()}) has {daemon.path}/file open" in said
        file.write("still works")
        file.flush()
        assert (daemon.path / "file").read_text() == "still works"
    daemon.unmount()


def test_a_dead_mount_is_taken_off(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(over=True, options=("dirty_age=3600",))
    (daemon.path / "file").write_bytes(b"x" * 5000)
    daemon.kill()
    said = cachefsd("unmount", daemon.mountpoint).stdout
    assert f"8.0 KiB stay dirty in {daemon.cache}, and {daemon.mountpoint} shows the older content" in said
    assert mounts.find_mount(daemon.mountpoint) is None


def test_unmount_says_what_stays_where(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    (daemon.path / "file").write_bytes(b"x" * 5000)
    said = cachefsd("unmount", daemon.mountpoint).stdout
    assert said == f"{daemon.mountpoint} is unmounted; 8.0 KiB stay dirty in {daemon.cache}\n"
    assert "not mounted; 8.0 KiB dirty in" in cachefsd("status", daemon.mountpoint).stdout
    daemon.mount()
    said = cachefsd("unmount", "--flush", daemon.mountpoint).stdout
    assert said == f"{daemon.mountpoint} is unmounted; the backing has everything\n"
    assert "there is no cache in it" in refused("status", daemon.mountpoint)


def test_a_lazy_unmount_says_that_the_daemon_goes_on(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    with (daemon.path / "file").open("w"):
        said = cachefsd("unmount", "--lazy", daemon.mountpoint).stdout
        assert f"its daemon (process {daemon.pid}) ends when the last file is closed" in said
    wait_until(lambda: is_gone(daemon.pid), "the daemon's end")


def test_a_daemon_that_hangs_is_the_first_thing_that_status_says(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    (daemon.path / "file").write_bytes(b"x" * 5000)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        said = (
            f"{daemon.mountpoint}: THE DAEMON (process {daemon.pid}) DOES NOT ANSWER; 8.0 KiB dirty in {daemon.cache}."
        )
        for words in (["status"], ["status", daemon.mountpoint], ["status", daemon.cache]):
            done = cachefsd(*words, check=False)
            # Another daemon of this machine may be dead.
            assert done.returncode == 3 or (words == ["status"] and done.returncode == 4)
            if words == ["status"]:  # others that do not answer share its time
                wait_until(lambda: said in cachefsd("status", check=False).stdout, said)
            else:
                assert said in done.stdout
        found = json.loads(cachefsd("status", "--json", daemon.mountpoint, check=False).stdout)
        assert (found["state"], found["dirty_bytes"], found["pid"]) == ("silent", 8192, daemon.pid)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert cachefsd("status", daemon.mountpoint).returncode == 0


def test_a_dead_mount_is_the_first_thing_that_status_says(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    (daemon.path / "file").write_bytes(b"x" * 5000)
    daemon.kill()
    for words in (["status"], ["status", daemon.mountpoint]):
        done = cachefsd(*words, check=False)
        assert done.returncode == 4
        said = f"{daemon.mountpoint}: DEAD MOUNT, its daemon has died; 8.0 KiB dirty in {daemon.cache}."
        assert said in done.stdout
    # Without its note too, where the cache is the one that it has by default; here it is another.
    note_path(daemon.mountpoint).unlink()
    assert "its cache is not known" in cachefsd("status", daemon.mountpoint, check=False).stdout
    offline = cachefsd("status", daemon.cache).stdout
    assert "NOT in order" in offline
    assert "8.0 KiB in 1 files" in offline
    daemon.mount()
    assert cachefsd("status", daemon.cache).stdout.startswith(f"{daemon.mountpoint}\n")


def test_status_has_long_lines_where_nobody_counts_columns(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    said = cachefsd("status", daemon.mountpoint).stdout
    assert max(map(len, said.splitlines())) > 80


def test_a_slot_on_bad_media_is_not_called_lost_without_a_daemon(tmp_path: Path) -> None:
    cachefsd("format", tmp_path / "cache", "--size", "8M", "--volatile")
    with open_pool(tmp_path / "cache", volatile=True) as pool:
        pool.mark_open()
        pool.publish(0, SlotState.QUARANTINED, 1, NO_FILE, 0, 0, 0, 4096)
    said = cachefsd("status", tmp_path / "cache").stdout
    assert "1 slots, set aside" in said
    assert "LOST" not in said


# ---- format


def test_format_makes_a_private_directory_with_pool_and_catalog(tmp_path: Path) -> None:
    cachefsd("format", tmp_path / "cache", "--size", "16M", "--block-size", "64K")
    assert (tmp_path / "cache" / "pool").stat().st_size == 16 << 20
    assert (tmp_path / "cache" / "catalog" / "data.mdb").exists()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_format_keeps_dirty_data_unless_told_and_confirmed(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=3600",))
    (daemon.path / "file").write_bytes(b"precious")
    again = ("format", daemon.cache, "--size", "32M", "--volatile")
    assert "in use by another daemon" in refused(*again, "--discard-dirty", "--yes")
    daemon.unmount()
    said = refused(*again)
    assert "1 dirty blocks" in said
    assert str(daemon.backing) in said
    assert "--discard-dirty" in said
    assert "--discard-dirty" in refused(*again, "--yes")
    assert "--yes" in refused(*again, "--discard-dirty")
    daemon.mount()
    assert (daemon.path / "file").read_bytes() == b"precious"
    daemon.unmount()
    cachefsd(*again, "--discard-dirty", "--yes")
    assert (daemon.cache / "pool").stat().st_size == 32 << 20
    said = mount_refused(daemon)
    assert "formatted again" in said
    daemon.mount("--without-cache", said.split()[-1])
    assert (daemon.path / "file").read_bytes() == b""


def test_format_replaces_a_cache_without_dirty_data_when_confirmed(tmp_path: Path) -> None:
    words = ("format", tmp_path / "cache", "--size", "16M")
    cachefsd(*words)
    assert "without dirty data" in refused(*words)
    cachefsd(*words, "--yes")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "1K"], "too small"),
        (["--size", "lots"], "'lots' is not a size"),
        (["--size", "16M", "--block-size", "5000"], "power of two"),
        (["--size", "900T"], "too many blocks"),
        (["--size", "7T"], "free"),
        ([], "--size"),
    ],
)
def test_format_refuses_impossible_sizes(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in refused("format", tmp_path / "cache", *words)
    assert not (tmp_path / "cache" / "pool").exists()


@pytest.mark.parametrize("place", ["/dev/null", "/dev/zero", "/", "/dev/dax-that-is-not-there"])
def test_format_refuses_places_that_are_no_device_dax(tmp_path: Path, place: str) -> None:
    cachefsd("format", tmp_path / "cache", "--size", "16M")
    before = (tmp_path / "cache" / "pool").stat().st_ino
    words = ("--discard-dirty", "--discard-foreign", "--yes")
    said = refused("format", tmp_path / "cache", "--pool", place, *words)
    assert said.startswith(f"cachefsd: {place}: ")
    assert (tmp_path / "cache" / "pool").stat().st_ino == before


def test_format_touches_nothing_that_is_not_a_cache(tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("my own file")
    assert "not a pool of cachefsd" in refused("format", tmp_path, "--size", "16M", "--discard-dirty", "--yes")
    assert (tmp_path / "pool").read_text() == "my own file"


@pytest.mark.parametrize(
    "name", ["letter", "catalog/item", "catalog/data.mdb/x", "lost+found/found", "lock", "cachefsd.log/x", "pool"]
)
def test_format_of_a_directory_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    (data / name).parent.mkdir(parents=True)
    (data / name).write_text("somebody's")
    for path in (data, *data.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = {path: path.lstat().st_mode for path in (data, *data.rglob("*"))}
    (tmp_path / "backing").mkdir()
    for words in (
        ["format", data, "--size", "16M", "--discard-dirty", "--yes"],
        ["mount", tmp_path / "backing", "--cache", data, "--size", "16M"],
    ):
        assert str(data) in refused(*words)
    assert {path: path.lstat().st_mode for path in (data, *data.rglob("*"))} == before
    assert (data / name).read_text() == "somebody's"


def test_format_takes_an_empty_directory_and_the_top_of_a_new_file_system(tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as top:
        assert os.listdir(top) == ["lost+found"]
        cachefsd("format", top, "--size", "16M")
        cachefsd("format", top, "--size", "8M", "--yes")


def test_a_file_that_only_begins_as_an_unfinished_pool_is_kept(tmp_path: Path) -> None:
    image = bytes(64 << 10) + b"_BHRfS_M" + bytes(64 << 10)
    (tmp_path / "pool").write_bytes(image)
    assert "not a pool of cachefsd" in refused("format", tmp_path, "--size", "16M", "--discard-dirty", "--yes")
    assert (tmp_path / "pool").read_bytes() == image


@pytest.mark.parametrize(
    "words",
    [
        ["format", "", "--size", "16M"],
        ["mount", ""],
        ["mount", "/tmp", ""],
        ["mount", "/tmp", "--cache", "", "--size", "16M"],
        ["mount", "/tmp", "-o", "cache=", "--size", "16M"],
        ["mount", "/tmp", "-o", "size="],
        ["status", ""],
        ["flush", ""],
        ["unmount", ""],
    ],
)
def test_an_empty_path_is_no_path(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(*words)
    assert os.listdir(tmp_path) == []


SELF_STOPPING = """
import os, signal, sys
from cachefsd.service import caches
number = getattr(signal, sys.argv.pop(1))
caches.create_catalog = lambda *_: os.kill(os.getpid(), number)
from cachefsd.cli.main import main
main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("command", ["format", "mount"])
def test_what_an_interrupted_format_has_made_is_taken_away(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "backing").mkdir()
    cache = tmp_path / "a" / "b" / "cache"
    words = ["format", cache] if command == "format" else ["mount", tmp_path / "backing", "--cache", cache]
    program = [sys.executable, "-c", SELF_STOPPING, name, *words, "--size", "16M"]
    done = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.Signals[name], "cachefsd: interrupted\n")
    assert os.listdir(tmp_path) == ["backing"]


def test_a_refused_mount_leaves_no_cache_behind(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    (tmp_path / "mnt").mkdir()
    (tmp_path / "there").mkdir(mode=0o755)
    for cache in (tmp_path / "new" / "cache", tmp_path / "there"):
        before = sorted(os.listdir(tmp_path))
        said = refused("mount", daemon.backing, tmp_path / "mnt", "--cache", cache, "--size", "16M")
        assert "already cached by another daemon" in said
        assert sorted(os.listdir(tmp_path)) == before
        assert not cache.exists() or os.listdir(cache) == []
    daemon.unmount()
    refused("mount", daemon.backing, tmp_path / "mnt", "--cache", daemon.cache / "..", "--size", "16M")
    daemon.mount()


def test_tmpfs_must_be_asked_for(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    assert "survives a power cut" in refused("format", daemon.cache, "--size", "16M")
    cachefsd("format", daemon.cache, "--size", "16M", "--volatile")
    said = refused("mount", daemon.backing, daemon.mountpoint, "--cache", daemon.cache)
    assert "survives a power cut" in said


# ---- mistakes about places


def test_a_backing_that_is_not_there(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    shutil.rmtree(daemon.backing)
    assert "does not exist" in mount_refused(daemon, "--size", "16M")
    daemon.backing.write_text("")
    assert "is not a directory" in mount_refused(daemon, "--size", "16M")
    assert not daemon.cache.exists()


def test_a_mount_point_that_is_not_there(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    daemon.mountpoint.rmdir()
    assert "mount point" in mount_refused(daemon, "--size", "16M")
    daemon.mountpoint.write_text("")
    assert "is not a directory" in mount_refused(daemon, "--size", "16M")


def test_a_backing_that_may_not_be_read(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    daemon.backing.chmod(0)
    # As root nothing is unreadable: drop the capabilities that make it so.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    words = ["mount", daemon.backing, daemon.mountpoint, "--cache", daemon.cache, "--size", "16M", "--volatile"]
    command = [*(drop if os.geteuid() == 0 else []), sys.executable, "-m", "cachefsd", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    daemon.backing.chmod(0o755)
    assert done.returncode == 1
    assert "cannot read the backing" in done.stderr or "cannot open the backing" in done.stderr


@pytest.mark.parametrize("place", ["/proc", "/sys/kernel", "/dev", "/proc/self/root/proc"])
def test_a_file_system_of_the_kernel_is_refused(make_daemon: MakeDaemon, place: str) -> None:
    if not os.path.isdir(place):
        pytest.skip(f"{place} is not there")
    daemon = make_daemon(mount=False)
    for words in ([place, daemon.mountpoint], [daemon.backing, place]):
        said = refused("mount", *words, "--cache", daemon.cache, "--size", "16M", "--volatile")
        assert "belongs to the kernel" in said
    assert not daemon.cache.exists()


def test_a_mount_point_inside_the_cache_is_refused(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    cachefsd("format", daemon.cache, "--size", "16M", "--volatile")
    daemon.mountpoint = daemon.cache / "catalog"
    said = mount_refused(daemon)
    assert f"the mount point {daemon.mountpoint} must not be inside the cache" in said


def test_a_size_that_is_not_used_is_said(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(size="16M")
    daemon.unmount()
    words = ["mount", daemon.backing, daemon.mountpoint, "--cache", daemon.cache, "--volatile"]
    said = cachefsd(*words, "--size", "1G").stderr
    daemon.pid = daemon.status()["pid"]
    assert f"the cache {daemon.cache} has 16.0 MiB; --size 1.0 GiB changes nothing" in said
    assert said.count("\n") == 1
    daemon.unmount()
    assert "--size" not in cachefsd(*words, "--size", "16M").stderr
    daemon.pid = daemon.status()["pid"]


def test_a_read_only_backing_is_said_and_nothing_is_accepted_for_it(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as backing:
        (backing / "file").write_text("there")
        subprocess.run(["mount", "-o", "remount,ro", backing], check=True)
        daemon = make_daemon(backing, mount=False)
        assert "is read-only, and so is the mount" in daemon.mount().stderr
        assert (daemon.path / "file").read_text() == "there"
        with pytest.raises(OSError, match="Read-only"):
            (daemon.path / "file").write_text("lost")
        daemon.unmount()


def test_a_cache_that_is_not_there(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    assert "there is no cache" in mount_refused(daemon)


def test_a_cache_that_is_in_use(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    (tmp_path / "other").mkdir()
    (tmp_path / "mnt").mkdir()
    said = refused("mount", tmp_path / "other", tmp_path / "mnt", "--cache", daemon.cache, "--volatile")
    assert f"in use by another daemon (process {daemon.pid})" in said


def test_a_backing_that_is_in_use(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    (tmp_path / "mnt").mkdir()
    said = refused("mount", daemon.backing, tmp_path / "mnt", "--cache", tmp_path / "c", "--size", "16M")
    assert "already cached by another daemon" in said


def test_a_mount_point_that_is_served_already(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    said = refused("mount", daemon.backing, daemon.mountpoint, "--cache", daemon.cache, "--volatile")
    assert "already" in said
    (daemon.path / "file").write_text("still served")


@pytest.mark.parametrize("where", ["inside the backing", "the backing", "inside the mount point"])
def test_a_cache_in_the_wrong_place(make_daemon: MakeDaemon, where: str) -> None:
    daemon = make_daemon(mount=False)
    daemon.cache = {
        "inside the backing": daemon.backing / "deep" / "cache",
        "the backing": daemon.backing,
        "inside the mount point": daemon.mountpoint / "cache",
    }[where]
    assert "must not be inside" in mount_refused(daemon, "--size", "16M")
    assert list(daemon.backing.iterdir()) == []


def test_a_cache_of_another_backing(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    (daemon.path / "file").write_text("mine")
    daemon.unmount()
    (tmp_path / "other").mkdir()
    said = refused("mount", tmp_path / "other", daemon.mountpoint, "--cache", daemon.cache, "--volatile")
    assert f"belongs to another backing ({daemon.backing})" in said
    daemon.mount()
    assert (daemon.path / "file").read_text() == "mine"


def test_a_backing_whose_file_system_is_not_mounted(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as mountpoint:
        daemon = make_daemon(mountpoint)
        (daemon.path / "file").write_text("mine")
        daemon.unmount()
        subprocess.run(["umount", mountpoint], check=True)
        assert "is its file system mounted?" in mount_refused(daemon)
        subprocess.run(["mount", "-o", "loop", tmp_path / "ext4.img", mountpoint], check=True)
        daemon.mount()
        assert (daemon.path / "file").read_text() == "mine"
        daemon.unmount("--flush")


def test_without_dev_fuse(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon(mount=False)
    # A device node where devices are forbidden cannot be opened, not even by root.
    node = 'mount -t tmpfs -o nodev none "$0" && mknod "$0/fuse" c 10 229 && mount --bind "$0/fuse" /dev/fuse'
    script = f'{node} && "$@"'
    words = ["mount", daemon.backing, daemon.mountpoint, "--cache", daemon.cache, "--size", "16M", "--volatile"]
    (tmp_path / "dev").mkdir()
    command = ["unshare", "--mount", "sh", "-c", script, tmp_path / "dev", sys.executable, "-m", "cachefsd", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "cannot open /dev/fuse" in done.stderr
    assert "module" not in done.stderr
    assert mounts.find_mount(daemon.mountpoint) is None
    daemon.mount()


# ---- damage


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def with_data(make_daemon: MakeDaemon) -> Daemon:
    """An unmounted daemon with one dirty block."""
    daemon = make_daemon(options=("dirty_age=3600",))
    (daemon.path / "file").write_text("mine")
    daemon.unmount()
    return daemon


@pytest.mark.parametrize("copy", [0, 1])
def test_one_damaged_superblock_is_repaired_and_said(make_daemon: MakeDaemon, copy: int) -> None:
    daemon = with_data(make_daemon)
    overwrite(daemon.cache / "pool", copy * 4096 + 100, b"\xff" * 64)
    assert "superblock" in daemon.mount().stderr
    assert (daemon.path / "file").read_text() == "mine"
    daemon.unmount()
    assert "superblock" not in daemon.mount().stderr


def test_two_damaged_superblocks_are_refused(make_daemon: MakeDaemon) -> None:
    daemon = with_data(make_daemon)
    pool = daemon.cache / "pool"
    before = pool.read_bytes()
    for copy in (0, 1):
        overwrite(pool, copy * 4096 + 100, b"\xff" * 64)
    damaged = pool.read_bytes()
    assert "both superblocks of the pool are damaged" in mount_refused(daemon, "--size", "16M")
    assert pool.read_bytes() == damaged
    assert "damaged" in refused("format", daemon.cache, "--size", "16M", "--volatile", "--yes")
    pool.write_bytes(before)
    daemon.mount()
    assert (daemon.path / "file").read_text() == "mine"


def test_a_truncated_pool_is_refused(make_daemon: MakeDaemon) -> None:
    daemon = with_data(make_daemon)
    pool = daemon.cache / "pool"
    whole = pool.read_bytes()
    os.truncate(pool, len(whole) - 4096)
    assert "it was cut, extended or replaced" in mount_refused(daemon)
    pool.write_bytes(whole)
    daemon.mount()
    assert (daemon.path / "file").read_text() == "mine"


def test_a_pool_of_a_newer_format_is_refused(make_daemon: MakeDaemon) -> None:
    from cachefsd.media.superblock import Superblock

    daemon = with_data(make_daemon)
    pool = daemon.cache / "pool"
    for copy in (0, 1):
        superblock = Superblock.unpack(pool.read_bytes()[copy * 4096 : (copy + 1) * 4096])
        assert superblock is not None
        object.__setattr__(superblock, "version", 99)
        overwrite(pool, copy * 4096, superblock.pack())
    assert "format version 99" in mount_refused(daemon)


def test_a_file_that_is_no_pool_is_refused(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    daemon.cache.mkdir()
    (daemon.cache / "pool").write_text("something else")
    assert "not a pool of cachefsd" in mount_refused(daemon, "--size", "16M")


def test_an_interrupted_format_is_refused_and_finished(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    daemon.cache.mkdir()
    (daemon.cache / "pool").write_bytes(bytes(16 << 20))
    said = mount_refused(daemon, "--size", "16M")
    assert "never finished formatting" in said
    assert "`cachefsd format`" in said
    cachefsd("format", daemon.cache, "--size", "16M", "--volatile")
    daemon.mount()


@pytest.mark.parametrize("damage", ["missing", "garbage", "of another pool"])
def test_a_catalog_that_cannot_be_used(make_daemon: MakeDaemon, tmp_path: Path, damage: str) -> None:
    daemon = with_data(make_daemon)
    catalog, aside = daemon.cache / "catalog", tmp_path / "aside"
    shutil.copytree(catalog, aside)
    if damage == "missing":
        shutil.rmtree(catalog)
    elif damage == "garbage":
        (catalog / "data.mdb").write_bytes(os.urandom(64 << 10))
    else:
        cachefsd("format", tmp_path / "other", "--size", "16M")
        shutil.rmtree(catalog)
        shutil.copytree(tmp_path / "other" / "catalog", catalog)
    said = mount_refused(daemon)
    assert "catalog" in said
    assert "1 dirty blocks" in said
    shutil.rmtree(catalog, ignore_errors=True)
    shutil.copytree(aside, catalog)
    daemon.mount()
    assert (daemon.path / "file").read_text() == "mine"


# ---- mistakes about daemons


def test_commands_about_what_is_not_mounted(tmp_path: Path) -> None:
    for command in ("status", "flush"):
        assert f"no cachefsd serves {tmp_path}" in refused(command, tmp_path)
    assert "is not mounted" in refused("unmount", tmp_path)


def test_a_socket_of_a_dead_daemon_is_in_nobodys_way(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.kill()
    assert socket_path(daemon.mountpoint).exists()
    daemon.mount()
    assert runtime_directory().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("words", [["mount"], ["mount", "--bogus"], ["flush"], ["bogus"], ["mount", "a", "b", "c"]])
def test_wrong_usage(words: list[str]) -> None:
    assert "--help" in refused(*words)


def test_an_unknown_option(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    assert "did you mean 'dirty_age'" in mount_refused(daemon, "--size", "16M", "-o", "dirty_aeg=1")
    assert not daemon.cache.exists()
