"""Nodes of trees: damaged, in the wrong place, out of order."""

from __future__ import annotations

import pytest

from pkernfs.fs.fsck import Code, check
from pkernfs.layout import TREE_OFFSET, TREE_SLOTS_OFFSET
from support.damage import Damage
from support.fsck_cases import Case, Cases
from support.repairs import Pristine, fill_up, repair_and_check, tree_of

case = Cases()


@case(Code.TREE_NODE, Code.TREE_LEAF_FOUND, lossless=True)
def inner_node_of_names(d: Damage) -> None:
    d.smash(d.inode(d.inos["many"]).body)


@case(Code.TREE_NODE)
def leaf_of_names(d: Damage) -> None:
    d.smash(d.names(d.inos["many"]), 200, 300)


@case(Code.TREE_NODE, Code.TREE_LEAF_FOUND, lossless=True)
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


@case(Code.TREE_NODE, lossless=True)
def node_of_table(d: Damage) -> None:
    d.smash(d.state().inode_root)


@case(Code.TREE_SHAPE, lossless=True)
def leaves_exchanged(d: Damage) -> None:
    root = d.inode(d.inos["many"]).body
    with d.edit(root) as page:
        at = TREE_SLOTS_OFFSET
        page[at + 8 : at + 16], page[at + 24 : at + 32] = (
            page[at + 24 : at + 32],
            page[at + 8 : at + 16],
        )


@case(Code.TREE_SHAPE, lossless=True)
def inner_keys_out_of_order(d: Damage) -> None:
    with d.edit(d.inode(d.inos["many"]).body) as page:
        at = TREE_SLOTS_OFFSET
        page[at : at + 8], page[at + 16 : at + 24] = page[at + 16 : at + 24], page[at : at + 8]


@case(Code.TREE_SHAPE, lossless=True)
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


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)


@case.each_lossless
def test_nothing_is_lost(damage: Damage, pristine: Pristine, function: Case) -> None:
    function(damage)
    _, tree = repair_and_check(damage.region)
    assert tree == tree_of(pristine)


@pytest.mark.parametrize("function", [inner_node_of_names, leaves_exchanged, wrong_heap])
def test_repairs_in_a_full_region(damage: Damage, function: Case) -> None:
    fill_up(damage)
    function(damage)
    check(damage.region, repair=True)
    assert check(damage.region, repair=False).clean
