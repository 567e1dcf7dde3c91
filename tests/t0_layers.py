"""The house of docs/design.md: imports point downwards, and each resource has one layer that touches it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cachefsd"

# What each layer may import of cachefsd besides itself; a dotted name allows that one and what is in it.
LAYERS = {
    "": {"cachefsd"},
    "__main__": {"cachefsd"},
    "cli": {"cachefsd"},
    "service": {
        *("cachefsd.errors", "cachefsd.reaper", "cachefsd.wakeup"),
        *("cachefsd.fuse", "cachefsd.core", "cachefsd.backing", "cachefsd.media"),
    },
    "fuse": {"cachefsd.errors", "cachefsd.times", "cachefsd.core", "cachefsd.backing", "cachefsd.media"},
    "core": {
        *("cachefsd.errors", "cachefsd.runs", "cachefsd.times", "cachefsd.wakeup"),
        *("cachefsd.media.ports", "cachefsd.backing.ports"),
    },
    "backing": {"cachefsd.errors", "cachefsd.filesystems", "cachefsd.times"},
    "media": {"cachefsd.errors", "cachefsd.filesystems", "cachefsd.runs", "cachefsd.times"},
    "reaper": set(),
    "errors": set(),
    "filesystems": set(),
    "runs": set(),
    "times": set(),
    "wakeup": set(),
}
# Who alone may import these, as paths in the package: folders or files.
OWNERS = {
    "pyfuse3": ["fuse/"],
    "lmdb": ["media/catalog.py"],
    "cffi": ["media/", "backing/", "filesystems.py"],
    "ctypes": ["media/", "backing/", "fuse/dropper.py"],  # the last is a process of its own
    "mmap": ["media/", "backing/syscalls.py"],  # the last for a stack of signal handlers
    "click": ["cli/"],
    "rich": ["cli/"],
    "pydantic": ["service/", "cli/"],
}
# The engine runs in the crash simulator too: it must not reach the machine past its ports.
CORE_FORBIDDEN = {
    *("asyncio", "fcntl", "glob", "io", "mmap", "multiprocessing", "os", "pathlib", "resource", "select"),
    *("selectors", "shutil", "signal", "socket", "subprocess", "tempfile", "threading"),
}

# The parts of the engine: each is changed by its own methods. The files' data is shared, their life is not.
PARTS = {
    *("cache", "slots", "files", "queue", "dirty", "health", "blocks", "records", "integrity", "room", "syncs"),
    *("writeback", "groups", "passes", "space", "upkeep", "attributes", "dormant", "policy"),
}
LIFE = {"life", "held", "record", "tombstone", "unlinked", "stopped", "ready"}
CHANGES = {
    *("append", "clear", "discard", "extend", "insert", "move_to_end", "pop", "popitem", "popleft", "remove"),
    *("setdefault", "update"),
}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything a module imports, deferred and typing imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def _path(node: ast.AST) -> list[str]:
    """The names of ``a.b[c].d``, without what is in brackets; empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Subscript):
        return _path(node.value)
    if isinstance(node, ast.Attribute):
        above = _path(node.value)
        return [*above, node.attr] if above else []
    return []


def changed(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """(line, path) of everything that is assigned, deleted, or changed as a list or dictionary."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            changes_part = (_path(node.func.value) or [""])[-1].lstrip("_") in PARTS  # by a method of its own
            targets = [] if changes_part else [node.func.value]
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                yield each.lineno, _path(each)


def changed_from_outside(tree: ast.AST, *, files: bool) -> Iterator[tuple[int, str]]:
    """(line, path) of fields of a part of the engine that another one changes. ``files``: whether it is the module of
    the files themselves."""
    for line, path in changed(tree):
        *holders, name = path or [""]
        if holders == ["self"] or not holders or "stats" in holders:
            continue
        if holders[-1].lstrip("_") in PARTS or (name in LIFE and not files):
            yield line, ".".join(path)


def is_within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


def violations(root: Path) -> list[str]:
    """All breaches of the tables above under the package directory ``root``."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        layer = parts[0] if parts != ("__init__",) else ""
        package = ".".join(["cachefsd", *parts[:-1]])
        if layer not in LAYERS:
            found.append(f"{relative}: no layer of this name")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in imports(tree, package):
            top = name.partition(".")[0]
            where = f"{relative}:{line}: imports {name}"
            own = {f"cachefsd.{layer}", "cachefsd.__version__"}
            if top == "cachefsd" and not is_within(name, LAYERS[layer] | own):
                found.append(where)
            if top in OWNERS and not any(relative.as_posix().startswith(owner) for owner in OWNERS[top]):
                found.append(where)
            if layer == "core" and top in CORE_FORBIDDEN:
                found.append(where)
        if layer == "core":
            outside = changed_from_outside(tree, files=relative.as_posix() == "core/files.py")
            found += [f"{relative}:{line}: changes {name}" for line, name in outside]
            found += [
                f"{relative}:{node.lineno}: calls open"
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"
            ]
    return found


def test_the_package_keeps_its_layers() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/bad.py", "from cachefsd.fuse import session"),
        ("core/bad.py", "from cachefsd.media import pool"),
        ("core/bad.py", "import cachefsd.media.portside"),
        ("core/bad.py", "def late():\n    import os.path"),
        ("core/bad.py", "open('/etc/passwd')"),
        ("core/bad.py", "def f(cache):\n    cache.dirty.pressure = True"),
        ("core/bad.py", "def f(self, file):\n    self._cache.files.held[file] = None"),
        ("core/bad.py", "def f(self, file):\n    del self._files.held[file]"),
        ("core/bad.py", "def f(cache, slot):\n    cache.slots.free.append(slot)"),
        ("core/bad.py", "def f(slots, slot):\n    slots.verified[slot], done = 1, True"),
        ("core/bad.py", "def f(file):\n    file.ready = False"),
        ("core/deeper/bad.py", "from ...fuse import session"),
        ("core/bad.py", "from .. import fuse"),
        ("media/bad.py", "from cachefsd.core.slots import SlotTable"),
        ("media/bad.py", "import lmdb"),
        ("backing/bad.py", "import mmap"),
        ("backing/bad.py", "from cachefsd.media import ports"),
        ("fuse/bad.py", "from cachefsd.service import metrics"),
        ("fuse/bad.py", "from ctypes import CDLL"),
        ("service/bad.py", "import pyfuse3"),
        ("service/bad.py", "import cachefsd.cli.main"),
        ("errors.py", "import cachefsd.core"),
        ("unheard/of.py", ""),
    ],
)
def test_a_violation_is_found(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/good.py", "from cachefsd.media.ports import Pool\nfrom . import slots\nimport trio"),
        ("core/good.py", "from cachefsd.backing import ports\nfrom .slots import SlotTable"),
        ("core/good.py", "def f(self, cache, file):\n    self.ready = cache.stats.runs = 1\n    file.dirty -= 1"),
        ("core/good.py", "def f(cache, file):\n    cache.files.add(file)\n    cache.blocks.remove(file, 1, 2)"),
        ("core/files.py", "def file_of(file):\n    file.record = None"),
        ("media/catalog.py", "import lmdb\nfrom cachefsd.errors import UserError"),
        ("media/pool.py", "import mmap, os, ctypes"),
        ("fuse/good.py", "import pyfuse3\nfrom cachefsd.core import engine\nfrom ..media import pool"),
        ("cli/good.py", "import click\nfrom cachefsd import __version__\nimport cachefsd.service"),
        ("__main__.py", "from cachefsd.cli.main import main"),
        ("__init__.py", "__version__ = '1'"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    assert violations(tmp_path) == []
