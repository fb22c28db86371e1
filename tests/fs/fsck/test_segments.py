"""Pass 4: the table of segments, and the files that have them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.fs.fsck import Code, check, survey
from pkernfs.fs.segment_table import parse
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    INODE_FLAG_BODY,
    INODE_FLAG_NATIVE,
    INODE_FLAG_PENDING,
    INODE_FLAG_SEGMENT,
    INODE_FLAG_SEGMENT_OFF,
    INODE_FLAG_SEGMENT_ON,
    INODE_FLAG_TABLE,
    INODE_INLINE_SHIFT,
    NO_PAGE,
    PAGE,
    PENDING_TO_END,
    PIECE,
    PIECES_OFFSET,
    PLACEMENT,
    PLACEMENT_DAX,
    PLACEMENT_OFFSET,
    POOL_DAX,
    POOL_DIRECTORY,
    POOL_NONE,
    ROOT_INO,
    SEGMENT_DEAD,
    SEGMENT_IN_USE,
    SEGMENT_NEW,
    STATE_MOUNTED,
    STATE_PAGE,
    SUPERBLOCK_PAGE,
    TREE_OFFSET,
    TREE_SLOTS_OFFSET,
)
from pkernfs.quantities import Ino, RegionOff, SegmentNo
from pkernfs.region.region import Region
from support.damage import Damage, Populated, make_orphan
from support.fsck_cases import Case, Cases
from support.repairs import Pristine, repaired
from support.segments import (
    DEAD,
    GUEST,
    MEMORY,
    NEW,
    REGION_BYTES,
    SECOND,
    Row,
    leaves,
    make_row,
    nodes,
    plant,
    populate,
    rows,
    set_item,
    set_pool,
    set_row,
    set_table,
    table,
)

case = Cases()
CHOICES = INODE_FLAG_SEGMENT_ON | INODE_FLAG_SEGMENT_OFF


def made(kind: int, others: int = 0) -> Pristine:
    with Region.anonymous(REGION_BYTES) as region:
        inos = populate(region, kind, others)
        return region.read(RegionOff(0), REGION_BYTES), inos


@pytest.fixture(scope="module")
def in_dax() -> Pristine:
    return made(POOL_DAX)


@pytest.fixture(scope="module")
def in_directory() -> Pristine:
    return made(POOL_DIRECTORY)


def copy_of(pristine: Pristine) -> Iterator[Damage]:
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(RegionOff(0), pristine[0])
        yield Damage(Populated(region, dict(pristine[1])))


@pytest.fixture
def d(in_dax: Pristine) -> Iterator[Damage]:
    """A region with segments in a dax pool."""
    yield from copy_of(in_dax)


@pytest.fixture
def files(in_directory: Pristine) -> Iterator[Damage]:
    """A region with segments in a directory."""
    yield from copy_of(in_directory)


def has(d: Damage, name: str) -> int:
    """The number of the segment that a file has, 0 if it has none."""
    f = d.inode(d.inos[name])
    return f.body if f.flags & INODE_FLAG_SEGMENT else 0


def inode_of(d: Damage, number: int) -> Ino:
    """The file that a row names; it names the segment."""
    row = rows(d)[number]
    f = d.inode(row.fields.ino)
    assert (f.flags, f.body) == (INODE_FLAG_SEGMENT, number)
    assert f.data_pages == row.fields.valid // PAGE
    return row.fields.ino


# ------------------------------------------------------------------------------ the table


@case(Code.SEGMENT_LAST, lossless=True)
def last_segment_too_small(d: Damage) -> None:
    set_table(d, table(d)[0], 2)


@case(Code.SEGMENTS_STRAY, Code.INODE_FIELD)
def segments_without_a_pool(d: Damage) -> None:
    set_pool(d, POOL_NONE, 0, feature=False)


@case(Code.SEGMENTS_STRAY)
def a_last_segment_without_a_pool(d: Damage) -> None:
    set_pool(d, POOL_NONE, 0, feature=False)
    for name in ("guest", "second"):
        d.set_inode(d.inos[name], flags=0, body=0, data_pages=0)
    set_table(d, 0, 6)


@case(Code.TREE_NODE, Code.TREE_LEAF_FOUND, lossless=True)
def inner_node(d: Damage) -> None:
    d.smash(table(d)[0])


@case(Code.TREE_NODE, Code.SEGMENT_LOST)
def leaf(d: Damage) -> None:
    d.smash(leaves(d)[0], 3000, 100)


@case(Code.TREE_NODE, Code.SEGMENT_LOST)
def all_nodes(d: Damage) -> None:
    for number in nodes(d):
        d.smash(number)


@case(Code.TREE_LEAF_FOUND, lossless=True)
def root_forgotten(d: Damage) -> None:
    set_table(d, NO_PAGE, table(d)[1])


@case(Code.STATE_DAMAGED, Code.TREE_LEAF_FOUND, lossless=True)
def state_page(d: Damage) -> None:
    d.smash(STATE_PAGE, 64, 200)


@case(Code.TREE_NODE, lossless=True)
def root_is_another_tree(d: Damage) -> None:
    set_table(d, d.state().inode_root, 6)


@case(Code.TREE_SHAPE, lossless=True)
def leaves_exchanged(d: Damage) -> None:
    with d.edit(table(d)[0]) as page:
        at = TREE_SLOTS_OFFSET
        page[at + 8 : at + 16], page[at + 24 : at + 32] = (
            page[at + 24 : at + 32],
            page[at + 8 : at + 16],
        )


@case(Code.TREE_ITEMS, lossless=True)
def wrong_garbage(d: Damage) -> None:
    with d.edit(leaves(d)[0]) as page:
        page[TREE_OFFSET + 6] ^= 0x0F


@case(Code.BIT_FLIPPED, lossless=True)
def a_flipped_bit(d: Damage) -> None:
    d.flip(leaves(d)[0], 8 * 4000 + 3)


# ------------------------------------------------------------------------------ rows


@case(Code.SEGMENT_ROW, Code.SEGMENT_LOST)
def short_row(d: Damage) -> None:
    set_item(d, GUEST, rows(d)[GUEST].item[:40])


@case(Code.SEGMENT_ROW, Code.SEGMENT_LOST)
def row_with_bytes_left(d: Damage) -> None:
    set_item(d, GUEST, rows(d)[GUEST].item + bytes(16))


@case(Code.SEGMENT_ROW)
def row_with_number_0(d: Damage) -> None:
    set_item(d, NEW, rows(d)[NEW].item, key=0)


@case(Code.SEGMENT_ROW, Code.SEGMENT_LOST)
def row_without_memory(d: Damage) -> None:
    set_row(d, GUEST, pieces=[])


@case(Code.SEGMENT_PIECES, Code.SEGMENT_SIZE)
def piece_of_pages(d: Damage) -> None:
    first, second = rows(d)[GUEST].pieces
    set_row(d, GUEST, pieces=[first, (second[0] + PAGE, second[1])])


@case(Code.SEGMENT_PIECES)
def piece_in_two_rows(d: Damage) -> None:
    _, (start, _) = rows(d)[GUEST].pieces
    set_row(d, DEAD, pieces=[*rows(d)[DEAD].pieces, (start + BLOCK, BLOCK)], length=2 * BLOCK)


@case(Code.SEGMENT_PIECES)
def piece_twice_in_a_row(d: Damage) -> None:
    first, _ = rows(d)[GUEST].pieces
    set_row(d, GUEST, pieces=[first, first])


@case(Code.SEGMENT_ROW)
def memory_of_another(d: Damage) -> None:
    set_row(d, NEW, pieces=rows(d)[SECOND].pieces)


@case(Code.SEGMENT_PIECES)
def amid_a_granule(d: Damage) -> None:
    """The guest's second piece is half of one."""
    set_pool(d, POOL_DAX, 4 * BLOCK)


