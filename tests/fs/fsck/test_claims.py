"""Claims: the first one wins, and what was taken back can be claimed again."""

from __future__ import annotations

import pytest

from pkernfs.fs.fsck.claims import CARVED, FREE, STATIC, WHOLE, Claims, flag_runs
from pkernfs.layout import PAGES_PER_BLOCK
from pkernfs.quantities import BlockNo, PageNo

BLOCK_1, BLOCK_3, BLOCK_4, BLOCK_5, BLOCK_6 = map(BlockNo, (1, 3, 4, 5, 6))


def page(block: BlockNo, bit: int) -> PageNo:
    return PageNo(block * PAGES_PER_BLOCK + bit)


@pytest.fixture
def claims() -> Claims:
    """Eight blocks, of which the first two are static."""
    made = Claims(8)
    made.kind[:] = bytes([STATIC] * 2 + [FREE] * 6)
    return made


def test_a_page_is_claimed_once(claims: Claims) -> None:
    assert claims.claim_meta(page(BLOCK_3, 5))
    assert not claims.claim_meta(page(BLOCK_3, 5))
    assert claims.kind[3] == CARVED
    assert (claims.pages[BLOCK_3], claims.meta[BLOCK_3]) == (1 | 1 << 5, 1 | 1 << 5)
    claims.release_pages(page(BLOCK_3, 5))
    assert claims.pages[BLOCK_3] == claims.meta[BLOCK_3] == 1
    assert claims.claim_meta(page(BLOCK_3, 5))


def test_the_page_map_is_nobodys(claims: Claims) -> None:
    assert not claims.claim_meta(page(BLOCK_3, 0))
    claims.claim_meta(page(BLOCK_3, 1))
    claims.release_pages(page(BLOCK_3, 0), PAGES_PER_BLOCK)
    assert claims.pages[BLOCK_3] == claims.meta[BLOCK_3] == 1


def test_what_is_static_is_not_claimed(claims: Claims) -> None:
    assert not claims.claim_meta(page(BLOCK_1, 5))
    assert not claims.claim_block(BLOCK_1)
    assert not claims.claim_run(BLOCK_1, 2)
    assert claims.claim_pages(BLOCK_1, 5, 2) == 0
    assert claims.kind[2] == FREE


def test_data_gets_the_pages_that_were_free(claims: Claims) -> None:
    assert claims.claim_meta(page(BLOCK_3, 6))
    assert claims.claim_pages(BLOCK_3, 5, 3) == 1 << 5 | 1 << 7
    assert claims.pages[BLOCK_3] == 1 | 7 << 5
    assert claims.meta[BLOCK_3] == 1 | 1 << 6


def test_blocks_are_claimed_as_one(claims: Claims) -> None:
    assert claims.claim_run(BLOCK_4, 3)
    assert not claims.claim_run(BLOCK_6, 2)
    assert claims.kind[7] == FREE
    assert not claims.claim_block(BLOCK_5)
    assert not claims.claim_meta(page(BLOCK_5, 1))
    assert claims.claim_pages(BLOCK_5, 1, 1) == 0
    claims.release_blocks(BLOCK_5, 1)
    assert bytes(claims.kind[4:7]) == bytes([WHOLE, FREE, WHOLE])
    assert claims.claim_block(BLOCK_5)


def test_what_is_in_use(claims: Claims) -> None:
    assert claims.in_use() == bytes([STATIC, STATIC])
    assert claims.claim_run(BLOCK_4, 2)
    assert claims.claim_meta(page(BLOCK_3, 5))
    assert claims.in_use() == bytes([STATIC, STATIC, CARVED, WHOLE, WHOLE])
    claims.release_blocks(BLOCK_5, 1)
    assert sorted(claims.in_use()) == [STATIC, STATIC, WHOLE, CARVED]


def test_pages_are_taken_back_over_the_end_of_a_block(claims: Claims) -> None:
    claims.claim_pages(BLOCK_3, PAGES_PER_BLOCK - 2, 2)
    claims.claim_pages(BLOCK_4, 1, 2)
    claims.release_pages(page(BLOCK_3, PAGES_PER_BLOCK - 1), 3)
    assert claims.pages[BLOCK_3] == 1 | 1 << PAGES_PER_BLOCK - 2
    assert claims.pages[BLOCK_4] == 1 | 1 << 2


@pytest.mark.parametrize("at", [0, 1, 8190, 8191, 8192, 20000])
def test_runs_of_flags(at: int) -> None:
    flags = bytearray(1 << 15)
    flags[at : at + 4] = b"\1\1\2\1"
    flags[-1] = 1
    assert flag_runs(flags) == [(at, 4), ((1 << 15) - 1, 1)]
    assert flag_runs(bytes(9000)) == []
