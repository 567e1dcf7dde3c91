"""Hypothesis writes programs, and draws what a crash leaves of them: failures shrink to the shortest that shows them.

The rules of a machine only note what is to be done. A crash runs what was noted since the last one, keeps a drawn part
of the events and of what was on its way to the media then, recovers, and goes on from there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from sim.campaign import images_after
from sim.crash import Image, Media
from sim.log import Violation
from sim.media import BLOCK
from sim.monitor import check_backing, check_order
from sim.mutants import MUTANTS, seeded
from sim.oracle import File, Model, token_of
from sim.world import Findings, Setting, Step, Trace, examine, new_image, record, simulate

from cachefsd.media.ports import Durability

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "50"))
"""programs per setting"""
STEPS = 20
SETTINGS = {
    "pmem": Setting(slots=6),
    "few slots": Setting(slots=4, fsync_takes_names=True),
    "pmem, at once": Setting(slots=5, vector_min_blocks=1),
    "disk": Setting(slots=6, durability=Durability.DISK),
    "disk, synchronous": Setting(slots=5, durability=Durability.DISK, sync_writes=True),
}
NOISE = "created again|damaged headers: their slots are set aside|writeback failed|upkeep: |the cache has failed"
CALLS = (
    "open",
    "read",
    "write",
    "sync",
    "truncate",
    "set_mtime",
    "stat",
    "sync_directory",
    "sync_all",
    "unlink",
    "catalog",
)

names = st.sampled_from("abc")
offsets = st.integers(0, 40).map(lambda word: 8 * word)
sizes = st.integers(1, 40).map(lambda word: 8 * word)


class Machine(RuleBasedStateMachine):
    """A program of several lives."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.image = new_image(setting)
        self.model: Model = {}
        self.life: list[Step] = []
        self.program: list[Step] = []
        """all lives"""
        self.over = False

    # ---- what a user does

    def _note(self, *step: Any) -> None:
        self.life.append(step)
        self.program.append(step)

    @rule(name=names, offset=offsets, size=sizes)
    def write(self, name: str, offset: int, size: int) -> None:
        self._note("write", name, offset, size)

    @rule(name=names, first=st.integers(0, 3), count=st.integers(1, 3))
    def write_blocks(self, name: str, first: int, count: int) -> None:
        self._note("write", name, first * BLOCK, count * BLOCK)

    @rule(name=names, size=sizes)
    def append(self, name: str, size: int) -> None:
        self._note("append", name, size)

    @rule(name=names, size=offsets)
    def truncate(self, name: str, size: int) -> None:
        self._note("truncate", name, size)

    @rule(name=names, what=st.sampled_from(["read", "fsync", "utimes", "retime", "close", "unlink"]))
    def simple(self, name: str, what: str) -> None:
        self._note(what, name)

    @rule(old=names, new=names)
    def rename(self, old: str, new: str) -> None:
        if old != new:
            self._note("rename", old, new)

    @rule(what=st.sampled_from(["flush", "start_flush", "sync_directory"]))
    def sync(self, what: str) -> None:
        self._note(what)

    @rule(seconds=st.sampled_from([1, 12, 30]))
    def wait(self, seconds: int) -> None:
        self._note("wait", seconds)

    @rule(call=st.sampled_from(CALLS), after=st.integers(1, 3), times=st.sampled_from([1, 1000]))
    def fail(self, call: str, after: int, times: int) -> None:
        self._note("fail", call, after, 5, times)

    @precondition(lambda self: any(step[0] == "fail" for step in self.life))
    @rule()
    def heal(self) -> None:
        self._note("heal")

    # ---- the end of a life

    @precondition(lambda self: self.life and not self.over)
    @rule(data=st.data(), seed=st.integers(0, 3))
    def crash(self, data: st.DataObject, seed: int) -> None:
        self.program.append(("crash",))
        trace = self._run(seed)
        number = len(trace.log.events) - data.draw(st.integers(0, len(trace.log.events)), "events that never happened")
        media = Media(trace.image, self.setting.durability, fsync_takes_names=self.setting.fsync_takes_names)
        for at, event in enumerate(trace.log.events[:number]):
            media.follow(at, event)
        image = drawn(media, data)
        findings = self._examine(image, trace.oracle.at(number), drain=data.draw(st.booleans(), "drained"))
        if findings.refused:
            self.over = True
        else:
            self._go_on(image, trace.oracle.at(number), findings)

    def teardown(self) -> None:
        """Whatever a last crash leaves."""
        if not self.over and self.life:
            trace = self._run(0)
            for number, image in enumerate(images_after(trace, random.Random(0), 4)):
                self._examine(image, trace.oracle.model, drain=number == 1)

    def _run(self, seed: int) -> Trace:
        trace: Trace = simulate(lambda: record(self.image, self.setting, self.life, self.model, seed=seed))
        check_backing(trace)
        if self.setting.durability is Durability.PMEM:
            check_order(trace)
        return trace

    def _examine(self, image: Image, model: Model | None, *, drain: bool = False) -> Findings:
        findings: Findings = simulate(lambda: examine(image, self.setting, model, drain=drain))
        return findings

    def _go_on(self, image: Image, before: Model, first: Findings) -> None:
        """The next life begins with the media as recovery has left them, and with what it has found."""
        media = Media(image, self.setting.durability, fsync_takes_names=self.setting.fsync_takes_names)
        for number, event in enumerate(first.log.events):
            media.follow(number, event)
        everything = {line: len(words) for line, words in media.lines.pending.items()}
        self.image = media.image(everything, [True] * len(media.disk.pending))
        again = self._examine(self.image, None)
        if again.contents != first.contents:
            raise Violation("a second recovery finds other content than the first")
        tokens = {file.ino: file.token for file in before.values()}
        nowhere: frozenset[str | None] = frozenset({None})  # what is gone stays gone
        self.model = {token: file._replace(name=None, names=nowhere, pending=None) for token, file in before.items()}
        for name, ino in self.image.fs.names.items():
            content = again.contents[name]
            token = tokens.get(ino) or token_of(content) or max(self.model, default=0) + 1
            self.model[token] = File(token, ino, name, frozenset({name}), (content,))
        self.life = []


