"""What was measured: for people (Markdown, pictures) and for programs (JSON)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.question import OWN, Answer, Bar, Scale, Verdict


def as_json(answers: Sequence[Answer], about: dict[str, Any], scale: Scale) -> dict[str, Any]:
    return {
        "machine": about,
        "scale": {"rounds": scale.rounds, "seconds": scale.seconds, "quick": scale.quick},
        "questions": [
            {
                "number": answer.question.number,
                "title": answer.question.title,
                "bars": [_bar(verdict) for verdict in answer.verdicts],
                "promises": answer.promises,
                "absent": answer.absent,
                "error": answer.error,
                "seconds": round(answer.seconds, 1),
                "rounds": answer.rounds,
            }
            for answer in answers
        ],
    }


def _bar(verdict: Verdict) -> dict[str, Any]:
    return {
        "candidate": verdict.bar.candidate,
        "figure": verdict.bar.figure,
        "bar": str(verdict.bar),
        "median": verdict.median,
        "values": verdict.values,
        "holds": verdict.holds,
    }


def as_markdown(answers: Sequence[Answer], about: dict[str, Any], scale: Scale) -> str:
    """All questions, each with its bars and its figures: medians over the rounds, smallest and largest in brackets."""
    lines = [
        "# Benchmarks",
        "",
        f"{about['cpus']} x {about['cpu']}, {about['memory_gib']} GiB, Linux {about['kernel']}, "
        f"Python {about['python']}, load before the start {about['load']:.1f}; idle processors {about['idle']}. "
        f"Medians of {scale.rounds} rounds; in brackets the smallest and the largest.",
    ]
    for answer in answers:
        question = answer.question
        lines += ["", f"## {question.number}. {question.title}", "", question.about]
        promises = [f"{name}: {promise}" for name, promise in answer.promises.items()]
        lines += ["", "; ".join(promises) + "."] if promises else []
        if answer.error:
            lines += ["", f"**Could not be measured:** {answer.error}"]
        lines += ["", *_bars(answer), "", *_figures(answer)]
        lines += [f"\nAbsent: {name} ({reason})." for name, reason in answer.absent.items()]
    return "\n".join(lines) + "\n"


def _bars(answer: Answer) -> list[str]:
    lines = ["| candidate | figure | bar | measured | |", "|---|---|---|--:|---|"]
    for verdict in answer.verdicts:
        bar = verdict.bar
        mark = {True: "holds", False: "**FALLS SHORT**", None: "not measured"}[verdict.holds]
        lines.append(f"| {bar.candidate} | {bar.figure} | {bar} | {_spread(verdict.values)} | {mark} |")
    return lines


def _figures(answer: Answer) -> list[str]:
    series = answer.series()
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    lines = ["| figure | " + " | ".join(names) + " |", "|---" + "|--:" * len(names) + "|"]
    for figure, values in series.items():
        cells = [_spread(values.get(name, [])) for name in names]
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    return lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return _number(values[0])
    return f"{_number(statistics.median(values))} ({_number(min(values))}-{_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def shortfalls(answers: Sequence[Answer]) -> list[str]:
    """Bars that do not hold, and questions that could not be measured."""
    found = [f"question {a.question.number} could not be measured: {a.error}" for a in answers if a.error]
    for answer in answers:
        for verdict in answer.verdicts:
            if verdict.holds is False:
                bar, median = verdict.bar, verdict.median
                assert median is not None
                where = f"question {answer.question.number}, {bar.candidate}, {bar.figure}"
                found.append(f"{where}: {_number(median)}, the bar is {bar}")
    return found


@dataclass
class Row:
    """One bar of a picture."""

    name: str
    values: list[float]
    """of the rounds"""
    limits: list[float]
    """where the bars for it are, by the medians of what they compare with"""
    is_own: bool = True


def panels(answer: Answer) -> dict[str, list[Row]]:
    """What is compared with each other, by title: candidates by one figure, or, where there is only one candidate,
    its figures of one unit."""
    series = answer.series()
    found: dict[str, list[Row]] = {}
    for figure, values in series.items():
        for candidate, rounds in values.items():
            limits = [
                _limit(bar, series)
                for bar in answer.question.bars
                if bar.candidate == candidate and bar.figure == figure
            ]
            row = Row(candidate, rounds, [at for at in limits if at is not None], candidate.startswith(OWN))
            title = figure
            if len(values) == 1:
                row.name, _, unit = figure.partition(" [")
                title = f"{candidate} [{unit}"
            found.setdefault(title, []).append(row)
    return found


def _limit(bar: Bar, series: dict[str, dict[str, list[float]]]) -> float | None:
    """A bar as a value of its figure; None when what it compares with was not measured."""
    if bar.of is None and bar.of_figure is None:
        return bar.limit
    reference = series.get(bar.of_figure or bar.figure, {}).get(bar.of or bar.candidate)
    return None if reference is None else bar.limit * statistics.median(reference)


def draw(answer: Answer, directory: Path) -> None:
    """A picture of a question: medians as bars, single rounds as dots, what must be reached as red lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wanted = panels(answer)
    if not wanted:
        return
    columns = min(3, len(wanted))
    lines = -(-len(wanted) // columns)
    most = max(map(len, wanted.values()))
    height = 0.25 * most + 0.9
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.5 * columns, 0.5 + height * lines), squeeze=False)
    for axis in axes.flat[len(wanted) :]:
        axis.set_visible(False)
    for axis, (title, rows) in zip(axes.flat, wanted.items(), strict=False):
        for at, row in enumerate(reversed(rows)):
            axis.barh(at, statistics.median(row.values), color="tab:orange" if row.is_own else "tab:blue")
            axis.plot(row.values, [at] * len(row.values), "k.", markersize=4)
            axis.vlines(row.limits, at - 0.45, at + 0.45, color="red")
        axis.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
        axis.set_ylim(len(rows) - most - 0.6, len(rows) - 0.4)
        everything = [value for row in rows for value in (*row.values, *row.limits)]
        if min(everything) > 0 and max(everything) > 50 * min(everything):
            axis.set_xscale("log")
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{answer.question.number}. {answer.question.title}")
    figure.tight_layout()
    figure.savefig(directory / f"question-{answer.question.number}.png", dpi=110)
    pyplot.close(figure)


def draw_bars(answers: Sequence[Answer], directory: Path) -> None:
    """A picture of all bars: how far each is exceeded, or is not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    verdicts = [
        (f"{answer.question.number}. {verdict.bar.candidate}: {verdict.bar.figure} {verdict.bar}", verdict)
        for answer in answers
        for verdict in answer.verdicts
        if verdict.median
    ]
    if not verdicts:
        return
    figure, axis = pyplot.subplots(figsize=(13, 1.2 + 0.24 * len(verdicts)))
    for at, (_, verdict) in enumerate(reversed(verdicts)):
        shares = [verdict.bar.share(value) for value in (verdict.median, *verdict.values) if value]
        axis.barh(at, shares[0] - 1, left=1, color="tab:green" if verdict.holds else "tab:red")
        axis.plot(shares[1:], [at] * len(shares[1:]), "k.", markersize=4)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g} x")
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_yticks(range(len(verdicts)), [name for name, _ in reversed(verdicts)], fontsize=8)
    axis.set_ylim(-0.6, len(verdicts) - 0.4)
    axis.set_title("How far each bar is exceeded (to the right), or not reached: medians, and dots for single rounds")
    figure.tight_layout()
    figure.savefig(directory / "bars.png", dpi=100)
    pyplot.close(figure)
