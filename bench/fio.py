"""fio, and what it says."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """Of one run: requests and MiB a second, and completion latencies in microseconds."""

    iops: float
    mib_s: float
    p50_us: float
    p99_us: float
    p999_us: float


def fio(
    file: Path,
    rw: str,
    *,
    size_mib: int,
    bs: str = "4k",
    depth: int = 1,
    jobs: int = 1,
    direct: bool = True,
    seconds: float | None = None,
    extra: tuple[str, ...] = (),
) -> Result:
    """One run over the first ``size_mib`` of ``file``, for so many seconds or, without, once over it.

    Requests are sent by libaio where several are in flight, else by pread and pwrite. ``extra`` are more words.
    """
    words = [
        *("fio", "--name=bench", f"--filename={file}", f"--rw={rw}", f"--bs={bs}", f"--direct={int(direct)}"),
        *(f"--ioengine={'libaio' if depth > 1 else 'psync'}", f"--iodepth={depth}", f"--numjobs={jobs}"),
        *(f"--size={size_mib}m", "--randrepeat=0", "--fallocate=none", "--group_reporting"),
        "--thread",  # one process, which is gone when it is killed
        *("--output-format=json", "--eta=never"),
    ]
    if seconds is not None:
        words += ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
        if rw.startswith("rand"):
            words.append("--norandommap")
    done = subprocess.run([*words, *extra], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fio {rw}: {done.stderr.strip()}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    kind = job["read" if "read" in rw else "write"]
    percentiles = kind["clat_ns"]["percentile"]
    p50, p99, p999 = (percentiles[name] / 1000 for name in ("50.000000", "99.000000", "99.900000"))
    return Result(kind["iops"], kind["bw_bytes"] / 2**20, p50, p99, p999)
