"""Trees against a dict: all three kinds, deep, ascending, descending, random, with collisions."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, NoSpaceError
from pkernfs.fs.btree import Tree
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import (
    EXTENT,
    EXTENT_BYTES,
    INNER_SLOT,
    ITEM_SLOT,
    MAGIC_TREE,
    MAX_EXTENT_SLOTS,
    MAX_INNER_SLOTS,
    NO_PAGE,
    PAGE,
    TREE,
    TREE_EXTENTS,
    TREE_NAMES,
    TREE_OFFSET,
    TREE_SLOTS_OFFSET,
    TREE_XATTRS,
    Extent,
)
from pkernfs.quantities import Ino, PageNo
from support.checking import MemoryFile

OWNER = Ino(77)
KINDS = (TREE_EXTENTS, TREE_NAMES, TREE_XATTRS)


class Grown:
    """A tree in a region, and the dict that it should be."""

    def __init__(self, kind: int, size: int = 64 << 20) -> None:
        self.memory = MemoryFile(size)
        self.region = self.memory.open()
        make_filesystem(self.region)
        self.fs = mount_filesystem(self.region)
        self.tree = Tree(self.fs.store, self.fs.super.pages, kind, OWNER, NO_PAGE)
        self.model: dict[int, bytes] = {}

    def close(self) -> None:
        self.region.close()
        self.memory.close()

    def insert(self, key: int, data: bytes) -> None:
        self.model[key] = data
        if self.tree.kind == TREE_EXTENTS:
            self.tree.insert_extent(Extent(key, *self.extent_words(data)))
        else:
            self.tree.insert_item(key, data)

    def insert_now(self, key: int) -> None:
        with self.fs.store:
            self.insert(key, b"now")

    def remove(self, key: int) -> None:
        del self.model[key]
        self.tree.remove(key)

    @staticmethod
    def extent_words(data: bytes) -> tuple[PageNo, int]:
        return PageNo(len(data)), sum(data) + 1

    def contents(self, start: int = 0) -> list[tuple[int, object]]:
        """What the tree says, from ``start`` on."""
        if self.tree.kind == TREE_EXTENTS:
            return [(key, words) for key, *words in self.tree.extents(start)]
        return [(key, bytes(item)) for key, item in self.tree.items(start)]

    def expected(self, start: int = 0) -> list[tuple[int, object]]:
        """What the dict says."""
        keys = sorted(key for key in self.model if key >= start)
        if self.tree.kind == TREE_EXTENTS:
            return [(key, list(self.extent_words(self.model[key]))) for key in keys]
        return [(key, self.model[key]) for key in keys]

    def check(self) -> None:
        """Contents, every look-up near them, and the format's rules for every node."""
        assert self.contents() == self.expected()
        ordered = sorted(self.model)
        for key in ordered[:: max(1, len(ordered) // 200)]:
            for probe in {max(key - 1, 0), key, key + 1}:
                self.check_probe(probe, ordered)
        assert (self.tree.root == 0) == (not self.model)
        self.check_shape()

    def check_probe(self, probe: int, ordered: list[int]) -> None:
        after = bisect_right(ordered, probe)
        if self.tree.kind == TREE_EXTENTS:
            found = self.tree.extent_at(probe)
            expected = ordered[after - 1] if after else None
            assert (found[0] if found else None) == expected
        else:
            found_items = [(k, bytes(i)) for k, i in self.tree.find(probe, 0)]
            assert found_items == ([(probe, self.model[probe])] if probe in self.model else [])

    def check_shape(self) -> int:
        """docs/format.md, section 7: returns the number of levels."""
        if not self.tree.root:
            return 0
        pages = list(self.tree.pages())
        assert len(set(pages)) == len(pages)
        depths: set[int] = set()
        self._check_node(self.tree.root, 0, 1 << 64, 0, depths)
        assert len(depths) == 1
        return depths.pop()

    def _check_node(self, page: PageNo, low: int, end: int, depth: int, depths: set[int]) -> None:
        node = self.fs.store.read(page, MAGIC_TREE)
        kind, level, count, heap, garbage = TREE.unpack_from(node, TREE_OFFSET)
        assert kind == self.tree.kind
        assert int.from_bytes(node[16:24], "little") == OWNER
        assert count
        width = INNER_SLOT.size if level else (EXTENT_BYTES if kind == TREE_EXTENTS else 16)
        keys = [
            int.from_bytes(node[at : at + 8], "little")
            for at in range(TREE_SLOTS_OFFSET, TREE_SLOTS_OFFSET + count * width, width)
        ]
        assert keys == sorted(set(keys)), f"level {level}: keys out of order"
        assert keys[-1] < end
        if depth:
            assert keys[0] >= low
        if not level:
            depths.add(depth + 1)
            if kind == TREE_EXTENTS:
                assert count <= MAX_EXTENT_SLOTS
            else:
                self._check_heap(node, count, heap, garbage)
            return
        assert count <= MAX_INNER_SLOTS
        for slot in range(count):
            _key, child = INNER_SLOT.unpack_from(node, TREE_SLOTS_OFFSET + 16 * slot)
            child_end = keys[slot + 1] if slot + 1 < count else end
            self._check_node(child, keys[slot] if slot else low, child_end, depth + 1, depths)
            assert self.fs.store.read(child, MAGIC_TREE)[TREE_OFFSET + 1] == level - 1

    @staticmethod
    def _check_heap(node: memoryview, count: int, heap: int, garbage: int) -> None:
        spans = []
        for slot in range(count):
            _key, offset, length, zero = ITEM_SLOT.unpack_from(node, TREE_SLOTS_OFFSET + 16 * slot)
            assert zero == 0
            spans.append((offset, offset + length))
        spans.sort()
        assert heap >= TREE_SLOTS_OFFSET + 16 * count
        assert spans[0][0] >= heap
        assert spans[-1][1] <= PAGE
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert sum(b - a for a, b in spans) + garbage == PAGE - heap


@pytest.fixture(params=KINDS, ids=("extents", "names", "xattrs"))
def grown(request: pytest.FixtureRequest) -> Iterator[Grown]:
    tree = Grown(request.param)
    yield tree
    tree.close()


class TreeMachine(RuleBasedStateMachine):
    """Batches of inserts and removals; small leaves' worth of keys so that nodes split and join."""

    def __init__(self) -> None:
        super().__init__()
        self.grown: Grown | None = None

    @initialize(kind=st.sampled_from(KINDS))
    def start(self, kind: int) -> None:
        self.grown = Grown(kind, 16 << 20)
        self.free_at_start = self.grown.fs.super.pages.free_pages

    def run(self, work: Callable[[Grown], None], give_up: bool) -> None:
        grown = self.grown
        assert grown is not None
        before, root = dict(grown.model), grown.tree.root
        try:
            with grown.fs.store:
                work(grown)
                grown.check_shape()
                if give_up:
                    raise NoSpaceError("on purpose")
        except NoSpaceError:
            grown.model, grown.tree.root = before, root

    @rule(
        first=st.integers(1, 1 << 20),
        step=st.sampled_from([-7, -1, 1, 3, 1 << 12]),
        count=st.integers(1, 300),
        length=st.sampled_from([10, 12, 40, 264, 775]),
        give_up=st.booleans(),
    )
    def insert_series(self, first: int, step: int, count: int, length: int, give_up: bool) -> None:
        def work(grown: Grown) -> None:
            for i in range(count):
                key = first + i * step
                if key > 0 and key not in grown.model:
                    grown.insert(key, bytes([i % 251]) * length)

        self.run(work, give_up)

    @rule(
        seed=st.integers(0, 1 << 16),
        count=st.integers(1, 200),
        top=st.sampled_from([500, 1 << 40, (1 << 63) - 1]),
        give_up=st.booleans(),
    )
    def insert_scattered(self, seed: int, count: int, top: int, give_up: bool) -> None:
        rnd = random.Random(seed)

        def work(grown: Grown) -> None:
            for _ in range(count):
                key = rnd.randrange(1, top)
                if key not in grown.model:
                    grown.insert(key, rnd.randbytes(rnd.randrange(10, 300)))

        self.run(work, give_up)

    @rule(
        seed=st.integers(0, 1 << 16),
        share=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
        order=st.sampled_from(["up", "down", "any"]),
        give_up=st.booleans(),
    )
    def remove_some(self, seed: int, share: float, order: str, give_up: bool) -> None:
        rnd = random.Random(seed)

        def work(grown: Grown) -> None:
            chosen = [key for key in sorted(grown.model) if rnd.random() < share]
            if order == "down":
                chosen.reverse()
            elif order == "any":
                rnd.shuffle(chosen)
            for key in chosen:
                grown.remove(key)

        self.run(work, give_up)

    @rule(start=st.integers(0, 1 << 21))
    def read_from(self, start: int) -> None:
        assert self.grown is not None
        assert self.grown.contents(start) == self.grown.expected(start)

    @invariant()
    def same(self) -> None:
        if self.grown:
            self.grown.check()

    def teardown(self) -> None:
        if self.grown:
            with self.grown.fs.store:
                self.grown.tree.destroy()
            # Nothing has leaked: every page but the maps of blocks that were carved is back.
            assert self.grown.fs.super.pages.free_pages % 511 == self.free_at_start % 511
            self.grown.close()


TestTreeMachine = pytest.mark.slow("a model of all of it")(TreeMachine.TestCase)


def _orders(count: int) -> dict[str, list[int]]:
    shuffled = list(range(1, count + 1))
    random.Random(5).shuffle(shuffled)
    return {
        "ascending": list(range(1, count + 1)),
        "descending": list(range(count, 0, -1)),
        "random": shuffled,
    }


def _in_batches(grown: Grown, work: Callable[[int], None], keys: list[int], size: int = 64) -> None:
    for at in range(0, len(keys), size):
        with grown.fs.store:
            for key in keys[at : at + size]:
                work(key)


@pytest.mark.slow("three levels take 50,000 keys")
@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_three_levels_up_and_down(grown: Grown, order: str) -> None:
    # Large items make a deep tree of few keys; extents are always 24 bytes.
    count, length = (50_000, 1) if grown.tree.kind == TREE_EXTENTS else (3_000, 775)
    data = b"x" * length
    keys = _orders(count)[order]
    _in_batches(grown, lambda key: grown.insert(key * 16, data), keys)
    assert grown.check_shape() >= 3
    grown.check()
    # Thin it out from the front, which moves the first keys of inner nodes, and fill it again.
    gone = [key * 16 for key in range(1, count + 1) if key % 40]
    _in_batches(grown, grown.remove, gone)
    grown.check()
    again = [key - 8 for key in gone[:: 1 if length > 1 else 20]]
    _in_batches(grown, lambda key: grown.insert(key, data), again)
    grown.check()
    _in_batches(grown, grown.remove, sorted(grown.model))
    grown.check()
    assert grown.tree.root == 0


@pytest.mark.slow("two inner nodes take 60,000 keys")
def test_inner_nodes_join_below_a_moved_separator() -> None:
    """A key below its inner node's first slot is still found after that node is joined."""
    grown = Grown(TREE_EXTENTS)
    _in_batches(grown, lambda key: grown.insert(key * 100, b"y"), list(range(1, 60_001)))
    root = grown.fs.store.read(grown.tree.root, MAGIC_TREE)
    _kind, level, count, _heap, _garbage = TREE.unpack_from(root, TREE_OFFSET)
    assert level == 2
    assert count > 1
    separator = INNER_SLOT.unpack_from(root, TREE_SLOTS_OFFSET + 16)[0]
    # The first leaf of the second inner node goes, and a key comes back to where it was.
    _in_batches(grown, grown.remove, list(range(separator, separator + 16_800, 100)))
    grown.insert_now(separator + 1)
    grown.check_probe(separator + 1, sorted(grown.model))
    # Both inner nodes become sparse, and join.
    middle = [key for key in sorted(grown.model) if key != separator + 1]
    _in_batches(grown, grown.remove, [key for key in middle if key // 100 % 16])
    assert grown.check_shape() == 2
    grown.check_probe(separator + 1, sorted(grown.model))
    with grown.fs.store:
        grown.remove(separator + 1)
    grown.check()
    grown.close()


@pytest.mark.slow("inner nodes take 60,000 keys")
@pytest.mark.parametrize("level", [0, 1])
def test_separators_stay_ascending_when_keys_come_from_above(level: int) -> None:
    grown = Grown(TREE_EXTENTS)
    count = 400 if not level else 60_000
    _in_batches(grown, lambda key: grown.insert(key, b"z"), list(range(count, 0, -1)))
    grown.check_shape()
    grown.close()


def test_items_of_every_length_and_compaction(grown: Grown) -> None:
    if grown.tree.kind == TREE_EXTENTS:
        pytest.skip("extents have one length")
    rnd = random.Random(9)
    with grown.fs.store:
        for key in range(1, 60):
            grown.insert(key, rnd.randbytes(rnd.randrange(10, 776)))
    for _ in range(30):
        with grown.fs.store:
            for key in rnd.sample(sorted(grown.model), 20):
                grown.remove(key)
                grown.insert(key, rnd.randbytes(rnd.randrange(10, 776)))
        grown.check()


def test_a_key_that_is_not_there_cannot_be_removed(grown: Grown) -> None:
    with grown.fs.store:
        grown.insert(5, b"ten bytes.")
    with pytest.raises(CorruptionError), grown.fs.store:
        grown.tree.remove(6)
    assert [key for key, _ in grown.contents()] == [5]


def test_an_item_without_a_name_is_damage() -> None:
    grown = Grown(TREE_NAMES)
    with grown.fs.store:
        grown.insert(5, b"123456789")
    with pytest.raises(CorruptionError):
        grown.contents()
    grown.close()


def test_replace_extent_in_any_leaf() -> None:
    grown = Grown(TREE_EXTENTS)
    with grown.fs.store:
        for key in range(0, 3_000, 3):
            grown.insert(key, b"q")
    with grown.fs.store:
        for key in range(0, 3_000, 3):
            grown.tree.replace_extent(key, Extent(key, PageNo(key + 9), 2))
    assert list(grown.tree.extents(0)) == [(key, key + 9, 2) for key in range(0, 3_000, 3)]
    with pytest.raises(CorruptionError), grown.fs.store:
        grown.tree.replace_extent(1, Extent(1, PageNo(1), 1))
    assert EXTENT.size == 24
    grown.close()


# ------------------------------------------------------------------------------ groups of keys


@settings(max_examples=10)
@given(seed=st.integers(0, 1 << 32))
def test_what_is_found_in_a_group_is_what_is_in_it(seed: int) -> None:
    grown = Grown(TREE_NAMES, 16 << 20)
    rnd = random.Random(seed)
    with grown.fs.store:
        for _ in range(300):
            key = rnd.randrange(1, 20) << 11 | rnd.randrange(2048)
            if key not in grown.model:
                grown.insert(key, rnd.randbytes(200))
    for group in range(20):
        expected = [k for k in sorted(grown.model) if k >> 11 == group]
        assert [k for k, _ in grown.tree.find(group << 11, 11)] == expected
    grown.close()
