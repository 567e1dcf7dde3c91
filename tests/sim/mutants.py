"""Seeded faults: each breaks one invariant in one small way, and the simulator has to notice.

A fault is an edit of the source of ``cachefsd``: the functions that it touches are compiled anew and exchanged while it
is in force, so production code has no switches for it. An edit whose text is not there exactly once is refused: when the
code moves on, so must its row here.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

Edit = tuple[str, str]
"""(text that is there exactly once, what stands there instead)"""


class Mutant(NamedTuple):
    """One seeded fault."""

    name: str
    breaks: str
    """the rules O of docs/design.md §6, promises P of its §2, or what else must hold"""
    module: str
    """a path within ``cachefsd``"""
    edits: tuple[Edit, ...]
    killer: str
    """the scenario that notices, see sim/scenarios.py"""


class StaleMutant(Exception):
    """An edit does not fit the source any more."""


def _codes(code: CodeType) -> Iterator[CodeType]:
    """All code objects in ``code``."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _functions(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Functions of the module and of its classes: (qualified name, first line, last line)."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield prefix + member.name, member.lineno, member.end_lineno or member.lineno


def _find(module: ModuleType, name: str) -> FunctionType:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    if isinstance(found, property):
        found = found.fget
    found = getattr(found, "__wrapped__", found)
    assert isinstance(found, FunctionType), name
    return found


def _mutated(module: ModuleType, edits: tuple[Edit, ...]) -> dict[FunctionType, CodeType]:
    """The functions that the edits touch, and their new code.

    :raises StaleMutant:
    """
    assert module.__file__ is not None
    source = changed = Path(module.__file__).read_text()
    functions = list(_functions(ast.parse(source)))
    touched: set[str] = set()
    for old, new in edits:
        if source.count(old) != 1:
            raise StaleMutant(f"{module.__name__} has this text {source.count(old)} times, not once: {old!r}")
        first = source[: source.index(old)].count("\n") + 1
        last = first + old.rstrip("\n").count("\n")
        names = [name for name, start, end in functions if start <= first and last <= end]
        if len(names) != 1:
            raise StaleMutant(f"{module.__name__}: not within one function: {old!r}")
        touched.update(names)
        changed = changed.replace(old, new)
    codes = {code.co_qualname: code for code in _codes(compile(changed, module.__file__, "exec", dont_inherit=True))}
    return {_find(module, name): codes[name] for name in touched}


@contextmanager
def seeded(mutant: Mutant) -> Iterator[None]:
    """The fault is in force.

    :raises StaleMutant: the edits do not fit the source.
    """
    module = importlib.import_module("cachefsd." + mutant.module.removesuffix(".py").replace("/", "."))
    changed = _mutated(module, mutant.edits)
    originals = {function: function.__code__ for function in changed}
    try:
        for function, code in changed.items():
            function.__code__ = code
        yield
    finally:
        for function, code in originals.items():
            function.__code__ = code
