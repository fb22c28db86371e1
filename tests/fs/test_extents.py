"""Where the pages of files are, against a dict of pages; and what files of many sizes come to."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import CorruptionError, NoSpaceError
from pkernfs.fs import extents as extents_module
from pkernfs.fs.extents import ExtentMap
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.inodes import Inode
from pkernfs.layout import (
    BLOCK,
    INODE_FLAG_BODY,
    INODE_FLAG_TABLE,
    MAX_INLINE_EXTENTS,
    PAGE,
    PAGES_PER_BLOCK,
    TREE_EXTENTS,
    Extent,
    first_page,
    page_offset,
)
from pkernfs.quantities import BlockNo, Ino, PageNo
from support.files import (
    MIB,
    PUNCH,
    ROOT,
    contents,
    in_a_gib,
    make,
    noise,
    resize,
    until_full,
)
from support.space import Space, space

SLOT = PAGES_PER_BLOCK
STALE = b"\xdb" * PAGE


class File:
    """A file that is in no inode table, and where each of its pages should be."""

    def __init__(self, mapped: Mapped, number: int) -> None:
        self.space = mapped.space
        self.map = mapped.map
        self.inode = Inode()
        self.inode.ino = Ino(number)
        self.inode.mode = stat.S_IFREG | 0o644
        self.model: dict[int, PageNo] = {}

    # ------------------------------------------------------------------ changes

    def fill(self, start: int, end: int, size: int, *, give_up: bool = False) -> list[Extent]:
        """A transaction that gives file pages start..end-1 their memory; the new extents."""
        added: list[Extent] = []

        def work() -> None:
            added[:] = self.map.fill(self.inode, start, end, size)

        if not self.space.change(self.inode, work, give_up=give_up):
            return []
        self._check_added(added, start, end, size)
        for file_page, page, count in added:
            assert self.space.region.is_zero(page_offset(page), count * PAGE), "it is not all zero"
            self.space.region.copy_in(page_offset(page), STALE * count)
            self.model |= {file_page + i: PageNo(page + i) for i in range(count)}
        return added

    def _check_added(self, added: list[Extent], start: int, end: int, size: int) -> None:
        """Every hole is filled, empty slots by whole blocks, and nothing besides."""
        new = {page for first, _, count in added for page in range(first, first + count)}
        assert len(new) == sum(count for _, _, count in added)
        assert not new & self.model.keys()
        expected = set()
        for slot in range(start // SLOT, -(-end // SLOT)):
            pages = range(slot * SLOT, (slot + 1) * SLOT)
            asked = set(pages) & set(range(start, end))
            whole = (
                self.model.keys().isdisjoint(pages)
                and (slot > 0 or size > MIB or bool(self.inode.flags & INODE_FLAG_TABLE))
                # ... or the last free pages, as a block cannot be had any more
                and not (self.space.blocks.free_blocks == 0 and not new.issuperset(pages))
            )
            expected |= set(pages) if whole and asked else asked - self.model.keys()
        assert new == expected

    def remove(self, start: int, end: int, *, give_up: bool = False) -> None:
        """Transactions that free file pages start..end-1, as far as units go."""

        def work() -> None:
            at = end
            while at > start:
                after = self.map.remove(self.inode, start, at)
                assert start <= after < at
                at = after

        carved = {page for page, at in self.model.items() if self.is_carved(at)}
        if self.space.change(self.inode, work, give_up=give_up):
            for page in list(self.model):
                slot = page // SLOT * SLOT
                whole = start <= slot and slot + SLOT <= end
                if start <= page < end and (whole or page in carved):
                    del self.model[page]

    def promote(self) -> None:
        """Let a block take the place of the pages of the first slot."""
        found: list[BlockNo] = []

        def work() -> None:
            [(block, _)] = self.space.blocks.alloc(1, zeroed=False)
            self.map.promote(self.inode, block)
            found.append(block)

        self.space.change(self.inode, work)
        self.model |= {page: PageNo(first_page(found[-1]) + page) for page in range(SLOT)}

    # ------------------------------------------------------------------ what must be so

    def is_carved(self, page: PageNo) -> bool:
        return self.space.blocks.is_in_page_granular(page)

    def tree_pages(self) -> int:
        if not self.inode.flags & INODE_FLAG_BODY:
            return 0
        return len(list(self.map._tree(self.inode).pages()))

    def held(self) -> int:
        """Bytes that the space has less of, by :meth:`Space.free_bytes`."""
        whole = sum(not self.is_carved(page) for page in self.model.values()) // SLOT
        pages = len(self.model) - whole * SLOT + self.tree_pages()
        return (whole * (SLOT - 1) + pages) * PAGE

    def check(self) -> None:
        listed = list(self.map.after(self.inode, 0))
        self._check_format(listed)
        assert {f + i: p + i for f, p, n in listed for i in range(n)} == self.model
        assert self.inode.data_pages == len(self.model)
        edges = {0, SLOT}
        for first, _page, count in listed:
            edges |= {first, first + count - 1, first + count}
        for edge in sorted(edges)[:10]:
            for probe in {max(edge - 1, 0), edge, edge + 1}:
                below = [e for e in listed if e[0] <= probe]
                assert self.map.at(self.inode, probe) == (below[-1] if below else None)
                assert list(self.map.after(self.inode, probe)) == [
                    e for e in listed if e[0] >= probe
                ]
                self._check_end(probe * PAGE)
                self._check_end(probe * PAGE + 1)
        for start, end in pairwise(sorted(edges)[:10]):
            self.check_within(start, end)
            self.check_within(start + 1, end + 700)

    def _check_format(self, listed: list[Extent]) -> None:
        """docs/format.md, section 6: order, what is one extent, blocks and pages."""
        assert bool(self.inode.flags & INODE_FLAG_BODY) == bool(self.inode.body)
        if not self.inode.flags & INODE_FLAG_BODY:
            assert len(listed) <= MAX_INLINE_EXTENTS
        for left, right in pairwise(listed):
            assert left[0] + left[2] <= right[0]
            adjacent = left[0] + left[2] == right[0] and left[1] + left[2] == right[1]
            assert not adjacent or self.is_carved(left[1]) != self.is_carved(right[1])
        for first, page, count in listed:
            kinds = {self.is_carved(PageNo(p)) for p in (page, page + count - 1)}
            kinds |= {self.is_carved(PageNo(p)) for p in range(page, page + count, SLOT)}
            [carved] = kinds
            assert carved or first % SLOT == page % SLOT == count % SLOT == 0

    def check_within(self, start: int, end: int) -> None:
        found = list(self.map.within(self.inode, start, end))
        pages = {f + i: p + i for f, p, n in found for i in range(n)}
        assert pages == {f: p for f, p in self.model.items() if start <= f < end}
        holes = self.map.holes(self.inode, start, end)
        assert {f + i for f, n in holes for i in range(n)} == {
            f for f in range(start, end) if f not in self.model
        }
        assert all(a[0] + a[1] < b[0] for a, b in pairwise(holes))
        assert all(count > 0 for _, count in holes)

    def _check_end(self, size: int) -> None:
        last = (size - 1) // PAGE
        at = self.model.get(last)
        in_pages = at is None or self.is_carved(at)
        expected = (last + 1) * PAGE if in_pages else (last // SLOT + 1) * BLOCK
        assert self.map.allocation_end(self.inode, size) == (expected if size else 0)


class Mapped:
    """Two files in a space of their own."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.map = ExtentMap(space.store, space.blocks, space.pages)
        self.free = space.free_bytes()
        self.files = [File(self, 77), File(self, 78)]

    def check(self) -> None:
        for file in self.files:
            file.check()
        first, second = ({*file.model.values()} for file in self.files)
        assert not first & second
        assert [len(first), len(second)] == [len(file.model) for file in self.files]
        assert self.space.free_bytes() == self.free - sum(file.held() for file in self.files)


