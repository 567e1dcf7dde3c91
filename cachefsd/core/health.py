"""Whether the cache's own media work. Once they have failed, nothing is acknowledged any more."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Health:
    """Fails once and for all."""

    def __init__(self) -> None:
        self.failed: Exception | None = None
        self._on_failure: list[Callable[[], None]] = []

    def on_failure(self, act: Callable[[], None]) -> None:
        """Call ``act`` when the media fail."""
        self._on_failure.append(act)

    def fail(self, error: Exception) -> None:
        """The cache's own media have failed: stop acknowledging, keep what is there."""
        if self.failed is not None:
            return
        log.error("the cache has failed, nothing more is acknowledged: %s", error)
        self.failed = error
        for act in self._on_failure:
            act()

    def check(self) -> None:
        """:raises OSError: EIO once the media have failed."""
        if self.failed is not None:
            raise OSError(errno.EIO, f"the cache has failed: {self.failed}")
