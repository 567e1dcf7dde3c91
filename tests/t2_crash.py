"""The crash simulator over all shortest programs: every crash leaves what was acknowledged (see sim/)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from sim.campaign import Campaign, run_programs, settings
from sim.oracle import Violation
from sim.workloads import short_programs
from sim.world import Setting, simulate


@pytest.mark.parametrize("setting", list(settings()), ids=str)
def test_short_programs(setting: Setting, expect_logs: Callable[..., None]) -> None:
    expect_logs("not in the backing any more: created again")
    campaign = Campaign(setting)
    # The first ones find, among others, that a file was made clean before its name was durable.
    programs = itertools.chain(short_programs(1), itertools.islice(short_programs(2), 150))
    simulate(lambda: run_programs(campaign, programs, last_only=True))
    assert campaign.tally.images > 500


def test_a_program_that_never_ends_is_reported() -> None:
    campaign = Campaign(Setting())
    with pytest.raises(Violation, match="never ends"):
        simulate(lambda: campaign.program([("append", "a", 64), ("wait", 1e9)]))
