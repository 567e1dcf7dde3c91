"""The crash simulator itself: its oracle, its images, and a program that does not end. ``make crash`` runs programs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from sim import log as events
from sim.campaign import Campaign
from sim.crash import SECTOR, Media
from sim.log import Violation
from sim.media import BLOCK
from sim.oracle import Effect, File, Overlap, check_file
from sim.world import Setting, Step, examine, new_image, record, simulate

from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.ports import Durability

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


@pytest.mark.parametrize("slots", [12, 20])
def test_sectors_of_headers_arrive_in_any_order(slots: int) -> None:
    """Class ``disk``: of headers in two sectors the later one may be there without the earlier one, and vice versa."""

    async def run() -> set[tuple[bool, bool]]:
        setting, found = Setting(slots=slots, durability=Durability.DISK), set()
        steps: list[Step] = [("write", "a", number * BLOCK, BLOCK) for number in range(9)]
        trace = await record(new_image(setting), setting, steps)
        media, rng = Media(trace.image, setting.durability), random.Random(0)
        headers = [media.image({}, []).pool.content[: slots * HEADER_SIZE]]
        for number, event in enumerate(trace.log.events):
            media.follow(number, event)
            for image in media.images(rng):
                headers.append(image.pool.content[: slots * HEADER_SIZE])
        for each in headers:
            first, second = each[:SECTOR], each[SECTOR:]
            found.add((first != headers[0][:SECTOR], second != headers[0][SECTOR:]))
        return found

    assert simulate(run) == {(False, False), (False, True), (True, False), (True, True)}


def test_a_program_that_never_ends_is_reported() -> None:
    campaign = Campaign(Setting())
    with pytest.raises(Violation, match="does not end"):
        simulate(lambda: campaign.program([("append", "a", 64), ("wait", 1e9)]))
