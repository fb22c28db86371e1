"""Pins as the file system asks for them: whoever they are, and before anything is freed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from pkernfs.errors import BusyError, CorruptionError, ReadOnlyError
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.super import Access
from pkernfs.layout import IOMMU_INO, PAGE, Extent
from pkernfs.quantities import Ino
from pkernfs.region.region import Region
from support.files import MIB, ROOT, make


class Holding:
    """Pins that hold what a test says."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.active = False
        self.loads: list[int] = []  # the inodes in use, each time
        self.changes = 0
        self.held: range = range(0)  # region offsets
        self.used: set[int] = set()

    def load(self) -> None:
        self.loads.append(self.fs.super.inodes.used)

    def changed(self) -> None:
        self.changes += 1

    def holder(self, extents: Iterable[Extent]) -> str | None:
        return "somebody" if any(e.page * PAGE in self.held for e in extents) else None

    def check_unused(self, ino: Ino) -> None:
        if ino in self.used:
            raise BusyError("in use")


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(32 * MIB) as made:
        make_filesystem(made)
        yield made


def mounted(region: Region, **how: Any) -> tuple[FileSystem, Holding]:
    fs = FileSystem.mount(region, pins=Holding, **how)
    assert isinstance(fs.pins, Holding)
    return fs, fs.pins


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
