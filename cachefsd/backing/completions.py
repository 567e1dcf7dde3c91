"""How the loop hears of what ends elsewhere: in other threads, or in the kernel."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import trio


class Completing(ABC):
    """Takes requests that end elsewhere, and collects their results in the loop. ``async with`` starts and stops it."""

    def __init__(self, name: str) -> None:
        self._listener: Final = CompletionListener(self._collect, f"completions of {name}")

    @property
    def eventfd(self) -> int:
        """Readable when requests have ended and the loop has yet to hear of it."""
        return self._listener.eventfd

    @abstractmethod
    def start(self) -> None:
        """Begin to take requests; to be called in the thread of the loop."""

    @abstractmethod
    async def stop(self) -> None:
        """Wait for all requests that were taken, and end."""

    @abstractmethod
    def _collect(self) -> None:
        """Tell those who wait what has ended by now."""

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class CompletionListener:
    """A background task that calls ``collect`` in the loop whenever an eventfd has been signalled.

    It is a system task of trio: it needs no nursery and serves whoever runs, until it is stopped.
    """

    eventfd: int
    """from :meth:`start` to :meth:`stop`"""

    def __init__(self, collect: Callable[[], None], name: str) -> None:
        self._collect: Final = collect
        self._name: Final = name
        self._scope: Final = trio.CancelScope()
        self._ended: Final = trio.Event()

    def start(self) -> None:
        """Begin to listen; to be called in the thread of the loop."""
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        trio.lowlevel.spawn_system_task(self._run, name=self._name)

    async def _run(self) -> None:
        with self._scope:
            while True:
                await trio.lowlevel.wait_readable(self.eventfd)
                os.eventfd_read(self.eventfd)
                self._collect()
        self._ended.set()

    async def stop(self) -> None:
        """End the task and close the eventfd, which nobody may signal any more."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._ended.wait()
        os.close(self.eventfd)


def not_cancellable(_: object) -> trio.lowlevel.Abort:
    """For ``wait_task_rescheduled``: the request cannot be taken back, so its end is waited for."""
    return trio.lowlevel.Abort.FAILED
