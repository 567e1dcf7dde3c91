"""A SQLite database that tells what is missing of it: a log of numbered rows, and a total of what was ever in it."""

from __future__ import annotations

import contextlib
import os
import sqlite3

BYTES_PER_STEP = 8
STEPS = 300


def create_log(path: str | os.PathLike[str], journal: str) -> None:
    """Make the tables; ``journal`` is ``wal`` or ``delete``."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
        connection.execute("CREATE TABLE log (number INTEGER PRIMARY KEY, text TEXT)")
        connection.execute("CREATE TABLE total (count INTEGER, bytes INTEGER)")
        connection.execute("INSERT INTO total VALUES (0, 0)")
        connection.commit()


def connect(path: str | os.PathLike[str]) -> sqlite3.Connection:
    """A connection whose commits are durable; the database must be there."""
    connection = sqlite3.connect(f"file:{os.fspath(path)}?mode=rw", uri=True, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def last_number(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(number), 0) FROM log").fetchone()[0])


def commit(connection: sqlite3.Connection, number: int) -> None:
    """One transaction: a row comes, old ones go, and the total changes with them. Returns when it is durable."""
    size = BYTES_PER_STEP * (number % STEPS)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO log VALUES (?, ?)", (number, f"{number:08}" * (number % STEPS)))
    connection.execute("UPDATE total SET count = count + 1, bytes = bytes + ?", (size,))
    connection.execute("DELETE FROM log WHERE number % 10 = 3 AND number < ? - 50", (number,))
    connection.execute("DELETE FROM log WHERE number < ? - 1000", (number,))
    connection.execute("COMMIT")


def check_log(path: str | os.PathLike[str], acknowledged: int) -> int:
    """Whole, and nothing lost that was committed; how many commits there are."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        count, size = connection.execute("SELECT count, bytes FROM total").fetchone()
        assert last_number(connection) == count
        assert acknowledged <= count <= acknowledged + 1
        assert size == sum(BYTES_PER_STEP * (number % STEPS) for number in range(1, count + 1))
        for number, text in connection.execute("SELECT number, text FROM log"):
            assert text == f"{number:08}" * (number % STEPS)
        return int(count)
