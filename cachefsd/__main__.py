"""The command ``cachefsd``, also as ``python -m cachefsd``."""

from __future__ import annotations

import os
import signal
from types import FrameType

from cachefsd import reaper


def _leave(number: int, frame: FrameType | None) -> None:
    # There is nothing to undo. An exception in the middle of an import would be shown with its stack.
    os.write(2, b"cachefsd: interrupted\n")
    os._exit(128 + number)


def main() -> None:
    """Run the command; until its modules are imported, Ctrl-C just ends it."""
    if reaper.READY_FD in os.environ:
        reaper.stay_behind()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as by `nohup`
        signal.signal(signal.SIGINT, _leave)
    from cachefsd.cli.main import main as command

    signal.signal(signal.SIGINT, before)
    command()


if __name__ == "__main__":
    main()
