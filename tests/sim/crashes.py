"""The crash campaign: ``python -m sim.crashes`` crashes programs everywhere until enough images have been recovered.

It runs all scenarios, all seeded faults, and then rounds of short, random and faulty programs in all settings. What
runs is the same every time; only ``--seconds`` makes it go on for longer. Whatever is found ends it, and is printed
with the name of its unit of work; ``--unit`` runs just that again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from cachefsd.media.ports import Durability
from sim import scenarios
from sim.campaign import NESTED, Campaign, Tally, run_programs, settings
from sim.mutants import MUTANTS, StaleMutant, seeded
from sim.oracle import Violation
from sim.workloads import faulty_program, overlap_programs, random_program, short_programs
from sim.world import Setting, Step, simulate

ENOUGH_IMAGES = 100_000
ROUNDS = 1
"""At least so many, also where the first units have made enough images."""
PROCESSES = 2
SHORT = 30
"""programs in a unit of short ones: of two operations as long as there are new ones, then of three"""
LONG = 12
"""operations of a long program"""
BESIDE = 6
"""programs of operations that overlap in a unit"""
PAIRS = 60
"""The first programs of two operations, which find, among others, that a file was made clean before its name was
durable."""
EVERY = 29
"""Of so many programs of operations that overlap, one is in a unit that spreads over all of them."""
SPREAD_NESTED = 60
LEAST_IMAGES = {"single": 500, "spread": 200}
"""A unit that makes fewer does not test what it is for."""
LOGGED = re.compile("not in the backing any more: created again|damaged headers: their slots are set aside")
"""What crashes of such units may lead to; every other warning is a violation."""

ROUND_SETTINGS = tuple(settings())
SPREAD_SETTINGS = (Setting(slots=8), Setting(slots=8, durability=Durability.DISK))
SETTINGS = (*ROUND_SETTINGS, *SPREAD_SETTINGS)


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
        *(Unit("single", 0, setting) for setting in range(len(ROUND_SETTINGS))),
        *(Unit("spread", 0, SETTINGS.index(setting)) for setting in SPREAD_SETTINGS),
    ]


def rounds() -> Iterator[list[Unit]]:
    """And how it goes on, without an end."""
    for number in itertools.count():
        kinds = ("short", "random", "faulty", "beside")
        yield [Unit(kind, number, setting) for setting in range(len(ROUND_SETTINGS)) for kind in kinds]


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
        with _watched(unit):
            if unit.kind == "mutant":
                _run_mutant(unit, outcome)
            elif unit.kind == "scenario":
                _run_scenario(unit, outcome)
            else:
                _run_programs(unit, outcome)
    except Violation as violation:
        outcome.violation = str(violation)
    except Exception:
        outcome.violation = traceback.format_exc()
    return outcome


class _Messages(logging.Handler):
    """The warnings of cachefsd, which nobody else sees."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.unexpected: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not LOGGED.search(message):
            self.unexpected.add(message)


@contextmanager
def _watched(unit: Unit) -> Iterator[None]:
    """Look at what pytest looks at beside the result: warnings, and exceptions that nobody can catch.

    :raises Violation: there are some that a unit of this kind may not have.
    """
    messages, unraisable, hook = _Messages(), list[str](), sys.unraisablehook
    logger = logging.getLogger("cachefsd")
    # The other kinds damage what they run on, and damage is logged.
    handler = messages if unit.kind in LEAST_IMAGES else logging.NullHandler()
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    sys.unraisablehook = lambda args: unraisable.append(f"{args.err_msg or args.object!r}: {args.exc_value!r}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="cachefsd")
            yield
            # Objects that nobody closed complain when they are collected: let it be in the unit that made them.
            gc.collect()
    finally:
        sys.unraisablehook = hook
        logger.removeHandler(handler)
        logger.propagate = propagated
    complaints = [*unraisable, *(f"unexpected warning: {message}" for message in sorted(messages.unexpected))]
    if complaints:
        raise Violation("\n".join(complaints))


def _run_scenario(unit: Unit, outcome: Outcome) -> None:
    outcome.tally = simulate(scenarios.run, list(scenarios.SCENARIOS)[unit.number])
    if not outcome.tally.operations:
        raise Violation("the scenario does nothing")


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
    campaign = Campaign(setting, seed=unit.number, nested=SPREAD_NESTED if unit.kind == "spread" else NESTED)
    outcome.tally = campaign.tally
    rng = random.Random(f"{unit.kind} {unit.number}")
    programs = {
        "single": lambda: [*short_programs(1), *itertools.islice(short_programs(2), PAIRS)],
        "spread": lambda: overlap_programs()[::EVERY],
        "short": lambda: _short(unit),
        "random": lambda: [random_program(rng, LONG)],
        "faulty": lambda: [faulty_program(rng, LONG)],
        "beside": lambda: rng.sample(overlap_programs(), BESIDE),
    }[unit.kind]()
    simulate(lambda: run_programs(campaign, programs, last_only=unit.kind not in ("random", "faulty")))
    if len(outcome.tally.images) <= LEAST_IMAGES.get(unit.kind, 0):
        raise Violation(f"only {len(outcome.tally.images)} images")


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
    if arguments.unit:
        kind, number, setting = arguments.unit.split(":")
        outcome = run(Unit(kind, int(number), int(setting)))
        print(outcome.violation or f"{len(outcome.tally.images)} images, nothing found")
        return int(bool(outcome.violation))
    report = _Report()
    with ProcessPoolExecutor(PROCESSES) as executor:
        report.take(executor, first_units())
        for number, units in enumerate(rounds()):
            enough = number >= ROUNDS and len(report.images) >= ENOUGH_IMAGES and report.seconds >= arguments.seconds
            if enough or report.violations:
                break
            report.take(executor, units)
    report.print_end()
    return int(report.violations > 0)


if __name__ == "__main__":
    sys.exit(main())
