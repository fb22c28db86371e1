"""One row of the table of segments: from bytes to a value, and from a faulty value to a sound one.

Pure functions, as those of :mod:`~pkernfs.fs.fsck.structures`; docs/format.md, section 12, is the
only authority. What a row has to do with a file is the business of the pass.
"""

from __future__ import annotations

import os
import re
import stat
from bisect import bisect_left
from typing import NamedTuple

from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.structures import Pool
from pkernfs.layout import (
    BLOCK,
    INODE_FLAG_NATIVE,
    MAX_FILE_BYTES,
    MAX_SEGMENT_PIECES,
    NO_NODE,
    PAGE,
    PIECE,
    POOL_DAX,
    POOL_DIRECTORY,
    SEGMENT,
    SEGMENT_IN_USE,
    SEGMENT_NEW,
    InodeFields,
    SegmentFields,
)
from pkernfs.quantities import Ino, PhysAddr, PhysRange, SegmentNo

_MAX_NUMBER = 1 << 63
_MAX_ADDRESS = 1 << 52
_PERMISSIONS = 0o777
_NO_NAME = bytes(24)
_DAX_NAME = re.compile(rb"dax\d+\.\d+\0*\Z")


class Row(NamedTuple):
    """A row; ``pieces`` in the order of the device's offsets."""

    number: SegmentNo
    fields: SegmentFields
    pieces: tuple[PhysRange, ...]

    @property
    def ino(self) -> Ino:
        """The file that the segment is or was made for."""
        return self.fields.ino

    def with_fields(self, **values: object) -> Row:
        """The row with other values in some of its fields."""
        return self._replace(fields=SegmentFields(**self.fields._asdict() | values))


class Fault(NamedTuple):
    """A field of a row that cannot be as it is."""

    field: str
    got: int | bytes
    expected: int | bytes


class Settled(NamedTuple):
    """What is left of a row: None for nothing. ``reason`` says what is wrong with its memory."""

    row: Row | None
    reason: str
    faults: list[Fault]


class Taken:
    """Ranges of memory in use, no two with a byte in common."""

    def __init__(self, ranges: tuple[PhysRange, ...] = ()) -> None:
        self._ranges: list[PhysRange] = []
        for one in ranges:
            if one.start < one.end:
                self.claim(one)

    def claim(self, wanted: PhysRange) -> bool:
        """Take a range; False, and nothing is taken, if some of it is in use."""
        at = bisect_left(self._ranges, wanted)
        if at and self._ranges[at - 1].end > wanted.start:
            return False
        if at < len(self._ranges) and self._ranges[at].start < wanted.end:
            return False
        self._ranges.insert(at, wanted)
        return True


def row_of_file(number: SegmentNo, ino: Ino, f: InodeFields, info: os.stat_result) -> Row | None:
    """Make the row of a segment in a directory from its inode and its file; None: they differ.

    Only root can make files in the directory. What has the name of the segment is its memory if it
    has the length that the inode has of it, and the inode's owner and mode. The names of a native
    file lead to the segment: who changes owner or mode by one changes those of the segment alone.
    """
    length = f.data_pages * PAGE
    if f.size > length or (info.st_nlink, info.st_size) != (1, length):
        return None
    if not stat.S_ISREG(info.st_mode):
        return None
    owner = (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid)
    if not f.flags & INODE_FLAG_NATIVE and owner != (f.mode & _PERMISSIONS, f.uid, f.gid):
        return None
    fields = SegmentFields(
        ino=ino,
        kind=POOL_DIRECTORY,
        state=SEGMENT_IN_USE,
        pieces=0,
        node=NO_NODE,
        length=length,
        valid=length,
        handle=info.st_ino,
        align=0,
        name=_NO_NAME,
    )
    return Row(number, fields, ())


def parse_row(number: SegmentNo, item: bytes) -> Row:
    """Decode the row with a number; its fields are unchecked.

    :raises CorruptionError: number or length of the item.
    """
    if not 0 < number < _MAX_NUMBER:
        raise CorruptionError(f"bad number: got {number:#x}")
    if len(item) < SEGMENT.size:
        raise CorruptionError(f"item too short: got {len(item)} bytes")
    fields = SegmentFields._make(SEGMENT.unpack_from(item))
    if fields.pieces > MAX_SEGMENT_PIECES:
        raise CorruptionError(
            f"bad number of pieces: got {fields.pieces}, expected 0..{MAX_SEGMENT_PIECES}"
        )
    expected = SEGMENT.size + fields.pieces * PIECE.size
    if len(item) != expected:
        raise CorruptionError(f"bad length of the item: got {len(item)}, expected {expected}")
    pieces = (
        PhysRange.of(PhysAddr(start), length)
        for start, length in PIECE.iter_unpack(item[SEGMENT.size :])
    )
    return Row(number, fields, tuple(pieces))


