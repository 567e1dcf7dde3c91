"""One emulated machine: its NVDIMM and disks, its power, and calls into its guest."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lab.disk import SECTOR, Disk
from lab.image import Image

# Emulated by software on a busy machine, a boot may take minutes.
BOOT_S = 1800.0
CALL_S = 1800.0
_MEMORY_MIB = 1024
_KERNEL_ARGUMENTS = (
    "root=LABEL=root rw console=ttyS0 quiet panic=-1 mitigations=off "
    "systemd.show_status=0 systemd.default_timeout_start_sec=1800"
)


class GuestError(Exception):
    """A function failed in the guest; the text is its traceback."""


class Guest:
    """A running machine."""

    def __init__(self, process: subprocess.Popen[bytes], console: Path) -> None:
        self._process = process
        self._console = console
        self._rest = b""
        self._last_id = 0
        self._answers: dict[int, dict[str, Any]] = {}

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = CALL_S) -> Any:
        """Call a function of a module that the guest has too, with arguments and a value that JSON can carry.

        :raises GuestError: it failed there.
        """
        return self.wait(self.start(function, *args), timeout)

    def start(self, function: Callable[..., Any], *args: Any) -> int:
        """Begin a call; :meth:`wait` takes what this returns."""
        self._last_id += 1
        order = {"id": self._last_id, "module": function.__module__, "function": function.__name__, "args": args}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self._last_id

    def wait(self, call: int, timeout: float = CALL_S) -> Any:
        """What a begun call returns."""
        deadline = time.monotonic() + timeout
        while call not in self._answers:
            message = self._hear(deadline)
            if "boot" in message:
                raise GuestError("the guest has booted again")
            self._answers[message["id"]] = message
        answer = self._answers.pop(call)
        if "error" in answer:
            raise GuestError(answer["error"])
        return answer["value"]

    def wait_for_boot(self, timeout: float = BOOT_S) -> None:
        """Wait until the guest has booted (again)."""
        deadline = time.monotonic() + timeout
        while "boot" not in self._hear(deadline):
            pass  # an answer to a call that the reboot has overtaken
        self._answers.clear()

    def _hear(self, deadline: float) -> dict[str, Any]:
        """The next line of the guest."""
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError(f"the guest did not answer in time; its console: {self._console}")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise GuestError(f"QEMU has ended with status {self._process.wait()}; its console: {self._console}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


class Machine:
    """What stays of a machine while its power is off: an NVDIMM, and disks by name (/dev/disk/by-id/virtio-NAME).

    The root file system is fresh at every :meth:`boot`, and stays while the guest reboots by itself.
    """

    def __init__(
        self,
        image: Image,
        project: Path,
        directory: Path,
        nvdimm_mib: int,
        disks: Mapping[str, Disk],
        plain_disks: Mapping[str, Path],
        processors: int,
    ) -> None:
        self.disks = dict(disks)
        self._processors = processors
        self._plain_disks = dict(plain_disks)
        self.acknowledged = directory / "acknowledged"
        self._image = image
        self._project = project
        self._directory = directory
        self._nvdimm = directory / "nvdimm.img"
        self._boots = 0
        self._process: subprocess.Popen[bytes] | None = None
        with self._nvdimm.open("wb") as file:
            file.truncate(nvdimm_mib << 20)

    @contextmanager
    def boot(self, rng: random.Random) -> Iterator[Guest]:
        """Power on; yields when the guest answers. At the end of the block the power goes, whatever happens there.

        ``rng`` decides what is left of what the disks had not flushed. What the guest writes to its port
        ``acknowledged`` is in the file of that name then.
        """
        self._boots += 1
        fate = random.Random(rng.getrandbits(64))  # of its own: how much it is asked differs from run to run
        console = self._directory / f"console-{self._boots}.log"
        with ExitStack() as undo:
            sockets = {name: undo.enter_context(disk.served()) for name, disk in self.disks.items()}
            process = subprocess.Popen(
                # The kernel ends QEMU should this process die without a chance to.
                ["setpriv", "--pdeathsig", "KILL", *self._command(console, sockets)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=undo.enter_context((self._directory / f"qemu-{self._boots}.log").open("wb")),
                pass_fds=list(sockets.values()),
                env=os.environ | {"TMPDIR": os.fspath(self._directory)},
                process_group=0,  # a Ctrl-C is for this process, which then cuts the power
            )
            self._process = process
            try:
                guest = Guest(process, console)
                guest.wait_for_boot()
                yield guest
            finally:
                self._process = None
                process.kill()
                process.communicate()
        for disk in self.disks.values():
            disk.lose_power(fate)

    def cut(self) -> None:
        """The power goes now, in the middle of a :meth:`boot`."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _command(self, console: Path, sockets: Mapping[str, int]) -> list[str]:
        size = self._nvdimm.stat().st_size
        words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-nic", "none"]
        words += [
            "-machine",
            "q35,nvdimm=on,sata=off,smbus=off",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            f"{self._processors}",
        ]
        words += ["-m", f"{_MEMORY_MIB}M,slots=2,maxmem=16G"]
        backend = f"memory-backend-file,id=nvdimm,share=on,mem-path={self._nvdimm},size={size},align=2M"
        words += ["-object", backend, "-device", "nvdimm,memdev=nvdimm"]
        words += ["-kernel", os.fspath(self._image.kernel), "-initrd", os.fspath(self._image.initrd)]
        words += ["-append", _KERNEL_ARGUMENTS, "-serial", f"file:{console}"]
        words += _drive("root", f"file={self._image.root},snapshot=on,cache=unsafe")
        words += _drive("project", f"file={self._project},read-only=on")
        for name, fd in sockets.items():
            # The guest sees a write cache, and its flushes arrive.
            blocks = f",logical_block_size={SECTOR},physical_block_size={SECTOR}"
            words += _drive(name, f"file.driver=nbd,file.server.type=fd,file.server.str={fd},cache=none", blocks)
        for name, path in self._plain_disks.items():
            words += _drive(name, f"file={path},cache=unsafe,aio=threads")
        words += ["-device", "virtio-serial-pci"]
        words += ["-chardev", "stdio,id=agent,signal=off", "-device", "virtserialport,chardev=agent,name=agent"]
        words += ["-chardev", f"file,id=acknowledged,path={self.acknowledged}"]
        words += ["-device", "virtserialport,chardev=acknowledged,name=acknowledged"]
        return words


