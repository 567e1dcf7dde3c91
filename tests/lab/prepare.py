"""What every run of the lab needs first: guest image and project disk, for one run at a time."""

from __future__ import annotations

import fcntl
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lab.image import Image, build_image
from lab.project import ROOT, build_project_disk

BUILD = ROOT / "build" / "lab"


@contextmanager
def prepared() -> Iterator[tuple[Image, Path]]:
    """The guest image and the project disk, which is gone afterwards; waits for other runs to end."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that everything is taken down in order
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for killed in BUILD.glob("project-*"):
            shutil.rmtree(killed)
        image = build_image(BUILD)
        with TemporaryDirectory(dir=BUILD, prefix="project-") as staging:
            project = Path(staging) / "project.img"
            build_project_disk(project, Path(staging) / "tree")
            yield image, project
