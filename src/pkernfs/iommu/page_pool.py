"""The pages of page tables, and the loops over them that are pagetable.c's.

Everything of :mod:`pkernfs.iommu` that touches cffi pointers is here; what the entries mean is
:mod:`pkernfs.vtd.entries`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pkernfs.errors import RegionError, TableDamageError
from pkernfs.iommu.memory import Piece
from pkernfs.layout import BLOCK, PAGE, PAGES_PER_BLOCK
from pkernfs.native._native import ffi, lib
from pkernfs.quantities import Iova, PageNo, PhysAddr, PhysRange, RegionOff
from pkernfs.region.region import Region
from pkernfs.vtd.entries import ENTRIES


class Mapping(NamedTuple):
    """Consecutive addresses that map consecutive memory; ``perm`` has bit 0 for R, 1 for W."""

    iova: Iova
    physical: PhysAddr
    length: int
    perm: int


class RawFinding(NamedTuple):
    """One finding of pagetable.c's walk: a code, and the entry (its address, what it holds)."""

    code: int
    level: int
    iova: Iova
    where: PhysAddr
    value: int


class Scanned(NamedTuple):
    """Some mappings, and the address to go on from; None: that is all."""

    mappings: list[Mapping]
    next: Iova | None


class Copied(NamedTuple):
    """A copy of a table (its physical address or ``PT_NONE``), and the bytes that it maps."""

    table: PhysAddr
    mapped_bytes: int


class Reserved(NamedTuple):
    """Bits that must be zero in entries of one level."""

    table: int
    leaf: int


class TreeFigures(NamedTuple):
    """The figures of one walk: the first findings, how many there were, and sizes."""

    findings: list[RawFinding]
    found: int
    tables: int
    leaves: int
    mapped_bytes: int


#: Instead of a physical address, an address or an offset: there is none.
PT_NONE: int = lib.PT_NONE
_SCAN_BATCH = 512
#: So that cffi refuses fewer bytes than C reads.
_C_TABLE = ffi.typeof(f"uint64_t[{ENTRIES}]")
#: What a page is; NEW and FREED are so until the change is committed, DEFERRED until the unit has
#: forgotten what it had cached.
_FREE: int = lib.PAGE_FREE
_REACHABLE: int = lib.PAGE_REACHABLE
_NEW: int = lib.PAGE_NEW
_FREED: int = lib.PAGE_FREED
_DEFERRED: int = lib.PAGE_DEFERRED


