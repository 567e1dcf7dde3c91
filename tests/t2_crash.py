"""The crash simulator itself: its oracle, its images, and a program that does not end. ``make crash`` runs programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from sim import log as events
from sim.campaign import Campaign
from sim.crash import Media
from sim.log import Violation
from sim.media import BLOCK
from sim.oracle import Effect, File, Overlap, check_file
from sim.world import Setting, examine, new_image, record, simulate

from cachefsd.media.header import HEADER_SIZE

pytestmark = pytest.mark.slow


def test_operations_that_overlap_have_one_of_their_outcomes() -> None:
    """The oracle itself: every order is admitted, and nothing else, nor an order that time forbids."""
    start = File(1, 1, "a", frozenset({"a"}), (b"old old ",))
    write = Effect(lambda file: file._replace(contents=(b"new " + file.content[4:],)), lambda old: b"new " + old[4:])
    cut = Effect(lambda file: file._replace(contents=(b"",)), lambda old: b"")
    overlap = Overlap(start, [write, cut])
    overlap.begin(0)
    overlap.begin(1)
    overlap.end(0)
    for found in (b"new old ", b"new ", b""):
        check_file(overlap.now(), found)
    with pytest.raises(Violation):
        check_file(overlap.now(), b"old old ")
    overlap.end(1)
    assert overlap.ended(b"new ", 1).content == b"new "
    assert overlap.ended(b"", 1).content == b""
    with pytest.raises(Violation):
        overlap.ended(b"new old ", 1)
    one_by_one = Overlap(start, [write, cut])
    one_by_one.begin(0)
    one_by_one.end(0)
    one_by_one.begin(1)
    one_by_one.end(1)
    with pytest.raises(Violation):
        one_by_one.ended(b"new ", 1)


def test_the_words_of_a_header_arrive_in_any_order(expect_logs: Callable[..., None]) -> None:
    """Every subset of the words on their way to a header: it is not there, or whole, or set aside."""
    expect_logs("damaged headers: their slots are set aside")

    async def run() -> int:
        setting, images = Setting(), 0
        steps = [("write", "a", 0, BLOCK), ("write", "a", 0, BLOCK)]
        trace = await record(new_image(setting), setting, steps)
        media = Media(trace.image, setting.durability)
        for number, event in enumerate(trace.log.events):
            media.follow(number, event)
            for line in range(setting.slots):
                words = media.lines.pending.get(line, [])
                if event[0] == events.STORE and len(words) == HEADER_SIZE // 8:
                    kept = [True] * len(media.disk.pending)
                    for chosen in itertools.product((False, True), repeat=len(words)):
                        arrived = {line: [index for index, there in enumerate(chosen) if there]}
                        await examine(media.image(arrived, kept), setting, trace.oracle.at(number + 1), drain=False)
                        images += 1
        return images

    assert simulate(run) == 2 * 2**8


def test_a_program_that_never_ends_is_reported() -> None:
    campaign = Campaign(Setting())
    with pytest.raises(Violation, match="does not end"):
        simulate(lambda: campaign.program([("append", "a", 64), ("wait", 1e9)]))
