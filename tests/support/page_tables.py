"""A domain in memory for the tests of pkernfs.iommu, and a model of what it maps."""

from __future__ import annotations

from typing import NamedTuple

from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory, store_words
from pkernfs.iommu.page_pool import Mapping, TablePool
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.page_walk import check_tree
from pkernfs.iommu.translate import translate_domain
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff, RegionRun
from pkernfs.region.region import Region
from pkernfs.vtd.entries import leaf_bytes, width_bits

PHYS_BASE = PhysAddr(1 << 40)
MIB = 1 << 20
GIB = 1 << 30

FAR = 1 << 41  # added to an address that an entry holds, it leads out of all memory


class Damage(NamedTuple):
    """Bits to clear and to set in a word of the entry that a walk reads at ``step``.

    ``reason`` is what a read of an address that goes through a 4 KiB leaf then faults with.
    """

    mode: Mode
    step: str
    word: int
    clear: int
    set: int
    reason: str


#: What may be wrong with entries, and the fault that the specification has for it (7.1.3).
DAMAGE = [
    Damage(Mode.LEGACY, "root entry", 0, 1, 0, "ROOT_ENTRY_P"),
    Damage(Mode.LEGACY, "root entry", 0, 0, 2, "ROOT_ENTRY_RSVD"),
    Damage(Mode.LEGACY, "root entry", 1, 0, 1 << 8, "ROOT_ENTRY_RSVD"),
    Damage(Mode.LEGACY, "root entry", 0, 0, FAR, "CONTEXT_TABLE_INV"),
    Damage(Mode.LEGACY, "context entry", 0, 1, 0, "CONTEXT_ENTRY_P"),
    Damage(Mode.LEGACY, "context entry", 0, 0, 1 << 5, "CONTEXT_ENTRY_RSVD"),
    Damage(Mode.LEGACY, "context entry", 1, 0, 1 << 30, "CONTEXT_ENTRY_RSVD"),
    Damage(Mode.LEGACY, "context entry", 0, 0, 3 << 2, "CONTEXT_ENTRY_INV"),  # TT
    Damage(Mode.LEGACY, "context entry", 1, 7, 0, "CONTEXT_ENTRY_INV"),  # AW
    Damage(Mode.LEGACY, "context entry", 0, 0, FAR, "CONTEXT_ENTRY_INV"),
    Damage(Mode.SCALABLE, "root entry", 0, 1, 0, "SM_ROOT_ENTRY_P"),
    Damage(Mode.SCALABLE, "root entry", 0, 0, 2, "SM_ROOT_ENTRY_RSVD"),
    Damage(Mode.SCALABLE, "root entry", 0, 0, FAR, "SM_CONTEXT_TABLE_INV"),
    Damage(Mode.SCALABLE, "context entry", 0, 1, 0, "SM_CONTEXT_ENTRY_P"),
    Damage(Mode.SCALABLE, "context entry", 0, 0, 1 << 7, "SM_CONTEXT_ENTRY_RSVD"),
    Damage(Mode.SCALABLE, "context entry", 1, 0, 1 << 30, "SM_CONTEXT_ENTRY_RSVD"),
    Damage(Mode.SCALABLE, "context entry", 0, 0, 1 << 4, "SM_CONTEXT_ENTRY_INV"),  # PRE, no DTE
    Damage(Mode.SCALABLE, "context entry", 1, 0, 1 << 13, "SM_CONTEXT_ENTRY_INV"),  # RID_PASID
    Damage(Mode.SCALABLE, "context entry", 0, 0, FAR, "SM_PASID_DIR_ACCESS"),
    Damage(Mode.SCALABLE, "PASID directory entry", 0, 1, 0, "SM_PASID_DIR_ENTRY_P"),
    Damage(Mode.SCALABLE, "PASID directory entry", 0, 0, 4, "SM_PASID_DIR_ENTRY_RSVD"),
    Damage(Mode.SCALABLE, "PASID directory entry", 0, 0, FAR, "SM_PASID_TABLE_ACCESS"),
    Damage(Mode.SCALABLE, "PASID table entry", 0, 1, 0, "SM_PASID_ENTRY_P"),
    Damage(Mode.SCALABLE, "PASID table entry", 0, 0, 1 << 10, "SM_PASID_ENTRY_RSVD"),
    Damage(Mode.SCALABLE, "PASID table entry", 0, 7 << 6, 0, "SM_PASID_ENTRY_INV"),  # PGTT
    Damage(Mode.SCALABLE, "PASID table entry", 0, 7 << 2, 0, "SM_PASID_ENTRY_INV"),  # AW
    Damage(Mode.SCALABLE, "PASID table entry", 0, 0, FAR, "SM_PAGING_ROOT_INV"),
    *(
        Damage(mode, step, 0, clear, bits, reason)
        for mode, prefix in ((Mode.LEGACY, ""), (Mode.SCALABLE, "SM_"))
        for step, clear, bits, reason in (
            ("PML4E", 3, 0, f"{prefix}PAGING_ENTRY_P" if prefix else "READ"),
            ("PML4E", 0, 1 << 7, f"{prefix}PAGING_ENTRY_RSVD"),
            ("PML4E", 0, FAR, f"{prefix}PAGING_ENTRY_INV"),
            ("PDPE", 1, 0, f"{prefix}READ"),
            ("PDPE", 0, 1 << 11, f"{prefix}PAGING_ENTRY_RSVD"),
            ("PDE", 0, 1 << 62, f"{prefix}PAGING_ENTRY_RSVD"),
            ("PDE", 0, 1 << 7 | PAGE, f"{prefix}PAGING_ENTRY_RSVD"),  # a 2 MiB leaf, unaligned
            ("PTE", 3, 0, f"{prefix}PAGING_ENTRY_P" if prefix else "READ"),
            ("PTE", 1, 0, f"{prefix}READ"),
            ("PTE", 0, 1 << 62, f"{prefix}PAGING_ENTRY_RSVD"),
            ("PTE", (1 << 52) - PAGE, 0xFEE0_0000, f"{prefix}INTERRUPT_ADDR"),
        )
    ),
]


