"""The service under a real systemd: started at boot, ready when it serves, restarted, stopped, rebooted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from lab import guest
from lab.machine import Guest, Lab

SIZE = 1 << 20
DATA = Path("/srv/data")  # where example.conf has it, as the cache
PMEM = Path("/mnt/pmem")
SERVICE = "cachefsd@data.service"
SYSTEMD = Path("/project/systemd")
UNITS = Path("/etc/systemd/system")
PROBED = Path("/run/probed")

MOUNTS = f"""\
{guest.PMEM} {PMEM} ext4 dax=always 0 0
{guest.disk("slow")} {DATA} ext4 defaults 0 0
"""
# Both as the unit's own comment says.
REQUIRED_MOUNTS = f"[Unit]\nRequiresMountsFor={DATA} {PMEM}\n"
DEPENDENT = f"""\
[Unit]
Requires={SERVICE}
After={SERVICE}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c '{{ stat -f -c %%T {DATA}; cat {DATA}/marker; }} > {PROBED}'

[Install]
WantedBy=multi-user.target
"""


def run(lab: Lab) -> dict[str, Any]:
    machine = lab.machine(nvdimm_mib=256, disks_mib={"slow": 128})
    with machine.boot(lab.rng) as running:
        running.call(set_up)
        reboot(running)
        running.call(check_boot)
        digest = running.call(write_file)
        running.call(check_restart_after_kill, digest)
        running.call(check_stop_and_start, digest)
        reboot(running)
        running.call(check_boot)
        running.call(check_after_reboot, digest)
    return {"boots": 3}


def reboot(running: Guest) -> None:
    running.start(order_reboot)
    running.wait_for_boot()


# ---- in the guest


def set_up() -> None:
    guest.make_namespace("fsdax", "-M", "mem")
    guest.make_file_system("ext4", guest.PMEM)
    guest.make_file_system("ext4", guest.disk("slow"))
    for directory in (PMEM, DATA, Path("/etc/cachefsd"), UNITS / f"{SERVICE}.d"):
        directory.mkdir(parents=True)
    with Path("/etc/fstab").open("a") as fstab:
        fstab.write(MOUNTS)
    guest.run("mount", DATA)
    (DATA / "marker").write_text("beneath\n")
    guest.run("umount", DATA)
    shutil.copy(SYSTEMD / "cachefsd@.service", UNITS)
    example = (SYSTEMD / "example.conf").read_text()
    options = "OPTIONS=--size 4G"
    assert options in example
    Path("/etc/cachefsd/data.conf").write_text(example.replace(options, "OPTIONS=--size 64M -o dirty_age=3600"))
    (UNITS / f"{SERVICE}.d" / "mounts.conf").write_text(REQUIRED_MOUNTS)
    (UNITS / "dependent.service").write_text(DEPENDENT)
    guest.run("systemctl", "daemon-reload")
    guest.run("systemctl", "enable", SERVICE, "dependent.service")


def order_reboot() -> None:
    guest.run("systemctl", "reboot")


def check_boot() -> None:
    """Boot ended without failed units, and what needs the mount was started when it served."""
    subprocess.run(["systemctl", "is-system-running", "--wait"], check=False)  # also tells whether units have failed
    failed = guest.run("systemctl", "--failed", "--plain", "--no-legend")
    assert not failed, failed
    assert PROBED.read_text() == "fuseblk\nbeneath\n"
    assert status()["durability"] == "pmem"
    assert show("ActiveState", "NRestarts") == {"ActiveState": "active", "NRestarts": "0"}


def write_file() -> str:
    data = os.urandom(SIZE)
    (DATA / "file").write_bytes(data)
    assert status()["dirty_bytes"] == SIZE
    return hashlib.sha256(data).hexdigest()


def check_restart_after_kill(digest: str) -> None:
    from support_daemon import wait_until

    pid = int(show("MainPID")["MainPID"])
    os.kill(pid, signal.SIGKILL)
    restarted = {"ActiveState": "active", "NRestarts": "1"}
    wait_until(lambda: show("ActiveState", "NRestarts") == restarted, "the restart")
    now = status()
    assert now["pid"] != pid
    assert not now["recovery"]["clean"]
    assert now["dirty_bytes"] == SIZE
    assert digest_of_file() == digest


def check_stop_and_start(digest: str) -> None:
    guest.run("systemctl", "stop", SERVICE)
    stopped = {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert show(*stopped) == stopped
    assert guest.run("stat", "-f", "-c", "%T", DATA).strip() == "ext2/ext3"
    assert (DATA / "file").stat().st_size == 0, "stopping has written dirty data back"
    guest.run("systemctl", "start", SERVICE)
    check_dirty_after_clean_start(digest)


def check_after_reboot(digest: str) -> None:
    check_dirty_after_clean_start(digest)
    guest.run("cachefsd", "flush", DATA)
    guest.run("systemctl", "stop", SERVICE)
    assert digest_of_file() == digest


def check_dirty_after_clean_start(digest: str) -> None:
    now = status()
    assert now["recovery"]["clean"], "the service was not stopped in order"
    assert now["dirty_bytes"] == SIZE
    assert digest_of_file() == digest


def digest_of_file() -> str:
    return hashlib.sha256((DATA / "file").read_bytes()).hexdigest()


def status() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(guest.run("cachefsd", "status", "--json", DATA))
    return found


def show(*properties: str) -> dict[str, str]:
    lines = guest.run("systemctl", "show", "--property", ",".join(properties), SERVICE).splitlines()
    return dict(line.split("=", 1) for line in lines)
