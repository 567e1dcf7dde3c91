"""How the engine has others block."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class RunBlocking(Protocol):
    """Runs a blocking function without stopping the loop (a worker thread; inline in simulation)."""

    def __call__(self, fn: Callable[..., T], /, *args: object) -> Awaitable[T]: ...
