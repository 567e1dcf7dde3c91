"""The mount serves a block device to another file system, and the power goes: that one is well, with all it had synced.

``CUTS`` in the environment says how often (default 5).
"""

from __future__ import annotations

import os
from typing import Any

from lab.cuts import run_cuts
from lab.machine import Lab


def run(lab: Lab) -> dict[str, Any]:
    return run_cuts(lab, ("image",), int(os.environ.get("CUTS") or 5))
