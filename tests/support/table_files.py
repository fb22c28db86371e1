"""A file system with files and tables for tests of pkernfs.dma.table_files, without a mount."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import pytest

from pkernfs.dma import reports
from pkernfs.dma.mount import mount_filesystem, tables_of
from pkernfs.dma.output import Question, Record, Status, Text
from pkernfs.dma.table_files import TableFiles
from pkernfs.errors import (
    PkernfsError,
)
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.host.bars import Bar
from pkernfs.iommu.check import Report
from pkernfs.iommu.export import assemble
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.translate import translate_domain
from pkernfs.layout import BLOCK, IOMMU_INO, PAGE, ROOT_INO, PoolFields
from pkernfs.quantities import Ino, Iova, PhysAddr, RegionOff, SourceId
from pkernfs.region.checksum import crc32c
from pkernfs.region.region import Region
from support.checking import MemoryFile
from support.memory_pool import MemoryPool

MIB = 1 << 20
PHYS_BASE = PhysAddr(1 << 33)
DEVICE = SourceId(0x28)
READ, WRITE, RW = 1, 2, 3
POISON = b"\xdb" * MIB

T = TypeVar("T")


def drain(steps: Generator[Any, None, T], between: Callable[[], object] = int) -> T:
    """What a generator returns; ``between`` runs at each of its pauses."""
    while True:
        try:
            next(steps)
            between()
        except StopIteration as end:
            done: T = end.value
            return done


class Host:
    """A file system in a region that outlives its mounts."""

    def __init__(
        self, size: int = 64 * MIB, *, poison: bool = False, pool: MemoryPool | None = None
    ) -> None:
        self.pool = pool
        self.file = MemoryFile(size)
        self.region = self.file.open(phys_base=PHYS_BASE)
        if poison:
            for at in range(0, size, MIB):
                self.region.copy_in(RegionOff(at), POISON)
        if pool is None:
            make_filesystem(self.region)
        else:
            make_filesystem(self.region, pool=PoolFields(pool.kind, pool.granule))
        self.fs = self._mount()

    def _mount(self) -> FileSystem:
        opener = None if self.pool is None else self.pool.opener()
        return mount_filesystem(self.region, open_pool=opener)

    @classmethod
    def over(cls, region: Region, pool: MemoryPool | None = None) -> Host:
        """One in a region that has a file system; it is mounted now, and the caller's to close."""
        host = cls.__new__(cls)
        host.pool = pool
        host.region = region
        host.fs = host._mount()
        return host

    def close(self) -> None:
        self.fs.segments.close()
        self.region.close()
        self.file.close()
        if self.pool is not None:
            self.pool.put({})

    def remount(self, phys_base: PhysAddr | None = PHYS_BASE, *, clean: bool = True) -> None:
        """Another daemon opens the region; ``clean``: after an unmount."""
        if clean:
            self.fs.unmount()
        self.fs.segments.close()
        self.region.close()
        self.region = self.file.open(phys_base=phys_base)
        self.fs = self._mount()

    @property
    def tables(self) -> TableFiles:
        return tables_of(self.fs)

    def run(self, operation: Callable[[], T]) -> T:
        return self.fs.run(operation)

    # ------------------------------------------------------------------ files

    def file_of(self, name: str, size: int = 0, data: bytes = b"") -> Ino:
        """A new file in the root directory; its inode number."""
        ino = self.fs.create(ROOT_INO, name.encode(), 0o100600, 0, 0).ino
        if size:
            self.run(lambda: self.fs.setattr(ino, size=size))
        if data:
            self.run(lambda: self.fs.write(ino, 0, data))
        return ino

    def sparse(self, name: str, size: int) -> Ino:
        """A new file of one page at its end, and a hole before it."""
        ino = self.file_of(name)
        self.run(lambda: self.fs.write(ino, size - 1, b"\0"))
        return ino

    def dom(self, number: int, size: int = BLOCK) -> Ino:
        """A new domain file."""
        ino = self.fs.create(IOMMU_INO, b"dom-%d" % number, 0o100600, 0, 0).ino
        if size:
            self.run(lambda: self.fs.setattr(ino, size=size))
        return ino

    def physical(self, ino: Ino, offset: int = 0) -> PhysAddr:
        """Where a byte of a file is."""
        piece = next(self.tables.file_pieces(ino, offset, 1))
        return piece.physical

    # ------------------------------------------------------------------ tables

    def map(
        self,
        number: int,
        iova: Iova,
        ino: Ino,
        offset: int = 0,
        length: int | None = None,
        perm: int = RW,
    ) -> int:
        return self.run(lambda: self.tables.map_file(number, iova, ino, offset, length, perm))

    def attach(self, number: int, source_id: SourceId = DEVICE) -> int:
        return self.run(lambda: self.tables.attach(number, source_id))

    def mappings(self, number: int) -> list[tuple[int, int, int, int]]:
        """``(iova, physical, length, perm)``."""
        found = self.tables.domain(number).mappings()
        return [(m.iova, m.physical, m.length, m.perm) for m in found]

    def at(self, number: int, iova: Iova) -> PhysAddr | None:
        """Where the walker gets to from dom-N's top-level table on."""
        table = self.tables.domain(number)
        memory = Memory.whole(self.region)
        return translate_domain(memory, table.root, table.levels, iova).physical

    def check(self) -> Report:
        return drain(reports.prepare_check(self.fs)).run()

    def assert_check_clean(self) -> Report:
        report = self.check()
        assert report.clean, [f.message for f in report.findings]
        return report

    def state(self) -> dict[str, Any]:
        """All that the tables say."""
        return {
            "config": self.tables.config,
            "mappings": {n: self.mappings(n) for n in self.tables.domains},
            "pages": {n: t.used_pages for n, t in self.tables.domains.items()},
            "devices": [(d.source_id, d.table, d.domain_id) for d in self.tables.devices()],
            "bars": self.tables.bars(),
        }

    def answer(self, what: str, **question: Any) -> tuple[str, dict[str, Any], int]:
        """Text, records and exit status of a question, as a command has them."""
        text, records, status = "", [], 0
        for item in reports.answer(self.fs, Question(what, **question)):
            if isinstance(item, Text):
                text += item.text
            elif isinstance(item, Status):
                status = item.status
            elif isinstance(item, Record):
                records.append(item.record)
        return text, assemble(records), status


