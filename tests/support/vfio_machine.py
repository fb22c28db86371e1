"""A machine that is made up for VFIO: devices, groups and modules; the calls to it are noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pkernfs.errors import VfioError
from pkernfs.host import pci_config
from pkernfs.quantities import Iova
from pkernfs.vmm import plan, sysfs, vfio

MIB = 1 << 20
#: Two attached devices, and one with nothing to do.
A, B, SPARE = "0000:00:05.0", "0000:00:06.0", "0000:00:07.0"
COMMAND = pci_config.COMMAND_MASTER | pci_config.COMMAND_MEMORY


class VfioMachine:
    """Devices, groups and files of /sys, as VFIO and the plan see them; what is done is noted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.groups = {A: 1, B: 2, SPARE: 3}
        self.drivers: dict[str, str | None] = {}
        self.reserved = "0x00000000fee00000 0x00000000feefffff msi\n"
        self.commands = {A: COMMAND, B: COMMAND, SPARE: 0}
        self.done: list[str] = []
        self.fails = ""
        self.region = root / "region"
        self.region.write_bytes(bytes(8 * MIB))
        for bdf in self.groups:
            self.device(bdf).mkdir(parents=True)
        for module, parameter in (
            ("vfio_pci", "disable_idle_d3"),
            ("vfio_iommu_type1", "allow_unsafe_interrupts"),
        ):
            self.parameter(module, parameter).parent.mkdir(parents=True)
            self.parameter(module, parameter).write_text("Y\n")

    @classmethod
    def instead_of_this_one(cls, root: Path, monkeypatch: pytest.MonkeyPatch) -> VfioMachine:
        """A machine in ``root`` that pkernfs.vmm sees in place of this one."""
        made = Space.machine = cls(root)
        monkeypatch.setattr(sysfs, "device_path", made.device)
        monkeypatch.setattr(sysfs, "driver_of", made.drivers.get)
        monkeypatch.setattr(sysfs, "group_of", made.groups.__getitem__)
        monkeypatch.setattr(sysfs, "group_members", made.members)
        monkeypatch.setattr(sysfs, "reserved_ranges", made.reserved_ranges)
        monkeypatch.setattr(sysfs, "bind", lambda bdf: made.do(f"{bdf} bind"))
        monkeypatch.setattr(vfio, "has_iommufd", lambda bdf: False)
        monkeypatch.setattr(sysfs, "read_config", made.read_config)
        monkeypatch.setattr(sysfs, "write_config", made.write_config)
        monkeypatch.setattr(vfio, "Container", Space)
        monkeypatch.setattr(plan, "_MODULES", root / "module")
        return made

    def device(self, bdf: str) -> Path:
        return self.root / "devices" / bdf

    def parameter(self, module: str, name: str) -> Path:
        return self.root / "module" / module / "parameters" / name

    def do(self, what: str) -> None:
        if what == self.fails:
            raise VfioError(f"{what}: no")
        self.done.append(what)

    def read_config(self, bdf: str, at: int) -> int:
        return self.commands[bdf] if at == pci_config.COMMAND else 0

    def write_config(self, bdf: str, at: int, word: int) -> None:
        assert at == pci_config.COMMAND
        self.commands[bdf] = word
        self.do(f"{bdf} {'on' if word & pci_config.COMMAND_MASTER else 'off'}")

    def reserved_ranges(self, group: int) -> list[sysfs.ReservedRange]:
        return sysfs.parse_reserved(self.reserved)

    def members(self, group: int) -> list[str]:
        return [bdf for bdf, number in self.groups.items() if number == group]


class Space:
    """An address space that only notes."""

    machine: VfioMachine

    def __init__(self) -> None:
        self.ready = False
        self.fds = {"container": 3}

    def prepare(self, bdf: str) -> None:
        self.machine.do(f"{bdf} prepare")

    def add(self, bdf: str) -> None:
        self.machine.do(f"{bdf} add")
        self.ready = True

    def map(self, iova: Iova, vaddr: int, length: int, perm: int) -> None:
        self.machine.do(f"map {iova:#x} {length:#x} {perm}")

    def open(self, bdf: str) -> Any:
        self.machine.do(f"{bdf} open")
        return Opened(self.machine, bdf)

    def close(self) -> None:
        self.machine.do("close")


class Opened:
    """A device that is open."""

    fd = 4

    def __init__(self, machine: VfioMachine, bdf: str) -> None:
        self._machine = machine
        self.bdf = bdf

    def set_master(self, on: bool) -> None:
        self._machine.do(f"{self.bdf} {'on' if on else 'off'}")

    def close(self) -> None:
        self._machine.do(f"{self.bdf} close")


# ---------------------------------------------------------------------- exports


def mapping(iova: int, *pieces: tuple[int, int], **more: Any) -> dict[str, Any]:
    """The mapping of a file that is in these pieces, ``(region offset, length)``."""
    return {
        "iova": iova,
        "length": sum(length for _at, length in pieces),
        "readable": True,
        "writeable": iova != 0x5000,
        "file": "/guest-ram",
        "offset": 0,
        "pieces": [{"region_offset": at, "length": n, "physical": at} for at, n in pieces],
        **more,
    }


def export_of(machine: VfioMachine, **attached: list[dict[str, Any]]) -> dict[str, Any]:
    """An export with both devices in a domain each, dom_0 and dom_1, that map what is said."""
    mappings = {name.replace("_", "-"): found for name, found in attached.items()}
    return {
        "version": 1,
        "region": {
            "name": "region",
            "mmap": {"path": str(machine.region), "offset": 0, "length": 8 * MIB},
        },
        "ioas": [{"id": name, "mappings": found} for name, found in mappings.items()],
        "devices": [
            {"device": bdf, "hwpt": name, "pasid": None, "adopted_by": "dmar0"}
            for bdf, name in zip((A, B), mappings, strict=False)
        ],
    }


def two_domains(machine: VfioMachine) -> dict[str, Any]:
    """An export with three pieces for A and one for B."""
    first = [mapping(0x1000, (MIB, 0x2000), (5 * MIB, 0x1000)), mapping(0x5000, (0, 0x1000))]
    return export_of(machine, dom_0=first, dom_1=[mapping(0, (0, MIB))])
