"""Debian's own kernel in the place of the one at hand: tests of what the kernel asks, and of what it leaves to us.

Whether a write takes setuid away, for one, is a matter of requests that the protocol's description does not name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

from lab.machine import Lab

TESTS = ("t3_handshake", "t4_session", "t4_security")
LIMIT_S = 3600


def run(lab: Lab) -> dict[str, Any]:
    with lab.machine(nvdimm_mib=64).boot(lab.rng) as running:
        return running.call(run_tests, timeout=LIMIT_S)


def run_tests() -> dict[str, Any]:
    """Run TESTS in the guest.

    :raises AssertionError: with what pytest said.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"timeout={LIMIT_S}", "-rs"]
    files = [f"/project/tests/{name}.py" for name in TESTS]
    done = subprocess.run([*command, *files], cwd="/project", capture_output=True, text=True, check=False)
    print(done.stdout, flush=True)
    assert done.returncode == 0, done.stdout[-20_000:]
    counted = {
        what: int(number) for number, what in re.findall(r"(\d+) (passed|skipped)", done.stdout.splitlines()[-1])
    }
    return {"kernel": os.uname().release, **counted}
