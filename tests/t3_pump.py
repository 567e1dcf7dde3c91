"""The request pump over a pipe: a byte in it is a request that nobody takes out."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from cachefsd.fuse.pump import Pump


class Pipe:
    """A descriptor with a queue of requests, one byte each."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()

    def put(self, count: int = 1) -> None:
        os.write(self._write, b"x" * count)

    def take(self) -> None:
        assert len(os.read(self.fd, 1)) == 1

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
async def nursery_in_time() -> AsyncIterator[None]:
    with trio.fail_after(100):
        yield


async def test_other_tasks_run_under_endless_load(pipe: Pipe, nursery_in_time: None) -> None:
    pump = Pump(pipe.fd)
    pipe.put()
    served = 0

    async def worker() -> None:
        nonlocal served
        while await pump.wait():
            served += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        pump.stop()
    # It drained between two turns of ours: many requests for each of them.
    assert served > 20 * 10


async def test_it_does_not_spin_while_a_handler_could_go_on(pipe: Pipe, nursery_in_time: None) -> None:
    """Who waits for that handler sends no other request: spinning made every answer of the backing 100 us late."""
    jobs = Pipe()
    pump = Pump(pipe.fd, [jobs.fd])
    answered = False

    async def handler() -> None:
        nonlocal answered
        await trio.lowlevel.wait_readable(jobs.fd)
        answered = True
        pump.stop()
        pipe.put()

    async def worker() -> None:
        pump._spin_ns = 10**12  # for ever
        assert not await pump.wait()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler)
            await trio.testing.wait_all_tasks_blocked()
            jobs.put()
            nursery.start_soon(worker)
    finally:
        jobs.close()
    assert answered


async def test_a_suspended_handler_has_a_successor(pipe: Pipe, nursery_in_time: None) -> None:
    pump = Pump(pipe.fd)
    gate = trio.Event()
    in_handlers = 0
    finished = 0

    async def worker() -> None:
        nonlocal in_handlers, finished
        while await pump.wait():
            pipe.take()
            in_handlers += 1
            await gate.wait()
            finished += 1

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(worker)
        await trio.testing.wait_all_tasks_blocked()
        for count in range(1, 11):
            pipe.put()
            while in_handlers < count:
                await trio.sleep(0.001)
        assert finished == 0
        pipe.put(5)
        gate.set()
        while finished < 15:
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()


async def test_a_stream_of_hits_stays_with_one_worker(pipe: Pipe, nursery_in_time: None) -> None:
    pump = Pump(pipe.fd)
    served = [0] * 8

    async def worker(number: int) -> None:
        while await pump.wait():
            pipe.take()
            served[number] += 1

    async with trio.open_nursery() as nursery:
        for number in range(len(served)):
            nursery.start_soon(worker, number)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(20):
            pipe.put(100)
            while sum(served) % 100 or sum(served) == 0:
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sum(served) == 2000
    assert sum(count > 0 for count in served) <= 2


async def test_workers_started_in_vain_are_not_used(pipe: Pipe, nursery_in_time: None) -> None:
    """pyfuse3 starts one after each request, up to a limit, and each that has had a request keeps a large buffer."""
    pump = Pump(pipe.fd)
    used: set[int] = set()
    started = finished = 0

    async def worker(number: int) -> None:
        nonlocal started, finished
        while await pump.wait():
            pipe.take()
            if started < 200:
                started += 1
                nursery.start_soon(worker, started)
            used.add(number)
            await trio.lowlevel.checkpoint()
            finished += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker, 0)
        for count in range(1, 301):
            pipe.put()
            while finished < count:
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert started == 200
    assert len(used) < 10


async def test_stop_ends_every_worker(pipe: Pipe, nursery_in_time: None) -> None:
    pump = Pump(pipe.fd)
    async with trio.open_nursery() as nursery:
        ended = 0

        async def worker() -> None:
            nonlocal ended
            assert not await pump.wait()
            ended += 1

        for _ in range(20):
            nursery.start_soon(worker)
        await trio.testing.wait_all_tasks_blocked()
        pump.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == 19
        # What pyfuse3.terminate does for the one that waits for the descriptor.
        trio.lowlevel.notify_closing(pipe.fd)
    assert ended == 20
    assert not await pump.wait()


async def test_cancelled_workers_leave_no_trace(pipe: Pipe, nursery_in_time: None) -> None:
    pump = Pump(pipe.fd)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(pump.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    pipe.put()
    assert await pump.wait()


async def test_spinning_is_learnt_from_short_sleeps_and_forgotten_after_long_ones(
    pipe: Pipe, nursery_in_time: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pump = Pump(pipe.fd)
    now = 0
    sleep_ns = 0

    def clock() -> int:
        nonlocal now
        now += 1_000
        return now

    async def wait_readable(fd: int) -> None:
        nonlocal now
        now += sleep_ns
        pipe.put()

    monkeypatch.setattr(pump, "_clock", clock)
    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)

    async def cost_of_a_request() -> int:
        before = now
        assert await pump.wait()
        pipe.take()
        return now - before - sleep_ns

    sleep_ns = 10_000_000
    idle = [await cost_of_a_request() for _ in range(20)]
    sleep_ns = 50_000
    busy = [await cost_of_a_request() for _ in range(20)]
    sleep_ns = 10_000_000
    idle_again = [await cost_of_a_request() for _ in range(20)]
    assert max(idle) < 20_000
    assert 90_000 < busy[-1] < 130_000
    assert idle_again[0] > 90_000
    assert max(idle_again[8:]) < 20_000


@pytest.mark.parametrize("workers", [1, 2, 3, 20])
async def test_what_is_put_off_is_submitted_before_anybody_waits(
    pipe: Pipe, nursery_in_time: None, workers: int, rng: random.Random
) -> None:
    """With one worker there is nobody to be called: a handler that put its read off would wait for ever."""
    held: list[trio.Event] = []
    put_off = together = begun = done = 0

    def submit() -> None:
        nonlocal together
        together = max(together, len(held))
        while held:
            held.pop().set()

    pump = Pump(pipe.fd, submit=submit)

    async def worker() -> None:
        nonlocal put_off, begun, done
        while await pump.wait():
            pipe.take()
            begun += 1
            for _ in range(rng.randrange(3)):
                answered = trio.Event()
                if pump.calls():
                    put_off += 1
                    held.append(answered)
                else:
                    answered.set()
                await answered.wait()
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(workers):
            nursery.start_soon(worker)
        for _ in range(300):
            count = rng.randrange(1, 12)
            before = done
            pipe.put(count)
            while done < before + count:
                await trio.sleep(0)
            assert not held
        pipe.put(5)
        while begun == done:
            await trio.sleep(0)
        pump.stop()
        pipe.put()  # wakes the leader
    assert not held
    assert (put_off > 0, together > 1) == (workers > 1, workers > 2)
