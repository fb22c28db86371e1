"""Inodes as the format has them, and the table: numbers, its free list, growth, what is cached."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import CorruptionError, NoSpaceError, NotFoundError
from pkernfs.fs import inodes as inodes_module
from pkernfs.fs.btree import Tree
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.inodes import Inode, InodeTable, clear_set_id
from pkernfs.layout import (
    CLASS_DATA,
    INODE,
    INODE_FLAG_BODY,
    INODE_FLAG_PENDING,
    INODE_FLAG_TABLE,
    INODE_PAGE_OFFSET,
    MAGIC_INODES,
    MAGIC_STATE,
    NO_INO,
    PAGE,
    STATE_FREE_INODE_PAGE_OFFSET,
    STATE_INODE_PAGES_OFFSET,
    STATE_PAGE,
    TREE_EXTENTS,
    Extent,
    InodeFields,
)
from pkernfs.quantities import Ino, PageNo, PageRun, RegionOff
from support.files import IOMMU, REG, ROOT, contents, make
from support.space import GiveUp, Space, space

SIZE = 16 << 20
INODE_PAGE = PageNo(2 * 512 + 2)  # of a new file system, by docs/format.md

# ------------------------------------------------------------------------------ one inode


u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
times = st.integers(-(1 << 63), (1 << 63) - 1)
EXTENTS = st.lists(st.builds(Extent, u64, u64.map(PageNo), u64), max_size=5)
SHARED = {
    "generation": u32, "uid": u32, "gid": u32, "nlink": u32, "atime": times, "mtime": times,
    "ctime": times, "btime": times, "data_pages": u64, "xattr_root": u64, "pending_start": u64,
    "pending_end": u64, "parent": u64,
}  # fmt: skip


@st.composite
def inodes(draw: st.DrawFn) -> Inode:
    """An inode as it may be stored."""
    inode = Inode()
    inode.ino = Ino(draw(u64))
    for name, values in SHARED.items():
        setattr(inode, name, draw(values))
    kind = draw(st.sampled_from(sorted(inodes_module._TYPES)))
    inode.mode = kind | draw(st.integers(0, 0o7777))
    inode.size = draw(st.integers(0, (1 << 63) - 1))
    inode.flags = draw(st.sampled_from([0, INODE_FLAG_PENDING, INODE_FLAG_TABLE]))
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        inode.rdev = os.makedev(draw(st.integers(0, 4095)), draw(st.integers(0, (1 << 20) - 1)))
    elif draw(st.booleans()):
        inode.flags |= INODE_FLAG_BODY
        inode.body = PageNo(draw(st.integers(1, (1 << 64) - 1)))
    elif kind == stat.S_IFREG:
        inode.extents = draw(EXTENTS)
    elif kind == stat.S_IFLNK:
        inode.target = draw(st.binary(max_size=128))
        inode.size = len(inode.target)
    return inode


def fields(inode: Inode) -> dict[str, Any]:
    return {name: getattr(inode, name) for name in Inode.__slots__}


@given(inode=inodes(), slot=st.integers(1, 15))
def test_what_is_stored_is_loaded(inode: Inode, slot: int) -> None:
    """Into its slot, all of it, and nothing beside it."""
    page = bytearray(b"\xdb" * PAGE)
    inode.store(memoryview(page), slot * 256)
    again = Inode()
    again.extents, again.target = [Extent(1, PageNo(2), 3)], b"of another"
    again.load(memoryview(bytes(page)), slot * 256)
    assert fields(again) == fields(inode)
    assert page[: slot * 256] == b"\xdb" * (slot * 256)
    assert page[(slot + 1) * 256 :] == b"\xdb" * ((15 - slot) * 256)
    used = 24 * len(inode.extents) + len(inode.target)
    assert not any(page[slot * 256 + 128 + used : (slot + 1) * 256])


def test_an_inode_as_the_format_has_it() -> None:
    """Typed out by docs/format.md, section 6."""
    inode = Inode()
    for number, name in enumerate(InodeFields._fields):
        if not name.startswith("rdev"):
            setattr(inode, name, number + 1)
    inode.mode = REG
    inode.flags = INODE_FLAG_PENDING | INODE_FLAG_TABLE
    inode.rdev = os.makedev(0xABC, 0xDEF12)
    inode.extents = [Extent(1, PageNo(2), 3), Extent(4, PageNo(5), 6)]
    page = bytearray(PAGE)
    inode.store(memoryview(page), 256)
    assert struct.unpack_from("<QIIIIII", page, 256) == (1, 2, REG, 4, 5, 6, 0b110 | 2 << 8)
    assert struct.unpack_from("<QqqqqII", page, 256 + 32) == (8, 9, 10, 11, 12, 0xABC, 0xDEF12)
    assert struct.unpack_from("<6Q", page, 256 + 80) == (15, 16, 17, 18, 19, 20)
    assert struct.unpack_from("<6Q", page, 256 + 128) == (1, 2, 3, 4, 5, 6)


def stored(**changes: Any) -> memoryview:
    """A page with an inode at 256, of which some fields are another thing."""
    inode = Inode()
    inode.ino, inode.mode = Ino(5), REG
    page = bytearray(PAGE)
    inode.store(memoryview(page), 256)
    found = InodeFields._make(INODE.unpack_from(page, 256))._replace(**changes)
    INODE.pack_into(page, 256, *found)
    return memoryview(page)


FIFO = stat.S_IFIFO | 0o600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": 0o644}, "bad mode or size: got 0o644, 0"),
        ({"mode": 0o170000}, "bad mode or size: got 0o170000, 0"),
        ({"mode": 0o030000}, "bad mode or size"),
        ({"size": 1 << 63}, "bad mode or size: got 0o100644, 9223372036854775808"),
        ({"rdev_major": 1 << 12}, "bad device number: got 4096:0"),
        ({"rdev_minor": 1 << 20}, "bad device number: got 0:1048576"),
        ({"flags": 1}, "bad body: got 0, 0 inline"),
        ({"flags": 1 | 2 << 8, "body": 9}, "bad body: got 9, 2 inline"),
        ({"flags": 6 << 8}, "bad extent count: got 6, expected 0..5"),
        ({"flags": 255 << 8}, "bad extent count: got 255, expected 0..5"),
        ({"mode": stat.S_IFLNK, "size": 129}, "bad target length: got 129"),
    ],
)
def test_inodes_that_cannot_be(changes: dict[str, int], message: str) -> None:
    with pytest.raises(CorruptionError, match=f"^inode 5: {message}"):
        Inode().load(stored(**changes), 256)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (1 << 63) - 1},
        {"rdev_major": 4095, "rdev_minor": (1 << 20) - 1},
        {"flags": 1, "body": 9},
        {"flags": 5 << 8},
        {"mode": stat.S_IFLNK, "size": 128},
        {"mode": stat.S_IFLNK, "size": 129, "flags": 1, "body": 7},
        {"mode": FIFO, "flags": 1 << 31 | 1 << 3},  # of a newer version
    ],
)
def test_inodes_at_the_edge_of_what_can_be(changes: dict[str, int]) -> None:
    inode = Inode()
    inode.load(stored(**changes), 256)
    assert (inode.ino, inode.size) == (5, changes.get("size", 0))
    assert not inode.flags & ~0b111


@pytest.mark.parametrize("kind", sorted(inodes_module._TYPES))
def test_kinds(kind: int) -> None:
    inode = Inode()
    inode.mode = kind | 0o7777
    assert inode.is_dir == stat.S_ISDIR(inode.mode)
    assert inode.is_reg == stat.S_ISREG(inode.mode)


def test_units_of_stat() -> None:
    inode = Inode()
    inode.data_pages = 3
    assert inode.blocks512 == 24


@pytest.mark.parametrize(
    ("before", "after"),
    [(0o6755, 0o755), (0o6644, 0o2644), (0o4755, 0o755), (0o2755, 0o755), (0o1777, 0o1777)],
)
def test_set_id_bits_are_cleared(before: int, after: int) -> None:
    inode = Inode()
    inode.mode = stat.S_IFREG | before
    clear_set_id(inode)
    assert inode.mode == stat.S_IFREG | after


# ------------------------------------------------------------------------------ the table


class Table:
    """The inode table of a space, and the dict that it should be."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.table = self.open()
        self.model: dict[Ino, dict[str, int]] = {
            ROOT: {"uid": 0, "nlink": 3}, IOMMU: {"uid": 0, "nlink": 2},
        }  # fmt: skip
        #: Generations that each number has had.
        self.seen: dict[Ino, set[int]] = {ROOT: {0}, IOMMU: {0}}

    def open(self) -> InodeTable:
        """The table as another mount finds it."""
        table = InodeTable(self.space.store, self.space.pages)
        table.count_used()
        return table

    def new(self, uid: int = 7) -> Inode:
        inode = self.table.new(REG)
        inode.uid, inode.nlink = uid, 1
        self.table.save(inode)
        self.model[inode.ino] = {"uid": uid, "nlink": 1}
        return inode

    def new_now(self, count: int) -> list[Inode]:
        with self.space.store:
            return [self.new() for _ in range(count)]

    def change(self, ino: Ino, **values: int) -> None:
        inode = self.table.get(ino)
        self.table.touch(inode)
        for name, value in values.items():
            setattr(inode, name, value)
        self.table.save(inode)
        self.model[ino] |= values

    def free(self, ino: Ino) -> None:
        inode = self.table.get(ino)
        self.table.touch(inode)
        self.table.free(inode)
        del self.model[ino]

    def state(self, offset: int) -> int:
        page = self.space.store.read(STATE_PAGE, MAGIC_STATE)
        return int.from_bytes(page[offset : offset + 8], "little")

    def set_state(self, offset: int, value: int) -> None:
        with self.space.store as store:
            page = store.edit(STATE_PAGE, MAGIC_STATE)
            page[offset : offset + 8] = value.to_bytes(8, "little")

    def header(self, index: int) -> tuple[int, ...]:
        """Index, next_free, used, pending, listed, generation of an inode page."""
        page = self.space.store.read(self.table.where[index], MAGIC_INODES)
        return struct.unpack_from("<QQHHH2xI", page, INODE_PAGE_OFFSET)

    def set_header(self, index: int, field: int, value: int) -> None:
        with self.space.store as store:
            page = store.edit(self.table.where[index], MAGIC_INODES)
            found = [*self.header(index)]
            found[field] = value
            struct.pack_into("<QQHHH2xI", page, INODE_PAGE_OFFSET, *found)

    def check(self) -> None:
        for table in (self.table, self.open()):
            assert list(table.numbers()) == sorted(self.model)
            assert table.used == len(self.model)
            assert len(table) == 15 * len(table.where)
            for ino, values in self.model.items():
                inode, said = table.get(ino), table.stat(ino)
                assert (inode.ino, said.ino, inode.generation) == (ino, ino, said.generation)
                for name, value in values.items():
                    assert getattr(inode, name) == value
                    if name != "flags":
                        assert getattr(said, name) == value
        assert self.open().where == self.table.where
        assert self.state(STATE_INODE_PAGES_OFFSET) == len(self.table.where)
        self._check_pages()

    def _check_pages(self) -> None:
        """docs/format.md, section 6: header, masks, and the list of pages with free slots."""
        listed = []
        head = self.state(STATE_FREE_INODE_PAGE_OFFSET)
        while head:
            listed.append(head - 1)
            assert len(listed) <= len(self.table.where)
            head = self.header(head - 1)[1]
        with_room = set()
        for index in range(len(self.table.where)):
            got, following, used, pending, is_listed, _ = self.header(index)
            assert got == index
            slots = {ino & 15 for ino in self.model if ino >> 4 == index}
            assert {s for s in range(16) if used >> s & 1} == slots
            left = {
                ino & 15
                for ino, values in self.model.items()
                if ino >> 4 == index
                and (not values["nlink"] or values.get("flags", 0) & INODE_FLAG_PENDING)
            }
            assert {s for s in range(16) if pending >> s & 1} == left
            assert is_listed == (len(slots) < 15)
            assert is_listed or not following
            if len(slots) < 15:
                with_room.add(index)
        assert len(listed) == len(set(listed))
        assert set(listed) == with_room


