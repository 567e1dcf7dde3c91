"""The crash simulator over all shortest programs: every crash leaves what was acknowledged (see sim/)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from sim import log as events
from sim.campaign import Campaign, run_programs, settings
from sim.crash import Media
from sim.log import Violation
from sim.media import BLOCK
from sim.oracle import Effect, File, Overlap, check_file
from sim.workloads import overlap_programs, short_programs
from sim.world import Setting, examine, new_image, record, simulate

from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.ports import Durability

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)  # 3 to 6 s of one core
@pytest.mark.parametrize("setting", list(settings()), ids=str)
def test_short_programs(setting: Setting, expect_logs: Callable[..., None]) -> None:
    expect_logs("not in the backing any more: created again|damaged headers: their slots are set aside")
    campaign = Campaign(setting)
    # The first ones find, among others, that a file was made clean before its name was durable.
    programs = itertools.chain(short_programs(1), itertools.islice(short_programs(2), 60))
    simulate(lambda: run_programs(campaign, programs, last_only=True))
    assert len(campaign.tally.images) > 500


@pytest.mark.timeout(900)
@pytest.mark.parametrize("setting", [Setting(slots=8), Setting(slots=8, durability=Durability.DISK)], ids=str)
def test_operations_that_overlap(setting: Setting, expect_logs: Callable[..., None]) -> None:
    expect_logs("not in the backing any more: created again|damaged headers: their slots are set aside")
    campaign = Campaign(setting, nested=60)
    simulate(lambda: run_programs(campaign, overlap_programs()[::29], last_only=True))
    assert len(campaign.tally.images) > 200


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
