"""Telling tasks again and again that something has changed."""

from __future__ import annotations

import trio


class Signal:
    """A :class:`trio.Event` that is replaced when it is set: it wakes those who wait, and remembers nothing.

    A task that looks at a state and then waits for the state to change takes :attr:`next` before it looks. What changes
    after that wakes it.
    """

    __slots__ = ("next",)

    def __init__(self) -> None:
        self.next = trio.Event()
        """The next :meth:`set` sets this one."""

    def set(self) -> None:
        """Wake everybody who waits."""
        event, self.next = self.next, trio.Event()
        event.set()

    async def wait(self) -> None:
        """Wait for the next :meth:`set`."""
        await self.next.wait()
