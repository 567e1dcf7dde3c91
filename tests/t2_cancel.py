"""Cancellation at every checkpoint (H55): of the operations of users, and of what runs in the background.

Each scenario is run again and again, cancelled at its first step, at its second and so on, until it ends uncancelled;
each time in two ways: while the task waits at a checkpoint, and on its way to the next one. Afterwards nothing may be
held by what is no more, everybody else goes on, and files hold what was acknowledged, or what was under way.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from sim.campaign import images_after
from sim.media import BLOCK
from sim.oracle import Oracle, Violation
from sim.world import Client, Running, Setting, Step, Trace, check_accounts, examine, first_of, new_image, simulate

from cachefsd.core.options import EngineOptions
from cachefsd.media.ports import Durability

HALF = BLOCK // 2
NOISE = "created again|damaged headers: their slots are set aside"
pytestmark = pytest.mark.slow
MOMENTS = ("waiting", "leaving")


class Quiet(Setting):
    """Commits of class ``disk`` that nobody asks for come seldom: each is some more steps to cancel."""

    @property
    def options(self) -> EngineOptions:
        return replace(super().options, commit_s=6.0)


SETTINGS = [Quiet(slots=6), Quiet(slots=6, durability=Durability.DISK)]


class CancelAt(trio.abc.Instrument):
    """Cancels a scope at the n-th step of the task that entered it and of the tasks that it has started."""

    def __init__(self, scope: trio.CancelScope, step: int, moment: str) -> None:
        self._scope = scope
        self._left = step
        self._moment = moment
        self._tasks = {trio.lowlevel.current_task()}

    @property
    def fired(self) -> bool:
        return self._left <= 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        if task.parent_nursery is not None and task.parent_nursery.parent_task in self._tasks:
            self._tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        # What it has waited for has come: the cancellation meets it at its next checkpoint.
        if self._moment == "leaving":
            self._count(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._moment == "waiting":
            self._count(task)

    def _count(self, task: trio.lowlevel.Task) -> None:
        if task in self._tasks:
            self._left -= 1
            if not self._left:
                self._scope.cancel()


async def cancelled_at(step: int, moment: str, act: Callable[[], Awaitable[None]]) -> bool:
    """Run ``act``, cancelled at its n-th step; False if it has fewer."""
    with trio.CancelScope() as scope:
        instrument = CancelAt(scope, step, moment)
        trio.lowlevel.add_instrument(instrument)
        try:
            with suppress(OSError):
                await act()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return instrument.fired


AFTERWARDS: list[Step] = [
    ("read", "a"),
    ("write", "a", HALF, BLOCK),
    ("truncate", "a", BLOCK + HALF),
    ("utimes", "a"),
    ("append", "a", BLOCK),
    ("fsync", "a"),
    ("flush",),
    ("read", "a"),
    ("read", "b"),
]
END: list[Step] = [("unlink", "a"), ("close", "b"), ("wait", 22), ("flush",)]

A: Step = ("write", "a", 0, 3 * BLOCK)
B: Step = ("write", "b", 0, BLOCK)
FLUSH: Step = ("flush",)
STARTED: Step = ("start_flush",)
EVICT: list[Step] = [FLUSH, ("write", "b", 0, 4 * BLOCK), FLUSH]
"""``a`` is in the cache no more."""

OPERATIONS: dict[str, tuple[list[Step], Step]] = {
    "first write": ([], A),
    "write over what must be read first": ([A, *EVICT], ("write", "a", HALF, BLOCK)),
    "write without room": ([A, ("write", "b", 0, 3 * BLOCK)], ("write", "a", 0, 3 * BLOCK)),
    "write larger than the cache": ([B], ("write", "a", HALF, 8 * BLOCK)),
    "read": ([A, *EVICT], ("read", "a")),
    "read of several runs": ([A, *EVICT, ("write", "a", BLOCK, BLOCK)], ("read", "a")),
    "cut dirty": ([A, B], ("truncate", "a", BLOCK + HALF)),
    "cut clean": ([A, B, FLUSH], ("truncate", "a", BLOCK + HALF)),
    "cut while written back": ([A, B, STARTED], ("truncate", "a", BLOCK)),
    "cut to nothing": ([A, B], ("truncate", "a", 0)),
    "cut again": ([A, ("truncate", "a", 2 * BLOCK)], ("truncate", "a", HALF)),
    "cut in a full cache": ([A, ("write", "b", 0, 3 * BLOCK)], ("truncate", "a", BLOCK + HALF)),
    "extension": ([A, FLUSH], ("truncate", "a", 5 * BLOCK)),
    "extension after a cut": ([A, ("truncate", "a", BLOCK)], ("truncate", "a", 3 * BLOCK)),
    "utimes over dirty data in a full cache": ([A, ("write", "b", 0, 3 * BLOCK)], ("utimes", "a")),
    "a time with dirty data in a full cache": ([A, ("write", "b", 0, 3 * BLOCK)], ("retime", "a")),
    "utimes after a cut": ([A, ("truncate", "a", 0)], ("utimes", "a")),
    "utimes while written back": ([A, ("truncate", "a", 0), STARTED], ("utimes", "a")),
    "first fsync": ([A], ("fsync", "a")),
    "fsync of an extension": ([A, ("fsync", "a"), FLUSH, ("truncate", "a", 5 * BLOCK)], ("fsync", "a")),
    "fsync while written back": ([A, ("truncate", "a", BLOCK), STARTED], ("fsync", "a")),
    "flush": ([A, B, ("truncate", "a", BLOCK), ("unlink", "b")], FLUSH),
    "unlink dirty": ([A, B], ("unlink", "a")),
    "unlink that fails": ([A, B, ("fail", "unlink")], ("unlink", "a")),
    "unlink clean": ([A, B, FLUSH], ("unlink", "a")),
    "unlink while written back": ([A, B, STARTED], ("unlink", "a")),
    "rename over": ([A, B], ("rename", "b", "a")),
}


class Run:
    """One run of a scenario, cancelled somewhere."""

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        self.setting = setting
        rng = random.Random(seed)
        self.images = random.Random(seed)
        self.running = Running(new_image(setting), setting, rng)
        self.oracle = Oracle(setting.durability, sync_writes=setting.sync_writes)
        self.client = Client(self.running, self.oracle, rng)
        self.trace = Trace(new_image(setting), setting, self.running.log, self.oracle)

    async def steps(self, steps: list[Step]) -> None:
        for step in steps:
            with suppress(OSError):
                await self.client.do(step)

    async def crash(self, most: int) -> None:
        """Whatever a crash leaves now, recovery finds what was promised."""
        model = dict(self.oracle.model)  # others may go on meanwhile
        for number, image in enumerate(images_after(self.trace, self.images, most)):
            await examine(image, self.setting, model, drain=number == 0)

    async def idle(self) -> None:
        """Once commits and passes under way are over the accounts add up."""
        for attempt in range(30):
            await trio.sleep(0.7)
            try:
                check_accounts(self.running.engine)
                return
            except Violation:
                if attempt == 29:
                    raise

    async def operation(self, before: list[Step], act: Step, step: int, moment: str) -> bool:
        """The scenario of a user's operation; False when it has fewer steps."""
        async with self.running.started(tasks=True) as engine, self.client.at_work():
            await self.steps(before)
            if not await cancelled_at(step, moment, lambda: self.client.do(act)):
                return False
            check_accounts(engine, idle=False)
            await self.crash(3)
            await self.client.do(("look",))
            await self.crash(2)
            turn = step % len(AFTERWARDS)  # whatever comes first must not hide what the cancellation has left
            await self.steps(AFTERWARDS[turn:] + AFTERWARDS[:turn])
            await self.idle()
            await self.crash(2)
            await self.steps(END)
            await self.idle()
            if engine.status()["slots"]["dirty"]:
                raise Violation("dirty data without a file")
        return True

    async def background(self, beside: list[Step], step: int, moment: str, *, ending: bool) -> bool:
        """Writeback and upkeep are cancelled beside the steps of a user; they begin again, or the daemon ends."""
        fired = False
        async with self.running.started(tasks=False) as engine:
            async with self.client.at_work(), trio.open_nursery() as nursery:

                async def run() -> None:
                    nonlocal fired
                    fired = await cancelled_at(step, moment, engine.run)
                    if fired:
                        check_accounts(engine, idle=False)
                        await self.crash(2)

                nursery.start_soon(run)
                await self.steps(beside)
                if not fired:
                    nursery.cancel_scope.cancel()
            if not fired:
                return False
            if ending:
                await engine.shutdown()
                check_accounts(engine)
                await self.crash(2)
                return True
            async with self.client.at_work(), trio.open_nursery() as nursery:
                nursery.start_soon(engine.run)
                turn = step % len(AFTERWARDS)
                await self.steps(AFTERWARDS[turn:] + AFTERWARDS[:turn])
                await self.idle()
                await self.crash(2)
                await self.steps(END)
                await self.idle()
                if engine.status()["slots"]["dirty"]:
                    raise Violation("dirty data without a file")
                nursery.cancel_scope.cancel()
        return True


