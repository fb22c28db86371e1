"""Pass 12: the IOMMU's tables in /iommu, checked by the code that `pkernfs iommu check` uses.

Nothing of them is repaired: what a table should say cannot be guessed, and a device may be using
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pkernfs.errors import InvalidError, TableDamageError
from pkernfs.fs.fsck.context import Context
from pkernfs.fs.fsck.data import extents_of
from pkernfs.fs.fsck.names import entries_of
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.structures import T_REG, has_segment
from pkernfs.layout import INODE_FLAG_TABLE, IOMMU_INO, PAGE, Extent, page_offset
from pkernfs.quantities import Ino, PhysRange, RegionOff, RegionRun, SegmentNo
from pkernfs.region.region import Region

if TYPE_CHECKING:
    from pkernfs.iommu.check import Report
    from pkernfs.iommu.memory import Memory

_ROOT = b"root-pgtables"
_WHERE = "iommu"


def check_tables(ctx: Context) -> None:
    """Check every table that a device, or a domain's first page, leads to."""
    files = _table_files(ctx)
    if not files or all(_is_empty(ctx, name, extents) for name, extents in files.items()):
        return
    try:
        report = _check(ctx, files)
    except InvalidError as e:
        ctx.report.add(Code.TABLES_UNCHECKED, _WHERE, reason=str(e))
        return
    except TableDamageError as e:  # such that nothing tells where the tables are good
        ctx.report.add(Code.TABLES_BAD, _WHERE, fixable=False, reason=str(e))
        return
    for finding in report.findings:
        ctx.report.add(
            Code.TABLES_BAD,
            _WHERE,
            fixable=False,
            reason=f"{finding.code.name}: {finding.message}",
        )


def _table_files(ctx: Context) -> dict[bytes, list[Extent]]:
    """Find each table file of /iommu that has data, by its name."""
    found: dict[bytes, list[Extent]] = {}
    if not ctx.inodes.type_of(IOMMU_INO):
        return found
    for entry in entries_of(ctx, IOMMU_INO):
        ino = entry.target
        if ctx.inodes.type_of(ino) == T_REG and ctx.fields(ino).flags & INODE_FLAG_TABLE:
            extents = _extents(ctx, ino)
            if extents:
                found[entry.name] = extents
    return found


def _extents(ctx: Context, ino: Ino) -> list[Extent]:
    extents = ctx.extents.get(ino)
    if extents is None:
        extents = extents_of(ctx, ino, ctx.inode_page(ino), ctx.fields(ino))
    return extents


def _is_empty(ctx: Context, name: bytes, extents: list[Extent]) -> bool:
    _, page, count = extents[0]
    pages = 2 if name == _ROOT else 1  # the root table, and the configuration
    return ctx.image.region.is_zero(page_offset(page), min(pages, count) * PAGE)


def _check(ctx: Context, files: dict[bytes, list[Extent]]) -> Report:
    # Loaded where there are tables only: a handover is in a hurry.
    from pkernfs.iommu.check import check
    from pkernfs.iommu.config import assume_addresses, load_bars
    from pkernfs.iommu.memory import Memory, merge_ranges

    region = ctx.image.region
    root_extents = files.get(_ROOT)
    if root_extents is not None:
        assume_addresses(region, RegionOff(page_offset(root_extents[0].page) + PAGE))
    memories = {
        name: Memory(region, [RegionRun(page_offset(e.page), e.pages * PAGE) for e in extents])
        for name, extents in files.items()
    }
    root = memories.pop(_ROOT, None)
    ranges = merge_ranges(_linked_ranges(ctx, region))
    if root is not None:
        _check_tables_address(root)
        ranges += [bar.range for bar in load_bars(root)]
    domains = {name.decode(errors="replace"): memory for name, memory in memories.items()}
    return check(root, domains, ranges)


def _check_tables_address(root: Memory) -> None:
    """:raises InvalidError: the tables were made for another place."""
    from pkernfs.iommu.config import config_page, load_config

    try:
        home = load_config(root).home
    except TableDamageError:
        return  # the check says so
    if home not in (0, config_page(root)):
        raise InvalidError(
            f"they were made for {home:#x}, but root-pgtables is at {config_page(root):#x}"
        )


def _linked_ranges(ctx: Context, region: Region) -> Iterator[PhysRange]:
    """Physical ranges of the data of files that have a name and are no tables."""
    for ino in ctx.inodes.of_type(T_REG):
        if not ctx.inodes.names[ctx.inodes.row(ino)] or ctx.fields(ino).flags & INODE_FLAG_TABLE:
            continue
        if has_segment(ctx.fields(ino)):
            row = ctx.segments.rows.get(SegmentNo(ctx.fields(ino).body))
            yield from () if row is None else row.pieces
            continue
        for _, page, pages in _extents(ctx, ino):
            for _, count, physical in region.physical_runs(page_offset(page), pages * PAGE):
                if physical is not None:
                    yield PhysRange.of(physical, count)
