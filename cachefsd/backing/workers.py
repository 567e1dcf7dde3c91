"""Threads for system calls that may wait for a disk.

What a job costs beyond its own time is one wake-up of a thread and one of the loop, and the latter is shared
by all jobs that end meanwhile: their results come back through a deque, announced by an eventfd.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Lock, Thread
from typing import Any, TypeVar

import outcome
import trio

from cachefsd.backing.completions import Completing, not_cancellable

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Job:
    __slots__ = ("call", "result", "task")

    def __init__(self, call: Callable[[], Any], task: trio.lowlevel.Task | None) -> None:
        self.call = call
        self.task = task
        self.result: outcome.Outcome[Any] | None = None


class _Worker:
    """A thread's place to sleep at: one release of ``wake`` for each time that it is taken from the idle ones."""

    def __init__(self) -> None:
        self.wake = Lock()
        self.wake.acquire()


class Workers(Completing):
    """``count`` threads that take jobs in the order of their arrival. ``async with`` starts and stops them.

    A job that hangs keeps its thread, and nothing else.
    """

    def __init__(self, count: int, name: str) -> None:
        super().__init__(name)
        self._jobs: deque[_Job | None] = deque()
        # A stack: who has worked last is awake sooner, and a queue would wake threads that find nothing.
        self._idle: list[_Worker] = []
        self._ended: deque[_Job] = deque()
        self._announced = False
        self._stopped = False
        self.pending = 0
        """Jobs that the loop has yet to hear the end of."""
        self._threads = [Thread(target=self._work, name=f"{name}-{index}", daemon=True) for index in range(count)]

    def start(self) -> None:
        """Start the threads; to be called in the thread of the loop."""
        self._listener.start()
        for thread in self._threads:
            thread.start()

    async def stop(self) -> None:
        """Wait for all jobs, those in the queue too, and end the threads."""
        self._stopped = True
        for _ in self._threads:
            self._put(None)
        with trio.CancelScope(shield=True):
            for thread in self._threads:
                await trio.to_thread.run_sync(thread.join)
        self._collect()
        await self._listener.stop()

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Call ``fn(*args)`` in a thread; return what it returns, raise what it raises.

        A cancellation counts before the job is in the queue or after this call, which a job's result always
        reaches: what it opened is never lost.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self.pending += 1
        self._put(_Job(lambda: fn(*args), trio.lowlevel.current_task()))
        result: T = await trio.lowlevel.wait_task_rescheduled(not_cancellable)
        return result

    def post(self, fn: Callable[..., object], *args: Any) -> None:
        """Call ``fn(*args)`` in a thread some time; an exception is logged, not raised.

        After :meth:`stop` it is called at once.
        """
        self.pending += 1
        job = _Job(lambda: fn(*args), None)
        if not self._stopped:
            self._put(job)
        else:
            job.result = outcome.capture(job.call)
            self._ended.append(job)
            self._collect()

    def _put(self, job: _Job | None) -> None:
        self._jobs.append(job)
        with suppress(IndexError):  # all are busy, and will look
            self._idle.pop().wake.release()

    def _get(self, worker: _Worker) -> _Job | None:
        while True:
            with suppress(IndexError):
                return self._jobs.popleft()
            self._idle.append(worker)
            if self._jobs:  # it came before we were among the idle ones
                with suppress(ValueError):  # and somebody has taken us from there: that wakes us
                    self._idle.remove(worker)
                    continue
            worker.wake.acquire()

    def _work(self) -> None:
        worker = _Worker()
        while (job := self._get(worker)) is not None:
            job.result = outcome.capture(job.call)
            self._ended.append(job)
            # _collect clears the flag before it looks: a job that finds it set is seen by that look.
            if not self._announced:
                self._announced = True
                os.eventfd_write(self._listener.eventfd, 1)
            del job  # what it holds must not outlive it until the next one

    def _collect(self) -> None:
        self._announced = False
        while self._ended:
            job = self._ended.popleft()
            self.pending -= 1
            assert job.result is not None
            if job.task is not None:
                trio.lowlevel.reschedule(job.task, job.result)
            elif isinstance(job.result, outcome.Error):
                log.warning("a background job failed: %r", job.result.error)
