"""A Debian kernel, a region that it leaves alone, and the unit put in force by the command.

QEMU's edu device reads and writes files. The kernel runs with ``intel_iommu=off``, so the unit is
free; interrupts are remapped all the same, by an invalidation queue that is the kernel's.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab
from pkernfs.quantities import Iova
from support.lab import regions
from support.lab.commands import PYTHON, run_iommu
from support.lab.edu import SCRATCH, Edu
from support.lab.regions import MOUNT
from support.lab.words import read_word, write_word

pytestmark = pytest.mark.lab

MIB = 1 << 20
REGION = regions.SPEC
DOMAIN = str(regions.domain(0))
EDU = "0000:00:05.0"
AT = Iova(1 << 30)
#: Map and unmap a file for some seconds; prints how often.
ROUNDS = """
import os, sys, time
from pkernfs.control.client import call
from pkernfs.control.table_protocol import MapFile, Unmap
iova, length = 2 << 30, 2 << 20
ino, start, count = os.stat(sys.argv[1]).st_ino, time.monotonic(), 0
# Long enough to meet the kernel at its queue, and often enough on a machine that is busy.
while (passed := time.monotonic() - start) < 5 or (count < 40 and passed < 60):
    call("/mnt/pkernfs", MapFile(0, iova, ino, 0, length, 3))
    call("/mnt/pkernfs", Unmap(0, iova, length))
    count += 1