def drawn(media: Media, data: st.DataObject) -> Image:
    """What a crash leaves: of each line so many stores, or some words; of the backing some of the changes."""
    pending, count = media.lines.pending, len(media.disk.pending)
    arrived: dict[int, Any] = {}
    pool = data.draw(st.sampled_from(["nothing", "everything", "some"]), "stores") if pending else "nothing"
    if pool != "nothing":
        arrived = {line: len(words) for line, words in pending.items()}
    if pool == "some":
        for line, words in pending.items():
            subset = st.lists(st.sampled_from(range(len(words))), unique=True).map(sorted)
            arrived[line] = data.draw(st.integers(0, len(words)) | subset, f"line {line}")
    kept = [False] * count
    backing = data.draw(st.sampled_from(["nothing", "everything", "some"]), "backing") if count else "nothing"
    if backing == "everything":
        kept = [True] * count
    elif backing == "some":
        kept = data.draw(st.lists(st.booleans(), min_size=count, max_size=count), "changes of the backing")
    superblock = data.draw(st.sampled_from([0, 1, 2]), "superblock") if media.superblock_coming else 0
    return media.image(arrived, kept, superblock)


PROFILE = {
    "deadline": None,
    "stateful_step_count": STEPS,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "report_multiple_bugs": False,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_machine(name: str, expect_logs: Callable[..., None]) -> None:
    expect_logs(NOISE)
    run_state_machine_as_test(lambda: Machine(SETTINGS[name]), settings=settings(max_examples=EXAMPLES, **PROFILE))


FOUND = {
    "a truncate commits no intent": "pmem",
    "blocks become clean before the sync of the names": "pmem",
    "recovery takes the lowest sequence number": "few slots",
}
"""seeded fault: the setting that shows it"""


@pytest.mark.parametrize("name", FOUND)
def test_what_is_broken_is_found(name: str, expect_logs: Callable[..., None]) -> None:
    """Without shrinking, which Hypothesis ends by the clock. By hand the first ones come out as a write, a truncate (a
    pause), and a crash."""
    expect_logs("")
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    with seeded(mutant), pytest.raises(Violation):
        run_state_machine_as_test(
            lambda: Machine(SETTINGS[FOUND[name]]),
            settings=settings(max_examples=300, phases=[Phase.generate], print_blob=False, **PROFILE),
        )
