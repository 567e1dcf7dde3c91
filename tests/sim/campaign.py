"""Recording programs and crashing them everywhere, in this process or in several."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cachefsd.media.ports import Durability
from sim.crash import Image, Media
from sim.monitor import check_order
from sim.oracle import Model, Violation
from sim.world import Findings, Setting, Step, Trace, examine, new_image, record

NESTED = 15
"""Of so many images one is crashed again during its recovery."""
DRAINED = 3
"""Of so many images one is also written back."""


@dataclass
class Tally:
    """What a campaign has done."""

    operations: int = 0
    images: int = 0
    violations: list[str] = field(default_factory=list)


def images_after(trace: Trace, rng: random.Random, most: int) -> list[Image]:
    """What a crash at the end of a record may leave: nothing and everything arrived, and some others."""
    media = Media(trace.image, trace.setting.durability, fsync_takes_names=trace.setting.fsync_takes_names)
    for number, event in enumerate(trace.log.events):
        media.follow(number, event)
    pending = media.lines.pending
    nothing = media.image({}, [False] * len(media.disk.pending))
    everything = media.image({line: len(words) for line, words in pending.items()}, [True] * len(media.disk.pending))
    others = list(media.images(rng, samples=1))
    return [nothing, everything, *rng.sample(others, min(len(others), most - 2))]


class Campaign:
    """Programs of one setting; images that recovery cannot tell apart are examined once."""

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        self.setting = setting
        self.seed = seed
        self.tally = Tally()
        self._seen: set[bytes] = set()
        self._rng = random.Random(seed)

    async def program(self, steps: list[Step], *, last_only: bool = False) -> None:
        """Record one program, check the order of its events, and crash it at every event (of its last step).

        :raises Violation: with the program and the event in its text.
        """
        try:
            trace = await record(new_image(self.setting), self.setting, steps, seed=self.seed)
            self.tally.operations += len(steps)
            if self.setting.durability is Durability.PMEM:
                check_order(trace)
        except Violation as violation:
            raise Violation(f"{violation}\n  program: {steps}, seed {self.seed}, {self.setting}") from None
        await self._crash(trace, steps, trace.starts[-1] if last_only and trace.starts else 0)

    async def _crash(self, trace: Trace, steps: list[Step], first: int) -> None:
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
                    raise Violation(
                        f"{violation}\n  crash after event {number} {event}\n  program: {steps}, seed {self.seed}, "
                        f"{self.setting}"
                    ) from None

    async def _image(self, image: Image, model: Model) -> None:
        digest = image.digest()
        if digest in self._seen:
            return
        self._seen.add(digest)
        self.tally.images += 1
        count = self.tally.images
        findings = await examine(image, self.setting, model, drain=count % DRAINED == 0)
        if count % NESTED == 0:
            await self._nested(image, findings, model)

    async def _nested(self, image: Image, first: Findings, model: Model) -> None:
        """Crash the recovery of an image, everywhere; what an undisturbed one has found is found again."""
        media = Media(image, self.setting.durability, fsync_takes_names=self.setting.fsync_takes_names)
        again = None
        for number, event in enumerate(first.log.events):
            media.follow(number, event)
            for again in media.images(self._rng, samples=1):
                digest = again.digest()
                if digest not in self._seen:
                    self._seen.add(digest)
                    self.tally.images += 1
                    findings = await examine(again, self.setting, model, drain=False)
                    if _data(findings) != _data(first) and self.setting.durability is not Durability.DISK:
                        raise Violation("a recovery that was interrupted finds other content than one that was not")


def _data(findings: Findings) -> list[bytes]:
    """Contents, wherever they are: a file that is created again may leave an empty one behind, and go elsewhere."""
    return sorted(content for content in findings.contents.values() if content.strip(b"\0"))


def settings() -> Iterator[Setting]:
    """The ones that a campaign goes through."""
    yield Setting(slots=6)
    yield Setting(slots=6, durability=Durability.DISK)
    yield Setting(slots=4)
    yield Setting(slots=8, fsync_takes_names=True)
    yield Setting(slots=5, durability=Durability.DISK, sync_writes=True)


async def run_programs(campaign: Campaign, programs: Iterable[list[Step]], *, last_only: bool) -> None:
    """:raises Violation: of the first program that shows one."""
    for steps in programs:
        await campaign.program(steps, last_only=last_only)
