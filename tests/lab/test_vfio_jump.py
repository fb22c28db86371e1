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

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
]  # fmt: skip
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MIB = 1 << 20
RAM_BYTES = 8 * MIB
DOMAIN = str(regions.domain(0))


def mapped_ram(guest: Guest) -> int:
    """guest-ram, in the region or the segment itself: VFIO cannot pin the page cache of a mount."""
    if guest.parameters["kind"] == "dax":
        path, offset = guest.run("pkernfs", "path", str(RAM)).strip(), 0
    else:
        [extent] = extents(RAM)
        path, offset = "/dev/mem", extent["physical"]
    fd = os.open(path, os.O_RDWR)
    try:  # not by the module mmap, which keeps a descriptor
        at = LIBC.mmap(
            None, RAM_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, offset
        )
        assert at != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        return int(at)
    finally:
        os.close(fd)


def under_vfio(guest: Guest) -> list[Any]:
    """The card as a VMM has it, with guest-ram; what is to be kept for that."""
    guest.run("modprobe", "vfio_pci")
    sysfs.bind(CARD)
    container = vfio.Container()
    container.add(CARD)
    address = mapped_ram(guest)
    container.map(AT[CARD], address, RAM_BYTES, vfio.READ | vfio.WRITE)
    device = container.open(CARD)
    device.set_master(True)
    Nic(Mapped(device.map_bar(0))).receive(RING, AT[CARD])
    if guest.parameters["kind"] == "dax":
        only_the_device_has_it(guest, address)
    return [container, device]


def only_the_device_has_it(guest: Guest, address: int) -> None:
    """A segment that no process has open or mapped stays as long as a device under VFIO has it."""
    said = guest.run("truncate", "-s", "2M", str(RAM), status=1)
    assert "busy" in said
    assert LIBC.munmap(address, RAM_BYTES) == 0
    packets = RING.received()
    assert "busy" in guest.run("truncate", "-s", "2M", str(RAM), status=1)
    said = guest.run("pkernfs", "segment", str(RAM), "off", status=1)
    assert f"busy: device {CARD}, under VFIO, reaches it" in said, said
    until("packets arrive", lambda: RING.received() >= packets)


def packets_arrive() -> None:
    """More of them than now."""
    before = RING.received()
    until("packets arrive", lambda: RING.received() > before + 5)


def leave(guest: Guest) -> None:
    """The card at work under VFIO; a snapshot; the switch of the unit, and the jump."""
    regions.mkfs(guest, *(("-s", "64M") if guest.parameters["kind"] == "dax" else ()))
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


@pytest.mark.parametrize("kind", ["devmem", "dax"])
def test_under_vfio_and_back(lab: Lab, kind: str) -> None:
    """A card under VFIO: snapshot, switch, jump, take-over; no fault, and no packet is lost.

    On device-dax the memory is a segment.
    """
    made = lab.machine(
        kernel="6.12",
        kernels=["7"],
        cmdline=[
            *regions.PARAMETERS[kind], "intel_iommu=on", "iomem=relaxed", "crashkernel=256M",
        ],
        devices=[
            "-device", "intel-iommu,aw-bits=48,intremap=on",
            "-device", f"e1000e,addr={CARD[8:]},netdev={WIRE}",
        ],
        feeds=[WIRE],
        memory=regions.MEMORY_MIB,
    )  # fmt: skip
    result = lab.run(leave, go_on, machine=made, parameters={"next": "7", "kind": kind})
    tell_packets(result)
    assert not FAULT.findall("\n".join(result.console))
