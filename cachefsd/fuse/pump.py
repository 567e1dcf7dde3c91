"""The request pump: it decides which worker of pyfuse3 reads the next request, and when trio may run something else.

pyfuse3's worker tasks each loop over *wait until the descriptor is readable, read a request, handle
it*. The wait is a coroutine of pyfuse3's module, and with trio's bookkeeping
(a lock, an epoll registration, a task switch or two) it costs several times what a cached request
does. :class:`Pump` takes its place (see ``fuse/session``).
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Iterable

import trio

_DRAIN_NS = 500_000
"""How long requests are served before trio gets a turn: the delay of every other task under full load.
Throughput is the same from 0.25 to 2 ms, within the noise."""
_SPIN_START_NS = 20_000
_SPIN_MAX_NS = 100_000
"""About what it costs to sleep and be woken: longer spinning would cost more than it could save."""


class Pump:
    """Decides which worker reads the next request, and when trio may run something else.

    At most one worker, the *leader*, is suspended here on behalf of the descriptor; the others are
    parked. A worker that leaves with a request has *called* a successor: scheduled a parked one (or
    pyfuse3 starts a new worker, as it does after every request until there are ``MAX_WORKERS``).
    A handler that never suspends comes back before the successor runs, so that a stream of hits
    costs one poll each and no task switch; when a handler does suspend, the successor runs and leads.
    What handlers have asked of the backing by then is submitted together, at the latest when nobody is called.

    Invariants: ``leading`` is true only while the leader is suspended; ``called`` only while a task that
    was taken from ``parked`` has not run yet; while there are parked workers and neither is true,
    a worker is running between two awaits.
    """

    def __init__(
        self,
        fd: int,
        completions: Iterable[int] = (),
        submit: Callable[[], None] = lambda: None,
        working: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        :param completions: descriptors that are readable when some handler can go on
        :param submit: lets what handlers wait for begin, if that has been put off while :meth:`calls` was true
        :param working: whether threads of ours have work
        """
        self._fd = fd
        self._submit = submit
        self._working = working
        # 0.4 µs; an epoll object takes 0.3 µs to find nothing and 0.6 µs to find a request.
        self._poll = polling([fd])
        self._poll_all = polling([fd, *completions])
        self._clock = time.perf_counter_ns
        self._yield_at = 0
        self._spin_ns = 0
        self._leading = False
        self._called = False
        self._stopped = False
        self.requests = 0
        """How many there have been."""
        # A stack: the workers that ran last have their buffers in the CPU's caches, and the others'
        # buffers (1 MiB each) are never touched at all. pyfuse3 goes on to start workers, as none is waiting where
        # it could see it: those are put beneath, or hundreds of them would run once, and keep a buffer for good.
        self._parked: deque[trio.lowlevel.Task] = deque()
        self._used: set[trio.lowlevel.Task] = set()

    def calls(self) -> bool:
        """Whether there will be another look for requests without waiting for one, and ``submit`` after it."""
        # With a leader suspended the one that was called only parks again.
        return self._called and not self._leading

    async def wait(self) -> bool:
        """Return True when a request (or the end of the connection) can be read, False to end the worker."""
        # A worker that pyfuse3 has just started leaves the request to the one that was called.
        while (
            self._leading or (self._called and trio.lowlevel.current_task() not in self._used)
        ) and not self._stopped:
            await self._park()
        if self._stopped:
            self._submit()
            return False
        if (self._clock() >= self._yield_at or not self._poll(0)) and not await self._lead():
            return False
        self.requests += 1
        if self._called:
            return True
        if self._parked:
            self._called = True
            successor = self._parked.pop()
            self._used.add(successor)
            trio.lowlevel.reschedule(successor)
        else:
            self._submit()
        return True

    def stop(self) -> None:
        """End all workers that are parked; the leader is woken by ``pyfuse3.terminate``."""
        self._stopped = True
        while self._parked:
            trio.lowlevel.reschedule(self._parked.pop())

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        if task in self._used:
            self._parked.append(task)
        else:
            self._parked.appendleft(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._parked.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self._called = False

    async def _lead(self) -> bool:
        """Let trio run the other tasks, then wait for a request by spinning and by sleeping."""
        self._leading = True
        self._used.add(trio.lowlevel.current_task())
        try:
            self._submit()
            while not self._stopped:
                if self._clock() >= self._yield_at:
                    await trio.lowlevel.checkpoint()
                    self._yield_at = self._clock() + _DRAIN_NS
                    if self._stopped:
                        break
                if self._poll(0) or self._spin():
                    return True
                await self._sleep()
        except trio.ClosedResourceError:
            # What pyfuse3.terminate does to a task that waits for the descriptor.
            pass
        finally:
            self._leading = False
        return False

    def _spin(self) -> bool:
        """Wait for a request, but not while the loop could go on with another one: a client that is alone sends
        none before that is answered. Nor while threads of ours have work: each poll gives the interpreter up, but for
        less time than it takes to wake one of them, and so wakes them in vain."""
        if self._working():
            return False
        deadline = self._clock() + self._spin_ns
        while self._clock() < deadline:
            if self._poll_all(0):
                return bool(self._poll(0))
        return False

    async def _sleep(self) -> None:
        """Sleep until there is a request, and learn from it how long to spin the next time.

        As KVM does for idle CPUs: a sleep so short that spinning would have met its end doubles the
        time, any other halves it, down to none at all.
        """
        asleep_at = self._clock()
        await trio.lowlevel.wait_readable(self._fd)
        now = self._clock()
        if now - asleep_at < _SPIN_MAX_NS:
            self._spin_ns = min(max(2 * self._spin_ns, _SPIN_START_NS), _SPIN_MAX_NS)
        else:
            self._spin_ns = self._spin_ns // 2 if self._spin_ns > _SPIN_START_NS else 0
        self._yield_at = now + _DRAIN_NS


def polling(fds: Iterable[int]) -> Callable[[int], list[tuple[int, int]]]:
    """A function that waits for so many milliseconds, and tells which can be read."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return poll.poll
