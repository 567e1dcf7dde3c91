"""The power goes at random moments under everything that syncs: what was acknowledged is there when it is back.

``CUTS`` in the environment says how often (default 5).
"""

from __future__ import annotations

import os
from typing import Any

from lab.cuts import run_cuts
from lab.machine import Lab


def run(lab: Lab) -> dict[str, Any]:
    return run_cuts(lab, ("blocks", "fio", "sqlite", "names"), int(os.environ.get("CUTS") or 5))
