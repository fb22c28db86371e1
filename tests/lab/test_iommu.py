"""A Debian kernel, a pkernfs in memory that the kernel leaves alone, and devices that work in it.

The tables are made by the commands, in the machine, and put in force by a small driver through
/dev/mem: the kernel runs with ``intel_iommu=off``. QEMU's edu devices then read and write files.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from guestlab.machine import accelerators
from kexeclab.guest import Guest
from kexeclab.runner import Lab
from pkernfs.control.client import call
from pkernfs.control.table_protocol import MapFile, Unmap
from pkernfs.iommu import FaultReason
from pkernfs.layout import PAGE
from pkernfs.quantities import Ino, Iova, SourceId
from pkernfs.vmm import sysfs
from support.lab import regions
from support.lab.commands import ask, extents, iommu
from support.lab.pci import enable
from support.lab.regions import MOUNT
from support.lab.words import read_word, write_word
from support.unit_drivers import BUFFER, Edu, Fault, Unit, reasons_in_qemu

pytestmark = pytest.mark.lab

MIB = 1 << 20
GIB = 1 << 30
AT = Iova(GIB)  # where a domain maps the file of most tests
REGION = "2560M!4G"  # with 1 GiB that is aligned to as much
DEVICES = {"0000:00:05.0": 0x28, "0000:00:06.0": 0x30}
FIRST, SECOND = DEVICES
SCRATCH = 1 << 38  # where each domain maps a file for what its device hands on
MACHINE: dict[str, Any] = {
    "memory": 7168,
    "cmdline": ["memmap=2560M%4G", "intel_iommu=off", "iomem=relaxed"],
}


class DevMem:
    """Loads and stores at physical addresses, each of the width that is asked for."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/mem", os.O_RDWR | os.O_CLOEXEC)  # without O_SYNC, as the daemon
        self._pages: dict[int, mmap.mmap] = {}

    def say_all(self, commands: Sequence[Sequence[object]]) -> list[int]:
        """As iommu_unit.Bus."""
        answers = []
        for verb, address, *value in commands:
            assert isinstance(verb, str)
            assert isinstance(address, int)
            page = address & -PAGE
            if page not in self._pages:
                self._pages[page] = mmap.mmap(self._fd, PAGE, offset=page)
            kind: Any = ctypes.c_uint64 if verb.endswith("q") else ctypes.c_uint32
            word = kind.from_buffer(self._pages[page], address - page)
            if value:
                word.value = value[0]
            answers.append(0 if value else word.value)
        return answers


