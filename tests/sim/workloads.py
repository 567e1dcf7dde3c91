"""Programs for the simulator: all short ones, as CrashMonkey's ACE has them, and long random ones.

Small numbers on purpose: two files, three blocks, few slots, so that slots are reused and the cache is full at once.
"""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Iterator

from sim.media import BLOCK
from sim.world import Step

FILES = ("a", "b")
HALF = BLOCK // 2


def operations(name: str, other: str) -> list[Step]:
    """What is done to a file in the short programs."""
    return [
        ("write", name, 0, BLOCK),
        ("write", name, 2 * BLOCK, BLOCK),
        ("write", name, HALF, BLOCK),
        ("write", name, 0, 3 * BLOCK),
        ("append", name, HALF),
        ("truncate", name, 0),
        ("truncate", name, BLOCK + HALF),
        ("truncate", name, 3 * BLOCK),
        ("fsync", name),
        ("utimes", name),
        ("unlink", name),
        ("rename", name, other),
    ]


def overlaps(name: str) -> list[Step]:
    """Operations on one file at once: two of those that must not meet in the middle, in either order."""
    alone: list[Step] = [
        ("truncate", name, 0),
        ("truncate", name, BLOCK + HALF),
        ("truncate", name, 3 * BLOCK),
        ("write", name, HALF, BLOCK),
        ("write", name, 2 * BLOCK, BLOCK),
        ("utimes", name),
        ("retime", name),
        ("fsync", name),
        ("rename", name),
        ("flush", name),
    ]
    return [("beside", *pair) for pair in itertools.permutations(alone, 2)]


FLUSHES: tuple[Step, ...] = (("flush",), ("start_flush",))


def short_programs(length: int) -> Iterator[list[Step]]:
    """All programs of so many operations, each plain and with a writeback, waited for or not, at every position."""
    first = operations(*FILES)  # which file comes first makes no difference
    either = first + operations(*reversed(FILES))
    for chosen in itertools.product(first, *[either] * (length - 1)):
        steps = list(chosen)
        yield steps
        for flush in FLUSHES:
            for position in range(1, length + 1):
                yield [*steps[:position], flush, *steps[position:]]


def overlap_programs() -> list[list[Step]]:
    """Programs that end in two operations on one file at once: over data that is new, durable, written back, or being
    written back."""
    write: Step = ("write", "a", 0, 3 * BLOCK)
    befores: list[list[Step]] = [
        [write],
        [write, ("fsync", "a")],
        [write, ("flush",), ("write", "a", BLOCK, BLOCK)],
        [write, ("start_flush",)],  # a pair with a rename is then a rename beside writeback, and beside something else
    ]
    return [[*before, both] for before in befores for both in overlaps("a")]


CALLS = (
    *("open", "read", "write", "write", "truncate", "set_mtime", "sync", "sync", "stat"),
    *("sync_all", "sync_directory", "unlink"),
)
"""of the backing, those that matter most twice"""


def faulty_program(rng: random.Random, length: int) -> list[Step]:
    """A long one over a backing that fails now and then, and is well again before the end."""
    steps: list[Step] = []
    for step in random_program(rng, length):
        if rng.random() < 0.25:
            number = rng.choice((errno.EIO, errno.ENOSPC))
            steps.append(("fail", rng.choice(CALLS), rng.randint(1, 3), number, rng.randint(1, 3)))
        steps.append(step)
    end = [steps.pop()] if steps[-1] == ("shutdown",) else []
    return [*steps, ("heal",), ("wait", 40), ("flush",), *end]


def random_program(rng: random.Random, length: int) -> list[Step]:
    """A long one: more of everything, and time to let things happen."""
    steps: list[Step] = []
    for _ in range(length):
        name = rng.choice(("a", "b", "c"))
        other = rng.choice([each for each in ("a", "b", "c") if each != name])
        steps.append(
            rng.choice(
                [
                    *operations(name, other),
                    ("write", name, 8 * rng.randrange(48), 8 * rng.randint(1, 40)),
                    ("write", name, BLOCK * rng.randrange(4), BLOCK * rng.randint(1, 3)),
                    ("truncate", name, 8 * rng.randrange(48)),
                    ("read", name),
                    ("close", name),
                    ("start_flush",),
                    ("start_flush",),
                    ("wait", rng.choice((1, 12, 30))),
                    ("sync_directory",),
                    rng.choice(overlaps(name)),
                    rng.choice(overlaps(name)),
                    rng.choice(overlaps(name)),
                ]
            )
        )
    if rng.random() < 0.2:
        steps.append(("shutdown",))
    return steps
