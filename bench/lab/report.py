"""From the figures of a run to its table and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.lab.candidates import CANDIDATES, NO_DISK

OURS = "cachefsd"
# What each workload is in words, its figure, and what that is. Of times less is better.
ROWS = {
    "fsync": ("4 KiB random write, fsync after each", "per_second", "/s"),
    "fdatasync16": ("4 KiB random write, fdatasync after 16", "per_second", "/s"),
    "direct1": ("4 KiB random write, direct, depth 1", "per_second", "/s"),
    "direct16": ("4 KiB random write, direct, depth 16", "per_second", "/s"),
    "mix": ("4 KiB random 70 % read, direct, depth 4", "per_second", "/s"),
    "sequential": ("1 MiB sequential write, direct", "per_second", "/s"),
    "sqlite-wal": ("SQLite, one row a commit, WAL", "per_second", "/s"),
    "sqlite-rollback": ("SQLite, one row a commit, rollback journal", "per_second", "/s"),
    "small-files": ("create, write 4 KiB, fsync, close", "per_second", "/s"),
    "burst": ("burst of random 4 KiB writes, one fsync", "acknowledged_s", "s"),
    "drain": ("the same, until the slow disk has it", "drained_s", "s"),
}
_CELL_OF = {"drain": "burst"}
_COLOURS = dict(
    zip(CANDIDATES, ("black", "#d62728", "#ff7f0e", "#9467bd", "#7f7f7f", "#2ca02c", "#17becf"), strict=True)
)
_MARKERS = dict(zip(CANDIDATES, "*osD^vP", strict=True))

Medians = dict[tuple[str, str, str], float]
"""By delay, candidate and row."""


def medians(result: dict[str, Any]) -> Medians:
    """The median over the rounds of everything that was measured."""
    return {key: statistics.median(values) for key, values in figures(result).items()}


def figures(result: dict[str, Any]) -> dict[tuple[str, str, str], list[float]]:
    """What was measured, by delay, candidate and row: a figure for each round."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for step in result["steps"]:
        everywhere = step["candidate"] in NO_DISK
        for delay_ms in result["options"]["delays"] if everywhere else [step["delay_ms"]]:
            for row, (_, figure, _) in ROWS.items():
                value = step.get("cells", {}).get(_CELL_OF.get(row, row), {}).get(figure)
                if value is not None:
                    found.setdefault((str(delay_ms), step["candidate"], row), []).append(value)
    return found


def ratio(known: Medians, delay: str, rival: str, row: str) -> float | None:
    """How much faster cachefsd is: above 1 it is ahead."""
    ours, theirs = known.get((delay, OURS, row)), known.get((delay, rival, row))
    if not ours or not theirs:
        return None
    return theirs / ours if ROWS[row][2] == "s" else ours / theirs


def errors(result: dict[str, Any]) -> list[str]:
    """A line for each cell that failed."""
    found = []
    for step in result["steps"]:
        where = f"round {step['round']}, {step['candidate']}, {step['delay_ms']} ms"
        if "error" in step:
            found.append(f"{where}: {_last_line(step['error'])}")
        for workload, cell in step.get("cells", {}).items():
            if "error" in cell:
                found.append(f"{where}, {workload}: {_last_line(cell['error'])}")
    return found


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def line(step: dict[str, Any], left: int) -> str:
    """What to say when a step has ended."""
    said = [f"round {step['round']}, {step['delay_ms']} ms, {step['candidate']}:"]
    for workload, cell in step.get("cells", {}).items():
        value = cell.get("per_second", cell.get("acknowledged_s"))
        said.append(f"{workload} {'ERROR' if value is None else f'{value:.4g}'}")
    return " ".join([*said, *(["ERROR"] if "error" in step else []), f"({left} left)"])


def table(result: dict[str, Any]) -> str:
    """Markdown: medians, and in parentheses how much faster cachefsd is."""
    return "\n\n".join("\n".join(_table(result, str(delay_ms))) for delay_ms in result["options"]["delays"])


def _table(result: dict[str, Any], delay: str) -> Iterator[str]:
    known = medians(result)
    names = [name for name in CANDIDATES if any((delay, name, row) in known for row in ROWS)]
    yield f"Slow disk: dm-delay {delay} ms; a 4 KiB read takes {result['latency_ms'][delay]} ms here."
    yield ""
    yield f"| workload | {' | '.join(names)} |"
    yield f"|---|{'--:|' * len(names)}"
    for row, (words, _, unit) in ROWS.items():
        if not any((delay, name, row) in known for name in names):
            continue
        cells = []
        for name in names:
            value = known.get((delay, name, row))
            factor = ratio(known, delay, name, row)
            cell = "-" if value is None else f"{_short(value)} {unit}".replace(" /s", "")
            cells.append(cell if name == OURS or factor is None else f"{cell} (x {_short(factor)})")
        yield f"| {words} | {' | '.join(cells)} |"


def _short(value: float) -> str:
    """Two or three digits that matter."""
    digits = next(digits for digits, least in enumerate((100, 10, 0.1, 0)) if value >= least)
    return f"{value:.{digits}f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """The ratios, a panel for each delay: a point to the right of the line is a rival that cachefsd is ahead of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    known = medians(result)
    delays = [str(delay_ms) for delay_ms in result["options"]["delays"]]
    rows = [row for row in ROWS if any((delay, OURS, row) in known for delay in delays)]
    figure, axes = pyplot.subplots(
        1, len(delays), sharex=True, sharey=True, squeeze=False, figsize=(4 + 3 * len(delays), 1.8 + 0.42 * len(rows))
    )
    for axis, delay in zip(axes[0], delays, strict=True):
        for rival in [name for name in CANDIDATES if name != OURS]:
            points = [(factor, at) for at, row in enumerate(rows) if (factor := ratio(known, delay, rival, row))]
            axis.plot(
                *([point[number] for point in points] for number in (0, 1)),
                linestyle="none",
                marker=_MARKERS[rival],
                color=_COLOURS[rival],
                alpha=0.85,
                markersize=7,
                label=rival,
            )
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"x {value:g}"))
        axis.set_yticks(range(len(rows)), [ROWS[row][0] for row in rows])
        axis.grid(alpha=0.3)
        axis.set_title(f"disk + {delay} ms ({result['latency_ms'][delay]} ms a read)", fontsize=10)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle("cachefsd against …: right of the line it is ahead, left of it behind", fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