@case(Code.SEGMENT_FIELD, lossless=True)
def bad_length(d: Damage) -> None:
    set_row(d, GUEST, length=BLOCK + 1)


@case(Code.SEGMENT_FIELD, lossless=True)
def kind_of_another_pool(d: Damage) -> None:
    set_row(d, GUEST, kind=POOL_DIRECTORY)


@case(Code.SEGMENT_FIELD, lossless=True)
def bad_align(d: Damage) -> None:
    set_row(d, GUEST, align=3 * PAGE)


@case(Code.SEGMENT_FIELD)
def bad_name(d: Damage) -> None:
    set_row(d, GUEST, name=b"../dax0.1")


@case(Code.SEGMENT_FIELD)
def valid_beyond_the_end(d: Damage) -> None:
    set_row(d, GUEST, valid=1 << 60)


@case(Code.SEGMENT_FIELD, lossless=True)
def state_unknown(d: Damage) -> None:
    set_row(d, GUEST, state=0)


@case(Code.SEGMENT_FIELD, lossless=True)
def state_dead_but_a_file_has_it(d: Damage) -> None:
    set_row(d, GUEST, state=SEGMENT_DEAD)


# ------------------------------------------------------------------------------ rows and files


@case(Code.SEGMENT_FIELD, lossless=True)
def row_of_another_inode(d: Damage) -> None:
    set_row(d, GUEST, ino=d.inos["none"])


