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

TESTS = (
    "t3_handshake.py",
    "t4_session.py::test_a_write_is_one_request",
    "t4_session.py::test_names_in_one_directory_are_looked_up_at_the_same_time",
    "t4_security.py::test_what_was_set_after_the_open_goes_with_the_next_write",
    "t4_security.py::test_a_program_that_another_user_has_changed_runs_without_its_owners_rights",
    "t4_security.py::test_only_its_owner_takes_setuid_away_by_giving_a_file_to_nobody_else",
    "t4_security.py::test_setgid_without_execution_stays",
    "t4_writeback_cache.py",
)
LIMIT_S = 3600


def run(lab: Lab) -> dict[str, Any]:
    with lab.machine(nvdimm_mib=64).boot(lab.rng) as running:
        found: dict[str, Any] = running.call(run_tests, timeout=LIMIT_S)
    return found


def run_tests() -> dict[str, Any]:
    """Run TESTS in the guest.

    :raises AssertionError: with what pytest said.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", f"timeout={LIMIT_S}"]
    files = [f"/project/tests/{name}" for name in TESTS]
    said: list[str] = []
    with subprocess.Popen([*command, *files], cwd="/project", stdout=subprocess.PIPE, text=True) as pytest:
        assert pytest.stdout is not None
        for line in pytest.stdout:
            said.append(line)
            print(line, end="", flush=True)  # on the console, as it takes long
    assert pytest.returncode == 0, "".join(said)
    counted = re.findall(r"(\d+) (passed|skipped)", said[-1])
    return {"kernel": os.uname().release, **{what: int(number) for number, what in counted}}
