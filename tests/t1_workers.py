"""The worker threads: results, errors, cancellation, and a loop that never waits for them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

from cachefsd.backing.workers import Workers


async def test_a_thousand_concurrent_jobs() -> None:
    results: dict[int, int] = {}
    names: set[str] = set()

    def square(number: int) -> int:
        names.add(threading.current_thread().name)
        return number * number

    async def one(number: int) -> None:
        results[number] = await workers.run(square, number)

    async with Workers(8, "squares") as workers, trio.open_nursery() as nursery:
        for number in range(1000):
            nursery.start_soon(one, number)
    assert results == {number: number * number for number in range(1000)}
    assert names <= {f"squares-{index}" for index in range(8)}


async def test_an_error_travels_back() -> None:
    async with Workers(1, "errors") as workers:
        with pytest.raises(FileNotFoundError):
            await workers.run(os.stat, "/nonexistent/name")
        with pytest.raises(SystemExit):
            await workers.run(exit_now)
        assert await workers.run(max, 1, 2) == 2  # the thread goes on


def exit_now() -> None:
    raise SystemExit


async def test_stop_finishes_the_queue_and_joins() -> None:
    before = set(threading.enumerate())
    gate = threading.Event()
    done: list[int] = []
    workers = Workers(2, "joined")
    workers.start()
    mine = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("joined-")}
    assert len(mine) == 2
    for number in range(10):
        workers.post(wait_and_note, gate, done, number)
    assert done == []
    gate.set()
    await workers.stop()
    assert sorted(done) == list(range(10))
    assert not any(thread.is_alive() for thread in mine)


def wait_and_note(gate: threading.Event, done: list[int], number: int) -> None:
    gate.wait()
    done.append(number)


async def test_a_hung_job_blocks_neither_the_loop_nor_other_jobs() -> None:
    gate = threading.Event()
    async with Workers(2, "hung") as workers, trio.open_nursery() as nursery:
        nursery.start_soon(workers.run, gate.wait)
        try:
            for number in range(100):
                assert await workers.run(abs, -number) == number
                await trio.lowlevel.checkpoint()
        finally:
            gate.set()


async def test_a_cancellation_waits_for_the_job_and_leaves_its_result() -> None:
    gate = threading.Event()
    results: list[object] = []

    async def wait() -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            results.append(await workers.run(gate.wait))
            await trio.lowlevel.checkpoint()
            results.append("not reached")

    scopes: list[trio.CancelScope] = []
    async with Workers(1, "cancelled") as workers, trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert results == []
        gate.set()
    assert results == [True]
    assert scopes[0].cancelled_caught


async def test_a_cancelled_task_starts_no_job() -> None:
    done: list[int] = []
    async with Workers(1, "not started") as workers:
        with trio.CancelScope() as scope:
            scope.cancel()
            await workers.run(done.append, 1)
        assert scope.cancelled_caught
    assert done == []


async def test_stop_under_cancellation_still_joins() -> None:
    with trio.CancelScope() as scope:
        async with Workers(1, "late") as workers:
            workers.post(abs, 1)
            scope.cancel()
    assert not any(thread.name.startswith("late-") for thread in threading.enumerate())


async def test_a_failed_background_job_is_logged(expect_logs: Callable[..., None]) -> None:
    expect_logs("a background job failed: .*Bad file descriptor", count=1)
    async with Workers(1, "background") as workers:
        workers.post(os.close, -1)


def test_it_works_from_run_to_run_of_the_loop() -> None:
    async def main() -> int:
        async with Workers(1, "again") as workers:
            return await workers.run(abs, -1)

    assert [trio.run(main) for _ in range(3)] == [1, 1, 1]
