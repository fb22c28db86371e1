"""A file system with segments on device-dax: made, used, and found again after a kexec."""

from __future__ import annotations

import json
import mmap
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab

pytestmark = pytest.mark.lab

M = 1 << 20
MOUNT = Path("/mnt/pkernfs")
DEVICE = "/dev/dax0.0"


def mount(guest: Guest, *options: str) -> str:
    """Mount it; what the mount said."""
    guest.run("modprobe", "-a", "dax_hmem", "device_dax")
    MOUNT.mkdir(parents=True, exist_ok=True)
    words = ",".join(["allow_other", *options])
    return guest.run("mount", "-t", "fuse.pkernfs", DEVICE, str(MOUNT), "-o", words, seconds=120)


def native(guest: Guest, file: Path) -> str:
    return guest.run("pkernfs", "path", str(file)).strip()


def owner_of(path: str) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_uid, info.st_mode & 0o777


def open_by_name(guest: Guest, file: Path, uid: int, word: bytes) -> None:
    """Its owner maps a native file by its name and stores a word; another user may not open it."""
    info = file.stat()
    node = Path(native(guest, file))
    assert stat.S_ISCHR(info.st_mode)
    assert info.st_rdev == node.stat().st_rdev
    assert (info.st_uid, info.st_mode & 0o777) == (uid, 0o600)
    done = as_user(uid, file, word)
    assert done.returncode == 0, done.stderr
    assert "PermissionError" in as_user(uid + 1, file, word).stderr
    below_exec(guest, file)
    start = piece_of(guest, file)
    with open("/dev/mem", "rb") as memory:
        memory.seek(start + 5 * M)
        assert memory.read(len(word)) == word


def below_exec(guest: Guest, file: Path) -> None:
    """A program that sizes its memory before it maps it takes a device for a file."""
    code = (
        "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR)\n"
        f"os.ftruncate(fd, {48 * M}); os.posix_fallocate(fd, 0, {48 * M})\n"
        "try: os.ftruncate(fd, 1 << 20)\n"
        "except OSError as e: print(e.strerror)"
    )
    said = guest.run("pkernfs", "exec", "--", sys.executable, "-c", code, str(file))
    assert said.strip() == "Invalid argument"


def as_user(uid: int, file: Path, word: bytes) -> subprocess.CompletedProcess[str]:
    code = (
        "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR)\n"
        f"memory = mmap.mmap(fd, {48 * M}); at = {5 * M}; word = sys.argv[2].encode()\n"
        "memory[at : at + len(word)] = word"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(file), word.decode()],
        user=uid, group=1000, extra_groups=[], capture_output=True, text=True, check=False,
    )  # fmt: skip


def piece_of(guest: Guest, file: Path) -> int:
    """Where the memory of a file begins."""
    extents = json.loads(guest.run("pkernfs", "extents", str(file), "--json"))["extents"]
    return int(extents[0]["physical"])


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
    be_native(guest, MOUNT / "ram2")
    assert "busy" in guest.run("umount", str(MOUNT), status=32)
    guest.run("umount", "-R", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", DEVICE)
    mount(guest)  # and so it is when the kexec comes: nothing is unmounted
    guest.kexec()


def be_native(guest: Guest, file: Path) -> None:
    """A file becomes a device and a file again; who has it open is named."""
    with file.open("rb"):
        said = guest.run("pkernfs", "native", str(file), "on", status=1)
        assert f"process {os.getpid()} " in said
    for way in ("on", "off", "on"):
        guest.run("pkernfs", "native", str(file), way)
        assert stat.S_ISCHR(file.stat().st_mode) == (way == "on")
    open_by_name(guest, file, 1002, b"native")
    with pytest.raises(OSError, match="Invalid argument"):
        os.truncate(file, 32 * M)
    with file.open("rb", buffering=0):
        said = guest.run("pkernfs", "native", str(file), "off", status=1)
        assert f"process {os.getpid()} " in said


def hand_over(guest: Guest) -> None:
    """With digests of both files; then somebody changes a byte of one behind everybody's back."""
    mount(guest)
    guest.load()
    with guest.step("handover"):
        done = json.loads(guest.run("pkernfs", "handover", "--digest", "--json", str(MOUNT)))
    assert (done["digest_bytes"], done["not_digested"]) == (80 * M, 0)
    fd = os.open(native(guest, MOUNT / "ram2"), os.O_RDWR)
    with mmap.mmap(fd, 48 * M) as memory:
        memory[21 * M] ^= 1
    guest.execute()


def compare(guest: Guest) -> None:
    """The mount names that file and its 2 MiB, and nothing else; all is there."""
    said = mount(guest, "verify")
    assert "after handover 1" in said
    assert [line.split(": ", 2)[2] for line in said.splitlines() if "changed" in line] == [
        "changed since the handover: /ram2: bytes 0x1400000..0x1600000"
    ]
    assert "lost" not in said
    guest.run("umount", "-R", str(MOUNT))
    find_again(guest)


def find_again(guest: Guest) -> None:
    """Every device is made again at its own memory, and is its owner's."""
    mount(guest)
    for number, word, size in ((1, b"first", 32 * M), (2, b"other", 48 * M)):
        file = MOUNT / f"ram{number}"
        if number == 2:
            open_by_name(guest, file, 1002, b"again")
            guest.run("pkernfs", "native", str(file), "off")
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
    """A file system with segments on device-dax, over a kexec in the midst of its use, and another
    one after a handover with digests.
    """
    machine: Any = lab.machine(
        kernel=kernel,
        memory=3072,
        cmdline=[
            "memmap=512M%1G-1+0xefffffff",
            "modprobe.blacklist=kmem",
            "pkernfs=/dev/dax0.0",
            "iomem=relaxed",
        ],
    )
    lab.run(use, hand_over, compare, machine=machine, seconds=420)
