"""A storm of SIGKILLs on the real mount: whenever the daemon dies, the next one has all that was acknowledged.

Writers (:mod:`storm_writers`) work all at once: on blocks of a file with verification, on names, and SQLite in both
of its journal modes. The daemon is killed while they work, while a killed one's successor recovers, while everything
is written back, and while it stops. ``make storm KILLS=400 RACES=40`` goes on for longer, and ``SEED=`` starts
another storm than the usual one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from support_daemon import PATIENCE_S, Daemon, MakeDaemon, daemons, is_gone, wait_until

from cachefsd.errors import UserError

KILLS = int(os.environ.get("CACHEFSD_KILLS", "") or 48)
RACES = int(os.environ.get("CACHEFSD_RACES", "") or 6)
BARE_EVERY = 5
"""kills between two looks at the bare backing"""
WRITERS = ["blocks", "blocks", "names", "names", "wal", "rollback"]
CLASSES = ["disk", "ram"]


class Writer:
    """A process of ``storm_writers.py``, and what it has said."""

    def __init__(self, kind: str, number: int, seed: str) -> None:
        self.name = f"{kind}-{number}"
        self.acknowledged = 0
        self._answer: list[str] | None = None
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "storm_writers.py", kind, str(number), seed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._listen)
        self._reader.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, *rest = json.loads(line)
            with self._news:
                if word == "ack":
                    self.acknowledged += 1
                else:
                    self._answer = [word, *rest]
                self._news.notify_all()
        with self._news:
            self._answer = ["failed", "the writer has died"]
            self._news.notify_all()

    def tell(self, word: str, root: Path) -> None:
        self._answer = None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([word, os.fspath(root)]).encode() + b"\n")
        self._process.stdin.flush()

    def await_progress(self, count: int) -> None:
        """Return once it has so many more acknowledged steps; nothing may have stopped it."""
        target = self.acknowledged + count
        with self._news:
            assert self._news.wait_for(lambda: self._answer or self.acknowledged >= target, PATIENCE_S), (
                f"{self.name} does not get on"
            )
        self.must_be_working()

    def must_be_working(self) -> None:
        assert self._answer is None, f"{self.name}: {self._answer[1]}"

    def expect(self, word: str) -> None:
        """Wait for an answer, which must be this one."""
        with self._news:
            assert self._news.wait_for(lambda: self._answer, PATIENCE_S), f"{self.name} hangs"
        assert self._answer is not None
        assert self._answer[0] == word, f"{self.name}: {self._answer[1]}"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Storm:
    """A daemon, its writers, and a source of chance."""

    def __init__(self, daemon: Daemon, writers: list[Writer], rng: random.Random) -> None:
        self.daemon = daemon
        self.writers = writers
        self.rng = rng
        self.kills = 0
        self.races = 0

    def note(self, text: str) -> None:
        print(f"kill {self.kills:3}: {text}")

    # ---- rounds

    def round(self) -> None:
        """Let the writers work, kill the daemon once or more, and look at what is left."""
        child = self._start()
        self._check_all(self.daemon.path)
        for writer in self.writers:
            writer.tell("run", self.daemon.path)
        for writer in self.writers:
            writer.await_progress(3)
        how = self.rng.choice([self._while_they_write, self._while_it_writes_back, self._while_it_stops])
        how(child)
        for writer in self.writers:
            writer.expect("stopped")
        for _ in range(self.rng.choice([0, 0, 1, 2])):
            self._while_it_starts()

    def _kill(self, child: subprocess.Popen[bytes], text: str) -> None:
        running = child.poll() is None
        child.kill()
        # Not all of its threads may end at once: some can be in the middle of a system call on the backing.
        wait_until(lambda: is_gone(child.pid), "the daemon's death")
        child.wait()
        if running:
            self.kills += 1
            self.note(text)

    def _while_they_write(self, child: subprocess.Popen[bytes]) -> None:
        time.sleep(self.rng.uniform(0, 0.4))
        for writer in self.writers:
            writer.must_be_working()
        self._kill(child, "while they write")

    def _while_it_writes_back(self, child: subprocess.Popen[bytes]) -> None:
        def flush() -> None:
            with suppress(UserError):
                self.daemon.ask("flush")

        flusher = threading.Thread(target=flush)
        flusher.start()
        time.sleep(self.rng.uniform(0, 0.2))
        for writer in self.writers:
            writer.must_be_working()
        self._kill(child, "while it writes back")
        flusher.join()

    def _while_it_stops(self, child: subprocess.Popen[bytes]) -> None:
        child.send_signal(signal.SIGTERM)
        time.sleep(self.rng.uniform(0, 0.1))
        self._kill(child, "while it stops")

    def _while_it_starts(self) -> None:
        child = self.daemon.start()
        wait_until(lambda: child.poll() is not None or self._has_pool(child.pid), "a start")
        time.sleep(self.rng.choice([0, self.rng.uniform(0, 0.02), self.rng.uniform(0, 0.2)]))
        self._kill(child, "while it starts")

    def _has_pool(self, pid: int) -> bool:
        with suppress(FileNotFoundError, ProcessLookupError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    if entry.readlink() == self.daemon.cache / "pool":
                        return True
        return False

    def _start(self) -> subprocess.Popen[bytes]:
        """Start one daemon that serves; now and then two are started, and one of them must not."""
        if self.races <= 0:
            child = self.daemon.start_and_wait()
        else:
            self.races -= 1
            rivals = [self.daemon.start(), self.daemon.start()]
            wait_until(
                lambda: (
                    sum(rival.poll() is None and self.daemon.is_served_by(rival) for rival in rivals) == 1
                    and sum(rival.poll() is not None for rival in rivals) == 1
                ),
                "one of two that serves, and the end of the other",
            )
            child, loser = sorted(rivals, key=lambda rival: rival.poll() is not None)
            assert loser.wait() == 1, "the one that came too late did not say so"
            self.daemon.pid = child.pid
            self.note("two were started")
        status = self.daemon.ask("status")
        assert status["lost_blocks"] == []
        assert status["failed"] is None
        return child

    # ---- what is there

    def _check_all(self, root: Path) -> None:
        for writer in self.writers:
            writer.tell("check", root)
        for writer in self.writers:
            writer.expect("checked")

    def look_at_the_backing(self) -> None:
        """After a recovery, an orderly end that writes everything back."""
        child = self._start()
        self._check_all(self.daemon.path)
        self.daemon.ask("flush")
        assert self.daemon.ask("status")["dirty_bytes"] == 0
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE_S) == 0
        self._check_all(self.daemon.backing)


@contextmanager
def storm(make: MakeDaemon, rng: random.Random, kind: str) -> Iterator[Storm]:
    daemon = make(disk=kind == "disk", size="8M", options=("dirty_age=0.3,full_timeout=600",), mount=False)
    with ExitStack() as undo:
        writers = []
        for number, name in enumerate(WRITERS, 1):
            writer = Writer(name, number, f"{rng.random()}")
            undo.callback(writer.end)
            writers.append(writer)
        undo.callback(daemon.destroy)  # first: a writer that waits for the daemon could not be killed
        yield Storm(daemon, writers, rng)


@pytest.mark.timeout(600 + 30 * KILLS)
@pytest.mark.parametrize("kind", CLASSES)
def test_storm(tmp_path: Path, rng: random.Random, kind: str) -> None:
    kills, races = KILLS // len(CLASSES), RACES // len(CLASSES)
    print(f"make storm KILLS={KILLS} RACES={RACES} SEED={os.environ.get('CACHEFSD_SEED', '')}")
    with daemons(tmp_path) as make, storm(make, rng, kind) as it:
        at_backing = 0
        while it.kills < kills:
            if it.kills > kills // 2 and it.races == 0:
                it.races, races = races, 0
            it.round()
            if it.kills - at_backing >= BARE_EVERY:
                it.look_at_the_backing()
                at_backing = it.kills
        it.look_at_the_backing()
        said = it.daemon.stderr.read_text()
    assert "Traceback" not in said
    assert " ERROR " not in said
