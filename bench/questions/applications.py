"""Question 11: programs that wait for their data to be durable, on a slow disk."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import re
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb

from bench.candidates import NATIVE, Served, own
from bench.disks import Absent
from bench.question import OWN, Bar, Figures, Question, Scale

SLOW_IOPS, DISK_MIB = 150, 4096
WAL, JOURNAL = "SQLite, WAL [commits/s]", "SQLite, rollback journal [commits/s]"
PGBENCH, LMDB = "pgbench TPC-B, 16 clients [tps]", "LMDB fill, synced [commits/s]"
MAILDIR = "Maildir delivery [mails/s]"
CLIENTS, PGBENCH_SCALE = 16, 10
UNHINDERED = NATIVE.on_loop(DISK_MIB, ", the disk never slow")
"""What the program, the processors and the fast disk leave to be had."""
MAIL = b"From: a\nTo: b\nSubject: c\n\n" + b"line of text\n" * 300


def measure(served: Served, scale: Scale) -> Figures:
    figures: Figures = {}
    for name, journal in ((WAL, "wal"), (JOURNAL, "delete")):
        with contextlib.closing(database(served.directory / journal, journal)) as connection:
            figures[name] = rate(served, scale, functools.partial(insert, connection))
    with lmdb.open(os.fspath(served.directory / "lmdb"), map_size=1 << 30) as environment:
        figures[LMDB] = rate(served, scale, lambda: put(environment))
    for name in ("tmp", "new"):
        (served.directory / "mail" / name).mkdir(parents=True)
    figures[MAILDIR] = rate(served, scale, lambda: deliver(served.directory / "mail"))
    return figures | {PGBENCH: pgbench(served, scale)}


def rate(served: Served, scale: Scale, work: Callable[[], None]) -> float:
    """How often a second ``work`` can be done on the slow disk, one after the other."""
    served.settle()
    with slow(served):
        began, count = time.monotonic(), 0
        while (took := time.monotonic() - began) < scale.seconds:
            work()
            count += 1
        return count / took


def slow(served: Served) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if served.candidate == UNHINDERED else served.disk.slow(SLOW_IOPS)


def database(path: Path, journal: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    if connection.execute(f"PRAGMA journal_mode={journal}").fetchone() != (journal,):
        raise RuntimeError(f"SQLite has no journal {journal} here")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE log (number INTEGER PRIMARY KEY, text TEXT)")
    return connection


def insert(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO log (text) VALUES (?)", ("text" * 25,))


def put(environment: lmdb.Environment) -> None:
    with environment.begin(write=True) as transaction:
        transaction.put(os.urandom(16), bytes(100))


def deliver(mail: Path) -> None:
    """As a mail server does it: the mail and then its name must be durable."""
    name = f"{time.time_ns()}.bench"
    with (mail / "tmp" / name).open("wb", buffering=0) as file:
        file.write(MAIL)
        os.fsync(file.fileno())
    os.rename(mail / "tmp" / name, mail / "new" / name)
    directory = os.open(mail / "new", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def pgbench(served: Served, scale: Scale) -> float:
    """Transactions a second; the database is made before the disk becomes slow."""
    with postgres(served.directory / "postgres") as run:
        run("pgbench", "-i", "-q", "-s", f"{PGBENCH_SCALE}", "postgres")
        run("psql", "-qc", "CHECKPOINT", "postgres")
        served.settle()
        with slow(served):
            words = ("-n", "-c", f"{CLIENTS}", "-T", f"{max(1, round(scale.seconds))}")
            said = run("pgbench", *words, "postgres")
    found = re.search(r"tps = ([\d.]+)", said)
    if found is None:
        raise RuntimeError(said)
    return float(found[1])


@contextlib.contextmanager
def postgres(data: Path) -> Iterator[Callable[..., str]]:
    """A private server with its data in ``data``; what is yielded runs one of its programs and returns the output."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries or os.geteuid() != 0:
        raise Absent("needs PostgreSQL, and root to start it as its own user")
    user = pwd.getpwnam("postgres")
    with tempfile.TemporaryDirectory(prefix="bench-postgres-") as sockets:
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGHOST": sockets}

        def run(name: str, *words: str | Path) -> str:
            done = subprocess.run(
                [binaries[-1] / name, *words],
                user=user.pw_uid,
                group=user.pw_gid,
                extra_groups=[],
                capture_output=True,
                text=True,
                cwd="/",
                env=environment,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr}")
            return done.stdout

        data.mkdir(mode=0o700)
        for path in (data, sockets):
            shutil.chown(path, user.pw_uid, user.pw_gid)
        run("initdb", "-D", data, "--auth=trust", "--no-instructions")
        options = f"-k {sockets} -c listen_addresses=''"
        run("pg_ctl", "-D", data, "-w", "-l", f"{sockets}/log", "-o", options, "start")
        try:
            yield run
        finally:
            run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


QUESTION = Question(
    number=11,
    title=f"applications on a slow disk ({SLOW_IOPS} requests a second)",
    about="Everything is made on the fast disk, which then becomes slow. SQLite commits one row with synchronous=FULL; "
    f"pgbench is at scale {PGBENCH_SCALE}; LMDB commits one value; a Maildir delivery writes, syncs and renames a mail "
    "of 4 KiB and syncs the directory. cachefsd passes names on to the backing at once: what makes names durable "
    "(a rollback journal, a delivery) waits for the disk; but the throttle lets commits of ext4's journal pass "
    "that no data goes with. And natively on the disk as long as it is fast.",
    candidates=[NATIVE.on_loop(DISK_MIB), own().on_loop(DISK_MIB)],
    peers=[UNHINDERED],
    measure=measure,
    bars=[
        *(Bar(figure, 20, of=NATIVE.name, candidate=OWN) for figure in (WAL, PGBENCH, LMDB)),
        *(Bar(figure, 1, of=NATIVE.name, candidate=OWN) for figure in (JOURNAL, MAILDIR)),
    ],
)
