"""What was measured: for people (Markdown, pictures) and for programs (JSON)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.question import Answer, Scale, Verdict


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


def draw(answer: Answer, directory: Path) -> None:
    """A picture of a question: medians as bars, single rounds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = answer.series()
    if not series:
        return
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 0.8 + 2.4 * rows), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.set_visible(False)
    for axis, (name, values) in zip(axes.flat, series.items(), strict=False):
        names = list(values)[::-1]
        colours = ["tab:orange" if each.startswith("cachefsd") else "tab:blue" for each in names]
        axis.barh(names, [statistics.median(values[each]) for each in names], color=colours)
        for at, each in enumerate(names):
            axis.plot(values[each], [at] * len(values[each]), "k.", markersize=4)
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{answer.question.number}. {answer.question.title}")
    figure.tight_layout()
    figure.savefig(directory / f"question-{answer.question.number}.png", dpi=110)
    pyplot.close(figure)