class TablePool:
    """The pages of one domain's page tables, as the loops of pagetable.c see them.

    Which pages are in use is found by :meth:`check`. A change runs between :meth:`begin` and
    :meth:`commit` or :meth:`abort`; pages that it allocates are not reachable before the caller's
    commit, and those that it frees stay as they are until then.

    :param region: that the offsets are in; None: no page is one of a table, or looked at.
    :param pieces: whole pages, sorted.
    :param tables: False: no page of it is one of a table; it costs no byte for each page.
    :raises RegionError: a piece is not whole pages inside the region.
    """

    def __init__(
        self, region: Region | None, pieces: Sequence[Piece], *, tables: bool = True
    ) -> None:
        tables = tables and region is not None
        self._base = ffi.NULL if region is None else region.base
        size, name = (1 << 63, "memory") if region is None else (region.size, region.name)
        self._pieces = ffi.new("struct pk_piece[]", len(pieces))
        first = 0
        for at, (physical, offset, length) in enumerate(pieces):
            if (physical | offset | length) % PAGE or not 0 < length <= size - offset:
                raise RegionError(f"memory at {physical:#x}: not whole pages of {name}")
            self._pieces[at] = (physical, offset, length, first)
            first += length // PAGE
        self._state = bytearray(first if tables else 0)
        self._state_c = ffi.from_buffer("uint8_t[]", self._state)
        self._pool = ffi.new("struct pk_pool *")
        self._pool.pieces = self._pieces
        self._pool.n_pieces = len(pieces)
        self._pool.state = self._state_c
        self._pool.n_pages = len(self._state)
        #: Where the last piece ends in the region, in bytes.
        self._end = max((offset + length for _physical, offset, length in pieces), default=0)

    # ------------------------------------------------------------------ pages

    @property
    def free_pages(self) -> int:
        """Pages that a change may allocate."""
        return self._state.count(_FREE)

    @property
    def used_pages(self) -> int:
        """Pages that are reachable from the top-level table."""
        return self._state.count(_REACHABLE)

    def begin(self) -> None:
        """Start a change."""
        pool = self._pool
        pool.cursor = pool.wanted = pool.peak = 0
        pool.free = self._state.count(_FREE)

    @property
    def missing_pages(self) -> int:
        """The number of pages that the change lacks so far."""
        return max(0, int(self._pool.peak - self._pool.free))

    def commit(self, *, deferred: bool) -> None:
        """Make allocated pages reachable, and freed ones free, or ``deferred``."""
        self._become({_NEW: _REACHABLE, _FREED: _DEFERRED if deferred else _FREE})

    def abort(self) -> None:
        """Take back what the change has allocated and freed."""
        self._become({_NEW: _FREE, _FREED: _REACHABLE})

    def release(self) -> None:
        """Make deferred pages free."""
        self._become({_DEFERRED: _FREE})

    def _become(self, changes: dict[int, int]) -> None:
        table = bytes(changes.get(state, state) for state in range(256))
        self._state[:] = self._state.translate(table)

    def is_reachable(self, physical: PhysAddr) -> bool:
        """Tell if the walk has found a table there that is still wanted."""
        return bool(lib.pk_pt_is_reachable(self._pool, physical))

    def alloc(self) -> PhysAddr:
        """Allocate a page: its physical address, or ``PT_NONE``; pages that lack are counted."""
        return PhysAddr(lib.pk_pt_alloc(self._pool))

    def free(self, physical: PhysAddr) -> None:
        """Free the page of a table."""
        lib.pk_pt_free(self._pool, physical)

    def new_pages(self) -> Iterator[RegionOff]:
        """Region offsets of the pages that the change has allocated."""
        at = self._state.find(_NEW)
        for piece in self._pieces:
            while 0 <= at < piece.first + piece.length // PAGE:
                yield RegionOff(piece.offset + (at - piece.first) * PAGE)
                at = self._state.find(_NEW, at + 1)

    # ------------------------------------------------------------------ tables

    def build(self, level: int, leaf: int, physical: PhysAddr, perm: int) -> PhysAddr:
        """A new full table that maps memory from ``physical`` on; its address or ``PT_NONE``."""
        return PhysAddr(lib.pk_pt_build(self._base, self._pool, level, leaf, physical, perm))

    def verify(self, table: PhysAddr, level: int, physical: PhysAddr, perm: int) -> int | None:
        """Offset in bytes of the first page that is mapped to something else; None: no page."""
        found = int(lib.pk_pt_verify(self._base, self._pool, table, level, physical, perm))
        return None if found == PT_NONE else found

    def drop(self, table: PhysAddr, level: int) -> int:
        """Free a table and all below it; the bytes that it mapped."""
        return int(lib.pk_pt_drop(self._base, self._pool, table, level))

    def copy(self, table: PhysAddr, level: int, perm: int) -> Copied:
        """A copy of a table and all below it with other permissions; the old ones are freed.

        :raises TableDamageError: something below the table is no reachable table.
        """
        mapped = ffi.new("uint64_t *")
        new = PhysAddr(lib.pk_pt_copy(self._base, self._pool, table, level, perm, mapped))
        if new == lib.PT_BROKEN:
            raise TableDamageError(f"page table at {table:#x}: damaged below: run the check")
        return Copied(new, int(mapped[0]))

    def scan(self, root: PhysAddr, levels: int, start: Iova, end: Iova) -> Scanned | None:
        """Some mappings from ``start`` on; None: the tables are damaged."""
        out = ffi.new("struct pk_mapping[]", _SCAN_BATCH)
        at = ffi.new("uint64_t *", start)
        count = int(lib.pk_pt_scan(self._base, self._pool, root, levels, at, end, out, _SCAN_BATCH))
        if count < 0:
            return None
        found = [Mapping(m.iova, m.physical, m.length, m.bits) for m in out[0:count]]
        return Scanned(found, None if at[0] == PT_NONE else Iova(at[0]))

    def mark(self, root: PhysAddr, levels: int, memory: TablePool, blocks: bytearray) -> bool:
        """Set the byte of each 2 MiB block that a leaf below ``root`` maps something of.

        ``memory`` says where the region's blocks are. Tables that cannot be reached are passed by:
        False.

        :raises RegionError: there are fewer bytes in ``blocks`` than ``memory`` has blocks.
        """
        if len(blocks) * BLOCK < memory._end:
            raise RegionError(f"blocks: got {len(blocks)}, expected up to {memory._end:#x} bytes")
        blocks_c = ffi.from_buffer("uint8_t[]", blocks)
        seen = ffi.new("uint8_t[]", len(self._state))
        done = lib.pk_pt_mark(self._base, self._pool, root, levels, memory._pool, blocks_c, seen)
        return bool(done == 0)

    def find(self, root: PhysAddr, levels: int, ranges: Sequence[PhysRange]) -> Iova | None:
        """The lowest address that is mapped to one of sorted ranges."""
        if not ranges:
            return None
        ranges_c = ffi.new("uint64_t[]", _flat(ranges))
        seen = ffi.new("uint8_t[]", len(self._state))
        found = Iova(
            lib.pk_pt_find(self._base, self._pool, root, levels, ranges_c, len(ranges), seen)
        )
        return None if found == PT_NONE else found

    def check(
        self,
        root: PhysAddr,
        levels: int,
        *,
        reserved: Sequence[Reserved],
        allowed: Sequence[PhysRange],
        tables: Sequence[PhysRange],
        max_findings: int,
    ) -> TreeFigures:
        """Walk all tables below ``root``, each once, and note which pages they are.

        ``reserved`` is for each level from 0 on; ``allowed`` and ``tables`` are sorted: what leaves
        may, and must not, reach.
        """
        self._state[:] = bytes(len(self._state))
        c = ffi.new("struct pk_check *")
        c.table_reserved = [one.table for one in reserved]
        c.leaf_reserved = [one.leaf for one in reserved]
        allowed_c = ffi.new("uint64_t[]", _flat(allowed))
        tables_c = ffi.new("uint64_t[]", _flat(tables))
        found_c = ffi.new("struct pk_finding[]", max_findings)
        c.allowed, c.n_allowed = allowed_c, len(allowed)
        c.tables, c.n_tables = tables_c, len(tables)
        c.found, c.max_found = found_c, max_findings
        lib.pk_pt_check(self._base, self._pool, c, root, levels)
        findings = [
            RawFinding(f.code, f.level, f.iova, f.where, f.value)
            for f in found_c[0 : min(c.n_found, max_findings)]
        ]
        return TreeFigures(findings, c.n_found, c.n_seen, c.n_leaves, c.bytes)


