"""What runs in a guest until its power goes, and what must be found afterwards.

Each module here is one workload, in two parts. In the guest, below a directory ``root`` of its own:

* ``set_up(root)``, once;
* ``load(root, told, say)`` works until the power goes (or an exception says what is wrong), and calls ``say`` with
  integers once something is acknowledged: when that returns, the host has it;
* ``check(root, told)`` raises an exception if anything acknowledged is not there, and returns what is there.

On the host, an ``Oracle`` that lives as long as the scenario.
"""

from __future__ import annotations

from typing import Any, Protocol


class Oracle(Protocol):
    """Keeps account of what was acknowledged."""

    acknowledged: int
    """how often"""

    def hear(self, *words: int) -> None:
        """Something was acknowledged, in the words of ``say``."""

    def told(self) -> Any:
        """What the guest's functions are to know; JSON can carry it."""

    def settle(self, found: Any) -> None:
        """Take in what ``check`` has returned: what was found without having been acknowledged stays, from now on."""
