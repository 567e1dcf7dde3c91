"""Exceptions that nobody expected, in what runs in the background: they concern one job, and never end the daemon."""

from __future__ import annotations

import errno
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

log = logging.getLogger(__name__)
MAX_KINDS: Final = 100
"""How many are told apart and logged; what comes after them is counted only."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 60.0


class Faults:
    """What has happened since the start: each kind is logged once, with its stack, and counted."""

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[tuple[str, str], int] = {}

    def note(self, where: str, error: Exception) -> OSError:
        """Count an exception in the work that ``where`` names, and log the first of its kind; return it as EIO, with
        its text."""
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]  # a nursery has wrapped it
        self.count += 1
        text = f"{type(error).__name__}: {error}"
        kind = where, text
        known = self._kinds.get(kind, 0)
        if known or len(self._kinds) < MAX_KINDS:
            self._kinds[kind] = known + 1
            if not known:
                # As text: the frames of the stack may hold views of the map.
                log.error("a bug: %s failed\n%s", where, "".join(traceback.format_exception(error)).rstrip())
        return OSError(errno.EIO, text)

    def listed(self) -> list[dict[str, Any]]:
        """For ``status``."""
        return [{"where": where, "error": text, "count": count} for (where, text), count in self._kinds.items()]

    async def keep(self, where: str, run: Callable[[], Awaitable[None]]) -> None:
        """Do ``run`` until it returns. After an exception that nobody expected begin again, later each time."""
        pause = FIRST_PAUSE_S
        while True:
            began = trio.current_time()
            try:
                await run()
            except Exception as error:
                self.note(where, error)
            else:
                return
            if trio.current_time() - began > LONGEST_PAUSE_S:
                pause = FIRST_PAUSE_S
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