@pytest.fixture
def mapped() -> Iterator[Mapped]:
    with space(24 * MIB) as made:
        yield Mapped(made)


@pytest.fixture
def file(mapped: Mapped) -> Iterator[File]:
    yield mapped.files[0]
    mapped.check()


# ------------------------------------------------------------------------------ against a dict


PAGES = st.sampled_from([0, 1, 255, 256, 511, 512, 513, 1023, 1024, 1536]) | st.integers(0, 1600)
COUNTS = st.sampled_from([1, 2, 5, 256, 511, 512, 513, 1024]) | st.integers(1, 700)
STEPS = st.tuples(
    st.sampled_from(["fill", "fill", "scatter", "remove", "all", "promote"]),
    st.integers(0, 1), PAGES, COUNTS, st.booleans(),
)  # fmt: skip


@pytest.mark.slow("a model of all of it")
@given(steps=st.lists(STEPS, max_size=14))
def test_changes_against_a_dict(steps: list[tuple[str, int, int, int, bool]]) -> None:
    """Two files take turns, until nothing is free and beyond; some changes are given up."""
    with space(24 * MIB) as made:
        mapped = Mapped(made)
        for what, number, start, count, give_up in steps:
            file = mapped.files[number]
            end = start + count
            try:
                if what == "fill":
                    file.fill(start, end, end * PAGE, give_up=give_up)
                elif what == "scatter":
                    for page in range(start % 200, 230, 1 + count % 7):
                        file.fill(page, page + 1, MIB)
                elif what == "remove":
                    file.remove(start, end, give_up=give_up)
                elif what == "all":
                    file.remove(0, extents_module.LAST_PAGE + 1)
                elif file.map.needs_promotion(file.inode, BLOCK):
                    file.promote()
            except NoSpaceError:
                assert made.blocks.free_blocks < 4
            mapped.check()
        for file in mapped.files:
            file.remove(0, extents_module.LAST_PAGE + 1)
            assert (file.model, file.inode.extents) == ({}, [])
        mapped.check()


