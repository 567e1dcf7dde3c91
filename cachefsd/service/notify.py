"""Telling systemd how the daemon is doing (sd_notify(3)). Without systemd nothing happens."""

from __future__ import annotations

import contextlib
import os
import socket

import trio


def notify(**states: str | int) -> None:
    """Send ``NAME=value`` lines, for example ``notify(READY=1, STATUS="…")``."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    message = "".join(f"{name}={_one_line(value)}\n" for name, value in states.items()).encode()
    # A service manager that does not listen is no reason to stop.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        sender.send(message)


def _one_line(value: str | int) -> str:
    """The service manager takes lines of UTF-8. A path need not be one."""
    return os.fsencode(str(value)).decode(errors="backslashreplace").replace("\n", "\\n")


async def feed_watchdog() -> None:
    """Say that the loop goes round, as often as the service manager asks, until cancelled."""
    interval_us = os.environ.get("WATCHDOG_USEC", "")
    if not interval_us.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify(WATCHDOG=1)
        await trio.sleep(int(interval_us) / 2e6)
