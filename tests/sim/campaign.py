"""Recording programs and crashing them everywhere, in this process or in several."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from cachefsd.media.ports import Durability
from sim.crash import Image, Media
from sim.media import BLOCK
from sim.monitor import check_backing, check_order
from sim.oracle import File, Model, Violation
from sim.world import Findings, Setting, Step, Trace, examine, new_image, record

T = TypeVar("T")
Change = Callable[[Image, Model], tuple[Image, Model]]

NESTED = 15
DRAINED = 3
"""Of so many images one is also written back."""
MAX_STEPS = 20_000
"""Steps of tasks after which a program or a recovery is taken for endless; the longest need a tenth"""
MAX_SECONDS = 100_000.0
"""the same in virtual time"""


@dataclass
class Tally:
    """What a campaign has done."""

    operations: int = 0
    images: set[bytes] = field(default_factory=set)
    """digests of all crash images (with their setting) that recovery was checked on"""


def images_after(trace: Trace, rng: random.Random, most: int) -> list[Image]:
    """What a crash at the end of a record may leave: nothing and everything arrived, and some others."""
    media = Media(trace.image, trace.setting.durability, fsync_takes_names=trace.setting.fsync_takes_names)
    for number, event in enumerate(trace.log.events):
        media.follow(number, event)
    return images_now(media, rng, most)


def images_now(media: Media, rng: random.Random, most: int) -> list[Image]:
    """The same where the record has been followed to already."""
    nothing = media.image({}, [False] * len(media.disk.pending))
    others = list(media.images(rng, samples=1))
    return [nothing, _everything(media), *rng.sample(others, min(len(others), most - 2))]


def _everything(media: Media) -> Image:
    pending = media.lines.pending
    return media.image({line: len(words) for line, words in pending.items()}, [True] * len(media.disk.pending))


class Campaign:
    """Programs of one setting. An image is examined once for each state of what users had been told."""

    def __init__(self, setting: Setting, seed: int = 0, nested: int = NESTED) -> None:
        self.setting = setting
        self.seed = seed
        self._nested_of = nested
        """of so many images one is crashed again during its recovery"""
        self.tally = Tally()
        self._salt = repr(setting).encode()
        self._seen: set[tuple[bytes, frozenset[tuple[int, File]]]] = set()
        self._rng = random.Random(seed)

    async def program(self, steps: list[Step], *, last_only: bool = False, crashed: bool = True) -> None:
        """Record one program, check the order of its events, and crash it at every event (of its last step).

        A step ``("crash", which, *changes)`` ends one life of the program: the next one goes on with what recovery
        found. ``which`` of the stores and changes on their way arrive: ``"all"``, ``"none"`` or ``"some"``; ``"kill"``
        means all, and that the machine has not stopped. Then each
        of ``changes`` makes of the image and the model others, which recovery finds: damage, or strangers.

        :raises Violation: with the program and the event in its text.
        """
        image, model, epoch = new_image(self.setting), Model(), None
        lives: list[list[Step]] = [[]]
        crashes: list[tuple[Any, ...]] = []
        for step in steps:
            if step[0] == "crash":
                crashes.append(step[1:])
                lives.append([])
            else:
                lives[-1].append(step)
        try:
            for number, life in enumerate(lives):
                trace = await bounded(functools.partial(record, image, self.setting, life, model, self.seed, epoch))
                self.tally.operations += len(life)
                check_backing(trace)
                if self.setting.durability is Durability.PMEM:
                    check_order(trace)
                if crashed:
                    await self._crash(trace, trace.starts[-1] if last_only and trace.starts else 0)
                if number < len(crashes):
                    epoch = trace.epoch if crashes[number][0] == "kill" else None
                    image, model = await self._survive(trace, epoch, *crashes[number])
        except Violation as violation:
            raise Violation(f"{violation}\n  program: {steps}, seed {self.seed}, {self.setting}") from None

    async def _crash(self, trace: Trace, first: int) -> None:
        media = Media(trace.image, self.setting.durability, fsync_takes_names=self.setting.fsync_takes_names)
        for number, event in enumerate(trace.log.events):
            media.follow(number, event)
            if number < first:
                continue
            model = trace.oracle.at(number + 1)
            for image in media.images(self._rng):
                try:
                    await self._image(image, model)
                except Violation as violation:
                    raise Violation(f"{violation}\n  crash after event {number} {event}") from None
            try:
                await self._kill(media, model, trace.epoch)
            except Violation as violation:
                raise Violation(f"{violation}\n  kill after event {number} {event}") from None

    async def _kill(self, media: Media, model: Model, epoch: bytes) -> None:
        """Only the daemon ends: nobody may be taken for a stranger."""
        image = _everything(media)
        key = image.digest() + epoch, frozenset(model.items())
        if key not in self._seen:
            self._seen.add(key)
            await bounded(lambda: examine(image, self.setting, model, drain=False, epoch=epoch))

    async def _image(self, image: Image, model: Model) -> None:
        digest = image.digest()
        key = digest, frozenset(model.items())
        if key in self._seen:
            return
        self._seen.add(key)
        self._count(digest)
        count = len(self._seen)
        findings = await bounded(lambda: examine(image, self.setting, model, drain=count % DRAINED == 0))
        if count % self._nested_of == 0 and not findings.refused:
            await self._nested(image, findings, model)

    def _count(self, digest: bytes) -> None:
        self.tally.images.add(hashlib.blake2b(digest + self._salt, digest_size=12).digest())

    async def _nested(self, image: Image, first: Findings, model: Model) -> None:
        """Crash the recovery of an image, everywhere; what an undisturbed one has found is found again."""
        media = Media(image, self.setting.durability, fsync_takes_names=self.setting.fsync_takes_names)
        seen: set[bytes] = set()
        for number, event in enumerate(first.log.events):
            media.follow(number, event)
            for again in media.images(self._rng, samples=1):
                digest = again.digest()
                if digest in seen:
                    continue
                seen.add(digest)
                self._count(digest)
                findings = await bounded(functools.partial(examine, again, self.setting, model, drain=False))
                if findings.refused or self.setting.durability is Durability.DISK:
                    continue
                if _data(findings) != _data(first):
                    raise Violation("a recovery that was interrupted finds other content than one that was not")
            await self._kill(media, model, b"%d" % (int(image.catalog.settings.get("epoch", b"0")) + 1))

    async def _survive(self, trace: Trace, epoch: bytes | None, which: str, *changes: Change) -> tuple[Image, Model]:
        """A crash at the end of a life: what is left, and what is known of it. All names arrive."""
        media = Media(trace.image, self.setting.durability, fsync_takes_names=self.setting.fsync_takes_names)
        for number, event in enumerate(trace.log.events):
            media.follow(number, event)
        share = {"none": 0.0, "some": 0.5, "all": 1.0, "kill": 1.0}[which]
        counts = {line: sum(self._rng.random() < share for _ in stores) for line, stores in media.lines.pending.items()}
        kept = [
            pending.operation[0] in ("create", "rename", "unlink") or self._rng.random() < share
            for pending in media.disk.pending
        ]
        image = media.image(counts, kept, superblock=int(share == 1))
        before = trace.oracle.model
        for change in changes:
            image, before = change(image, before)
        findings = await bounded(lambda: examine(image, self.setting, before, drain=True, epoch=epoch))
        model = {}
        for token, file in before.items():
            names = [name for name, ino in image.fs.names.items() if ino == file.ino]
            if file.ino not in image.fs.inodes and file.name is not None:
                names = [file.name]  # created again
            for name in names:
                content = bytearray(findings.contents[name])
                for block in file.lost:  # it stays lost: what is not reported must be right
                    part = slice(block * BLOCK, (block + 1) * BLOCK)
                    content[part] = file.content[part][: len(content[part])]
                model[token] = File(token, file.ino, name, frozenset({name}), (bytes(content),), lost=file.lost)
        return image, model


def _data(findings: Findings) -> list[bytes]:
    """Contents, wherever they are: a file that is created again may leave an empty one behind, and go elsewhere."""
    return sorted(content for content in findings.contents.values() if content.strip(b"\0"))


class _Counter(trio.abc.Instrument):
    """Counts the steps of all tasks, and cancels a scope after too many."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self._scope = scope
        self._left = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self._scope.cancel()


