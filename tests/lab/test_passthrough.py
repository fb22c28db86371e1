"""Mappings of a file that has memory of its own, on each kernel: directly from 6.9 on."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kexeclab.guest import Guest
from kexeclab.kernels import SUITES
from kexeclab.runner import Lab
from support.lab.commands import PYTHON
from support.lab.regions import MOUNT
from support.mounted_pool import native_of
from support.waiting import until

pytestmark = pytest.mark.lab

PLACE = Path("/dev/shm/pkernfs-lab")
SIZE = 4 << 20


def kernel() -> tuple[int, int]:
    """The version of the kernel that runs here."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found is not None
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def daemon(guest: Guest) -> Iterator[Path]:
    """A mount in which files have segments on tmpfs; its log, complete at the end."""
    PLACE.mkdir(mode=0o711)
    MOUNT.mkdir(exist_ok=True)
    log = PLACE / "log"
    guest.run("mkfs.pkernfs", "-s", "32M", f"{PLACE}/")
    pkernfs = Path(PYTHON).with_name("pkernfs")
    program = [str(pkernfs), "mount", "-f", f"{PLACE}/", str(MOUNT)]
    with log.open("wb") as words, subprocess.Popen(program, stderr=words) as running:
        until("mounted", lambda: os.path.ismount(MOUNT) or running.poll() is not None)
        try:
            yield log
        finally:
            subprocess.run(["umount", str(MOUNT)], check=False)


def map_a_file(guest: Guest) -> None:
    """Stores, reads and writes meet in the file's segment."""
    path = MOUNT / "f"
    with daemon(guest) as log:
        os.mknod(path)
        os.truncate(path, SIZE)
        fd = os.open(path, os.O_RDWR)
        with mmap.mmap(fd, SIZE) as memory:
            memory[:5] = b"store"
            there = native_of(path).read_bytes()[:5] == b"store"
            assert there == (kernel() >= (6, 9)), "in its own memory at once"
            memory.flush()
            assert os.pread(fd, 5, 0) == b"store"
            os.pwrite(fd, b"write", 0)
            assert memory[:5] == b"write"
        os.close(fd)
    said = log.read_text()
    if kernel() >= (6, 9):
        assert not said
    else:
        assert "not directly: kernel 6.1" in said
        assert "6.9 or newer has it" in said


@pytest.mark.parametrize("kernel", SUITES)
def test_a_segment_is_mapped_directly(lab: Lab, kernel: str) -> None:
    """A file's own memory is mapped by its path; an old kernel says why not, and copies."""
    lab.run(map_a_file, machine=lab.machine(kernel=kernel))