# ------------------------------------------------------------------------------ pages or blocks


@pytest.mark.parametrize(
    ("size", "flags", "blocks"),
    [(MIB - PAGE, 0, 0), (MIB, 0, 0), (MIB + 1, 0, 1), (PAGE, INODE_FLAG_TABLE, 1)],
)
def test_up_to_a_mib_is_in_pages(file: File, size: int, flags: int, blocks: int) -> None:
    """Tables are in whole blocks, whatever their size."""
    file.inode.flags |= flags
    before = file.space.blocks.free_blocks
    [(first, page, count)] = file.fill(0, 1, size)
    assert (first, count) == ((0, SLOT) if blocks else (0, 1))
    assert file.is_carved(page) is not bool(blocks)
    assert before - file.space.blocks.free_blocks == 1  # for the block, or to be carved


def test_nothing_is_filled_twice(file: File) -> None:
    file.fill(0, 600, BLOCK)
    assert file.fill(0, 1024, 2 * BLOCK) == []
    assert file.fill(100, 101, 2 * BLOCK) == []


def test_a_slot_with_something_in_it_is_filled_by_pages(file: File) -> None:
    file.fill(5, 6, MIB)
    file.fill(0, 3 * SLOT, 3 * BLOCK)
    carved = {page for page, at in file.model.items() if file.is_carved(at)}
    assert carved == set(range(SLOT))
    assert len(file.model) == 3 * SLOT


def test_the_last_slot_has_something_in_it(mapped: Mapped) -> None:
    """A page from when no block was free; the two slots before it get theirs."""
    first, second = mapped.files
    first.fill(0, 1, PAGE)
    first.fill(SLOT, SLOT * (1 + mapped.space.blocks.free_blocks), 1 << 30)
    second.fill(2 * SLOT + 7, 2 * SLOT + 8, 3 * BLOCK)
    first.remove(SLOT, 100 * SLOT)
    second.fill(0, 2 * SLOT + 10, 3 * BLOCK)
    carved = {page for page, at in second.model.items() if second.is_carved(at)}
    assert carved == set(range(2 * SLOT, 2 * SLOT + 10))
    assert len(second.model) == 2 * SLOT + 10
    mapped.check()


def test_the_last_free_pages_stand_in_for_a_block(mapped: Mapped) -> None:
    """For a file, but not for a table, which a unit could not walk."""
    first, second = mapped.files
    first.fill(0, 1, PAGE)  # a block is carved for data
    first.fill(SLOT, SLOT * (1 + mapped.space.blocks.free_blocks), 1 << 30)
    assert mapped.space.blocks.free_blocks == 0
    second.inode.flags |= INODE_FLAG_TABLE
    with pytest.raises(NoSpaceError):
        second.fill(0, 1, PAGE)
    second.inode.flags = 0
    second.fill(SLOT + 5, SLOT + 10, BLOCK + 10 * PAGE)
    assert all(second.is_carved(page) for page in second.model.values())
    assert len(second.model) == 5
    mapped.check()
    with pytest.raises(NoSpaceError):
        second.fill(2 * SLOT, 4 * SLOT, 1 << 30)  # two blocks are not pieced together
    mapped.check()


