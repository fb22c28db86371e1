"""Pass 3: names and extended attributes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pkernfs.fs.fsck import Code, check
from pkernfs.layout import ROOT_INO, XATTR_ITEM
from pkernfs.quantities import Ino, PageNo
from support.damage import BIG_VALUE, Damage, name_item
from support.fsck_cases import Case, Cases
from support.repairs import Pristine, fill_up, repair_and_check, tree_of

case = Cases()


@case(Code.NAME_BAD)
def bad_names(d: Damage) -> None:
    d.rename(ROOT_INO, b"small", name_item(d.inos["small"], 8, b"a/b"))


@case(Code.NAME_BAD)
def empty_name(d: Damage) -> None:
    d.rename(ROOT_INO, b"small", name_item(d.inos["small"], 8, b""))


@case(Code.NAME_BAD)
def dotdot(d: Damage) -> None:
    d.rename(ROOT_INO, b"small", name_item(d.inos["small"], 8, b".."))


@case(Code.NAME_KEY, lossless=True)
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
    d.rename(ROOT_INO, b"fifo", name_item(Ino(1 << 40 | 5), 1, b"fifo"))


@case(Code.NAME_TYPE, lossless=True)
def wrong_type(d: Damage) -> None:
    d.rename(ROOT_INO, b"small", name_item(d.inos["small"], 4, b"small"))


@case(Code.NAME_SECOND)
def second_name_of_directory(d: Damage) -> None:
    d.rename(ROOT_INO, b"fifo", name_item(d.inos["dir/sub"], 4, b"fifo"))


@case(Code.NAME_SECOND)
def name_of_root(d: Damage) -> None:
    d.rename(ROOT_INO, b"fifo", name_item(ROOT_INO, 4, b"fifo"))


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


def overflow_of(d: Damage) -> PageNo:
    leaf = d.leaf_of(d.inode(d.inos["other"]).xattr_root)
    item = next(item for _, item in d.items(leaf) if b"user.two" in item)
    assert XATTR_ITEM.unpack_from(item)[3] == len(BIG_VALUE)
    return PageNo(int.from_bytes(item[-8:], "little"))


@case(Code.XATTR_VALUE)
def lost_value(d: Damage) -> None:
    d.smash(overflow_of(d))


@case(Code.XATTR_VALUE)
def value_cut_short(d: Damage) -> None:
    with d.edit(overflow_of(d)) as page:
        page[40:48] = bytes(8)


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)


@case.each_lossless
def test_nothing_is_lost(damage: Damage, pristine: Pristine, function: Case) -> None:
    function(damage)
    _, tree = repair_and_check(damage.region)
    assert tree == tree_of(pristine)


@pytest.mark.parametrize("function", [dangling_name, wrong_key])
def test_repairs_in_a_full_region(damage: Damage, function: Case) -> None:
    fill_up(damage)
    function(damage)
    check(damage.region, repair=True)
    assert check(damage.region, repair=False).clean
