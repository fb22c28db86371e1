"""Structures by themselves: which bytes are refused, and with which words."""

from __future__ import annotations

import stat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs import layout
from pkernfs.alloc.bitmap import expand
from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.structures import (
    MAX_FILE_PAGES,
    ItemSlot,
    Node,
    check_header,
    check_inode,
    check_items,
    device_number_fits,
    flag_faults,
    has_segment,
    has_tree,
    inline_extents,
    link_count,
    name_fault,
    pack_bits,
    parse_attribute,
    parse_inode,
    parse_node,
    parse_overflow,
)
from pkernfs.layout import HEADER, INODE_FLAG_BODY, PAGE, TREE_EXTENTS, TREE_NAMES
from pkernfs.quantities import Ino, PageNo
from pkernfs.region.checksum import page_checksum

UUID = bytes(range(16))
OWNER, NUMBER = Ino(17), PageNo(5)
INODE = layout.InodeFields._make((OWNER, 1, stat.S_IFREG | 0o644, *[0] * 17))


def page_of(magic: int, number: PageNo = NUMBER, owner: Ino = OWNER) -> bytearray:
    """A page with a header that is in order."""
    page = bytearray(PAGE)
    HEADER.pack_into(page, 0, magic, 0, number, owner, UUID)
    page[4:8] = page_checksum(page).to_bytes(4, "little")
    return page


def reason_of(page: bytearray, number: PageNo = NUMBER, uuid: bytes = UUID) -> str:
    with pytest.raises(CorruptionError) as caught:
        check_header(page, number, layout.MAGIC_TREE, uuid)
    return str(caught.value)


def test_a_header_says_whose_it_is() -> None:
    page = page_of(layout.MAGIC_TREE)
    assert check_header(page, NUMBER, layout.MAGIC_TREE, UUID) == 17
    assert check_header(page, NUMBER, layout.MAGIC_TREE, None) == 17


def test_a_header_that_is_wrong() -> None:
    page = page_of(layout.MAGIC_TREE)
    assert reason_of(page, number=PageNo(6)) == "not its own page: got 0x5, expected 0x6"
    assert reason_of(page, uuid=bytes(16)) == (
        "of another file system: got uuid 00010203-0405-0607-0809-0a0b0c0d0e0f"
    )
    page[100] ^= 1
    assert reason_of(page).startswith("bad checksum: got 0x")
    assert check_header(page, NUMBER, layout.MAGIC_TREE, UUID, sealed=False) == 17
    other = page_of(layout.MAGIC_INODES)
    assert reason_of(other) == "bad magic: got inode page, expected tree node"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ino": 18}, "bad ino: got 18, expected 17"),
        ({"mode": 0o644}, "bad type in mode: got 0o644"),
        ({"size": 1 << 63}, "bad size: got 0x8000000000000000"),
        ({"mode": stat.S_IFLNK}, "bad size of a symlink: got 0, expected 1..4095"),
        (
            {"mode": stat.S_IFLNK, "size": 129},
            "bad size of an inline symlink: got 129, expected 1..128",
        ),
    ],
)
def test_an_inode_that_cannot_be_told(change: dict[str, Any], reason: str) -> None:
    check_inode(INODE, OWNER)
    with pytest.raises(CorruptionError) as caught:
        check_inode(INODE._replace(**change), OWNER)
    assert str(caught.value) == reason


def test_flags_that_a_type_must_not_have() -> None:
    pipe = INODE._replace(mode=stat.S_IFIFO, flags=INODE_FLAG_BODY)
    assert flag_faults(pipe) == INODE_FLAG_BODY
    inline = 3 << layout.INODE_INLINE_SHIFT
    assert flag_faults(INODE._replace(flags=inline | layout.INODE_FLAG_TABLE)) == 0
    assert flag_faults(INODE._replace(flags=inline | INODE_FLAG_BODY)) == inline


def test_a_file_with_a_segment_has_nothing_in_the_region() -> None:
    flag = layout.INODE_FLAG_SEGMENT
    assert has_segment(INODE._replace(flags=flag))
    assert not has_segment(INODE)
    assert flag_faults(INODE._replace(flags=flag | layout.INODE_FLAG_PENDING)) == 0
    for other in (INODE_FLAG_BODY, layout.INODE_FLAG_TABLE, 1 << layout.INODE_INLINE_SHIFT):
        assert flag_faults(INODE._replace(flags=flag | other)) == flag
    assert flag_faults(INODE._replace(mode=stat.S_IFDIR, flags=flag)) == flag


def test_device_numbers() -> None:
    device = INODE._replace(mode=stat.S_IFBLK, rdev_major=(1 << 12) - 1, rdev_minor=(1 << 20) - 1)
    assert device_number_fits(device)
    assert not device_number_fits(device._replace(rdev_minor=1 << 20))
    assert not device_number_fits(INODE._replace(rdev_major=1))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=20, max_size=20), st.integers(1, 15))
def test_a_part_of_an_inode_is_what_the_whole_has(numbers: list[int], slot: int) -> None:
    page = bytearray(PAGE)
    layout.INODE.pack_into(page, slot * layout.INODE_BYTES, *(n >> 1 for n in numbers))
    inode = parse_inode(page, slot)
    assert link_count(page, slot) == inode.nlink
    assert has_tree(page, slot) == bool(inode.xattr_root or inode.flags & INODE_FLAG_BODY)