@case(Code.INODE_FIELD, lossless=True)
def number_of_no_segment(d: Damage) -> None:
    d.set_inode(d.inos["guest"], body=77)


@case(Code.SEGMENT_SHARED)
def two_files(d: Damage) -> None:
    d.set_inode(d.inos["none"], flags=INODE_FLAG_SEGMENT, body=GUEST, data_pages=6 * 512, size=9)


@case(Code.SEGMENT_LOST)
def file_with_a_new_segment(d: Damage) -> None:
    d.set_inode(d.inos["none"], flags=INODE_FLAG_SEGMENT, body=NEW, data_pages=512, size=9)


@case(Code.SEGMENT_LOST)
def row_removed(d: Damage) -> None:
    set_item(d, GUEST, None)


@case(Code.SEGMENT_UNOWNED)
def file_without_its_segment(d: Damage) -> None:
    d.set_inode(d.inos["guest"], flags=0, body=0, data_pages=0)


@case(Code.SEGMENT_UNOWNED, Code.INODE_BAD)
def inode_dropped(d: Damage) -> None:
    d.set_inode(d.inos["guest"], mode=0o644)


@case(Code.SEGMENT_UNOWNED)
def inode_of_no_table(d: Damage) -> None:
    d.set_inode(d.inos["guest"], flags=0, body=0, data_pages=0)
    set_row(d, GUEST, ino=Ino(1 << 40))


@case(Code.INODE_FIELD, Code.SEGMENT_UNOWNED)
def segment_and_extents(d: Damage) -> None:
    d.set_inode(d.inos["guest"], flags=INODE_FLAG_SEGMENT | 1 << INODE_INLINE_SHIFT)


@case(Code.INODE_FIELD, lossless=True)
def segment_flag_of_a_flat_file(d: Damage) -> None:
    d.set_inode(d.inos["flat"], flags=d.inode(d.inos["flat"]).flags | INODE_FLAG_SEGMENT)


@case(Code.INODE_FIELD, lossless=True)
def segment_flag_of_a_directory(d: Damage) -> None:
    d.set_inode(ROOT_INO, flags=INODE_FLAG_BODY | INODE_FLAG_SEGMENT)


@case(Code.INODE_FIELD)
def segment_of_a_table(d: Damage) -> None:
    d.set_inode(d.inos["none"], flags=INODE_FLAG_TABLE | INODE_FLAG_SEGMENT)


@case(Code.INODE_FIELD, lossless=True)
def both_choices(d: Damage) -> None:
    d.set_inode(d.inos["guest"], flags=INODE_FLAG_SEGMENT | CHOICES)


@case(Code.INODE_FIELD, lossless=True)
def choice_of_a_directory(d: Damage) -> None:
    d.set_inode(ROOT_INO, flags=INODE_FLAG_BODY | INODE_FLAG_SEGMENT_ON)


@case(Code.INODE_FIELD)
def choice_of_a_table(d: Damage) -> None:
    d.set_inode(d.inos["none"], flags=INODE_FLAG_TABLE | INODE_FLAG_SEGMENT_OFF)


@case(Code.INODE_FIELD, lossless=True)
def native_without_a_segment(d: Damage) -> None:
    d.set_inode(d.inos["flat"], flags=d.inode(d.inos["flat"]).flags | INODE_FLAG_NATIVE)


