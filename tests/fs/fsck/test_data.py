"""Pass 5: extents, pending ranges, and bytes behind the end of files."""

from __future__ import annotations

from pkernfs import layout
from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.fsck import Code
from pkernfs.layout import (
    INODE_FLAG_PENDING,
    PAGE,
    ROOT_INO,
    STATE_MOUNTED,
    STATE_PAGE,
    block_of,
    first_page,
)
from pkernfs.quantities import BlockNo, PageNo, RegionOff
from support.damage import Damage, make_orphan
from support.fsck_cases import Case, Cases
from support.repairs import Pristine, repair_and_check, tree_of

case = Cases()


@case(Code.INODE_DATA_PAGES)
def wrong_data_pages(d: Damage) -> None:
    d.set_inode(d.inos["guest"], data_pages=1)


def set_pending(d: Damage, start: int, end: int) -> None:
    ino = d.inos["guest"]
    flags = d.inode(ino).flags | INODE_FLAG_PENDING
    d.set_inode(ino, flags=flags, pending_start=start, pending_end=end)
    d.set_inode_page(ino, 3, 1 << (ino & 15))


@case(Code.PENDING_RANGE)
def pending_truncation(d: Damage) -> None:
    set_pending(d, (4 << 20) + 100, layout.PENDING_TO_END)
    d.set_inode(d.inos["guest"], size=(4 << 20) + 100)
    d.set_state(state=STATE_MOUNTED)


@case(Code.PENDING_LEFT, Code.INODE_LINKS)
def pending_without_links_but_with_a_name(d: Damage) -> None:
    set_pending(d, 2 << 20, layout.PENDING_TO_END)
    d.set_inode(d.inos["guest"], nlink=0)


@case(Code.PENDING_LEFT, Code.ORPHAN_LEFT)
def orphan_with_a_pending_range(d: Damage) -> None:
    make_orphan(d, "guest")
    set_pending(d, 2 << 20, layout.PENDING_TO_END)


@case(Code.PENDING_LEFT)
def pending_punch_after_unmount(d: Damage) -> None:
    set_pending(d, 100, 7 << 20)


@case(Code.EXTENT_RANGE)
def extent_out_of_region(d: Damage) -> None:
    d.set_extents(d.inos["small"], [(0, 1 << 50, 2)])


@case(Code.EXTENT_RANGE)
def extent_into_static_area(d: Damage) -> None:
    d.set_extents(d.inos["small"], [(0, STATE_PAGE, 2)])


@case(Code.EXTENT_RANGE)
def static_blocks_as_extent(d: Damage) -> None:
    d.set_extents(d.inos["guest"], [(0, 0, 1024)])


@case(Code.EXTENT_ORDER)
def extents_out_of_order(d: Damage) -> None:
    d.set_extents(d.inos["guest"], d.extents(d.inos["guest"])[::-1])


@case(Code.EXTENT_ORDER)
def extents_overlap(d: Damage) -> None:
    first, *rest = d.extents(d.inos["guest"])
    d.set_extents(d.inos["guest"], [first, (first[0], *rest[0][1:])])


@case(Code.EXTENT_SPLIT, lossless=True)
def split_extent(d: Damage) -> None:
    file_page, page, count = d.extents(d.inos["small"])[0]
    assert count > 1
    d.set_extents(d.inos["small"], [(file_page, page, 1), (file_page + 1, page + 1, count - 1)])


@case(Code.EXTENT_SHAPE)
def part_of_a_block(d: Damage) -> None:
    first, *rest = d.extents(d.inos["guest"])
    d.set_extents(d.inos["guest"], [(first[0], first[1], 100), *rest])


@case(Code.EXTENT_SHAPE)
def blocks_at_a_wrong_offset(d: Damage) -> None:
    extents = d.extents(d.inos["guest"])
    d.set_extents(d.inos["guest"], [(f + 1, p, n) for f, p, n in extents])


@case(Code.EXTENT_SHAPE)
def blocks_and_pages_in_one(d: Damage) -> None:
    """The last pages of a carved block and the whole block behind it."""
    data = block_of(d.extents(d.inos["guest"])[0].page)
    assert d.block_bits(BlockNo(data - 1))[1]
    last = PageNo(first_page(data) - 1)
    d.set_page_used(last, 1)
    d.set_extents(d.inos["guest"], [(511, last, 513)])
    d.set_inode(d.inos["guest"], data_pages=513)


@case(Code.EXTENT_METADATA)
def extent_into_metadata(d: Damage) -> None:
    d.set_extents(d.inos["small"], [(0, d.inode_page(ROOT_INO), 2)])


@case(Code.EXTENT_METADATA)
def carved_block_as_extent(d: Damage) -> None:
    carved = block_of(d.inode_page(ROOT_INO))
    d.set_extents(d.inos["guest"], [(0, first_page(carved), 512)])


@case(Code.DOUBLE_CLAIM)
def two_files_with_the_same_pages(d: Damage) -> None:
    d.set_extents(d.inos["other"], d.extents(d.inos["small"]))


@case(Code.DOUBLE_CLAIM)
def one_file_with_a_block_twice(d: Damage) -> None:
    extents = d.extents(d.inos["guest"])
    d.set_extents(d.inos["guest"], [*extents, (1 << 20, *extents[0][1:])])
    d.set_inode(d.inos["guest"], size=1 << 33)


@case(Code.TAIL_NOT_ZERO)
def bytes_behind_the_end(d: Damage) -> None:
    ino = d.inos["other"]
    file_page, page, _ = d.extents(ino)[-1]
    size = d.inode(ino).size
    d.region.copy_in(RegionOff((page - file_page) * PAGE + size), b"stale")


@case(Code.TAIL_AFTER_CRASH)
def bytes_of_an_unfinished_write(d: Damage) -> None:
    bytes_behind_the_end(d)
    d.set_state(state=STATE_MOUNTED)


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)


@case.each_lossless
def test_nothing_is_lost(damage: Damage, pristine: Pristine, function: Case) -> None:
    function(damage)
    _, tree = repair_and_check(damage.region)
    assert tree == tree_of(pristine)


def test_pending_truncation_is_completed(damage: Damage) -> None:
    pending_truncation(damage)
    _, tree = repair_and_check(damage.region, Code.PENDING_RANGE)
    data = tree[b"guest"]
    assert isinstance(data, bytes)
    assert len(data) == (4 << 20) + 100
    fs = mount_filesystem(damage.region)
    fs.setattr(damage.inos["guest"], size=8 << 20)
    assert not bytes(fs.read(damage.inos["guest"], (4 << 20) + 100, 4 << 20)).strip(b"\0")
    fs.unmount()