def _drive(name: str, options: str, more: str = "") -> list[str]:
    drive = f"if=none,id={name},format=raw,{options}"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name}{more}"]


class Lab:
    """What a scenario is given: it makes machines, and a random generator that the seed determines."""

    def __init__(self, image: Image, project: Path, directory: Path, undo: ExitStack, rng: random.Random) -> None:
        self.rng = rng
        self._image = image
        self._project = project
        self._directory = directory
        self._undo = undo

    def machine(
        self,
        *,
        nvdimm_mib: int,
        disks_mib: Mapping[str, int] = MappingProxyType({}),
        plain_disks_mib: Mapping[str, int] = MappingProxyType({}),
        processors: int = 2,
    ) -> Machine:
        """A new machine, off. Plain disks lose nothing at a cut, and take little of the host's time."""
        place = self._directory / f"machine-{len(list(self._directory.glob('machine-*'))) + 1}"
        place.mkdir()
        disks = {name: Disk(place / f"{name}.img", mib) for name, mib in disks_mib.items()}
        for disk in disks.values():
            self._undo.callback(disk.close)
        plain_disks = {name: place / f"{name}.img" for name in plain_disks_mib}
        for name, path in plain_disks.items():
            with path.open("wb") as file:
                file.truncate(plain_disks_mib[name] << 20)
        return Machine(self._image, self._project, place, nvdimm_mib, disks, plain_disks, processors)