@case(Code.INODE_FIELD, lossless=True)
def native_directory(d: Damage) -> None:
    d.set_inode(ROOT_INO, flags=INODE_FLAG_BODY | INODE_FLAG_NATIVE)


@case(Code.SEGMENT_ROW, Code.SEGMENT_LOST)
def native_file_whose_segment_is_lost(d: Damage) -> None:
    d.set_inode(d.inos["guest"], flags=INODE_FLAG_SEGMENT | INODE_FLAG_NATIVE)
    set_item(d, GUEST, rows(d)[GUEST].item[:40])


def test_a_file_with_a_segment_may_be_native(d: Damage) -> None:
    d.set_inode(d.inos["guest"], flags=INODE_FLAG_SEGMENT | INODE_FLAG_NATIVE)
    assert check(d.region, repair=False).clean


@pytest.mark.parametrize("flag", [INODE_FLAG_SEGMENT_ON, INODE_FLAG_SEGMENT_OFF])
@pytest.mark.parametrize("name", ["guest", "flat", "none"])
def test_a_file_may_choose_whatever_it_has(d: Damage, name: str, flag: int) -> None:
    d.set_inode(d.inos[name], flags=d.inode(d.inos[name]).flags | flag)
    assert check(d.region, repair=False).clean


@case(Code.INODE_DATA_PAGES, lossless=True)
def pages_of_a_segment(d: Damage) -> None:
    d.set_inode(d.inos["guest"], data_pages=3)


@case(Code.SEGMENT_SIZE)
def file_beyond_its_segment(d: Damage) -> None:
    d.set_inode(d.inos["guest"], size=6 * BLOCK + 1)


@case(Code.SEGMENT_SIZE)
def file_beyond_what_is_valid(d: Damage) -> None:
    set_row(d, GUEST, valid=4 * BLOCK)


@case(Code.ORPHAN_LEFT)
def orphan(d: Damage) -> None:
    make_orphan(d, "guest")


@case.each
def test_found_and_repaired(d: Damage, code: Code, function: Case) -> None:
    function(d)
    repaired(d.region, code)
    for number, row in rows(d).items():
        parse(SegmentNo(number), row.item)  # a mount agrees
        if row.fields.state == SEGMENT_IN_USE:
            inode_of(d, number)


@case.each_lossless
def test_nothing_is_lost(d: Damage, function: Case) -> None:
    before = rows(d), table(d)[1], d.inode(d.inos["guest"]), d.inode(d.inos["second"])
    function(d)
    repaired(d.region)
    last = max(before[0]) if function in (state_page, last_segment_too_small) else before[1]
    after = rows(d), last, d.inode(d.inos["guest"]), d.inode(d.inos["second"])
    assert table(d)[1] == last
    assert (after[0], *after[2:]) == (before[0], *before[2:])


# ------------------------------------------------------------------------------ what comes of it


def test_segments_are_clean(d: Damage, files: Damage) -> None:
    for one in (d, files):
        report = check(one.region, repair=False, verify_zero=True)
        assert report.clean, [str(p) for p in report.problems]
        assert not report.notes
        assert report.summary["segments"] == 4
        assert set(nodes(one)) <= set(survey(one.region).metadata_pages())
        assert one.inos["guest"] not in dict(survey(one.region).files())
        guest, second = survey(one.region).segment_files()
        assert (guest.ino, second.ino) == (one.inos["guest"], one.inos["second"])
        assert (guest.row.number, guest.row.length, guest.size) == (
            GUEST,
            6 * BLOCK,
            5 * BLOCK + 100,
        )


def test_a_repair_of_something_else_leaves_the_table_alone(d: Damage) -> None:
    before = [d.page(number) for number in nodes(d)]
    d.set_inode(d.inos["flat"], nlink=7)
    repaired(d.region, Code.INODE_LINKS)
    assert [d.page(number) for number in nodes(d)] == before


def test_new_and_dead_segments_are_left_to_the_mount(d: Damage) -> None:
    d.set_state(state=STATE_MOUNTED)
    before = rows(d)
    repaired(d.region, Code.NOT_UNMOUNTED)
    assert rows(d) == before


