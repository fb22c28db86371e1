"""A VMM's whole way: a device under VFIO, its snapshot, the jump, and VFIO in the next kernel.

Both kernels drive the unit. A network card that VFIO has goes on filling its ring in a file all the
time: by the first kernel's tables, by the region's, by the next kernel's copy, by its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab
from pkernfs.host.pci_config import COMMAND
from pkernfs.vmm import sysfs, vfio
from pkernfs.vmm.export import read_export
from pkernfs.vmm.plan import plan
from pkernfs.vmm.takeover import TakeOver, release
from support.lab import regions
from support.lab.commands import ask, extents, pkernfs
from support.lab.dma import (
    ADOPTED,
    AT,
    CARD,
    FAULT,
    RAM,
    RATE,
    RING,
    WIRE,
    all_packets,
    kexec_words,
    shown,
    tell_packets,
)
from support.lab.nic import Mapped, Nic
from support.lab.regions import MOUNT
from support.waiting import until

pytestmark = pytest.mark.lab

MIB = 1 << 20
RAM_BYTES = 8 * MIB
DOMAIN = str(regions.domain(0))


def mapped_ram() -> mmap.mmap:
    """guest-ram, in the region itself: VFIO cannot pin the page cache of a mount."""
    [extent] = extents(RAM)
    fd = os.open("/dev/mem", os.O_RDWR)
    try:
        return mmap.mmap(fd, RAM_BYTES, offset=extent["physical"])
    finally:
        os.close(fd)


def under_vfio(guest: Guest) -> list[Any]:
    """The card as a VMM has it, with guest-ram; what is to be kept for that."""
    guest.run("modprobe", "vfio_pci")
    sysfs.bind(CARD)
    container = vfio.Container()
    container.add(CARD)
    ram = mapped_ram()
    address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    container.map(AT[CARD], address, RAM_BYTES, vfio.READ | vfio.WRITE)
    device = container.open(CARD)
    device.set_master(True)
    Nic(Mapped(device.map_bar(0))).receive(RING, AT[CARD])
    return [container, ram, device]


def packets_arrive() -> None:
    """More of them than now."""
    before = RING.received()
    until("packets arrive", lambda: RING.received() > before + 5)


def leave(guest: Guest) -> None:
    """The card at work under VFIO; a snapshot; the switch of the unit, and the jump."""
    regions.mkfs(guest)
    regions.make_domain(0)
    regions.make_file(RAM, RAM_BYTES)
    kept = under_vfio(guest)
    guest.feed(WIRE, RATE, limit=RING.room)
    packets_arrive()
    words = kexec_words(guest, guest.parameters["next"], "earlyprintk=ttyS0")
    status, said = ask(*words, "--dry-run")
    assert (status, "-s -l" in said) == (0, True), said  # nothing is attached: an orderly one
    pkernfs("iommu", "snapshot", CARD, DOMAIN)
    pkernfs("iommu", "check", str(MOUNT))
    status, said = ask(*words, "--dry-run")
    assert (status, "-s -p" in said) == (0, True), said
    guest.note("shown", shown())
    guest.note("command", sysfs.read_config(CARD, COMMAND))
    guest.leaving("pkernfs kexec")
    status, said = ask(*words)
    raise AssertionError(f"pkernfs kexec: came back with {status}: {said}, {kept}")


def go_on(guest: Guest) -> None:
    """The tables were adopted; VFIO takes the card over, and no packet is missing."""
    kernel_log = guest.run("dmesg")
    assert ADOPTED in kernel_log
    assert sysfs.read_config(CARD, COMMAND) == guest.notes["command"]
    regions.mount(guest)
    assert shown() == guest.notes["shown"]
    packets_arrive()
    export = read_export(str(MOUNT))
    [wanted] = plan(export)
    with TakeOver(export) as taking:
        taken = taking.take(wanted)
        guest.figure("hold of 8 MiB", taken.hold_ms[CARD], "ms")
        release(str(MOUNT), CARD)
        pkernfs("iommu", "unmap", DOMAIN, hex(AT[CARD]), str(RAM_BYTES))
        packets_arrive()
        all_packets(guest, guest.fed(WIRE, stop=True))
        assert not FAULT.findall(guest.run("dmesg"))
    pkernfs("iommu", "check", str(MOUNT))
    regions.unmount_and_check(guest)


def test_under_vfio_and_back(lab: Lab) -> None:
    """A card under VFIO: snapshot, switch, jump, take-over; no fault, and no packet is lost."""
    made = lab.machine(
        kernel="6.12",
        kernels=["7"],
        cmdline=[
            *regions.PARAMETERS["devmem"], "intel_iommu=on", "iomem=relaxed", "crashkernel=256M",
        ],
        devices=[
            "-device", "intel-iommu,aw-bits=48,intremap=on",
            "-device", f"e1000e,addr={CARD[8:]},netdev={WIRE}",
        ],
        feeds=[WIRE],
        memory=regions.MEMORY_MIB,
    )  # fmt: skip
    result = lab.run(leave, go_on, machine=made, parameters={"next": "7"})
    tell_packets(result)
    assert not FAULT.findall("\n".join(result.console))
