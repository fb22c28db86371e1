"""fsck on the IOMMU's tables: what it says of them, and that it leaves them alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkernfs.dma.mount import mount_filesystem, tables_of
from pkernfs.fs import fsck
from pkernfs.fs.fsck import Code
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.iommu.config import config_offset
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Iova, PhysAddr, RegionOff, SourceId
from pkernfs.region.region import Region
from support.memory_pool import DAX, PiecedPool

MIB = 1 << 20
BASE = PhysAddr(1 << 40)
DEVICE = SourceId(0x28)


@pytest.fixture
def region() -> Iterator[Region]:
    """A file system with a mapped file and an attached device, unmounted."""
    with Region.anonymous(64 * MIB, phys_base=BASE) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        ram = fs.create(ROOT_INO, b"ram", 0o100600, 0, 0).ino
        fs.setattr(ram, size=8 * MIB)
        dom = fs.create(IOMMU_INO, b"dom-0", 0o100400, 0, 0).ino
        fs.setattr(dom, size=2 * MIB)
        tables_of(fs).map_file(0, Iova(PAGE), ram, 0, None, 3)
        tables_of(fs).attach(0, DEVICE)
        fs.unmount()
        yield region


def leaf_of(region: Region) -> RegionOff:
    """Region offset of the leaf that maps address 0x1000."""
    fs = mount_filesystem(region, read_only=True)
    table = tables_of(fs).domain(0)
    at = table.root
    for _level in range(4, 1, -1):
        offset = table.memory.offset(at)
        assert offset is not None
        at = PhysAddr(region.view(offset, PAGE).cast("Q")[0] & ~0xFFF)
    offset = table.memory.offset(at)
    assert offset is not None
    return RegionOff(offset + 8)


def test_sound_tables_are_clean(region: Region) -> None:
    report = fsck.check(region, repair=False)
    assert report.clean
    assert not report.notes


def test_memory_of_segments_may_be_mapped() -> None:
    """That of files that are there; not what a dead one has."""
    with PiecedPool() as pool, Region.anonymous(64 * MIB, phys_base=BASE) as region:
        make_filesystem(region, pool=DAX)
        fs = mount_filesystem(region, open_pool=pool.opener())
        ram = fs.create(ROOT_INO, b"ram", 0o100600, 0, 0).ino
        fs.run(lambda: fs.setattr(ram, size=8 * MIB))
        dom = fs.create(IOMMU_INO, b"dom-0", 0o100400, 0, 0).ino
        fs.run(lambda: fs.setattr(dom, size=2 * MIB))
        tables_of(fs).map_file(0, Iova(PAGE), ram, 0, None, 3)
        assert fsck.check(region, repair=False).clean
        inode = fs.inode(ram)
        with fs.store:
            fs.super.inodes.touch(inode)
            fs.segments.drop(inode)
            inode.size = 0
            fs.super.inodes.save(inode)
        problems = fsck.check(region, repair=False).problems
        assert {p.code for p in problems} == {Code.TABLES_BAD}
        assert "LEAF_OUTSIDE: dom-0" in problems[0].message
        tables_of(fs).unmap(0, Iova(0), 1 << 40)
        assert fsck.check(region, repair=False).clean
        fs.unmount()


def test_addresses_of_interrupts_are_found(region: Region) -> None:
    """Tables of another maker may map them; pkernfs can open those, and unmap."""
    fs = mount_filesystem(region)
    tables = tables_of(fs)
    table = tables.domain(0)
    leaf = next(iter(table.mappings()))
    table.map(Iova(0xFEE0_0000), leaf.physical, PAGE, 3)
    fs.unmount()
    (problem,) = fsck.check(region, repair=True).problems
    assert problem.code is Code.TABLES_BAD
    assert "INTERRUPT_RANGE: dom-0 entry at " in problem.message
    fs = mount_filesystem(region)
    assert tables_of(fs).unmap(0, Iova(0xFEE0_0000), PAGE) == PAGE
    fs.unmount()
    assert fsck.check(region, repair=False).clean


@pytest.mark.parametrize(
    ("entry", "finding"),
    [
        (BASE - (1 << 30) | 3, "LEAF_OUTSIDE"),
        (BASE + 60 * MIB | 3, "LEAF_OUTSIDE"),  # free memory of the region
        (1 << 51 | 3 | 1 << 8, "LEAF_OUTSIDE"),
    ],
)
def test_a_stray_leaf_is_found_and_stays(region: Region, entry: int, finding: str) -> None:
    at = leaf_of(region)
    region.store_u64(at, entry)
    for repair in (False, True):
        report = fsck.check(region, repair=repair)
        assert [p.code for p in report.problems] == [Code.TABLES_BAD]
        assert finding in report.problems[0].message
        assert "dom-0" in report.problems[0].message
        assert report.left == 1
        assert region.view(at, 8).cast("Q")[0] == entry


def test_a_removed_file_s_memory_is_not_live(region: Region) -> None:
    """What a file of another kernel's daemon might have left: a leaf to memory that was freed."""
    fs = mount_filesystem(region)
    target = fs.create(ROOT_INO, b"other", 0o100600, 0, 0).ino
    fs.setattr(target, size=4 * MIB)
    physical = BASE + fs.extents(target)[0].region_offset
    fs.unlink(ROOT_INO, b"other")
    fs.unmount()
    region.store_u64(leaf_of(region), physical | 3)
    report = fsck.check(region, repair=False)
    assert [p.code for p in report.problems] == [Code.TABLES_BAD]