def test_a_pending_range_is_left_to_the_mount(d: Damage) -> None:
    ino = d.inos["guest"]
    flags = INODE_FLAG_SEGMENT | INODE_FLAG_PENDING
    start = d.inode(ino).size
    d.set_inode(ino, flags=flags, pending_start=start, pending_end=PENDING_TO_END)
    d.set_inode_page(ino, 3, 1 << (ino & 15))
    assert check(d.region, repair=False).clean
    assert ino not in {file.ino for file in survey(d.region).segment_files()}
    d.set_inode(d.inos["flat"], nlink=7)
    repaired(d.region, Code.INODE_LINKS)
    f = d.inode(ino)
    assert (f.flags, f.pending_start, f.pending_end) == (flags, start, PENDING_TO_END)


def test_a_file_that_loses_its_segment_is_a_hole(d: Damage) -> None:
    size = d.inode(d.inos["guest"]).size
    row_removed(d)
    report = repaired(d.region, Code.SEGMENT_LOST)
    f = d.inode(d.inos["guest"])
    assert (f.flags, f.body, f.data_pages, f.size) == (0, 0, 0, size)
    assert (f.uid, f.mode & 0o777) == (7, 0o640)
    assert report.problems[0].message.endswith(": its segment 1 is lost")
    assert has(d, "second") == SECOND


class Beside:
    """A region in a file, and beside it the file of its segment GUEST, as the inode says it is."""

    def __init__(self, directory: Path, pristine: Pristine) -> None:
        (directory / "base").write_bytes(pristine[0])
        self.region = Region.open(str(directory / "base"), write=True)
        self.d = Damage(Populated(self.region, dict(pristine[1])))
        self.row = rows(self.d)[GUEST]
        self.native = directory / f"segment-{GUEST}"
        self.native.touch()
        os.truncate(self.native, self.row.fields.valid)
        os.chown(self.native, 7, 8)
        self.native.chmod(0o640)


@pytest.fixture
def beside(tmp_path: Path, in_directory: Pristine) -> Iterator[Beside]:
    if os.geteuid():
        pytest.skip("only root gives files to others")
    made = Beside(tmp_path, in_directory)
    yield made
    made.region.close()


@pytest.mark.parametrize("damage", [row_removed, short_row, leaf, all_nodes])
def test_a_row_is_made_again_from_the_file_of_its_segment(beside: Beside, damage: Case) -> None:
    damage(beside.d)
    before = beside.d.inode(beside.d.inos["guest"])
    report = check(beside.region, repair=True)
    [problem] = [p for p in report.problems if p.code is Code.SEGMENT_REMADE]
    assert problem.message.endswith(": its segment 1 has no row")
    assert check(beside.region, repair=False).clean
    assert beside.d.inode(beside.d.inos["guest"]) == before
    expected = beside.row.fields._replace(handle=beside.native.stat().st_ino)
    assert rows(beside.d)[GUEST].fields == expected


def given_away(native: Path) -> None:
    os.chown(native, 3, 4)
    native.chmod(0o660)


def test_owner_and_mode_of_a_native_file_are_those_of_its_segment(beside: Beside) -> None:
    """Who changes them by a name changes the segment, and not the inode."""
    ino = beside.d.inos["guest"]
    flags = beside.d.inode(ino).flags | INODE_FLAG_NATIVE
    beside.d.set_inode(ino, flags=flags)
    given_away(beside.native)
    row_removed(beside.d)
    repaired(beside.region, Code.SEGMENT_REMADE)
    assert beside.d.inode(ino).flags == flags
    os.truncate(beside.native, BLOCK)
    row_removed(beside.d)
    repaired(beside.region, Code.SEGMENT_LOST)


def longer(native: Path) -> None:
    os.truncate(native, native.stat().st_size + BLOCK)


def linked(native: Path) -> None:
    native.with_name("other").hardlink_to(native)


def not_regular(native: Path) -> None:
    native.rename(native.with_name("other"))
    native.symlink_to("other")


