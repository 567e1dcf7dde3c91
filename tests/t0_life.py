"""The life of a file: which states exclude each other, and what follows from them."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio

from cachefsd.core.files import CachedFile, Life, Record
from cachefsd.wakeup import Signal


@pytest.fixture
def file() -> CachedFile:
    backing: Any = None
    return CachedFile(b"handle", backing)


@pytest.fixture
def recorded(file: CachedFile) -> CachedFile:
    file.was_recorded(tombstone=False, outdated=False)
    assert file.ready
    return file


def test_a_new_file_takes_writes_once_it_has_a_record(file: CachedFile) -> None:
    assert (file.life, file.record, file.ready) == (Life.USABLE, Record.NONE, False)
    file.outdate_record()
    assert file.record is Record.NONE
    file.was_recorded(tombstone=False, outdated=True)
    assert not file.ready
    file.renew_record()
    assert file.ready


def test_a_record_that_does_not_say_that_the_name_is_gone_must_be_written_first(recorded: CachedFile) -> None:
    recorded.unlink()
    assert not recorded.ready
    recorded.was_recorded(tombstone=True, outdated=False)
    assert recorded.ready
    recorded.keep_name()
    assert not recorded.ready


def test_a_file_that_is_held_says_why_until_it_is_let_go(recorded: CachedFile) -> None:
    recorded.hold(OSError(errno.EIO, "the backing fails"))
    assert (recorded.life, recorded.ready) == (Life.HELD, False)
    recorded.let_go()
    assert (recorded.life, recorded.held, recorded.ready) == (Life.UNSEEN, None, False)
    recorded.seen()
    assert (recorded.life, recorded.ready) == (Life.USABLE, True)
    recorded.let_go()
    assert recorded.life is Life.USABLE


def test_a_cache_that_has_failed_takes_no_writes_whatever_becomes_of_a_file(recorded: CachedFile) -> None:
    recorded.stop()
    recorded.was_recorded(tombstone=False, outdated=False)
    recorded.seen()
    with recorded.cut():
        pass
    assert not recorded.ready


async def test_a_truncate_keeps_versions_out_but_its_own(recorded: CachedFile, autojump_clock: object) -> None:
    over: list[str] = []

    async def wait() -> None:
        await recorded.until_truncate_done()
        over.append("waited")

    async with trio.open_nursery() as nursery:
        with recorded.cut():
            assert (recorded.life, recorded.ready) == (Life.CUT, False)
            nursery.start_soon(wait)
            await trio.sleep(1)
            assert not over
            with recorded.published_by_truncate():
                assert (recorded.life, recorded.ready) == (Life.USABLE, False)
            assert recorded.life is Life.CUT
        assert (recorded.life, recorded.ready) == (Life.USABLE, True)
    assert over == ["waited"]


async def test_a_truncate_that_fails_is_over_too(recorded: CachedFile) -> None:
    with pytest.raises(OSError, match="no"), recorded.cut():
        raise OSError(errno.EIO, "no")
    assert recorded.ready
    await recorded.until_truncate_done()


async def test_a_signal_wakes_who_waits_and_remembers_nothing(autojump_clock: object) -> None:
    signal = Signal()
    signal.set()
    with trio.move_on_after(1) as scope:
        await signal.wait()
    assert scope.cancelled_caught
    taken = signal.next
    signal.set()
    await taken.wait()
    assert not signal.next.is_set()
