"""Physical addresses to region offsets: of one file's pages, or of a whole region."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from pkernfs.errors import InvalidError, TableDamageError
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, PhysRange, RegionOff, RegionRun, Word
from pkernfs.region.region import Region

#: Stores words, in that order; as one, if there is a journal.
Commit = Callable[[Sequence[Word]], object]


class Words(Protocol):
    """Memory that tables are read from: a region's, or a running kernel's."""

    def words(self, physical: PhysAddr, count: int) -> tuple[int, ...] | None:
        """``count`` 8-byte words at a physical address; None if they are not in there."""


class Piece(NamedTuple):
    """Consecutive memory: physical address, region offset, length in bytes."""

    physical: PhysAddr
    offset: RegionOff
    length: int

    @property
    def range(self) -> PhysRange:
        """All of it."""
        return PhysRange.of(self.physical, self.length)


class Memory:
    """Pieces of a region by physical address, each page once.

    :param extents: whole pages, in the order of the file.
    :param shift: bytes to add to each physical address: where tables say that the region is.
    :raises InvalidError: the region has no physical addresses, or pages are not whole.
    """

    def __init__(self, region: Region, extents: Iterable[RegionRun], shift: int = 0) -> None:
        self.region = region
        pieces: list[Piece] = []
        for offset, length in extents:
            if offset % PAGE or length % PAGE:
                raise InvalidError(f"extent at {offset:#x}: not whole pages: got {length} bytes")
            pieces += _pieces(region, offset, length, shift)
        if not pieces:
            raise InvalidError("no memory for tables: the file was never sized")
        self._in_file_order = tuple(pieces)
        self.pieces = _joined(pieces)
        self._starts = [p.physical for p in self.pieces]

    @classmethod
    def whole(cls, region: Region, shift: int = 0) -> Memory:
        """All of a region."""
        return cls(region, [RegionRun(RegionOff(0), region.size)], shift)

    @property
    def first_page(self) -> PhysAddr:
        """Physical address of the file's first page."""
        return self._in_file_order[0].physical

    def page(self, number: int) -> PhysAddr:
        """Physical address of a page of the file.

        :raises InvalidError: beyond its end.
        """
        rest = number * PAGE
        for piece in self._in_file_order:
            if rest < piece.length:
                return PhysAddr(piece.physical + rest)
            rest -= piece.length
        raise InvalidError(f"page {number}: beyond the end: got {self.size} bytes")

    @property
    def size(self) -> int:
        """Bytes in all pieces."""
        return sum(p.length for p in self.pieces)

    @property
    def ranges(self) -> list[PhysRange]:
        """Where it is, sorted and disjoint."""
        return merge_ranges(p.range for p in self.pieces)

    def offset(self, physical: PhysAddr, length: int = PAGE) -> RegionOff | None:
        """Region offset of a physical range that lies in one piece; None if there is none."""
        at = bisect_right(self._starts, physical) - 1
        if at < 0:
            return None
        piece = self.pieces[at]
        inside = physical - piece.physical
        if inside + length > piece.length:
            return None
        return RegionOff(piece.offset + inside)

    def need_offset(self, physical: PhysAddr) -> RegionOff:
        """Region offset of an address that is in a piece."""
        offset = self.offset(physical, 1)
        assert offset is not None
        return offset

    def room(self, physical: PhysAddr) -> int:
        """Bytes from an address that :meth:`offset` knows to the end of its piece."""
        piece = self.pieces[bisect_right(self._starts, physical) - 1]
        return piece.physical + piece.length - physical

    def gap(self, physical: PhysAddr) -> int | None:
        """Bytes from an address in no piece to the next piece; None: there is none behind it."""
        at = bisect_right(self._starts, physical)
        return self._starts[at] - physical if at < len(self._starts) else None

    def words(self, physical: PhysAddr, count: int) -> tuple[int, ...] | None:
        """``count`` 8-byte words at an address; None if they are not in this memory."""
        offset = self.offset(physical, 8 * count)
        if offset is None or offset % 8:
            return None
        return tuple(self.region.view(offset, 8 * count).cast("Q"))


def merge_ranges(ranges: Iterable[PhysRange]) -> list[PhysRange]:
    """Sorted, disjoint ranges; what touches is one."""
    merged: list[PhysRange] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1].end:
            merged[-1] = PhysRange(merged[-1].start, max(end, merged[-1].end))
        elif start < end:
            merged.append(PhysRange(start, end))
    return merged


def overlaps(ranges: Sequence[PhysRange], wanted: PhysRange) -> bool:
    """Tell if one of sorted, disjoint ranges has a byte of ``wanted``."""
    last = bisect_left(ranges, (wanted.end, 0)) - 1
    return last >= 0 and ranges[last].end > wanted.start


def without_ranges(ranges: list[PhysRange], holes: list[PhysRange]) -> list[PhysRange]:
    """Cut sorted, disjoint holes out of sorted, disjoint ranges."""
    left = []
    at = 0
    for start, end in ranges:
        while at < len(holes) and holes[at].start < end:
            low, high = holes[at]
            if start < low:
                left.append(PhysRange(start, low))
            start = max(start, min(high, end))
            if high > end:
                break  # it may reach into the next range
            at += 1
        if start < end:
            left.append(PhysRange(start, end))
    return left


def store_words(region: Region) -> Commit:
    """A :data:`Commit` for a region without a journal: word by word, each an aligned store."""

    def commit(words: Sequence[Word]) -> None:
        for offset, word in words:
            region.store_u64(offset, word)

    return commit


def _pieces(region: Region, offset: RegionOff, length: int, shift: int) -> Iterator[Piece]:
    for at, count, physical in region.physical_runs(offset, length):
        if physical is None:
            raise InvalidError(f"{region.name}: no physical addresses: give phys_base=")
        yield Piece(PhysAddr(physical + shift), at, count)


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in sorted(pieces):
        last = joined[-1] if joined else None
        if last is not None and piece.physical < last.physical + last.length:
            raise TableDamageError(f"memory at {piece.physical:#x}: a page twice")
        if (
            last is not None
            and piece.physical == last.physical + last.length
            and piece.offset == last.offset + last.length
        ):
            joined[-1] = Piece(last.physical, last.offset, last.length + piece.length)
        else:
            joined.append(piece)
    return joined
