"""A kernel's tables beside a region's: what is the same, what differs, and what cannot be told.

The kernel's are in a made-up /proc/kcore, its unit is registers in memory. With QEMU's unit, under
devices at work: test_snapshot.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.dma.comparison import KernelUnits, check_addresses
from pkernfs.dma.table_files import TableFiles
from pkernfs.errors import (
    InvalidError,
    NotFoundError,
    NotSupportedError,
    PkernfsError,
    TableDamageError,
)
from pkernfs.fs.filesystem import FileSystem
from pkernfs.host import sysroot
from pkernfs.host.dmar import BRIDGE, ENDPOINT, Dmar
from pkernfs.host.pci import PciDevice
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff, SourceId
from pkernfs.region.checksum import crc32c
from pkernfs.units.discovery import FoundUnit
from pkernfs.units.mmio import MemoryWindow
from pkernfs.units.unit import Unit
from pkernfs.vtd.registers import STATUS, RootTableAddress
from support.dmar_tables import add_device, config, drhd, rmrr, scope, table
from support.files import remount
from support.made_up_kernel import EDU, NIC, Kernel
from support.page_tables import GIB
from support.table_files import MIB, PHYS_BASE, RW, Host

READ = 1
UNIT = 0xFED9_0000
SECOND_UNIT = SourceId(0x100)  # 01:00.0, below a bridge of its own
TABLE_FILES = (0, 1)


class Beside:
    """A file system with tables and a kernel with its own, on one machine.

    EDU is attached to dom-0 and to the kernel's first domain, under the same id; both map the same
    file at the same address.
    """

    def __init__(self, host: Host, path: Path, mode: Mode, levels: int = 4) -> None:
        self.here = host
        host.region._backing.real_addresses = True
        self.kernel = Kernel(path, mode, levels)
        self.machine = self.kernel.ram.host
        self.root = Path(self.machine.root)
        self.firmware(drhd(UNIT, scope(BRIDGE, 0, (0x1C, 0))), drhd(UNIT + PAGE, flags=1))
        add_device(self.root, "0000:00:05.0", config())
        add_device(self.root, "0000:03:00.0", config())
        add_device(self.root, "0000:00:1c.0", config(kind=6, express=4))
        add_device(self.root, "0000:00:1c.0/0000:01:00.0", config(express=0))
        #: Units by number that the kernel drives, and whose registers can be reached.
        self.driven, self.seen = {1}, {1}
        self.tables.create_root(Config(mode, levels))
        self.file = host.file_of("guest", 8 * MIB)
        self.physical = host.physical(self.file)
        for number, device in zip(TABLE_FILES, (EDU, NIC), strict=True):
            host.dom(number)
            self.map_here(number, Iova(0), 4 * MIB)
            self.kernel.domains[number].map(Iova(0), self.physical, 4 * MIB, RW)
            self.kernel.root.attach(device, self.kernel.domains[number].root, number + 2)
            host.attach(number, device)

    @property
    def fs(self) -> FileSystem:
        return self.here.fs

    @property
    def tables(self) -> TableFiles:
        return self.here.tables

    def firmware(self, *structures: bytes) -> None:
        there = self.root / "sys/firmware/acpi/tables"
        there.mkdir(parents=True, exist_ok=True)
        (there / "DMAR").write_bytes(table(*structures))

    def map_here(self, number: int, iova: Iova, length: int, at: int = 0, perm: int = RW) -> None:
        self.tables.map_file(number, iova, self.file, at, length, perm)

    def map_live(self, iova: Iova, length: int, at: int = 0, perm: int = RW) -> None:
        """In the kernel's first domain."""
        self.kernel.domains[0].map(iova, PhysAddr(self.physical + at), length, perm)

    def find(self, host: sysroot.Host, dmar: Dmar) -> list[FoundUnit]:
        assert host is self.machine
        window = MemoryWindow(self.kernel.window)
        return [
            FoundUnit(
                structure,
                structure.number in self.driven,
                Unit(structure.name, window) if structure.number in self.seen else None,
                "not here",
            )
            for structure in dmar.units
        ]

    def open(self) -> KernelUnits:
        self.kernel.save()
        return KernelUnits(self.fs, self.machine, self.find)

    def check(self) -> None:
        with self.open() as units:
            units.check()

    def device(self, source_id: SourceId = EDU) -> PciDevice:
        with self.open() as units:
            return units.device(source_id)

    def group(self, *names: str) -> None:
        """Put devices into one IOMMU group."""
        group = self.root / "sys/kernel/iommu_groups/7"
        for name in names:
            (group / "devices" / name).mkdir(parents=True)
            (self.root / "sys/bus/pci/devices" / name / "iommu_group").symlink_to(group)

    def differs(self, kind: type[PkernfsError], message: str) -> None:
        """It is told in one line, and nothing is changed by that."""
        before = self.checksums()
        with pytest.raises(kind, match=message) as caught:
            self.check()
        assert "\n" not in str(caught.value)
        assert self.checksums() == before

    def checksums(self) -> list[int]:
        """Of all that is in the two regions."""
        return [crc32c(r.view(RegionOff(0), r.size)) for r in (self.kernel.region, self.fs.region)]


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def both(request: pytest.FixtureRequest, host: Host, tmp_path: Path) -> Iterator[Beside]:
    made = Beside(host, tmp_path, request.param)
    yield made
    made.kernel.close()


