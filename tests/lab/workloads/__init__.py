"""What runs in a guest until its power goes, and what must be found afterwards.

Each module here is one workload, in two parts. In the guest, below a directory ``root`` of its own:

* ``set_up(root)``, once;
* ``load(root, told, say)`` works until the power goes (or an exception says what is wrong), and calls ``say`` with
  integers once something is acknowledged: when that returns, the host has it;
* ``check(root, told)`` raises an exception if anything acknowledged is not there, and returns what is there.

On the host, an ``Oracle`` that lives as long as the scenario.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from typing import Any, NoReturn, Protocol


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


class InOrder:
    """The oracle of what is numbered 1, 2, 3 and so on: the last that was acknowledged, or found."""

    def __init__(self, rng: random.Random) -> None:
        self.acknowledged = 0
        self._last = 0

    def hear(self, *words: int) -> None:
        assert words == (self._last + 1,)
        self._last += 1
        self.acknowledged += 1

    def told(self) -> int:
        return self._last

    def settle(self, found: int | None) -> None:
        if found is not None:
            self._last = found


def all_at_once(*jobs: Callable[[], object]) -> NoReturn:
    """Run ``jobs``, which have no end, in threads; raises what the first that ends has raised."""
    ended: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def run(job: Callable[[], object]) -> None:
        try:
            job()
            ended.put(AssertionError(f"{job} has ended"))
        except BaseException as error:
            ended.put(error)

    for job in jobs:
        threading.Thread(target=run, args=(job,), daemon=True).start()
    raise ended.get()
