"""Tables put together: what one part has done, the others know."""

from __future__ import annotations

import pytest

from pkernfs.dma.kernel_adopted import KernelAdopted, KernelEntry
from pkernfs.errors import BusyError, TableDamageError
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import PAGE, Extent
from pkernfs.quantities import Iova, PageNo, PhysAddr, RegionOff
from pkernfs.units.mmio import MemoryWindow
from pkernfs.units.unit import Unit
from pkernfs.units.unit_set import ActiveUnits
from support.files import remount
from support.table_files import DEVICE, GIB, MIB, PHYS_BASE, Host, ino_of, table_ino


class Adopted(KernelAdopted):
    """The kernel has adopted a table for DEVICE."""

    def __init__(self, table: PhysAddr) -> None:
        self.table = table

    def entries(self) -> list[KernelEntry]:
        return [KernelEntry("dmar0", DEVICE, self.table)]


def holder(host: Host, name: str) -> str | None:
    """What maps a byte of a file."""
    extents = host.fs.extents(ino_of(host, name))
    return host.tables.holder(
        [Extent(0, PageNo(e.region_offset // PAGE), e.length // PAGE) for e in extents]
    )


def test_what_is_mapped_is_held(mapped: Host) -> None:
    tables = mapped.tables
    assert holder(mapped, "guest") == "dom-0 maps it at iova 0x40000000"
    assert holder(mapped, "other") is None
    place = mapped.fs.extents(ino_of(mapped, "guest"))[0].region_offset
    assert tables.may_be_mapped(place, PAGE)
    assert [m.iova for m in tables.mappings(0)] == [GIB]
    mapped.run(lambda: tables.unmap(0, Iova(GIB), 4 * MIB))
    assert holder(mapped, "guest") is None
    assert not tables.may_be_mapped(place, PAGE)
    assert list(tables.mappings(0)) == []


def test_what_is_attached_is_in_use(mapped: Host) -> None:
    tables = mapped.tables
    mapped.run(lambda: tables.unmap(0, Iova(GIB), 4 * MIB))
    ino = table_ino(mapped, b"dom-0")
    tables.check_unused(ino)
    mapped.attach(0)
    with pytest.raises(BusyError, match=r"^iommu/dom-0: in use: "):
        tables.check_unused(ino)
    assert tables.non_persistent() == set()
    tables.persist(DEVICE, False)
    assert tables.non_persistent() == {DEVICE}
    mapped.fs.freeze()
    assert tables.clear_non_persistent() == [DEVICE]
    mapped.fs.thaw()
    assert tables.devices() == []
    tables.check_unused(ino)


def test_what_is_being_read_stays(mapped: Host) -> None:
    tables = mapped.tables
    with tables.reading():
        with pytest.raises(BusyError, match="it is being checked: try again"):
            tables.check_unused(table_ino(mapped, b"dom-0"))
        with pytest.raises(BusyError):
            tables.unmap(0, Iova(GIB), PAGE)
        with pytest.raises(BusyError):
            tables.attach(0, DEVICE)


def test_what_they_are_like(host: Host) -> None:
    tables = host.tables
    assert (tables.root, tables.domains, tables.names, tables.damaged) == (None, {}, [], {})
    assert tables.config == Config()
    host.dom(7)
    tables.create_root(Config(Mode.SCALABLE, 5))
    assert tables.config[:2] == (Mode.SCALABLE, 5)
    assert tables.root is tables.need_root()
    assert tables.domains == {7: tables.domain(7)}
    assert tables.names == [ROOT_PGTABLES, b"dom-7"]
    assert tables.root_memory().first_page == tables.memories()[0].first_page
    assert tables.memory(b"dom-7").first_page == tables.domain(7).root


def test_what_is_damaged_is_not_there(mapped: Host) -> None:
    at = RegionOff(mapped.tables.domain(0).root - PHYS_BASE)
    word = int.from_bytes(mapped.region.read(at, 8), "little")
    mapped.region.store_u64(at, 1 << 62 | 3)
    mapped.fs = remount(mapped.fs)
    tables = mapped.tables
    assert list(tables.damaged) == [b"dom-0"]
    assert tables.domains == {}
    with pytest.raises(TableDamageError, match=r"^iommu/dom-0: damaged: "):
        tables.domain(0)
    mapped.region.store_u64(at, word)
    mapped.fs = remount(mapped.fs)
    assert mapped.tables.damaged == {}
    assert list(mapped.tables.domains) == [0]


def test_units_that_walk_them_are_known_to_all(mapped: Host) -> None:
    """No file is theirs to remove, and root-pgtables not anybody's to change."""
    tables = mapped.tables
    tables.ready_for_units()
    assert tables.config.home
    assert tables.active_units is None
    registers = bytearray(PAGE)
    registers[8:16] = (0xD2008C222F0606).to_bytes(8, "little")  # CAP
    units = ActiveUnits([Unit("dmar0", MemoryWindow(registers))], Mode.LEGACY)
    tables.set_active_units(units)
    assert tables.active_units is units
    with pytest.raises(BusyError, match="root-pgtables: in use: dmar0 walks it"):
        tables.create_root(Config(Mode.SCALABLE, 4))
    with pytest.raises(BusyError, match="root-pgtables: in use: "):
        tables.check_unused(table_ino(mapped, ROOT_PGTABLES))
    tables.set_active_units(None)
    assert tables.active_units is None
    tables.create_root(Config(Mode.SCALABLE, 4))


def test_what_the_kernel_has_adopted_is_known_to_all(mapped: Host) -> None:
    tables = mapped.tables
    top = tables.domain(0).root
    assert tables.kernel_adopted is None
    assert tables.adopted_by() == {}
    adopted = tables.kernel_adopted = Adopted(top)
    assert tables.kernel_adopted is adopted
    assert tables.adopted_by() == {(DEVICE, top): "dmar0"}
    with pytest.raises(BusyError, match="dom-0: dmar0 walks it"):
        tables.unmap(0, Iova(GIB), PAGE)
    with pytest.raises(BusyError):
        tables.check_unused(table_ino(mapped, b"dom-0"))
    tables.kernel_adopted = None
    assert tables.adopted_by() == {}
    mapped.run(lambda: tables.unmap(0, Iova(GIB), PAGE))
