"""The root file system that guests boot: made of Debian packages once, and kept."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT_LABEL = "project"
_ROOT_MIB = 2048
_PACKAGES = (
    *("linux-image-amd64", "initramfs-tools", "zstd", "systemd", "systemd-sysv", "dbus", "udev", "kmod"),
    *("python3", "fuse3", "libpmem1", "libaio1", "ndctl", "e2fsprogs", "xfsprogs", "util-linux", "procps"),
    *("fio", "dmsetup", "bcache-tools", "rclone"),
)

# Only what finds the root file system: a fraction of the usual initrd, which an emulated processor has to unpack.
_INITRD_HOOK = r"""
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
echo MODULES=list > "$1/etc/initramfs-tools/conf.d/lab"
printf 'virtio_pci\nvirtio_blk\next4\n' > "$1/usr/share/initramfs-tools/modules.d/lab"
"""
_AGENT_UNIT = """\
[Unit]
Description=Does what the lab asks
DefaultDependencies=no
RequiresMountsFor=/project
After=systemd-udev-trigger.service systemd-tmpfiles-setup.service tmp.mount
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStart=/usr/bin/python3 -m lab.agent
Restart=always
StandardOutput=journal+console
StandardError=journal+console
OOMScoreAdjust=-1000

[Install]
WantedBy=sysinit.target
"""
# Debian's Python looks here, whoever starts it.
_SITE = f"usr/local/lib/python3.{sys.version_info.minor}/dist-packages"
_FILES = {
    "etc/fstab": f"LABEL={PROJECT_LABEL} /project ext4 ro,x-systemd.device-timeout=1800 0 0\n",
    "etc/hostname": "lab\n",
    "etc/systemd/system/lab-agent.service": _AGENT_UNIT,
    # Nobody is there to mend it: the host is to see an end.
    "etc/systemd/system/emergency.service": "[Service]\nType=oneshot\nExecStart=/bin/systemctl poweroff -ff\n",
    f"{_SITE}/project.pth": "/project/packages\n/project/tests\n",
    "usr/local/bin/cachefsd": "#!/usr/bin/python3\nfrom cachefsd.cli.main import main\n\nmain()\n",
}
# What a machine does not need that lives for minutes and has no screen: all of it costs seconds of each boot.
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("e2scrub_reap.service", "ndctl-monitor.service", "getty@tty1.service", "serial-getty@ttyS0.service"),
    *("modprobe@configfs.service", "modprobe@dm_mod.service", "modprobe@drm.service", "modprobe@efi_pstore.service"),
    *("modprobe@loop.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount"),
    *("systemd-logind.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service"),
)


class ImageError(Exception):
    """There is no image, and it cannot be made here: packages are out of reach, or the privileges for it."""


@dataclass(frozen=True, slots=True)
class Image:
    """Files that QEMU starts a guest from."""

    root: Path
    kernel: Path
    initrd: Path


def build_image(directory: Path) -> Image:
    """The guest's root file system for the recipe above: the one in ``directory``, or a new one."""
    image = directory / f"image-{_recipe()}"
    if not image.exists():
        for old in directory.glob("image-*"):
            shutil.rmtree(old)
        unfinished = image.with_suffix(".tmp")
        unfinished.mkdir()
        _build(unfinished)
        unfinished.rename(image)
    return Image(image / "root.img", image / "vmlinuz", image / "initrd")


def _recipe() -> str:
    """Changes whenever the image has to be built anew."""
    recipe = (_suite(), _PACKAGES, _INITRD_HOOK, _FILES, _MASKED, _ROOT_MIB, inspect.getsource(_build))
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]


def _suite() -> str:
    """The host's own release: what was built for the host's Python then runs in the guest."""
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def _build(directory: Path) -> None:
    tree = directory / "tree"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--format=directory", f"--include={','.join(_PACKAGES)}"]
    command += [f"--essential-hook={_INITRD_HOOK}", _suite(), os.fspath(tree), *_apt_sources()]
    with (directory / "log").open("wb") as log:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        tail = (directory / "log").read_text().splitlines()[-15:]
        raise ImageError("\n".join(["the guest image could not be built:", *tail]))
    for name, text in _FILES.items():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    (tree / "usr/local/bin/cachefsd").chmod(0o755)
    (tree / "project").mkdir()
    units = tree / "etc/systemd/system"
    (units / "sysinit.target.wants").mkdir(exist_ok=True)
    (units / "sysinit.target.wants/lab-agent.service").symlink_to("../lab-agent.service")
    (units / "default.target").symlink_to("/lib/systemd/system/multi-user.target")
    for unit in _MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to(os.devnull)
    shutil.rmtree(tree / "var/cache/apt")
    shutil.rmtree(tree / "var/lib/apt/lists")
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        (found,) = (tree / "boot").glob(pattern)
        shutil.copy(found, directory / name)
    make_ext4(directory / "root.img", tree, "root", _ROOT_MIB)
    shutil.rmtree(tree)


def _apt_sources() -> list[str]:
    """Where this machine has its Debian packages from, as lines of sources.list."""
    form = "$(ORIGIN)|$(CODENAME)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    lines = [line.split("|") for line in dict.fromkeys(listed.splitlines())]
    found = [entry for origin, codename, entry in lines if origin == "Debian" and codename.startswith(_suite())]
    if not found:
        raise ImageError(f"apt knows no Debian packages of {_suite()} (has `apt-get update` been run?)")
    return found


def make_ext4(path: Path, tree: Path, label: str, size_mib: int | None = None) -> None:
    """An ext4 image of a directory tree."""
    if size_mib is None:
        used = subprocess.run(["du", "-s", "-m", tree], check=True, capture_output=True, text=True).stdout
        size_mib = int(used.split()[0]) * 5 // 4 + 32
    command = ["mkfs.ext4", "-q", "-F", "-L", label, "-d", os.fspath(tree), os.fspath(path), f"{size_mib}M"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
