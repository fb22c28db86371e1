"""The machine of tests of DMA through a change of kernels: its domains, its devices.

Two edu devices and a network card, each in a domain of its own, and all of them in one file. The
first kernel leaves the IOMMU alone (``intel_iommu=off``); the unit walks the region's tables.
"""

from __future__ import annotations

import json
import re
from typing import Any

from kexeclab.guest import KERNELS, Guest
from kexeclab.runner import Lab, Result
from pkernfs.host.pci_config import COMMAND
from pkernfs.quantities import Iova
from pkernfs.vmm import sysfs
from support.lab import regions
from support.lab.commands import pkernfs
from support.lab.edu import SCRATCH, Edu
from support.lab.nic import Nic, Ring, registers_of
from support.lab.pci import enable
from support.lab.regions import MOUNT
from support.lab.words import read_word, write_word
from support.waiting import until

MIB = 1 << 20
# In slots that the machine's own disks do not take. OTHER is not persistent.
EDU, CARD, OTHER = "0000:00:10.0", "0000:00:11.0", "0000:00:12.0"
DOMAINS = {EDU: 0, CARD: 1, OTHER: 2}
# Where each domain has guest-ram.
AT = {EDU: Iova(1 << 30), CARD: Iova(3 << 30), OTHER: Iova(5 << 30)}
RAM = MOUNT / "guest-ram"
SCRATCHES = {EDU: MOUNT / "scratch", OTHER: MOUNT / "scratch-other"}
WIRE = "wire"
RING = Ring(RAM, 0, 16384)
WORDS = 6 * MIB  # in guest-ram, behind the ring and its buffers
ADOPTED = "Copied translation tables from previous kernel for dmar0"
FAULT = re.compile(r"DMAR: \[DMA (?:Read|Write).*device \[(?:0000:)?([0-9a-f:.]+)\]")
RATE = 50  # so that there is room for minutes, on a machine that is busy


def pci_commands() -> dict[str, int]:
    """Each device's command register; bit 2 is bus mastering."""
    return {bdf: sysfs.read_config(bdf, COMMAND) for bdf in DOMAINS}


def shown() -> dict[str, Any]:
    """The devices that ``show`` has, by their names."""
    devices = json.loads(pkernfs("iommu", "show", str(MOUNT), "--json"))["devices"]
    return {device["device"]: device for device in devices}


def faults() -> list[dict[str, Any]]:
    """Ask for the unit's faults since the last time; not of a unit that the kernel has."""
    [unit] = json.loads(pkernfs("iommu", "units", "--json", "--clear"))["units"]
    found = unit["faults"]
    assert isinstance(found, list)
    return found


def make_domains(guest: Guest) -> None:
    """guest-ram, and for each device a domain that maps it at an address of its own."""
    pkernfs("iommu", "create", str(MOUNT), "--mode", guest.parameters.get("mode", "legacy"))
    regions.make_file(RAM, 8 * MIB)
    for scratch in SCRATCHES.values():
        regions.make_file(scratch, 4096)
    for bdf, number in DOMAINS.items():
        domain = str(regions.make_domain(number))
        pkernfs("iommu", "map", domain, hex(AT[bdf]), str(RAM))
        if bdf in SCRATCHES:
            pkernfs("iommu", "map", domain, hex(SCRATCH), str(SCRATCHES[bdf]))
        pkernfs("iommu", "attach", domain, bdf)
    pkernfs("iommu", "persist", OTHER, "off")


def put_to_work(guest: Guest) -> tuple[Edu, Edu]:
    """Tables in force, and all three devices at work; the edu devices."""
    make_domains(guest)
    pkernfs("iommu", "activate", str(MOUNT), "--cut-off")
    edus = Edu(EDU, SCRATCHES[EDU]), Edu(OTHER, SCRATCHES[OTHER])
    for edu, bdf in zip(edus, SCRATCHES, strict=True):
        reads_and_writes(edu, bdf, WORDS, 0x1234)
    enable(CARD)
    Nic(registers_of(CARD)).receive(RING, AT[CARD])
    return edus


def reads_and_writes(edu: Edu, bdf: str, place: int, word: int) -> None:
    """The device writes guest-ram, and reads what the processor has written there."""
    edu.store(Iova(AT[bdf] + place), word)
    assert read_word(RAM, place) == word
    write_word(RAM, place, word + 1)
    assert edu.load(Iova(AT[bdf] + place)) == word + 1


def all_packets(guest: Guest, sent: int) -> None:
    """The ring holds every packet, in order, though nobody has touched the card."""
    until("the last packets are there", lambda: RING.received() >= sent)
    arrived = list(RING.packets())
    assert [packet.number for packet in arrived] == list(range(sent))
    assert {packet.length for packet in arrived} == {60}
    guest.log(f"all {sent} packets are there, in order")


def kexec_words(guest: Guest, kernel: str, *more: str, remove: tuple[str, ...] = ()) -> list[str]:
    """``pkernfs kexec`` into a kernel of this machine; ``more`` are parameters of its own."""
    place = KERNELS / kernel
    line = guest.command_line(add=more, remove=["intel_iommu", "nr_cpus", *remove])
    files = ["--kernel", str(place / "vmlinuz"), "--initrd", str(place / "initrd")]
    return ["kexec", *files, "--append", " ".join(line)]


def machine(lab: Lab, kernels: list[str], *cmdline: str, unit: str = "intremap=off") -> Any:
    """A machine with the three devices below one unit."""
    devices = ["-device", f"intel-iommu,aw-bits=48,{unit}"]
    for bdf in (EDU, OTHER):
        devices += ["-device", f"edu,addr={bdf[8:]},dma_mask=0xffffffffffffffff"]
    devices += ["-device", f"e1000e,addr={CARD[8:]},netdev={WIRE}"]
    return lab.machine(
        kernel=kernels[0],
        kernels=sorted({*kernels} - {kernels[0]}),
        cmdline=[*regions.PARAMETERS["devmem"], "intel_iommu=off", "iomem=relaxed", *cmdline],
        devices=devices,
        feeds=[WIRE],
        memory=regions.MEMORY_MIB,
    )


def tell_packets(result: Result) -> None:
    """Print how many packets arrived in each part of the switches."""
    for number, switch in enumerate(result.switches, 1):
        parts = {
            "pkernfs kexec": (switch.left, switch.silent),
            "no kernel": (switch.silent, switch.speaks),
            "the new kernel starts": (switch.speaks, switch.up),
        }
        for name, (begin, end) in parts.items():
            count = result.fed_between(WIRE, begin, end)
            print(f"  switch {number}, {name}: {end - begin:.2f} s, {count} packets")
        assert result.fed_between(WIRE, switch.silent, switch.speaks) > 0