@pytest.mark.parametrize(
    "change",
    [
        Path.unlink,
        longer,
        linked,
        not_regular,
        lambda native: os.truncate(native, BLOCK),
        lambda native: os.chown(native, 0, 8),
        lambda native: os.chown(native, 7, 0),
        lambda native: native.chmod(0o600),
    ],
)
def test_no_row_is_made_of_what_may_be_another_file(
    beside: Beside, change: Callable[[Path], object]
) -> None:
    change(beside.native)
    row_removed(beside.d)
    repaired(beside.region, Code.SEGMENT_LOST)
    assert beside.d.inode(beside.d.inos["guest"]).flags == 0


def test_an_inode_that_may_be_wrong_proves_no_row(beside: Beside) -> None:
    ino = beside.d.inos["guest"]
    beside.d.set_inode(ino, size=beside.row.fields.valid + 1)
    row_removed(beside.d)
    repaired(beside.region, Code.SEGMENT_LOST)


def lost_and_found(d: Damage) -> dict[bytes, int]:
    """Names and inodes in /lost+found, if it is there."""
    for _, item in d.items(d.names(ROOT_INO)):
        if item[9:] == b"lost+found":
            directory = Ino(int.from_bytes(item[:8], "little"))
            items = d.items(d.names(directory))
            return {item[9:]: int.from_bytes(item[:8], "little") for _, item in items}
    return {}


@pytest.mark.parametrize("function", [file_without_its_segment, inode_of_no_table])
def test_a_segment_without_a_file_goes_to_lost_and_found(d: Damage, function: Case) -> None:
    function(d)
    set_row(d, GUEST, valid=5 * BLOCK)
    repaired(d.region, Code.SEGMENT_UNOWNED)
    ino = inode_of(d, GUEST)
    assert ino != d.inos["guest"]
    f = d.inode(ino)
    assert (f.mode, f.uid, f.gid, f.size) == (0o100600, 0, 0, 5 * BLOCK)
    assert lost_and_found(d) == {b"#%d" % ino: ino}


def test_a_new_file_where_no_slot_is_free() -> None:
    """The first inode page is full: the table gets another."""
    for d in copy_of(made(POOL_DAX, others=9)):
        file_without_its_segment(d)
        repaired(d.region, Code.SEGMENT_UNOWNED)
        assert inode_of(d, GUEST) == 17


def test_a_table_with_many_rows(d: Damage) -> None:
    """Found by their leaves, they get a new tree."""
    at = 64 * 1024 * BLOCK
    many = {
        number: make_row(POOL_DAX, 1, [(at + number * BLOCK, BLOCK)], SEGMENT_NEW)
        for number in range(10, 160)
    }
    numbers = sorted(many)
    parts = [{n: many[n] for n in numbers[i : i + 30]} for i in range(0, 150, 30)]
    plant(d, [rows(d), *parts], last=200)
    before = rows(d)
    d.smash(table(d)[0])
    repaired(d.region, Code.TREE_NODE, Code.TREE_LEAF_FOUND)
    assert rows(d) == before
    assert len(leaves(d)) > 3


def test_an_inode_that_was_dropped_comes_back_under_its_name(d: Damage) -> None:
    inode_dropped(d)
    repaired(d.region, Code.SEGMENT_UNOWNED)
    assert inode_of(d, GUEST) == d.inos["guest"]
    f = d.inode(d.inos["guest"])
    assert (f.mode, f.nlink, f.size) == (0o100600, 1, 6 * BLOCK)
    assert lost_and_found(d) == {}


def test_a_lost_inode_page(d: Damage) -> None:
    """Every inode is lost; the segments' files come back, and the root's names lead to them."""
    d.smash(d.inode_page(ROOT_INO))
    repaired(d.region, Code.INODE_PAGE_DAMAGED, Code.SEGMENT_UNOWNED)
    assert inode_of(d, GUEST) == d.inos["guest"]
    assert inode_of(d, SECOND) == d.inos["second"]
    assert d.inode(d.inos["guest"]).nlink == 1


