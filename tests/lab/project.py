"""The project as it is now, on a disk for guests, with the Python packages that it needs."""

from __future__ import annotations

import compileall
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from lab.image import PROJECT_LABEL, make_ext4

ROOT = Path(__file__).parents[2]
_PROJECT = "cachefsd"
# What it needs at run time, and what its tests need.
_DISTRIBUTIONS = (_PROJECT, "pytest", "pytest-trio", "pytest-timeout", "hypothesis")


def build_project_disk(path: Path, staging: Path) -> None:
    """Put the project as it is now, and the packages that it needs, on a disk image at ``path``."""
    packages = staging / "packages"
    for distribution in _closure(_DISTRIBUTIONS):
        if distribution.name != _PROJECT:
            _copy(distribution, packages)
    for name in (_PROJECT, "bench", "tests", "systemd"):
        target = packages if name in (_PROJECT, "bench") else staging
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", staging)
    # The guest could not keep what it compiles.
    compileall.compile_dir(staging, quiet=2, stripdir=os.fspath(staging), prependdir="/project")
    make_ext4(path, staging, PROJECT_LABEL)
    shutil.rmtree(staging)


def _closure(names: tuple[str, ...]) -> Iterator[importlib.metadata.Distribution]:
    """Installed distributions, and those that they need, each once."""
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        distribution = importlib.metadata.distribution(name)
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
        yield distribution


def _copy(distribution: importlib.metadata.Distribution, target: Path) -> None:
    """Copy what ``distribution`` has installed, but its scripts."""
    for file in distribution.files or ():
        if file.parts[0] == ".." or "__pycache__" in file.parts:
            continue
        copy = target / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(os.fspath(file.locate())), copy)
