"""SQLite commits one row at a time, into a database with either journal."""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lab.workloads import all_at_once

# In mode DELETE, SQLite syncs the directory of the journal that it has removed only if told so: without that a commit
# may be undone, whatever the file system does (sqlite.org, pragma synchronous).
JOURNALS = {"wal": "full", "delete": "extra"}
KEPT = 100
"""rows"""


class Oracle:
    """The last row that was committed to each database."""

    def __init__(self, rng: random.Random) -> None:
        self.acknowledged = 0
        self._last = [0] * len(JOURNALS)

    def hear(self, *words: int) -> None:
        database, row = words
        assert row == self._last[database] + 1
        self._last[database] = row
        self.acknowledged += 1

    def told(self) -> list[int]:
        return self._last

    def settle(self, found: list[int]) -> None:
        self._last = found


def set_up(root: Path) -> None:
    for journal in JOURNALS:
        connection = _connect(root, journal)
        connection.execute("create table t (row integer primary key, content blob)")
        connection.close()


def _connect(root: Path, journal: str) -> sqlite3.Connection:
    connection = sqlite3.connect(root / f"{journal}.db", isolation_level=None, check_same_thread=False)
    assert connection.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
    connection.execute(f"pragma synchronous={JOURNALS[journal]}")
    return connection


def load(root: Path, told: list[int], say: Callable[..., None]) -> None:
    def writer(number: int, journal: str) -> None:
        connection = _connect(root, journal)
        row = told[number]
        while True:
            row += 1
            connection.execute("begin immediate")
            connection.execute("insert into t values (?, ?)", (row, content(journal, row)))
            connection.execute("delete from t where row <= ?", (row - KEPT,))
            connection.execute("commit")
            say(number, row)

    all_at_once(*(partial(writer, *each) for each in enumerate(JOURNALS)))


def content(journal: str, row: int) -> bytes:
    digest = hashlib.sha256(f"{journal} {row}".encode()).digest()
    return digest * (1 + digest[0] % 64)


def check(root: Path, told: list[int]) -> list[int]:
    """Returns the last row of each database: the one that was acknowledged last, or the next."""
    found = []
    for journal, acknowledged in zip(JOURNALS, told, strict=True):
        connection = _connect(root, journal)
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)], journal
        rows = connection.execute("select row, content from t order by row").fetchall()
        connection.close()
        last = rows[-1][0] if rows else 0
        assert acknowledged <= last <= acknowledged + 1, f"{journal}: row {last}, acknowledged: {acknowledged}"
        assert rows == [(row, content(journal, row)) for row in range(max(1, last - KEPT + 1), last + 1)], journal
        found.append(last)
    return found
