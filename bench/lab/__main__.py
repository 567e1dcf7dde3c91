"""``make bench-lab``: measure all candidates in one emulated machine, round after round; print and keep the table."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lab.machine import GuestError, Lab, Machine
from lab.prepare import BUILD, prepared

from bench.lab import report
from bench.lab.candidates import CANDIDATES, NO_DISK, latency_ms, set_up
from bench.lab.workloads import WORKLOADS, measure

RESULTS = Path(__file__).parents[1] / "results"
DISK_MIB = 512
CELL_S = 240.0
"""What one cell may take at the worst, on average"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.lab", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="of each cell")
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 2, 8], metavar="MS", help="of the slow disk")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--file-mib", type=int, default=16, help="of the file that is written to")
    parser.add_argument("--nvdimm-mib", type=int, default=128)
    parser.add_argument("--processors", type=int, default=2, help="of the machine")
    parser.add_argument("--seed", type=int, default=20180507)
    parser.add_argument("--again", type=Path, metavar="JSON", help="table and picture of a run that has been")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.again is not None:
        return tell(json.loads(options.again.read_text()), options.again)
    steps = plan(options)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("lab-%Y%m%dT%H%M%S.json")
    result: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if name != "again"},
        "machine": {},
        "latency_ms": {},
        "steps": [],
    }
    directory = BUILD / "bench"
    with prepared() as (image, project), ExitStack() as undo:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        undo.callback(shutil.rmtree, directory)
        lab = Lab(image, project, directory, undo, random.Random(options.seed))
        machine = lab.machine(
            nvdimm_mib=options.nvdimm_mib, plain_disks_mib={"slow": DISK_MIB}, processors=options.processors
        )
        while steps:
            run_until_error(machine, steps, result, lab.rng, path)
    return tell(result, path)


def tell(result: dict[str, Any], path: Path) -> int:
    """Print the table, draw the picture beside ``path``; the exit status."""
    print(report.table(result))
    report.draw(result, path.with_suffix(".png"))
    print(f"\n{path}\n{path.with_suffix('.png')}", file=sys.stderr)
    failed = report.errors(result)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Who is measured when: in turn forwards and backwards, so that neither the first nor the last place helps."""
    once = [
        {"delay_ms": delay_ms, "candidate": candidate}
        for delay_ms in options.delays
        for candidate in options.candidates
        if candidate not in NO_DISK or delay_ms == options.delays[0]
    ]
    return [
        {"round": number, **each}
        for number in range(1, options.rounds + 1)
        for each in (once if number % 2 else reversed(once))
    ]


def run_until_error(
    machine: Machine, steps: list[dict[str, Any]], result: dict[str, Any], rng: random.Random, path: Path
) -> None:
    """Do steps and take them off the list, all or up to one that fails: who knows what it has left in the guest."""
    options = result["options"]
    with machine.boot(rng) as running:
        found = running.call(set_up)
        if not result["machine"]:
            result["machine"] = found | {"emulator": emulator()}
            for delay_ms in options["delays"]:
                result["latency_ms"][str(delay_ms)] = running.call(latency_ms, delay_ms)
            print(f"{result['machine']}; slow disk: {result['latency_ms']} ms", flush=True)
        failed = False
        while steps and not failed:
            step = steps.pop(0)
            began = time.monotonic()
            try:
                step |= running.call(
                    *(measure, step["candidate"], step["delay_ms"], options["workloads"], options["seconds"]),
                    *(options["file_mib"], rng.getrandbits(32)),
                    timeout=CELL_S * (len(options["workloads"]) + 1),
                )
            except (GuestError, TimeoutError):
                step["error"] = traceback.format_exc()
                failed = True
            step["took_s"] = round(time.monotonic() - began, 1)
            result["steps"].append(step)
            path.write_text(json.dumps(result, indent=1) + "\n")  # who ends this by force has what there is
            print(report.line(step, len(steps)), flush=True)


def emulator() -> str:
    said = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True).stdout
    return said.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