def test_who_has_a_tree() -> None:
    for inode, expected in (
        (INODE, False),
        (INODE._replace(xattr_root=PageNo(7)), True),
        (INODE._replace(flags=INODE_FLAG_BODY, body=PageNo(7)), True),
        (INODE._replace(flags=layout.INODE_FLAG_PENDING, nlink=1), False),
    ):
        page = bytearray(PAGE)
        layout.INODE.pack_into(page, layout.INODE_BYTES, *inode)
        assert has_tree(page, 1) is expected


def test_more_inline_extents_than_fit() -> None:
    most = layout.MAX_INLINE_EXTENTS
    page = bytes(PAGE)
    assert inline_extents(page, 3, most << layout.INODE_INLINE_SHIFT) == [(0, 0, 0)] * most
    with pytest.raises(CorruptionError, match=r"got 6, expected 0\.\.5"):
        inline_extents(page, 3, (most + 1) << layout.INODE_INLINE_SHIFT)
    assert MAX_FILE_PAGES * PAGE == layout.MAX_FILE_BYTES + 1


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ((2, 0, 1, PAGE, 0), "bad kind of tree: got 2, expected 1"),
        ((1, 16, 1, PAGE, 0), r"bad level: got 16, expected 0\.\.15"),
        ((1, 0, 0, PAGE, 0), r"bad count: got 0, expected 1\.\.168"),
        ((1, 1, 253, PAGE, 0), r"bad count: got 253, expected 1\.\.252"),
    ],
)
def test_a_node_that_is_wrong(header: tuple[int, ...], reason: str) -> None:
    page = page_of(layout.MAGIC_TREE)
    layout.TREE.pack_into(page, layout.TREE_OFFSET, *header)
    with pytest.raises(CorruptionError, match=reason):
        parse_node(page, OWNER, TREE_EXTENTS)


def test_a_node_of_somebody_else() -> None:
    page = page_of(layout.MAGIC_TREE)
    layout.TREE.pack_into(page, layout.TREE_OFFSET, TREE_NAMES, 0, 3, 4000, 6)
    assert parse_node(page, OWNER, TREE_NAMES) == Node(OWNER, TREE_NAMES, 0, 3, 4000, 6)
    with pytest.raises(CorruptionError, match="bad owner: got 17, expected 18"):
        parse_node(page, Ino(18), TREE_NAMES)


def test_items_that_overlap_or_lie_outside() -> None:
    node = Node(OWNER, TREE_NAMES, 0, 2, 4066, 0)
    good, reason = check_items([ItemSlot(1, 4086, 10, 0), ItemSlot(2, 4066, 20, 0)], node)
    assert (good, reason) == ([True, True], "")
    good, reason = check_items([ItemSlot(1, 4086, 11, 0), ItemSlot(2, 4066, 20, 0)], node)
    assert (good, reason[:21]) == ([False, True], "item outside the heap")
    good, reason = check_items([ItemSlot(1, 4080, 16, 0), ItemSlot(2, 4066, 20, 0)], node)
    assert (good, reason[:13]) == ([False, True], "items overlap")
    _, reason = check_items([ItemSlot(1, 4086, 10, 0), ItemSlot(2, 4067, 19, 0)], node)
    assert reason.startswith("bad garbage")


@pytest.mark.parametrize("name", [b"", b"n" * 256, b"a/b", b"a\0b", b".", b".."])
def test_names_that_cannot_be(name: bytes) -> None:
    assert name_fault(name)
    assert not name_fault(b"...")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (b"\0", "item too short"),
        (layout.XATTR_ITEM.pack(6, 2, 0, 0) + b"user.a", "bad place of the value"),
        (layout.XATTR_ITEM.pack(6, 0, 0, 65537) + b"user.a", "value too long"),
        (layout.XATTR_ITEM.pack(6, 0, 0, 1) + b"user.a", "bad length of the item"),
        (layout.XATTR_ITEM.pack(5, 0, 0, 0) + b"user.", "bad name"),
        (layout.XATTR_ITEM.pack(6, 0, 0, 0) + b"name.a", "bad name"),
        (layout.XATTR_ITEM.pack(6, 1, 0, 1) + b"user.a" + bytes(8), "value without a page"),
    ],
)
def test_attributes_that_cannot_be(item: bytes, reason: str) -> None:
    with pytest.raises(CorruptionError, match=reason):
        parse_attribute(item)


@pytest.mark.parametrize("length", [0, layout.OVERFLOW_DATA_BYTES + 1])
def test_lengths_of_an_overflow_page(length: int) -> None:
    page = page_of(layout.MAGIC_OVERFLOW)
    layout.OVERFLOW.pack_into(page, layout.OVERFLOW_OFFSET, 9, layout.OVERFLOW_DATA_BYTES)
    assert parse_overflow(page, OWNER) == (9, layout.OVERFLOW_DATA_BYTES)
    layout.OVERFLOW.pack_into(page, layout.OVERFLOW_OFFSET, 9, length)
    with pytest.raises(CorruptionError, match="bad length"):
        parse_overflow(page, OWNER)


@given(st.lists(st.integers(0, 1), max_size=200))
def test_bits_are_packed_as_the_allocator_expands_them(bits: list[int]) -> None:
    packed = pack_bits(bytes(bits))
    assert len(packed) == -(-len(bits) // 8)
    assert list(expand(packed, len(bits))) == bits