def every_step(run: Callable[[int, str], Awaitable[bool]], moments: Sequence[str] = MOMENTS) -> int:
    """Cancel at every step; how many there were."""

    async def all_of_them() -> int:
        count = 0
        for moment in moments:
            step = 1
            while True:
                try:
                    if not await run(step, moment):
                        break
                except BaseException as error:
                    cause = first_of(error) if isinstance(error, BaseExceptionGroup) else error
                    raise Violation(f"cancelled {moment} at step {step}: {cause!r}") from error
                count, step = count + 1, step + 1
        return count

    count: int = simulate(all_of_them)
    return count


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.durability.value)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, setting: Setting, expect_logs: Callable[..., None]) -> None:
    expect_logs(NOISE)
    before, act = OPERATIONS[name]
    assert every_step(lambda step, moment: Run(setting).operation(before, act, step, moment))


BACKGROUND: dict[str, list[Step]] = {
    "writeback": [A, B, STARTED, ("wait", 5)],
    "writeback of what is written meanwhile": [
        A,
        STARTED,
        ("write", "a", 0, BLOCK),
        ("append", "a", HALF),
        ("wait", 5),
    ],
    "writeback of several runs": [
        ("write", "a", 0, BLOCK),
        ("write", "a", 2 * BLOCK, BLOCK),
        ("write", "a", 4 * BLOCK, HALF),
        STARTED,
        ("write", "a", 2 * BLOCK, BLOCK),
        ("wait", 5),
    ],
    "writeback of cuts": [A, B, ("truncate", "a", HALF), STARTED, ("truncate", "b", 0), ("wait", 5)],
    "reap": [A, B, ("unlink", "a"), ("unlink", "b"), ("wait", 23)],
    "stamps": [A, STARTED, ("wait", 5), ("utimes", "a"), ("rename", "a", "b"), ("wait", 19)],
    "records": [
        A,
        STARTED,
        ("wait", 5),
        ("truncate", "a", 0),
        ("close", "a"),
        ("write", "b", 0, 6 * BLOCK),
        ("wait", 19),
    ],
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.durability.value)
@pytest.mark.parametrize("name", BACKGROUND)
def test_background(name: str, setting: Setting, expect_logs: Callable[..., None]) -> None:
    expect_logs(NOISE)
    moments = MOMENTS if setting.durability is Durability.PMEM else MOMENTS[:1]
    assert every_step(
        lambda step, moment: Run(setting).background(BACKGROUND[name], step, moment, ending=False), moments
    )


@pytest.mark.parametrize("name", BACKGROUND)
def test_background_at_an_orderly_end(name: str, expect_logs: Callable[..., None]) -> None:
    expect_logs(NOISE)
    setting = SETTINGS[1]
    assert every_step(
        lambda step, moment: Run(setting).background(BACKGROUND[name], step, moment, ending=True), MOMENTS[:1]
    )