@pytest.mark.parametrize("flags", [0, INODE_FLAG_TABLE])
def test_a_file_that_grows_is_one_extent(file: File, flags: int) -> None:
    file.inode.flags |= flags
    for end in (10, 100, 255, 256):
        file.fill(0, end, end * PAGE)
    assert len(list(file.map.after(file.inode, 0))) == 1
    file.remove(0, SLOT)
    for end in (300, 513, 1025, 2000):
        file.fill(0, end, end * PAGE)
    assert len(list(file.map.after(file.inode, 0))) == 1


def test_five_extents_are_in_the_inode(file: File) -> None:
    """The sixth makes a tree, which stays as long as there is one."""
    for page in range(0, 10, 2):
        file.fill(page, page + 1, MIB)
    assert len(file.inode.extents) == 5
    assert not file.inode.flags & INODE_FLAG_BODY
    file.fill(10, 11, MIB)
    assert file.inode.extents == []
    assert file.inode.flags & INODE_FLAG_BODY
    file.remove(2, 100)
    assert file.inode.flags & INODE_FLAG_BODY
    file.remove(0, 1)
    assert not file.inode.flags & INODE_FLAG_BODY
    file.fill(3, 4, MIB)
    assert len(file.inode.extents) == 1


@pytest.mark.parametrize("unit", [1, SLOT], ids=["pages", "blocks"])
@pytest.mark.parametrize("others", [0, 20], ids=["inline", "tree"])
def test_a_hole_that_is_filled_again_is_no_seam(file: File, unit: int, others: int) -> None:
    """The pages that were there are free, and the best ones."""
    for page in range(others):
        file.fill(200 + 2 * page, 201 + 2 * page, MIB)
    base = 100 if unit == 1 else SLOT
    file.fill(base, base + 5 * unit, 6 * BLOCK if unit > 1 else MIB)
    [whole] = file.map.within(file.inode, base, base + 5 * unit)
    file.remove(base + 2 * unit, base + 3 * unit)
    file.check()
    assert len(list(file.map.within(file.inode, base, base + 5 * unit))) == 2
    file.fill(base + 2 * unit, base + 3 * unit, 6 * BLOCK if unit > 1 else MIB)
    assert list(file.map.within(file.inode, base, base + 5 * unit)) == [whole]


def test_blocks_that_are_not_in_one_run(mapped: Mapped) -> None:
    first, second = mapped.files
    slot = 1
    while mapped.space.blocks.free_blocks:
        (first, second)[slot % 2].fill(slot * SLOT, (slot + 1) * SLOT, 1 << 30)
        slot += 1
    second.remove(0, 100 * SLOT)
    free = mapped.space.blocks.free_blocks
    assert free > 2
    added = first.fill(50 * SLOT, (50 + free) * SLOT, 1 << 30)
    assert len(added) == free
    mapped.check()


def test_from_pages_to_a_block(file: File) -> None:
    assert not file.map.needs_promotion(file.inode, BLOCK), "nothing is there"
    file.fill(3, 7, 7 * PAGE)
    file.fill(20, 30, 30 * PAGE)
    assert not file.map.needs_promotion(file.inode, MIB)
    assert file.map.needs_promotion(file.inode, MIB + 1)
    file.fill(SLOT, SLOT + 1, BLOCK + PAGE)
    file.promote()
    assert (
        file.map.at(file.inode, 0) == (0, file.model[0], 2 * SLOT)
        or len(list(file.map.after(file.inode, 0))) == 2
    )
    assert not file.map.needs_promotion(file.inode, BLOCK), "it is in a block"
    file.remove(0, SLOT)
    assert not file.map.needs_promotion(file.inode, BLOCK), "nothing is in the first slot"


# ------------------------------------------------------------------------------ freeing


