"""root-pgtables and dom-N as files of a file system: found, sound or not, good where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    BusyError,
    InvalidError,
    PermissionDeniedError,
    TableDamageError,
)
from pkernfs.fs.file import FALLOC_ZERO_RANGE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Iova, PhysAddr, RegionOff, SourceId
from support.table_files import (
    BAR,
    DEVICE,
    GIB,
    MIB,
    PHYS_BASE,
    PUNCH,
    RW,
    Host,
    ino_of,
    refused,
    table_ino,
)

# ---------------------------------------------------------------------- the files


def test_files_of_a_new_file_system_are_nobodys(host: Host) -> None:
    tables = host.tables
    assert (tables.domains, tables.root, tables.devices(), tables.bars()) == ({}, None, [], [])
    assert tables.names == []
    assert host.assert_check_clean().tables == 0


def test_made_with_touch_and_sized_with_truncate(host: Host) -> None:
    ino = host.dom(3, 0)
    assert host.fs.inode(ino).mode == 0o100400
    refused(host, InvalidError, lambda: host.tables.domain(3), "never sized: truncate -s 2M")
    host.run(lambda: host.fs.setattr(ino, size=2 * MIB))
    table = host.tables.domain(3)
    assert (table.used_pages, table.free_pages) == (1, 511)
    assert table.root == host.physical(ino)
    assert host.tables.names == [b"dom-3"]


def test_names_by_number(host: Host) -> None:
    for number in (10, 2, 65535):
        host.dom(number)
    host.tables.create_root()
    assert host.tables.names == [b"root-pgtables", b"dom-2", b"dom-10", b"dom-65535"]


def test_raw_bytes_are_the_tables(mapped: Host) -> None:
    """Page 0 of dom-0 is the top-level table; what it leads to is in the file as well."""
    ino = table_ino(mapped, b"dom-0")
    raw = bytes(mapped.fs.read(ino, 0, 2 * MIB))
    base = mapped.physical(ino)
    table = memoryview(raw).cast("Q")
    entry = table[0]
    for index in (1, 0):  # 1 GiB: PDPE 1, PDE 0
        at = (entry & ~0xFFF) - base
        entry = table[at // 8 + index]
    assert entry == mapped.physical(ino_of(mapped, "guest")) | 0x83


def test_growth_keeps_mappings(mapped: Host) -> None:
    before = mapped.mappings(0)
    table = mapped.tables.domain(0)
    free = table.free_pages
    ino = table_ino(mapped, b"dom-0")
    mapped.run(lambda: mapped.fs.setattr(ino, size=6 * MIB))
    assert mapped.mappings(0) == before
    assert mapped.tables.domain(0).free_pages == free + 1024
    mapped.remount()
    assert mapped.mappings(0) == before
    mapped.assert_check_clean()


@pytest.mark.parametrize("name", [b"dom-0", ROOT_PGTABLES])
@pytest.mark.parametrize(
    "change",
    [
        lambda fs, ino: fs.write(ino, 0, b"garbage"),
        lambda fs, ino: fs.write(ino, 2 * MIB, b"garbage"),
        lambda fs, ino: fs.setattr(ino, size=0),
        lambda fs, ino: fs.setattr(ino, size=2 * MIB - PAGE),
        lambda fs, ino: fs.setattr(ino, size=3 * MIB),
        lambda fs, ino: fs.fallocate(ino, PUNCH, 0, PAGE),
        lambda fs, ino: fs.fallocate(ino, FALLOC_ZERO_RANGE, 0, PAGE),
        lambda fs, ino: fs.fallocate(ino, 0, 2 * MIB, 2 * MIB),
        lambda fs, ino: fs.link(ino, IOMMU_INO, b"dom-1"),
        lambda fs, ino: fs.link(ino, ROOT_INO, b"link"),
    ],
)
def test_no_garbage_into_tables(
    mapped: Host, name: bytes, change: Callable[[FileSystem, int], object]
) -> None:
    ino = table_ino(mapped, name)
    refused(mapped, PermissionDeniedError, lambda: change(mapped.fs, ino))


@pytest.mark.parametrize("name", [b"dom-1", b"x"])
def test_another_file_gets_no_name_among_the_tables(mapped: Host, name: bytes) -> None:
    """It would look like a domain, and be none."""
    guest = ino_of(mapped, "guest")
    refused(mapped, PermissionDeniedError, lambda: mapped.fs.link(guest, IOMMU_INO, name))
    assert mapped.fs.inode(guest).nlink == 1


# ---------------------------------------------------------------------- pins


def test_tables_being_checked_stay(mapped: Host) -> None:
    with mapped.tables.reading():
        other = ino_of(mapped, "other")
        for operation in (
            lambda: mapped.tables.map_file(0, Iova(0), other, 0, None, RW),
            lambda: mapped.tables.unmap(0, Iova(GIB), PAGE),
            lambda: mapped.tables.attach(0, DEVICE),
            lambda: mapped.tables.create_root(),
            lambda: mapped.fs.unlink(IOMMU_INO, b"dom-0"),
        ):
            refused(mapped, BusyError, operation, "try again")
    mapped.map(0, Iova(0), other)


# ---------------------------------------------------------------------- where tables are good


def test_a_region_without_addresses_gets_them_back(mapped: Host) -> None:
    mapped.attach(0)
    before = mapped.state()
    mapped.remount(None)
    assert mapped.region.physical(RegionOff(0)) == PHYS_BASE
    assert mapped.state() == before
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"guest"))
    mapped.assert_check_clean()


@pytest.mark.parametrize("phys_base", [2 * PHYS_BASE, PHYS_BASE + PAGE, PHYS_BASE - (8 << 20)])
def test_what_is_mapped_is_held_though_the_address_is_said_wrong(
    mapped: Host, phys_base: int
) -> None:
    """A typing error in phys_base= must not cost what the next mount, with the right one, needs."""
    mapped.dom(5)
    mapped.attach(0)
    before = mapped.state()
    mapped.remount(PhysAddr(phys_base))
    guest, other = ino_of(mapped, "guest"), ino_of(mapped, "other")
    for change in (
        lambda: mapped.fs.unlink(ROOT_INO, b"guest"),
        lambda: mapped.fs.setattr(guest, size=0),
        lambda: mapped.fs.fallocate(guest, PUNCH, 0, MIB),
        lambda: mapped.fs.rename(ROOT_INO, b"other", ROOT_INO, b"guest", 0),
        lambda: mapped.fs.unlink(IOMMU_INO, b"dom-0"),
        lambda: mapped.fs.rename(IOMMU_INO, b"dom-0", IOMMU_INO, b"dom-1", 0),
        lambda: mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES),
    ):
        refused(mapped, BusyError, change)
    mapped.fs.setattr(other, size=0)
    mapped.fs.unlink(ROOT_INO, b"other")
    mapped.remount(PHYS_BASE)
    assert mapped.state() == before
    mapped.assert_check_clean()


@pytest.mark.slow("the whole region is copied, and mounted three times")
def test_tables_of_another_place_are_refused(
    mapped: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped.attach(0)
    image = mapped.region.read(RegionOff(0), mapped.region.size)
    mapped.remount(PhysAddr(2 * PHYS_BASE))
    home = PHYS_BASE + (mapped.physical(table_ino(mapped, ROOT_PGTABLES), PAGE) - 2 * PHYS_BASE)
    says = f"root-pgtables: its tables were made for {home:#x}"
    other = ino_of(mapped, "other")
    for operation in (
        lambda: mapped.tables.map_file(0, Iova(0), other, 0, None, RW),
        lambda: mapped.tables.unmap(0, Iova(GIB), PAGE),
        lambda: mapped.tables.attach(0, SourceId(0x99)),
        lambda: mapped.tables.detach(DEVICE),
        lambda: mapped.tables.create_root(),
        lambda: mapped.answer("show"),
        lambda: mapped.answer("export"),
        lambda: mapped.answer("check"),
        lambda: mapped.answer("translate", device=DEVICE, iova=0),
    ):
        refused(mapped, TableDamageError, operation, says)
        refused(mapped, TableDamageError, operation, f"mount with phys_base={PHYS_BASE:#x}")
    # If that is where the machine has it, nothing is pinned: no unit can be walking such tables.
    monkeypatch.setattr(type(mapped.region), "real_addresses", True)
    mapped.remount(PhysAddr(2 * PHYS_BASE))
    monkeypatch.undo()
    refused(
        mapped, TableDamageError, lambda: mapped.answer("show"), "the region's memory has moved"
    )
    mapped.run(lambda: mapped.fs.setattr(ino_of(mapped, "guest"), size=0))
    mapped.fs.unlink(IOMMU_INO, b"dom-0")
    mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES)
    mapped.dom(0)
    mapped.map(0, Iova(0), other)
    mapped.assert_check_clean()
    # Mounted at the right place, the old tables are as they were.
    mapped.fs.unmount()
    mapped.region.copy_in(RegionOff(0), image)
    mapped.region.close()
    mapped.region = mapped.file.open(phys_base=PHYS_BASE)
    mapped.fs = mount_filesystem(mapped.region)
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"guest"))
    mapped.assert_check_clean()


def test_a_region_that_never_had_addresses(host: Host) -> None:
    host.remount(None)
    ino = host.file_of("guest", MIB)
    host.dom(0)
    for operation in (
        lambda: host.tables.map_file(0, Iova(0), ino, 0, None, RW),
        lambda: host.tables.map_bar(0, Iova(0), BAR, 0, None, RW),
        lambda: host.tables.unmap(0, Iova(0), PAGE),
        lambda: host.tables.attach(0, DEVICE),
        lambda: host.tables.create_root(),
        lambda: host.answer("show"),
        lambda: host.answer("export"),
        lambda: host.answer("check"),
        lambda: host.answer("translate", device=DEVICE, iova=0),
    ):
        refused(host, InvalidError, operation, "no physical addresses: (mount it with|give) phys")
    host.run(lambda: host.fs.setattr(ino, size=0))
    host.fs.unlink(IOMMU_INO, b"dom-0")