print(count)
"""


def unit(guest: Guest) -> dict[str, Any]:
    """What ``units`` says of the only one."""
    [found] = json.loads(run_iommu(guest, "units", "--json"))["units"]
    assert isinstance(found, dict)
    return found


def interrupts(name: str) -> int:
    """Interrupts so far of the lines whose name contains ``name``."""
    lines = [line for line in Path("/proc/interrupts").read_text().splitlines() if name in line]
    return sum(int(word) for line in lines for word in line.split()[1:] if word.isdigit())


def set_up(guest: Guest) -> Path:
    """A mounted region, a domain with a file and a place for what the device hands on."""
    guest.run("mkfs.pkernfs", REGION)
    guest.run("mount", "-t", "fuse.pkernfs", REGION, str(MOUNT))
    ram = regions.make_file(MOUNT / "guest-ram", 8 * MIB)
    regions.make_file(MOUNT / "scratch", 4096)
    regions.make_domain(0)
    run_iommu(guest, "map", DOMAIN, hex(AT), str(ram))
    run_iommu(guest, "map", DOMAIN, hex(SCRATCH), str(MOUNT / "scratch"))
    run_iommu(guest, "attach", DOMAIN, EDU)
    return ram


def no_more(guest: Guest, edu: Edu, iova: Iova, word: int) -> None:
    """The device cannot reach that address, where ``word`` is, and the unit has a fault of it."""
    run_iommu(guest, "units", "--clear")
    assert edu.load(iova) != word
    [fault] = unit(guest)["faults"]
    assert (fault["source_id"], fault["iova"], fault["write"]) == (EDU, iova, False)


def work(guest: Guest) -> None:
    """Put in force, DMA, changes that are obeyed, a daemon that dies, out of force."""
    remapping = guest.parameters["remapping"]
    ram = set_up(guest)
    before = unit(guest)
    assert before["state"] == "off"
    assert before["interrupt_remapping"] is before["queue"] is remapping
    if remapping:
        assert interrupts("IR-PCI-MSI") > 0
    # The machine's own disks are below the unit too (but QEMU lets virtio pass it by).
    said = run_iommu(guest, "activate", str(MOUNT), status=1)
    assert re.search(r"dmar0: the kernel has devices at work there .* \(virtio-pci\)", said)
    assert unit(guest)["state"] == "off"
    assert run_iommu(guest, "activate", str(MOUNT), "--cut-off") == "dmar0: in force\n"
    after = unit(guest)
    assert (after["state"], after["mount"]) == ("ours", str(MOUNT))
    assert after["interrupt_remapping"] is after["queue"] is remapping

    edu = Edu(EDU, MOUNT / "scratch")
    write_word(ram, 5 * MIB, 0x1234)
    assert edu.load(Iova(AT + 5 * MIB)) == 0x1234
    edu.store(Iova(AT + 5 * MIB + 8), 0x5678)
    assert read_word(ram, 5 * MIB + 8) == 0x5678
    run_iommu(guest, "unmap", DOMAIN, hex(AT + 5 * MIB), "4K")  # of a superpage that is cached
    no_more(guest, edu, Iova(AT + 5 * MIB), 0x1234)
    write_word(ram, 6 * MIB, 0x9ABC)
    assert edu.load(Iova(AT + 6 * MIB)) == 0x9ABC
    with pytest.raises(OSError, match="busy"):
        ram.unlink()
    interrupts_still_arrive(guest)

    [daemon] = guest.run("pgrep", "-x", "pkernfs").split()
    os.kill(int(daemon), signal.SIGKILL)
    guest.run("mount", "-t", "fuse.pkernfs", REGION, str(MOUNT))
    assert unit(guest)["mount"] == str(MOUNT)
    assert edu.load(Iova(AT + 6 * MIB)) == 0x9ABC
    run_iommu(guest, "unmap", DOMAIN, hex(AT), "8M")
    no_more(guest, edu, Iova(AT + 6 * MIB), 0x9ABC)
    ram.unlink()
    other = regions.make_file(MOUNT / "other", 2 * MIB)
    write_word(other, 0, 0xDEF0)
    run_iommu(guest, "map", DOMAIN, hex(AT), str(other))
    assert edu.load(AT) == 0xDEF0

    assert "a bus master" in run_iommu(guest, "deactivate", str(MOUNT), status=1)
    edu.master(False)
    assert run_iommu(guest, "deactivate", str(MOUNT)) == "dmar0: off\n"
    assert unit(guest)["state"] == "off"
    assert unit(guest)["interrupt_remapping"] is remapping
    interrupts_still_arrive(guest)
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", REGION)


def interrupts_still_arrive(guest: Guest) -> None:
    """A disk's, while its interrupts move between processors and the daemon tells the unit.

    Each move has the kernel use its queue, and it waits until the unit has done what is in it.
    """
    spare = str(regions.make_file(MOUNT / "spare", 2 * MIB))
    before = interrupts("virtio")
    stop = threading.Event()
    moved = 0

    def move() -> None:
        nonlocal moved
        while not stop.is_set():
            for line in Path("/proc/irq").glob("[0-9]*/smp_affinity"):
                try:
                    line.write_text(f"{1 + moved % 2:x}")
                except OSError:
                    continue  # the kernel's own to place
                moved += 1

    def read_disk() -> None:
        disk = next(p for p in Path("/dev").glob("vd?"))
        descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, 65536)
        while not stop.is_set():
            os.preadv(descriptor, [buffer], 0)
        os.close(descriptor)

    threads = [threading.Thread(target=job) for job in (move, read_disk)]
    for thread in threads:
        thread.start()
    try:
        rounds = int(guest.run(PYTHON, "-c", ROUNDS, spare))
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert rounds > 20
    assert moved > 20
    assert interrupts("virtio") > before + 20
    guest.log(f"{rounds} rounds of map and unmap, {moved} moves of interrupts")
    os.unlink(spare)


def refused(guest: Guest) -> None:
    """The reason, and the machine goes on."""
    set_up(guest)
    state, reason = guest.parameters["state"], guest.parameters["reason"]
    assert unit(guest)["state"] == state
    said = run_iommu(guest, "activate", str(MOUNT), "--cut-off", status=1)
    assert reason in said
    assert said.count("\n") == 1
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", REGION)


def machine(lab: Lab, cmdline: list[str], *, unit: str, **more: Any) -> Any:
    """A machine with an IOMMU and the edu device; no unit if ``unit`` is empty."""
    devices = ["-device", "edu,addr=05.0,dma_mask=0xffffffffffffffff"]
    if unit:
        devices[:0] = ["-device", f"intel-iommu,aw-bits=48,{unit}"]
    return lab.machine(
        cmdline=[regions.MEMMAP, *cmdline], devices=devices, memory=2048, cpus=2, **more
    )


@pytest.mark.parametrize(
    ("kernel", "unit"),
    [
        ("6.12", "intremap=off"),
        ("6.12", "intremap=on,x-scalable-mode=on"),  # a queue with wide descriptors
        ("7", "intremap=on"),
    ],
)
def test_in_force(lab: Lab, kernel: str, unit: str) -> None:
    """activate: devices work in files, changes are obeyed, interrupts arrive; deactivate."""
    made = machine(lab, ["intel_iommu=off", "iomem=relaxed"], unit=unit, kernel=kernel)
    lab.run(work, machine=made, parameters={"remapping": "intremap=on" in unit})


@pytest.mark.parametrize(
    ("cmdline", "unit", "state", "reason"),
    [
        ("intel_iommu=on iomem=relaxed", "intremap=on", "driver", "boot with intel_iommu=off"),
        ("intel_iommu=off", "intremap=on", "unknown", "boot with iomem=relaxed"),
    ],
)
def test_refused(lab: Lab, cmdline: str, unit: str, state: str, reason: str) -> None:
    """activate: a unit of the kernel's driver, or registers that cannot be reached."""
    made = machine(lab, cmdline.split(), unit=unit)
    lab.run(refused, machine=made, parameters={"state": state, "reason": reason})
