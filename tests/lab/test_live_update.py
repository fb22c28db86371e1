"""A running guest goes on after a real kexec: its memory is in the region, its state in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guestlab import counter
from kexeclab.guest import Guest
from kexeclab.runner import Lab

pytestmark = pytest.mark.lab

RESERVE = ("memmap=256M%1G", "pkernfs=256M!1G")
MOUNT = Path("/mnt/pkernfs")
VM = MOUNT / "vm"
SCRIPT = "/opt/pkernfs/scripts/live-update"
PATIENCE_SECONDS = 60
#: In the order in which they happen; all of them together are the guest's blackout.
PARTS = ("save", "handover", "kexec to init", "mount", "restore")


def mount(guest: Guest) -> None:
    guest.run("mount", "-t", "fuse.pkernfs", "none", str(MOUNT))


def timed(guest: Guest, part: str, action: Callable[[], object]) -> None:
    """Do a part of the update and report how long it took."""
    began = time.monotonic()
    action()
    guest.figure(part, time.monotonic() - began, "s")


def live_update(guest: Guest, command: str) -> None:
    for line in guest.run(SCRIPT, command, str(VM)).splitlines():
        guest.log(f"  {line}")


def numbers() -> list[int]:
    return counter.numbers((VM / "serial.log").read_text())


def wait_for(count: int) -> None:
    """Wait until the guest has written so many numbers."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(numbers()) < count:
        assert time.monotonic() < deadline, f"{len(numbers())} of {count} numbers"
        time.sleep(0.1)


def save_and_leave(guest: Guest) -> None:
    """A guest runs in the region; it is saved, the file system handed over, the kernel replaced."""
    guest.run("mkfs.pkernfs", "none")
    mount(guest)
    VM.mkdir()
    live_update(guest, "start")
    wait_for(100)
    guest.load()
    timed(guest, "save", lambda: live_update(guest, "save"))
    guest.note("numbers", len(numbers()))
    timed(guest, "handover", lambda: guest.run("pkernfs", "handover", str(MOUNT)))
    guest.execute()


def go_on(guest: Guest) -> None:
    """The guest goes on: every number is there, once, and it was never reset."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    started = ticks / os.sysconf("SC_CLK_TCK")
    guest.figure("from init to the test", time.clock_gettime(time.CLOCK_BOOTTIME) - started, "s")
    timed(guest, "mount", lambda: mount(guest))
    timed(guest, "restore", lambda: live_update(guest, "restore"))
    wait_for(guest.notes["numbers"] + 100)
    live_update(guest, "save")
    found = numbers()
    assert found == list(range(1, len(found) + 1))
    guest.log(f"{guest.notes['numbers']} numbers before, {len(found)} in the end, none missing")
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", "none")


def test_guest_goes_on_after_a_kexec(lab: Lab) -> None:
    """A guest counts across a live update; prints the blackout and its parts."""
    machine = lab.machine(memory=1536, cmdline=RESERVE)
    result = lab.run(save_and_leave, go_on, machine=machine)
    seconds = {name: value for name, (value, _) in result.figures.items()}
    seconds["kexec to init"] = result.boots[1] - seconds["from init to the test"]
    split = ", ".join(f"{part} {seconds[part]:.2f}" for part in PARTS)
    print(f"blackout {sum(seconds[part] for part in PARTS):.2f} s: {split}")
    assert all(seconds[part] > 0 for part in PARTS)