def test_blocks_are_freed_whole(file: File) -> None:
    file.fill(0, 3 * SLOT, 3 * BLOCK)
    for start, end in ((1, SLOT), (0, SLOT - 1), (5, 6), (SLOT + 1, 3 * SLOT - 1)):
        file.remove(start, end)
        assert len(file.model) == 3 * SLOT
    file.remove(1, 2 * SLOT + 1)
    assert sorted(file.model) == [*range(SLOT), *range(2 * SLOT, 3 * SLOT)]
    file.remove(0, 10 * SLOT)
    assert file.model == {}


def test_pages_are_freed_one_by_one(file: File) -> None:
    file.fill(0, 200, MIB)
    for start, end in ((0, 1), (50, 51), (199, 200), (60, 70), (40, 80)):
        file.remove(start, end)
        file.check()
    assert sorted(file.model) == [*range(1, 40), *range(80, 199)]
    file.remove(300, 400)
    assert file.map.remove(file.inode, 300, 400) == 300


def test_a_transaction_that_is_full_leaves_the_rest(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in range(0, 80, 2):
        file.fill(page, page + 1, MIB)
    monkeypatch.setattr(extents_module, "SAFE_PAGES", 2)
    end, transactions = 80, 0
    while end:
        before = end
        ends: list[int] = []
        file.space.change(
            file.inode,
            lambda: ends.append(file.map.remove(file.inode, 0, before)),  # noqa: B023
        )
        [end] = ends
        assert end < before
        for page in [p for p in file.model if p >= end]:
            del file.model[page]
        file.check()
        transactions += 1
    assert transactions > 2
    assert file.model == {}


# ------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("extents", [1, 100])
def test_extents_out_of_the_region(file: File, extents: int) -> None:
    """In the inode, or in a tree."""
    for page in range(0, 2 * extents, 2):
        file.fill(page, page + 1, MIB)
    end = file.space.total * SLOT
    found, model = list(file.map.after(file.inode, 0)), dict(file.model)
    body, flags = file.inode.body, file.inode.flags
    for page, count in ((end, 1), (end - 1, 2), (1 << 60, 1)):
        bad = Extent(250, PageNo(page), count)

        def work(bad: Extent = bad) -> None:
            file.map._add(file.inode, bad)

        file.space.change(file.inode, work)
        message = rf"inode 77 at page 250: extent out of the region: got {bad[1]}\+{bad[2]}"
        with pytest.raises(CorruptionError, match=message):
            file.map.at(file.inode, 250)
        with pytest.raises(CorruptionError, match=message):
            file.map.at(file.inode, 300)
        with pytest.raises(CorruptionError, match=message):
            list(file.map.within(file.inode, 0, 251))
        assert list(file.map.within(file.inode, 0, 250)) == found
        with pytest.raises(CorruptionError, match=message):
            file.space.change(file.inode, lambda: file.map.remove(file.inode, 0, 300))
        file.space.change(file.inode, lambda: file.map._delete(file.inode, bad))  # noqa: B023
    assert (file.model, file.inode.body, file.inode.flags) == (model, body, flags)


def test_pages_that_are_freed_already(file: File) -> None:
    """Two extents over the same pages: the second is not freed, and neither is the first."""
    [(_, page, _)] = file.fill(0, 4, MIB)
    file.space.change(file.inode, lambda: file.map._add(file.inode, Extent(10, page, 4)))
    with pytest.raises(CorruptionError, match=f"page {page}: 4 pages freed that are not all in "):
        file.space.change(file.inode, lambda: file.map.remove(file.inode, 0, 20))
    file.space.change(file.inode, lambda: file.map._delete(file.inode, Extent(10, page, 4)))


def test_the_tree_is_that_of_the_inode(file: File) -> None:
    for page in range(0, 20, 2):
        file.fill(page, page + 1, MIB)
    tree = file.map._tree(file.inode)
    assert (tree.kind, tree.owner) == (TREE_EXTENTS, 77)
    file.inode.ino = Ino(79)
    with pytest.raises(CorruptionError, match="wrong owner or kind: got 77/1, expected 79/1"):
        file.map.at(file.inode, 3)
    file.inode.ino = Ino(77)


# ------------------------------------------------------------------------------ of file systems


@pytest.mark.slow("400 writes of up to 100 KB each are stored")
@pytest.mark.parametrize("step", [PAGE, 3 * PAGE + 5, 100_000, BLOCK, 5 * MIB])
def test_a_growing_file_stays_one_extent(fs: FileSystem, step: int) -> None:
    ino = make(fs)
    data = noise(step)
    end = min(40 * MIB, 400 * step)
    for offset in range(0, end, step):
        fs.run(lambda offset=offset: fs.write(ino, offset, data))  # type: ignore[misc]
    assert len(fs.extents(ino)) == 1
    assert contents(fs, ino) == data * len(range(0, end, step))


@in_a_gib
def test_files_growing_in_turn_are_in_few_pieces(fs: FileSystem) -> None:
    files = [make(fs, b"%d" % i) for i in range(4)]
    for size in range(BLOCK, 160 * MIB, BLOCK):
        for ino in files:
            resize(fs, ino, size)
    assert max(len(fs.extents(ino)) for ino in files) <= 8  # each piece is twice the last


def test_grown_by_truncate_in_steps_is_one_extent(fs: FileSystem) -> None:
    ino = make(fs)
    for size in range(MIB, 40 * MIB, 3 * MIB):
        resize(fs, ino, size)
    assert len(fs.extents(ino)) == 1


@pytest.mark.parametrize("size", [1, PAGE, MIB - 1, MIB])
def test_growing_from_pages_to_a_block_keeps_the_data(fs: FileSystem, size: int) -> None:
    data = noise(size)
    ino = make(fs, content=data)
    assert fs.inode(ino).data_pages == -(-size // PAGE)
    resize(fs, ino, 5 * MIB)
    assert contents(fs, ino) == data + bytes(5 * MIB - size)
    (extent,) = fs.extents(ino)
    assert extent.region_offset % BLOCK == 0
    again = make(fs, b"g", data)
    fs.write(again, size, b"more" * MIB)
    assert contents(fs, again) == data + b"more" * MIB
    assert len(fs.extents(again)) == 1


def test_a_sparse_small_file_grows_out_of_pages(fs: FileSystem) -> None:
    ino = make(fs)
    for page in range(0, 250, 3):
        fs.write(ino, page * PAGE, bytes([page + 1]) * PAGE)
    resize(fs, ino, 3 * MIB)
    expected = bytearray(3 * MIB)
    for page in range(0, 250, 3):
        expected[page * PAGE : (page + 1) * PAGE] = bytes([page + 1]) * PAGE
    assert contents(fs, ino) == expected
    assert len(fs.extents(ino)) == 1


def _fragmented(fs: FileSystem, pieces: int) -> Ino:
    """A file of as many extents, made by filling every second free page of a full region."""
    ino = make(fs, b"victim")
    small = []
    filler = make(fs, b"filler")
    resize(fs, filler, (fs.super.blocks.free_blocks - 2 * pieces // 512 - 3) * BLOCK)
    for i in range(2 * pieces):
        small.append(b"s%d" % i)
        make(fs, small[-1], b"s")
    rest = make(fs, b"rest")
    until_full(lambda i: fs.write(rest, i * PAGE, b"r"))
    for name in small[::2]:
        fs.unlink(ROOT, name)
    return ino


@pytest.mark.slow("a region is filled page by page")
@pytest.mark.parametrize("how", ["unlink", "truncate", "punch", "rename", "close"])
def test_freeing_more_extents_than_a_transaction_holds(fs: FileSystem, how: str) -> None:
    ino = _fragmented(fs, 1_500)
    until_full(lambda i: fs.write(ino, (8 + i) * PAGE, b"v" * PAGE))
    extents = fs.extents(ino)
    assert len(extents) > 500  # more than one transaction frees
    free, pages = fs.statfs().free, fs.inode(ino).data_pages
    if how == "unlink":
        fs.unlink(ROOT, b"victim")
    elif how == "truncate":
        fs.setattr(ino, size=0)
    elif how == "punch":
        fs.fallocate(ino, PUNCH, 0, fs.inode(ino).size)
        assert not any(contents(fs, ino))
    elif how == "rename":
        fs.rename(ROOT, b"rest", ROOT, b"victim")
    else:
        fs.open(ino)
        fs.unlink(ROOT, b"victim")
        assert bytes(fs.read(ino, 100 * PAGE, 4)) == b"vvvv"
        fs.release(ino)
    assert fs.statfs().free >= free + pages
