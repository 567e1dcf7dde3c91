"""The main job, shown on real data: write through the cache, kill the daemon in mid-write, find every byte.

Prints what it does and a table of what was measured. The last line is ``demo: ok``, or says what went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BLOCK = 4096
STAMP = struct.Struct("<QQ")  # block number, how many times it had been written
WRITERS = 4
BLOCKS_PER_WRITER = 4096
FIO_MIB = 256
CACHE_MIB = 1024
SMALL_CACHE_MIB = 128
MEMORY = Path("/dev/shm")
KILL_AFTER_WRITES = 5000
PATIENCE_S = 60

console = Console(highlight=False)


class Failure(Exception):
    """Something is not as it must be."""


@dataclass
class Report:
    """Rows of the table: what was measured, and how it came out."""

    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, result: str) -> None:
        self.rows.append((what, result))

    def show(self) -> None:
        table = Table(title="What was measured", title_justify="left", show_header=False)
        table.add_column("")
        table.add_column("", justify="right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def run(*command: str | os.PathLike[str]) -> str:
    """Output of a command; Failure with what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Failure(f"{Path(command[0]).name} {command[1] if len(command) > 1 else ''}: {said[-1]}")
    return done.stdout


class Mount:
    """A directory with cachefsd over it."""

    def __init__(self, directory: Path, cache: Path, size_mib: int, volatile: bool) -> None:
        self.directory = directory
        self._cachefsd = Path(sys.executable).with_name("cachefsd")
        self._options = ["--cache", os.fspath(cache), "--size", f"{size_mib}M"]
        if volatile:
            self._options.append("--volatile")

    def mount(self) -> float:
        """Seconds until it serves."""
        began = time.perf_counter()
        run(self._cachefsd, "mount", self.directory, *self._options)
        return time.perf_counter() - began

    def status(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(run(self._cachefsd, "status", self.directory, "--json"))
        return result

    def flush(self) -> float:
        began = time.perf_counter()
        run(self._cachefsd, "flush", self.directory)
        return time.perf_counter() - began

    def unmount(self) -> None:
        run(self._cachefsd, "unmount", self.directory)

    def kill(self, pid: int) -> None:
        """kill -9, and wait until it is dead."""
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while not self._is_gone(pid) and time.monotonic() < deadline:
            time.sleep(0.01)

    @staticmethod
    def _is_gone(pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
        except (FileNotFoundError, ProcessLookupError):
            return True


def fio(path: Path, *options: str) -> dict[str, Any]:
    """Run fio on one file with checksums in every block; its figures."""
    output = run(
        *("fio", "--name=demo", f"--filename={path}", f"--size={FIO_MIB}M", "--bs=4k", "--rw=randwrite"),
        *("--ioengine=libaio", "--iodepth=16", "--direct=1", "--verify=crc32c", "--verify_fatal=1"),
        *("--randseed=7", "--verify_state_save=0", "--output-format=json", *options),
    )
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    if job["error"]:
        raise Failure(f"fio found an error in {path.name}: {os.strerror(job['error'])}")
    return job


def digest(root: Path) -> dict[str, str]:
    """Every file below ``root`` with its mode and the hash of its content."""
    result = {}
    for path in sorted(root.rglob("*")):
        name, mode = os.fspath(path.relative_to(root)), path.lstat().st_mode
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.blake2b(path.read_bytes()).hexdigest()
        else:
            content = ""
        result[name] = f"{mode:o} {content}"
    return result


class Writers:
    """Threads that overwrite blocks of one file, each its own, and remember what was acknowledged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.acknowledged = [[0] * BLOCKS_PER_WRITER for _ in range(WRITERS)]
        self.tried = [[0] * BLOCKS_PER_WRITER for _ in range(WRITERS)]
        self.writes = 0
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._write, args=(n,), daemon=True) for n in range(WRITERS)]

    def start(self) -> None:
        self.path.touch()
        for thread in self._threads:
            thread.start()

    def wait_for(self, writes: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.writes < writes:
            if time.monotonic() > deadline or self.errors:
                raise Failure(f"writing stopped after {self.writes} writes: {self.errors[:1]}")
            time.sleep(0.001)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            if thread.is_alive():
                raise Failure("a writer hangs after the daemon was killed")

    def _write(self, number: int) -> None:
        state = number + 1
        fd = os.open(self.path, os.O_WRONLY)
        try:
            while True:
                state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
                index = (state >> 33) % BLOCKS_PER_WRITER
                version = self.tried[number][index] = self.acknowledged[number][index] + 1
                os.pwrite(fd, self._image(number, index, version), self._block(number, index) * BLOCK)
                self.acknowledged[number][index] = version
                self.writes += 1
        except OSError as error:
            self.errors.append(os.strerror(error.errno or 0))
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    @staticmethod
    def _block(number: int, index: int) -> int:
        return index * WRITERS + number

    def _image(self, number: int, index: int, version: int) -> bytes:
        return STAMP.pack(self._block(number, index), version) * (BLOCK // STAMP.size)

    def check(self) -> int:
        """How many blocks were written; Failure unless each holds what was acknowledged last, or newer."""
        data = self.path.read_bytes()
        seen = 0
        for number in range(WRITERS):
            for index, version in enumerate(self.acknowledged[number]):
                block = self._block(number, index)
                image = data[block * BLOCK : (block + 1) * BLOCK]
                allowed = {version, self.tried[number][index]}
                if not any(image == self._image(number, index, v) if v else not any(image) for v in allowed):
                    raise Failure(f"block {block} does not hold version {version}, which was acknowledged")
                seen += version > 0
        return seen


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is being done and how long it took."""
    console.print(f"  {text} ...", end="")
    began = time.perf_counter()
    try:
        yield
    except BaseException:
        console.print(" failed")
        raise
    console.print(f" {time.perf_counter() - began:.1f} s")


def compare(what: str, expected: dict[str, str], root: Path) -> None:
    found = digest(root)
    if found != expected:
        different = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        raise Failure(f"{what}: {len(different)} of {len(expected)} files differ, {different[0]} for one")


def demonstrate(mount: Mount, report: Report) -> None:
    directory = mount.directory
    library = Path(sysconfig.get_path("stdlib"))
    fio_file, tree = directory / "fio", directory / "library"
    writers = Writers(directory / "stamped")

    with step("mounting over the directory"):
        mount.mount()
    status = mount.status()
    report.add("durability class of the cache", status["durability"])
    with step(f"fio: {FIO_MIB} MiB of random 4 KiB writes at depth 16, a checksum in each"):
        job = fio(fio_file, "--do_verify=0")
    report.add("fio 4 KiB random writes, depth 16", f"{job['write']['iops']:,.0f} IOPS")
    report.add("fio median latency", f"{job['write']['clat_ns']['percentile']['50.000000'] / 1000:,.0f} us")
    with step(f"copying {library}"):
        began = time.perf_counter()
        run("cp", "-a", library, tree)
        elapsed = time.perf_counter() - began
    expected = digest(library)
    files = sum(1 for _ in tree.rglob("*"))
    report.add("real files copied in", f"{files:,} in {elapsed:.1f} s ({files / elapsed:,.0f} a second)")
    with step(f"{WRITERS} writers; kill -9 after {KILL_AFTER_WRITES:,} writes"):
        writers.start()
        writers.wait_for(KILL_AFTER_WRITES)
        dirty = mount.status()["dirty_bytes"]
        mount.kill(status["pid"])
        writers.join()
    report.add("dirty when it was killed", f"{dirty / 2**20:,.0f} MiB")
    report.add("writes acknowledged before the kill", f"{writers.writes:,}")
    with step("mounting again"):
        seconds = mount.mount()
    recovery = mount.status()["recovery"]
    report.add("recovery", f"{recovery['blocks']:,} blocks in {recovery['seconds'] * 1000:,.0f} ms")
    report.add("from mount to serving", f"{seconds * 1000:,.0f} ms")
    with step("verifying every acknowledged write on the mount"):
        blocks = writers.check()
        fio(fio_file, "--verify_only=1")
        compare("after the kill", expected, tree)
    report.add("stamped blocks verified", f"{blocks:,}")
    with step("flush: everything to the backing"):
        seconds = mount.flush()
    written = mount.status()["writeback"]
    report.add("flush", f"{dirty / 2**20:,.0f} MiB or less in {seconds:.1f} s")
    report.add("writeback by direct I/O from the map", f"{written['direct_bytes'] / 2**20:,.1f} MiB")
    report.add("through the page cache (ends of files)", f"{written['bounced_bytes'] / 2**20:,.1f} MiB")
    with step("unmounting"):
        mount.unmount()
    with step("comparing on the bare directory"):
        writers.check()
        fio(fio_file, "--verify_only=1")
        compare("on the bare directory", expected, tree)


@contextlib.contextmanager
def places(where: Path | None, cache: Path | None) -> Iterator[Mount]:
    """A directory and a cache, both gone afterwards."""
    with contextlib.ExitStack() as undo:
        base = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="cachefsd-demo-", dir=where)))
        directory = base / "data"
        directory.mkdir()
        size_mib, volatile = CACHE_MIB, False
        if cache is None:
            space = os.statvfs(MEMORY)
            size_mib = min(CACHE_MIB, space.f_bavail * space.f_frsize // 2**21)
            volatile = size_mib >= SMALL_CACHE_MIB
            if volatile:
                memory = tempfile.TemporaryDirectory(prefix="cachefsd-demo-", dir=MEMORY)
                cache = Path(undo.enter_context(memory)) / "cache"
            else:
                console.print(f"{MEMORY} is too small for a cache, which goes beside the directory")
                cache, size_mib = base / "cache", CACHE_MIB
        yield Mount(directory, cache, size_mib, volatile)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to make the directory to mount over")
    parser.add_argument("--cache", type=Path, help="directory for the cache; by default in memory (tmpfs)")
    arguments = parser.parse_args()
    report = Report()
    with places(arguments.directory, arguments.cache) as mount:
        console.print(f"cachefsd over {mount.directory}")
        try:
            demonstrate(mount, report)
        except (Failure, OSError) as error:
            console.print(f"demo: FAILED: {error}", markup=False)
            return 1
        finally:
            with contextlib.suppress(Failure):
                mount.unmount()
    report.show()
    print("demo: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
