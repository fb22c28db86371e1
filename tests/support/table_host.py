"""root-pgtables, two domains and a file, in one region: for the tests of pkernfs.iommu."""

from __future__ import annotations

from pkernfs.iommu.check import Report, check
from pkernfs.iommu.config import Config, configure
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory, store_words
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.page_walk import Code
from pkernfs.iommu.root_tables import RootTables
from pkernfs.iommu.translate import Translation, translate
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, PhysRange, RegionOff, RegionRun, SourceId
from pkernfs.region.region import Region
from support.page_tables import GIB, MIB, PHYS_BASE

ROOT = RegionOff(0)
DOM_0 = RegionOff(MIB)
DOM_1 = RegionOff(2 * MIB)
DATA = 4 * MIB
DEVICE = SourceId(0x28)


class TableHost:
    """root-pgtables, two domains and a file of 4 MiB, in one region."""

    def __init__(self, mode: Mode = Mode.LEGACY, levels: int = 4) -> None:
        self.region = Region.anonymous(8 * MIB, phys_base=PHYS_BASE)
        self.commit = store_words(self.region)
        self.root = Memory(self.region, [RegionRun(ROOT, 16 * PAGE)])
        self.domains = {
            "dom-0": Memory(self.region, [RegionRun(DOM_0, 64 * PAGE)]),
            "dom-1": Memory(self.region, [RegionRun(DOM_1, 64 * PAGE)]),
        }
        configure(self.root, self.commit, Config(mode, levels))
        self.levels = levels
        self.mode = mode
        self.tables = RootTables(self.root, self.commit)
        self.first = self.table("dom-0")
        self.first.map(Iova(0), PhysAddr(PHYS_BASE + DATA), 4 * MIB, 3)
        self.first.unmap(Iova(MIB), PAGE)
        self.table("dom-1").map(Iova(GIB), PhysAddr(PHYS_BASE + DATA), 2 * MIB, 1)
        self.tables.attach(DEVICE, self.first.root, 2)
        self.tables.attach(SourceId(0x1F8), self.domains["dom-1"].first_page, 3)

    def table(self, name: str) -> PageTable:
        return PageTable(self.domains[name], self.commit, levels=self.levels)

    def check(self, allowed: tuple[int, int] = (DATA, 8 * MIB)) -> Report:
        start, end = allowed
        physical = PhysRange.of(PhysAddr(PHYS_BASE + start), end - start)
        return check(self.root, self.domains, [physical])

    def walk(self, iova: Iova, source_id: SourceId = DEVICE, access: int = 0) -> Translation:
        memory = Memory.whole(self.region)
        return translate(
            memory, self.root.first_page, source_id, iova, mode=self.mode, access=access
        )

    def word(self, offset: RegionOff) -> int:
        return int(self.region.view(offset, 8).cast("Q")[0])

    def entry(self, iova: Iova, level: int) -> RegionOff:
        """Region offset of the entry that translates ``iova`` at a level, in dom-0."""
        names = {4: "PML4E", 3: "PDPE", 2: "PDE", 1: "PTE"}
        step = next(s for s in self.walk(iova).steps if s.name == names[level])
        return RegionOff(step.address - PHYS_BASE)

    def store(self, offset: RegionOff, word: int) -> None:
        self.region.store_u64(offset, word)


def codes(report: Report) -> set[Code]:
    """The codes of all findings, which have messages."""
    for finding in report.findings:
        assert "\n" not in finding.message
        assert f"{finding.where:#x}" in finding.message
    return {finding.code for finding in report.findings}
