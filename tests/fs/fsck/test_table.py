"""Pass 2: the inode table, inode pages, and inodes by themselves."""

from __future__ import annotations

import stat

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.fsck import Code
from pkernfs.layout import BLOCK, INODE_FLAG_PENDING, IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Ino
from support.checking import assert_clean
from support.damage import REG, Damage
from support.fsck_cases import Case, Cases
from support.repairs import Pristine, repair_and_check, tree_of

case = Cases()


@case(Code.TABLE_ENTRY, Code.INODE_PAGE_FOUND, lossless=True)
def table_entry_out_of_region(d: Damage) -> None:
    root = d.state().inode_root
    extents = d.leaf_extents(root)
    d.set_leaf_extents(root, [*extents[:-1], (extents[-1][0], 1 << 60, extents[-1][2])])


@case(Code.TABLE_ENTRY, Code.TABLE_GAP)
def table_entry_of_other_page(d: Damage) -> None:
    """An inode page that is none, and the page that should be there is gone for good."""
    d.smash(d.inode_page(Ino(16)))
    root = d.state().inode_root
    extents = []
    for index, page, count in d.leaf_extents(root):
        for i in range(count):
            extents.append((index + i, page + i if index + i != 1 else root, 1))
    d.set_leaf_extents(root, extents)


@case(Code.INODE_PAGE_DAMAGED)
def inode_page(d: Damage) -> None:
    d.smash(d.inode_page(d.inos["many"]), 2048, 60)


@case(Code.INODE_PAGE_DAMAGED, Code.INODE_RECOVERED, Code.TREE_LEAF_FOUND)
def first_inode_page(d: Damage) -> None:
    d.smash(d.inode_page(ROOT_INO))


@case(Code.INODE_PAGE_MASKS)
def pending_mask(d: Damage) -> None:
    d.set_inode_page(d.inos["small"], 3, 1 << (d.inos["small"] & 15))


@case(Code.INODE_PAGE_MASKS)
def used_mask(d: Damage) -> None:
    with d.edit(d.inode_page(ROOT_INO)) as page:
        page[56] |= 1


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


@case(Code.SYMLINK_TARGET)
def lost_target(d: Damage) -> None:
    d.smash(d.inode(d.inos["long-link"]).body)


@case(Code.SYMLINK_TARGET)
def target_in_a_circle(d: Damage) -> None:
    body = d.inode(d.inos["long-link"]).body
    with d.edit(body) as page:
        page[40:48] = body.to_bytes(8, "little")


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)


@case.each_lossless
def test_nothing_is_lost(damage: Damage, pristine: Pristine, function: Case) -> None:
    function(damage)
    _, tree = repair_and_check(damage.region)
    assert tree == tree_of(pristine)


@pytest.mark.parametrize("name", ["small", "guest", "pages", "none"])
@pytest.mark.parametrize("size", [1 << 50, (1 << 63) - (4 << 20)])
def test_a_size_from_a_damaged_page_is_no_more_than_there_is(
    damage: Damage, name: str, size: int
) -> None:
    """The checksum of the page is wrong, and so may the size be, in whole or in part."""
    ino = damage.inos["small" if name == "none" else name]
    if name == "none":
        damage.set_inode(ino, flags=0, data_pages=0)
    fs = mount_filesystem(damage.region, read_only=True)
    extents = fs.extents(ino)
    was = fs.inode(ino).size if extents else 0
    damage.set_inode(ino, size=size)
    damage.smash(damage.inode_page(ino), 200, 8)  # of the page's header: every inode is whole
    repair_and_check(damage.region, Code.INODE_PAGE_DAMAGED, Code.INODE_FIELD)
    fs = mount_filesystem(damage.region)
    assert was <= fs.inode(ino).size < was + BLOCK
    assert fs.inode(ino).size % PAGE == 0
    fs.unmount()


def test_a_hole_at_the_end_of_an_intact_inode_stays(damage: Damage) -> None:
    damage.set_inode(damage.inos["small"], size=1 << 40)
    assert_clean(damage.region)


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
    kept = fs.inode(Ino(many + 1 if many & 15 < 15 else many - 1))
    assert (kept.mode, kept.uid) == (stat.S_IFREG | 0o600, 0)
    fs.unmount()