def test_inodes_of_a_damaged_page_keep_their_segments(d: Damage) -> None:
    with d.edit(d.inode_page(ROOT_INO), seal=False) as page:
        page[16 * 15 + 1] ^= 0xFF
    set_row(d, GUEST, valid=3 * BLOCK)
    repaired(d.region, Code.INODE_PAGE_DAMAGED, Code.SEGMENT_SIZE)
    assert inode_of(d, GUEST) == d.inos["guest"]
    assert (d.inode(d.inos["guest"]).mode, d.inode(d.inos["guest"]).size) == (0o100600, 3 * BLOCK)


def test_nothing_proves_the_size_of_a_damaged_inode(d: Damage) -> None:
    with d.edit(d.inode_page(ROOT_INO), seal=False) as page:
        page[16 * 15 + 1] ^= 0xFF
    row_removed(d)
    repaired(d.region, Code.SEGMENT_LOST)
    assert d.inode(d.inos["guest"]).size == 0


def test_of_two_files_the_row_says_which(d: Damage) -> None:
    two_files(d)
    set_row(d, GUEST, ino=d.inos["none"])
    set_row(d, GUEST, valid=6 * BLOCK)
    repaired(d.region, Code.SEGMENT_SHARED)
    assert (has(d, "guest"), has(d, "none")) == (0, GUEST)


def test_of_two_files_that_no_row_names_the_first(d: Damage) -> None:
    two_files(d)
    set_row(d, GUEST, ino=d.inos["flat"])
    repaired(d.region, Code.SEGMENT_SHARED, Code.SEGMENT_FIELD)
    assert (has(d, "guest"), has(d, "none")) == (GUEST, 0)


def test_a_freed_file_leaves_a_dead_segment(d: Damage) -> None:
    orphan(d)
    repaired(d.region, Code.ORPHAN_LEFT)
    row = rows(d)[GUEST]
    assert (row.fields.state, len(row.pieces)) == (SEGMENT_DEAD, 2)
    assert rows(d).keys() == {GUEST, NEW, SECOND, DEAD}


def test_bad_memory_ends_the_segment_and_its_file(d: Damage) -> None:
    piece_of_pages(d)
    repaired(d.region, Code.SEGMENT_PIECES)
    row = rows(d)[GUEST]
    assert (row.pieces, row.fields.length, row.fields.valid) == (
        ((MEMORY, 4 * BLOCK),),
        4 * BLOCK,
        4 * BLOCK,
    )
    assert d.inode(d.inos["guest"]).size == 4 * BLOCK


def test_memory_that_two_have_is_its_file_s(d: Damage) -> None:
    """A new row has the lower number, and yields."""
    set_row(d, NEW, pieces=[(MEMORY, BLOCK)])
    repaired(d.region, Code.SEGMENT_ROW)
    assert rows(d).keys() == {GUEST, SECOND, DEAD}
    assert len(rows(d)[GUEST].pieces) == 2


def test_memory_of_the_region_itself(d: Damage) -> None:
    for number in (SUPERBLOCK_PAGE, BACKUP_PAGE):
        with d.edit(number) as page:
            PLACEMENT.pack_into(page, PLACEMENT_OFFSET, PLACEMENT_DAX, 1, BLOCK, b"dax0.0")
            PIECE.pack_into(page, PIECES_OFFSET, MEMORY - BLOCK, 2 * BLOCK)
    report = repaired(d.region, Code.SEGMENT_ROW, Code.SEGMENT_LOST)
    assert f"in use elsewhere too: got {MEMORY:#x}+0x800000" in report.problems[0].message


def test_valid_is_what_the_file_has_seen(d: Damage) -> None:
    valid_beyond_the_end(d)
    repaired(d.region, Code.SEGMENT_FIELD)
    assert rows(d)[GUEST].fields.valid == 5 * BLOCK + PAGE
    assert d.inode(d.inos["guest"]).size == 5 * BLOCK + 100


def test_a_new_segment_has_no_device_yet(d: Damage) -> None:
    set_row(d, NEW, align=0, valid=0)
    assert check(d.region, repair=False).clean
    set_row(d, SECOND, align=0)
    repaired(d.region, Code.SEGMENT_FIELD)
    assert rows(d)[SECOND].fields.align == BLOCK


def test_a_new_segment_of_a_file_shows_nothing_of_its_memory(d: Damage) -> None:
    set_row(d, GUEST, state=SEGMENT_NEW, valid=0, align=0)
    repaired(d.region, Code.SEGMENT_FIELD, Code.SEGMENT_SIZE)
    assert d.inode(d.inos["guest"]).size == 0


