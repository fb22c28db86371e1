"""A domain in memory for the tests of pkernfs.iommu, and a model of what it maps."""

from __future__ import annotations

from pkernfs.iommu.entries import leaf_bytes, width_bits
from pkernfs.iommu.memory import Memory, store_words
from pkernfs.iommu.pgtable import PageTable
from pkernfs.iommu.pool import TablePool
from pkernfs.iommu.trees import check_tree
from pkernfs.iommu.walk import translate_domain
from pkernfs.layout import PAGE
from pkernfs.region import Region

PHYS_BASE = 1 << 40
MIB = 1 << 20
GIB = 1 << 30


class Model:
    """What each piece of the address space maps: disjoint ``start: (end, physical, perm)``."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int, int, int]] = []

    def at(self, iova: int) -> tuple[int, int] | None:
        """``(physical, perm)`` of an address."""
        for start, end, physical, perm in self.pieces:
            if start <= iova < end:
                return physical + iova - start, perm
        return None

    def cut(self, start: int, end: int) -> list[tuple[int, int, int, int]]:
        """Take out what is mapped from start to end."""
        inside: list[tuple[int, int, int, int]] = []
        outside: list[tuple[int, int, int, int]] = []
        for low, high, physical, perm in self.pieces:
            for a, b, out in (
                (low, min(high, start), True),
                (max(low, start), min(high, end), False),
                (max(low, end), high, True),
            ):
                if a < b:
                    (outside if out else inside).append((a, b, physical + a - low, perm))
        self.pieces = outside
        return inside

    def fits(self, iova: int, physical: int, length: int, perm: int) -> bool:
        """Whether all that is mapped there is mapped just so."""
        for low, high, at, allowed in self.pieces:
            a, b = max(low, iova), min(high, iova + length)
            if a < b and (at + a - low != physical + a - iova or perm != allowed):
                return False
        return True

    def map(self, iova: int, physical: int, length: int, perm: int) -> None:
        """As PageTable.map()."""
        self.cut(iova, iova + length)
        self.pieces.append((iova, iova + length, physical, perm))

    def unmap(self, iova: int, length: int) -> int:
        """As PageTable.unmap()."""
        return sum(b - a for a, b, _p, _perm in self.cut(iova, iova + length))

    def protect(self, iova: int, length: int, perm: int) -> int:
        """As PageTable.protect()."""
        inside = self.cut(iova, iova + length)
        self.pieces += [(a, b, physical, perm) for a, b, physical, _old in inside]
        return sum(b - a for a, b, _p, _perm in inside)

    def joined(self) -> list[tuple[int, int, int, int]]:
        """``(iova, physical, length, perm)``, neighbours joined, as PageTable.mappings()."""
        out: list[tuple[int, int, int, int]] = []
        for a, b, physical, perm in sorted(self.pieces):
            if out and out[-1][0] + out[-1][2] == a and out[-1][3] == perm:
                last = out[-1]
                if last[1] + last[2] == physical:
                    out[-1] = (last[0], last[1], last[2] + b - a, perm)
                    continue
            out.append((a, physical, b - a, perm))
        return out


class Domain:
    """Page tables in a region of their own, whose pool is in two pieces out of order."""

    def __init__(
        self,
        levels: int = 4,
        *,
        pages: int = 512,
        largest: int = 3,
        record_words: int = 16384,
    ) -> None:
        self.levels = levels
        self.options = {"levels": levels, "largest": largest, "record_words": record_words}
        self.region = Region.anonymous(16 * MIB, phys_base=PHYS_BASE)
        half = pages // 2 * PAGE
        self.memory = Memory(self.region, [(8 * MIB, half), (2 * MIB, pages * PAGE - half)])
        self.table = self.open()

    def open(self, commit: object = None) -> PageTable:
        """The tables as a mount finds them."""
        store = store_words(self.region) if commit is None else commit
        return PageTable(self.memory, store, **self.options)  # type: ignore[arg-type]

    def image(self) -> bytes:
        """Every byte of the region that may hold tables."""
        return self.region.read(0, 12 * MIB)

    def at(self, iova: int) -> tuple[int, int] | None:
        """``(physical, perm)`` as the walker finds it."""
        t = translate_domain(self.memory, self.table.root, self.levels, iova)
        return None if t.physical is None else (t.physical, t.perm)

    def leaf_levels(self, start: int, end: int) -> dict[int, int]:
        """How many leaves of each level there are in a range."""
        counts: dict[int, int] = {}
        for m in self.table.mappings(start, end):
            at = m.iova
            while at < m.iova + m.length:
                t = translate_domain(self.memory, self.table.root, self.levels, at)
                counts[t.level] = counts.get(t.level, 0) + 1
                at += leaf_bytes(t.level)
        return counts

    def verify(self, model: Model, probes: list[int]) -> None:
        """The walker and the scan agree with the model, and the check is clean."""
        assert [tuple(m) for m in self.table.mappings()] == model.joined()
        limit = 1 << width_bits(self.levels)
        for probe in probes:
            for iova in (probe - 1, probe, probe + PAGE - 1):
                if 0 <= iova < limit:
                    assert self.at(iova) == model.at(iova), hex(iova)
        pool = TablePool(self.region, self.memory.pieces)
        report = check_tree(pool, self.table.root, self.levels)
        assert not report.findings
        assert pool.used_pages == self.table.used_pages
        assert pool.free_pages == self.table.free_pages

    def close(self) -> None:
        """Give the memory back."""
        self.region.close()
