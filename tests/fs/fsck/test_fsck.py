"""fsck: a case for each problem code, and the shape of the report.

Each case damages a populated region so that its code is reported; a check changes nothing, a repair
fixes it all, a second run is clean, and the file system mounts and can be read to the last byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs import layout
from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import FormatError, NoSpaceError, PkernfsError, ReadOnlyError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.fsck import Code, Report, check
from pkernfs.fs.fsck.trees import Allocator, NoRoomError
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    HEADER,
    INODE_FLAG_PENDING,
    IOMMU_INO,
    JOURNAL_PAGE,
    NAME_ITEM,
    PAGE,
    PAGES_PER_BLOCK,
    RECORD,
    ROOT_INO,
    RUN,
    STATE_FLAG_ERROR,
    STATE_FROZEN,
    STATE_MOUNTED,
    STATE_PAGE,
    TREE_OFFSET,
    TREE_SLOTS_OFFSET,
    XATTR_ITEM,
)
from pkernfs.region.checksum import crc32c
from pkernfs.region.region import Region
from pkernfs.region.trace import trace_start, trace_stop
from support.checking import MemoryFile
from support.damage import BIG_VALUE, REG, REGION_BYTES, Damage, Populated, populate

Case = Callable[[Damage], None]
CASES: list[tuple[Code, Case]] = []


def case(*codes: Code) -> Callable[[Case], Case]:
    """The function's damage is reported under these codes."""

    def add(function: Case) -> Case:
        CASES.extend((code, function) for code in codes)
        return function

    return add


@pytest.fixture(scope="module")
def pristine() -> Iterator[tuple[bytes, dict[str, int]]]:
    with Region.anonymous(REGION_BYTES) as region:
        populated = populate(region)
        yield region.read(0, REGION_BYTES), populated.inos


@pytest.fixture
def damage(pristine: tuple[bytes, dict[str, int]]) -> Iterator[Damage]:
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(0, pristine[0])
        yield Damage(Populated(region, dict(pristine[1])))


def read_all(fs: FileSystem, ino: int = ROOT_INO) -> dict[bytes, object]:
    """Every name, byte and attribute below a directory."""
    found: dict[bytes, object] = {}
    for name, child, _, _ in list(fs.readdir(ino, 0)):
        inode = fs.inode(child)
        if inode.is_dir:
            found[name] = read_all(fs, child)
        elif stat.S_ISLNK(inode.mode):
            found[name] = fs.readlink(child)
        elif inode.is_reg:
            found[name] = bytes(fs.read(child, 0, inode.size)) if inode.size < 1 << 24 else None
        for attribute in fs.listxattr(child):
            fs.getxattr(child, attribute)
    return found


def assert_mounts(region: Region) -> dict[bytes, object]:
    """The file system mounts, reads, takes new files, and is clean after all."""
    fs = mount_filesystem(region)
    tree = read_all(fs)
    ino = fs.create(ROOT_INO, b"new file", REG, 0, 0).ino
    fs.write(ino, 0, b"new data" * 3000)
    fs.setattr(ino, size=100)
    fs.unlink(ROOT_INO, b"new file")
    fs.unmount()
    after = check(region, repair=False, verify_zero=True)
    assert not after.problems, [str(p) for p in after.problems]
    assert not after.notes, [str(p) for p in after.notes]
    return tree


def repair_and_check(region: Region, *codes: Code) -> tuple[Report, dict[bytes, object]]:
    """Check, repair, check, mount; the report of the repair and the tree as it then is."""
    before = region.read(0, region.size)
    found = check(region, repair=False, verify_zero=True)
    assert region.read(0, region.size) == before, "a check stored into the region"
    for code in codes:
        assert found.counts[code], (code, [str(p) for p in found.problems])
    report = check(region, repair=True, verify_zero=True)
    assert report.counts == found.counts
    assert all(p.fixed for p in report.problems + report.notes)
    again = check(region, repair=False, verify_zero=True)
    assert not again.problems, [str(p) for p in again.problems]
    assert not again.notes, [str(p) for p in again.notes]
    return report, assert_mounts(region)


def test_populated_region_is_clean(damage: Damage) -> None:
    report = check(damage.region, repair=False, verify_zero=True)
    assert report.clean
    assert not report.notes
    assert report.summary["inodes"] > 150
    assert_mounts(damage.region)


# ------------------------------------------------------------------------------ superblocks, state


@case(Code.SUPERBLOCK_DAMAGED)
def primary_superblock(d: Damage) -> None:
    d.smash(0)


@case(Code.SUPERBLOCK_DAMAGED)
def backup_superblock(d: Damage) -> None:
    d.smash(BACKUP_PAGE, 600, 40)


@case(Code.SUPERBLOCKS_DIFFER)
def different_superblocks(d: Damage) -> None:
    with d.edit(BACKUP_PAGE) as page:
        page[160:170] = b"otherlabel"


