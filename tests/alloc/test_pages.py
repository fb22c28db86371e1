"""Pages: they fill gaps, and an empty block is whole again."""

from __future__ import annotations

import random

import pytest

from pkernfs.errors import NoSpaceError
from pkernfs.layout import (
    BLOCK,
    CLASS_DATA,
    CLASS_META,
    MAGIC_PAGE_MAP,
    PAGE_MAP_USED_OFFSET,
    PAGES_PER_BLOCK,
    block_of,
    first_page,
)
from pkernfs.quantities import PageNo, pages_from
from support.space import space


def test_pages_fill_the_last_gaps_of_a_full_region() -> None:
    with space(8 * BLOCK) as sp:
        sp.alloc(sp.blocks.free_blocks - 1)
        taken: list[PageNo] = []
        with sp.store:
            taken += [p for f, n in sp.pages.alloc(500, CLASS_DATA) for p in pages_from(f, n)]
        with sp.store:
            for page in taken[::2]:
                sp.pages.free(page)
        free = sp.pages.free_pages
        with sp.store:
            runs = sp.pages.alloc(511, CLASS_DATA)
        assert sum(n for _, n in runs) == 511
        with pytest.raises(NoSpaceError), sp.store:
            sp.pages.alloc(free - 510, CLASS_META)
        assert sp.pages.free_pages == free - 511
        with sp.store:
            sp.pages.alloc(free - 511, CLASS_META)
        assert sp.pages.free_pages == 0
        with pytest.raises(NoSpaceError), sp.store:
            sp.pages.alloc_one()


def test_an_empty_carved_block_is_given_back_whole() -> None:
    with space(16 * BLOCK) as sp:
        free = sp.blocks.free_blocks
        taken: list[PageNo] = []
        for _ in range(4):
            with sp.store:
                taken += [p for f, n in sp.pages.alloc(511, CLASS_DATA) for p in pages_from(f, n)]
        assert sp.blocks.free_blocks == free - 4
        random.Random(1).shuffle(taken)
        for at in range(0, len(taken), 300):
            with sp.store:
                for page in taken[at : at + 300]:
                    sp.pages.free(page)
        assert sp.blocks.free_blocks >= free - 1


def test_page_0_of_each_block_is_its_map() -> None:
    with space(16 * BLOCK) as sp:
        for kind in (CLASS_META, CLASS_DATA):
            with sp.store:
                runs = sp.pages.alloc(511, kind)
            assert all(first % PAGES_PER_BLOCK for first, _ in runs)
            for block in {block_of(first) for first, _ in runs}:
                page = sp.store.read(first_page(block), MAGIC_PAGE_MAP)
                assert page[PAGE_MAP_USED_OFFSET] & 1


def test_data_and_metadata_are_in_different_blocks_while_there_is_room() -> None:
    with space(16 * BLOCK) as sp:
        blocks: dict[int, set[int]] = {CLASS_META: set(), CLASS_DATA: set()}
        for i in range(1000):
            kind = (CLASS_META, CLASS_DATA)[i % 2]
            with sp.store:
                ((page, _),) = sp.pages.alloc(1, kind)
            blocks[kind].add(page // PAGES_PER_BLOCK)
        assert not blocks[CLASS_META] & blocks[CLASS_DATA]
        assert blocks[CLASS_META] | blocks[CLASS_DATA] == set(sp.blocks.page_granular_blocks())


def test_the_goal_comes_first() -> None:
    with space(16 * BLOCK) as sp:
        with sp.store:
            ((first, _),) = sp.pages.alloc(20, CLASS_DATA)
        with sp.store:
            sp.pages.free(PageNo(first + 5), 10)
        with sp.store:
            runs = sp.pages.alloc(12, CLASS_DATA, PageNo(first + 8))
        assert runs[0] == (first + 8, 7)  # as far as it goes
        assert sum(length for _, length in runs) == 12