def _flat(ranges: Sequence[PhysRange]) -> list[PhysAddr]:
    """The starts and ends in turn, or a zero: never empty."""
    return [address for pair in ranges for address in pair] or [PhysAddr(0)]


class BlockMap:
    """The 2 MiB blocks of a region that page tables map, a byte each.

    :param pieces: where the region's physical addresses are, as for :class:`TablePool`.
    """

    def __init__(self, region: Region | None, pieces: Sequence[Piece]) -> None:
        self._memory = TablePool(region, pieces, tables=False)
        self._pieces = pieces
        end = max((piece.offset + piece.length for piece in pieces), default=0)
        self._blocks = bytearray(-(-(region.size if region is not None else end) // BLOCK))

    @classmethod
    def of_memory(cls, ranges: Iterable[PhysRange]) -> BlockMap:
        """One of memory outside the region: sorted, disjoint ranges of whole blocks."""
        pieces: list[Piece] = []
        offset = 0
        for start, end in ranges:
            pieces.append(Piece(start, RegionOff(offset), end - start))
            offset += end - start
        return cls(None, pieces)

    def marked(self) -> Iterator[PhysRange]:
        """The blocks that are marked, ascending; neighbours are one."""
        for physical, offset, length in self._pieces:
            first, last = offset // BLOCK, (offset + length) // BLOCK
            low = self._blocks.find(1, first, last)
            while low >= 0:
                high = self._blocks.find(0, low, last)
                high = last if high < 0 else high
                start = PhysAddr(physical + (low - first) * BLOCK)
                yield PhysRange.of(start, (high - low) * BLOCK)
                low = self._blocks.find(1, high, last)

    def clear(self) -> None:
        """Unmark all blocks."""
        self._blocks[:] = bytes(len(self._blocks))

    def add_tree(self, pool: TablePool, root: PhysAddr, levels: int) -> bool:
        """Mark what the tables below ``root`` map; False if they are damaged and it is not all."""
        return pool.mark(root, levels, self._memory, self._blocks)

    def any(self, offset: RegionOff, length: int) -> bool:
        """Tell if a block of that range is marked."""
        return self._blocks.find(1, offset // BLOCK, -(-(offset + length) // BLOCK)) >= 0

    def any_page(self, first: PageNo, count: int) -> bool:
        """Tell if a block of those pages is marked."""
        end = -(-(first + count) // PAGES_PER_BLOCK)
        return self._blocks.find(1, first // PAGES_PER_BLOCK, end) >= 0


def fill_entries(words: memoryview, first: int, step: int) -> None:
    """A run of leaves into those of ``words`` (8-byte items) that are not present."""
    entries = ffi.from_buffer("uint64_t[]", words)
    lib.pk_pt_fill(entries, first, step, len(entries))


def conflicting_entry(words: memoryview, first: int, step: int) -> int:
    """Index of the first entry that is present and not what that run has there; or the length."""
    entries = ffi.from_buffer("uint64_t[]", words)
    return int(lib.pk_pt_conflict(entries, first, step, len(entries)))


def any_present(words: memoryview) -> bool:
    """Tell if one of the entries is present."""
    entries = ffi.from_buffer("uint64_t[]", words)
    return bool(lib.pk_pt_any(entries, len(entries)))


def merged_entry(words: memoryview, step: int) -> int:
    """The leaf that can stand for a whole table of leaves of ``step`` bytes; 0: none can."""
    return int(lib.pk_pt_merged(ffi.from_buffer(_C_TABLE, words), step))
