"""A running guest goes on after a real kexec: its memory is in the region, its state in a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from guestlab import counter
from kexeclab.guest import Guest
from kexeclab.runner import Lab
from support.lab import regions
from support.lab.commands import PROJECT
from support.lab.regions import MOUNT
from support.waiting import until

pytestmark = pytest.mark.lab

VM = MOUNT / "vm"
SCRIPT = str(PROJECT / "scripts/live-update")
#: In the order in which they happen; all of them together are the guest's blackout.
PARTS = ("save", "handover", "kexec to init", "mount", "restore")


def live_update(guest: Guest, command: str) -> None:
    for line in guest.run(SCRIPT, command, str(VM)).splitlines():
        guest.log(f"  {line}")


def numbers() -> list[int]:
    return counter.numbers((VM / "serial.log").read_text())


def wait_for(count: int) -> None:
    """Wait until the guest has written so many numbers."""
    until(f"{count} numbers", lambda: len(numbers()) >= count, every=0.1)


def save_and_leave(guest: Guest) -> None:
    """A guest runs in the region; it is saved, the file system handed over, the kernel replaced."""
    regions.mkfs(guest)
    VM.mkdir()
    live_update(guest, "start")
    wait_for(100)
    guest.load()
    with guest.step("save"):
        live_update(guest, "save")
    guest.note("numbers", len(numbers()))
    with guest.step("handover"):
        guest.run("pkernfs", "handover", str(MOUNT))
    guest.execute()


def go_on(guest: Guest) -> None:
    """The guest goes on: every number is there, once, and it was never reset."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    started = ticks / os.sysconf("SC_CLK_TCK")
    guest.figure("from init to the test", time.clock_gettime(time.CLOCK_BOOTTIME) - started, "s")
    with guest.step("mount"):
        regions.mount(guest)
    info = json.loads(guest.run("pkernfs", "info", "--json", str(MOUNT)))
    assert info["arrival"] == "live update"
    assert info["history"][0]["result"] == "metadata unchanged"
    with guest.step("restore"):
        live_update(guest, "restore")
    wait_for(guest.notes["numbers"] + 100)
    live_update(guest, "save")
    found = numbers()
    assert found == list(range(1, len(found) + 1))
    guest.log(f"{guest.notes['numbers']} numbers before, {len(found)} in the end, none missing")
    regions.unmount_and_check(guest)


@pytest.mark.parametrize("kind", regions.PARAMETERS)
def test_guest_goes_on_after_a_kexec(lab: Lab, kind: str) -> None:
    """A guest counts across a live update; prints the blackout and its parts."""
    machine = lab.machine(memory=regions.MEMORY_MIB, cmdline=regions.PARAMETERS[kind])
    result = lab.run(save_and_leave, go_on, machine=machine, parameters={"kind": kind}, seconds=400)
    seconds = {name: value for name, (value, _) in result.figures.items()}
    seconds["kexec to init"] = result.boots[1] - seconds["from init to the test"]
    split = ", ".join(f"{part} {seconds[part]:.2f}" for part in PARTS)
    print(f"blackout {sum(seconds[part] for part in PARTS):.2f} s: {split}")
    assert all(seconds[part] > 0 for part in PARTS)
