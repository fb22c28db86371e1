"""Pieces of memory: comparing them, and choosing from what is free."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pkernfs.host.iomem import Span
from pkernfs.layout import BLOCK, GIB
from pkernfs.pool.pieces import (
    are_aligned,
    begins_with,
    choose,
    gaps,
    head,
    merged,
    part,
    size_of,
    tail,
)
from pkernfs.quantities import PhysAddr

M = 1 << 20


def span(start: int, size: int) -> Span:
    return Span(PhysAddr(start), size)


A, B = span(0, 2 * M), span(2 * M, 4 * M)


def test_what_touches_is_one_piece() -> None:
    assert merged([A, B]) == (span(0, 6 * M),)
    assert merged([B, A]) == (B, A)  # the order of the bytes counts
    assert merged([]) == ()
    assert size_of([B, A]) == 6 * M


def test_head_and_tail() -> None:
    pieces = (B, span(16 * M, 8 * M))
    assert head(pieces, 6 * M) == (B, span(16 * M, 2 * M))
    assert tail(pieces, 6 * M) == (span(18 * M, 6 * M),)
    assert head(pieces, 100 * M) == pieces
    assert (head(pieces, 0), tail(pieces, 12 * M)) == ((), ())
    assert part(pieces, 2 * M, 6 * M) == (span(4 * M, 2 * M), span(16 * M, 2 * M))
    assert part(pieces, M + 4096, M + 8192) == (span(3 * M + 4096, 4096),)
    assert (part(pieces, 12 * M, 20 * M), part(pieces, 3, 3)) == ((), ())


def test_which_bytes_come_first() -> None:
    whole = (B, A)
    assert begins_with(whole, [B])
    assert begins_with(whole, [span(2 * M, 2 * M)])
    assert begins_with(whole, [span(2 * M, 2 * M), span(4 * M, 2 * M), A])
    assert not begins_with(whole, [A])
    assert not begins_with([B], whole)


def test_gaps_are_whole_blocks() -> None:
    within = span(GIB, 16 * M)
    assert gaps(within, []) == [within]
    taken = [span(GIB + 4 * M, 4096), span(GIB + 12 * M, 8 * M), span(0, 4096)]
    assert gaps(within, taken) == [span(GIB, 4 * M), span(GIB + 6 * M, 6 * M)]
    assert gaps(within, [within]) == []
    assert gaps(span(GIB + 4096, 4 * M), []) == [span(GIB + 2 * M, 2 * M)]


def test_the_smallest_gap_that_has_all() -> None:
    free = [span(0, 64 * M), span(128 * M, 8 * M), span(256 * M, 16 * M)]
    assert choose(free, 8 * M, 64) == (span(128 * M, 8 * M),)
    assert choose(free, 10 * M, 64) == (span(256 * M, 10 * M),)


def test_the_largest_gaps_first() -> None:
    free = [span(0, 8 * M), span(128 * M, 64 * M), span(256 * M, 16 * M)]
    assert choose(free, 74 * M, 64) == (span(128 * M, 64 * M), span(256 * M, 10 * M))
    assert choose(free, 74 * M, 1) == ()
    assert choose(free, 90 * M, 64) == ()


def test_what_lies_behind_comes_first() -> None:
    free = [span(0, 8 * M), span(16 * M, 4 * M)]
    assert choose(free, 2 * M, 64, PhysAddr(16 * M)) == (span(16 * M, 2 * M),)
    assert choose(free, 6 * M, 64, PhysAddr(16 * M)) == (span(16 * M, 4 * M), span(0, 2 * M))
    assert choose(free, 20 * M, 64, PhysAddr(16 * M)) == ()
    assert choose(free, 0, 64, PhysAddr(16 * M)) == ()
    assert choose(free, 2 * M, 64, PhysAddr(12 * M)) == (span(16 * M, 2 * M),)


def test_memory_for_pages_of_one_gib() -> None:
    free = [span(2 * M, 2 * GIB), span(3 * GIB + 2 * M, 4 * GIB)]
    assert choose(free, GIB, 64) == (span(GIB, GIB),)
    whole = choose(free, 3 * GIB, 64)
    assert whole == (span(4 * GIB, 3 * GIB),)
    more = choose(free, 4 * GIB + 2 * M, 64)
    assert more == (span(4 * GIB, 3 * GIB), span(GIB, GIB + 2 * M))
    assert choose(free, 6 * GIB, 64) != ()  # all of it, as it comes
    assert are_aligned(whole, GIB)
    assert not are_aligned(more, GIB)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=12),
    st.integers(1, 300),
    st.integers(1, 8),
)
def test_what_is_chosen_is_free(sizes: list[tuple[int, int]], blocks: int, most: int) -> None:
    """Whatever is free: pieces do not overlap, are inside gaps, and add up."""
    free, at = [], 0
    for hole, size in sizes:
        free.append(span((at + hole) * BLOCK, size * BLOCK))
        at += hole + size
    behind = free[0].start if free else None
    for found in (choose(free, blocks * BLOCK, most), choose(free, blocks * BLOCK, most, behind)):
        if not found:
            assert behind is None or size_of(free) < blocks * BLOCK or len(free) > most
            continue
        assert size_of(found) == blocks * BLOCK
        assert are_aligned(found, BLOCK)
        assert all(any(g.start <= p.start and p.end <= g.end for g in free) for p in found)
        ordered = sorted(found)
        assert all(one.end <= other.start for one, other in pairwise(ordered))