@pytest.fixture
def legacy(host: Host, tmp_path: Path) -> Iterator[Beside]:
    made = Beside(host, tmp_path, Mode.LEGACY)
    yield made
    made.kernel.close()


# ---------------------------------------------------------------------- what differs


def test_the_same_in_both(both: Beside) -> None:
    both.check()


@pytest.mark.parametrize("levels", [3, 5])
@pytest.mark.parametrize("mode", list(Mode))
def test_the_same_with_other_levels(host: Host, tmp_path: Path, mode: Mode, levels: int) -> None:
    made = Beside(host, tmp_path, mode, levels)
    made.check()
    made.kernel.close()


def test_it_does_not_matter_how_leaves_are_cut(both: Beside) -> None:
    both.kernel.domains[0].unmap(Iova(0), 4 * MIB)
    for at in range(0, 4 * MIB, MIB):
        both.map_live(Iova(at), MIB, at)
    both.check()


def test_something_more_is_live(both: Beside) -> None:
    both.map_live(Iova(GIB), 2 * MIB, 4 * MIB)
    both.differs(
        InvalidError,
        rf"^device 0000:00:05\.0: its live domain maps iova 0x40000000 \(0x200000 bytes, rw\) to "
        rf"{both.physical + 4 * MIB:#x}, and dom-0 does not: "
        r"pkernfs iommu snapshot 0000:00:05\.0 MNT/iommu/dom-0 again$",
    )
    both.map_here(0, Iova(GIB), 2 * MIB, 4 * MIB)
    both.check()


def test_something_more_is_here(both: Beside) -> None:
    both.map_here(1, Iova(GIB), PAGE, 4 * MIB)
    both.differs(
        InvalidError,
        r"^device 0000:03:00\.0: dom-1 maps iova 0x40000000 \(0x1000 bytes, rw\) to "
        rf"{both.physical + 4 * MIB:#x}, and its live domain does not: "
        r"pkernfs iommu snapshot 0000:03:00\.0 MNT/iommu/dom-1 again$",
    )
    both.kernel.domains[1].map(Iova(GIB), PhysAddr(both.physical + 4 * MIB), PAGE, RW)
    both.check()


def test_another_permission(both: Beside) -> None:
    both.kernel.domains[0].protect(Iova(PAGE), PAGE, READ)
    both.differs(InvalidError, r"0000:00:05\.0: its live domain maps iova 0x1000 \(0x1000 bytes, r")


def test_other_memory(both: Beside) -> None:
    both.kernel.domains[0].unmap(Iova(0), 2 * MIB)
    both.map_live(Iova(0), 2 * MIB, 4 * MIB)
    both.differs(InvalidError, f"its live domain maps iova 0x0 .* to {both.physical + 4 * MIB:#x}")


def test_nothing_is_live(both: Beside) -> None:
    both.kernel.domains[0].unmap(Iova(0), 4 * MIB)
    both.differs(InvalidError, r"dom-0 maps iova 0x0 \(0x400000 bytes, rw\)")
    both.kernel.root.detach(EDU)
    both.differs(NotFoundError, r"device 0000:00:05\.0: no live domain in dmar1: bind it to vfio")


def test_a_domain_id_that_the_kernel_has_given_to_others(both: Beside) -> None:
    """A unit that is told to forget one of the two would forget the other as well."""
    both.kernel.root.detach(NIC)
    both.kernel.root.attach(NIC, both.kernel.domains[1].root, 2)
    both.kernel.root.detach(EDU)
    both.kernel.root.attach(EDU, both.kernel.domains[0].root, 3)
    both.differs(
        InvalidError,
        r"^device 0000:00:05\.0: its entry in the region has domain id 2, which the kernel has "
        r"given to 0000:03:00\.0: pkernfs iommu snapshot 0000:00:05\.0 MNT/iommu/dom-0 again$",
    )


