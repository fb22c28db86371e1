"""Pass 8: what is marked as in use, carved or zero, and is not; and the other way round."""

from __future__ import annotations

import os

from pkernfs import layout
from pkernfs.fs.fsck import Code, check
from pkernfs.layout import BLOCK, ROOT_INO, block_of, first_page
from pkernfs.quantities import RegionOff
from support.checking import MemoryFile
from support.damage import Damage, populate
from support.fsck_cases import Case, Cases
from support.repairs import Pristine, repair_and_check, tree_of

case = Cases()


@case(Code.BLOCK_LOST)
def lost_block(d: Damage) -> None:
    d.set_map(d.free_block(), used=1, zero=0)


@case(Code.BLOCK_UNMARKED, lossless=True)
def unmarked_block(d: Damage) -> None:
    d.set_map(block_of(d.extents(d.inos["guest"])[0].page), used=0)


@case(Code.BLOCK_CARVED)
def carved_bit_missing(d: Damage) -> None:
    d.set_map(block_of(d.inode_page(ROOT_INO)), carved=0)


@case(Code.BLOCK_CARVED)
def carved_bit_on_data(d: Damage) -> None:
    d.set_map(block_of(d.extents(d.inos["guest"])[0].page), carved=1)


@case(Code.BLOCK_CARVED)
def carved_bit_on_free_block(d: Damage) -> None:
    d.set_map(d.free_block(), carved=1)


@case(Code.BLOCK_CARVED, lossless=True)
def carved_bit_missing_on_pages(d: Damage) -> None:
    d.set_map(block_of(d.extents(d.inos["small"])[0].page), carved=0)


@case(Code.ZERO_IN_USE)
def zero_bit_on_data(d: Damage) -> None:
    d.set_map(block_of(d.extents(d.inos["guest"])[0].page), zero=1)


@case(Code.ZERO_NOT_ZERO)
def zero_bit_on_dirty_block(d: Damage) -> None:
    block = d.free_block()
    d.set_map(block, zero=1)
    d.region.copy_in(RegionOff(block * BLOCK + BLOCK - 1), b"\1")


@case(Code.PAGE_MAP_DAMAGED, lossless=True)
def page_map(d: Damage) -> None:
    d.smash(first_page(block_of(d.inode_page(ROOT_INO))))


@case(Code.PAGE_MAP_DAMAGED, lossless=True)
def page_map_of_data(d: Damage) -> None:
    d.smash(first_page(block_of(d.extents(d.inos["small"])[0].page)), 60, 9)


@case(Code.PAGE_MAP_CLASS)
def page_map_class(d: Damage) -> None:
    with d.edit(first_page(block_of(d.inode_page(ROOT_INO)))) as page:
        page[layout.PAGE_MAP_CLASS_OFFSET] = 9


@case(Code.PAGE_LOST)
def lost_page(d: Damage) -> None:
    d.set_page_used(d.free_page(), 1)


@case(Code.PAGE_UNMARKED, lossless=True)
def unmarked_page(d: Damage) -> None:
    d.set_page_used(d.inode_page(ROOT_INO), 0)


@case(Code.PAGE_UNMARKED)
def unmarked_page_map(d: Damage) -> None:
    d.set_page_used(first_page(block_of(d.inode_page(ROOT_INO))), 0)


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)


@case.each_lossless
def test_nothing_is_lost(damage: Damage, pristine: Pristine, function: Case) -> None:
    function(damage)
    _, tree = repair_and_check(damage.region)
    assert tree == tree_of(pristine)


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
            region.copy_in(RegionOff((1 << 33) + 12345), b"stale")
        with file.open() as region:
            assert check(region, repair=False, verify_zero=False).clean
            assert check(region, repair=True).counts == {Code.ZERO_NOT_ZERO: 1}
            assert check(region, repair=False).clean
