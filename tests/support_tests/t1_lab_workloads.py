"""The lab's workloads, on this machine: a kill loses nothing, and they find what is older than acknowledged."""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from lab.workloads import all_at_once

WORKER = """
import importlib, json, os, sys
from pathlib import Path
name, root, told = sys.argv[1:]
say = lambda *words: os.write(1, (" ".join(map(str, words)) + "\\n").encode())
importlib.import_module(f"lab.workloads.{name}").load(Path(root), json.loads(told), say)
"""
ACKNOWLEDGEMENTS = {"blocks": 200, "fio": 5, "sqlite": 40, "names": 40}

EACH = pytest.mark.parametrize("name", ACKNOWLEDGEMENTS)


def load_until_killed(name: str, root: Path, oracle: Any) -> None:
    """Run a workload in a process of its own, which is killed after some acknowledgements."""
    command = [sys.executable, "-c", WORKER, name, os.fspath(root), json.dumps(oracle.told())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent, process_group=0) as worker:
        assert worker.stdout is not None
        lines: list[bytes] = []
        try:
            while len(lines) < ACKNOWLEDGEMENTS[name] and (line := worker.stdout.readline()):
                lines.append(line)
        finally:
            os.killpg(worker.pid, signal.SIGKILL)  # with the fio that it may have started
        assert len(lines) == ACKNOWLEDGEMENTS[name], f"{name} has ended"
        for line in [*lines, *worker.stdout]:
            if line.endswith(b"\n"):
                oracle.hear(*map(int, line.split()))


@EACH
def test_finds_everything_after_kills(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"lab.workloads.{name}")
    oracle = module.Oracle(random.Random(1))
    module.set_up(tmp_path)
    for kills in (1, 2):
        load_until_killed(name, tmp_path, oracle)
        # Through JSON, as from a guest.
        oracle.settle(json.loads(json.dumps(module.check(tmp_path, oracle.told()))))
        assert oracle.acknowledged >= kills * ACKNOWLEDGEMENTS[name]
    module.check(tmp_path, oracle.told())


@EACH
def test_finds_that_everything_is_old(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"lab.workloads.{name}")
    oracle = module.Oracle(random.Random(1))
    root, old = tmp_path / "root", tmp_path / "old"
    root.mkdir()
    module.set_up(root)
    load_until_killed(name, root, oracle)
    oracle.settle(json.loads(json.dumps(module.check(root, oracle.told()))))
    shutil.copytree(root, old)
    load_until_killed(name, root, oracle)
    with pytest.raises(AssertionError):
        module.check(old, oracle.told())


def test_a_failure_of_one_is_told_while_the_others_work() -> None:
    """It once had to wait for them, who have no end: the power went, and nobody heard of it."""
    forever = threading.Event()

    def fail() -> None:
        raise OSError(errno.EIO, "no more")

    try:
        with pytest.raises(OSError, match="no more"):
            all_at_once(forever.wait, fail)
        with pytest.raises(AssertionError, match="has ended"):
            all_at_once(forever.wait, lambda: None)
    finally:
        forever.set()
