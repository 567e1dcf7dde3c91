"""Databases on the mount: their servers and the daemon are killed, and every commit that was answered is there."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_daemon import PATIENCE_S, Daemon, MakeDaemon, daemons, make_daemon, public_directory, wait_until
from support_sqlite import check_log, create_log

__all__ = ["make_daemon"]

# ---- SQLite

WRITER = """
import sys
from support_sqlite import commit, connect, last_number
connection = connect(sys.argv[1])
number = last_number(connection)
while True:
    number += 1
    commit(connection, number)
    print(number, flush=True)
"""


@pytest.mark.parametrize("disk", [False, True], ids=["ram", "disk"])
@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_sqlite_keeps_every_commit(make_daemon: MakeDaemon, journal: str, disk: bool) -> None:
    daemon = make_daemon(disk=disk, options=("dirty_age=0.2",))
    path = daemon.path / "database"
    create_log(path, journal)
    commits = 0
    for kill_daemon in (False, True, True):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, path],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        )
        assert writer.stdout is not None
        target = commits + 60
        acknowledged = commits
        while acknowledged < target:
            acknowledged = int(writer.stdout.readline())
        if kill_daemon:
            daemon.kill()
            # Not communicate(timeout): it does not know what readline has left in its buffer.
            rest = writer.stdout.read().split()
            writer.wait(PATIENCE_S)
            daemon.mount()
        else:
            writer.kill()
            rest = writer.stdout.read().split()
            writer.wait(PATIENCE_S)
        commits = check_log(path, max([acknowledged, *map(int, rest)]))
    daemon.unmount("--flush")
    assert check_log(daemon.backing / "database", commits) == commits


# ---- PostgreSQL

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
COMMITS = """
\\set number random(1, 1000000)
INSERT INTO acknowledged (number) VALUES (:number);
"""


class Postgres:
    """A private server, of the user that Debian makes for it."""

    def __init__(self, daemon: Daemon, sockets: Path) -> None:
        self.data = daemon.path / "pgdata"
        self.sockets = sockets
        self._log = sockets / "log"
        self._user = pwd.getpwnam("postgres")
        self._environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGHOST": str(sockets), "PGDATABASE": "postgres"}

    def run(self, name: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [BINARIES[-1] / name, *arguments],
            user=self._user.pw_uid,
            group=self._user.pw_gid,
            extra_groups=[],
            capture_output=True,
            text=True,
            cwd="/",
            env=self._environment,
            check=False,
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{name}: {done.stderr}"
        return done

    def start_process(self, name: str, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BINARIES[-1] / name, *arguments],
            user=self._user.pw_uid,
            group=self._user.pw_gid,
            extra_groups=[],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.sockets,
            env=self._environment,
        )

    def start(self) -> None:
        options = f"-k {self.sockets} -c listen_addresses='' -c shared_buffers=16MB -c autovacuum=off"
        words = ["-D", self.data, "-w", "-t", "180", "-l", self._log, "-o", options]
        done = self.run("pg_ctl", *words, "start", check=False)
        assert done.returncode == 0, f"{done.stderr}\n{self._log.read_text()[-4000:]}"

    def stop(self, mode: str) -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop")

    def query(self, text: str) -> str:
        return self.run("psql", "-AtX", "-v", "ON_ERROR_STOP=1", "-c", text).stdout.strip()

    def kill(self) -> None:
        """The server's processes lose their file system and are killed, as by a crash of the machine."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ProcessLookupError):
                command = (process / "cmdline").read_bytes()
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if os.fsencode(str(self.data)) in command and parent == "1":
                    self._end(int(process.name))

    def _end(self, pid: int) -> None:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, 9)
        wait_until(lambda: not any(Path(f"/proc/{each}").exists() for each in (pid, *children)), "PostgreSQL's end")


@pytest.fixture
def postgres() -> Iterator[tuple[Daemon, Postgres]]:
    if not BINARIES or os.geteuid() != 0:
        pytest.skip("needs PostgreSQL, and root to start it as its own user")
    with public_directory() as base, daemons(base) as make:
        daemon = make(size="512M", options=("dirty_age=1",))
        sockets = base / "sockets"
        sockets.mkdir()
        user = pwd.getpwnam("postgres")
        shutil.chown(sockets, user.pw_uid, user.pw_gid)
        (daemon.path / "pgdata").mkdir(mode=0o700)
        shutil.chown(daemon.path / "pgdata", user.pw_uid, user.pw_gid)
        server = Postgres(daemon, sockets)
        try:
            yield daemon, server
        finally:
            server.kill()


def answers(directory: Path) -> list[int]:
    """How many commits of each script pgbench has logged in a directory; it does so when one was answered."""
    answered = [0, 0]
    for log in directory.glob("commits.*"):
        for line in log.read_text().splitlines():
            fields = line.split()
            if len(fields) >= 6:
                answered[int(fields[3])] += 1
    return answered


@pytest.mark.timeout(1200)
def test_postgresql_keeps_every_commit(postgres: tuple[Daemon, Postgres], tmp_path: Path) -> None:
    daemon, server = postgres
    server.run("initdb", "-D", server.data, "--auth=trust", "--no-instructions")
    server.start()
    server.query("CREATE TABLE acknowledged (id serial PRIMARY KEY, number int); CREATE EXTENSION amcheck")
    server.run("pgbench", "-i", "-q", "-s", "10")
    script = server.sockets / "script"
    script.write_text(COMMITS)
    words = ["-c", "4", "-T", "900", "-n", "-b", "tpcb-like", "-f", script, "-l", "--log-prefix=commits"]
    bench = server.start_process("pgbench", *words)
    try:
        wait_until(lambda: min(answers(server.sockets)) > 100, "commits")
        daemon.kill()
        server.kill()
        _, said = bench.communicate(timeout=PATIENCE_S)
    finally:
        bench.kill()
        bench.wait()
    assert "Run was aborted" in said
    answered = answers(server.sockets)
    daemon.mount()
    # The dead server's locks name a process that may still be there as a zombie, until init has waited for it.
    (server.data / "postmaster.pid").unlink(missing_ok=True)
    for left in server.sockets.glob(".s.PGSQL.*"):
        left.unlink()
    server.start()
    assert int(server.query("SELECT count(*) FROM pgbench_history")) >= answered[0]
    assert int(server.query("SELECT count(*) FROM acknowledged")) >= answered[1]
    balances = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)"
    assert server.query(balances) == "t"
    server.run("pg_amcheck", "--heapallindexed", "--install-missing")
    server.stop("fast")
    daemon.unmount("--flush")
    checked = server.run("pg_controldata", daemon.backing / "pgdata").stdout
    assert "shut down" in checked
