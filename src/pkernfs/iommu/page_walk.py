"""Walks over all of one domain's page tables: what is mapped, what is wrong, and each leaf.

All that has to be fast is in C (pagetable.c); :func:`leaves` is for who wants entries as they are.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pkernfs.errors import TableDamageError
from pkernfs.iommu.memory import Words
from pkernfs.iommu.page_pool import BlockMap, Mapping, RawFinding, Reserved, TablePool
from pkernfs.quantities import Iova, PhysAddr, PhysRange
from pkernfs.vtd.entries import (
    ADDRESS_MASK,
    ENTRIES,
    LEAVES,
    LEVELS,
    MAX_PHYSICAL_BITS,
    SecondStageTable,
    is_leaf,
    is_present,
    leaf_bytes,
)

MAX_FINDINGS = 1000
_EVERYWHERE = (PhysRange(PhysAddr(0), PhysAddr(1 << 63)),)
_FIRST = Iova(0)


class Code(enum.IntEnum):
    """The kinds of findings about reachable entries."""

    TABLE_OUTSIDE = 1
    TABLE_TWICE = 2
    RESERVED_BITS = 3
    LEAF_OUTSIDE = 4
    LEAF_IS_TABLE = 5
    CONTEXT_INVALID = 6
    UNKNOWN_DOMAIN = 7
    DOMAIN_ID = 8
    CONFIGURATION = 9
    INTERRUPT_RANGE = 10


_TEXTS = {
    Code.TABLE_OUTSIDE: "refers to a table outside the domain's file",
    Code.TABLE_TWICE: "refers to a table that was reached before (shared, or a cycle)",
    Code.RESERVED_BITS: "reserved bits set",
    Code.LEAF_OUTSIDE: "maps memory that is no live file's",
    Code.LEAF_IS_TABLE: "maps memory that holds tables",
}


class Finding(NamedTuple):
    """One thing that is wrong: ``where`` is the physical address of the entry."""

    code: Code
    where: PhysAddr
    message: str


class TreeReport(NamedTuple):
    """Findings (the first 1000; ``found`` is how many there are), and what was seen."""

    findings: list[Finding]
    found: int
    tables: int
    leaves: int
    mapped_bytes: int


class Tree(NamedTuple):
    """One domain's tables as they are, sound or not: what their leaves reach.

    ``levels`` are the numbers of levels that they may have: several, if that is not known.
    """

    pool: TablePool
    root: PhysAddr
    levels: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """True if nothing is mapped."""
        return self.find(_EVERYWHERE) is None

    def mark(self, blocks: BlockMap) -> bool:
        """Mark the 2 MiB blocks of the region that are mapped; False: not all can be reached."""
        done = [blocks.add_tree(self.pool, self.root, levels) for levels in self.levels]
        return all(done)

    def find(self, ranges: Sequence[PhysRange]) -> Iova | None:
        """The lowest address that is mapped to one of sorted ranges."""
        found = (self.pool.find(self.root, levels, ranges) for levels in self.levels)
        return min((iova for iova in found if iova is not None), default=None)


def check_tree(
    pool: TablePool,
    root: PhysAddr,
    levels: int,
    *,
    allowed: Sequence[PhysRange] = _EVERYWHERE,
    tables: Sequence[PhysRange] = (),
    physical_bits: int = MAX_PHYSICAL_BITS,
    name: str = "domain",
) -> TreeReport:
    """Look at every reachable entry once; afterwards the pool knows which pages are in use.

    :param allowed: sorted, disjoint ranges that leaves may map.
    :param tables: the same, of all memory that holds tables.
    """
    reserved = [Reserved(0, 0)] + [
        Reserved(
            SecondStageTable.reserved(physical_bits),
            LEAVES[level].reserved(physical_bits) if level in LEAVES else 0,
        )
        for level in range(1, max(LEVELS) + 1)
    ]
    figures = pool.check(
        root, levels, reserved=reserved, allowed=allowed, tables=tables, max_findings=MAX_FINDINGS
    )
    findings = [_finding(name, f) for f in figures.findings]
    return TreeReport(findings, *figures[1:])


def _finding(name: str, f: RawFinding) -> Finding:
    code = Code(f.code)
    place = f"{name} level {f.level} entry at {f.where:#x}, iova {f.iova:#x}"
    return Finding(code, f.where, f"{place}: {_TEXTS[code]}: got {f.value:#018x}")


def scan_tree(
    pool: TablePool, root: PhysAddr, levels: int, start: Iova, end: Iova
) -> Iterator[Mapping]:
    """List what is mapped from ``start`` to ``end``, in order, neighbours joined.

    Memory does not grow with the number of leaves.

    :raises TableDamageError: a table outside the pool, or more of them than it has pages.
    """
    at: Iova | None = start
    last: Mapping | None = None
    while at is not None:
        batch = pool.scan(root, levels, at, end)
        if batch is None:
            raise TableDamageError(f"page table at {root:#x}: damaged below: run the check")
        found, at = batch
        for m in found:
            if last is not None and _continues(last, m):
                last = last._replace(length=last.length + m.length)
                continue
            if last is not None:
                yield last
            last = m
    if last is not None:
        yield last


def _continues(last: Mapping, m: Mapping) -> bool:
    return (
        last.iova + last.length == m.iova
        and last.physical + last.length == m.physical
        and last.perm == m.perm
    )


#: The words of the table at a physical address, which is one of that level. It raises where there
#: is none, and where there are too many: tables may refer to each other in circles.
Read = Callable[[PhysAddr, int], tuple[int, ...]]


class Leaf(NamedTuple):
    """An entry that maps memory, and the address that it translates."""

    iova: Iova
    entry: int


class Leaves(NamedTuple):
    """Entries of one table, one after the other, that refer to no table; some are not present.

    ``iova`` is what the first of them translates, ``path`` the entries that led to the table, the
    highest first.
    """

    level: int
    iova: Iova
    entries: tuple[int, ...]
    path: tuple[int, ...]

    def present(self) -> Iterator[Leaf]:
        """Those that are present."""
        size = leaf_bytes(self.level)
        for index, entry in enumerate(self.entries):
            if is_present(entry):
                yield Leaf(Iova(self.iova + index * size), entry)


def leaves(
    read: Read, table: PhysAddr, level: int, *, start: Iova = _FIRST, lowest: int = 1
) -> Iterator[Leaves]:
    """List entries that refer to no table, in order of the addresses, from address ``start`` on.

    :param level: that of the table; entries of tables below level ``lowest`` are left out.
    :raises TableDamageError: ``read`` does.
    """
    return _leaves(read, table, level, _FIRST, (), start, lowest)


def _leaves(
    read: Read,
    table: PhysAddr,
    level: int,
    iova: Iova,
    path: tuple[int, ...],
    start: Iova,
    lowest: int,
) -> Iterator[Leaves]:
    words = read(table, level)
    size = leaf_bytes(level)
    first = min(max(0, start - iova) // size, ENTRIES)
    for index in range(first, ENTRIES if level > 1 else first):
        entry = words[index]
        if not is_present(entry) or is_leaf(entry, level):
            continue
        if first < index:
            yield Leaves(level, Iova(iova + first * size), words[first:index], path)
        first = index + 1
        if level > lowest:
            at = Iova(iova + index * size)
            below = PhysAddr(entry & ADDRESS_MASK)
            yield from _leaves(read, below, level - 1, at, (*path, entry), start, lowest)
    if first < ENTRIES:
        yield Leaves(level, Iova(iova + first * size), words[first:], path)


def reader(memory: Words, most: int) -> Read:
    """Reads up to ``most`` tables that are in some memory, for one walk.

    :raises TableDamageError (of what is returned): a table is elsewhere, or there are more.
    """
    left = most

    def read(physical: PhysAddr, level: int) -> tuple[int, ...]:
        nonlocal left
        left -= 1
        words = memory.words(physical, ENTRIES)
        if words is None or left < 0:
            raise TableDamageError(f"page table at {physical:#x}: damaged: run the check")
        return words

    return read


def without(these: Sequence[Mapping], those: Sequence[Mapping]) -> Iterator[Mapping]:
    """The parts of ``these`` that ``those`` do not map just so; both are in order."""
    first = 0
    for m in these:
        at, end = m.iova, Iova(m.iova + m.length)
        while first < len(those) and those[first].iova + those[first].length <= at:
            first += 1
        here = first
        while here < len(those) and those[here].iova < end:
            other = those[here]
            here += 1
            if other.physical - other.iova != m.physical - m.iova or other.perm != m.perm:
                continue
            if other.iova > at:
                yield _part(m, at, other.iova)
            at = max(at, min(Iova(other.iova + other.length), end))
        if at < end:
            yield _part(m, at, end)


def _part(m: Mapping, start: Iova, end: Iova) -> Mapping:
    return Mapping(start, PhysAddr(m.physical + start - m.iova), end - start, m.perm)