class Host:
    """A mounted region with two domains, and the machine's unit and devices."""

    def __init__(self, guest: Guest, mode: str) -> None:
        self.guest = guest
        self.mode = mode
        self.bus = DevMem()
        self.extents: dict[Path, list[dict[str, int]]] = {}
        guest.run("mkfs.pkernfs", REGION)
        guest.run("mount", "-t", "fuse.pkernfs", REGION, str(MOUNT))
        iommu("create", str(MOUNT), "--mode", mode)
        for number, device in enumerate(DEVICES):
            domain = str(regions.make_domain(number))
            self.file(f"scratch-{number}", PAGE)
            iommu("map", domain, hex(SCRATCH), str(MOUNT / f"scratch-{number}"))
            iommu("attach", domain, device)
        self.file("queue", 2 * PAGE)
        self.unit = Unit(self.bus, _unit_address())
        self.edu = {device: Edu(self.bus, _bar(device)) for device in DEVICES}

    def enable(self) -> None:
        """Put root-pgtables in force."""
        scalable = self.mode == "scalable"
        if scalable:
            self.unit.use_queue(self.physical(MOUNT / "queue", 0), wide=True)
        root = MOUNT / "iommu/root-pgtables"
        self._find(root)
        self.unit.enable(self.physical(root, 0), scalable=scalable)

    def domain(self, number: int) -> str:
        """The path of a domain's file."""
        return str(regions.domain(number))

    def file(self, name: str, size: int) -> Path:
        """A file of zeros, which get memory when it is mapped or written."""
        path = MOUNT / name
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        self._find(path)
        return path

    def _find(self, path: Path) -> None:
        self.extents[path] = extents(path)

    def physical(self, path: Path, offset: int) -> int:
        """Where a byte of a file is."""
        for extent in self.extents[path]:
            if extent["offset"] <= offset < extent["offset"] + extent["length"]:
                return extent["physical"] + offset - extent["offset"]
        raise AssertionError(f"{path}: nothing at {offset}")

    # ------------------------------------------------------------------ what devices do

    def load(self, device: str, iova: Iova) -> int | Fault:
        """The word that a device reads, as it hands it on through its scratch file."""
        self.edu[device].start(iova, BUFFER, 1)
        self.edu[device].finish()
        fault = self.unit.fault()
        if fault is not None:
            return fault
        return self.handed_on(device)

    def handed_on(self, device: str) -> int:
        """The word in a device's buffer, by way of its scratch file."""
        self.edu[device].start(BUFFER, SCRATCH, 3)
        self.edu[device].finish()
        assert self.unit.fault() is None
        return read_word(MOUNT / f"scratch-{list(DEVICES).index(device)}", 0)

    def store(self, device: str, iova: Iova, word: int) -> Fault | None:
        """Have a device write a word."""
        write_word(MOUNT / f"scratch-{list(DEVICES).index(device)}", 0, word)
        self.edu[device].start(SCRATCH, BUFFER, 1)
        self.edu[device].finish()
        assert self.unit.fault() is None
        self.edu[device].start(BUFFER, iova, 3)
        self.edu[device].finish()
        return self.unit.fault()

    # ------------------------------------------------------------------ comparisons

    def translate(self, device: str, iova: Iova, access: str) -> tuple[str, int]:
        """The page's size and the physical address; or "fault" and the reason's number."""
        words = (str(MOUNT), device, hex(iova), "--access", access)
        status, said = ask("iommu", "translate", *words)
        pattern = r"^(?:fault (0x\w+) \w+: |physical (0x\w+) \w+, (\d \w+) page)"
        found = re.search(pattern, said, re.M)
        assert found is not None, said
        reason, physical, page = found.groups()
        assert status == (1 if reason else 0)
        return ("fault", int(reason, 16)) if reason else (page, int(physical, 16))

    def agree(self, device: str, iova: Iova, path: Path, offset: int, page: str) -> None:
        """A device reads and writes a file's word there, and translate says how."""
        physical = self.physical(path, offset)
        found = self.translate(device, iova, "rw")
        assert found == (page, physical), (found, page, hex(physical))
        write_word(path, offset, iova | 1)
        assert self.load(device, iova) == iova | 1
        assert self.store(device, iova, iova | 3) is None
        assert read_word(path, offset) == iova | 3
        assert self.bus.say_all([("readq", physical)]) == [iova | 3]

    def faults(self, device: str, iova: Iova, access: str) -> None:
        """A device's request ends in the fault that translate foretells."""
        kind, number = self.translate(device, iova, access)
        assert kind == "fault"
        write = access == "w"
        got = self.store(device, iova, 5) if write else self.load(device, iova)
        assert isinstance(got, Fault)
        assert got.reason in reasons_in_qemu(FaultReason(number), write=write)
        assert got[1:] == (DEVICES[device], iova & -PAGE, write)


def _unit_address() -> int:
    """Where the first remapping unit of the ACPI tables has its registers (8.3)."""
    table = Path("/sys/firmware/acpi/tables/DMAR").read_bytes()
    at = 48
    while int.from_bytes(table[at : at + 2], "little"):
        at += int.from_bytes(table[at + 2 : at + 4], "little")
    return int.from_bytes(table[at + 8 : at + 16], "little")


def _bar(device: str) -> int:
    """Let a device answer and do DMA; the address of its BAR."""
    there = sysfs.device_path(device)
    assert (there / "vendor").read_text().strip() == "0x1234"
    enable(device)
    return int((there / "resource").read_text().split()[0], 16)


@contextlib.contextmanager
def host(guest: Guest) -> Iterator[Host]:
    """The set-up; in the end all is found to be in order."""
    made = Host(guest, guest.parameters["mode"])
    made.enable()
    yield made
    iommu("check", str(MOUNT))
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", REGION)


def devices_work(guest: Guest) -> None:
    """All of it, in one machine."""
    with host(guest) as h:
        _changes_while_devices_work(h)
        _devices_work_in_files(h)


def _changes_while_devices_work(h: Host) -> None:
    """A transfer begins, then the daemon changes the tables and the unit is told, then it ends."""
    old, new = h.file("old", 2 * MIB), h.file("new", 2 * MIB)

    def map_file(path: Path) -> None:
        call(str(MOUNT), MapFile(0, AT, Ino(path.stat().st_ino), 0, 2 * MIB, 3))

    def unmap() -> None:
        call(str(MOUNT), Unmap(0, AT, 2 * MIB))
        h.unit.invalidate_pages(2, GIB, GIB + 2 * MIB)

    def remap(path: Path) -> None:
        unmap()
        map_file(path)

    write_word(old, 0, 0x1111)
    write_word(new, 0, 0x2222)
    map_file(old)
    assert h.load(FIRST, AT) == 0x1111
    fault = _meanwhile(h, unmap, lambda: map_file(old))
    assert isinstance(fault, Fault)
    assert fault[1:] == (0x28, GIB, False)
    assert _meanwhile(h, lambda: map_file(old), unmap) == 0x1111
    assert _meanwhile(h, lambda: remap(new), lambda: remap(old)) == 0x2222
    unmap()