@pytest.mark.parametrize("what", [Config(Mode.LEGACY, 3), Config(Mode.SCALABLE, 4)])
def test_tables_of_another_shape(legacy: Beside, what: Config) -> None:
    tables = legacy.tables
    for number, device in zip(TABLE_FILES, (EDU, NIC), strict=True):
        tables.detach(device)
        tables.unmap(number, Iova(0), 4 * MIB)
    tables.create_root(what)
    tables.attach(0, EDU)
    legacy.differs(
        InvalidError,
        r"0000:00:05\.0: its live tables are of legacy mode with 4 levels, the region's of "
        f"{what.mode.name.lower()} mode with {what.levels} levels: detach all devices",
    )


# ---------------------------------------------------------------------- what is not looked at


def test_a_device_that_does_not_persist(both: Beside) -> None:
    both.tables.persist(EDU, False)
    both.map_live(Iova(GIB), PAGE)
    both.check()
    both.tables.persist(EDU, True)
    both.differs(InvalidError, "its live domain maps iova 0x40000000")


def test_a_unit_that_the_kernel_does_not_drive(both: Beside) -> None:
    both.map_live(Iova(GIB), PAGE)
    both.driven = set()
    both.check()


def test_a_unit_that_walks_the_regions_tables(both: Beside) -> None:
    """It has been switched: the kernel's tables are of no matter any more."""
    both.map_live(Iova(GIB), PAGE)
    register = both.tables.need_root().root | RootTableAddress.TTM.put("TTM", both.kernel.mode)
    both.kernel.window[0x20:0x28] = register.to_bytes(8, "little")
    both.check()
    both.kernel.window[STATUS : STATUS + 4] = bytes(4)
    both.differs(NotFoundError, "dmar1: the kernel's driver has it, and it does not translate")


def test_a_table_that_the_kernel_has_adopted(both: Beside) -> None:
    """It is the same one; only its id may be another's."""
    both.kernel.root.detach(EDU)
    both.kernel.root.attach(EDU, both.tables.domain(0).root, 2)
    both.check()
    both.map_here(0, Iova(GIB), PAGE)
    both.check()
    both.kernel.root.detach(NIC)
    both.kernel.root.attach(NIC, both.kernel.domains[1].root, 2)
    both.differs(InvalidError, r"domain id 2, which the kernel has given to 0000:03:00\.0")


def test_nothing_is_attached(both: Beside) -> None:
    for device in (EDU, NIC):
        both.tables.detach(device)
    both.map_live(Iova(GIB), PAGE)
    both.check()


# ---------------------------------------------------------------------- what cannot be told


def test_a_region_without_addresses_of_its_own(legacy: Beside) -> None:
    check_addresses(legacy.fs.region)
    legacy.fs.region._backing.real_addresses = False
    message = "its addresses are not those of memory that devices can reach: a region is needed"
    with pytest.raises(NotSupportedError, match=message):
        check_addresses(legacy.fs.region)
    legacy.differs(NotSupportedError, message)


def test_a_machine_without_units(legacy: Beside) -> None:
    (legacy.root / "sys/firmware/acpi/tables/DMAR").unlink()
    legacy.differs(NotFoundError, "no DMAR table")
    legacy.firmware(b"nonsense")
    legacy.differs(InvalidError, "DMAR table")


def test_a_unit_whose_registers_cannot_be_reached(legacy: Beside) -> None:
    legacy.seen = set()
    legacy.differs(PkernfsError, "^dmar1: not here$")
    with legacy.open() as units, pytest.raises(PkernfsError, match=r"^dmar1: not here$"):
        units.driven()


def test_a_domain_that_is_damaged_here(legacy: Beside) -> None:
    at = RegionOff(legacy.tables.domain(0).root - PHYS_BASE)
    word = int.from_bytes(legacy.fs.region.read(at, 8), "little")
    legacy.fs.region.store_u64(at, 1 << 62 | 3)
    legacy.here.fs = remount(legacy.fs)
    legacy.differs(InvalidError, r"0000:00:05\.0: attached to no sound domain: run the check")
    legacy.fs.region.store_u64(at, word)
    legacy.here.fs = remount(legacy.fs)
    legacy.check()


def test_live_tables_that_are_damaged(both: Beside) -> None:
    both.kernel.word(both.kernel.domains[0].root, 1 << 45 | 3)
    both.differs(TableDamageError, r"^device 0000:00:05\.0: its live tables: .* not in memory")


# ---------------------------------------------------------------------- devices and units


def test_devices_that_may_depend_on_tables(legacy: Beside) -> None:
    assert legacy.device(EDU).name == "0000:00:05.0"
    with legacy.open() as units:
        assert units.above(units.device(EDU)).structure.name == "dmar1"
        assert units.above(units.device(SECOND_UNIT)).structure.name == "dmar0"


