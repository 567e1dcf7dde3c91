"""Caches under a real systemd: two as services, one in fstab; boot, dependents, crashes, hangs, shutdown, reboot.

Nothing is written back by age, so that what is found after a reboot was kept by a cache that ended in order.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from lab import guest
from lab.machine import Guest, Lab

SIZE = 1 << 20
PMEM = Path("/mnt/pmem")
SYSTEMD = Path("/project/systemd")
UNITS = Path("/etc/systemd/system")

DATA = Path("/srv/data")  # where example.conf has it, as the cache
SERVICE = "cachefsd@data.service"
SLOW, APART = Path("/srv/slow"), Path("/srv/apart")  # a backing that stays visible, and where it is mounted
SERVICE_APART = "cachefsd@apart.service"
ARCHIVE, FAST = Path("/srv/archive"), Path("/srv/fast")  # the same, by fstab
MOUNT = "srv-fast.mount"

PATIENCE = "x-systemd.device-timeout=1800"
MOUNTS = f"""\
{guest.PMEM} {PMEM} ext4 dax=always,{PATIENCE} 0 0
{guest.disk("slow")} {DATA} ext4 {PATIENCE} 0 0
{guest.disk("archive")} {ARCHIVE} ext4 {PATIENCE} 0 0
"""
# All three as the comments of the unit and of fstab.example say.
REQUIRED_MOUNTS = {SERVICE: f"{DATA} {PMEM}", SERVICE_APART: f"{PMEM}"}
NEEDS = {
    DATA: f"Requires={SERVICE}\nAfter={SERVICE}",
    APART: f"Requires={SERVICE_APART}\nAfter={SERVICE_APART}",
    FAST: f"RequiresMountsFor={FAST}",
}
DEPENDENT = """\
[Unit]
{needs}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'stat -f -c %%T {place} > {probed} && echo started >> {place}/diary'
ExecStop=/bin/sh -c 'echo stopped >> {place}/diary'