# ------------------------------------------------------------------------------ in a directory


def test_a_row_in_a_directory_has_no_memory_of_its_own(files: Damage) -> None:
    before = rows(files)[GUEST]
    set_row(files, GUEST, pieces=[(MEMORY, 6 * BLOCK)], align=BLOCK, name=b"dax0.0")
    report = repaired(files.region, Code.SEGMENT_FIELD)
    assert report.counts[Code.SEGMENT_FIELD] == 3
    assert rows(files)[GUEST] == before


@pytest.mark.parametrize("length", [0, BLOCK + PAGE, 1 << 63])
def test_a_bad_length_in_a_directory(files: Damage, length: int) -> None:
    """It becomes one that holds all of the file."""
    set_row(files, GUEST, length=length)
    repaired(files.region, Code.SEGMENT_FIELD)
    fields = rows(files)[GUEST].fields
    assert fields.length == 6 * BLOCK
    assert files.inode(files.inos["guest"]).size == 5 * BLOCK + 100


def test_a_bad_length_that_no_file_proves(files: Damage) -> None:
    set_row(files, DEAD, length=BLOCK + 1)
    repaired(files.region, Code.SEGMENT_ROW)
    assert DEAD not in rows(files)


def test_a_segment_grows_in_a_directory(files: Damage) -> None:
    """Between the transaction with the row, and that with what is valid."""
    set_row(files, GUEST, length=8 * BLOCK)
    assert check(files.region, repair=False).clean


# ------------------------------------------------------------------------------ at random


def ends_well(d: Damage) -> None:
    """A check and a repair find the same, and a second check nothing."""
    found = check(d.region, repair=False)
    report = check(d.region, repair=True)
    assert report.counts == found.counts
    if report.counts[Code.NO_ROOM]:
        return
    again = check(d.region, repair=False)
    assert not again.problems, [str(p) for p in again.problems]
    taken = sorted(p for row in rows(d).values() for p in row.pieces)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(taken))


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits(d: Damage, seed: int) -> None:
    """One is flipped back; two in a page lose no more than what it holds."""
    chance = random.Random(seed)
    before = rows(d)
    number = chance.choice(nodes(d))
    first, second = chance.sample(range(8 * PAGE), 2)
    d.flip(number, first)
    ends_well(d)
    assert rows(d) == before
    number = chance.choice(nodes(d))
    d.flip(number, first)
    d.flip(number, second)
    ends_well(d)


HITS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, PAGE // 8 - 1), st.integers(0, 7)),
    min_size=1,
    max_size=6,
)
# Words of headers, slots and rows are hit more often than the empty middle of a page.
PLACES = [*range(2, 40), *range(450, PAGE // 8)]


@pytest.mark.slow("each example is three checks")
@given(hits=HITS, directory=st.booleans())
def test_random_words_with_good_checksums(
    in_dax: Pristine, in_directory: Pristine, hits: list[tuple[int, int, int]], directory: bool
) -> None:
    for d in copy_of(in_directory if directory else in_dax):
        pages = [*nodes(d), STATE_PAGE, d.inode_page(ROOT_INO), d.inode_page(ROOT_INO)]
        for choice, place, what in hits:
            at = 8 * PLACES[place % len(PLACES)] if choice < 3 else 8 * place
            if pages[choice] == STATE_PAGE:
                at = 232 + 8 * (place % 2)
            words = [0, 1, 2, 3, GUEST << 32, MEMORY, BLOCK, (1 << 64) - 1 - place]
            with d.edit(pages[choice]) as page:
                page[at : at + 8] = words[what].to_bytes(8, "little")
        ends_well(d)


def test_a_row_is_packed_as_it_was(d: Damage) -> None:
    """The helper and fsck agree on each byte: a repair stores what it has read."""
    set_row(d, GUEST, node=3, handle=1 << 40)
    before = rows(d)
    leaves_exchanged(d)
    repaired(d.region, Code.TREE_SHAPE)
    assert rows(d) == before
    assert all(isinstance(row, Row) for row in before.values())