@pytest.fixture
def table() -> Iterator[Table]:
    with space(SIZE) as made:
        yield Table(made)


STEPS = st.tuples(
    st.sampled_from(["new", "new", "many", "free", "some", "chown", "orphan", "pending"]),
    st.integers(0, 1 << 16),
)


@given(
    batches=st.lists(st.tuples(st.lists(STEPS, max_size=8), st.booleans()), max_size=8),
    most_cached=st.sampled_from([1, 8192]),
)
def test_changes_against_a_dict(
    batches: list[tuple[list[tuple[str, int]], bool]], most_cached: int
) -> None:
    """In transactions some of which are given up."""
    with space(SIZE) as made:
        table = Table(made)
        for steps, give_up in batches:
            before = {ino: dict(values) for ino, values in table.model.items()}
            old, freed = set(before) - {ROOT, IOMMU}, set()
            with suppress(GiveUp), made.store:
                for what, number in steps:
                    # What is new in this transaction is saved, and not touched again in it.
                    there = sorted(old & table.model.keys())
                    some = there[number % len(there) :][: 1 + number % 20] if there else []
                    if what in ("new", "many"):
                        for _ in range(1 if what == "new" else number % 40):
                            table.new(uid=number)
                    elif what in ("free", "some"):
                        for ino in some[: 1 if what == "free" else None]:
                            table.free(ino)
                            freed.add(ino)
                    elif some:
                        table.change(
                            some[0],
                            **{
                                "chown": {"uid": number},
                                "orphan": {"nlink": 0},
                                "pending": {"flags": INODE_FLAG_PENDING * (number & 1)},
                            }[what],
                        )
                if give_up:
                    raise GiveUp
            if give_up:
                table.model = before
            table.check()
            for ino in table.model.keys() - (before.keys() - freed if not give_up else before):
                generation = table.table.get(ino).generation
                assert generation not in table.seen.setdefault(ino, set())
                table.seen[ino].add(generation)
            if most_cached == 1:
                table.table = table.open()