[Install]
WantedBy=multi-user.target
"""


def run(lab: Lab) -> dict[str, Any]:
    machine = lab.machine(nvdimm_mib=256, disks_mib={"slow": 128, "archive": 128})
    with machine.boot(lab.rng) as running:
        running.call(set_up)
        reboot(running)
        running.call(check_boot)
        running.call(check_units)
        digests = {name: running.call(write_file, name) for name in map(str, NEEDS)}
        running.call(check_restart_after_kill, digests)
        stacks = running.call(check_restart_after_hang, digests)
        running.call(check_stop_and_start, digests)
        running.call(check_mount_after_kill, digests)
        running.call(check_wrong_configuration)
        diaries = running.call(read_diaries)
        reboot(running)
        running.call(check_boot)
        running.call(check_after_reboot, digests, diaries)
    return {"boots": 3, "hang": stacks}


def reboot(running: Guest) -> None:
    running.start(order_reboot)
    running.wait_for_boot()


# ---- in the guest


def set_up() -> None:
    guest.make_namespace("fsdax", "-M", "mem")
    for device in (guest.PMEM, guest.disk("slow"), guest.disk("archive")):
        guest.make_file_system("ext4", device)
    for directory in (PMEM, DATA, SLOW, APART, ARCHIVE, FAST, Path("/etc/cachefsd")):
        directory.mkdir()
    set_up_services()
    set_up_fstab()
    for place, needs in NEEDS.items():
        unit = DEPENDENT.format(needs=needs, place=place, probed=probed(place))
        (UNITS / dependent(place)).write_text(unit)
    guest.run("systemctl", "daemon-reload")
    guest.run("systemctl", "enable", SERVICE, SERVICE_APART, *map(dependent, NEEDS))


def set_up_services() -> None:
    shutil.copy(SYSTEMD / "cachefsd@.service", UNITS)
    example = (SYSTEMD / "example.conf").read_text()
    options = "OPTIONS=-o dirty_age=5\n"
    assert options in example
    data = example.replace(options, "OPTIONS=-o dirty_age=3600\n")
    Path("/etc/cachefsd/data.conf").write_text(data)
    apart = data.replace(f"BACKING={DATA}", f"BACKING={SLOW}").replace(f"MOUNTPOINT={DATA}", f"MOUNTPOINT={APART}")
    Path("/etc/cachefsd/apart.conf").write_text(apart.replace("cachefsd/data", "cachefsd/apart"))
    for service, places in REQUIRED_MOUNTS.items():
        (UNITS / f"{service}.d").mkdir()
        (UNITS / f"{service}.d" / "mounts.conf").write_text(f"[Unit]\nRequiresMountsFor={places}\n")


def set_up_fstab() -> None:
    for name in ("mount.fuse.cachefsd", "umount.fuse.cachefsd"):
        Path("/sbin", name).symlink_to("/usr/local/bin/cachefsd")
    example = (SYSTEMD / "fstab.example").read_text().splitlines()
    (line,) = [line for line in example if line and line[0] != "#"]
    backing, mountpoint, _, options, *_ = line.split()
    # In the lab the program itself is on a mount, and slow.
    lab_only = "x-systemd.requires-mounts-for=/project,x-systemd.mount-timeout=1800"
    more = f"{options},{lab_only},dirty_age=3600,nosuid"
    line = line.replace(options, more).replace(backing, f"{ARCHIVE}").replace(mountpoint, f"{FAST}")
    with Path("/etc/fstab").open("a") as fstab:
        fstab.write(f"{MOUNTS}{line}\n")
    guest.run("mount", PMEM)
    for cache in ("cache", "cachefsd/data", "cachefsd/apart"):
        guest.run("cachefsd", "format", PMEM / cache, "--size", "64M")


def dependent(place: Path) -> str:
    return f"needs-{place.name}.service"


def probed(place: Path) -> Path:
    return Path("/run", f"probed-{place.name}")


def order_reboot() -> None:
    guest.run("systemctl", "reboot")


def check_boot() -> None:
    """Boot ended without failed units, and what needs a mount was started when it served."""
    subprocess.run(["systemctl", "is-system-running", "--wait"], check=False)  # also tells whether units have failed
    failed = guest.run("systemctl", "--failed", "--plain", "--no-legend")
    assert not failed, failed
    for place in NEEDS:
        assert probed(place).read_text() == "fuseblk\n", place
        assert (place / "diary").read_text().endswith("started\n"), place
        assert status(place)["durability"] == "pmem"
    for service in (SERVICE, SERVICE_APART):
        assert show(service, "ActiveState", "NRestarts") == {"ActiveState": "active", "NRestarts": "0"}


def check_units() -> None:
    verified = subprocess.run(["systemd-analyze", "verify", SERVICE], capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stderr
    assert "cachefsd" not in verified.stderr
    mount = show(MOUNT, "After", "Before", "Requires")
    assert {"mnt-pmem.mount", "srv-archive.mount"} <= set(mount["Requires"].split()) & set(mount["After"].split())
    assert {dependent(FAST), "local-fs.target", "umount.target"} <= set(mount["Before"].split())


def write_file(place: str) -> str:
    data = os.urandom(SIZE)
    Path(place, "file").write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def check_restart_after_kill(digests: dict[str, str]) -> None:
    pid = int(show(SERVICE, "MainPID")["MainPID"])
    os.kill(pid, signal.SIGKILL)
    wait_for_restart(1)
    check_recovered(DATA, digests)


def check_restart_after_hang(digests: dict[str, str]) -> str:
    """A daemon that does not run feeds no watchdog; returns how its end was told."""
    pid = int(show(SERVICE, "MainPID")["MainPID"])
    os.kill(pid, signal.SIGSTOP)
    wait_for_restart(2)
    check_recovered(DATA, digests)
    said = journal(SERVICE)
    assert "Watchdog timeout" in said, said
    (stacks,) = [line for line in said.splitlines() if line.startswith("Fatal Python error")]
    return stacks


def wait_for_restart(number: int) -> None:
    """The service is up again, and so is what needs it."""
    from support_daemon import wait_until

    restarted = {"ActiveState": "active", "NRestarts": str(number)}
    wait_until(lambda: show(SERVICE, "ActiveState", "NRestarts") == restarted, f"restart {number}", pause_s=1)
    wait_until(lambda: show(dependent(DATA), "ActiveState", "Job") == {"ActiveState": "active", "Job": ""}, "its user")


def check_recovered(place: Path, digests: dict[str, str]) -> None:
    now = status(place)
    assert not now["recovery"]["clean"]
    assert now["dirty_bytes"] > SIZE
    assert digest_of_file(place) == digests[str(place)]


def check_stop_and_start(digests: dict[str, str]) -> None:
    """Stopped, with what needs it, and without writing back."""
    guest.run("systemctl", "stop", SERVICE)
    stopped = {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert show(SERVICE, *stopped) == stopped
    assert show(dependent(DATA), "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert guest.run("stat", "-f", "-c", "%T", DATA).strip() == "ext2/ext3"
    assert (DATA / "file").stat().st_size == 0, "stopping has written dirty data back"
    assert (DATA / "diary").stat().st_size == 0, "what needs the cache was stopped after it"
    guest.run("systemctl", "start", dependent(DATA))
    check_kept(DATA, digests)


def check_mount_after_kill(digests: dict[str, str]) -> None:
    os.kill(status(FAST)["pid"], signal.SIGKILL)
    guest.run("systemctl", "restart", MOUNT)
    check_recovered(FAST, digests)


def check_wrong_configuration() -> None:
    """It is told once, in a line, and not tried again."""
    from support_daemon import wait_until

    conf = Path("/etc/cachefsd/data.conf").read_text()
    Path("/etc/cachefsd/wrong.conf").write_text(conf.replace(f"={DATA}", "=/srv/nowhere"))
    wrong = "cachefsd@wrong.service"
    started = subprocess.run(["systemctl", "start", wrong], capture_output=True, check=False)
    assert started.returncode != 0
    failed = {"ActiveState": "failed", "NRestarts": "0", "Result": "exit-code"}
    wait_until(lambda: show(wrong, *failed) == failed, "an end to the restarts")
    said = [line for line in journal(wrong).splitlines() if line.startswith("cachefsd: ")]
    assert said == ["cachefsd: the backing /srv/nowhere does not exist"]
    guest.run("systemctl", "reset-failed", wrong)


def read_diaries() -> dict[str, str]:
    return {f"{place}": (place / "diary").read_text() for place in NEEDS}


def check_after_reboot(digests: dict[str, str], diaries: dict[str, str]) -> None:
    """What the users of the mounts wrote last, as they were stopped, is in the caches, and only there."""
    before = guest.run("journalctl", "--boot=-1", "--output=cat")
    assert "Failed unmounting" not in before
    for backing in (SLOW, ARCHIVE):
        for name in ("diary", "file"):
            assert (backing / name).stat().st_size == 0
    for place, diary in diaries.items():
        assert (Path(place) / "diary").read_text() == f"{diary}stopped\nstarted\n"
        check_kept(Path(place), digests)
        ask(Path(place), "flush")
    guest.run("systemctl", "stop", SERVICE, SERVICE_APART, MOUNT)
    for place, backing in ((DATA, DATA), (APART, SLOW), (FAST, ARCHIVE)):
        assert digest_of_file(backing) == digests[f"{place}"]


def check_kept(place: Path, digests: dict[str, str]) -> None:
    now = status(place)
    assert now["recovery"]["clean"], f"{place} was not unmounted in order"
    assert now["dirty_bytes"] > SIZE
    assert digest_of_file(place) == digests[f"{place}"]


def digest_of_file(place: Path) -> str:
    return hashlib.sha256((place / "file").read_bytes()).hexdigest()


def status(place: Path) -> dict[str, Any]:
    return ask(place, "status")


def ask(place: Path, command: str) -> dict[str, Any]:
    """What the command line does, without another interpreter, which takes half a minute here."""
    from cachefsd.service import control

    found: dict[str, Any] = control.ask(place, command)
    return found


def journal(unit: str) -> str:
    """What a unit, and systemd about it, has said since the boot."""
    guest.run("journalctl", "--sync")
    return guest.run("journalctl", "--boot", "--output=cat", f"--unit={unit}")


def show(unit: str, *properties: str) -> dict[str, str]:
    lines = guest.run("systemctl", "show", "--property", ",".join(properties), unit).splitlines()
    return dict(line.split("=", 1) for line in lines)
