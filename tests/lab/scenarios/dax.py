"""A cache on DAX file systems: its class, its flushes, its direct I/O, its recovery; and what is no DAX."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import guest
from lab.machine import Lab

SIZE = 8 << 20
BLOCKS = SIZE // 4096
PMEM, SLOW, FILES = Path("/mnt/pmem"), Path("/mnt/slow"), Path("/mnt/files")
LIBPMEM = "libpmem.so.1"


def run(lab: Lab) -> dict[str, Any]:
    machine = lab.machine(nvdimm_mib=512, disks_mib={"slow": 256})
    with machine.boot(lab.rng) as running:
        facts = {kind: running.call(check_class_pmem, kind) for kind in ("ext4", "xfs")}
        running.call(check_classes_without_dax)
    return facts


def check_class_pmem(kind: str) -> dict[str, int]:
    from support_daemon import cachefsd

    guest.make_namespace("fsdax", "-M", "mem")
    with mounted(kind, "dax=always"):
        cachefsd("format", PMEM / "cache", "--size", "64M")
        return check_flushes_and_direct_io(make_daemon(), PMEM / "cache/pool")


def check_flushes_and_direct_io(daemon: Any, pool: Path) -> dict[str, int]:
    """A new cache whose pool is ``pool``, from its first mount to the last, with a kill in between."""
    from support_daemon import cachefsd
    from support_fs import drop_caches, pages_of

    written, beneath, cold = FILES / "written", SLOW / "written", SLOW / "cold"
    contents = [os.urandom(SIZE) for _ in range(2)]
    cold.write_bytes(contents[1])
    drop_caches()
    try:
        daemon.mount()
        status = daemon.ask("status")
        assert (status["durability"], status["pool"]) == ("pmem", str(pool))
        assert "sf" in vm_flags(daemon.pid, pool), "mapped without MAP_SYNC"
        assert f"/{LIBPMEM}" in Path(f"/proc/{daemon.pid}/maps").read_text()
        written.write_bytes(contents[0])
        assert beneath.stat().st_size == 0

        daemon.kill_and_mount()
        status = daemon.ask("status")
        assert not status["recovery"]["clean"]
        assert status["dirty_bytes"] == SIZE
        assert written.read_bytes() == contents[0]

        daemon.ask("flush")
        assert (FILES / "cold").read_bytes() == contents[1]
        status = daemon.ask("status")
        assert status["dirty_bytes"] == 0
        assert status["writeback"]["direct_bytes"] == SIZE
        assert status["writeback"]["bounced_bytes"] == 0
        assert status["promotions"] == BLOCKS
        assert pages_of(beneath) == pages_of(cold) == 0
        daemon.unmount()
        with without_libpmem():
            refused = cachefsd("mount", SLOW, FILES, "--cache", daemon.cache, check=False)
        assert refused.returncode == 1
        assert f"persistent memory needs {LIBPMEM}" in refused.stderr
        assert beneath.read_bytes() == contents[0]
    finally:
        daemon.destroy()
    return {"direct_bytes": status["writeback"]["direct_bytes"], "promotions": status["promotions"]}


def check_classes_without_dax() -> None:
    from support_daemon import cachefsd

    with mounted("ext4", "dax=never"):
        assert class_of_a_new_cache() == "disk"

    guest.make_namespace("raw")  # without struct pages
    with mounted("ext4", "defaults"):
        assert class_of_a_new_cache() == "disk"
    try:
        guest.mount(guest.PMEM, PMEM, "dax=always")
    except RuntimeError:
        pass
    else:
        raise AssertionError("ext4 took a raw namespace for DAX")

    refused = cachefsd("format", "/dev/shm/cache", "--size", "64M", check=False)
    assert refused.returncode == 1
    assert "nothing on tmpfs survives a power cut" in refused.stderr
    assert cachefsd("format", "/dev/shm/cache", "--size", "64M", "--volatile", check=False).returncode == 0


def class_of_a_new_cache() -> str:
    daemon = make_daemon()
    try:
        daemon.mount()
        found: str = daemon.ask("status")["durability"]
        daemon.unmount()
    finally:
        daemon.destroy()
    return found


def make_daemon() -> Any:
    from support_daemon import Daemon

    return Daemon(SLOW, PMEM / "cache", FILES, "64M", ("dirty_age=3600",), False)


@contextlib.contextmanager
def mounted(kind: str, options: str) -> Iterator[None]:
    """Fresh file systems on the persistent memory and on the slow disk."""
    guest.make_file_system(kind, guest.PMEM)
    guest.make_file_system("ext4", guest.disk("slow"))
    FILES.mkdir(exist_ok=True)
    guest.mount(guest.PMEM, PMEM, options)
    guest.mount(guest.disk("slow"), SLOW)
    yield
    guest.run("umount", SLOW, PMEM)


def vm_flags(pid: int, path: Path) -> list[str]:
    """The flags of the mapping of a file (proc(5), smaps)."""
    of_the_file = Path(f"/proc/{pid}/smaps").read_text().split(f" {path}\n")[1]
    return of_the_file.split("VmFlags:")[1].splitlines()[0].split()


@contextlib.contextmanager
def without_libpmem() -> Iterator[None]:
    """The library is no library, until the end of the block."""
    (library,) = Path("/usr/lib").glob(f"*/{LIBPMEM}")
    guest.run("mount", "--bind", os.devnull, library)
    yield
    guest.run("umount", library)