def test_numbers_in_their_order(table: Table) -> None:
    """The lowest free slot of the page that is first in the list; none that 16 divides."""
    assert [inode.ino for inode in table.new_now(30)] == [*range(3, 16), *range(17, 32), 33, 34]
    with table.space.store:
        for ino in map(Ino, (5, 30, 9)):
            table.free(ino)
    table.check()
    assert [inode.ino for inode in table.new_now(3)] == [30, 5, 9]
    table.check()


def test_a_new_table_has_two_inodes(table: Table) -> None:
    table.check()
    assert list(table.table.where) == [INODE_PAGE]
    assert table.table.count_used() == []
    assert table.table.damaged == []


@pytest.mark.parametrize("ino", [0, 3, 15, 16, 17, 32, 1 << 40, -1, -15])
def test_numbers_that_are_not_in_use(table: Table, ino: Ino) -> None:
    for look in (table.table.get, table.table.stat):
        with pytest.raises(NotFoundError, match=f"inode {ino}: no such inode"):
            look(ino)


def test_a_number_is_not_in_use_any_more(table: Table) -> None:
    [inode] = table.new_now(1)
    table.table.attribute_cache[inode.ino] = "cached"
    with table.space.store:
        table.free(inode.ino)
    for look in (table.table.get, table.table.stat):
        with pytest.raises(NotFoundError):
            look(inode.ino)
    assert inode.ino not in table.table.attribute_cache
    page = table.space.store.read(INODE_PAGE, MAGIC_INODES)
    assert not any(page[3 * 256 : 4 * 256])


