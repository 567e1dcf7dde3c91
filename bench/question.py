"""A question to the file systems: its candidates, what is measured of each, and what must come out."""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.candidates import Candidate, Served, served
from bench.disks import Absent

Figures = dict[str, float]
"""by name, which ends with the unit: ``depth 1 [IOPS]``"""
OWN = "cachefsd"


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int
    seconds: float
    """of one run"""
    quick: bool
    base: Path
    """where the disks are made"""

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass(frozen=True)
class Bar:
    """A limit for a figure of one candidate, or for its ratio to a figure of another one in the same round."""

    figure: str
    limit: float
    of: str | None = None
    """the other candidate"""
    of_figure: str | None = None
    """when it is a figure of another name"""
    candidate: str = OWN
    at_most: bool = False

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        other = self.of_figure if self.of in (None, self.candidate) else self.of
        if self.of_figure is not None and self.of not in (None, self.candidate):
            other = f"{self.of}, {self.of_figure}"
        return f"{sign} {self.limit:g}" + (f" x {other}" if other else "")

    def value(self, figures: dict[str, Figures]) -> float | None:
        """In one round; None when one of the two was not measured."""
        try:
            own = figures[self.candidate][self.figure]
            if self.of is None and self.of_figure is None:
                return own
            return own / figures[self.of or self.candidate][self.of_figure or self.figure]
        except KeyError:
            return None

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def share(self, value: float) -> float:
        """How far a value, not 0, is on the good side: from 1 on it holds."""
        return self.limit / value if self.at_most else value / self.limit


@dataclass(frozen=True)
class Question:
    """One line of the table of questions, or a part of it."""

    number: int
    title: str
    about: str
    """what is measured, and how, for the report"""
    candidates: Sequence[Candidate]
    measure: Callable[[Served, Scale], Figures]
    bars: Sequence[Bar]
    peers: Sequence[Candidate] = ()
    """more candidates, that no bar is about: left out when it has to be quick"""
    rounds: int | None = None
    """at most so many"""
    derive: Callable[[dict[str, Figures]], None] | None = None
    """adds to the figures of a round, by candidate, what takes several candidates to know"""


@dataclass
class Verdict:
    """What became of one bar: values of all rounds, and their median."""

    bar: Bar
    values: list[float]

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def holds(self) -> bool | None:
        """None when it could not be measured."""
        return None if self.median is None else self.bar.holds(self.median)


@dataclass
class Answer:
    """Everything that was measured for one question."""

    question: Question
    rounds: list[dict[str, Figures]] = field(default_factory=list)
    """per round, by candidate"""
    promises: dict[str, str] = field(default_factory=dict)
    """by candidate: durability class and checks"""
    absent: dict[str, str] = field(default_factory=dict)
    """by candidate: why it was not measured"""
    error: str | None = None
    seconds: float = 0.0

    @property
    def verdicts(self) -> list[Verdict]:
        found = []
        for bar in self.question.bars:
            values = [bar.value(figures) for figures in self.rounds]
            found.append(Verdict(bar, [value for value in values if value is not None]))
        return found

    def series(self) -> dict[str, dict[str, list[float]]]:
        """By figure, then by candidate: the values of the rounds."""
        result: dict[str, dict[str, list[float]]] = {}
        for figures in self.rounds:
            for candidate, values in figures.items():
                for figure, value in values.items():
                    result.setdefault(figure, {}).setdefault(candidate, []).append(value)
        return result


def ask(question: Question, scale: Scale) -> Answer:
    """Measure all candidates in turn, round after round, forwards and backwards: neither the first nor the last
    place is an advantage, and a slow minute of the machine hits all of them. What fails is told in the answer."""
    answer = Answer(question)
    candidates = [*question.candidates, *(() if scale.quick else question.peers)]
    rounds = min(question.rounds or scale.rounds, scale.rounds)
    began = time.monotonic()
    try:
        for number in range(rounds):
            say(f"question {question.number}, round {number + 1}/{rounds}")
            figures: dict[str, Figures] = {}
            answer.rounds.append(figures)
            for candidate in candidates if number % 2 == 0 else reversed(candidates):
                _measure(answer, candidate, figures, scale)
            if question.derive is not None:
                question.derive(figures)
    except Exception as error:
        traceback.print_exc()
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.monotonic() - began
    return answer


def _measure(answer: Answer, candidate: Candidate, figures: dict[str, Figures], scale: Scale) -> None:
    """One round of one candidate, unless something that it needs is known to be absent."""
    if candidate.name in answer.absent:
        return
    say(f"  {candidate.name}")
    try:
        with served(candidate, scale.base) as one:
            if one.about:
                answer.promises[candidate.name] = one.about
            figures[candidate.name] = answer.question.measure(one, scale)
    except Absent as reason:
        answer.absent[candidate.name] = str(reason)


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)
