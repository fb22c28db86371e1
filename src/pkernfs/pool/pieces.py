"""Pieces of physical memory that make up a segment: comparing them, and choosing from what is free.

Pieces that touch are as good as one: what counts is which byte lies where.
"""

from __future__ import annotations

from collections.abc import Iterable

from pkernfs.host.iomem import Span
from pkernfs.layout import BLOCK, GIB
from pkernfs.quantities import PhysAddr

Pieces = tuple[Span, ...]


def merged(pieces: Iterable[Span]) -> Pieces:
    """The same bytes in the same order, with what touches in one piece."""
    found: list[Span] = []
    for piece in pieces:
        if found and found[-1].end == piece.start:
            found[-1] = Span(found[-1].start, found[-1].size + piece.size)
        elif piece.size:
            found.append(piece)
    return tuple(found)


def size_of(pieces: Iterable[Span]) -> int:
    """The bytes in all of them."""
    return sum(piece.size for piece in pieces)


def head(pieces: Iterable[Span], length: int) -> Pieces:
    """The first ``length`` bytes; all, if there are fewer."""
    return part(pieces, 0, length)


def tail(pieces: Iterable[Span], offset: int) -> Pieces:
    """The bytes from an offset on."""
    return part(pieces, offset, 1 << 64)


def part(pieces: Iterable[Span], low: int, high: int) -> Pieces:
    """The bytes from offset ``low`` up to ``high``, as far as there are any."""
    found = []
    at = 0
    for piece in merged(pieces):
        first, last = max(low, at), min(high, at + piece.size)
        if first < last:
            found.append(Span(PhysAddr(piece.start + first - at), last - first))
        at += piece.size
    return tuple(found)


def begins_with(pieces: Iterable[Span], others: Iterable[Span]) -> bool:
    """Tell whether the first bytes are those of ``others``."""
    wanted = merged(others)
    return head(pieces, size_of(wanted)) == wanted


def are_aligned(pieces: Iterable[Span], unit: int) -> bool:
    """Tell whether each starts and ends at a multiple of ``unit`` bytes."""
    return all(piece.start % unit == 0 and piece.size % unit == 0 for piece in pieces)


def gaps(within: Span, taken: Iterable[Span]) -> list[Span]:
    """The whole 2 MiB blocks of a range that none of ``taken`` has a byte of, ascending."""
    found = []
    at: int = within.start
    for start, end in [*sorted((t.start, t.end) for t in taken), (within.end, within.end)]:
        low = -(-at // BLOCK) * BLOCK
        high = min(start, within.end) // BLOCK * BLOCK
        if low < high:
            found.append(Span(PhysAddr(low), high - low))
        at = max(at, end)
    return found


def choose(free: list[Span], length: int, most: int, behind: PhysAddr | None = None) -> Pieces:
    """Choose ``length`` bytes from what is free, in as few pieces as can be.

    A length of 1 GiB or more gets pieces that 1 GiB pages can map, if there are enough.

    :param most: how many pieces there may be
    :param behind: where it had best begin: the end of what it continues
    :return: none if so many pieces do not have so much
    """
    if length <= 0:
        return ()
    if behind is not None:
        next_one = next((gap for gap in free if gap.start == behind), None)
        if next_one is not None:
            first = Span(next_one.start, min(next_one.size, length))
            rest = [gap for gap in free if gap != next_one]
            others = choose(rest, length - first.size, most) if length > first.size else ()
            return (first, *others) if others or first.size == length else ()
    aligned = _fill(free, length, most, GIB) if length >= GIB else ()
    return aligned or _fill(free, length, most, BLOCK)


def _fill(free: list[Span], length: int, most: int, unit: int) -> Pieces:
    """Pieces that start at a multiple of ``unit``, and end at one but for the last.

    The smallest gap that has the whole rest, else the largest: large ones stay whole for others.
    """
    usable = []
    for gap in free:
        start = -(-gap.start // unit) * unit
        if start < gap.end:
            usable.append(Span(PhysAddr(start), gap.end - start))
    usable.sort(key=lambda gap: (gap.size, -gap.start))
    chosen: list[Span] = []
    left = length
    while left and usable and len(chosen) < most:
        enough = next((gap for gap in usable if gap.size >= left), None)
        gap = enough or usable[-1]
        usable.remove(gap)
        size = left if enough else gap.size // unit * unit
        if not size:
            break
        chosen.append(Span(gap.start, size))
        left -= size
    return () if left else tuple(chosen)