def pack_row(row: Row) -> bytes:
    """The item of a row."""
    pieces = b"".join(PIECE.pack(start, end - start) for start, end in row.pieces)
    return SEGMENT.pack(*row.fields) + pieces


def settle(row: Row, pool: Pool, taken: Taken, size: int | None) -> Settled:
    """Find what of a row can stay, and claim its memory in ``taken``.

    Memory that it cannot have ends the segment; nothing is guessed but what its file proves.

    :param size: of the file that has the segment, in bytes; None: no file has it.
    """
    reason = ""
    row, faults = _as_of_pool(row, pool)
    if pool.kind == POOL_DAX:
        pieces, reason = _sound_pieces(row.pieces, pool, taken)
        if not pieces:
            return Settled(None, reason, [])
        length = sum(end - start for start, end in pieces)
        row = row._replace(pieces=pieces)
    else:
        length = _length_of_file(row.fields.length, pool, size)
        if not length:
            return Settled(None, f"bad length: got {row.fields.length:#x}", [])
    if row.fields.length != length and not reason:
        faults.append(Fault("length", row.fields.length, length))
    if row.fields.valid > (row.fields.length if reason else length):
        valid = min(_up(size or 0, PAGE), length)
        faults.append(Fault("valid", row.fields.valid, valid))
    else:
        valid = min(row.fields.valid, length)
    row = row.with_fields(pieces=len(row.pieces), length=length, valid=valid)
    return Settled(row, reason, faults)


def _as_of_pool(row: Row, pool: Pool) -> tuple[Row, list[Fault]]:
    """Make a row one of the pool's kind, but for its memory."""
    fields = row.fields
    good: dict[str, int | bytes] = {"kind": pool.kind}
    if pool.kind == POOL_DAX:
        if not _is_align(fields):
            good["align"] = BLOCK
        if fields.name != _NO_NAME and not _DAX_NAME.match(fields.name):
            good["name"] = _NO_NAME
    else:
        good |= {"align": 0, "name": _NO_NAME, "pieces": 0}
        row = row._replace(pieces=())
    found = [(name, getattr(fields, name), value) for name, value in good.items()]
    return row.with_fields(**good), [Fault(*one) for one in found if one[1] != one[2]]


def _is_align(fields: SegmentFields) -> bool:
    if not fields.align:
        return fields.state == SEGMENT_NEW  # the device is not there yet
    return fields.align >= PAGE and not fields.align & (fields.align - 1)


def _sound_pieces(
    pieces: tuple[PhysRange, ...], pool: Pool, taken: Taken
) -> tuple[tuple[PhysRange, ...], str]:
    """Claim pieces up to the first that cannot be; those, and what is wrong with the next."""
    found: list[PhysRange] = []
    reason = "" if pieces else "no pieces"
    for piece in pieces:
        reason = _piece_fault(piece, taken)
        if reason:
            break
        found.append(piece)
    while sum(end - start for start, end in found) % pool.granule:
        piece = found.pop()
        reason = reason or f"ends amid {pool.granule:#x} bytes: got {_show(piece)}"
    return tuple(found), reason


def _piece_fault(piece: PhysRange, taken: Taken) -> str:
    start, end = piece
    if start >= end or start % BLOCK or end % BLOCK or end > _MAX_ADDRESS:
        return f"not whole blocks of memory: got {_show(piece)}"
    if not taken.claim(piece):
        return f"in use elsewhere too: got {_show(piece)}"
    return ""


def _show(piece: PhysRange) -> str:
    return f"{piece.start:#x}+{piece.end - piece.start:#x}"


def _length_of_file(length: int, pool: Pool, size: int | None) -> int:
    """The length, or one that holds all of the file, if it cannot be; 0: nothing tells it.

    What is behind the file's end is zero, so that a shorter segment loses nothing.
    """
    if length and not length % pool.granule and length <= MAX_FILE_BYTES:
        return length
    if size is None:
        return 0
    most = MAX_FILE_BYTES // pool.granule * pool.granule
    return min(_up(max(size, 1), pool.granule), most)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
