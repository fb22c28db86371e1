"""A device under VFIO: its live domain becomes one of the region, and the unit is switched to it.

A Debian kernel drives the unit (``intel_iommu=on``). QEMU's edu device is bound to vfio-pci, and a
container maps the memory of a pkernfs file for it, as a VMM does.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
from typing import Any

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab
from pkernfs.quantities import Iova
from pkernfs.vmm import sysfs, vfio
from support.lab import regions
from support.lab.commands import PYTHON, extents, run_iommu
from support.lab.edu import Transfers
from support.lab.faults import no_faults
from support.lab.regions import MOUNT
from support.lab.words import read_word, write_word

pytestmark = pytest.mark.lab

MIB = 1 << 20
DEVICE = "0000:00:05.0"
DOMAIN = str(regions.domain(0))
RAM = MOUNT / "guest-ram"
RAM_BYTES = 64 * MIB
HALF = RAM_BYTES // 2
AT = Iova(1 << 30)  # where the container has guest-ram
ELSEWHERE = Iova(8 << 30)
#: Asks the daemon for what `pkernfs kexec` asks for as its last step.
ASK = """
import sys
from pkernfs.control.client import call
from pkernfs.control import protocol, table_protocol
from pkernfs.errors import PkernfsError
known = {request.op: request for request in protocol.REQUESTS + table_protocol.REQUESTS}
try:
    reply = call("/mnt/pkernfs", known[sys.argv[1]]())
    print(list(reply.names) if isinstance(reply, table_protocol.UnitNames) else None)
except PkernfsError as e:
    sys.exit(f"{e}")
"""


class Edu(Transfers):
    """The device, whose domain maps guest-ram at AT."""

    SECONDS = 30.0

    def copies(self, offset: int) -> bool:
        """Whether the device copies a word of guest-ram to the one behind it."""
        value = time.monotonic_ns()
        write_word(RAM, offset, value)
        self.copy(AT + offset, AT + offset + 8)
        return read_word(RAM, offset + 8) == value


class Vmm:
    """A container that maps pieces of guest-ram, in the region's own memory, and the device."""

    def __init__(self) -> None:
        [extent] = extents(RAM)
        self._physical = extent["physical"]
        self._memory: list[mmap.mmap] = []
        self.container = vfio.Container()
        self.container.add(DEVICE)

    def map_ram(self, offset: int, length: int) -> None:
        """Map a piece of guest-ram where it belongs."""
        fd = os.open("/dev/mem", os.O_RDWR)
        self._memory.append(mmap.mmap(fd, length, offset=self._physical + offset))
        os.close(fd)
        self._map(Iova(AT + offset), length)

    def map_other(self, iova: Iova, length: int) -> None:
        """Map memory that is not in the region."""
        self._memory.append(mmap.mmap(-1, length))
        self._map(iova, length)

    def _map(self, iova: Iova, length: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory[-1]))
        self.container.map(iova, address, length, vfio.READ | vfio.WRITE)


def ask(guest: Guest, op: str, status: int = 0) -> str:
    """What the daemon answers."""
    return guest.run(PYTHON, "-c", ASK, op, status=status).strip()


def refused(guest: Guest, reason: str) -> None:
    """A snapshot is refused in one line, and the tables are as they were."""
    before = run_iommu(guest, "show", str(MOUNT))
    said = run_iommu(guest, "snapshot", DEVICE, DOMAIN, status=1)
    assert reason in said, said
    assert said.count("\n") == 1
    assert run_iommu(guest, "show", str(MOUNT)) == before


def agrees(guest: Guest, length: int) -> None:
    """show, translate and check say that dom-0 is what the container maps."""
    told = json.loads(run_iommu(guest, "show", str(MOUNT), "--json"))
    [domain], [device] = told["domains"], told["devices"]
    assert (device["device"], device["table"]) == (DEVICE, domain["table"])
    assert device["domain_id"] >= 2
    [mapping] = domain["mappings"]
    assert (mapping["iova"], mapping["length"], mapping["perm"]) == (AT, length, "rw")
    said = run_iommu(guest, "translate", str(MOUNT), DEVICE, hex(AT + length - 8), "--access", "rw")
    assert f"/guest-ram + {length - 8:#x}" in said, said
    run_iommu(guest, "check", str(MOUNT))


