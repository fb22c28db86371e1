"""Pins as the file system asks for them: whoever they are, and before anything is freed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkernfs.errors import BusyError, CorruptionError, NoSpaceError, ReadOnlyError
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.super import Access
from pkernfs.host.iomem import Span
from pkernfs.layout import BLOCK, IOMMU_INO, PAGE
from pkernfs.pool.pool import Segment
from pkernfs.quantities import Ino, PhysAddr
from pkernfs.region.region import Region
from support.files import MIB, ROOT, make
from support.holding import Holding, Pooled, blocks_of, mounted, pooled_by
from support.memory_pool import PiecedPool


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(32 * MIB) as made:
        make_filesystem(made)
        yield made


def orphan(fs: FileSystem) -> Ino:
    """A file that a crash leaves without a name."""
    ino = make(fs, b"orphan", b"x" * PAGE)
    fs.open(ino)
    fs.unlink(ROOT, b"orphan")
    return ino


def test_they_are_not_loaded_for_nothing(region: Region) -> None:
    fs, pins = mounted(region)
    fs.create(IOMMU_INO, b"dom-0", 0o100600, 0, 0)
    fs.unlink(IOMMU_INO, b"dom-0")
    assert pins.changes == 2
    fs.unmount()
    _fs, pins = mounted(region)
    assert not pins.loads


def test_they_are_loaded_before_anything_is_freed(region: Region) -> None:
    fs, _pins = mounted(region)
    fs.create(IOMMU_INO, b"dom-0", 0o100600, 0, 0)
    orphan(fs)
    before = fs.super.inodes.used
    fs, pins = mounted(region)
    assert pins.loads == [before]
    assert fs.super.inodes.used == before - 1
    fs.unmount()


def test_if_they_cannot_be_loaded_nothing_is_freed(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _pins = mounted(region)
    fs.create(IOMMU_INO, b"dom-0", 0o100600, 0, 0)
    ino = orphan(fs)

    def fail(self: Holding) -> None:
        raise CorruptionError("unreadable")

    monkeypatch.setattr(Holding, "load", fail)
    fs, _pins = mounted(region)
    assert fs.super.access is Access.FAILED
    assert fs.inode(ino).data_pages
    with pytest.raises(ReadOnlyError):
        fs.create(ROOT, b"f", 0o100600, 0, 0)


def test_what_they_hold_stays(region: Region) -> None:
    fs, pins = mounted(region)
    ino = make(fs, b"f", b"x" * 3 * PAGE)
    at = fs.extents(ino)[0].region_offset
    pins.held = range(at, at + 1)
    assert fs.holder(ino) is None  # they are not asked: nothing is active
    pins.active = True
    assert fs.holder(ino) == "somebody"
    punch = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
    for change in (
        lambda: fs.unlink(ROOT, b"f"),
        lambda: fs.setattr(ino, size=0),
        lambda: fs.fallocate(ino, punch, 0, PAGE),
    ):
        with pytest.raises(BusyError, match="mapped for DMA"):
            change()
    table = fs.create(IOMMU_INO, b"dom-0", 0o100600, 0, 0).ino
    pins.used = {table}
    with pytest.raises(BusyError, match="in use"):
        fs.unlink(IOMMU_INO, b"dom-0")
    pins.used, pins.held = set(), range(0)
    fs.unlink(IOMMU_INO, b"dom-0")
    fs.unlink(ROOT, b"f")
    fs.unmount()


# ---------------------------------------------------------------------- memory of segments


@pytest.fixture
def pool() -> Iterator[PiecedPool]:
    with PiecedPool(8 * BLOCK, dirty=True) as made:
        yield made


@pytest.fixture
def pooled(pool: PiecedPool) -> Iterator[Pooled]:
    with pooled_by(pool) as made:
        yield made


def test_a_held_block_of_a_segment_stays(pooled: Pooled) -> None:
    row = pooled.segment(b"f", 4 * BLOCK)
    fs, ino = pooled.fs, row.ino
    held = row.pieces[2].start
    pooled.pins.memory = {held}
    punch = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
    for change in (
        lambda: fs.unlink(ROOT, b"f"),
        lambda: fs.setattr(ino, size=0),
        lambda: fs.setattr(ino, size=3 * BLOCK - 1),
        lambda: fs.fallocate(ino, punch, 2 * BLOCK, PAGE),
        lambda: fs.conversions.off(ino),
    ):
        with pytest.raises(BusyError, match="mapped for DMA"):
            fs.run(change)
    fs.run(lambda: fs.fallocate(ino, punch, 0, 2 * BLOCK))
    fs.run(lambda: fs.setattr(ino, size=3 * BLOCK))
    pooled.pins.memory = set()
    fs.run(lambda: fs.unlink(ROOT, b"f"))


def test_memory_that_is_held_goes_to_no_segment(
    pooled: Pooled, caplog: pytest.LogCaptureFixture
) -> None:
    """Though no row has it: tables that were damaged may still lead there."""
    start = pooled.pool.start
    held = pooled.pins.memory = {start + i * BLOCK for i in (0, 1, 6)}
    row = pooled.segment(b"f", 3 * BLOCK)
    assert not blocks_of(row) & held
    assert f"memory at {start:#x}: somebody" in caplog.text
    pooled.fs.run(lambda: pooled.fs.setattr(row.ino, size=5 * BLOCK))
    row = pooled.row(row.ino)
    assert not blocks_of(row) & held
    with pytest.raises(NoSpaceError):
        pooled.fs.run(lambda: pooled.fs.setattr(row.ino, size=6 * BLOCK))
    held.remove(start)
    pooled.fs.run(lambda: pooled.fs.setattr(row.ino, size=6 * BLOCK))
    assert start in blocks_of(pooled.row(row.ino))


def test_memory_that_a_segment_cannot_but_get_is_refused_if_it_is_held(
    pooled: Pooled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device has it already."""
    row = pooled.segment(b"f", BLOCK)
    block = Span(PhysAddr(pooled.pool.start + 5 * BLOCK), BLOCK)
    pooled.pins.memory = {block.start}

    def plan(wanted: Segment, others: list[Segment]) -> Segment:
        return wanted._replace(pieces=(*row.pieces, block))

    monkeypatch.setattr(pooled.pool, "plan", plan)
    with pytest.raises(BusyError, match=f"memory at {block.start:#x}: somebody"):
        pooled.fs.run(lambda: pooled.fs.setattr(row.ino, size=2 * BLOCK))
    assert pooled.row(row.ino) == row


@pytest.mark.parametrize("is_held", [True, False])
def test_growth_is_undone_unless_what_came_is_held(
    pooled: Pooled, monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    row = pooled.segment(b"f", BLOCK)
    grown = pooled.pool.plan(row._replace(length=3 * BLOCK), [])._replace(valid=BLOCK)
    with pooled.fs.store:
        pooled.fs.segments.table.replace(grown)
    pooled.pins.memory = {grown.pieces[-1].start} if is_held else set()
    pooled.remount(monkeypatch)
    assert pooled.row(row.ino).pieces == (grown if is_held else row).pieces
    assert pooled.pool.length(row.number) == (3 if is_held else 1) * BLOCK
    assert pooled.fs.inode(row.ino).size == BLOCK
