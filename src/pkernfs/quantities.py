"""Units: names for the numbers that cross functions, so that a type checker keeps them apart.

A :func:`~typing.NewType` is an int at run time. Arithmetic gives a bare int again: whoever computes
a number says once what it is, where it is computed. Lengths and sizes in bytes, counts, levels and
offsets in a file stay ``int``: they are the same in every room.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, NewType, cast

#: Inode number: 1 is the root directory (docs/format.md, section 6).
Ino = NewType("Ino", int)
#: Index of a 4 KiB page in the region.
PageNo = NewType("PageNo", int)
#: Index of a 2 MiB block in the region.
BlockNo = NewType("BlockNo", int)
#: Offset in the region, in bytes.
RegionOff = NewType("RegionOff", int)
#: Address in this machine's memory space, in bytes: what a table entry or a BAR holds.
PhysAddr = NewType("PhysAddr", int)
#: Address that a device uses, in bytes (VT-d: DMA address; iommufd: iova).
Iova = NewType("Iova", int)
#: Number of a segment: its key in the table of segments, from 1 on (docs/format.md, section 12).
SegmentNo = NewType("SegmentNo", int)
#: Bus, device and function of a PCI device in 16 bits (VT-d specification, section 3.4.1).
SourceId = NewType("SourceId", int)


class PhysRange(NamedTuple):
    """Bytes from ``start`` up to ``end``, which is the first address behind them."""

    start: PhysAddr
    end: PhysAddr

    @classmethod
    def of(cls, start: PhysAddr, length: int) -> PhysRange:
        """``length`` bytes from ``start`` on."""
        return cls(start, PhysAddr(start + length))


class PageRun(NamedTuple):
    """``pages`` pages of 4 KiB in a row, from ``first`` on."""

    first: PageNo
    pages: int


class BlockRun(NamedTuple):
    """``blocks`` blocks of 2 MiB in a row, from ``first`` on."""

    first: BlockNo
    blocks: int


class RegionRange(NamedTuple):
    """Bytes of the region from ``start`` up to ``end``, which is the first offset behind them."""

    start: RegionOff
    end: RegionOff


class RegionRun(NamedTuple):
    """``length`` bytes of the region, from ``offset`` on."""

    offset: RegionOff
    length: int


class FileSpan(NamedTuple):
    """Bytes of a file and where they are: file offset, length, region offset."""

    offset: int
    length: int
    region_offset: RegionOff


class Word(NamedTuple):
    """8 bytes to store: the region offset, a multiple of 8, and the value."""

    offset: RegionOff
    value: int


def pages_from(first: PageNo, count: int) -> Iterable[PageNo]:
    """``count`` pages from ``first`` on; one call for all, for loops that are measured."""
    return cast(Iterable[PageNo], range(first, first + count))