def test_devices_that_may_not(legacy: Beside) -> None:
    with pytest.raises(NotFoundError, match=r"^device 0000:00:06\.0: no such device$"):
        legacy.device(SourceId(0x30))
    place = legacy.root / "sys/bus/pci/devices/0000:00:05.0/config"
    place.write_bytes(config(express=0, ats=True))
    with pytest.raises(InvalidError, match=r"0000:00:05\.0: ATS is enabled"):
        legacy.device()
    legacy.differs(InvalidError, r"0000:00:05\.0: ATS is enabled")
    place.write_bytes(config())
    legacy.firmware(
        drhd(UNIT), drhd(UNIT + PAGE, flags=1), rmrr(1 << 20, 2 << 20, scope(ENDPOINT, 0, (5, 0)))
    )
    legacy.differs(InvalidError, r"0000:00:05\.0: the firmware has it use memory at 0x100000-")


def test_tables_of_a_unit_are_looked_at_once(both: Beside) -> None:
    """By one object: another one sees what the kernel has changed meanwhile."""
    with both.open() as units:
        live = units.unit(units.above(units.device(EDU)))
        entry = live.entry(EDU)
        mappings = units.mappings(live, entry)
        both.kernel.domains[0].unmap(Iova(0), 2 * MIB)
        both.kernel.root.detach(NIC)
        both.kernel.save()
        assert units.unit(units.above(units.device(NIC))) is live
        assert units.mappings(live, entry) is mappings
        assert [m.iova for m in mappings] == [0]
        assert {e.source_id for e in live.entries} == {EDU, NIC}
    with both.open() as units:
        live = units.unit(units.above(units.device(EDU)))
        assert [m.iova for m in units.mappings(live, live.entry(EDU))] == [2 * MIB]
        assert {e.source_id for e in live.entries} == {EDU}


def test_domains_of_devices_are_told_apart(both: Beside) -> None:
    both.kernel.domains[1].unmap(Iova(0), 2 * MIB)
    with both.open() as units:
        live = units.unit(units.found["dmar1"])
        found = [units.mappings(live, live.entry(device)) for device in (EDU, NIC)]
        assert [[(m.iova, m.length) for m in one] for one in found] == [
            [(0, 4 * MIB)],
            [(2 * MIB, 2 * MIB)],
        ]


def test_units_that_the_kernel_drives(legacy: Beside) -> None:
    """Of segment 0, and only while they translate."""
    legacy.firmware(drhd(UNIT, segment=1, flags=1), drhd(UNIT + PAGE, flags=1))
    legacy.seen = {0, 1}
    for driven, names in ((set(), []), ({0}, []), ({1}, ["dmar1"]), ({0, 1}, ["dmar1"])):
        legacy.driven = driven
        with legacy.open() as units:
            assert [u.name for u in units.driven()] == names
    legacy.kernel.enable_translation(status=0)
    with legacy.open() as units:
        assert units.driven() == []


# ---------------------------------------------------------------------- groups and names


def test_what_is_in_a_devices_group(legacy: Beside) -> None:
    legacy.group("0000:00:05.0", "0000:03:00.0", "0000:00:1c.0")  # the last one is a bridge
    device = legacy.device()
    with legacy.open() as units:
        units.check_group(device, {EDU, NIC})
        units.check_group(device, {NIC})
        message = r"^device 0000:00:05\.0: 0000:03:00\.0 is in the same IOMMU group, and is not att"
        for kept in ({EDU}, set[SourceId]()):
            with pytest.raises(InvalidError, match=message):
                units.check_group(device, kept)
    legacy.check()
    legacy.tables.persist(NIC, False)
    legacy.differs(InvalidError, r"0000:03:00\.0 is in the same IOMMU group")


def test_a_device_of_another_segment_in_the_group(legacy: Beside) -> None:
    """Its source id may be that of one which is kept."""
    add_device(legacy.root, "0001:03:00.0", config())
    legacy.group("0000:00:05.0", "0001:03:00.0")
    legacy.differs(InvalidError, r"0001:03:00\.0 is in the same IOMMU group")


def test_a_second_name_in_requests(both: Beside) -> None:
    """An entry with the same tables for what is no device; one for a device is a shared domain."""
    both.kernel.root.detach(NIC)
    both.kernel.root.attach(NIC, both.kernel.domains[0].root, 2)
    with both.open() as units:
        live = units.unit(units.found["dmar1"])
        units.check_names(units.device(EDU), live, both.kernel.domains[0].root)
    both.kernel.root.attach(SourceId(0x1FF), both.kernel.domains[0].root, 2)
    with both.open() as units:
        live = units.unit(units.found["dmar1"])
        units.check_names(units.device(EDU), live, both.kernel.domains[1].root)
        message = r"^device 0000:00:05\.0: the kernel has an entry like its own for 0000:01:1f"
        with pytest.raises(InvalidError, match=message):
            units.check_names(units.device(EDU), live, both.kernel.domains[0].root)
    both.differs(InvalidError, "an alias in requests, which cannot be attached: another device is")