def write_record(d: Damage, runs: list[tuple[int, bytes]], *, valid: bool = True) -> None:
    body = b"".join(RUN.pack(offset, len(data) // 8) + data for offset, data in runs)
    uuid = HEADER.unpack_from(d.page(0))[4]
    head = [7, layout.MAGIC_RECORD, 0, 7, len(body), len(runs), uuid, 0]
    head[2] = crc32c(RECORD.pack(*head)[16:] + body) ^ (not valid)
    d.region.copy_in(JOURNAL_PAGE * PAGE, RECORD.pack(*head) + body)


@case(Code.JOURNAL_PENDING)
def pending_record(d: Damage) -> None:
    before = d.page(STATE_PAGE)
    d.set_state(mounts=41)
    after = d.page(STATE_PAGE)
    d.region.copy_in(STATE_PAGE * PAGE, before)
    write_record(d, [(STATE_PAGE * PAGE, after[:256])])


@case(Code.JOURNAL_DAMAGED)
def damaged_record(d: Damage) -> None:
    write_record(d, [(STATE_PAGE * PAGE, bytes(256))], valid=False)


@case(Code.STATE_DAMAGED, Code.INODE_PAGE_FOUND)
def state_page(d: Damage) -> None:
    d.smash(STATE_PAGE, 64, 64)


@case(Code.STATE_DAMAGED)
def unknown_state(d: Damage) -> None:
    d.set_state(state=9)


@case(Code.STATE_ERROR_FLAG)
def error_flag(d: Damage) -> None:
    d.set_state(flags=STATE_FLAG_ERROR)


@case(Code.NOT_UNMOUNTED)
def not_unmounted(d: Damage) -> None:
    d.set_state(state=STATE_MOUNTED)


@case(Code.HANDOVER_STRAY)
def record_without_a_handover(d: Damage) -> None:
    with d.edit(STATE_PAGE) as page:
        page[160:168] = (1).to_bytes(8, "little")


def frozen_with_list(d: Damage, ino: int, size: int, crc: int) -> None:
    d.set_state(state=STATE_FROZEN)
    record = layout.HandoverFields(1, 5, bytes(16), ino, size, crc, 0, layout.NO_PHYSICAL)
    with d.edit(STATE_PAGE) as page:
        layout.HANDOVER.pack_into(page, layout.HANDOVER_OFFSET, *record)


@case(Code.HANDOVER_LIST)
def list_of_no_inode(d: Damage) -> None:
    frozen_with_list(d, 16 * 3000 + 1, 64, 0)


@case(Code.HANDOVER_LIST)
def list_with_a_name(d: Damage) -> None:
    frozen_with_list(d, d.inos["guest"], 64, 0)


@case(Code.HANDOVER_LIST)
def list_of_another_length(d: Damage) -> None:
    make_orphan(d, "other")
    frozen_with_list(d, d.inos["other"], 64, 0)


@case(Code.HANDOVER_LIST)
def list_with_another_digest(d: Damage) -> None:
    make_orphan(d, "other")
    frozen_with_list(d, d.inos["other"], d.inode(d.inos["other"]).size, 12345)


@case(Code.BIT_FLIPPED)
def flipped_bit_in_state(d: Damage) -> None:
    d.flip(STATE_PAGE, 8 * 120 + 3)


@case(Code.BIT_FLIPPED)
def flipped_bit_in_inodes(d: Damage) -> None:
    d.flip(d.inode_page(d.inos["guest"]), 8 * 2000 + 5)


@case(Code.BIT_FLIPPED)
def flipped_bit_in_checksum(d: Damage) -> None:
    d.flip(d.inode(d.inos["many"]).body, 8 * 5 + 1)


# ------------------------------------------------------------------------------ block maps


@case(Code.BLOCK_MAP_DAMAGED)
def block_map(d: Damage) -> None:
    d.smash(2)


@case(Code.BLOCK_MAP_DAMAGED)
def block_map_of_other_blocks(d: Damage) -> None:
    with d.edit(2) as page:
        page[40] = 7


@case(Code.BLOCK_MAP_UNTIDY)
def untidy_block_map(d: Damage) -> None:
    d.set_map(9000, used=1)


@case(Code.BLOCK_LOST)
def lost_block(d: Damage) -> None:
    d.set_map(d.free_block(), used=1, zero=0)


@case(Code.BLOCK_UNMARKED)
def unmarked_block(d: Damage) -> None:
    d.set_map(d.extents(d.inos["guest"])[0][1] // PAGES_PER_BLOCK, used=0)


@case(Code.BLOCK_CARVED)
def carved_bit_missing(d: Damage) -> None:
    d.set_map(d.inode_page(1) // PAGES_PER_BLOCK, carved=0)


@case(Code.BLOCK_CARVED)
def carved_bit_on_data(d: Damage) -> None:
    d.set_map(d.extents(d.inos["guest"])[0][1] // PAGES_PER_BLOCK, carved=1)


@case(Code.BLOCK_CARVED)
def carved_bit_on_free_block(d: Damage) -> None:
    d.set_map(d.free_block(), carved=1)


@case(Code.BLOCK_CARVED)
def carved_bit_missing_on_pages(d: Damage) -> None:
    d.set_map(d.extents(d.inos["small"])[0][1] // PAGES_PER_BLOCK, carved=0)


@case(Code.ZERO_IN_USE)
def zero_bit_on_data(d: Damage) -> None:
    d.set_map(d.extents(d.inos["guest"])[0][1] // PAGES_PER_BLOCK, zero=1)


@case(Code.ZERO_NOT_ZERO)
def zero_bit_on_dirty_block(d: Damage) -> None:
    block = d.free_block()
    d.set_map(block, zero=1)
    d.region.copy_in(block * BLOCK + BLOCK - 1, b"\1")


@case(Code.PAGE_MAP_DAMAGED)
def page_map(d: Damage) -> None:
    d.smash(d.inode_page(1) // PAGES_PER_BLOCK * PAGES_PER_BLOCK)


@case(Code.PAGE_MAP_DAMAGED)
def page_map_of_data(d: Damage) -> None:
    d.smash(d.extents(d.inos["small"])[0][1] // PAGES_PER_BLOCK * PAGES_PER_BLOCK, 60, 9)


@case(Code.PAGE_MAP_CLASS)
def page_map_class(d: Damage) -> None:
    with d.edit(d.inode_page(1) // PAGES_PER_BLOCK * PAGES_PER_BLOCK) as page:
        page[layout.PAGE_MAP_CLASS_OFFSET] = 9


@case(Code.PAGE_LOST)
def lost_page(d: Damage) -> None:
    d.set_page_used(d.free_page(), 1)


@case(Code.PAGE_UNMARKED)
def unmarked_page(d: Damage) -> None:
    d.set_page_used(d.inode_page(1), 0)


@case(Code.PAGE_UNMARKED)
def unmarked_page_map(d: Damage) -> None:
    d.set_page_used(d.inode_page(1) // PAGES_PER_BLOCK * PAGES_PER_BLOCK, 0)


# ------------------------------------------------------------------------------ inode table


@case(Code.TABLE_ENTRY, Code.INODE_PAGE_FOUND)
def table_entry_out_of_region(d: Damage) -> None:
    root = d.state().inode_root
    extents = d.leaf_extents(root)
    d.set_leaf_extents(root, [*extents[:-1], (extents[-1][0], 1 << 60, extents[-1][2])])


@case(Code.TABLE_ENTRY, Code.TABLE_GAP)
def table_entry_of_other_page(d: Damage) -> None:
    """An inode page that is none, and the page that should be there is gone for good."""
    d.smash(d.inode_page(16))
    root = d.state().inode_root
    extents = []
    for index, page, count in d.leaf_extents(root):
        for i in range(count):
            extents.append((index + i, page + i if index + i != 1 else root, 1))
    d.set_leaf_extents(root, extents)


@case(Code.INODE_PAGE_DAMAGED)
def inode_page(d: Damage) -> None:
    d.smash(d.inode_page(d.inos["many"]), 2048, 60)


@case(Code.INODE_PAGE_DAMAGED, Code.ROOT_MISSING, Code.IOMMU_MISSING)
def first_inode_page_without_leaves(d: Damage) -> None:
    """The root is gone with all its names."""
    d.smash(d.inode(ROOT_INO).body)
    d.smash(d.inode_page(ROOT_INO))


@case(Code.INODE_PAGE_DAMAGED, Code.INODE_RECOVERED, Code.TREE_LEAF_FOUND)
def first_inode_page(d: Damage) -> None:
    d.smash(d.inode_page(ROOT_INO))


@case(Code.INODE_PAGE_MASKS)
def pending_mask(d: Damage) -> None:
    d.set_inode_page(d.inos["small"], 3, 1 << (d.inos["small"] & 15))


@case(Code.INODE_PAGE_MASKS)
def used_mask(d: Damage) -> None:
    with d.edit(d.inode_page(1)) as page:
        page[56] |= 1


@case(Code.INODE_FREE_LIST)
def free_list_head(d: Damage) -> None:
    d.set_state(free_inode_page=1000)


@case(Code.INODE_FREE_LIST)
def free_list_cycle(d: Damage) -> None:
    index = d.state().free_inode_page - 1
    d.set_inode_page(index * 16 + 1, 1, index + 1)


@case(Code.INODE_FREE_LIST)
def free_list_flag(d: Damage) -> None:
    d.set_inode_page((d.state().free_inode_page - 1) * 16 + 1, 4, 0)


@case(Code.INODE_PAGE_COUNT)
def inode_page_count(d: Damage) -> None:
    d.set_state(inode_pages=d.state().inode_pages + 3)


@case(Code.INODES_USED)
def inodes_used(d: Damage) -> None:
    d.set_state(inodes_used=5)


# ------------------------------------------------------------------------------ inodes


@case(Code.INODE_BAD, Code.NAME_DANGLING)
def inode_of_no_type(d: Damage) -> None:
    d.set_inode(d.inos["small"], mode=0o644)


@case(Code.INODE_BAD)
def inode_of_other_number(d: Damage) -> None:
    d.set_inode(d.inos["small"], ino=77)


@case(Code.INODE_BAD)
def huge_size(d: Damage) -> None:
    d.set_inode(d.inos["small"], size=1 << 63)


@case(Code.INODE_BAD, Code.IOMMU_MISSING)
def iommu_as_a_file(d: Damage) -> None:
    d.set_inode(IOMMU_INO, mode=REG, parent=0)


@case(Code.INODE_BAD, Code.INODE_RECOVERED)
def root_as_a_file(d: Damage) -> None:
    d.set_inode(ROOT_INO, mode=REG)


@case(Code.INODE_BAD)
def too_many_inline_extents(d: Damage) -> None:
    d.set_inode(d.inos["small"], flags=77 << 8)


@case(Code.INODE_FIELD)
def unknown_flags(d: Damage) -> None:
    ino = d.inos["small"]
    d.set_inode(ino, flags=d.inode(ino).flags | 1 << 20)


@case(Code.INODE_FIELD)
def body_without_flag(d: Damage) -> None:
    d.set_inode(d.inos["empty"], body=12345)


@case(Code.INODE_FIELD)
def high_mode_bits(d: Damage) -> None:
    d.set_inode(d.inos["small"], mode=1 << 20 | REG)


@case(Code.INODE_FIELD)
def parent_of_a_file(d: Damage) -> None:
    d.set_inode(d.inos["small"], parent=1)


@case(Code.INODE_PENDING)
def inverted_pending_range(d: Damage) -> None:
    ino = d.inos["guest"]
    flags = d.inode(ino).flags | INODE_FLAG_PENDING
    d.set_inode(ino, flags=flags, pending_start=BLOCK, pending_end=0)


@case(Code.INODE_LINKS)
def wrong_links(d: Damage) -> None:
    d.set_inode(d.inos["small"], nlink=7)


@case(Code.INODE_LINKS)
def wrong_links_of_directory(d: Damage) -> None:
    d.set_inode(d.inos["dir"], nlink=2)


@case(Code.INODE_LINKS, Code.INODE_PAGE_MASKS)
def no_links_but_a_name(d: Damage) -> None:
    d.set_inode(d.inos["small"], nlink=0)


@case(Code.INODE_PARENT)
def wrong_parent(d: Damage) -> None:
    d.set_inode(d.inos["dir/sub"], parent=d.inos["empty"])


@case(Code.INODE_DATA_PAGES)
def wrong_data_pages(d: Damage) -> None:
    d.set_inode(d.inos["guest"], data_pages=1)


@case(Code.DIRECTORY_SIZE)
def wrong_directory_size(d: Damage) -> None:
    d.set_inode(d.inos["many"], size=1)


@case(Code.SYMLINK_TARGET)
def lost_target(d: Damage) -> None:
    d.smash(d.inode(d.inos["long-link"]).body)


@case(Code.SYMLINK_TARGET)
def target_in_a_circle(d: Damage) -> None:
    body = d.inode(d.inos["long-link"]).body
    with d.edit(body) as page:
        page[40:48] = body.to_bytes(8, "little")


def make_orphan(d: Damage, path: str) -> None:
    ino = d.inos[path]
    d.rename(ROOT_INO, path.encode(), None)
    d.set_inode(ROOT_INO, size=d.inode(ROOT_INO).size - 1)
    d.set_inode(ino, nlink=0)
    d.set_inode_page(ino, 3, 1 << (ino & 15))


@case(Code.ORPHAN)
def orphans(d: Damage) -> None:
    for path in ("other", "guest", "xattr", "long-link"):
        make_orphan(d, path)
    pending: dict[int, int] = {}
    for path in ("other", "guest", "xattr", "long-link"):
        ino = d.inos[path]
        pending[ino >> 4] = pending.get(ino >> 4, 0) | 1 << (ino & 15)
    for index, mask in pending.items():
        d.set_inode_page(index * 16 + 1, 3, mask)
    d.set_state(state=STATE_MOUNTED)


@case(Code.ORPHAN_LEFT)
def orphan_after_unmount(d: Damage) -> None:
    make_orphan(d, "guest")


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


# ------------------------------------------------------------------------------ trees


@case(Code.TREE_NODE, Code.TREE_LEAF_FOUND)
def inner_node_of_names(d: Damage) -> None:
    d.smash(d.inode(d.inos["many"]).body)


@case(Code.TREE_NODE)
def leaf_of_names(d: Damage) -> None:
    d.smash(d.names(d.inos["many"]), 200, 300)


@case(Code.TREE_NODE, Code.TREE_LEAF_FOUND)
def inner_node_of_attributes(d: Damage) -> None:
    d.smash(d.inode(d.inos["xattr"]).xattr_root)


@case(Code.TREE_NODE)
def leaf_of_extents(d: Damage) -> None:
    d.smash(d.inode(d.inos["pages"]).body)


@case(Code.TREE_NODE)
def tree_in_a_circle(d: Damage) -> None:
    root = d.inode(d.inos["many"]).body
    with d.edit(root) as page:
        page[TREE_SLOTS_OFFSET + 8 : TREE_SLOTS_OFFSET + 16] = root.to_bytes(8, "little")


@case(Code.TREE_NODE)
def node_of_other_inode(d: Damage) -> None:
    d.set_inode(d.inos["dir"], body=d.inode(d.inos["many"]).body)


@case(Code.TREE_NODE)
def node_of_table(d: Damage) -> None:
    d.smash(d.state().inode_root)


@case(Code.TREE_SHAPE)
def leaves_exchanged(d: Damage) -> None:
    root = d.inode(d.inos["many"]).body
    with d.edit(root) as page:
        at = TREE_SLOTS_OFFSET
        page[at + 8 : at + 16], page[at + 24 : at + 32] = (
            page[at + 24 : at + 32],
            page[at + 8 : at + 16],
        )


@case(Code.TREE_SHAPE)
def inner_keys_out_of_order(d: Damage) -> None:
    with d.edit(d.inode(d.inos["many"]).body) as page:
        at = TREE_SLOTS_OFFSET
        page[at : at + 8], page[at + 16 : at + 24] = page[at + 16 : at + 24], page[at : at + 8]


@case(Code.TREE_SHAPE)
def leaf_keys_out_of_order(d: Damage) -> None:
    leaf = d.names(d.inos["dir"])
    d.set_items(leaf, d.items(leaf)[::-1])


@case(Code.TREE_ITEMS)
def wrong_heap(d: Damage) -> None:
    with d.edit(d.names(d.inos["dir"])) as page:
        page[TREE_OFFSET + 4] ^= 0xFF


@case(Code.TREE_ITEMS)
def wrong_garbage(d: Damage) -> None:
    with d.edit(d.names(d.inos["dir"])) as page:
        page[TREE_OFFSET + 6] ^= 0x0F


@case(Code.TREE_ITEMS)
def item_outside(d: Damage) -> None:
    with d.edit(d.names(d.inos["dir"])) as page:
        page[TREE_SLOTS_OFFSET + 8 : TREE_SLOTS_OFFSET + 10] = b"\xf0\x0f"


@case(Code.TREE_ITEMS)
def items_overlap(d: Damage) -> None:
    with d.edit(d.names(d.inos["dir"])) as page:
        at = TREE_SLOTS_OFFSET + 8
        page[at + 16 : at + 20] = page[at : at + 4]


# ------------------------------------------------------------------------------ extents


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


@case(Code.EXTENT_SPLIT)
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
    data = d.extents(d.inos["guest"])[0][1] // PAGES_PER_BLOCK
    assert d.block_bits(data - 1)[1]
    last = data * PAGES_PER_BLOCK - 1
    d.set_page_used(last, 1)
    d.set_extents(d.inos["guest"], [(511, last, 513)])
    d.set_inode(d.inos["guest"], data_pages=513)


@case(Code.EXTENT_METADATA)
def extent_into_metadata(d: Damage) -> None:
    d.set_extents(d.inos["small"], [(0, d.inode_page(1), 2)])


@case(Code.EXTENT_METADATA)
def carved_block_as_extent(d: Damage) -> None:
    carved = d.inode_page(1) // PAGES_PER_BLOCK
    d.set_extents(d.inos["guest"], [(0, carved * PAGES_PER_BLOCK, 512)])


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
    d.region.copy_in((page - file_page) * PAGE + size, b"stale")


@case(Code.TAIL_AFTER_CRASH)
def bytes_of_an_unfinished_write(d: Damage) -> None:
    bytes_behind_the_end(d)
    d.set_state(state=STATE_MOUNTED)


# ------------------------------------------------------------------------------ names


def name_item(ino: int, kind: int, name: bytes) -> bytes:
    return NAME_ITEM.pack(ino, kind) + name


@case(Code.NAME_BAD)
def bad_names(d: Damage) -> None:
    d.rename(ROOT_INO, b"small", name_item(d.inos["small"], 8, b"a/b"))


@case(Code.NAME_BAD)
def empty_name(d: Damage) -> None:
    d.rename(ROOT_INO, b"small", name_item(d.inos["small"], 8, b""))


@case(Code.NAME_BAD)
def dotdot(d: Damage) -> None:
    d.rename(ROOT_INO, b"small", name_item(d.inos["small"], 8, b".."))


@case(Code.NAME_KEY)
def wrong_key(d: Damage) -> None:
    key, item = d.item(ROOT_INO, b"small")
    d.rename(ROOT_INO, b"small", item, key=key ^ 1 << 40)


@case(Code.NAME_DUPLICATE)
def duplicate_name(d: Damage) -> None:
    key, item = d.item(ROOT_INO, b"small")
    leaf = d.names(ROOT_INO)
    d.set_items(leaf, sorted([*d.items(leaf), (key + 1, item)]))
    d.set_inode(ROOT_INO, size=d.inode(ROOT_INO).size + 1)


@case(Code.NAME_DUPLICATE, Code.NAME_KEY)
def duplicate_name_elsewhere(d: Damage) -> None:
    key, item = d.item(ROOT_INO, b"small")
    leaf = d.names(ROOT_INO)
    d.set_items(leaf, sorted([*d.items(leaf), (key ^ 1 << 50, item)]))


@case(Code.NAME_DANGLING)
def dangling_name(d: Damage) -> None:
    d.rename(ROOT_INO, b"fifo", name_item(1 << 40 | 5, 1, b"fifo"))


@case(Code.NAME_TYPE)
def wrong_type(d: Damage) -> None:
    d.rename(ROOT_INO, b"small", name_item(d.inos["small"], 4, b"small"))


@case(Code.NAME_SECOND)
def second_name_of_directory(d: Damage) -> None:
    d.rename(ROOT_INO, b"fifo", name_item(d.inos["dir/sub"], 4, b"fifo"))


@case(Code.NAME_SECOND)
def name_of_root(d: Damage) -> None:
    d.rename(ROOT_INO, b"fifo", name_item(ROOT_INO, 4, b"fifo"))


# ------------------------------------------------------------------------------ attributes


def change_attribute(
    d: Damage, name: bytes, change: Callable[[int, bytes], tuple[int, bytes]]
) -> None:
    leaf = d.leaf_of(d.inode(d.inos["other"]).xattr_root)
    items = [change(key, item) if name in item else (key, item) for key, item in d.items(leaf)]
    d.set_items(leaf, sorted(items))


@case(Code.XATTR_BAD)
def attribute_of_no_namespace(d: Damage) -> None:
    change_attribute(d, b"user.one", lambda k, i: (k, i.replace(b"user.", b"uses.")))


@case(Code.XATTR_BAD)
def attribute_cut_short(d: Damage) -> None:
    change_attribute(d, b"user.one", lambda k, i: (k, i[:-1]))


@case(Code.XATTR_KEY)
def attribute_with_a_wrong_key(d: Damage) -> None:
    change_attribute(d, b"user.one", lambda k, i: (k ^ 1 << 30, i))


@case(Code.XATTR_DUPLICATE)
def duplicate_attribute(d: Damage) -> None:
    leaf = d.leaf_of(d.inode(d.inos["other"]).xattr_root)
    items = d.items(leaf)
    key, item = next(found for found in items if b"user.one" in found[1])
    d.set_items(leaf, sorted([*items, (key + 1, item)]))


def overflow_of(d: Damage) -> int:
    leaf = d.leaf_of(d.inode(d.inos["other"]).xattr_root)
    item = next(item for _, item in d.items(leaf) if b"user.two" in item)
    assert XATTR_ITEM.unpack_from(item)[3] == len(BIG_VALUE)
    return int.from_bytes(item[-8:], "little")


@case(Code.XATTR_VALUE)
def lost_value(d: Damage) -> None:
    d.smash(overflow_of(d))


@case(Code.XATTR_VALUE)
def value_cut_short(d: Damage) -> None:
    with d.edit(overflow_of(d)) as page:
        page[40:48] = bytes(8)


# ------------------------------------------------------------------------------ directories


@case(Code.ROOT_MISSING)
def root_missing(d: Damage) -> None:
    first_inode_page_without_leaves(d)


@case(Code.IOMMU_MISSING)
def iommu_missing(d: Damage) -> None:
    d.rename(ROOT_INO, b"iommu", None)


@case(Code.IOMMU_MISSING)
def iommu_is_something_else(d: Damage) -> None:
    d.rename(ROOT_INO, b"iommu", name_item(d.inos["fifo"], 1, b"iommu"))


@case(Code.DIRECTORY_LOOP)
def directory_loop(d: Damage) -> None:
    """dir leaves the root and comes back below its own grandchild."""
    d.rename(ROOT_INO, b"dir", None)
    item = name_item(d.inos["dir"], 4, b"file")
    d.rename(d.inos["dir/sub/deep"], b"file", item)


@case(Code.UNREACHABLE)
def nameless(d: Damage) -> None:
    for name in (b"dir", b"small", b"long-link", b"fifo"):
        d.rename(ROOT_INO, name, None)
    d.rename(d.inos["dir"], b"linked", None)


# ------------------------------------------------------------------------------ every code


@pytest.mark.parametrize(
    ("code", "function"), CASES, ids=[f"{c.name}-{f.__name__}" for c, f in CASES]
)
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)


def test_every_code_has_a_case() -> None:
    # test_no_room_changes_nothing, and test_fsck_tables.py
    tested_apart = {Code.NO_ROOM, Code.TABLES_BAD, Code.TABLES_UNCHECKED}
    assert {code for code, _ in CASES} | tested_apart == set(Code)


# ------------------------------------------------------------------------------ what is kept


def tree_of(pristine: tuple[bytes, dict[str, int]]) -> dict[bytes, object]:
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(0, pristine[0])
        fs = mount_filesystem(region)
        tree = read_all(fs)
        fs.unmount()
        return tree


Pristine = tuple[bytes, dict[str, int]]


@pytest.mark.parametrize("page", range(3, 40, 3))
def test_a_flipped_bit_costs_nothing(damage: Damage, pristine: Pristine, page: int) -> None:
    number = damage.inode_page(1) - 2 + page
    if damage.page(number)[:2] != b"PK":
        number = STATE_PAGE
    damage.flip(number, 8 * (37 * page) + page % 8)
    _, tree = repair_and_check(damage.region, Code.BIT_FLIPPED)
    assert tree == tree_of(pristine)


@pytest.mark.parametrize(
    "function",
    [
        primary_superblock, state_page, block_map, page_map, page_map_of_data, node_of_table,
        inner_node_of_names, leaves_exchanged, inner_keys_out_of_order, table_entry_out_of_region,
        leaf_keys_out_of_order, wrong_key, unmarked_block, unmarked_page, iommu_missing,
        inner_node_of_attributes, carved_bit_missing_on_pages, split_extent, wrong_type,
    ],
)  # fmt: skip
def test_nothing_is_lost(damage: Damage, pristine: Pristine, function: Case) -> None:
    function(damage)
    _, tree = repair_and_check(damage.region)
    assert tree == tree_of(pristine)


def test_inodes_of_a_damaged_page_become_roots_own(damage: Damage) -> None:
    """One slot of 16 is hit: the others keep names and bytes, but nobody else may read them."""
    many = damage.inos["many/a-name-that-takes-some-room-0020"]
    damage.smash(damage.inode_page(many), (many & 15) * 256, 100)
    _, tree = repair_and_check(damage.region, Code.INODE_PAGE_DAMAGED)
    left = tree[b"many"]
    assert isinstance(left, dict)
    assert b"a-name-that-takes-some-room-0020" not in left
    assert len(left) == 149
    fs = mount_filesystem(damage.region)
    kept = fs.inode(many + 1 if many & 15 < 15 else many - 1)
    assert (kept.mode, kept.uid) == (stat.S_IFREG | 0o600, 0)
    fs.unmount()


def test_both_files_keep_the_data_of_a_double_claim(damage: Damage) -> None:
    two_files_with_the_same_pages(damage)
    fields = damage.inode(damage.inos["small"])
    damage.set_inode(damage.inos["other"], size=fields.size, data_pages=fields.data_pages)
    _, tree = repair_and_check(damage.region, Code.DOUBLE_CLAIM)
    assert tree[b"small"] == tree[b"other"] == b"small " * 700


def test_misplaced_blocks_are_copied(damage: Damage) -> None:
    blocks_at_a_wrong_offset(damage)
    damage.set_inode(damage.inos["guest"], size=(8 << 20) + PAGE)
    _, tree = repair_and_check(damage.region, Code.EXTENT_SHAPE)
    data = tree[b"guest"]
    assert isinstance(data, bytes)
    start = (4 << 20) + PAGE
    assert data[start : start + 6000] == b"guest " * 1000
    assert not data[:start].strip(b"\0")


def test_nameless_goes_to_lost_found(damage: Damage) -> None:
    nameless(damage)
    _, tree = repair_and_check(damage.region, Code.UNREACHABLE)
    lost = tree[b"lost+found"]
    assert isinstance(lost, dict)
    assert lost[b"#%d" % damage.inos["small"]] == b"small " * 700
    assert lost[b"#%d" % damage.inos["dir"]][b"sub"][b"deep"] == {b"file": b"at the bottom"}
    fs = mount_filesystem(damage.region)
    assert stat.S_IMODE(fs.lookup(ROOT_INO, b"lost+found").mode) == 0o700
    fs.unmount()
    # And once more, into the one that is there.
    damage.rename(ROOT_INO, b"xattr", None)
    _, tree = repair_and_check(damage.region, Code.UNREACHABLE)
    assert set(tree[b"lost+found"]) == {*lost, b"#%d" % damage.inos["xattr"]}  # type: ignore[call-overload]


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


def fragmented(file: MemoryFile) -> tuple[Populated, dict[int, bytes]]:
    """A file with so many extents that its tree has an inner node, and bytes in each."""
    with file.open() as region:
        populated = populate(region, names=5, attributes=1)
        fs = mount_filesystem(region)
        ino = fs.create(ROOT_INO, b"fragmented", REG, 0, 0).ino
        marks = {}
        for i in range(400):
            marks[2 * i * BLOCK] = b"mark %d" % i
            fs.write(ino, 2 * i * BLOCK, marks[2 * i * BLOCK])
        fs.unmount()
        populated.inos["fragmented"] = ino
    return populated, marks


def marks_left(region: Region, ino: int, marks: dict[int, bytes]) -> int:
    fs = mount_filesystem(region)
    left = sum(bytes(fs.read(ino, at, len(mark))) == mark for at, mark in marks.items())
    fs.unmount()
    return left


@pytest.mark.parametrize("what", ["inner node", "inode page", "both", "leaf"])
def test_guest_memory_survives_a_lost_node(what: str) -> None:
    with MemoryFile(1 << 30) as file:
        populated, marks = fragmented(file)
        ino = populated.inos["fragmented"]
        with file.open() as region:
            damage = Damage(Populated(region, populated.inos))
            root = damage.inode(ino).body
            if what == "leaf":
                damage.smash(damage.children(root)[1])
            if what in ("inner node", "both"):
                damage.smash(root)
            if what in ("inode page", "both"):
                damage.smash(damage.inode_page(ino))
            check(region, repair=False)
            report = check(region, repair=True)
            assert report.counts[Code.TREE_LEAF_FOUND] or what == "leaf"
            assert check(region, repair=False).clean
            fs = mount_filesystem(region)
            assert fs.lookup(ROOT_INO, b"fragmented").ino == ino
            fs.unmount()
            left = marks_left(region, ino, marks)
            if what == "leaf":
                assert len(marks) // 2 <= left < len(marks)
            else:
                assert left == len(marks)


# ------------------------------------------------------------------------------ full regions


def fill_up(d: Damage) -> None:
    """Use up every block and page that a mount gives away."""
    fs = mount_filesystem(d.region)
    ino = fs.create(ROOT_INO, b"filler", REG, 0, 0).ino
    for step in (BLOCK, PAGE):
        at = 0
        with contextlib.suppress(NoSpaceError):
            while True:
                fs.run(partial(fs.fallocate, ino, 0, at, step))
                at += step
    fs.unmount()


@pytest.mark.parametrize(
    "function", [dangling_name, wrong_key, inner_node_of_names, leaves_exchanged, wrong_heap]
)
def test_repairs_in_a_full_region(damage: Damage, function: Case) -> None:
    fill_up(damage)
    function(damage)
    check(damage.region, repair=True)
    assert check(damage.region, repair=False).clean


def test_double_claim_without_room_becomes_a_hole(damage: Damage) -> None:
    fill_up(damage)
    extents = damage.extents(damage.inos["guest"])
    damage.set_extents(damage.inos["guest"], [*extents, (1 << 20, extents[0][1], 512)])
    damage.set_inode(damage.inos["guest"], size=1 << 33)
    report = check(damage.region, repair=True)
    assert report.counts[Code.DOUBLE_CLAIM] == 1
    assert any("no space" in problem.remedy for problem in report.problems)
    assert check(damage.region, repair=False).clean


def test_no_room_changes_nothing(damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: Allocator) -> int:
        raise NoRoomError

    nameless(damage)
    monkeypatch.setattr(Allocator, "page", none)
    before = damage.region.read(0, REGION_BYTES)
    report = check(damage.region, repair=True)
    assert report.counts[Code.NO_ROOM]
    assert report.left == len(report.problems)
    assert damage.region.read(0, REGION_BYTES) == before


# ------------------------------------------------------------------------------ interrupted repairs


def several(d: Damage) -> None:
    """Damage that needs new pages, copies, and changes all over the region."""
    inner_node_of_names(d)
    two_files_with_the_same_pages(d)
    fields = d.inode(d.inos["small"])
    d.set_inode(d.inos["other"], size=fields.size, data_pages=fields.data_pages)
    lost_block(d)
    lost_page(d)
    d.rename(ROOT_INO, b"dir", None)
    one_file_with_a_block_twice(d)
    for block in range(2, d.region.size // BLOCK):
        if not d.block_bits(block)[0] and d.region.is_zero(block * BLOCK, BLOCK):
            d.set_map(block, zero=1)


def files_in(tree: dict[bytes, object]) -> list[tuple[bytes, object]]:
    """Name and contents of all that is no directory, wherever it is."""
    found: list[tuple[bytes, object]] = []
    for name, what in tree.items():
        found += files_in(what) if isinstance(what, dict) else [(name, what)]
    return sorted(found, key=repr)


def use(region: Region) -> None:
    """Mount what a stopped repair left, if that works, and take up space in it."""
    try:
        fs = mount_filesystem(region)
        fs.write(fs.create(ROOT_INO, b"in between", REG, 0, 0).ino, 0, b"in between" * 50000)
        fs.write(fs.create(ROOT_INO, b"large", REG, 0, 0).ino, 0, b"large" * BLOCK)
        fs.unmount()
    except PkernfsError:
        pass


@pytest.mark.parametrize("mount", [False, True])
@pytest.mark.parametrize("batch", [400, 2])
def test_a_repair_may_be_stopped_at_any_store(
    damage: Damage, monkeypatch: pytest.MonkeyPatch, batch: int, mount: bool
) -> None:
    """Stopped and started over, it comes to the same end: every file is there.

    In between two transactions lost+found may have lost its name, and comes back in a new one.
    """
    monkeypatch.setattr("pkernfs.fs.fsck.image._BATCH", batch)
    several(damage)
    region = damage.region
    before = region.read(0, REGION_BYTES)
    trace_start()
    check(region, repair=True)
    stores = trace_stop()
    assert len(stores) > 40
    fs = mount_filesystem(region)
    expected = files_in(read_all(fs))
    fs.unmount()
    for cut in sorted({*range(0, len(stores), max(1, len(stores) // 30)), len(stores) - 1}):
        region.copy_in(0, before)
        for offset, length, data in stores[:cut]:
            region.copy_in(offset, data if data is not None else bytes(length))
        if mount:
            use(region)
        report = check(region, repair=True, verify_zero=True)
        assert not report.left
        assert not report.counts[Code.ZERO_NOT_ZERO], cut
        again = check(region, repair=False)
        assert again.clean, (cut, [str(p) for p in again.problems])
        fs = mount_filesystem(region)
        found = [f for f in files_in(read_all(fs)) if f[0] not in (b"in between", b"large")]
        assert found == expected, cut
        fs.unmount()


# ------------------------------------------------------------------------------ refusals


def assert_refused(region: Region, words: str) -> None:
    before = region.read(0, region.size)
    for repair in (False, True):
        with pytest.raises(FormatError, match=words):
            check(region, repair=repair)
    assert region.read(0, region.size) == before


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (72, 2, "unsupported version"),
        (96, 1 << 7, "unknown feature_ro_compat"),
        (104, 1, "unknown feature_incompat"),
    ],
)
def test_what_it_does_not_know_is_not_touched(
    damage: Damage, offset: int, value: int, words: str
) -> None:
    for number in (0, BACKUP_PAGE):
        with damage.edit(number) as page:
            page[offset] = value
    assert_refused(damage.region, words)


def test_both_superblocks_damaged(damage: Damage) -> None:
    damage.smash(0, 64, 100)
    damage.smash(BACKUP_PAGE, 64, 100)
    assert_refused(damage.region, "both superblocks are damaged")


@pytest.mark.parametrize("size", [PAGE, 1 << 20, 8 << 20, 16 << 20])
def test_no_file_system(size: int) -> None:
    with Region.anonymous(size) as region:
        assert_refused(region, "not a pkernfs|too small")


def test_truncated_region(pristine: Pristine) -> None:
    with Region.anonymous(REGION_BYTES - BLOCK) as region:
        region.copy_in(0, pristine[0][: REGION_BYTES - BLOCK])
        assert_refused(region, "truncated")


def test_repair_of_a_read_only_region() -> None:
    with MemoryFile(REGION_BYTES) as file:
        with file.open() as region:
            populate(region, names=2, attributes=1)
        with file.open(write=False) as region:
            assert check(region, repair=False).clean
            with pytest.raises(ReadOnlyError):
                check(region, repair=True)


# ------------------------------------------------------------------------------ the report


def test_report_as_json(damage: Damage) -> None:
    wrong_links(damage)
    not_unmounted(damage)
    found = json.loads(check(damage.region, repair=False).to_json())
    assert found["clean"] is False
    assert found["left"] == 1
    (problem,) = found["problems"]
    assert problem["code"] == "INODE_LINKS"
    assert problem["message"].endswith(": bad nlink: got 7, expected 2")
    assert problem["message"].startswith(problem["where"])
    assert problem["fixed"] is False
    assert [note["code"] for note in found["notes"]] == ["NOT_UNMOUNTED"]
    assert found["summary"]["inodes"] > 150
    assert check(damage.region, repair=True).left == 0


def test_many_problems_are_counted_not_listed(
    damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkernfs.fs.fsck.problems.MAX_PER_CODE", 3)
    for i in range(8):
        damage.set_inode(damage.inos[f"many/a-name-that-takes-some-room-{i:04}"], nlink=9)
    report = check(damage.region, repair=True)
    assert len(report.problems) == 3
    assert report.suppressed == 5
    assert check(damage.region, repair=False).clean


def test_progress_only_grows(damage: Damage) -> None:
    seen: list[float] = []
    check(damage.region, repair=True, progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen)
    assert 0 <= seen[0] <= seen[-1] <= 1


def test_a_check_touches_no_hole_of_the_region() -> None:
    with MemoryFile(1 << 40) as file:
        with file.open() as region:
            populate(region, names=5, attributes=1)
        before = os.stat(file.path).st_blocks
        with file.open() as region:
            assert check(region, repair=True).clean
        assert os.stat(file.path).st_blocks == before


def test_zero_marks_are_verified_where_there_is_data() -> None:
    with MemoryFile(1 << 34) as file:
        with file.open() as region:
            populate(region, names=2, attributes=1)
            region.copy_in((1 << 33) + 12345, b"stale")
        with file.open() as region:
            assert check(region, repair=False, verify_zero=False).clean
            assert check(region, repair=True).counts == {Code.ZERO_NOT_ZERO: 1}
            assert check(region, repair=False).clean


# ------------------------------------------------------------------------------ random damage


def outcome(region: Region) -> None:
    """Whatever the region holds: a refusal, or a repaired file system that mounts."""
    try:
        found = check(region, repair=False)
    except PkernfsError:
        return
    report = check(region, repair=True)
    assert report.counts == found.counts
    if report.counts[Code.NO_ROOM]:
        return
    again = check(region, repair=False)
    assert not again.problems, [str(p) for p in again.problems]
    assert not again.notes, [str(p) for p in again.notes]
    fs = mount_filesystem(region)
    read_all(fs)
    fs.unmount()
    assert check(region, repair=False).clean


def metadata(image: bytes) -> list[int]:
    """Numbers of the pages that look like metadata."""
    return [n for n in range(len(image) // PAGE) if image[n * PAGE : n * PAGE + 2] == b"PK"]


# Which metadata page (modulo their number), offset, how much or which word.
HITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, PAGE - 1), st.integers(0, 300)),
    min_size=1,
    max_size=6,
)


def use_damaged(region: Region) -> None:
    """Mount a damaged region, read all of it, change it: nothing but a PkernfsError comes of it."""
    with contextlib.suppress(PkernfsError):
        fs = mount_filesystem(region)
        with contextlib.suppress(PkernfsError):
            read_all(fs)
        for name in [entry[0] for entry in fs.readdir(1, 0)]:
            with contextlib.suppress(PkernfsError):
                fs.unlink(1, name)
        with contextlib.suppress(PkernfsError):
            ino = fs.create(1, b"after", stat.S_IFREG | 0o644, 0, 0).ino
            fs.write(ino, 0, b"x" * 20000)
            fs.setxattr(ino, b"user.after", b"y" * 3000)
        fs.unmount()


@given(hits=HITS, mount=st.booleans())
def test_random_damage(pristine: Pristine, hits: list[tuple[int, int, int]], mount: bool) -> None:
    """Flipped bits and overwritten ranges: mount and fsck end well, or with a clear error."""
    pages = metadata(pristine[0])
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(0, pristine[0])
        damage = Damage(Populated(region, pristine[1]))
        for choice, offset, length in hits:
            page = pages[choice % len(pages)]
            if length:
                damage.smash(page, offset, min(length, PAGE - offset))
            else:
                damage.flip(page, 8 * offset + choice % 8)
        if mount:
            use_damaged(region)
        outcome(region)


@given(hits=HITS, mount=st.booleans())
def test_random_damage_with_good_checksums(
    pristine: Pristine, hits: list[tuple[int, int, int]], mount: bool
) -> None:
    """Somebody who can compute a checksum gets no further."""
    pages = metadata(pristine[0])
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(0, pristine[0])
        damage = Damage(Populated(region, pristine[1]))
        for choice, at, how in hits:
            page = pages[choice % len(pages)]
            offset = at // 8 * 8
            with damage.edit(page) as buffer:
                if how < 150:
                    word = [0, 1, page, 1 << 63, (1 << 64) - 1, at][how % 6]
                    buffer[offset : offset + 8] = word.to_bytes(8, "little")
                else:
                    other = damage.page(pages[how % len(pages)])
                    end = min(offset + 64, PAGE)
                    buffer[offset:end] = other[offset:end]
        if mount:
            use_damaged(region)
        outcome(region)


@given(seed=st.integers(0, 1 << 32), keep=st.booleans())
def test_random_bytes(pristine: Pristine, seed: int, keep: bool) -> None:
    """A region of noise, with or without a superblock in front."""
    noise = random.Random(seed)
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(0, noise.randbytes(4 << 20))
        if keep:
            region.copy_in(0, pristine[0][:PAGE])
            if noise.random() < 0.5:
                region.copy_in(PAGE, pristine[0][PAGE : 2 * PAGE])
        outcome(region)
