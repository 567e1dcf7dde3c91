"""What all tests share: a log police, no mounts left behind, and stacks on SIGUSR1."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import random
import re
import signal
from collections.abc import Callable, Iterator

import pytest
from _pytest.config import create_terminal_writer
from hypothesis import settings

from cachefsd.errors import UserError
from cachefsd.fuse import mounts

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_stacks = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        config.stash[_stacks] = os.dup(2)
    faulthandler.register(signal.SIGUSR1, file=config.stash[_stacks], all_threads=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    # pytest-timeout asks for the writer to tell the stacks of a test that takes too long. That of a process of
    # pytest-xdist writes to nowhere.
    if hasattr(session.config, "workerinput"):
        file = os.fdopen(os.dup(session.config.stash[_stacks]), "w")
        writer = create_terminal_writer(session.config, file)
        session.config.get_terminal_writer = lambda: writer  # type: ignore[method-assign]


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.unregister(signal.SIGUSR1)
    os.close(config.stash[_stacks])


class LogPolice(logging.Handler):
    """Collects the warnings of cachefsd, and tells those that a test has announced from the others."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self._expected: list[tuple[re.Pattern[str], int | None]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def expect(self, pattern: str, count: int | None = None) -> None:
        """Allow warnings whose message matches ``pattern``; with ``count``, ask for exactly so many."""
        self._expected.append((re.compile(pattern), count))

    def complaints(self) -> list[str]:
        """What there is to complain about, one line each."""
        found = []
        messages = [f"{record.levelname} {record.name}: {record.getMessage()}" for record in self.records]
        for pattern, count in self._expected:
            matching = [message for message in messages if pattern.search(message)]
            messages = [message for message in messages if message not in matching]
            if count is not None and len(matching) != count:
                found.append(f"{len(matching)} instead of {count} warnings match {pattern.pattern!r}")
        return found + [f"unexpected: {message}" for message in messages]


@pytest.fixture(autouse=True)
def log_police() -> Iterator[LogPolice]:
    """Fail a test during which cachefsd logged a warning or worse that the test did not announce."""
    police = LogPolice()
    logger = logging.getLogger("cachefsd")
    logger.addHandler(police)
    yield police
    # Objects that nobody closed complain when they are collected: let it be in the test that made them.
    gc.collect()
    logger.removeHandler(police)
    complaints = police.complaints()
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture
def expect_logs(log_police: LogPolice) -> Callable[..., None]:
    """``expect_logs(pattern, count=None)`` announces warnings (see :meth:`LogPolice.expect`)."""
    return log_police.expect


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Chance that can be repeated: ``CACHEFSD_SEED`` starts it, and a failure shows it."""
    seed = int(os.environ.get("CACHEFSD_SEED", "") or 20180507)
    print(f"CACHEFSD_SEED={seed}")
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture(scope="session", autouse=True)
def no_mount_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Take off the FUSE mounts that tests left in their temporary directories, and fail."""
    base = os.path.realpath(tmp_path_factory.getbasetemp())
    yield
    left = [
        entry.mountpoint
        for entry in mounts.mounts()
        if entry.fstype.startswith("fuse") and entry.mountpoint.startswith(f"{base}/")
    ]
    for mountpoint in reversed(left):
        try:
            mounts.detach_dead(mountpoint)
        except UserError as error:
            print(error)
    if left:
        pytest.fail(f"mounts were left behind: {left}", pytrace=False)
