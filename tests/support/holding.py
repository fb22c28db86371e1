"""Pins that hold what a test says, and a file system with a pool that asks them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pkernfs.errors import BusyError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.host.iomem import Span
from pkernfs.layout import BLOCK, IOMMU_INO, PAGE, Extent
from pkernfs.pool.pool import Segment
from pkernfs.quantities import Ino, PhysAddr
from pkernfs.region.region import Region
from support.files import MIB, ROOT
from support.memory_pool import DAX, PiecedPool


class Holding:
    """Pins that hold what a test says."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.active = False
        self.loads: list[int] = []  # the inodes in use, each time
        self.changes = 0
        self.held: range = range(0)  # region offsets
        self.memory: set[int] = set()  # 2 MiB blocks outside the region
        self.used: set[int] = set()

    def load(self) -> None:
        self.loads.append(self.fs.super.inodes.used)

    def changed(self) -> None:
        self.changes += 1

    def holder(self, extents: Iterable[Extent]) -> str | None:
        return "somebody" if any(e.page * PAGE in self.held for e in extents) else None

    def holder_of_memory(self, pieces: Iterable[Span]) -> str | None:
        return "somebody" if self.held_memory(pieces) else None

    def held_memory(self, pieces: Iterable[Span]) -> list[Span]:
        blocks = sorted(at for p in pieces for at in range(p.start // BLOCK * BLOCK, p.end, BLOCK))
        return [Span(PhysAddr(at), BLOCK) for at in blocks if at in self.memory]

    def check_unused(self, ino: Ino) -> None:
        if ino in self.used:
            raise BusyError("in use")


def mounted(region: Region, **how: Any) -> tuple[FileSystem, Holding]:
    fs = FileSystem.mount(region, pins=Holding, **how)
    assert isinstance(fs.pins, Holding)
    return fs, fs.pins


class Pooled:
    """A file system with a pool; /iommu has a file, so that its pins are loaded."""

    def __init__(self, region: Region, pool: PiecedPool) -> None:
        self.region, self.pool = region, pool
        self.fs, self.pins = mounted(region, open_pool=pool.opener())
        self.pins.active = True
        self.fs.create(IOMMU_INO, b"dom-0", 0o100600, 0, 0)

    def segment(self, name: bytes, size: int) -> Segment:
        ino = self.fs.create(ROOT, name, 0o100600, 0, 0).ino
        self.fs.run(lambda: self.fs.setattr(ino, size=size))
        return self.row(ino)

    def row(self, ino: Ino) -> Segment:
        found = self.fs.segments.find(ino)
        assert found is not None
        return found

    def remount(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A daemon comes after one that was killed; the same memory is held."""
        memory = self.pins.memory

        def load(pins: Holding) -> None:
            pins.active, pins.memory = True, memory

        monkeypatch.setattr(Holding, "load", load)
        self.fs.segments.close()
        self.fs, self.pins = mounted(self.region, open_pool=self.pool.opener())


@contextmanager
def pooled_by(pool: PiecedPool) -> Iterator[Pooled]:
    with Region.anonymous(32 * MIB) as region:
        make_filesystem(region, pool=DAX)
        made = Pooled(region, pool)
        yield made
        made.fs.segments.close()


def blocks_of(row: Segment) -> set[int]:
    return {at for piece in row.pieces for at in range(piece.start, piece.end, BLOCK)}
