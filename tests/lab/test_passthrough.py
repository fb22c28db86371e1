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
from support import native_files
from support.lab.commands import PYTHON
from support.lab.regions import MOUNT
from support.waiting import until

pytestmark = pytest.mark.lab

PLACE = Path("/dev/shm/pkernfs-lab")
OWN = PLACE / "own"
SIZE = native_files.BORN_BYTES


def kernel() -> tuple[int, int]:
    """The version of the kernel that runs here."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found is not None
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def daemon(guest: Guest) -> Iterator[Path]:
    """A mount in which each file has memory of its own; its log, complete at the end."""
    OWN.mkdir(parents=True)
    (OWN / "born").touch()
    MOUNT.mkdir(exist_ok=True)
    region, log = PLACE / "region", PLACE / "log"
    with region.open("wb") as f:
        f.truncate(64 << 20)
    guest.run("mkfs.pkernfs", str(region))
    program = [PYTHON, native_files.__file__, str(OWN), "mount", "-f", str(region), str(MOUNT)]
    with log.open("wb") as words, subprocess.Popen(program, stderr=words) as running:
        until("mounted", lambda: os.path.ismount(MOUNT) or running.poll() is not None)
        try:
            yield log
        finally:
            subprocess.run(["umount", str(MOUNT)], check=False)


def map_a_file(guest: Guest) -> None:
    """CREATE and OPEN; reads and writes meet in the file's own memory."""
    with daemon(guest) as log:
        for flags in (os.O_CREAT | os.O_EXCL, 0):
            fd = os.open(MOUNT / "f", flags | os.O_RDWR)
            os.truncate(fd, SIZE)
            with mmap.mmap(fd, SIZE) as memory:
                memory[:5] = b"store"
                there = (OWN / str(os.fstat(fd).st_ino)).read_bytes()[:5] == b"store"
                assert there == (kernel() >= (6, 9)), "in its own memory at once"
                memory.flush()
                assert os.pread(fd, 5, 0) == b"store"
                os.pwrite(fd, b"write", 0)
                assert memory[:5] == b"write"
            os.close(fd)
            os.truncate(MOUNT / "f", 0)
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