def damage_name(damage: Damage) -> str:
    """For the names of tests."""
    change = f"{damage.clear:x}-{damage.set:x}"
    return f"{damage.reason}-{damage.step.replace(' ', '_')}-{damage.word}-{change}"


class Model:
    """What each piece of the address space maps: disjoint ``start: (end, physical, perm)``."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int, int, int]] = []

    def at(self, iova: Iova) -> tuple[int, int] | None:
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

    def fits(self, iova: Iova, physical: PhysAddr, length: int, perm: int) -> bool:
        """Whether all that is mapped there is mapped just so."""
        for low, high, at, allowed in self.pieces:
            a, b = max(low, iova), min(high, iova + length)
            if a < b and (at + a - low != physical + a - iova or perm != allowed):
                return False
        return True

    def map(self, iova: Iova, physical: PhysAddr, length: int, perm: int) -> None:
        """As PageTable.map()."""
        self.cut(iova, iova + length)
        self.pieces.append((iova, iova + length, physical, perm))

    def unmap(self, iova: Iova, length: int) -> int:
        """As PageTable.unmap()."""
        return sum(b - a for a, b, _p, _perm in self.cut(iova, iova + length))

    def protect(self, iova: Iova, length: int, perm: int) -> int:
        """As PageTable.protect()."""
        inside = self.cut(iova, iova + length)
        self.pieces += [(a, b, physical, perm) for a, b, physical, _old in inside]
        return sum(b - a for a, b, _p, _perm in inside)

    def joined(self) -> list[Mapping]:
        """What is mapped, neighbours joined, as PageTable.mappings()."""
        out: list[Mapping] = []
        for a, b, physical, perm in sorted(self.pieces):
            if out and out[-1].iova + out[-1].length == a and out[-1].perm == perm:
                last = out[-1]
                if last.physical + last.length == physical:
                    out[-1] = last._replace(length=last.length + b - a)
                    continue
            out.append(Mapping(Iova(a), PhysAddr(physical), b - a, perm))
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
        self.memory = Memory(
            self.region,
            [
                RegionRun(RegionOff(8 * MIB), half),
                RegionRun(RegionOff(2 * MIB), pages * PAGE - half),
            ],
        )
        self.table = self.open()

    def open(self, commit: object = None) -> PageTable:
        """The tables as a mount finds them."""
        store = store_words(self.region) if commit is None else commit
        return PageTable(self.memory, store, **self.options)  # type: ignore[arg-type]

    def image(self) -> bytes:
        """Every byte of the region that may hold tables."""
        return self.region.read(RegionOff(0), 12 * MIB)

    def at(self, iova: Iova) -> tuple[int, int] | None:
        """``(physical, perm)`` as the walker finds it."""
        t = translate_domain(self.memory, self.table.root, self.levels, iova)
        return None if t.physical is None else (t.physical, t.perm)

    def leaf_levels(self, start: Iova, end: Iova) -> dict[int, int]:
        """How many leaves of each level there are in a range."""
        counts: dict[int, int] = {}
        for m in self.table.mappings(start, end):
            at = m.iova
            while at < m.iova + m.length:
                t = translate_domain(self.memory, self.table.root, self.levels, at)
                counts[t.level] = counts.get(t.level, 0) + 1
                at = Iova(at + leaf_bytes(t.level))
        return counts

    def verify(self, model: Model, probes: list[int]) -> None:
        """The walker and the scan agree with the model, and the check is clean."""
        assert list(self.table.mappings()) == model.joined()
        limit = 1 << width_bits(self.levels)
        for probe in probes:
            for iova in map(Iova, (probe - 1, probe, probe + PAGE - 1)):
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