def pages(count: int) -> int:
    """Bytes of so many pages."""
    return count * PAGE


GIB = 1 << 30
PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
BAR = Bar(SourceId(0x30), 0, PhysAddr(0xFC00_0000), 16 * MIB)


def ino_of(host: Host, name: str) -> Ino:
    found: Ino = host.fs.lookup(ROOT_INO, name.encode()).ino
    return found


def table_ino(host: Host, name: bytes) -> Ino:
    found: Ino = host.fs.lookup(IOMMU_INO, name).ino
    return found


def refused(
    host: Host, error: type[PkernfsError], operation: Callable[[], Any], match: str = ""
) -> None:
    """``operation`` fails, in one line, and nothing of the region has changed."""
    before = crc32c(host.region.view(RegionOff(0), host.region.size))
    with pytest.raises(error, match=match or None) as caught:
        host.run(operation)
    assert "\n" not in str(caught.value)
    assert crc32c(host.region.view(RegionOff(0), host.region.size)) == before


def until_refused(
    error: type[PkernfsError], host: Host, operations: Iterable[Callable[[], object]]
) -> tuple[str, int]:
    """Run them until one fails, and leaves the tables as they were; what it says, and which."""
    for number, operation in enumerate(operations):
        before = host.state()
        try:
            host.run(operation)
        except error as e:
            assert host.state() == before
            return str(e), number
    pytest.fail("none of them failed")


def grow(host: Host, mib: int, name: bytes = b"dom-0") -> None:
    inode = host.fs.inode(table_ino(host, name))
    size = inode.size + mib * MIB
    host.run(lambda: host.fs.setattr(inode.ino, size=size))