def test_a_table_as_data_is_found(region: Region) -> None:
    fs = mount_filesystem(region, read_only=True)
    table = tables_of(fs).domain(0).root
    region.store_u64(leaf_of(region), table | 3)
    report = fsck.check(region, repair=False)
    assert "LEAF_IS_TABLE" in report.problems[0].message


def test_tables_of_another_place_are_not_checked(region: Region) -> None:
    with Region.anonymous(region.size, phys_base=PhysAddr(BASE + (1 << 30))) as moved:
        moved.copy_in(RegionOff(0), region.view(RegionOff(0), region.size))
        report = fsck.check(moved, repair=False)
        assert report.clean
        assert [n.code for n in report.notes] == [Code.TABLES_UNCHECKED]


def test_addresses_are_found_in_the_tables(region: Region) -> None:
    """A copy without addresses of its own is checked with those that the tables were made for."""
    region.store_u64(leaf_of(region), BASE - (1 << 30) | 3)
    with Region.anonymous(region.size) as copy:
        copy.copy_in(RegionOff(0), region.view(RegionOff(0), region.size))
        report = fsck.check(copy, repair=False)
        assert [p.code for p in report.problems] == [Code.TABLES_BAD]


def test_a_damaged_configuration_is_told(region: Region) -> None:
    fs = mount_filesystem(region, read_only=True)
    at = config_offset(tables_of(fs).root_memory())
    region.store_u64(at, 1)
    report = fsck.check(region, repair=False)
    assert [p.code for p in report.problems] == [Code.TABLES_BAD]
    assert "CONFIGURATION" in report.problems[0].message


def test_a_damaged_configuration_is_told_where_nothing_else_tells_addresses(region: Region) -> None:
    fs = mount_filesystem(region, read_only=True)
    region.store_u64(config_offset(tables_of(fs).root_memory()), 1)
    with Region.anonymous(region.size) as copy:
        copy.copy_in(RegionOff(0), region.view(RegionOff(0), region.size))
        report = fsck.check(copy, repair=False)
    assert [p.code for p in report.problems] == [Code.TABLES_BAD]
    assert "configuration" in report.problems[0].message


def test_a_damaged_configuration_is_told_where_no_device_is_attached(region: Region) -> None:
    fs = mount_filesystem(region)
    tables_of(fs).detach(DEVICE)
    tables_of(fs).unmap(0, Iova(0), 1 << 40)
    region.store_u64(config_offset(tables_of(fs).root_memory()), 1)
    fs.unmount()
    report = fsck.check(region, repair=False)
    assert [p.code for p in report.problems] == [Code.TABLES_BAD]
