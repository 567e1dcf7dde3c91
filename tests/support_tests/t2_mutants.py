"""Seeding faults, and the campaign that runs them all: ``make crash`` does (see sim/mutants.py, sim/crashes.py)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from sim import crashes
from sim.campaign import Tally
from sim.mutants import MUTANTS, StaleMutant, seeded, table
from sim.oracle import Violation
from sim.scenarios import SCENARIOS, run
from sim.world import simulate

pytestmark = pytest.mark.slow
DOCUMENT = Path(__file__).parents[2] / "docs/durability.md"


def test_the_document_lists_the_faults() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert table() in DOCUMENT.read_text()


def test_a_fault_that_does_not_fit_the_source_is_refused() -> None:
    stale = MUTANTS[0]._replace(edits=(("no such text", ""),))
    with pytest.raises(StaleMutant), seeded(stale):
        pass


def test_the_campaign_tells_what_it_finds(monkeypatch: pytest.MonkeyPatch, expect_logs: Callable[..., None]) -> None:
    expect_logs("")
    mutant = MUTANTS[0]
    unit = crashes.Unit("scenario", list(SCENARIOS).index(mutant.killer))
    with seeded(mutant):
        assert f"scenario: {mutant.killer}" in crashes.run(unit).violation
    assert not crashes.run(unit).violation
    harmless = mutant._replace(name="nothing is wrong", edits=((mutant.edits[0][0],) * 2,))
    monkeypatch.setattr(crashes, "MUTANTS", (mutant, harmless))
    assert crashes.run(crashes.Unit("mutant", 0)).killed == mutant.name
    survivor = crashes.run(crashes.Unit("mutant", 1))
    assert not survivor.killed
    assert "does not notice that nothing is wrong" in survivor.violation


class Unclosed:
    def __del__(self) -> None:
        raise OSError("never closed")


def unclosed() -> None:
    Unclosed()


def logged(message: str) -> None:
    logging.getLogger("cachefsd.core").warning(message)


@pytest.mark.parametrize(
    ("beside", "found"),
    [
        (lambda: logged("out of order"), "unexpected warning: out of order"),
        (unclosed, "never closed"),
        (lambda: warnings.warn_explicit("old", DeprecationWarning, "pool.py", 1, "cachefsd.media.pool"), "old"),
    ],
)
def test_the_campaign_looks_at_more_than_results(
    monkeypatch: pytest.MonkeyPatch, expect_logs: Callable[..., None], beside: Callable[[], None], found: str
) -> None:
    expect_logs("")
    unit = crashes.Unit("single", 0)
    monkeypatch.setattr(crashes, "simulate", lambda run: logged("damaged headers: their slots are set aside"))
    assert crashes.run(unit).violation == "only 0 images"
    monkeypatch.setitem(crashes.LEAST_IMAGES, "single", -1)
    assert not crashes.run(unit).violation
    monkeypatch.setattr(crashes, "simulate", lambda run: beside())
    assert found in crashes.run(unit).violation


def test_the_campaign_needs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashes, "simulate", lambda run, name: Tally())
    assert "does nothing" in crashes.run(crashes.Unit("scenario", 0)).violation


def test_a_fault_is_gone_afterwards(expect_logs: Callable[..., None]) -> None:
    expect_logs("")
    mutant = MUTANTS[0]
    with seeded(mutant), pytest.raises(Violation):
        simulate(run, mutant.killer)
    assert simulate(run, mutant.killer).operations > 0
