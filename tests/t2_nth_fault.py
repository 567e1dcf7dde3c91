"""Every call fails once, or from then on until it is healed: the n-th of each kind, for n = 1, 2 ... until none is.

Whatever fails: no acknowledged byte is lost, at a crash right after the fault or later; somebody is told; and once it
is healed everything reaches the backing. Where the cache's own media fail nothing is acknowledged any more.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from sim import log as events
from sim.campaign import images_after, images_now
from sim.crash import Image, Media
from sim.media import BLOCK
from sim.oracle import Model, Oracle, Violation, tell
from sim.world import (
    Client,
    Running,
    Setting,
    Step,
    Trace,
    check_accounts,
    examine,
    first_of,
    new_image,
    record,
    simulate,
)

from cachefsd.errors import UserError
from cachefsd.media.ports import Durability

pytestmark = pytest.mark.slow
HALF = BLOCK // 2
FOR_EVER = 1 << 60
PMEM, DISK = Setting(slots=6), Setting(slots=6, durability=Durability.DISK)
SYNCED = Setting(slots=6, durability=Durability.DISK, sync_writes=True)
NOISE = (
    "created again|a sync of the backing failed|damaged headers: their slots are set aside|writeback failed|upkeep: |"
    "the cache has failed|set aside, the data stays"
)

A: Step = ("write", "a", 0, 3 * BLOCK)
B: Step = ("write", "b", 0, 2 * BLOCK)
RUNS: list[Step] = [("write", "a", 0, BLOCK), ("write", "a", 2 * BLOCK, BLOCK), ("write", "a", 4 * BLOCK, HALF)]
MANY: list[Step] = [("append", name, HALF) for name in "abc"]
PROGRAMS: dict[str, list[Step]] = {
    "write and overwrite": [A, ("fsync", "a"), ("write", "a", HALF, BLOCK), ("flush",), ("append", "a", HALF)],
    "several runs": [
        *RUNS,
        ("flush",),
        *RUNS,
        ("start_flush",),
        ("write", "a", 2 * BLOCK, BLOCK),
        ("wait", 15),
    ],
    "truncate": [
        A,
        ("truncate", "a", BLOCK + HALF),
        ("fsync", "a"),
        ("truncate", "a", 4 * BLOCK),
        ("append", "a", HALF),
    ],
    "truncate while written back": [A, ("start_flush",), ("truncate", "a", HALF), ("append", "a", BLOCK), ("wait", 15)],
    "unlink": [A, B, ("start_flush",), ("unlink", "a"), A, ("unlink", "b"), ("wait", 25)],
    "rename over": [A, B, ("rename", "a", "b"), ("write", "b", BLOCK, BLOCK), ("wait", 15), ("rename", "b", "c")],
    "times": [A, ("utimes", "a"), ("flush",), ("retime", "a"), ("truncate", "a", 0), ("utimes", "a"), ("fsync", "a")],
    "full cache": [A, ("write", "b", 0, 4 * BLOCK), ("write", "a", HALF, 4 * BLOCK), ("write", "c", 0, BLOCK)],
    "dormant": [
        *(A, B, ("flush",), ("close", "a"), ("close", "b"), ("wait", 25)),
        *(
            ("read", "a"),
            ("write", "a", HALF, BLOCK),
            ("rename", "a", "b"),
            ("close", "b"),
            ("wait", 45),
            ("read", "b"),
        ),
        *(("read", "b"), ("close", "b"), ("wait", 25), ("unlink", "b")),
    ],
    "many files": [*MANY, ("flush",), ("start_flush",), *MANY, ("wait", 15), ("fsync", "c")],
    "reads": [A, ("flush",), ("write", "b", 0, 5 * BLOCK), ("read", "a"), ("write", "a", HALF, BLOCK), ("read", "b")],
}
BACKING: list[tuple[str, int]] = [
    ("open", errno.EIO),
    ("open", errno.ESTALE),
    ("read", errno.EIO),
    ("write", errno.ENOSPC),
    ("sync", errno.EIO),
    ("truncate", errno.EIO),
    ("set_mtime", errno.EIO),
    ("stat", errno.EIO),
    ("sync_directory", errno.EIO),
    ("sync_all", errno.EIO),
    ("unlink", errno.EIO),
]
MEDIA: list[tuple[Setting, str]] = [
    (PMEM, "catalog"),
    (PMEM, "catalog_late"),
    (PMEM, "catalog_read"),
    (DISK, "catalog"),
    (DISK, "catalog_late"),
    (DISK, "catalog_read"),
    (DISK, "pool_sync"),
    (DISK, "superblock"),
    (DISK, "superblock_late"),
    (SYNCED, "pool_sync"),
    (SYNCED, "superblock_late"),
]


class Run:
    """One run of a program in which something fails."""

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        self.setting = setting
        rng = random.Random(seed)
        self.rng = random.Random(seed)
        self.running = Running(new_image(setting), setting, rng)
        self.oracle = Oracle(setting.durability, sync_writes=setting.sync_writes)
        self.client = Client(self.running, self.oracle, rng)
        self.trace = Trace(new_image(setting), setting, self.running.log, self.oracle)

    @property
    def fired(self) -> list[int]:
        """The numbers of the events at which a call has failed."""
        return [number for number, event in enumerate(self.running.log.events) if event[0] == events.FAULT]

    async def steps(self, steps: list[Step]) -> list[Step]:
        """Do them all; which of them have failed."""
        failed = []
        for step in steps:
            try:
                await self.client.do(step)
            except OSError:
                failed.append(step)
        return failed

    async def backing(
        self, program: list[Step], call: str, number: int, n: int, times: int, told: Callable[[], bool]
    ) -> bool:
        """The n-th ``call`` to the backing fails, and so do the next ones; False when there are fewer."""
        async with self.running.started(tasks=True) as engine, self.client.at_work():
            await self.client.do(("fail", call, n, number, times))
            failed = await self.steps(program)
            fired = self.fired
            await self.client.do(("heal",))
            if not fired:
                return False
            await trio.sleep(40)  # a group of files that is under way tells of an error at its end
            if not (failed or self.client.told or engine.status()["writeback"]["errors"] or told()):
                raise Violation("nobody is told of the error")
            if failed := await self.steps([("look",), ("wait", 40), ("flush",)]):
                raise Violation(f"healed, and still {failed} fails")
            self._require_drained()
            check_accounts(engine)
        await self._crash(fired[0])
        return True

    def _require_drained(self) -> None:
        if self.running.engine.dirty_bytes:
            raise Violation("dirty data is left after a flush")
        for file in self.oracle.model.values():
            if file.name is not None:
                content = self.running.fs.inodes[file.ino].content
                if content != file.content:
                    raise Violation(f"the backing of {file.name} has {tell(content)} instead of {tell(file.content)}")

    async def _crash(self, first: int) -> None:
        """Kills right after the fault, at some moments later, and at the end."""
        log = self.running.log.events
        moments = {first, len(log) - 1, *(self.rng.randrange(first, len(log)) for _ in range(3))}
        media = Media(self.trace.image, self.setting.durability)
        for number, event in enumerate(log):
            media.follow(number, event)
            if number in moments:
                for index, image in enumerate(images_now(media, self.rng, 4)):
                    await examine(image, self.setting, self.oracle.at(number + 1), drain=index == 0)

    async def media(self, program: list[Step], call: str, n: int) -> bool:
        """The n-th ``call`` to pool or catalog fails."""
        async with self.running.started(tasks=True) as engine, self.client.at_work():
            await self.client.do(("fail", call, n))
            await self.steps(program)
            await self.steps([("flush",), ("wait", 5)])
            fired = self.fired
            if not fired:
                return False
            if engine.status()["failed"] is None:
                raise Violation("the cache goes on over media that have failed")
            refused: list[Step] = [
                ("write", "a", 0, BLOCK),
                ("truncate", "a", HALF),
                ("fsync", "a"),
                ("write", "z", 0, 8),
            ]
            if len(failed := await self.steps(refused)) != len(refused):
                raise Violation(f"of {refused} only {failed} are refused")
            for file in self.oracle.model.values():
                if file.name is not None and await self.steps([("read", file.name)]):
                    raise Violation(f"{file.name} can't be read any more")
        await self._crash(fired[0])
        return True


def every_call(run: Callable[[int], Awaitable[bool]]) -> int:
    """Let the n-th call fail, for every n; how many calls there were."""

    async def all_of_them() -> int:
        n = 1
        while True:
            try:
                if not await run(n):
                    return n - 1
            except BaseException as error:
                cause = first_of(error) if isinstance(error, BaseExceptionGroup) else error
                raise Violation(f"call number {n} fails: {cause!r}") from error
            n += 1

    count: int = simulate(all_of_them)
    return count


@pytest.mark.parametrize("times", [1, FOR_EVER], ids=["once", "until healed"])
@pytest.mark.parametrize("setting", [PMEM, DISK], ids=lambda setting: setting.durability.value)
@pytest.mark.parametrize(("call", "number"), BACKING, ids=lambda value: errno.errorcode.get(value, value))
def test_backing(call: str, number: int, setting: Setting, times: int, log_police, expect_logs) -> None:
    expect_logs(NOISE)
    calls = 0
    for name, program in PROGRAMS.items():

        async def run(n: int, program: list[Step] = program) -> bool:
            before = len(log_police.records)
            return await Run(setting).backing(program, call, number, n, times, lambda: len(log_police.records) > before)

        try:
            calls += every_call(run)
        except Violation as violation:
            raise Violation(f"{name}: {violation}") from violation
    assert calls


@pytest.mark.parametrize(
    ("setting", "call"), MEDIA, ids=[f"{s.durability}{'-sync' * s.sync_writes}-{call}" for s, call in MEDIA]
)
def test_media(setting: Setting, call: str, expect_logs) -> None:
    expect_logs(NOISE)
    calls = 0
    for name, program in PROGRAMS.items():

        async def run(n: int, program: list[Step] = program) -> bool:
            return await Run(setting).media(program, call, n)

        try:
            calls += every_call(run)
        except Violation as violation:
            raise Violation(f"{name}: {violation}") from violation
    assert calls


# ---- recovery

RECOVERY: list[str] = [
    *("open", "stat", "truncate", "set_mtime", "sync", "recreate"),
    *("catalog", "catalog_late", "catalog_read", "superblock", "superblock_late"),
]
OWED: list[list[Step]] = [
    [A, ("fsync", "a"), B, ("truncate", "a", HALF), ("write", "a", 2 * BLOCK, BLOCK), ("unlink", "b")],
    [A, B, ("flush",), ("truncate", "a", BLOCK), ("truncate", "a", 2 * BLOCK), ("write", "b", HALF, BLOCK)],
    [A, ("start_flush",), ("utimes", "a"), ("rename", "a", "b"), ("truncate", "b", HALF), ("write", "a", 0, HALF)],
    [A, ("wait", 1.5)],  # committed by then in class disk, and the backing may lose it
]


async def recovery(image: Image, setting: Setting, model: Model, call: str, n: int) -> bool:
    """Recovery of an image in which the n-th ``call`` fails, and then once more without; False when there are fewer."""
    running = Running(image, setting, random.Random(0), hasty=True)
    running.fs.faults.at[call] = running.fs.faults.calls[call] + n, errno.EIO, 1
    try:
        async with running.started(tasks=False):
            pass
    except (UserError, OSError) as error:  # of the latter the daemon makes the former
        if "\n" in str(error):
            raise Violation(f"more than one line: {error}") from error
    trace = Trace(image, setting, running.log, Oracle(setting.durability, model))
    if not any(event[0] == events.FAULT for event in running.log.events):
        return False
    for again in images_after(trace, random.Random(n), 5):
        await examine(again, setting, model, drain=True)
    return True


@pytest.mark.parametrize(
    ("setting", "call"),
    [*((PMEM, call) for call in RECOVERY), *((DISK, call) for call in [*RECOVERY, "pool_sync"])],
    ids=lambda value: value if isinstance(value, str) else value.durability.value,
)
def test_recovery(setting: Setting, call: str, expect_logs: Callable[..., None]) -> None:
    expect_logs(NOISE)

    async def images() -> list[tuple[Image, Model]]:
        found = []
        for program in OWED:
            trace = await record(new_image(setting), setting, program)
            found += [(image, trace.oracle.model) for image in images_after(trace, random.Random(0), 12)]
        return found

    calls = 0
    for image, model in simulate(images):

        async def run(n: int, image: Image = image, model: Model = model) -> bool:
            return await recovery(image, setting, model, call, n)

        calls += every_call(run)
    assert calls
