"""Rows of the table of segments by themselves: what is refused, what can stay."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.rows import Fault, Row, Settled, Taken, pack_row, parse_row, settle
from pkernfs.fs.fsck.structures import Pool
from pkernfs.layout import (
    BLOCK,
    MAX_FILE_BYTES,
    MAX_SEGMENT_PIECES,
    PAGE,
    POOL_DAX,
    POOL_DIRECTORY,
    SEGMENT,
    SEGMENT_IN_USE,
    SEGMENT_NEW,
    SegmentFields,
)
from pkernfs.quantities import Ino, PhysAddr, PhysRange, SegmentNo

DAX = Pool(POOL_DAX, BLOCK)
DIRECTORY = Pool(POOL_DIRECTORY, BLOCK)
NO_NAME = bytes(24)
FIELDS = SegmentFields(
    ino=Ino(17),
    kind=POOL_DIRECTORY,
    state=SEGMENT_IN_USE,
    pieces=0,
    node=1,
    length=4 * BLOCK,
    valid=4 * BLOCK,
    handle=99,
    align=0,
    name=NO_NAME,
)


def blocks(first: int, count: int) -> PhysRange:
    """Whole blocks of memory."""
    return PhysRange.of(PhysAddr(first * BLOCK), count * BLOCK)


def in_directory(**fields: Any) -> Row:
    return Row(SegmentNo(3), FIELDS, ()).with_fields(**fields)


def in_dax(*pieces: PhysRange, **fields: Any) -> Row:
    """A row of a dax pool; all of it is valid."""
    length = sum(end - start for start, end in pieces)
    row = Row(SegmentNo(3), FIELDS, pieces).with_fields(
        kind=POOL_DAX, pieces=len(pieces), length=length, valid=length, align=BLOCK
    )
    return row.with_fields(**fields)


def settled(row: Row, pool: Pool, size: int | None = 0, taken: Taken | None = None) -> Settled:
    return settle(row, pool, Taken() if taken is None else taken, size)


@pytest.mark.parametrize("row", [in_directory(), in_dax(blocks(9, 3), blocks(2, 1))])
def test_a_row_and_its_bytes(row: Row) -> None:
    item = pack_row(row)
    assert len(item) == SEGMENT.size + 16 * len(row.pieces)
    assert parse_row(row.number, item) == row
    assert row.ino == 17


@pytest.mark.parametrize(
    ("number", "item", "reason"),
    [
        (0, pack_row(in_directory()), "bad number: got 0x0"),
        (1 << 63, pack_row(in_directory()), "bad number: got 0x8000000000000000"),
        (1, pack_row(in_directory())[:-1], "item too short: got 71 bytes"),
        (1, pack_row(in_directory()) + b"\0", "bad length of the item: got 73, expected 72"),
        (1, pack_row(in_directory(pieces=2)), "bad length of the item: got 72, expected 104"),
        (
            1,
            pack_row(in_directory(pieces=MAX_SEGMENT_PIECES + 1)),
            r"bad number of pieces: got 65, expected 0\.\.64",
        ),
    ],
)
def test_bytes_that_are_no_row(number: int, item: bytes, reason: str) -> None:
    with pytest.raises(CorruptionError, match=f"^{reason}$"):
        parse_row(SegmentNo(number), item)


@pytest.mark.parametrize("size", [None, 0, 4 * BLOCK])
def test_sound_rows_stay(size: int | None) -> None:
    for row, pool in (
        (in_directory(), DIRECTORY),
        (in_directory(valid=BLOCK, state=SEGMENT_NEW), DIRECTORY),
        (in_dax(blocks(9, 3), blocks(2, 1)), DAX),
        (in_dax(blocks(9, 3), name=b"dax12.0".ljust(24, b"\0")), DAX),
        (in_dax(blocks(9, 3), state=SEGMENT_NEW, align=0, valid=0), DAX),
        (in_dax(blocks(9, 1), align=PAGE), DAX),
    ):
        assert settled(row, pool, size) == (row, "", [])


@pytest.mark.parametrize(
    ("pool", "row", "fault"),
    [
        (DIRECTORY, in_directory(kind=POOL_DAX), Fault("kind", POOL_DAX, POOL_DIRECTORY)),
        (DIRECTORY, in_directory(align=PAGE), Fault("align", PAGE, 0)),
        (DIRECTORY, in_directory(name=b"dax0.0"), Fault("name", b"dax0.0", NO_NAME)),
        (DAX, in_dax(blocks(9, 1), align=0), Fault("align", 0, BLOCK)),
        (DAX, in_dax(blocks(9, 1), align=2048), Fault("align", 2048, BLOCK)),
        (DAX, in_dax(blocks(9, 1), name=b"dax0."), Fault("name", b"dax0.", NO_NAME)),
        (DAX, in_dax(blocks(9, 1), name=b"dax0.1\0x"), Fault("name", b"dax0.1\0x", NO_NAME)),
        (DAX, in_dax(blocks(9, 2), length=BLOCK), Fault("length", BLOCK, 2 * BLOCK)),
        (DAX, in_dax(blocks(9, 2), valid=3 * BLOCK), Fault("valid", 3 * BLOCK, PAGE)),
        (DIRECTORY, in_directory(valid=1 << 40), Fault("valid", 1 << 40, PAGE)),
        (DIRECTORY, in_directory(length=1 << 63), Fault("length", 1 << 63, BLOCK)),
    ],
)
def test_one_field_is_put_right(pool: Pool, row: Row, fault: Fault) -> None:
    new, reason, faults = settled(row, pool, 1)
    assert new is not None
    assert reason == ""
    assert faults[0] == fault
    assert getattr(new.fields, fault.field) == fault.expected
    assert settled(new, pool, 1) == (new, "", [])


def test_pieces_of_a_directory_go() -> None:
    row = in_directory(pieces=1)._replace(pieces=(blocks(1, 4),))
    new, _, faults = settled(row, DIRECTORY)
    assert new == in_directory()
    assert faults == [("pieces", 1, 0)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (PhysRange.of(PhysAddr(PAGE), BLOCK), "not whole blocks of memory: got 0x1000+0x200000"),
        (PhysRange.of(PhysAddr(0), PAGE), "not whole blocks of memory: got 0x0+0x1000"),
        (blocks(5, 0), "not whole blocks of memory: got 0xa00000+0x0"),
        (blocks(1 << 31, 1), "not whole blocks of memory: got 0x10000000000000+0x200000"),
        (blocks(10, 1), "in use elsewhere too: got 0x1400000+0x200000"),
        (blocks(20, 1), "in use elsewhere too: got 0x2800000+0x200000"),
    ],
)
def test_memory_ends_before_what_cannot_be(bad: PhysRange, reason: str) -> None:
    row = in_dax(blocks(9, 2), bad, blocks(30, 1))
    new, got, faults = settled(row, DAX, 0, Taken((blocks(19, 3),)))
    assert (got, faults) == (reason, [])
    assert new == in_dax(blocks(9, 2))
    assert settled(in_dax(bad, blocks(9, 2)), DAX, 0, Taken((blocks(10, 20),))).row is None


def test_memory_is_whole_granules() -> None:
    pool = Pool(POOL_DAX, 4 * BLOCK)
    new, reason, _ = settled(in_dax(blocks(0, 3), blocks(8, 1), blocks(12, 2)), pool)
    assert reason == "ends amid 0x800000 bytes: got 0x1800000+0x400000"
    assert new == in_dax(blocks(0, 3), blocks(8, 1))
    assert settled(in_dax(blocks(0, 3)), pool).row is None
    assert settled(in_dax(), pool) == (None, "no pieces", [])


def test_what_is_cut_is_not_valid() -> None:
    row = in_dax(blocks(9, 2), blocks(9, 1), valid=BLOCK)
    assert settled(row, DAX).row == in_dax(blocks(9, 2), valid=BLOCK)
    new, _, faults = settled(row.with_fields(valid=1 << 50), DAX, 5)
    assert new == in_dax(blocks(9, 2), valid=PAGE)
    assert faults == [("valid", 1 << 50, PAGE)]


@pytest.mark.parametrize(
    ("size", "length"),
    [
        (0, BLOCK),
        (1, BLOCK),
        (BLOCK + 1, 2 * BLOCK),
        (MAX_FILE_BYTES, MAX_FILE_BYTES // BLOCK * BLOCK),
    ],
)
def test_a_length_that_holds_the_file(size: int, length: int) -> None:
    new = settled(in_directory(length=PAGE, valid=0), DIRECTORY, size).row
    assert new is not None
    assert new.fields.length == length


def test_a_length_that_nothing_tells() -> None:
    row = in_directory(length=BLOCK + 1)
    assert settled(row, DIRECTORY, None) == (None, "bad length: got 0x200001", [])


def test_memory_that_is_taken() -> None:
    taken = Taken((blocks(4, 2), blocks(7, 0), blocks(5, 1)))
    assert not taken.claim(blocks(0, 5))
    assert not taken.claim(blocks(4, 1))
    assert not taken.claim(blocks(5, 9))
    assert not taken.claim(blocks(0, 9))
    assert taken.claim(blocks(2, 2))
    assert taken.claim(blocks(6, 2))
    assert not taken.claim(blocks(3, 1))


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=30)


@given(SPANS)
def test_no_two_have_a_byte_in_common(spans: list[tuple[int, int]]) -> None:
    taken = Taken()
    free = set(range(50))
    for first, count in spans:
        wanted = set(range(first, first + count))
        assert taken.claim(blocks(first, count)) == (wanted <= free)
        if wanted <= free:
            free -= wanted
