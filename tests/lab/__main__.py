"""``make lab``: run scenarios, print a line for each, and leave their results as JSON below build/lab/results."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lab import scenarios
from lab.image import Image, ImageError
from lab.machine import Lab
from lab.prepare import BUILD, prepared

NO_IMAGE = 3
"""exit status if no guest can be started for want of an image"""
SEED = int(os.environ.get("SEED") or 20180507)


def main(names: list[str]) -> int:
    known = sorted(module.name for module in pkgutil.iter_modules(scenarios.__path__))
    if unknown := set(names) - set(known):
        print(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    results = BUILD / "results"
    print(f"SEED={SEED}", flush=True)
    try:
        with prepared() as (image, project):
            results.mkdir(exist_ok=True)
            passed = [_run_and_tell(name, image, project, results) for name in names or known]
    except ImageError as error:
        print(error, file=sys.stderr)
        return NO_IMAGE
    return 0 if all(passed) else 1


def _run_and_tell(name: str, image: Image, project: Path, results: Path) -> bool:
    result = _run(name, image, project, results / name)
    (results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(_summary(result, results / name), flush=True)
    return bool(result["passed"])


def _run(name: str, image: Image, project: Path, directory: Path) -> dict[str, Any]:
    """Run one scenario; of its files the guests' consoles stay in ``directory``."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    run: Callable[[Lab], dict[str, Any]] = importlib.import_module(f"lab.scenarios.{name}").run
    result: dict[str, Any] = {"scenario": name, "seed": SEED, "passed": True}
    began = time.monotonic()
    with ExitStack() as undo:
        try:
            result["facts"] = run(Lab(image, project, directory, undo, random.Random(f"{SEED} {name}")))
        except Exception as error:
            result |= {"passed": False, "error": str(error), "traceback": traceback.format_exc()}
        finally:
            for leftover in directory.rglob("*.img"):
                leftover.unlink()
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def _summary(result: dict[str, Any], directory: Path) -> str:
    line = f"{result['scenario']:12} {'passed' if result['passed'] else 'FAILED'} in {result['seconds']:.0f} s"
    if result["passed"]:
        return f"{line}: {json.dumps(result['facts'])}"
    return f"{line}; the guest's output is in {directory}\n{result['traceback']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
