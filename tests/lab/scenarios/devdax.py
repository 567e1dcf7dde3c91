"""A pool on a device of device-dax: its class, flushes and direct I/O, what is refused, bad blocks, a power cut.

The catalog is on a disk that loses what was not flushed.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import cuts, guest
from lab.machine import Lab
from lab.scenarios.dax import check_flushes_and_direct_io

BLOCK = 4096
DEVICE, SYSFS, REGION = Path("/dev/dax0.0"), Path("/sys/bus/dax/devices/dax0.0"), Path("/sys/bus/nd/devices/region0")
SLOW, FILES, KEPT = cuts.SLOW, cuts.FILES, Path("/mnt/kept")
CACHE, OTHER = KEPT / "cache", KEPT / "other"


def run(lab: Lab) -> dict[str, Any]:
    machine = lab.machine(nvdimm_mib=64, disks_mib={"slow": 256, "kept": 128})
    trial = cuts.Trial(machine, lab.rng, ("blocks",))
    with machine.boot(lab.rng) as running:
        running.call(set_up)
        running.call(check_formats)
        facts = running.call(check_class_pmem)
        running.call(check_refusals)
        running.call(check_bad_blocks)
        running.call(serve_new)
        running.call(cuts.begin, ["blocks"])
        trial.load_until_cut(running)
    with machine.boot(lab.rng) as running:
        running.call(serve)
        trial.check(running)
        running.call(cuts.flush_and_check_backing, trial.told())
        running.call(check_made_anew)
    return facts | {"acknowledged": trial.oracles["blocks"].acknowledged}


# ---- in the guest


def set_up() -> None:
    guest.make_namespace("devdax", "-M", "mem")
    for name in ("slow", "kept"):
        guest.make_file_system("ext4", guest.disk(name))
    settle()


def settle() -> None:
    """The device, which udev alone does not always bring after a boot, and the file systems."""
    for module in ("nfit", "nd_pmem", "device_dax", "dax_pmem"):
        guest.run("modprobe", module)
    guest.run("udevadm", "settle")
    assert DEVICE.is_char_device()
    FILES.mkdir(exist_ok=True)
    guest.mount(guest.disk("slow"), SLOW)
    guest.mount(guest.disk("kept"), KEPT)


def check_formats() -> None:
    """What is on the device decides what a format does; of two at once one is refused."""
    words = ("format", CACHE, "--pool")
    for place, said in (
        ("/dev/null", "not a device of device-dax"),
        ("/dev/zero", "not a device of device-dax"),
        (guest.disk("slow"), "not a device of device-dax"),
        ("/dev/dax9.9", "No such file or directory"),
        (SLOW, "not a device of device-dax"),
    ):
        assert said in refused(*words, place)
    for size, said in (("1G", "the device has"), ("9M", "multiple of 2097152"), ("2M", "too small")):
        assert said in refused(*words, DEVICE, "--size", size)
    os.mknod("/dev/again", 0o600 | 0o020000, DEVICE.stat().st_rdev)
    assert f"another node of {DEVICE}" in refused(*words, "/dev/again")
    os.chmod(DEVICE, 0o660)
    assert "others may write to it" in refused(*words, DEVICE)
    os.chmod(DEVICE, 0o600)

    with device_map() as memory:
        memory[1 << 20 : (1 << 20) + 5] = b"PMEM!"
    assert "--discard-foreign" in refused(*words, DEVICE)
    assert "Confirm with --yes" in refused(*words, DEVICE, "--discard-foreign")
    with device_map() as memory:
        assert memory[1 << 20 : (1 << 20) + 5] == b"PMEM!"
    done(*words, DEVICE, "--size", "16M", "--discard-foreign", "--yes")
    done(*words, DEVICE, "--size", "16M", "--yes")
    assert "without dirty data" in refused("format", OTHER, "--pool", DEVICE, "--size", "16M")

    done("format", CACHE, "--size", "16M", "--yes")  # back into the directory
    racers = [
        subprocess.Popen(
            ["python3", "-m", "cachefsd", "format", cache, "--pool", DEVICE, "--size", "16M"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for cache in (OTHER, KEPT / "third")
    ]
    said = [racer.communicate()[1] for racer in racers]
    assert sorted(racer.returncode for racer in racers) == [0, 1], said
    assert any("in use by another cache" in text or "without dirty data" in text for text in said), said
    done(*words, DEVICE, "--yes")  # the whole device, for what follows
    for cache in (OTHER, KEPT / "third"):
        shutil.rmtree(cache)


def check_class_pmem() -> dict[str, int]:
    return check_flushes_and_direct_io(make_daemon(), DEVICE)


def check_refusals() -> None:
    """Who else wants the device, while a daemon has it and while it holds dirty data; nothing is lost by it."""
    shutil.copytree(CACHE, OTHER)
    third = ("format", KEPT / "third", "--pool", DEVICE, "--size", "16M", "--discard-dirty", "--yes")
    daemon = make_daemon()
    try:
        daemon.mount()
        (FILES / "dirty").write_bytes(b"dirty" * 10_000)
        backing, elsewhere = KEPT / "backing", KEPT / "elsewhere"
        backing.mkdir()
        elsewhere.mkdir()
        for words, expected in (
            (("mount", backing, elsewhere, "--cache", OTHER), f"{DEVICE}: the device is in use by another cache"),
            (third, f"{DEVICE}: the device is in use by another cache"),
            (("mount", backing, elsewhere, "--cache", CACHE), f"in use by another daemon (process {daemon.pid})"),
        ):
            said = refused(*words)
            assert expected in said, said
        assert "in use by another daemon" in refused("format", CACHE, "--pool", DEVICE, "--discard-dirty", "--yes")
        daemon.unmount()
        for cache in (CACHE, KEPT / "third"):
            said = refused("format", cache, "--pool", DEVICE, "--yes")
            assert f"dirty blocks (0.1 MiB) of {SLOW}; --discard-dirty gives that up" in said, said
        moved = DEVICE.with_name("moved")
        DEVICE.rename(moved)
        assert "No such file or directory" in refused("mount", SLOW, FILES, "--cache", CACHE)
        moved.rename(DEVICE)
        daemon.mount()
        assert (FILES / "dirty").read_bytes() == b"dirty" * 10_000
        daemon.unmount("--flush")
        done(*third)
        assert "holds another pool than that of the cache" in refused("mount", SLOW, FILES, "--cache", CACHE)
        done("format", CACHE, "--pool", DEVICE, "--discard-dirty", "--yes")
    finally:
        daemon.destroy()
    shutil.rmtree(OTHER)
    shutil.rmtree(KEPT / "third")


def check_bad_blocks() -> None:
    """The kernel's list of media errors: what it names is not loaded but lost, and only that."""
    from support_posix import attempt

    from cachefsd.media.pool import open_pool
    from cachefsd.media.ports import SlotState

    content = os.urandom(64 * BLOCK)
    daemon = make_daemon()
    try:
        daemon.mount()
        (FILES / "file").write_bytes(content)
        daemon.unmount()
        with open_pool(CACHE) as pool:
            headers = pool.scan(0, pool.slots)
            dirty = headers.state == SlotState.DIRTY
            assert int(dirty.sum()) == 64
            slot = int((dirty & (headers.block == 10)).nonzero()[0][0])
            data_offset = pool._data_offset
        with bad_blocks(data_offset + slot * BLOCK + 512, 512):
            daemon.mount()
            assert daemon.ask("status")["lost_blocks"] == [{"path": "file", "from": 10 * BLOCK, "to": 11 * BLOCK}]
            fd = os.open(FILES / "file", os.O_RDONLY | os.O_DIRECT)
            memory = mmap.mmap(-1, BLOCK)
            for block in range(64):
                if block == 10:
                    assert attempt(os.preadv, fd, [memory], block * BLOCK) == "EIO"
                else:
                    assert os.preadv(fd, [memory], block * BLOCK) == BLOCK
                    assert memory[:] == content[block * BLOCK :][:BLOCK]
            os.close(fd)
            daemon.unmount()
        daemon.mount()  # after all it could be read
        assert (FILES / "file").read_bytes() == content
        daemon.unmount("--flush")
        # Headers: of 4 KiB of them nothing is known.
        with bad_blocks(8192 + slot // 64 * BLOCK, BLOCK):
            daemon.mount()
            assert daemon.ask("status")["lost_unknown"] == 64
            assert (FILES / "file").read_bytes() == content  # from the backing
            daemon.unmount()
    finally:
        daemon.destroy()


def serve_new() -> None:
    """A cache that is smaller than the file of the writers."""
    done("format", CACHE, "--pool", DEVICE, "--size", "6M", "--discard-dirty", "--yes")
    done("mount", SLOW, FILES, "--cache", CACHE, "-o", "dirty_age=0.2")


def serve() -> None:
    """Mount after the cut."""
    settle()
    done("mount", SLOW, FILES, "--cache", CACHE, "-o", "dirty_age=0.2")


def check_made_anew() -> None:
    """Another namespace in the place of the one that had the pool."""
    done("unmount", FILES)
    with device_map() as memory:
        memory[: 2 << 20] = bytes(2 << 20)
    assert "never finished formatting" in refused("mount", SLOW, FILES, "--cache", CACHE)
    guest.run("ndctl", "destroy-namespace", "--force", "all")
    assert "No such file or directory" in refused("mount", SLOW, FILES, "--cache", CACHE)
    guest.run("ndctl", "create-namespace", "--mode", "devdax", "-M", "mem")
    guest.run("udevadm", "settle")
    done("format", CACHE, "--pool", DEVICE, "--size", "16M", "--discard-dirty", "--discard-foreign", "--yes")
    done("mount", SLOW, FILES, "--cache", CACHE)
    done("unmount", FILES)


def refused(*arguments: str | os.PathLike[str]) -> str:
    """What a command that must fail says: one line."""
    status, said = command(*arguments)
    assert status == 1, said
    assert said.count("\n") == 1, said
    return said


def done(*arguments: str | os.PathLike[str]) -> None:
    """Run a command that must not fail."""
    status, said = command(*arguments)
    assert status == 0, said


def command(*arguments: str | os.PathLike[str]) -> tuple[int, str]:
    """The exit status and standard error of a command. Unless it mounts, it is run in this process: to start Python
    takes seconds on an emulated machine."""
    from support_daemon import cachefsd

    from cachefsd.cli.main import main

    if arguments[0] == "mount":
        ended = cachefsd(*arguments, check=False)
        return ended.returncode, ended.stderr
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([os.fspath(argument) for argument in arguments])
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


def make_daemon() -> Any:
    from support_daemon import Daemon

    return Daemon(SLOW, CACHE, FILES, "16M", ("dirty_age=3600",), False)


@contextlib.contextmanager
def device_map() -> Iterator[mmap.mmap]:
    """The device, as somebody else would use it."""
    size = int((SYSFS / "size").read_text())
    fd = os.open(DEVICE, os.O_RDWR)
    try:
        with mmap.mmap(fd, size) as memory:
            yield memory
    finally:
        os.close(fd)


@contextlib.contextmanager
def bad_blocks(offset: int, length: int) -> Iterator[None]:
    """The kernel says that so many bytes of the device can't be read, until the end of the block."""
    namespace = SYSFS.resolve().parent  # which may have another number
    start = int((namespace / "resource").read_text(), 0) - int((REGION / "resource").read_text(), 0)
    said = KEPT / "badblocks"
    said.write_text(f"{(start + offset) // 512} {length // 512}\n")
    guest.run("mount", "--bind", said, (REGION / "badblocks").resolve())
    yield
    guest.run("umount", (REGION / "badblocks").resolve())
