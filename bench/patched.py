"""cachefsd with one thing exchanged, to see what it costs: ``python -m bench.patched PATCH mount …``."""

from __future__ import annotations

import functools
import sys

from cachefsd.cli import main as cli
from cachefsd.media.ports import Durability
from cachefsd.service import stack


def without_checksums() -> None:
    """Every block has the same one; headers keep theirs."""
    core = [vars(module) for name, module in sys.modules.items() if name.startswith("cachefsd.core.")]
    users = [names for names in core if "xxh3_64_intdigest" in names]
    assert users
    for names in users:
        names["xxh3_64_intdigest"] = lambda data: 0


def with_pmem_primitives() -> None:
    """Stores are flushed and fenced as in class pmem, whatever the memory is."""
    stack.open_pool = functools.partial(stack.open_pool, persistence=Durability.PMEM)


PATCHES = {"no-checksums": without_checksums, "pmem": with_pmem_primitives}

if __name__ == "__main__":
    PATCHES[sys.argv.pop(1)]()
    cli.main()