def test_generations_come_round(table: Table) -> None:
    table.set_header(0, 5, 0xFFFF_FFFF)
    assert [inode.generation for inode in table.new_now(2)] == [0xFFFF_FFFF, 0]
    table.check()


def test_attributes_of_a_device_node(table: Table) -> None:
    """Looked up without keeping the inode, and when it is kept."""
    with table.space.store:
        inode = table.table.new(stat.S_IFCHR | 0o600)
        inode.nlink, inode.rdev = 1, os.makedev(4, 64)
        inode.size, inode.data_pages, inode.gid = 5, 6, 7
        inode.atime, inode.mtime, inode.ctime = 8, -9, 10
        table.table.save(inode)
    for opened in (table.table, table.open()):
        said = opened.stat(inode.ino)
        assert said == (
            3, 1, stat.S_IFCHR | 0o600, 0, 7, 1, 5, 8, -9, 10, os.makedev(4, 64), 6,
        )  # fmt: skip


def test_attributes_are_read_without_keeping_the_inode(table: Table) -> None:
    table.new_now(1)
    opened = table.open()
    opened.stat(Ino(3))
    assert opened._cache == {}
    kept = opened.get(Ino(3))
    assert opened.get(Ino(3)) is kept


# ------------------------------------------------------------------------------ changes


