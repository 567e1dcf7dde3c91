"""Pages that are older than a direct write: which of them are known, and that writes do not wait for ever."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from cachefsd.fuse import dropper, invalidation
from cachefsd.fuse.invalidation import CachedPages, Invalidator

PAGE = 4096


def test_pages_are_those_that_were_noted_and_not_taken(rng: random.Random) -> None:
    pages, model = CachedPages(), set[int]()
    for _ in range(3000):
        offset, size = rng.randrange(12 << 20), rng.choice((1, PAGE, 100_000, 5 << 20))
        touched = set(range(offset // PAGE, (offset + size - 1) // PAGE + 1))
        if rng.random() < 0.5:
            pages.note(offset, size)
            model |= touched
        else:
            assert pages.take(offset, size) is bool(model & touched)
            model -= touched
    pages.note(1 << 40, 0)
    assert not pages.take(1 << 40, 1)


def test_too_many_pages_are_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invalidation, "_MAX_CHUNKS", 4)
    pages = CachedPages()
    for number in range(5):
        pages.note(number << 30, 1)
    assert pages.take(1 << 50, 1)
    assert pages.take(1 << 50, 1)  # no longer known what is there


@pytest.fixture
def connection() -> Any:
    """What stands for the connection, and the other end, where requests of the kernel's protocol arrive."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.settimeout(30)
        yield ours, theirs


async def test_the_kernel_is_asked_by_a_process_that_ends_with_us(connection: Any) -> None:
    ours, theirs = connection
    invalidator = Invalidator()
    assert await invalidator.drop(7, 0, 1, patient=True)  # nothing is mounted, so there are no pages
    assert invalidator._process is None
    invalidator.attach(ours.fileno(), "0")
    assert await invalidator.drop(7, 8192, 512, patient=True)
    assert theirs.recv(100) == dropper._NOTIFY.pack(40, 2, 0, 7, 8192, 512)
    process = invalidator._process
    assert process is not None
    invalidator.close()
    assert process.returncode == 0


async def test_a_process_that_is_killed_is_replaced(connection: Any, expect_logs: Callable[..., None]) -> None:
    expect_logs("that drops pages has ended", 1)
    ours, _ = connection
    invalidator = Invalidator()
    invalidator.attach(ours.fileno(), "0")
    try:
        assert await invalidator.drop(7, 0, 1, patient=True)
        first = invalidator._process
        assert first is not None
        os.kill(first.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            answers: list[bool] = []

            async def ask() -> None:
                answers.append(await invalidator.drop(7, 0, 1, patient=True))

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(first.pid, signal.SIGKILL)
        assert answers == [False]
        first.wait()
        assert await invalidator.drop(7, 0, 1, patient=True)
        assert invalidator._process is not first
    finally:
        invalidator.close()


async def test_a_refusal_is_told(connection: Any) -> None:
    ours, theirs = connection
    invalidator = Invalidator()
    invalidator.attach(ours.fileno(), "0")
    theirs.close()
    try:
        assert not await invalidator.drop(7, 0, 1, patient=True)
    finally:
        invalidator.close()


async def test_no_process_is_no_reason_to_fail(
    connection: Any, monkeypatch: pytest.MonkeyPatch, expect_logs: Callable[..., None]
) -> None:
    expect_logs("cannot have pages dropped", 1)
    monkeypatch.setattr(invalidation.sys, "executable", "/does/not/exist")
    invalidator = Invalidator()
    invalidator.attach(connection[0].fileno(), "0")
    assert not await invalidator.drop(7, 0, 1, patient=True)
    invalidator.close()


@pytest.mark.parametrize(("patient", "others", "waits"), [(True, 0, 2.0), (False, 0, 0.1), (True, 64, 0.1)])
async def test_nobody_waits_for_ever(
    connection: Any, monkeypatch: pytest.MonkeyPatch, patient: bool, others: int, waits: float
) -> None:
    """The kernel may wait for what the daemon has not read yet, or cannot read before these writes are answered."""
    limits: list[float] = []

    class Scope:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def move_on_after(seconds: float) -> Scope:
        limits.append(seconds)
        return Scope()

    ours, _ = connection
    invalidator = Invalidator()
    invalidator.attach(ours.fileno(), "0")
    invalidator._waiting.update({-1 - number: trio.Event() for number in range(others)})
    monkeypatch.setattr(invalidation.trio, "move_on_after", move_on_after)
    try:
        assert await invalidator.drop(7, 0, 1, patient=patient)
    finally:
        monkeypatch.undo()
        invalidator.close()
    assert limits == [waits]


async def test_a_process_that_does_not_answer_is_left_alone(
    connection: Any, monkeypatch: pytest.MonkeyPatch, expect_logs: Callable[..., None]
) -> None:
    expect_logs("does not end", 1)
    ours, _ = connection
    monkeypatch.setattr(invalidation, "WAIT_S", 0.2)
    invalidator = Invalidator()
    invalidator.attach(ours.fileno(), "0")
    assert await invalidator.drop(7, 0, 1, patient=False) in (True, False)
    process = invalidator._process
    assert process is not None
    try:
        os.kill(process.pid, signal.SIGSTOP)
        assert not await invalidator.drop(7, 0, 1, patient=True)
        invalidator.close()
    finally:
        process.kill()
        process.wait()
