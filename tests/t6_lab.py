"""Whole machines with persistent memory, as much of the lab as fits: ``make lab`` runs all of it. See lab/README.md."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab.__main__ import NO_IMAGE

LIMIT_S = 3000
CUTS = 5


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("scenario", ["powercut", "systemd"])
def test_scenario_passes(scenario: str) -> None:
    for program in ("qemu-system-x86_64", "mmdebstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    done = subprocess.run(
        # The runner ends with this process in every outcome, and its machine with it.
        ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "lab", scenario],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"CUTS": str(CUTS)},
        timeout=LIMIT_S,
        check=False,
    )
    print(done.stdout)
    if done.returncode == NO_IMAGE:
        pytest.skip(f"no image of a guest can be made here: {done.stdout}")
    assert done.returncode == 0, done.stdout