def _meanwhile(h: Host, change: Callable[[], object], again: Callable[[], object]) -> int | Fault:
    """What a device reads while ``change`` is made; ``again`` makes it as it was before.

    The device takes 100 ms: if the change takes longer, another try is needed.
    """
    for _try in range(20):
        h.edu[FIRST].start(GIB, BUFFER, 1)
        change()
        if h.edu[FIRST].busy():
            h.edu[FIRST].finish()
            fault = h.unit.fault()
            if fault is not None:
                return fault
            return h.handed_on(FIRST)
        h.unit.fault()
        h.guest.log("the transfer was over first")
        again()
    raise AssertionError("no change was made within 100 ms")


def _devices_work_in_files(h: Host) -> None:
    """Leaves of every size, split and merged; faults; two domains."""
    small, ram, huge = h.file("small", 3 * PAGE), h.file("ram", 8 * MIB), h.file("huge", GIB)
    domain = h.domain(0)
    iommu("map", domain, "0x10000", str(small))
    iommu("map", domain, "0x40000000", str(ram))
    iommu("map", domain, "0x80000000", str(huge))
    h.agree(FIRST, Iova(0x10000 + 2 * PAGE + 8), small, 2 * PAGE + 8, "4 KiB")
    h.agree(FIRST, Iova(GIB + 5 * MIB), ram, 5 * MIB, "2 MiB")
    h.agree(FIRST, Iova(2 * GIB + 700 * MIB), huge, 700 * MIB, "1 GiB")

    hole = Iova(2 * GIB + 20 * MIB + PAGE)
    iommu("unmap", domain, hex(hole), "4K")
    h.unit.invalidate_pages(2, 2 * GIB, 3 * GIB)
    h.faults(FIRST, hole, "r")
    h.faults(FIRST, Iova(hole + 8), "w")
    h.agree(FIRST, Iova(hole - 8), huge, hole - 2 * GIB - 8, "4 KiB")
    h.agree(FIRST, Iova(2 * GIB + 24 * MIB), huge, 24 * MIB, "2 MiB")
    offset = str(hole - 2 * GIB)
    iommu("map", domain, hex(hole), str(huge), "--offset", offset, "--length", "4K")
    h.unit.invalidate_pages(2, 2 * GIB, 3 * GIB)
    h.agree(FIRST, hole, huge, hole - 2 * GIB, "1 GiB")

    iommu("map", h.domain(1), "0x40000000", str(small), "--perm", "r")
    write_word(small, 0, 0x77)
    assert h.load(SECOND, AT) == 0x77
    h.unit.invalidate_all()  # QEMU reports what it finds in a walk, not in its IOTLB
    h.faults(SECOND, AT, "w")
    assert read_word(small, 0) == 0x77
    h.faults(SECOND, Iova(0x10000), "r")
    h.agree(FIRST, AT, ram, 0, "2 MiB")

    iommu("detach", FIRST)
    h.unit.invalidate_device(SourceId(0x28), 2)
    kind, reason = h.translate(FIRST, AT, "r")
    got = h.load(FIRST, AT)
    assert isinstance(got, Fault)
    assert kind == "fault"
    assert got.reason in reasons_in_qemu(FaultReason(reason), write=False)
    assert h.load(SECOND, AT) == 0x77


def _machine(lab: Lab, mode: str) -> Any:
    unit = "intel-iommu,aw-bits=48,intremap=off"
    unit += ",x-scalable-mode=on" if mode == "scalable" else ""
    devices = ["-device", unit]
    for number in (5, 6):
        devices += ["-device", f"edu,addr={number:02x}.0,dma_mask={(1 << 64) - 1:#x}"]
    if accelerators()[0].startswith("tcg"):
        # Time by instructions, so that a busy host does not make a transfer's 100 ms too short.
        devices += ["-icount", "shift=0,sleep=off"]
    return lab.machine(**MACHINE, devices=devices)


@pytest.mark.parametrize("mode", ["legacy", "scalable"])
def test_devices_work_in_files(lab: Lab, mode: str) -> None:
    """Devices read and write files through tables of the commands, also while these change."""
    lab.run(devices_work, machine=_machine(lab, mode), parameters={"mode": mode}, seconds=300)
