"""The lab's end in the guest: calls functions as the host asks, each in a process of its own.

The host sends lines ``{"id", "module", "function", "args"}`` through a virtio port, and gets ``{"id", "value"}`` or
``{"id", "error"}``; the first line of every boot is ``{"boot"}``. Runs as a service; standard library only.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

_PORT = Path("/dev/virtio-ports/agent")


def main() -> None:
    lock = threading.Lock()
    with _PORT.open("r+b", buffering=0) as port:

        def send(message: dict[str, Any]) -> None:
            left = memoryview(json.dumps(message).encode() + b"\n")
            with lock:
                while left:
                    left = left[port.write(left) :]

        send({"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()})
        rest = b""
        while True:
            *lines, rest = (rest + port.read(1 << 16)).split(b"\n")
            for line in lines:
                threading.Thread(target=lambda order: send(_obey(order)), args=(json.loads(line),), daemon=True).start()


def _obey(order: dict[str, Any]) -> dict[str, Any]:
    """Run one function in a process and return what the host is to be told."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as answer:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "lab.agent", str(writer)],
                stdin=subprocess.PIPE,
                pass_fds=[writer],
                start_new_session=True,
                # An emulated machine is slow.
                env=os.environ | {"CACHEFSD_PATIENCE_S": "600", "SYSTEMD_BUS_TIMEOUT": "600"},
            )
        finally:
            os.close(writer)
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
        # One line, and not all until the end of the file: a daemon that the function has left may keep the pipe.
        said = answer.readline()
    status = process.wait()
    outcome = json.loads(said) if said else {"error": f"the process has ended with status {status}"}
    return {"id": order["id"], **outcome}


def _call(answer_fd: int) -> None:
    order = json.load(sys.stdin)
    os.set_inheritable(answer_fd, False)
    print(f"{order['module']}.{order['function']}", flush=True)  # on the console, for those who look for a fault
    try:
        function = getattr(importlib.import_module(order["module"]), order["function"])
        outcome = {"value": function(*order["args"])}
    except BaseException:
        outcome = {"error": traceback.format_exc()}
    with os.fdopen(answer_fd, "w") as answer:
        print(json.dumps(outcome), file=answer)


if __name__ == "__main__":
    if sys.argv[1:]:
        _call(int(sys.argv[1]))
    else:
        main()
