"""4 KiB random writes, direct, at depth 16 and 1, through several file systems in turn.

Candidates are measured alternately, round after round, so that a slow minute of the machine hits all
of them; medians and ratios to the first candidate are what counts. See bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefsd.fuse import mounts

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"
MOUNT_TIMEOUT_S = 30
STOP_TIMEOUT_S = 60
SETTLE_S = 8.0  # more than cachefsd waits before it writes dirty data back
IDLE_S = 2.0
CLOCK_TICKS_HZ = 100


@dataclass(frozen=True)
class Candidate:
    """Something to measure: a command that stays in the foreground and serves a file system.

    In ``command``, ``{mnt}``, ``{disk}`` and ``{memory}`` stand for empty directories: to mount on, on disk
    and on tmpfs. An empty command measures a directory of the machine as it is. ``file`` is the path to write
    to below the mount, or an absolute one.
    """

    name: str
    command: tuple[str, ...]
    file: str


def null(loop: str) -> Candidate:
    """The null file system with one of the two request loops."""
    command = (sys.executable, str(BENCH / "nullfs.py"), "--loop", loop, "{mnt}")
    return Candidate(f"null+{loop}", command, "file")


def own(loop: str) -> Candidate:
    """cachefsd with one of the two request loops; its cache is on tmpfs, so that no disk is in the figure."""
    command = [sys.executable, "-m", "cachefsd", "mount", "{disk}", "{mnt}", "--foreground"]
    command += ["--cache", "{memory}/cache", "--size", "1G", "--volatile"]
    if loop == "stock":
        command += ["-o", "stock_loop"]
    return Candidate(f"cachefsd+{loop}", tuple(command), "file")


@contextlib.contextmanager
def places() -> Iterator[dict[str, str]]:
    """Empty directories by the names that a command may use."""
    with contextlib.ExitStack() as undo:

        def make(where: str | None) -> str:
            return undo.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=where))

        yield {"mnt": make(None), "disk": make(None), "memory": make("/dev/shm")}


@contextlib.contextmanager
def mounted(candidate: Candidate, where: dict[str, str]) -> Iterator[tuple[Path, int | None]]:
    """Serve ``candidate``; yields the file to write to and the pid of the daemon."""
    if not candidate.command:
        yield Path(candidate.file), None
        return
    mountpoint = Path(where["mnt"])
    command = [part.format_map(where) for part in candidate.command]
    with tempfile.TemporaryFile("w+") as output:
        daemon = subprocess.Popen(command, stdout=output, stderr=output, cwd=BENCH.parent)
        try:
            deadline = time.monotonic() + MOUNT_TIMEOUT_S
            while mounts.find_mount(mountpoint) is None:
                if daemon.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise SystemExit(f"{candidate.name} did not mount:\n{output.read()}")
                time.sleep(0.02)
            yield mountpoint / candidate.file, daemon.pid
        finally:
            daemon.terminate()
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
            if mounts.find_mount(mountpoint) is not None:
                mounts.detach_dead(mountpoint)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_HZ


def fill(file: Path, size_mib: int) -> None:
    """Bring a file to its size: extending it is another question, and the kernel does that one by one."""
    if file.exists() and file.stat().st_size >= size_mib << 20:
        return
    with file.open("wb") as output:
        for _ in range(size_mib):
            output.write(bytes(1 << 20))
        os.fsync(output.fileno())


def fio(file: Path, depth: int, seconds: float, size_mib: int) -> dict[str, float]:
    """One run: IOPS, and completion latencies in microseconds."""
    command = [
        *("fio", "--name=randwrite", f"--filename={file}", "--rw=randwrite", "--bs=4k", "--direct=1"),
        *("--ioengine=libaio", f"--iodepth={depth}", f"--size={size_mib}m", "--randrepeat=0"),
        *("--norandommap", "--time_based", f"--runtime={seconds}", "--output-format=json", "--eta=never"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    write = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write"]
    percentiles = write["clat_ns"]["percentile"]
    return {
        "iops": write["iops"],
        "p50_us": percentiles["50.000000"] / 1000,
        "p99_us": percentiles["99.000000"] / 1000,
    }


def measure(candidate: Candidate, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One round of one candidate: a result for each depth, and the idle CPU of its daemon in percent."""
    results: dict[str, dict[str, float]] = {}
    with places() as where, mounted(candidate, where) as (file, pid):
        fill(file, options.size_mib)
        for depth in options.depth:
            results[f"depth {depth}"] = fio(file, depth, options.seconds, options.size_mib)
        if pid is not None:
            time.sleep(SETTLE_S)
            before = cpu_seconds(pid)
            time.sleep(IDLE_S)
            results["idle"] = {"cpu_percent": 100 * (cpu_seconds(pid) - before) / IDLE_S}
    return results


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of every figure over the rounds."""
    return {
        case: {figure: statistics.median(each[case][figure] for each in rounds) for figure in figures}
        for case, figures in rounds[0].items()
    }


def table(summary: dict[str, dict[str, dict[str, float]]]) -> str:
    """A Markdown table; ratios are to the first candidate."""
    lines = ["| case | candidate | IOPS | ratio | p50 µs | p99 µs |", "|---|---|--:|--:|--:|--:|"]
    first = next(iter(summary.values()))
    for case in first:
        for name, cases in summary.items():
            if case == "idle" or case not in cases:
                continue
            got = cases[case]
            ratio = got["iops"] / first[case]["iops"]
            latency = f"{got['p50_us']:.0f} | {got['p99_us']:.0f}"
            lines.append(f"| {case} | {name} | {got['iops']:.0f} | {ratio:.2f} | {latency} |")
    idle = [f"{name} {cases['idle']['cpu_percent']:.1f} %" for name, cases in summary.items() if "idle" in cases]
    return "\n".join([*lines, "", f"CPU of the idle daemon: {', '.join(idle)}"])


def candidate_option(text: str) -> Candidate:
    """``NAME=FILE=COMMAND``: see --add."""
    try:
        name, file, command = text.split("=", 2)
    except ValueError:
        raise argparse.ArgumentTypeError("want NAME=FILE=COMMAND") from None
    return Candidate(name, tuple(shlex.split(command)), file)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each fio run")
    parser.add_argument("--size-mib", type=int, default=256, help="of the file")
    parser.add_argument("--depth", type=int, nargs="+", default=[16, 1])
    parser.add_argument(
        "--add",
        type=candidate_option,
        action="append",
        default=[],
        metavar="NAME=FILE=COMMAND",
        help="one more candidate: COMMAND serves {mnt} in the foreground until SIGTERM, FILE is below it; "
        "with an empty COMMAND, FILE is a path on the machine",
    )
    return parser.parse_args()


def main() -> int:
    options = arguments()
    candidates = [null("stock"), null("pump"), own("stock"), own("pump"), *options.add]
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {each.name: [] for each in candidates}
    for number in range(options.rounds):
        # In turn forwards and backwards: neither the first nor the last place is an advantage.
        for candidate in candidates if number % 2 == 0 else reversed(candidates):
            print(f"round {number + 1}/{options.rounds}: {candidate.name}", file=sys.stderr)
            rounds[candidate.name].append(measure(candidate, options))
    summary = {name: medians(each) for name, each in rounds.items()}
    settings = {key: value for key, value in vars(options).items() if key != "add"}
    report: dict[str, Any] = {
        "machine": {"kernel": platform.release(), "python": platform.python_version()},
        "options": settings,
        "medians": summary,
        "rounds": rounds,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("randwrite-%Y%m%dT%H%M%S.json")
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(summary))
    print(f"\n{path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
