"""The pages of page tables: which are free, and that C reaches nothing but them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from pkernfs.native._native import lib

from pkernfs.errors import RegionError, TableDamageError
from pkernfs.iommu.memory import Piece
from pkernfs.iommu.page_pool import (
    PT_NONE,
    BlockMap,
    Mapping,
    Reserved,
    TablePool,
    any_present,
    conflicting_entry,
    fill_entries,
    merged_entry,
)
from pkernfs.iommu.page_walk import Code, check_tree
from pkernfs.layout import BLOCK, PAGE
from pkernfs.quantities import Iova, PhysAddr, PhysRange, RegionOff
from pkernfs.region.region import Region
from pkernfs.vtd.entries import ENTRIES, LEVELS, PS, READ_WRITE
from support.page_tables import GIB, MIB, PHYS_BASE

PAGES = 8
HIGH = PhysAddr(PHYS_BASE + 6 * MIB)
DATA = PhysAddr(1 << 45)
EVERYWHERE = PhysRange(PhysAddr(0), PhysAddr(1 << 52))


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(8 * MIB, phys_base=PHYS_BASE) as made:
        yield made


@pytest.fixture
def pool(region: Region) -> TablePool:
    """Eight pages in two pieces, of which the first is an empty table."""
    made = TablePool(
        region,
        [Piece(PHYS_BASE, RegionOff(0), 4 * PAGE), Piece(HIGH, RegionOff(6 * MIB), 4 * PAGE)],
    )
    assert not check_tree(made, PHYS_BASE, 4).findings
    made.begin()
    return made


def test_pages_of_one_change(pool: TablePool) -> None:
    assert (pool.free_pages, pool.used_pages) == (PAGES - 1, 1)
    taken = [pool.alloc() for _ in range(5)]
    expected = [PHYS_BASE + PAGE * i for i in (1, 2, 3)] + [HIGH, HIGH + PAGE]
    assert taken == expected
    assert list(pool.new_pages()) == [PAGE, 2 * PAGE, 3 * PAGE, 6 * MIB, 6 * MIB + PAGE]
    assert not pool.is_reachable(taken[0])
    pool.free(taken[1])
    assert pool.alloc() == taken[1]
    pool.commit(deferred=False)
    assert (pool.free_pages, pool.used_pages) == (2, 6)
    assert all(map(pool.is_reachable, taken))
    for not_there in (PHYS_BASE + 1, PHYS_BASE + 4 * PAGE, HIGH + 4 * PAGE, 0, PT_NONE):
        assert not pool.is_reachable(PhysAddr(not_there))
        pool.free(PhysAddr(not_there))
    assert pool.free_pages == 2


def test_a_change_that_is_given_up(pool: TablePool) -> None:
    pool.free(PHYS_BASE)
    pool.alloc()
    assert not pool.is_reachable(PHYS_BASE)
    pool.abort()
    assert pool.is_reachable(PHYS_BASE)
    assert pool.free_pages == PAGES - 1


def test_freed_pages_may_have_to_wait(pool: TablePool) -> None:
    pool.free(PHYS_BASE)
    pool.commit(deferred=True)
    assert (pool.free_pages, pool.used_pages) == (PAGES - 1, 0)
    pool.release()
    assert pool.free_pages == PAGES


def test_missing_pages_are_counted(pool: TablePool) -> None:
    assert [pool.alloc() == PT_NONE for _ in range(PAGES + 1)] == [False] * 7 + [True] * 2
    assert pool.missing_pages == 2
    assert pool.build(2, 1, DATA, READ_WRITE) == PT_NONE
    assert pool.missing_pages == 2 + 513


# ---------------------------------------------------------------------- what C is not to do


def test_no_page_is_free_although_some_were(pool: TablePool) -> None:
    """Pages that were counted when the change began, and are tables now."""
    state = bytes([1]) * PAGES
    pool._state[:] = state
    assert pool.alloc() == PT_NONE
    assert pool.build(1, 1, DATA, READ_WRITE) == PT_NONE
    pool._state[PAGES - 1] = 0
    assert pool.build(2, 1, DATA, READ_WRITE) == PT_NONE
    pool._state[:] = state
    table, mapped = pool.copy(PHYS_BASE, 4, READ_WRITE)
    assert (table, mapped) == (PT_NONE, 0)


@pytest.mark.parametrize(
    ("physical", "offset", "length"),
    [
        (PHYS_BASE, 8 * MIB, PAGE),
        (PHYS_BASE, 4 * MIB, 4 * MIB + PAGE),
        (PHYS_BASE, 8 * MIB + PAGE, PAGE),
        (PHYS_BASE, 0, 0),
        (PHYS_BASE, 8, PAGE),
        (PHYS_BASE + 8, 0, PAGE),
        (PHYS_BASE, 0, PAGE + 8),
    ],
)
def test_pieces_that_are_not_whole_pages_of_the_region(
    region: Region, physical: PhysAddr, offset: RegionOff, length: int
) -> None:
    for tables in (True, False):
        with pytest.raises(RegionError, match="not whole pages of anonymous"):
            TablePool(region, [Piece(physical, offset, length)], tables=tables)


def test_a_pool_that_is_not_for_tables_has_none(region: Region) -> None:
    pool = TablePool(region, [Piece(PHYS_BASE, RegionOff(0), 8 * MIB)], tables=False)
    pool.begin()
    assert pool.alloc() == PT_NONE
    assert not pool.is_reachable(PHYS_BASE)
    pool.free(PHYS_BASE)
    report = check_tree(pool, PHYS_BASE, 4)
    assert [f.code for f in report.findings] == [Code.TABLE_OUTSIDE]
    assert pool.find(PHYS_BASE, 4, [EVERYWHERE]) is None
    assert pool.scan(PHYS_BASE, 4, Iova(0), Iova(1 << 48)) is None


@pytest.mark.parametrize("levels", [0, 6, 100])
def test_levels_that_there_are_not(pool: TablePool, region: Region, levels: int) -> None:
    region.store_u64(RegionOff(0), PHYS_BASE | 3)
    reserved = [Reserved(0, 0)] * (max(LEVELS) + 1)
    figures = pool.check(
        PHYS_BASE, levels, reserved=reserved, allowed=[], tables=[], max_findings=9
    )
    assert [f.code for f in figures.findings] == [Code.TABLE_OUTSIDE]
    assert pool.scan(PHYS_BASE, levels, Iova(0), Iova(1 << 48)) is None
    assert pool.find(PHYS_BASE, levels, [EVERYWHERE]) is None
    assert pool.verify(PHYS_BASE, levels, PhysAddr(0), 3) == 0
    assert pool.drop(PHYS_BASE, levels) == 0
    with pytest.raises(TableDamageError, match="damaged below"):
        pool.copy(PHYS_BASE, levels, 3)
    blocks = BlockMap(region, [Piece(PHYS_BASE, RegionOff(0), 8 * MIB)])
    assert not blocks.add_tree(pool, PHYS_BASE, levels)


@pytest.mark.parametrize(("level", "leaf"), [(1, 2), (2, 0), (6, 1), (4, 4)])
def test_tables_that_cannot_be_built(pool: TablePool, level: int, leaf: int) -> None:
    assert pool.build(level, leaf, DATA, READ_WRITE) == PT_NONE
    assert pool.free_pages == PAGES - 1


def test_blocks_that_do_not_suffice(pool: TablePool, region: Region) -> None:
    memory = TablePool(region, [Piece(PHYS_BASE, RegionOff(0), 8 * MIB)], tables=False)
    with pytest.raises(RegionError, match="blocks: got 3"):
        pool.mark(PHYS_BASE, 4, memory, bytearray(3))
    assert pool.mark(PHYS_BASE, 4, memory, bytearray(4))


@pytest.mark.parametrize(
    "use",
    [
        lambda words: fill_entries(words, READ_WRITE, PAGE),
        lambda words: conflicting_entry(words, READ_WRITE, PAGE),
        any_present,
    ],
)
def test_entries_end_where_their_bytes_end(use: Callable[[memoryview], object]) -> None:
    """Words that are given as bytes are not taken for eight times as many."""
    buffer = bytearray(8 * 64)
    buffer[8 * 8] = 1  # behind them
    words = memoryview(buffer)[: 8 * 8]
    found = use(words)
    assert buffer[8 * 8 :] == bytearray([1]) + bytearray(8 * 56 - 1)
    assert found in (None, 8, False)


def test_a_part_of_a_table_is_not_merged() -> None:
    with pytest.raises(ValueError, match="buffer is too small"):
        merged_entry(memoryview(bytearray(8 * (ENTRIES - 1))).cast("Q"), PAGE)


# ---------------------------------------------------------------------- loops over one table


def test_a_run_of_leaves() -> None:
    words = memoryview(bytearray(8 * ENTRIES)).cast("Q")
    assert not any_present(words)
    assert conflicting_entry(words, DATA | READ_WRITE, PAGE) == ENTRIES
    fill_entries(words[:100], DATA | READ_WRITE, PAGE)
    words[7] = (
        1 << 62 | DATA + 7 * PAGE | 1 << 8 | READ_WRITE
    )  # what others have set does not count
    assert conflicting_entry(words, DATA | READ_WRITE, PAGE) == ENTRIES
    words[40] = DATA + 40 * PAGE | 1
    assert conflicting_entry(words, DATA | READ_WRITE, PAGE) == 40
    fill_entries(words, DATA | READ_WRITE, PAGE)
    assert words[40] == DATA + 40 * PAGE | 1
    assert merged_entry(words, PAGE) == 0
    words[40] |= READ_WRITE
    assert merged_entry(words, PAGE) == DATA | READ_WRITE | 1 << 8 | PS
    assert merged_entry(words, 2 * MIB) == 0


# ---------------------------------------------------------------------- blocks


def test_which_blocks_are_mapped(region: Region) -> None:
    pool = TablePool(region, [Piece(PHYS_BASE, RegionOff(0), 8 * PAGE)])
    assert not check_tree(pool, PHYS_BASE, 4).findings
    pool.begin()
    tables = [PHYS_BASE, *(pool.alloc() for _ in range(3))]
    for upper, lower in pairwise(tables):
        region.store_u64(RegionOff(upper - PHYS_BASE), lower | 3)
    region.store_u64(RegionOff(tables[3] - PHYS_BASE), PHYS_BASE + 2 * BLOCK + 5 * PAGE | 3)
    region.store_u64(RegionOff(tables[3] - PHYS_BASE + 8), PHYS_BASE - PAGE | 3)
    last = PhysAddr(PHYS_BASE + 3 * BLOCK)
    region.store_u64(RegionOff(tables[2] - PHYS_BASE + 8), last | 0x83)
    blocks = BlockMap(region, [Piece(PHYS_BASE, RegionOff(0), 8 * MIB)])
    assert blocks.add_tree(pool, PHYS_BASE, 4)
    mapped = [blocks.any(RegionOff(at), BLOCK) for at in range(0, 8 * MIB, BLOCK)]
    assert mapped == [False] * 2 + [True] * 2
    assert pool.find(PHYS_BASE, 4, [PhysRange.of(last, BLOCK)]) == 2 * MIB
    assert pool.find(PHYS_BASE, 4, [PhysRange.of(PHYS_BASE, BLOCK)]) is None
    found = pool.scan(PHYS_BASE, 4, Iova(0), Iova(GIB))
    assert found is not None
    assert found.mappings == [
        Mapping(Iova(0), PhysAddr(PHYS_BASE + 2 * BLOCK + 5 * PAGE), PAGE, 3),
        Mapping(Iova(PAGE), PhysAddr(PHYS_BASE - PAGE), PAGE, 3),
        Mapping(Iova(2 * MIB), last, 2 * MIB, 3),
    ]
    region.store_u64(RegionOff(8), 1 << 50 | 3)
    blocks.clear()
    assert not blocks.add_tree(pool, PHYS_BASE, 4)
    assert blocks.any(RegionOff(2 * BLOCK), BLOCK)


def test_codes_are_those_of_the_walk_in_c() -> None:
    declared = {name.removeprefix("FOUND_") for name in dir(lib) if name.startswith("FOUND_")}
    assert declared == {code.name for code in Code if code < Code.CONTEXT_INVALID}
    for name in declared:
        assert getattr(lib, f"FOUND_{name}") == Code[name]


def test_which_blocks_of_other_memory_are_mapped(region: Region) -> None:
    """Memory outside the region: only where it is is told."""
    pool = TablePool(region, [Piece(PHYS_BASE, RegionOff(0), 8 * PAGE)])
    assert not check_tree(pool, PHYS_BASE, 4).findings
    pool.begin()
    tables = [PHYS_BASE, *(pool.alloc() for _ in range(3))]
    for upper, lower in pairwise(tables):
        region.store_u64(RegionOff(upper - PHYS_BASE), lower | 3)
    here, there = PhysAddr(1 << 41), PhysAddr((1 << 41) + 8 * BLOCK)
    leaves = [(0, here + BLOCK + 5 * PAGE), (1, there + BLOCK - PAGE), (2, here - PAGE)]
    for at, physical in [*leaves, (3, there + 2 * BLOCK), (4, PHYS_BASE)]:
        region.store_u64(RegionOff(tables[3] - PHYS_BASE + 8 * at), physical | 3)
    region.store_u64(RegionOff(tables[2] - PHYS_BASE + 8), here + 2 * BLOCK | 0x83)
    blocks = BlockMap.of_memory([PhysRange.of(here, 4 * BLOCK), PhysRange.of(there, 2 * BLOCK)])
    assert list(blocks.marked()) == []
    assert blocks.add_tree(pool, PHYS_BASE, 4)
    assert list(blocks.marked()) == [
        PhysRange.of(PhysAddr(here + BLOCK), 2 * BLOCK), PhysRange.of(there, BLOCK)
    ]  # fmt: skip
    blocks.clear()
    assert list(blocks.marked()) == []
    assert list(BlockMap.of_memory([]).marked()) == []
