"""The rows of the table of segments: what is stored is found, and nothing else is believed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.alloc.blocks import BlockAllocator, MapRange
from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import CorruptionError
from pkernfs.fs import superblock
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.segment_table import SegmentTable, Totals, encode, parse, totals
from pkernfs.host.iomem import Span
from pkernfs.journal import PageStore
from pkernfs.layout import (
    BLOCK,
    MAGIC_STATE,
    PAGE,
    PAGES_PER_BLOCK,
    SEGMENT,
    SEGMENT_DEAD,
    SEGMENT_IN_USE,
    STATE_PAGE,
)
from pkernfs.pool.pool import Segment
from pkernfs.quantities import Ino, PhysAddr, RegionOff, SegmentNo
from pkernfs.region.region import Region
from support.memory_pool import POOL

ROW = Segment(SegmentNo(7), Ino(33), 2, 2 * BLOCK, 2, 1, BLOCK, 9, 4096, "dax0.3")


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(16 << 20) as made:
        make_filesystem(made, pool=POOL)
        yield made


def opened(region: Region) -> tuple[PageStore, SegmentTable]:
    sb = superblock.load(region)
    pages = sb.total_blocks * PAGES_PER_BLOCK
    store = PageStore(region, sb.uuid, sb.fields.journal_page, sb.fields.journal_pages, pages)
    (only,) = sb.ranges
    blocks = BlockAllocator(store, [MapRange(only.first_block, only.blocks, only.map_page, None)])
    return store, SegmentTable(store, PageAllocator(store, blocks))


def test_totals_are_of_what_files_have(region: Region) -> None:
    assert totals(region) == Totals(0, 0)
    store, table = opened(region)
    with store:
        for number, state in ((1, SEGMENT_IN_USE), (2, SEGMENT_DEAD), (3, SEGMENT_IN_USE)):
            table.add(row(number, state=state))
    assert totals(region) == Totals(2, 4 * BLOCK)


def test_a_damaged_table_has_no_totals(region: Region) -> None:
    store, table = opened(region)
    with store:
        table.add(row(1))
    region.zero(RegionOff(table._root * PAGE + 64), 64)
    assert totals(region) is None


def row(number: int, **fields: object) -> Segment:
    return ROW._replace(number=SegmentNo(number), **fields)  # type: ignore[arg-type]


pieces = st.lists(
    st.builds(
        lambda at, count: Span(PhysAddr(at * BLOCK), count * BLOCK),
        st.integers(0, 1 << 20),
        st.integers(1, 8),
    ),
    max_size=64,
).map(tuple)


@given(pieces=pieces, node=st.none() | st.integers(0, 2**32 - 2), handle=st.integers(0, 2**64 - 1))
def test_what_is_encoded_is_parsed(pieces: tuple[Span, ...], node: int | None, handle: int) -> None:
    length = sum(p.size for p in pieces) or BLOCK
    given_row = row(3, pieces=pieces, node=node, handle=handle, length=length, valid=length)
    assert parse(SegmentNo(3), encode(given_row)) == given_row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "bad length"),
        ({"length": BLOCK + 4096}, "bad length"),
        ({"valid": 3 * BLOCK}, "bad length"),
        ({"state": 0}, "bad state"),
        ({"state": 4}, "bad state"),
        ({"pieces": (Span(PhysAddr(4096), 2 * BLOCK),)}, "bad pieces"),
        ({"pieces": (Span(PhysAddr(0), BLOCK),)}, "bad pieces"),
        ({"pieces": (Span(PhysAddr(1 << 52), 2 * BLOCK),)}, "bad pieces"),
    ],
)
def test_rows_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CorruptionError, match=f"^segment 7: {message}"):
        parse(SegmentNo(7), encode(row(7, **changes)))


@pytest.mark.parametrize("length", [0, SEGMENT.size - 1, SEGMENT.size + 8])
def test_a_row_of_another_length(length: int) -> None:
    item = encode(ROW).ljust(length, b"\0")[:length]
    with pytest.raises(CorruptionError, match="bad row"):
        parse(SegmentNo(7), item)


def test_rows_come_and_go(region: Region) -> None:
    store, table = opened(region)
    assert table.new_number() == 1
    for number in range(1, 200):
        with store:
            table.add(row(number))
    with store:
        table.replace(row(100, state=SEGMENT_DEAD))
        table.remove(SegmentNo(199))
    assert table.new_number() == 200  # no number is used twice
    _, again = opened(region)
    assert again.rows == table.rows
    assert again.rows[SegmentNo(100)].state == SEGMENT_DEAD
    assert again.new_number() == 200
    for number in range(1, 199):
        with store:
            table.remove(SegmentNo(number))
    assert not opened(region)[1].rows


def test_a_transaction_that_fails_changes_nothing(region: Region) -> None:
    store, table = opened(region)
    with store:
        table.add(row(1))
    before = dict(table.rows)

    def fail() -> None:
        with store:
            table.add(row(2))
            table.replace(row(1, state=SEGMENT_DEAD))
            table.remove(SegmentNo(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert table.rows == before == opened(region)[1].rows
    assert table.new_number() == 2


def test_a_damaged_row_is_told_and_no_other_is_lost(region: Region) -> None:
    store, table = opened(region)
    with store:
        table.add(row(1, length=0))
        table.add(row(2))
    _, again = opened(region)
    assert list(again.rows) == [2]
    assert "segment 1: bad length" in again.damaged[0]


def test_a_table_that_cannot_be_read_is_told(region: Region) -> None:
    store, _ = opened(region)
    with store:
        store.edit(STATE_PAGE, MAGIC_STATE)[232:240] = (1).to_bytes(8, "little")
    _, again = opened(region)
    assert not again.rows
    assert "table of segments" in again.damaged[0]
