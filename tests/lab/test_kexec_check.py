"""The kernel that is loaded for kexec, seen from the one that runs."""

from __future__ import annotations

import hashlib
import json
import os
import time

import pytest

from kexeclab.guest import Guest, running_kernel
from kexeclab.kernels import SUITES
from kexeclab.runner import Lab
from support.lab import regions
from support.lab.commands import PYTHON
from support.lab.regions import MOUNT

pytestmark = pytest.mark.lab

_READ = "from pkernfs.kexec.loaded import command_line_of_loaded as f; print(f('region'))"


def read_what_is_loaded(guest: Guest) -> None:
    """Loaded in both ways, one after the other; then nothing is."""
    place = running_kernel()
    for call in ("-c", "-s"):  # kexec_load(2) and kexec_file_load(2)
        said = " ".join(guest.command_line(add=[f"lab.said={call}", "x" * 200]))
        guest.run(
            "kexec", "-l", call, str(place / "vmlinuz"), f"--initrd={place / 'initrd'}",
            f"--command-line={said}",
        )  # fmt: skip
        start = time.monotonic()
        found = guest.run(PYTHON, "-c", _READ)
        guest.figure(f"read {call}", time.monotonic() - start, "s")
        assert found.split() == said.split()
    guest.run("kexec", "-u")
    assert "no kernel is loaded" in guest.run(PYTHON, "-c", _READ, status=1)


@pytest.mark.parametrize("kernel", SUITES)
def test_reads_what_is_loaded(lab: Lab, kernel: str) -> None:
    """The command line of the kernel that kexec has loaded is read from the running one."""
    lab.run(read_what_is_loaded, machine=lab.machine(kernel=kernel))


def hand_over_to_the_right_kernel(guest: Guest) -> None:
    """Refused for kernels that would take the region; handed over to one that leaves it alone."""
    guest.run("mkfs.pkernfs", "none")
    MOUNT.mkdir(exist_ok=True)
    guest.run("mount", "-t", "fuse.pkernfs", "none", str(MOUNT))
    for i in range(20):
        (MOUNT / f"file{i}").write_bytes(bytes([i]) * 5000 * i)
    (MOUNT / "guest-ram").write_bytes(os.urandom(1 << 20) * 32)
    words = ("pkernfs", "handover", "--digest", str(MOUNT))
    assert "no kernel is loaded for kexec" in guest.run(*words, status=1)
    for left_out in regions.PARAMETERS["devmem"]:
        guest.load(remove=[left_out])
        assert f"is not told {left_out}" in guest.run(*words, status=1)
        (MOUNT / "written").write_bytes(b"nothing is frozen")
    guest.load()
    with open(MOUNT / "file3", "r+b"):
        assert f"open for writing: {MOUNT}/file3 by process {os.getpid()}" in guest.run(
            *words, status=1
        )
    print(guest.run(*words))
    guest.run("sh", "-c", f"! touch {MOUNT}/frozen")
    guest.note("digest", _digest())
    guest.execute()


def find_it_unchanged(guest: Guest) -> None:
    """Live update: the gap is told, and nothing has changed."""
    said = guest.run("mount", "-t", "fuse.pkernfs", "-o", "verify", "none", str(MOUNT))
    assert "live update: mounted " in said
    assert "changed" not in said
    found = json.loads(guest.run("pkernfs", "info", "--json", str(MOUNT)))
    assert found["arrival"] == "live update"
    assert found["history"][0]["result"] == "unchanged"
    assert found["history"][0]["boot_id_before"] != found["history"][0]["boot_id_after"]
    guest.figure("gap", found["history"][0]["gap_ns"] / 1e9, "s")
    assert guest.notes["digest"] == _digest()
    (MOUNT / "written").write_bytes(b"not frozen any more")
    guest.run("umount", str(MOUNT))


def _digest() -> str:
    found = hashlib.sha256()
    for path in sorted(MOUNT.iterdir()):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def test_handover_looks_at_the_next_kernel(lab: Lab) -> None:
    """A kernel that would take the region is refused; another one finds all unchanged."""
    lab.run(
        hand_over_to_the_right_kernel,
        find_it_unchanged,
        machine=lab.machine(memory=regions.MEMORY_MIB, cmdline=regions.PARAMETERS["devmem"]),
    )