def test_who_watches_is_told_of_changed_files(table: Table) -> None:
    table.new_now(3)
    watched: set[Ino] = set()
    table.table.watch = watched
    with table.space.store:
        table.table.touch(table.table.get(Ino(3)))
        table.table.touch(table.table.get(Ino(4)), content=False)
    assert watched == {3}
    table.table.watch = None
    with table.space.store:
        table.table.touch(table.table.get(Ino(5)))
    assert watched == {3}


def test_what_is_given_up_is_as_it_was(table: Table) -> None:
    [inode] = table.new_now(1)
    before = fields(inode)
    table.table.attribute_cache[inode.ino] = "cached"
    with suppress(GiveUp), table.space.store:
        table.table.touch(inode)
        assert inode.ino not in table.table.attribute_cache
        inode.size, inode.extents, inode.nlink = 4096, [Extent(0, PageNo(1500), 1)], 0
        table.table.save(inode)
        raise GiveUp
    assert fields(inode) == before
    assert table.table.get(inode.ino) is inode
    table.check()


def test_work_that_is_left(table: Table) -> None:
    """For the next mount: inodes without a name, and with a pending range."""
    inos = [inode.ino for inode in table.new_now(20)]
    with table.space.store:
        table.change(inos[2], nlink=0)
        table.change(inos[5], flags=INODE_FLAG_PENDING)
        table.change(inos[16], nlink=0)
        table.change(inos[17], flags=INODE_FLAG_TABLE)
    assert table.open().count_used() == [inos[2], inos[5], inos[16]]
    with table.space.store:
        table.change(inos[5], flags=0)
        table.free(inos[16])
    assert table.open().count_used() == [inos[2]]
    table.check()