async def bounded(fn: Callable[[], Awaitable[T]], steps: int = MAX_STEPS) -> T:
    """Run ``fn``, but not for ever.

    :raises Violation: it does not end.
    """
    with trio.move_on_after(MAX_SECONDS) as scope:
        counter = _Counter(scope, steps)
        trio.lowlevel.add_instrument(counter)
        try:
            return await fn()
        finally:
            trio.lowlevel.remove_instrument(counter)
    raise Violation("it does not end")


def settings() -> Iterator[Setting]:
    """The ones that a campaign goes through."""
    yield Setting(slots=6)
    yield Setting(slots=6, durability=Durability.DISK)
    yield Setting(slots=4)
    yield Setting(slots=8, fsync_takes_names=True)
    yield Setting(slots=5, durability=Durability.DISK, sync_writes=True)
    yield Setting(slots=8, durability=Durability.DISK, hasty=True)
    yield Setting(slots=6, vector_min_blocks=1)
    yield Setting(slots=6, durability=Durability.DISK, vector_min_blocks=1)
    # More headers than one sector has: they reach the disk in another order than they were stored in.
    yield Setting(slots=12, durability=Durability.DISK)
    yield Setting(slots=20, durability=Durability.DISK)


async def run_programs(campaign: Campaign, programs: Iterable[list[Step]], *, last_only: bool) -> None:
    """:raises Violation: of the first program that shows one."""
    for steps in programs:
        await campaign.program(steps, last_only=last_only)
