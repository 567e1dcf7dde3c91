"""What writeback of random 4 KiB blocks costs, and what clients see of it.

Candidates are checkouts of cachefsd, measured alternately in one run: see bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from randwrite import BENCH, RESULTS, Candidate, cpu_seconds, fill, fio, mounted, places

from cachefsd.service import control

NEVER, AT_ONCE = "dirty_age=1000000,high_watermark=0.98,low_watermark=0.97", "dirty_age=0.01"


def served(name: str, tree: Path, options: str) -> Candidate:
    """cachefsd of a checkout; its cache is on tmpfs, so that no disk but the backing's is in the figure."""
    command = ["env", "PYTHONSAFEPATH=1", f"PYTHONPATH={tree}", sys.executable, "-m", "cachefsd"]
    command += ["mount", "{disk}", "{mnt}", "--foreground", "-o", options]
    command += ["--cache", "{memory}/cache", "--size", "1G", "--volatile"]
    return Candidate(name, tuple(command), "file")


def measure(name: str, tree: Path, options: argparse.Namespace) -> dict[str, float]:
    """One round of one candidate."""
    result: dict[str, float] = {}
    with places() as where:
        with mounted(served(name, tree, NEVER), where) as (file, pid):
            assert pid is not None
            fill(file, options.size_mib)
            control.ask(file.parent, "flush")
            quiet = fio(file, options.depth, options.seconds, options.size_mib)
            before, cpu, began = control.ask(file.parent, "status")["writeback"], cpu_seconds(pid), time.monotonic()
            control.ask(file.parent, "flush")
            wall, cpu = time.monotonic() - began, cpu_seconds(pid) - cpu
            after = control.ask(file.parent, "status")["writeback"]
            gib = (after["bytes"] - before["bytes"]) / (1 << 30)
            result["runs_per_mib"] = (after["runs"] - before["runs"]) / gib / 1024
            result["flush_cpu_s_per_gib"] = cpu / gib
            result["flush_mib_per_s"] = gib * 1024 / wall
            result |= {f"quiet_{figure}": value for figure, value in quiet.items()}
        with mounted(served(name, tree, AT_ONCE), where) as (file, pid):
            assert pid is not None
            fio(file, options.depth, 1, options.size_mib)
            before, began = control.ask(file.parent, "status")["writeback"]["bytes"], time.monotonic()
            busy = fio(file, options.depth, options.seconds, options.size_mib)
            drained = control.ask(file.parent, "status")["writeback"]["bytes"] - before
            result["drained_mib_per_s"] = drained / (1 << 20) / (time.monotonic() - began)
            result |= {f"draining_{figure}": value for figure, value in busy.items()}
    result["iops_kept"] = result["draining_iops"] / result["quiet_iops"]
    result["p99_times"] = result["draining_p99_us"] / result["quiet_p99_us"]
    return result


def table(summary: dict[str, dict[str, float]]) -> str:
    """A Markdown table of medians."""
    lines = ["| figure | " + " | ".join(summary) + " |", "|---|" + "--:|" * len(summary)]
    for figure in next(iter(summary.values())):
        lines.append(f"| {figure} | " + " | ".join(f"{medians[figure]:.4g}" for medians in summary.values()) + " |")
    return "\n".join(lines)


def candidate_option(text: str) -> tuple[str, Path]:
    """``NAME=DIRECTORY``."""
    name, equals, tree = text.partition("=")
    if not equals or not (Path(tree) / "cachefsd").is_dir():
        raise argparse.ArgumentTypeError("want NAME=DIRECTORY, a checkout")
    return name, Path(tree).resolve()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each fio run")
    parser.add_argument("--size-mib", type=int, default=512, help="of the file")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--add", type=candidate_option, action="append", default=[], metavar="NAME=DIRECTORY")
    options = parser.parse_args()
    candidates = [*options.add, ("this", BENCH.parent)]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name, _ in candidates}
    for number in range(options.rounds):
        for name, tree in candidates if number % 2 == 0 else reversed(candidates):
            print(f"round {number + 1}/{options.rounds}: {name}", file=sys.stderr)
            rounds[name].append(measure(name, tree, options))
    summary = {
        name: {figure: statistics.median(each[figure] for each in results) for figure in results[0]}
        for name, results in rounds.items()
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("drain-%Y%m%dT%H%M%S.json")
    path.write_text(json.dumps({"medians": summary, "rounds": rounds}, indent=1) + "\n")
    print(table(summary))
    print(f"\n{path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
