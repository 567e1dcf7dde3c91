"""The crash campaign: ``python -m sim.crashes`` crashes programs everywhere until enough images have been recovered.

It runs all scenarios, all seeded faults, and then rounds of short, random and faulty programs in all settings. What
runs is the same every time; only ``--seconds`` makes it go on for longer. Whatever is found ends it, and is printed
with the name of its unit of work; ``--unit`` runs just that again.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from sim import scenarios
from sim.campaign import Campaign, Tally, run_programs, settings
from sim.mutants import MUTANTS, StaleMutant, seeded
from sim.oracle import Violation
from sim.workloads import faulty_program, overlap_programs, random_program, short_programs
from sim.world import Setting, Step, simulate

ENOUGH_IMAGES = 100_000
PROCESSES = 2
SHORT = 30
"""programs in a unit of short ones: of two operations as long as there are new ones, then of three"""
LONG = 12
"""operations of a long program"""
BESIDE = 6
"""programs of operations that overlap in a unit"""
SETTINGS = tuple(settings())


class Unit(NamedTuple):
    """A piece of work for one process: kind, number (of the mutant, scenario or round), and number of the setting."""

    kind: str
    number: int
    setting: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}:{self.setting}"


@dataclass
class Outcome:
    """What a unit has done, and what it has found."""

    unit: Unit
    tally: Tally = field(default_factory=Tally)
    killed: str = ""
    """the mutant that was"""
    violation: str = ""


def first_units() -> list[Unit]:
    """What every campaign begins with."""
    return [
        *(Unit("mutant", number) for number in range(len(MUTANTS))),
        *(Unit("scenario", number) for number in range(len(scenarios.SCENARIOS))),
        *(Unit("single", 0, setting) for setting in range(len(SETTINGS))),
    ]


def rounds() -> Iterator[list[Unit]]:
    """And how it goes on, without an end."""
    for number in itertools.count():
        kinds = ("short", "random", "faulty", "beside")
        yield [Unit(kind, number, setting) for setting in range(len(SETTINGS)) for kind in kinds]


def _shuffled(length: int, setting: int) -> list[list[Step]]:
    programs = list(short_programs(length))
    random.Random(setting).shuffle(programs)
    return programs


def _short(unit: Unit) -> list[list[Step]]:
    start = unit.number * SHORT
    pairs = _shuffled(2, unit.setting)
    if start < len(pairs):
        return pairs[start : start + SHORT]
    start -= len(pairs)
    triples = _shuffled(3, unit.setting)
    return [triples[number % len(triples)] for number in range(start, start + SHORT)]


def run(unit: Unit) -> Outcome:
    """Do a unit of work, and catch what it finds."""
    outcome = Outcome(unit)
    try:
        if unit.kind == "mutant":
            _run_mutant(unit, outcome)
        elif unit.kind == "scenario":
            outcome.tally = simulate(scenarios.run, list(scenarios.SCENARIOS)[unit.number])
        else:
            _run_programs(unit, outcome)
    except Violation as violation:
        outcome.violation = str(violation)
    except Exception:
        outcome.violation = traceback.format_exc()
    return outcome


def _run_mutant(unit: Unit, outcome: Outcome) -> None:
    mutant = MUTANTS[unit.number]
    try:
        with seeded(mutant):
            simulate(scenarios.run, mutant.killer)
    except StaleMutant as error:
        raise Violation(str(error)) from None
    except Violation:
        outcome.killed = mutant.name
        return
    raise Violation(f"scenario {mutant.killer!r} does not notice that {mutant.name}")


def _run_programs(unit: Unit, outcome: Outcome) -> None:
    setting: Setting = SETTINGS[unit.setting]
    campaign = Campaign(setting, seed=unit.number)
    outcome.tally = campaign.tally
    rng = random.Random(f"{unit.kind} {unit.number}")
    programs = {
        "single": lambda: list(short_programs(1)),
        "short": lambda: _short(unit),
        "random": lambda: [random_program(rng, LONG)],
        "faulty": lambda: [faulty_program(rng, LONG)],
        "beside": lambda: rng.sample(overlap_programs(), BESIDE),
    }[unit.kind]()
    simulate(lambda: run_programs(campaign, programs, last_only=unit.kind in ("single", "short", "beside")))


class _Report:
    """What has been done so far."""

    def __init__(self) -> None:
        self.images: set[bytes] = set()
        self.operations = 0
        self.killed: set[str] = set()
        self.violations = 0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def take(self, executor: Executor, units: list[Unit]) -> None:
        """Have these units done, and add them up."""
        for outcome in executor.map(run, units):
            self.images |= outcome.tally.images
            self.operations += outcome.tally.operations
            if outcome.killed:
                self.killed.add(outcome.killed)
            if outcome.violation:
                self.violations += 1
                print(f"violation, again by make crash UNIT={outcome.unit}\n{outcome.violation}\n", flush=True)
        print(f"{self.seconds:5.0f} s: {len(self.images)} images, {self.operations} operations", flush=True)

    def print_end(self) -> None:
        print(f"images {len(self.images)}")
        print(f"operations {self.operations}")
        print(f"mutants {len(self.killed)}/{len(MUTANTS)} killed")
        print(f"violations {self.violations}", flush=True)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m sim.crashes", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.0, help="go on for at least so long")
    parser.add_argument("--unit", help="KIND:NUMBER:SETTING of a violation: run this one only")
    arguments = parser.parse_args()
    logging.disable()  # damage is logged, and there is much of it
    if arguments.unit:
        kind, number, setting = arguments.unit.split(":")
        outcome = run(Unit(kind, int(number), int(setting)))
        print(outcome.violation or f"{len(outcome.tally.images)} images, nothing found")
        return int(bool(outcome.violation))
    report = _Report()
    with ProcessPoolExecutor(PROCESSES, initializer=logging.disable) as executor:
        report.take(executor, first_units())
        for units in rounds():
            enough = len(report.images) >= ENOUGH_IMAGES and report.seconds >= arguments.seconds
            if enough or report.violations:
                break
            report.take(executor, units)
    report.print_end()
    return int(report.violations > 0)


if __name__ == "__main__":
    sys.exit(main())
