"""A file system with segments on device-dax: made, used, and found again after a kexec."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab

pytestmark = pytest.mark.lab

M = 1 << 20
MOUNT = Path("/mnt/pkernfs")
DEVICE = "/dev/dax0.0"


def mount(guest: Guest) -> None:
    guest.run("modprobe", "-a", "dax_hmem", "device_dax")
    MOUNT.mkdir(parents=True, exist_ok=True)
    guest.run("mount", "-t", "fuse.pkernfs", DEVICE, str(MOUNT), "-o", "allow_other", seconds=120)


def native(guest: Guest, file: Path) -> str:
    return guest.run("pkernfs", "path", str(file)).strip()


def owner_of(path: str) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_uid, info.st_mode & 0o777


def use(guest: Guest) -> None:
    """Two owners' files get devices of their own; what a program stores there the mount reads."""
    guest.run("modprobe", "-a", "dax_hmem", "device_dax")
    guest.run("mkfs.pkernfs", "-s", "64M", DEVICE)
    mount(guest)
    for number, word in enumerate((b"first", b"other"), 1):
        file = MOUNT / f"ram{number}"
        file.touch(0o600)
        os.chown(file, 1000 + number, 1000)
        os.truncate(file, 32 * M)
        path = native(guest, file)
        assert owner_of(path) == (1000 + number, 0o600)
        fd = os.open(path, os.O_RDWR)
        with mmap.mmap(fd, 32 * M) as memory:
            memory[4 * M : 4 * M + 5] = word
            with file.open("rb") as opened:
                assert os.pread(opened.fileno(), 5, 4 * M) == word
            assert "busy" in guest.run("truncate", "-s", "16M", str(file), status=1)
        os.close(fd)
    os.truncate(MOUNT / "ram2", 48 * M)
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", DEVICE)
    mount(guest)  # and so it is when the kexec comes: nothing is unmounted
    guest.kexec()


def find_again(guest: Guest) -> None:
    """Every device is made again at its own memory, and is its owner's."""
    mount(guest)
    for number, word, size in ((1, b"first", 32 * M), (2, b"other", 48 * M)):
        file = MOUNT / f"ram{number}"
        assert file.stat().st_size == size
        path = native(guest, file)
        assert owner_of(path) == (1000 + number, 0o600)
        with file.open("rb") as opened:
            assert os.pread(opened.fileno(), 5, 4 * M) == word
            assert os.pread(opened.fileno(), 5, size - 5) == bytes(5)
        file.unlink()
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", DEVICE)


@pytest.mark.parametrize("kernel", ["6.12"])
def test_dax_segments(lab: Lab, kernel: str) -> None:
    """A file system with segments on device-dax, over a kexec in the midst of its use."""
    machine: Any = lab.machine(
        kernel=kernel,
        memory=3072,
        cmdline=["memmap=512M%1G-1+0xefffffff", "modprobe.blacklist=kmem"],
    )
    lab.run(use, find_again, machine=machine, seconds=300)
