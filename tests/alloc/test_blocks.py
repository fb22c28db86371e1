"""Blocks and pages against a model: who owns what, what is zero, and nothing is ever half done."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pkernfs.alloc.blocks import INLINE_ZERO_BLOCKS, IsolatedBlocks
from pkernfs.errors import CorruptionError, NoSpaceError, ZeroingNeeded
from pkernfs.layout import (
    BLOCK,
    BLOCKS_PER_GIB,
    CLASS_DATA,
    CLASS_META,
    MAP_CARVED_OFFSET,
    MAP_USED_OFFSET,
    MAP_ZERO_OFFSET,
    PAGES_PER_BLOCK,
    first_page,
    page_offset,
)
from pkernfs.quantities import BlockNo, BlockRun, Ino, PageNo, PhysAddr, RegionOff, pages_from
from support.space import META_BLOCK, GiveUp, Space, space

GIB = 1 << 30


# ------------------------------------------------------------------------------ the machine


class SpaceMachine(RuleBasedStateMachine):
    """Blocks with owners, dirty and clean, claims, and pages."""

    @initialize(blocks=st.integers(5, 14))
    def start(self, blocks: int) -> None:
        self.space = Space(blocks * BLOCK)
        self.owned: dict[BlockNo, Ino] = {}  # block: owner
        self.claims: list[IsolatedBlocks] = []
        self.page_owners: dict[PageNo, int] = {}  # page: class
        used = self.space.pages._free
        self.meta_pages = {
            block * PAGES_PER_BLOCK + bit
            for block, mask in used.items()
            for bit in range(PAGES_PER_BLOCK)
            if not mask >> bit & 1
        }

    def teardown(self) -> None:
        if hasattr(self, "space"):
            self.space.close()

    def expected_free(self) -> int:
        return (
            self.space.total - 2 - len(self.owned) - len(self.space.blocks.page_granular_blocks())
        )

    @rule(
        count=st.integers(1, 12),
        near=st.none() | st.integers(0, 15),
        owner=st.integers(1, 3),
        keep=st.booleans(),
        give_up=st.booleans(),
    )
    def alloc(
        self, count: int, near: BlockNo | None, owner: Ino, keep: bool, give_up: bool
    ) -> None:
        sp = self.space
        free = self.expected_free()
        claimed = sum(n for isolated in self.claims for _, n in isolated.runs)
        states = bytes(sp.blocks._state), bytes(sp.blocks._zero)
        try:
            with sp.store:
                runs = sp.blocks.alloc(count, near, owner=owner if keep else None)
                taken = [BlockNo(b) for first, n in runs for b in range(first, first + n)]
                assert len(taken) == count == len(set(taken))
                assert not set(taken) & self.owned.keys()
                assert (
                    near is None
                    or near not in range(sp.total)
                    or taken[0] == near
                    or (near in self.owned or states[0][near])
                )
                if give_up:
                    raise GiveUp
        except NoSpaceError:
            assert count > free
            assert not keep or bytes(sp.blocks._zero) == states[1]
            return
        except ZeroingNeeded as e:
            asked = sum(n for _, n in e.blocks)
            assert asked > INLINE_ZERO_BLOCKS or claimed
            if e.blocks:
                self.claims.append(sp.blocks.isolate(e.blocks))
            return
        except GiveUp:
            assert sp.blocks.free_blocks == free
            return
        for block in taken:
            assert sp.region.is_zero(RegionOff(block * BLOCK), BLOCK), "stale bytes"
            self.owned[block] = owner
            # What the owner stores there must never be seen again.
            sp.region.copy_in(RegionOff(block * BLOCK + 17 * owner), b"stale")
            sp.region.copy_in(RegionOff((block + 1) * BLOCK - 1), b"s")

    @rule(number=st.integers(0, 100), count=st.integers(1, 4), give_up=st.booleans())
    def free(self, number: int, count: int, give_up: bool) -> None:
        if not self.owned:
            return
        first = sorted(self.owned)[number % len(self.owned)]
        blocks: list[BlockNo] = []
        while first + len(blocks) in self.owned and len(blocks) < count:
            blocks.append(BlockNo(first + len(blocks)))
        try:
            with self.space.store:
                self.space.blocks.free(first, len(blocks))
                # They are not to be had before the end of the transaction.
                free = self.space.blocks.free_blocks
                again: list[BlockRun] = []
                if free:
                    again = self.space.blocks.alloc(1, first, zeroed=False)
                    assert not set(blocks) & {again[0][0]}
                if give_up or again:
                    raise GiveUp
        except ZeroingNeeded:
            return
        except GiveUp:
            if give_up:
                return
            self.space.free(first, len(blocks))
        for block in blocks:
            del self.owned[block]

    @rule(most=st.integers(1, 6))
    def isolate(self, most: int) -> None:
        isolated = self.space.blocks.next_dirty(most)
        if isolated:
            assert not {b for f, n in isolated.runs for b in range(f, f + n)} & self.owned.keys()
            assert sum(n for _, n in isolated.runs) <= most
            self.claims.append(isolated)

    @rule(finish=st.booleans())
    def end_claim(self, finish: bool) -> None:
        if self.claims:
            isolated = self.claims.pop()
            if finish:
                self.space.zero(isolated)
            else:
                self.space.blocks.putback(isolated)

    @rule(owner=st.integers(1, 3))
    def stop_growing(self, owner: Ino) -> None:
        self.space.blocks.drop_preallocation(owner)

    @rule(
        count=st.integers(1, 511),
        kind=st.sampled_from([CLASS_META, CLASS_DATA]),
        near=st.integers(0, 1 << 12),
        give_up=st.booleans(),
    )
    def alloc_pages(self, count: int, kind: int, near: PageNo, give_up: bool) -> None:
        sp = self.space
        free = sp.pages.free_pages + sp.blocks.free_blocks * 511
        before = sp.pages.free_pages, sp.blocks.free_blocks
        try:
            with sp.store:
                runs = sp.pages.alloc(count, kind, near)
                taken = [p for first, n in runs for p in pages_from(first, n)]
                if give_up:
                    raise GiveUp
        except NoSpaceError:
            claimed = any(isolated.runs for isolated in self.claims)
            assert count > sp.pages.free_pages
            assert not sp.blocks.free_blocks or claimed
            assert before == (sp.pages.free_pages, sp.blocks.free_blocks)
            return
        except (GiveUp, ZeroingNeeded):
            assert before == (sp.pages.free_pages, sp.blocks.free_blocks)
            return
        assert free >= count == len(set(taken)) == len(taken)
        assert not set(taken) & self.page_owners.keys()
        assert not set(taken) & self.meta_pages
        assert all(page % PAGES_PER_BLOCK for page in taken)
        for page in taken:
            assert page // PAGES_PER_BLOCK not in self.owned
            self.page_owners[page] = kind
            if kind == CLASS_DATA:
                sp.region.copy_in(page_offset(page), b"stale")

    @rule(seed=st.integers(0, 1000), share=st.sampled_from([0.1, 0.9, 1.0]), give_up=st.booleans())
    def free_pages(self, seed: int, share: float, give_up: bool) -> None:
        rnd = random.Random(seed)
        chosen = [page for page in sorted(self.page_owners) if rnd.random() < share]
        before = self.space.pages.free_pages, self.space.blocks.free_blocks
        try:
            with self.space.store:
                for page in chosen:
                    self.space.pages.free(page)
                if give_up:
                    raise GiveUp
        except GiveUp:
            assert before == (self.space.pages.free_pages, self.space.blocks.free_blocks)
            return
        for page in chosen:
            del self.page_owners[page]

    @rule()
    def reload(self) -> None:
        """A crash: what is in memory only is gone, and everything else is as it was."""
        blocks, pages = self.space.blocks, self.space.pages
        self.claims = []
        before = (
            blocks.free_blocks,
            pages.free_pages,
            blocks.page_granular_blocks(),
            bytes(blocks._zero),
        )
        self.space.load()
        blocks, pages = self.space.blocks, self.space.pages
        assert before == (
            blocks.free_blocks, pages.free_pages, blocks.page_granular_blocks(), bytes(blocks._zero)
        )  # fmt: skip

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "space"):
            return
        sp = self.space
        carved = set(sp.blocks.page_granular_blocks())
        assert sp.blocks.free_blocks == self.expected_free()
        assert sp.bits(MAP_USED_OFFSET) == {0, 1} | carved | self.owned.keys()
        assert sp.bits(MAP_CARVED_OFFSET) == carved
        in_use = len(self.page_owners) + len(self.meta_pages) - 1
        assert sp.pages.free_pages == len(carved) * 511 - in_use
        assert {page // PAGES_PER_BLOCK for page in self.page_owners} <= carved

    @invariant()
    def zeros_are_zeros(self) -> None:
        if not hasattr(self, "space"):
            return
        known = self.space.bits(MAP_ZERO_OFFSET)
        assert known == {b for b, bit in enumerate(self.space.blocks._zero) if bit}
        assert not known & self.space.bits(MAP_USED_OFFSET)
        for block in known:
            assert self.space.region.is_zero(RegionOff(block * BLOCK), BLOCK)


TestSpace = pytest.mark.slow("a model of all of it")(SpaceMachine.TestCase)


# ------------------------------------------------------------------------------ contiguity


def test_one_run_if_there_is_one() -> None:
    with space(64 * BLOCK) as sp:
        taken = sp.alloc(60)
        assert taken == list(range(taken[0], taken[0] + 60))
        for block in map(BlockNo, (*range(5, 10), *range(20, 32), *range(40, 45))):
            sp.free(block, 1)
        assert sp.alloc(12) == list(range(20, 32))
        with sp.store, pytest.raises(ZeroingNeeded):
            sp.blocks.alloc(10)
        assert sorted(sp.alloc(10)) == [*range(5, 10), *range(40, 45)]


def test_the_goal_comes_first() -> None:
    with space(64 * BLOCK) as sp:
        assert sp.alloc(3, 30) == [30, 31, 32]
        assert sp.alloc(2, 33) == [33, 34]
        assert sp.alloc(1, 40) == [40]
        assert sp.alloc(8, 35)[:5] == [35, 36, 37, 38, 39]  # as far as it goes
        for nowhere in (-1, 64, 1 << 40, 30):
            assert len(sp.alloc(1, nowhere)) == 1


@pytest.mark.parametrize("phase", [None, 0, BLOCK, 300 * BLOCK, GIB - BLOCK])
def test_a_gib_starts_at_a_physical_gib(phase: int | None) -> None:
    base = None if phase is None else PhysAddr((7 << 30) + phase)
    with space(4 * GIB, base) as sp:
        for _ in range(2):
            taken = sp.alloc(BLOCKS_PER_GIB)
            assert taken == list(range(taken[0], taken[0] + BLOCKS_PER_GIB))
            assert ((base or 0) + taken[0] * BLOCK) % GIB == 0
        # Not enough aligned room is no reason to fail.
        taken = sp.alloc(BLOCKS_PER_GIB + 100)
        assert len(taken) == BLOCKS_PER_GIB + 100


def test_small_ones_do_not_cut_up_an_empty_region() -> None:
    with space(3 * GIB) as sp:
        for _ in range(20):
            sp.alloc(1)
        assert sp.alloc(BLOCKS_PER_GIB)[0] % BLOCKS_PER_GIB == 0


def test_two_that_grow_in_turn_keep_out_of_each_others_way() -> None:
    with space(2 * GIB) as sp:
        files: dict[int, list[BlockNo]] = {7: [], 8: []}
        for _ in range(200):
            for owner, have in files.items():
                have += sp.alloc(1, have[-1] + 1 if have else None, owner)
        for have in files.values():
            pieces = 1 + sum(b != a + 1 for a, b in pairwise(have))
            assert pieces <= 27  # windows of 8 and more, and not 200
        # Nobody is refused because of what is kept.
        left = sp.blocks.free_blocks
        assert len(sp.alloc(left)) == left
        with sp.store, pytest.raises(NoSpaceError):
            sp.blocks.alloc(1)


def test_what_is_kept_is_let_go() -> None:
    with space(64 * BLOCK) as sp:
        first = sp.alloc(1, 10, owner=5)
        assert first == [10]
        assert sp.alloc(1, 11) != [11]
        assert sp.alloc(1, 11, owner=5) == [11]
        sp.blocks.drop_preallocation(Ino(5))
        assert sp.alloc(1, 12) == [12]


# ------------------------------------------------------------------------------ clean ones first


def test_clean_blocks_are_taken_before_freed_ones() -> None:
    """What was in use would have to be zeroed first."""
    with space(64 * BLOCK) as sp:
        first = sp.alloc(20)
        for block in first:
            sp.free(block, 1)
        with sp.store:
            ((start, count),) = sp.blocks.alloc(20)
        assert (start, count) == (first[-1] + 1, 20)
        assert sp.alloc(1) == [start + 20]
        # Where the bytes may be anything, the first will do.
        with sp.store:
            assert sp.blocks.alloc_page_granular() == first[0]
        # They are taken before a file has to be cut up, and when there are no others.
        clean = sp.blocks._zero.count(1)
        assert clean > 15
        assert sp.alloc(clean) == list(range(start + 21, start + 21 + clean))
        assert sp.alloc(3) == first[1:4]


def test_the_goal_comes_before_a_clean_block() -> None:
    with space(64 * BLOCK) as sp:
        sp.alloc(10)
        for block in map(BlockNo, range(5, 9)):
            sp.free(block, 1)
        assert sp.alloc(2, 5) == [5, 6]


def test_one_dirty_run_comes_before_clean_pieces() -> None:
    with space(32 * BLOCK) as sp:
        taken = sp.alloc(sp.blocks.free_blocks)
        for block in taken[3:9]:
            sp.free(block, 1)
        for block in (taken[11], taken[13], taken[15], taken[17]):
            sp.free(block, 1)
            sp.zero(sp.blocks.isolate([BlockRun(block, 1)]))
        assert sp.alloc(3) == taken[3:6]
        assert sp.alloc(1) == [taken[11]]


def test_what_is_kept_for_a_file_is_passed_over() -> None:
    with space(64 * BLOCK) as sp:
        assert sp.alloc(1, 10, owner=5) == [10]
        kept = sp.blocks._windows[Ino(5)]
        assert (kept.first, kept.blocks) == (11, 8)
        assert sp.alloc(12) == list(range(19, 31))
        assert sp.alloc(2) == list(range(3, 5))


def test_a_clean_gib_comes_before_a_dirty_one() -> None:
    with space(4 * GIB) as sp:
        first = sp.alloc(BLOCKS_PER_GIB)
        sp.free(first[7], 1)
        for block in first[:7] + first[8:]:
            sp.free(block, 1)
        assert sp.alloc(BLOCKS_PER_GIB)[0] == first[0] + BLOCKS_PER_GIB
        assert sp.alloc(BLOCKS_PER_GIB)[0] == first[0] + 2 * BLOCKS_PER_GIB
        assert sp.alloc(BLOCKS_PER_GIB)[0] == first[0], "aligned, though dirty"


# ------------------------------------------------------------------------------ zeros and errors


def test_a_fresh_region_needs_no_zeroing() -> None:
    with space(64 * BLOCK) as sp:
        with sp.store:
            runs = sp.blocks.alloc(50)
        assert sum(n for _, n in runs) == 50


def test_few_dirty_blocks_are_zeroed_at_once_and_many_are_asked_for() -> None:
    with space(32 * BLOCK) as sp:
        taken = sp.alloc(sp.blocks.free_blocks)
        for block in taken:
            sp.region.copy_in(RegionOff(block * BLOCK), b"\xff" * BLOCK)
        for block in taken:
            sp.free(block, 1)
        with sp.store:
            ((first, count),) = sp.blocks.alloc(INLINE_ZERO_BLOCKS)
        assert sp.region.is_zero(RegionOff(first * BLOCK), count * BLOCK)
        free = sp.blocks.free_blocks
        with pytest.raises(ZeroingNeeded) as caught, sp.store:
            sp.blocks.alloc(INLINE_ZERO_BLOCKS + 1)
        assert sum(n for _, n in caught.value.blocks) == INLINE_ZERO_BLOCKS + 1
        assert sp.blocks.free_blocks == free
        isolated = sp.blocks.isolate(caught.value.blocks)
        other = sp.blocks.next_dirty(100)
        assert other
        claimed = {b for c in (isolated, other) for f, n in c.runs for b in range(f, f + n)}
        assert len(claimed) == sum(n for c in (isolated, other) for _, n in c.runs)
        with pytest.raises(ZeroingNeeded), sp.store:  # later, not never
            sp.blocks.alloc(free)
        sp.zero(isolated)
        sp.blocks.putback(other)
        for block in sp.alloc(free):
            assert sp.region.is_zero(RegionOff(block * BLOCK), BLOCK)
        assert sp.blocks.next_dirty(1) is None


def test_freeing_what_is_not_in_use() -> None:
    with space(16 * BLOCK) as sp:
        (block,) = sp.alloc(1)
        before = sp.blocks.free_blocks
        for first, count in ((block, 2), (block + 1, 1), (block - 1, 3)):
            if first <= META_BLOCK:
                continue
            with pytest.raises(CorruptionError), sp.store:
                sp.blocks.free(BlockNo(first), count)

        def twice() -> None:
            sp.blocks.free(block, 1)
            sp.blocks.free(block, 1)

        with pytest.raises(CorruptionError), sp.store:
            twice()
        page = first_page(META_BLOCK)
        for number in (page, page + 200, block * PAGES_PER_BLOCK):
            with pytest.raises(CorruptionError), sp.store:
                sp.pages.free(PageNo(number))
        assert sp.blocks.free_blocks == before


def _nothing_half_done(work: Callable[[Space], object]) -> None:
    with space(8 * BLOCK) as sp:
        start = RegionOff(0)
        before = sp.region.read(start, BLOCK), sp.blocks.free_blocks, sp.pages.free_pages
        with pytest.raises(NoSpaceError), sp.store:
            work(sp)
        assert (sp.region.read(start, BLOCK), sp.blocks.free_blocks, sp.pages.free_pages) == before
        sp.load()
        assert (sp.blocks.free_blocks, sp.pages.free_pages) == before[1:]


def test_no_space_leaves_nothing_half_done() -> None:
    def blocks(sp: Space) -> None:
        sp.blocks.alloc(3)
        sp.blocks.alloc(100)

    def pages(sp: Space) -> None:
        while True:
            sp.pages.alloc(100, CLASS_DATA)

    _nothing_half_done(blocks)
    _nothing_half_done(lambda sp: sp.blocks.alloc(6, BlockNo(4), owner=Ino(3)))
    with space(8 * BLOCK) as sp:
        free = sp.blocks.free_blocks, sp.pages.free_pages
        with pytest.raises(NoSpaceError), sp.store:
            pages(sp)
        assert (sp.blocks.free_blocks, sp.pages.free_pages) == free
        sp.load()
        assert (sp.blocks.free_blocks, sp.pages.free_pages) == free


# ------------------------------------------------------------------------------ what is in flight


def test_a_claim_comes_in_pieces() -> None:
    isolated = IsolatedBlocks([BlockRun(BlockNo(3), 5), BlockRun(BlockNo(20), 1)])
    assert isolated.pieces(4 * BLOCK) == [
        (3 * BLOCK, 4 * BLOCK),
        (7 * BLOCK, BLOCK),
        (20 * BLOCK, BLOCK),
    ]
    assert [length for _, length in isolated.pieces()] == [8 << 20, 2 << 20, 2 << 20]


@pytest.mark.parametrize(("count", "kept"), [(1, 8), (4, 8), (5, 10), (300, 512)])
def test_how_much_is_kept_behind_a_growing_file(count: int, kept: int) -> None:
    """At least 8 blocks, or twice what it took, up to 1 GiB."""
    with space(3 * GIB) as sp:
        taken = sp.alloc(count, 600, owner=5)
        assert taken[0] == 600
        others = sp.alloc(sp.blocks.free_blocks - kept)
        assert not set(others) & set(range(600, 600 + count + kept))


def test_the_64_files_that_grew_last_have_room() -> None:
    with space(2 * GIB) as sp:
        for owner in range(65):
            sp.alloc(1, 100 + 10 * owner, owner=owner)
        assert sp.alloc(1, 101) == [101]
        assert sp.alloc(1, 111) != [111]


def test_a_chosen_block_is_nobody_elses_and_dirty() -> None:
    with space(16 * BLOCK) as sp:
        free = sp.blocks.free_blocks
        with sp.store:
            block = sp.blocks.choose(1, Ino(7))
            assert block not in {b for f, n in sp.blocks.alloc(free - 1) for b in range(f, f + n)}
            sp.region.copy_in(RegionOff(block * BLOCK), b"filled")
            sp.blocks.alloc_chosen(block)
        assert sp.blocks.free_blocks == 0
        assert block in sp.bits(MAP_USED_OFFSET)
        assert block not in sp.bits(MAP_ZERO_OFFSET)


def test_a_chosen_block_that_is_not_wanted_is_free() -> None:
    with space(16 * BLOCK) as sp:
        free = sp.blocks.free_blocks
        with sp.store:
            block = sp.blocks.choose(1, Ino(7))
            sp.region.copy_in(RegionOff(block * BLOCK), b"filled")
            sp.blocks.free_chosen(block)
        assert sp.blocks.free_blocks == free
        assert block not in sp.bits(MAP_USED_OFFSET)
        assert block not in sp.bits(MAP_ZERO_OFFSET)
        assert sp.alloc(1, block) == [block]
        assert sp.region.is_zero(RegionOff(block * BLOCK), BLOCK)
