"""Where physical addresses are in a region, and ranges of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import InvalidError, TableDamageError
from pkernfs.iommu.memory import Memory, merge_ranges, overlaps, store_words, without_ranges
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, PhysRange, RegionOff, RegionRun, Word
from pkernfs.region.region import Region
from support.page_tables import MIB, PHYS_BASE

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=8).map(
    lambda pairs: [PhysRange.of(PhysAddr(start), length) for start, length in pairs]
)
#: A file's extents; the last two go on from each other.
FILE = [
    RegionRun(RegionOff(4 * MIB), 2 * PAGE),
    RegionRun(RegionOff(MIB), PAGE),
    RegionRun(RegionOff(MIB + PAGE), PAGE),
]


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(8 * MIB, phys_base=PHYS_BASE) as made:
        yield made


def test_pages_of_a_file_are_in_its_order(region: Region) -> None:
    memory = Memory(region, FILE)
    assert memory.size == 4 * PAGE
    assert memory.first_page == PHYS_BASE + 4 * MIB
    assert [memory.page(i) - PHYS_BASE for i in range(4)] == [
        4 * MIB,
        4 * MIB + PAGE,
        MIB,
        MIB + PAGE,
    ]
    with pytest.raises(InvalidError, match="page 4: beyond the end"):
        memory.page(4)


def test_pieces_are_in_order_of_addresses_and_joined(region: Region) -> None:
    memory = Memory(region, FILE)
    assert memory.pieces == [
        (PHYS_BASE + MIB, MIB, 2 * PAGE),
        (PHYS_BASE + 4 * MIB, 4 * MIB, 2 * PAGE),
    ]
    assert memory.ranges == [
        (PHYS_BASE + MIB, PHYS_BASE + MIB + 2 * PAGE),
        (PHYS_BASE + 4 * MIB, PHYS_BASE + 4 * MIB + 2 * PAGE),
    ]


def test_offsets_room_and_gaps(region: Region) -> None:
    memory = Memory(
        region, [RegionRun(RegionOff(MIB), 2 * PAGE), RegionRun(RegionOff(4 * MIB), PAGE)]
    )
    first = PhysAddr(PHYS_BASE + MIB)
    assert memory.offset(first) == MIB
    assert memory.offset(PhysAddr(first + PAGE + 8), PAGE - 8) == MIB + PAGE + 8
    for physical, length in ((first - 1, 1), (first + PAGE, PAGE + 1), (0, 1), (1 << 63, 1)):
        assert memory.offset(PhysAddr(physical), length) is None
    assert memory.room(PhysAddr(first + 8)) == 2 * PAGE - 8
    assert memory.gap(PhysAddr(0)) == first
    assert memory.gap(PhysAddr(first + 2 * PAGE)) == 3 * MIB - 2 * PAGE
    assert memory.gap(PhysAddr(PHYS_BASE + 5 * MIB)) is None


def test_words_are_whole_and_aligned(region: Region) -> None:
    memory = Memory(region, [RegionRun(RegionOff(MIB), PAGE)])
    store_words(region)([Word(RegionOff(MIB + 8), 7), Word(RegionOff(MIB), 5)])
    assert memory.words(PhysAddr(PHYS_BASE + MIB), 2) == (5, 7)
    assert memory.words(PhysAddr(PHYS_BASE + MIB + 4), 1) is None
    assert memory.words(PhysAddr(PHYS_BASE + MIB + PAGE - 8), 2) is None


def test_memory_that_is_none(region: Region) -> None:
    with pytest.raises(InvalidError, match="not whole pages: got 100 bytes"):
        Memory(region, [RegionRun(RegionOff(0), 100)])
    with pytest.raises(TableDamageError, match="a page twice"):
        Memory(region, [RegionRun(RegionOff(0), 2 * PAGE), RegionRun(RegionOff(PAGE), PAGE)])


def members(ranges: list[PhysRange]) -> set[int]:
    """All that is in one of the ranges."""
    return {x for start, end in ranges for x in range(start, end)}


@given(RANGES, st.integers(0, 60), st.integers(1, 12))
def test_which_ranges_have_a_byte_of_another(
    ranges: list[PhysRange], start: int, length: int
) -> None:
    wanted = PhysRange.of(PhysAddr(start), length)
    known = {at for low, high in ranges for at in range(low, high)}
    assert overlaps(merge_ranges(ranges), wanted) == bool(known & set(range(*wanted)))


@given(RANGES)
def test_merged_ranges(ranges: list[PhysRange]) -> None:
    merged = merge_ranges(ranges)
    assert members(merged) == members(ranges)
    assert all(a < b for a, b in merged)
    assert all(before[1] < after[0] for before, after in pairwise(merged))


@given(RANGES, RANGES)
def test_ranges_without_holes(ranges: list[PhysRange], holes: list[PhysRange]) -> None:
    left = without_ranges(merge_ranges(ranges), merge_ranges(holes))
    assert members(left) == members(ranges) - members(holes)
    assert all(before[1] <= after[0] for before, after in pairwise(left))
