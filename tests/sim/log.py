"""What happened, in order: every store, flush and fence, every change of the catalog and of the backing.

A run of the engine is recorded once. Crashes are made offline from prefixes of the record: nothing that a crash
could leave behind depends on anything else.
"""

from __future__ import annotations

from typing import Any, Final

STORE: Final = 0
"""(offset, bytes): words of the pool, in the order in which they were stored; both multiples of 8"""
FLUSH: Final = 1
"""(offset, length): the lines start their way to the media"""
FENCE: Final = 2
"""(): what was flushed before has arrived (a store of class ``disk`` knows no fences)"""
SYNC: Final = 3
"""(mark,): class ``disk``: what was stored before event number ``mark`` has arrived"""
SUPERBLOCK: Final = 4
"""(index, superblock): one of the two is being written; it has arrived with the next event"""
CATALOG: Final = 5
"""(state,): a transaction of the catalog is durable"""
BACKING: Final = 6
"""(operation, ...): see sim/backing.py"""
BEGIN: Final = 7
"""(): a user asks for something"""
ACK: Final = 8
"""(): a user is told that it is done"""
FAULT: Final = 9
"""(call,): a call has failed that was to fail"""

Event = tuple[int, Any, Any]


class Violation(Exception):
    """A promise is broken."""


class Log:
    """The record of one run."""

    __slots__ = ("events", "job_mark")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.job_mark: int | None = None
        """While a job of a worker thread runs: the number of the event at which it was handed over. What the loop
        has done since then is not covered by a sync that the job makes."""

    def add(self, kind: int, first: Any = None, second: Any = None) -> None:
        self.events.append((kind, first, second))

    @property
    def mark(self) -> int:
        """The number of the next event, or of that at which the running job began."""
        return len(self.events) if self.job_mark is None else self.job_mark
