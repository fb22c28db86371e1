"""The pins of tables: memory that they map, and table files that something refers to.

It is found by walking the tables, never from a record of its own that could disagree with them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from pkernfs.dma.open_tables import OpenTables
from pkernfs.dma.unit_notices import UnitNotices
from pkernfs.errors import BusyError
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.host.iomem import Span
from pkernfs.iommu.config import Config
from pkernfs.iommu.memory import Memory, merge_ranges
from pkernfs.iommu.page_pool import BlockMap
from pkernfs.layout import BLOCK, PAGE, Extent, page_offset
from pkernfs.quantities import Ino, PhysAddr, PhysRange, RegionOff, RegionRun
from pkernfs.region.region import Region
from pkernfs.vtd.entries import bdf_text

log = logging.getLogger(__name__)

_MOST_ANSWERS = 1024


class _Answers:
    """Answers about memory outside the region, while the tables have one generation."""

    def __init__(self, generation: int = -1) -> None:
        self.generation = generation
        self.holders: dict[tuple[PhysRange, ...], str | None] = {}
        self.held: dict[tuple[PhysRange, ...], list[Span]] = {}


class Pinned:
    """The memory and the files that the tables of one mounted file system pin."""

    def __init__(self, region: Region, tables: OpenTables, units: UnitNotices) -> None:
        self._region = region
        self._tables = tables
        self._units = units
        self._map: BlockMap | None = None
        self._shift = 0  # of the addresses in it
        self._generation = -1  # of the tables, when the map was made
        self._answers = _Answers()

    # ------------------------------------------------------------------ memory

    def holder(self, extents: Iterable[Extent]) -> str | None:
        """Name what maps a byte of these; None: nothing does."""
        if not self._tables.trees:
            return None
        blocks = self._block_map()
        wanted = [e for e in extents if blocks.any_page(e.page, e.pages)]
        if not wanted:
            return None
        runs = [RegionRun(page_offset(e.page), e.pages * PAGE) for e in wanted]
        return self._mapped_by(Memory(self._region, runs, self._tables.shift or 0).ranges)

    def holder_of_memory(self, pieces: Iterable[Span]) -> str | None:
        """Name what maps a byte of memory outside the region; None: nothing does."""
        if not self._tables.trees:
            return None
        ranges = merge_ranges(PhysRange(p.start, p.end) for p in pieces)
        known, key = self._known().holders, tuple(ranges)
        if key not in known:
            known[key] = self._mapped_by(ranges)
        return known[key]

    def held_memory(self, pieces: Iterable[Span]) -> list[Span]:
        """What of memory outside the region is mapped, in whole 2 MiB blocks, ascending."""
        ranges = merge_ranges(_whole_blocks(p) for p in pieces)
        if not ranges or not self._tables.trees:
            return []
        known, key = self._known().held, tuple(ranges)
        if key not in known:
            blocks = BlockMap.of_memory(ranges)
            self._mark(blocks)
            known[key] = [Span(r.start, r.end - r.start) for r in blocks.marked()]
        return list(known[key])

    def _known(self) -> _Answers:
        """What is known of the tables as they are: each answer takes a walk of all of them."""
        answers = self._answers
        count = len(answers.holders) + len(answers.held)
        if answers.generation != self._tables.generation or count >= _MOST_ANSWERS:
            self._answers = _Answers(self._tables.generation)
        return self._answers

    def _mapped_by(self, ranges: list[PhysRange]) -> str | None:
        """Name what maps a byte of sorted, disjoint ranges."""
        for number, tree in sorted(self._tables.trees.items()):
            iova = tree.find(ranges)
            if iova is not None:
                return f"dom-{number} maps it at iova {iova:#x}"
        return None

    def may_be_mapped(self, offset: RegionOff, length: int) -> bool:
        """True if something of the 2 MiB blocks of a range of the region is mapped."""
        return self._block_map().any(offset, length)

    def _block_map(self) -> BlockMap:
        """The blocks that are mapped; made again after a change, when it is asked for."""
        shift = self._tables.shift or 0
        if self._map is None or self._shift != shift:
            memory = Memory.whole(self._region, shift) if shift else self._tables.region_memory()
            self._map, self._shift = BlockMap(self._region, memory.pieces), shift
            self._generation = -1
        if self._generation != self._tables.generation:
            self._map.clear()
            self._mark(self._map)
            self._generation = self._tables.generation
        return self._map

    def _mark(self, blocks: BlockMap) -> None:
        for number, tree in self._tables.trees.items():
            if not tree.mark(blocks):
                log.error("iommu/dom-%d: damaged: not all that it maps is known", number)

    # ------------------------------------------------------------------ table files

    def check_unused(self, ino: Ino) -> None:
        """:raises BusyError: a table file that must stay as it is, and why."""
        name = next((n for n, file in self._tables.files.items() if file.ino == ino), None)
        if name is None:
            return
        if self._tables.being_read:
            raise BusyError(f"iommu/{name.decode()}: it is being checked: try again")
        holder = self._table_holder(name)
        if holder is not None:
            raise BusyError(f"iommu/{name.decode()}: in use: {holder}")

    def _table_holder(self, name: bytes) -> str | None:
        tables = self._tables
        if tables.files[name].size == 0:
            return None
        if tables.relocated is not None:  # no unit can be walking tables that have moved for good
            return None if tables.shift is None else tables.relocated
        if ROOT_PGTABLES in tables.damaged:
            return "root-pgtables is damaged, and may refer to it: run fsck.pkernfs"
        if tables.root is None:
            return self._kernel_holder(name)
        devices = tables.root.devices()
        if name != ROOT_PGTABLES:
            memory = Memory(self._region, tables.extents_of(tables.files[name]))
            devices = [d for d in devices if memory.offset(d.table) is not None]
        if name == ROOT_PGTABLES and tables.active_units is not None:
            return f"{tables.active_units.names} walks it"
        if devices:
            return f"device {bdf_text(devices[0].source_id)} is attached"
        if name == ROOT_PGTABLES and (tables.config.levels != Config().levels or tables.bars()):
            return tables.mapped_domain()  # what its tables are like is told nowhere else
        return self._kernel_holder(name)

    def _kernel_holder(self, name: bytes) -> str | None:
        """Name the entry of the running kernel that leads to a domain's tables."""
        if self._units.kernel_adopted is not None and name != ROOT_PGTABLES:
            top = self._tables.memory_of(self._tables.files[name]).first_page
            for entry in self._units.kernel_adopted.entries():
                if entry.table == top:
                    return f"{entry}, and the kernel has that unit"
        return None


def _whole_blocks(piece: Span) -> PhysRange:
    """The 2 MiB blocks that a piece of memory has something of."""
    start, end = piece.start // BLOCK * BLOCK, -(-piece.end // BLOCK) * BLOCK
    return PhysRange(PhysAddr(start), PhysAddr(end))
