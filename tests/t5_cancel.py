"""Clients that are killed in the middle of a request that the backing holds up: nothing of them stays behind.

The kernel lets a killed process go only when its request is answered, unless the daemon has not read it yet.
``make storm CANCELS=1000`` kills so many.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support_daemon import PATIENCE_S, Daemon, MakeDaemon, make_daemon, wait_until
from support_fs import drop_caches, frozen, loop_mounted, slow_reads

__all__ = ["make_daemon"]
CANCELS = int(os.environ.get("CACHEFSD_CANCELS", "") or 100)
BATCH = 10
BLOCK = 4096
KEPT = 20 * BLOCK


def write(path: Path, rng: random.Random) -> list[str]:
    """More than the cache holds: most of it waits for room."""
    return ["dd", "if=/dev/zero", f"of={path}", "bs=64k", "count=100", "conv=notrunc", "status=none"] + [
        "oflag=direct"
    ] * rng.randrange(2)


def fsync(path: Path, _: random.Random) -> list[str]:
    return ["dd", "if=/dev/zero", f"of={path}", "bs=4k", "count=1", "conv=notrunc,fsync", "status=none"]


def truncate(path: Path, rng: random.Random) -> list[str]:
    return ["truncate", f"--size={rng.randrange(100 * BLOCK)}", f"{path}"]


def change_mode(path: Path, rng: random.Random) -> list[str]:
    return ["chmod", f"{rng.randrange(0o600, 0o700):o}", f"{path}"]


def create(path: Path, _: random.Random) -> list[str]:
    return ["touch", f"{path}-new"]


def read(path: Path, rng: random.Random) -> list[str]:
    return ["dd", f"if={path}", "of=/dev/null", "bs=4k", f"skip={rng.randrange(200)}", "count=4", "status=none"] + [
        "iflag=direct"
    ] * rng.randrange(2)


def sleeps(client: subprocess.Popen[bytes]) -> bool:
    """Whether it is asleep in the kernel; these programs sleep nowhere else than in requests."""
    try:
        return Path(f"/proc/{client.pid}/stat").read_text().rpartition(")")[2].split()[0] in "SD"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def killed_in_the_middle(
    commands: list[list[str]], rng: random.Random, held_up: Callable[[], bool] = lambda: True
) -> Iterator[int]:
    """Clients that are killed when all have ended or sleep; they must be gone at the end of the block.

    Yields how many had not ended by themselves.
    """
    clients = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    try:
        wait_until(held_up, "what holds up the clients")
        wait_until(lambda: all(client.poll() is not None or sleeps(client) for client in clients), "requests")
        held = [client for client in clients if client.poll() is None]
        for client in rng.sample(held, len(held)):
            client.kill()
        yield len(held)
    finally:
        for client in clients:
            client.kill()
    for client in clients:
        client.wait(PATIENCE_S)


def is_full(daemon: Daemon) -> bool:
    slots = daemon.ask("status")["slots"]
    return bool(slots["dirty"] > 0.9 * slots["total"])


def read_kept(daemon: Daemon) -> bytes:
    """What is cached is still served; asked by another process, which may hang."""
    command = ["dd", f"if={daemon.path / 'kept'}", "bs=4k", "iflag=direct", "status=none"]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True).stdout


def accounts_are_right(daemon: Daemon) -> bool:
    slots = daemon.ask("status")["slots"]
    return bool(slots["free"] + slots["clean"] + slots["dirty"] + slots["quarantined"] == slots["total"])


def check_all_is_well(daemon: Daemon, child: subprocess.Popen[bytes], kept: bytes) -> None:
    """Nothing is taken or pinned any more, nobody waits, and an orderly end is possible."""
    daemon.ask("flush")
    wait_until(lambda: accounts_are_right(daemon), "every slot in its place")
    assert read_kept(daemon) == kept
    daemon.unmount()
    assert child.wait(PATIENCE_S) == 0
    assert "Traceback" not in daemon.stderr.read_text()
    assert (daemon.backing / "kept").read_bytes() == kept


@contextmanager
def known_to_the_kernel(paths: list[Path]) -> Iterator[None]:
    """The kernel does not forget these names. A name that it looks up waits for the lock of the directory, and a client
    that creates a file holds the lock."""
    with contextlib.ExitStack() as undo:
        for path in paths:
            undo.callback(os.close, os.open(path, os.O_PATH))
        yield


@pytest.mark.timeout(600 + 10 * CANCELS)
def test_clients_killed_while_the_backing_takes_nothing(
    make_daemon: MakeDaemon, tmp_path: Path, rng: random.Random
) -> None:
    with loop_mounted("ext4", tmp_path) as ext4:
        daemon = make_daemon(ext4, size="4M", options=("dirty_age=0.1,full_timeout=600",), mount=False)
        child = daemon.start_and_wait()
        kept = rng.randbytes(KEPT)
        for number in range(BATCH):
            (daemon.path / f"{number}").write_bytes(bytes(BLOCK))
        kinds = [write, write, fsync, truncate, change_mode, create]
        for _ in range(0, CANCELS // 2, BATCH):
            (daemon.path / "kept").write_bytes(kept)
            daemon.ask("flush")
            commands = [rng.choice(kinds)(daemon.path / f"{number}", rng) for number in range(1, BATCH)]
            names = ["kept", *map(str, range(BATCH))]
            with known_to_the_kernel([daemon.path / name for name in names]), contextlib.ExitStack() as stack:
                fault = stack.enter_context(contextlib.ExitStack())
                fault.enter_context(frozen(ext4))
                commands.insert(0, write(daemon.path / "0", rng))
                with killed_in_the_middle(commands, rng, lambda: is_full(daemon)) as killed:
                    assert killed > 0
                    assert read_kept(daemon) == kept
                    fault.close()
        check_all_is_well(daemon, child, kept)


@pytest.mark.timeout(600 + 10 * CANCELS)
def test_clients_killed_while_they_read_from_a_slow_disk(
    make_daemon: MakeDaemon, tmp_path: Path, rng: random.Random
) -> None:
    with loop_mounted("ext4", tmp_path) as ext4:
        for number in range(CANCELS // 2):
            (ext4 / f"{number}").write_bytes(bytes([number % 256]) * (1 << 20))
        daemon = make_daemon(ext4, size="4M", options=("dirty_age=0.1",), mount=False)
        child = daemon.start_and_wait()
        kept = rng.randbytes(KEPT)
        total = 0
        for first in range(0, CANCELS // 2, BATCH):
            (daemon.path / "kept").write_bytes(kept)
            daemon.ask("flush")
            paths = [daemon.path / f"{number}" for number in range(first, min(first + BATCH, CANCELS // 2))]
            for path in paths:
                path.stat()
            drop_caches()
            with contextlib.ExitStack() as stack:
                fault = stack.enter_context(contextlib.ExitStack())
                fault.enter_context(slow_reads(ext4))
                with killed_in_the_middle([read(path, rng) for path in paths], rng) as killed:
                    total += killed
                    assert read_kept(daemon) == kept
                    fault.close()
        assert total > 0 or not CANCELS
        for number in range(CANCELS // 2):
            assert (daemon.path / f"{number}").read_bytes() == bytes([number % 256]) * (1 << 20)
        check_all_is_well(daemon, child, kept)