def snapshots(guest: Guest) -> None:
    """A device under VFIO, snapshots of what it reaches, and the switch."""
    regions.mkfs(guest)
    regions.make_file(RAM, RAM_BYTES)
    regions.make_domain(0)
    guest.run("fallocate", "-l", str(RAM_BYTES), str(RAM))
    run_iommu(guest, "snapshot", "0000:00:1e.0", DOMAIN, status=1)
    guest.run("modprobe", "vfio_iommu_type1", "allow_unsafe_interrupts=1")
    guest.run("modprobe", "vfio_pci")
    sysfs.bind(DEVICE)
    vmm = Vmm()
    vmm.map_ram(0, HALF)
    device = vmm.container.open(DEVICE)
    device.set_master(True)
    edu = Edu(device.map_bar(0))
    assert edu.copies(MIB)

    run_iommu(guest, "snapshot", DEVICE, DOMAIN)
    agrees(guest, HALF)
    ask(guest, "iommu.check_kernel_tables")

    vmm.map_ram(HALF, HALF)
    said = ask(guest, "iommu.switch", status=1)
    assert f"its live domain maps iova {AT + HALF:#x}" in said, said
    assert f"pkernfs iommu snapshot {DEVICE}" in said
    run_iommu(guest, "snapshot", DEVICE, DOMAIN)
    agrees(guest, RAM_BYTES)

    vmm.map_other(ELSEWHERE, 4 * MIB)
    refused(guest, f"{DEVICE}: iova {ELSEWHERE:#x} leads to memory at 0x")
    assert "again" in ask(guest, "iommu.check_kernel_tables", status=1)
    vmm.container.unmap(ELSEWHERE, 4 * MIB)
    assert ask(guest, "iommu.check_kernel_tables") == "None"

    vmm.container.unmap(Iova(AT + HALF), HALF)
    assert "dom-0 maps iova" in ask(guest, "iommu.check_kernel_tables", status=1)
    vmm.map_ram(HALF, HALF)
    run_iommu(guest, "snapshot", DEVICE, DOMAIN)
    assert edu.copies(RAM_BYTES - 16)
    switch(guest, edu)


def switch(guest: Guest, edu: Edu) -> None:
    """The unit walks the region's tables; the device has not noticed."""
    [before] = json.loads(run_iommu(guest, "units", "--json"))["units"]
    with guest.step("switch"):
        assert ask(guest, "iommu.switch") == "['dmar0']"
    [after] = json.loads(run_iommu(guest, "units", "--json"))["units"]
    assert (before["mount"], after["mount"]) == (None, str(MOUNT))
    for same in ("state", "mode", "queue", "interrupt_remapping"):
        assert before[same] == after[same]
    for offset in (0, MIB, HALF - 16, RAM_BYTES - 16):
        assert edu.copies(offset)
    assert "faults" in no_faults(guest)
    assert ask(guest, "iommu.switch") == "[]"
    guest.log(run_iommu(guest, "show", str(MOUNT), "--merge"))


def no_registers(guest: Guest) -> None:
    """Without iomem=relaxed the registers are not to be had, and the message says so."""
    regions.mkfs(guest)
    regions.make_domain(0)
    refused(guest, "boot with iomem=relaxed")


def passed_through(guest: Guest) -> None:
    """An identity domain reaches all memory."""
    regions.mkfs(guest)
    regions.make_domain(0)
    refused(guest, f"{DEVICE}: its requests pass through untranslated")


def machine(lab: Lab, cmdline: list[str], *, kernel: str, unit: str) -> Any:
    """A machine with a unit that its kernel drives, and the device."""
    devices = ["-device", f"intel-iommu,aw-bits=48,{unit}"]
    devices += ["-device", "edu,addr=05.0,dma_mask=0xffffffffffffffff"]
    return lab.machine(
        kernel=kernel,
        cmdline=[*regions.PARAMETERS["devmem"], "intel_iommu=on", *cmdline],
        devices=devices,
        memory=regions.MEMORY_MIB,
    )


@pytest.mark.parametrize(
    ("kernel", "unit"),
    [
        ("6.12", "intremap=on"),
        ("7", "intremap=off"),
        ("7", "intremap=on,x-scalable-mode=on"),
    ],
)
def test_snapshot_and_switch(lab: Lab, kernel: str, unit: str) -> None:
    """snapshot: what VFIO has mapped is in the region; the unit is switched under the device."""
    made = machine(lab, ["iomem=relaxed"], kernel=kernel, unit=unit)
    lab.run(snapshots, machine=made, seconds=600)


def test_no_registers(lab: Lab) -> None:
    """snapshot: refused where the unit's registers cannot be reached."""
    lab.run(no_registers, machine=machine(lab, [], kernel="6.12", unit="intremap=on"))


def test_passed_through(lab: Lab) -> None:
    """snapshot: refused for a device whose requests are not translated (iommu=pt)."""
    made = machine(lab, ["iomem=relaxed", "iommu=pt"], kernel="6.12", unit="intremap=on")
    lab.run(passed_through, machine=made)