def test_inodes_that_are_let_go(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older half of them, if they are too many."""
    monkeypatch.setattr(inodes_module, "_MAX_CACHED", 4)
    monkeypatch.setattr(inodes_module, "_MAX_CACHED_ATTRIBUTES", 2)
    opened = table.table
    inos = [inode.ino for inode in table.new_now(4)]
    opened.attribute_cache.update({Ino(3): 0, Ino(4): 0})
    opened.trim()
    assert list(opened._cache) == inos
    assert len(opened.attribute_cache) == 2
    opened.get(Ino(1))
    opened.attribute_cache[Ino(5)] = 0
    opened.trim()
    assert list(opened._cache) == [*inos[2:], 1]
    assert opened.attribute_cache == {}
    table.check()


# ------------------------------------------------------------------------------ growth


@pytest.mark.parametrize("most", [64, 3])
def test_the_table_grows_in_steps(table: Table, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one page, and by an eighth of a large one; all in one run if that is free."""
    monkeypatch.setattr(inodes_module, "_MAX_NEW_PAGES", most)
    sizes = [1]
    while sizes[-1] < 50:
        sizes.append(sizes[-1] + min(max(1, sizes[-1] // 8), most))
    found = {1}
    for _ in range(40):
        table.new_now(15)
        found.add(len(table.table.where))
    assert sorted(found) == [size for size in sizes if size <= len(table.table.where)]
    tree = Tree(table.space.store, table.space.pages, TREE_EXTENTS, NO_INO, table.table._root)
    assert [index for index, _, _ in tree.extents(0)] == [0, 1]  # the root's names are between
    table.check()


def test_growth_that_is_given_up(table: Table) -> None:
    table.new_now(13)
    free = table.space.free_bytes()
    model = dict(table.model)
    with suppress(GiveUp), table.space.store:
        for _ in range(20):
            table.new()
        raise GiveUp
    table.model = model
    assert len(table.table.where) == 1
    assert table.space.free_bytes() == free
    table.check()
    table.new_now(20)
    table.check()


def test_a_table_that_cannot_grow(table: Table) -> None:
    made = table.space
    table.new_now(13)
    with made.store:
        made.blocks.alloc(made.blocks.free_blocks, zeroed=False)
        made.pages.alloc(made.pages.free_pages, CLASS_DATA)
    with pytest.raises(NoSpaceError), made.store:
        table.new()
    table.check()
    with made.store:
        table.free(Ino(9))
    assert [inode.ino for inode in table.new_now(1)] == [9]
    table.check()


@pytest.mark.parametrize("piece", [0, 1])
def test_growth_that_fails_half_way(
    table: Table, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new pages are in several pieces, and the index has no room for one of them."""
    made = table.space
    table.new_now(15 * 18 - 2)  # with the two of a new file system: all of them
    assert len(table.table.where) == 18
    whole, extend = made.pages.alloc, InodeTable._extend_tree
    asked: list[int] = []

    def in_pieces(count: int, kind: int, goal: PageNo | None = None) -> list[PageRun]:
        runs = whole(1, kind, goal)
        gap = whole(1, kind)
        runs += whole(count - 1, kind)
        made.pages.free(gap[0].first)
        return runs

    def no_room(tree: Tree, index: int, start: PageNo, count: int) -> None:
        asked.append(index)
        if len(asked) > piece:
            raise NoSpaceError("no page for the index")
        extend(tree, index, start, count)

    before, free, model = list(table.table.where), made.free_bytes(), dict(table.model)
    with monkeypatch.context() as patch:
        patch.setattr(made.pages, "alloc", in_pieces)
        patch.setattr(InodeTable, "_extend_tree", staticmethod(no_room))
        with pytest.raises(NoSpaceError), made.store:
            table.new()
    assert len(asked) == piece + 1
    table.model = model
    assert list(table.table.where) == before
    assert made.free_bytes() == free
    table.check()
    table.new_now(60)
    table.check()


def test_what_cannot_be_read_when_a_change_is_given_up(table: Table) -> None:
    """The other things that the change has in memory are put back all the same."""
    kept, damaged = table.new_now(2)
    store = table.space.store
    modes = kept.mode, damaged.mode
    with suppress(GiveUp), store:
        for inode in (kept, damaged):
            table.table.touch(inode)
            inode.mode = REG | 0o777
        store.region.copy_in(RegionOff(INODE_PAGE * PAGE + 3 * 256 + 8), b"\xff" * 8)
        assert damaged.ino == 3 or kept.ino == 3
        raise GiveUp
    good = kept if damaged.ino == 3 else damaged
    assert good.mode == modes[0 if good is kept else 1]
    with pytest.raises(CorruptionError):
        table.table.get(Ino(3))


# ------------------------------------------------------------------------------ damage


def test_a_slot_with_another_inode(table: Table) -> None:
    table.new_now(2)
    with table.space.store as store:
        page = store.edit(INODE_PAGE, MAGIC_INODES)
        page[3 * 256 : 4 * 256] = page[4 * 256 : 5 * 256]
    opened = table.open()
    for look in (opened.get, opened.stat):
        with pytest.raises(CorruptionError, match="inode 3: wrong number: got 4"):
            look(Ino(3))
    assert opened.get(Ino(4)).ino == 4


def test_an_inode_of_no_kind(table: Table) -> None:
    table.new_now(1)
    with table.space.store as store:
        store.edit(INODE_PAGE, MAGIC_INODES)[3 * 256 + 12 : 3 * 256 + 16] = bytes(4)
    opened = table.open()
    for look in (opened.get, opened.stat):
        with pytest.raises(CorruptionError, match="inode 3: bad mode or size"):
            look(Ino(3))


def test_pages_that_cannot_be_read_are_told_of(table: Table) -> None:
    table.new_now(30)
    place = table.table.where[1]
    table.space.region.copy_in(RegionOff(place * PAGE + 300), b"damage")
    table.space.load()
    opened = InodeTable(table.space.store, table.space.pages)
    assert opened.count_used() == []
    assert opened.used == 15 + 2
    [told] = opened.damaged
    assert told.startswith(f"inode page at {place * PAGE:#x}: bad checksum")
    with pytest.raises(CorruptionError, match="bad checksum"):
        opened.get(Ino(17))
    with pytest.raises(CorruptionError, match="bad checksum"):
        list(opened.numbers())
    assert opened.get(Ino(3)).ino == 3


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        (0, "inode table at index 0: out of order"),
        (1, "inode table at index 1: out of order"),
        (3, "inode table: wrong size: got 2, expected 3"),
        (1 << 63, "inode table: wrong size: got 2, expected 9223372036854775808"),
    ],
)
def test_a_table_of_another_size(table: Table, pages: int, message: str) -> None:
    table.new_now(20)
    table.set_state(STATE_INODE_PAGES_OFFSET, pages)
    with pytest.raises(CorruptionError, match=message):
        table.open()


@pytest.mark.parametrize(
    "extent", [Extent(1, INODE_PAGE, 1), Extent(0, INODE_PAGE, 2), Extent(0, INODE_PAGE, 1 << 60)]
)
def test_a_table_that_is_out_of_order(table: Table, extent: Extent) -> None:
    made = table.space
    with made.store:
        tree = Tree(made.store, made.pages, TREE_EXTENTS, NO_INO, table.table._root)
        tree.replace_extent(0, extent)
    with pytest.raises(CorruptionError, match=r"inode table at index .: out of order"):
        table.open()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.set_state(STATE_FREE_INODE_PAGE_OFFSET, 2), "bad free list: got 1"),
        (lambda t: t.set_state(STATE_FREE_INODE_PAGE_OFFSET, 1 << 60), "bad free list: got"),
        (lambda t: t.set_header(0, 2, 0xFFFE), "inode page 0: full or misplaced, but in the fre"),
        (lambda t: t.set_header(0, 0, 1), "inode page 0: full or misplaced, but in the free list"),
    ],
    ids=["beyond the table", "far beyond", "full", "misplaced"],
)
def test_a_damaged_list_of_pages_with_free_slots(
    table: Table, damage: Callable[[Table], None], message: str
) -> None:
    damage(table)
    before = table.space.region.read(RegionOff(0), SIZE)
    with pytest.raises(CorruptionError, match=message), table.space.store:
        table.table.new(REG)
    assert table.space.region.read(RegionOff(0), SIZE) == before
    assert table.table.used == 2


# ------------------------------------------------------------------------------ of file systems


def test_numbers_are_used_again_with_another_generation(fs: FileSystem) -> None:
    seen: dict[int, set[int]] = {}
    for i in range(100):
        inode = fs.create(ROOT, b"f%d" % i, REG, 0, 0)
        assert inode.generation not in seen.setdefault(inode.ino, set())
        seen[inode.ino].add(inode.generation)
        fs.unlink(ROOT, b"f%d" % i)
    assert len(seen) < 16
    assert not any(ino % 16 == 0 for ino in seen)


def test_the_inode_cache_may_forget_anything(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inodes_module, "_MAX_CACHED", 10)
    for i in range(200):
        ino = make(fs, b"%d" % i, b"%d" % i)
        fs.setattr(ino, mode=0o600, uid=i)
        fs.lookup(ROOT, b"%d" % (i // 2))
    for i in range(200):
        inode: Inode = fs.lookup(ROOT, b"%d" % i)
        assert (inode.uid, contents(fs, inode.ino)) == (i, b"%d" % i)
