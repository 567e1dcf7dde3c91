"""Every seeded fault is found by its scenario, which finds nothing in the code as it is (see sim/mutants.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sim.mutants import MUTANTS, Mutant, StaleMutant, seeded, table
from sim.oracle import Violation
from sim.scenarios import SCENARIOS, run
from sim.world import simulate

DOCUMENT = Path(__file__).parent.parent / "docs/durability.md"


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_found_without_a_fault(name: str, expect_logs: Callable[..., None]) -> None:
    expect_logs("")
    assert simulate(run, name).operations > 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_seeded_fault_is_found(mutant: Mutant, expect_logs: Callable[..., None]) -> None:
    expect_logs("")
    with seeded(mutant), pytest.raises(Violation):
        simulate(run, mutant.killer)


def test_the_document_lists_the_faults() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert table() in DOCUMENT.read_text()


def test_a_fault_that_does_not_fit_the_source_is_refused() -> None:
    stale = MUTANTS[0]._replace(edits=(("no such text", ""),))
    with pytest.raises(StaleMutant), seeded(stale):
        pass


def test_a_fault_is_gone_afterwards() -> None:
    mutant = MUTANTS[0]
    with seeded(mutant), pytest.raises(Violation):
        simulate(run, mutant.killer)
    assert simulate(run, mutant.killer).operations > 0
