"""What scenarios do in a guest: its persistent memory, its disks, its file systems."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PMEM = Path("/dev/pmem0")
_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=0"),  # shared extents and DAX exclude each other in older kernels
}


def run(*command: str | os.PathLike[str]) -> str:
    """Run a command; its standard output. An error says what the command said."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(str(word) for word in command)}: status {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout


def make_namespace(*mode: str) -> None:
    """Make all of the NVDIMM one namespace, e.g. of ``fsdax`` with its struct pages in memory: ``fsdax -M mem``."""
    run("ndctl", "create-namespace", "--force", "--reconfig=namespace0.0", "--mode", *mode)


def disk(name: str) -> Path:
    """The device of one of the machine's disks."""
    return Path(f"/dev/disk/by-id/virtio-{name}")


def make_file_system(kind: str, device: Path) -> None:
    run(*_MKFS[kind], device)


def mount(device: Path, mountpoint: Path, options: str = "defaults") -> None:
    mountpoint.mkdir(exist_ok=True)
    run("mount", "-o", options, device, mountpoint)


def sync(path: Path) -> None:
    """fsync of a file or of a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
