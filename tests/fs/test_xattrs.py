"""Attributes against a dict, chains of overflow pages, and what cannot be set or read."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    ArgumentTooLongError,
    CorruptionError,
    ExistsError,
    InvalidError,
    NameTooLongError,
    NoDataError,
    NoSpaceError,
    NotSupportedError,
    PkernfsError,
    RangeTooSmallError,
)
from pkernfs.fs import xattrs as xattrs_module
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.inodes import Inode
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.xattrs import Overflow, Xattrs, check_target
from pkernfs.layout import (
    BLOCK,
    ITEM_SLOT,
    MAGIC_OVERFLOW,
    MAGIC_TREE,
    OVERFLOW,
    OVERFLOW_OFFSET,
    PAGE,
    TREE_SLOTS_OFFSET,
    page_offset,
)
from pkernfs.quantities import Ino, PageNo
from support.checking import MemoryFile
from support.collisions import collide
from support.files import ROOT, make, noise, remount, resize, until_full
from support.space import Space, space

SIZE = 16 << 20
HASH_KEY = b"key of the hash."
OWNER = Ino(77)
#: Bytes of a value in one overflow page, by docs/format.md, section 8.
IN_A_PAGE = 4032


class Attributes:
    """An inode that is in no inode table, and the dict that its attributes should be."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.inode = Inode()
        self.inode.ino = OWNER
        self.overflow = Overflow(space.store, space.pages)
        self.xattrs = Xattrs(space.store, space.pages, HASH_KEY, self.overflow)
        self.model: dict[bytes, bytes] = {}
        self.free = space.free_bytes()

    def set(self, name: bytes, value: bytes, flags: int = 0) -> None:
        self.xattrs.set(self.inode, name, value, flags)
        self.model[name] = value

    def set_now(self, name: bytes, value: bytes, flags: int = 0) -> None:
        self.space.change(self.inode, partial(self.set, name, value, flags))

    def remove(self, name: bytes) -> None:
        self.xattrs.remove(self.inode, name)
        del self.model[name]

    def write(self, value: bytes) -> PageNo:
        """A value in overflow pages; the first one."""
        found: list[int] = []
        self.space.change(
            self.inode, lambda: found.append(self.overflow.write(self.inode.ino, value))
        )
        return PageNo(found[0])

    def edit(self, page: PageNo, at: int, data: bytes, magic: int = MAGIC_OVERFLOW) -> None:
        """Change bytes of a page, whose checksum stays good."""

        def work() -> None:
            self.space.store.edit(page, magic)[at : at + len(data)] = data

        self.space.change(self.inode, work)

    def taken(self) -> int:
        """Pages that are in use now, and were not in the beginning."""
        return (self.free - self.space.free_bytes()) // PAGE

    def leaf(self) -> memoryview:
        """The page of attributes that are in one leaf."""
        return self.space.store.read(self.inode.xattr_root, MAGIC_TREE)

    def items(self) -> list[tuple[int, bytes]]:
        """``(key, item)`` of attributes that are in one leaf."""
        leaf = self.leaf()
        found = []
        for slot in range(int.from_bytes(leaf[42:44], "little")):
            key, at, length, _ = ITEM_SLOT.unpack_from(leaf, TREE_SLOTS_OFFSET + 16 * slot)
            found.append((key, bytes(leaf[at : at + length])))
        return found

    def check(self) -> None:
        assert sorted(self.xattrs.list(self.inode)) == sorted(self.model)
        for name, value in self.model.items():
            assert self.xattrs.get(self.inode, name) == value
        assert bool(self.inode.xattr_root) == bool(self.model)


@pytest.fixture
def attributes() -> Iterator[Attributes]:
    with space(SIZE) as made:
        yield Attributes(made)


# ------------------------------------------------------------------------------ overflow pages


EDGES = [1, IN_A_PAGE - 1, IN_A_PAGE, IN_A_PAGE + 1, 2 * IN_A_PAGE, 65535, 65536]


@given(length=st.sampled_from(EDGES) | st.integers(1, 65536))
def test_values_in_pages_and_back(length: int) -> None:
    with space(SIZE) as made:
        attributes = Attributes(made)
        value = noise(length)
        page = attributes.write(value)
        assert attributes.taken() == -(-length // IN_A_PAGE)
        assert attributes.overflow.read(OWNER, page, length) == value
        made.change(attributes.inode, lambda: attributes.overflow.free(OWNER, page, length))
        assert attributes.taken() == 0


def test_pages_are_as_the_format_has_them(attributes: Attributes) -> None:
    value = noise(2 * IN_A_PAGE + 5)
    page = attributes.write(value)
    for number, length in enumerate((IN_A_PAGE, IN_A_PAGE, 5)):
        raw = attributes.space.region.read(page_offset(page), PAGE)
        magic, _checksum, itself, owner = struct.unpack_from("<IIQQ", raw)
        following, count = struct.unpack_from("<QH", raw, 40)
        assert (magic, itself, owner, count) == (0x564F4B50, page, OWNER, length)
        assert raw[64 : 64 + length] == value[number * IN_A_PAGE :][:length]
        assert not any(raw[64 + length :])
        assert bool(following) == (number < 2)
        page = PageNo(following)


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (16, b"\x4e", "bad length or owner"),
        (48, struct.pack("<H", 0), "bad length or owner"),
        (48, struct.pack("<H", IN_A_PAGE + 1), "bad length or owner"),
        (40, bytes(8), "overflow page at 0x0: bad magic"),
        (40, struct.pack("<Q", 1 << 40), "overflow page .*: out of the region"),
        (40, struct.pack("<Q", 2 * 512 + 1), "overflow page at .*: bad magic"),  # a tree node
    ],
)
def test_chains_that_are_damaged(
    attributes: Attributes, at: int, data: bytes, message: str
) -> None:
    value = noise(IN_A_PAGE + 100)
    page = attributes.write(value)
    attributes.edit(page, at, data)
    with pytest.raises(CorruptionError, match=message):
        attributes.overflow.read(OWNER, page, len(value))
    with pytest.raises(CorruptionError, match=message):
        attributes.space.change(
            attributes.inode, lambda: attributes.overflow.free(OWNER, page, len(value))
        )
    assert attributes.taken() == 2, "nothing of it was freed"


@pytest.mark.parametrize("length", [1, 99, IN_A_PAGE, IN_A_PAGE + 99])
def test_a_chain_that_is_longer_than_its_value(attributes: Attributes, length: int) -> None:
    page = attributes.write(noise(IN_A_PAGE + 100))
    with pytest.raises(CorruptionError, match=r"bad length or owner|longer than"):
        attributes.overflow.read(OWNER, page, length)


def test_a_chain_that_leads_to_itself_has_an_end(attributes: Attributes) -> None:
    page = attributes.write(noise(IN_A_PAGE))
    attributes.edit(page, 40, struct.pack("<Q", page))
    with pytest.raises(CorruptionError, match="inode 77: overflow chain longer than 64512 bytes"):
        attributes.overflow.read(OWNER, page, 16 * IN_A_PAGE)
    with pytest.raises(CorruptionError, match="bad length"):
        attributes.overflow.read(OWNER, page, 65536)


def test_a_value_without_room_leaves_nothing(attributes: Attributes) -> None:
    made = attributes.space
    made.change(attributes.inode, lambda: made.blocks.alloc(made.blocks.free_blocks, zeroed=False))
    pages = made.pages.free_pages
    assert until_full(lambda i: attributes.write(noise(65536))) == pages // 17
    assert made.pages.free_pages == pages % 17
    for _ in range(pages % 17):
        attributes.write(b"one page")
    with pytest.raises(NoSpaceError):
        attributes.write(b"one page")


# ------------------------------------------------------------------------------ against a dict


NAMES = [b"user." + letter * n for letter, n in product((b"a", b"b", b"c"), (1, 100, 250))]
VALUES = st.tuples(
    st.sampled_from([0, 1, 511, 512, 513, IN_A_PAGE, IN_A_PAGE + 1, 65536]), st.integers(0, 9)
)
STEPS = st.tuples(st.sampled_from(["set", "set", "remove"]), st.sampled_from(NAMES), VALUES)


@given(
    batches=st.lists(st.tuples(st.lists(STEPS, max_size=6), st.booleans()), max_size=8),
    hashes=st.sampled_from([1, 2, 5]),
)
def test_changes_against_a_dict(
    batches: list[tuple[list[tuple[str, bytes, tuple[int, int]]], bool]], hashes: int
) -> None:
    def key(name: bytes, _hash_key: bytes) -> int:
        return (sum(name) % hashes + 1) << 11

    with space(SIZE) as made, patch.object(xattrs_module, "name_key", key):
        attributes = Attributes(made)
        for steps, give_up in batches:
            before = dict(attributes.model)

            def work(steps: list[tuple[str, bytes, tuple[int, int]]] = steps) -> None:
                for what, name, value in steps:
                    if what == "set":
                        attributes.set(name, noise(*value))
                    elif name in attributes.model:
                        attributes.remove(name)

            if not made.change(attributes.inode, work, give_up=give_up):
                attributes.model = before
            attributes.check()
        made.change(attributes.inode, lambda: attributes.xattrs.destroy(attributes.inode))
        assert attributes.inode.xattr_root == 0
        assert attributes.taken() == 0


# ------------------------------------------------------------------------------ the format


def test_items_are_as_the_format_has_them(attributes: Attributes) -> None:
    """512 bytes are in the item, one more is in an overflow page."""
    inline, outside = noise(512), noise(513, seed=2)
    attributes.set_now(b"user.a", inline)
    assert attributes.taken() == 1
    [(key, item)] = attributes.items()
    assert item == struct.pack("<BBHI", 6, 0, 0, 512) + b"user.a" + inline
    attributes.set_now(b"user.a", outside)
    assert attributes.taken() == 2
    [(same_key, item)] = attributes.items()
    head, name, page = item[:8], item[8:14], int.from_bytes(item[14:], "little")
    assert (head, name) == (struct.pack("<BBHI", 6, 1, 0, 513), b"user.a")
    assert attributes.overflow.read(OWNER, PageNo(page), 513) == outside
    assert same_key == key


def test_the_key_of_the_hash_decides(attributes: Attributes) -> None:
    attributes.set_now(b"user.a", b"1")
    made = attributes.space
    other = Xattrs(made.store, made.pages, b"x" * 16, attributes.overflow)
    with pytest.raises(NoDataError):
        other.get(attributes.inode, b"user.a")
    assert other.list(attributes.inode) == [b"user.a"]


def test_attributes_of_one_hash_take_the_lowest_free_number(
    attributes: Attributes, monkeypatch: pytest.MonkeyPatch
) -> None:
    collide(monkeypatch, 1)
    for name in (b"user.a", b"user.b", b"user.c"):
        attributes.set_now(name, name)
    attributes.space.change(attributes.inode, lambda: attributes.remove(b"user.b"))
    attributes.set_now(b"user.c", b"other")
    attributes.set_now(b"user.d", b"d")
    found = {item[8:14]: key for key, item in attributes.items()}
    assert found == {b"user.a": 2048, b"user.d": 2049, b"user.c": 2050}
    attributes.check()


def test_a_hash_has_room_for_so_many_attributes(
    attributes: Attributes, monkeypatch: pytest.MonkeyPatch
) -> None:
    collide(monkeypatch, 1)
    monkeypatch.setattr(xattrs_module, "MAX_COLLISIONS", 3)
    for name in (b"user.a", b"user.b", b"user.c"):
        attributes.set_now(name, name)
    with pytest.raises(NoSpaceError, match="too many attributes with the same hash"):
        attributes.set_now(b"user.d", noise(5_000))
    assert attributes.taken() == 1
    attributes.set_now(b"user.c", b"at the last key")
    attributes.check()


def test_attributes_that_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryFile(32 << 20) as memory, memory.open() as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        ino = fs.create(ROOT, b"f", 0o100644, 0, 0).ino
        collide(monkeypatch, 1)
        rnd = random.Random(1)
        model: dict[bytes, bytes] = {}
        for _ in range(600):
            name = b"user.%02d" % rnd.randrange(60)
            if name in model and rnd.random() < 0.4:
                fs.removexattr(ino, name)
                del model[name]
            else:
                model[name] = rnd.randbytes(rnd.choice((0, 5, 500, 512, 513, 5_000)))
                fs.setxattr(ino, name, model[name])
        assert sorted(fs.listxattr(ino)) == sorted(model)
        assert {name: fs.getxattr(ino, name) for name in model} == model


# ------------------------------------------------------------------------------ of files


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 4032, 4033, 65535, 65536])
def test_attribute_values(fs: FileSystem, length: int) -> None:
    ino = make(fs)
    free = fs.statfs().free
    value = noise(length)
    fs.setxattr(ino, b"user.x", value)
    fs.setxattr(ino, b"trusted." + b"n" * 247, value)
    assert fs.getxattr(ino, b"user.x") == value
    again = remount(fs)
    assert again.getxattr(ino, b"trusted." + b"n" * 247) == value
    again.setxattr(ino, b"user.x", b"short")
    assert again.getxattr(ino, b"user.x") == b"short"
    for name in again.listxattr(ino):
        again.removexattr(ino, name)
    assert again.listxattr(ino) == []
    assert again.statfs().free >= free
    again.setxattr(ino, b"security.y", value)
    again.unlink(ROOT, b"f")
    assert again.statfs().free >= free


def test_many_attributes(fs: FileSystem) -> None:
    ino = make(fs)
    model = {b"user.%d" % i: noise(i % 700, i) for i in range(1_000)}
    for name, value in model.items():
        fs.setxattr(ino, name, value)
    assert sorted(fs.listxattr(ino)) == sorted(model)
    fs = remount(fs)
    assert {name: fs.getxattr(ino, name) for name in fs.listxattr(ino)} == model


def test_attributes_that_cannot_be(fs: FileSystem) -> None:
    ino = make(fs)
    with pytest.raises(NoDataError):
        fs.getxattr(ino, b"user.x")
    with pytest.raises(NoDataError):
        fs.removexattr(ino, b"user.x")
    with pytest.raises(NoDataError):
        fs.setxattr(ino, b"user.x", b"", os.XATTR_REPLACE)
    fs.setxattr(ino, b"user.x", b"1", os.XATTR_CREATE)
    with pytest.raises(ExistsError):
        fs.setxattr(ino, b"user.x", b"2", os.XATTR_CREATE)
    fs.setxattr(ino, b"user.x", b"3", os.XATTR_REPLACE)
    for name in (b"user.x", b"user.new"):
        with pytest.raises(InvalidError, match="got both"):
            fs.setxattr(ino, name, b"4", os.XATTR_CREATE | os.XATTR_REPLACE)
    with pytest.raises(NotSupportedError):
        fs.setxattr(ino, b"system.posix_acl_access", b"")
    with pytest.raises(InvalidError):
        fs.setxattr(ino, b"user.", b"")
    with pytest.raises(RangeTooSmallError):
        fs.setxattr(ino, b"user." + b"n" * 251, b"")
    with pytest.raises(ArgumentTooLongError):
        fs.setxattr(ino, b"user.x", bytes(65537))
    assert fs.listxattr(ino) == [b"user.x"]
    assert fs.getxattr(ino, b"user.x") == b"3"


def test_an_attribute_without_space_leaves_the_old_one(fs: FileSystem) -> None:
    ino = make(fs)
    fs.setxattr(ino, b"user.x", b"old")
    resize(fs, make(fs, b"big"), fs.super.blocks.free_blocks * BLOCK)
    count = until_full(lambda i: fs.setxattr(ino, b"user.%d" % i, noise(65536)))
    kept = [b"user.%d" % i for i in range(count)]
    with pytest.raises(NoSpaceError):
        fs.setxattr(ino, b"user.x", noise(65536))
    assert fs.getxattr(ino, b"user.x") == b"old"
    assert sorted(fs.listxattr(ino)) == sorted([*kept, b"user.x"])
    for name in kept:
        fs.removexattr(ino, name)
    fs.setxattr(ino, b"user.x", noise(65536))


# ------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        (b"", b"", NotSupportedError),
        (b"user", b"", NotSupportedError),
        (b"users.a", b"", NotSupportedError),
        (b"User.a", b"", NotSupportedError),
        (b"xuser.a", b"", NotSupportedError),
        (b"system.posix_acl_access", b"", NotSupportedError),
        (b"pkernfs.extents", b"", NotSupportedError),
        (b"user.", b"", InvalidError),
        (b"trusted.", b"", InvalidError),
        (b"security.", b"", InvalidError),
        (b"user." + b"n" * 251, b"", RangeTooSmallError),
        (b"user.a", bytes(65537), ArgumentTooLongError),
    ],
)
def test_what_cannot_be_set(
    attributes: Attributes, name: bytes, value: bytes, error: type[PkernfsError]
) -> None:
    with pytest.raises(error):
        Xattrs.check(name, value)
    for flags in (0, os.XATTR_CREATE, os.XATTR_REPLACE):
        with pytest.raises(error):
            attributes.set_now(name, value, flags)
    attributes.check()


@pytest.mark.parametrize("namespace", [b"user.", b"trusted.", b"security."])
def test_the_longest_that_can_be_set(namespace: bytes) -> None:
    Xattrs.check(namespace + b"n" * (255 - len(namespace)), bytes(65536))
    Xattrs.check(namespace + b"\0", b"")


def test_attributes_that_are_not_there(attributes: Attributes) -> None:
    """Before there is any, and beside one that is."""
    for _ in range(2):
        with pytest.raises(NoDataError, match="no such attribute"):
            attributes.xattrs.get(attributes.inode, b"user.x")
        with pytest.raises(NoDataError, match="no such attribute"):
            attributes.space.change(attributes.inode, lambda: attributes.remove(b"user.x"))
        with pytest.raises(NoDataError, match="no such attribute"):
            attributes.set_now(b"user.x", b"", os.XATTR_REPLACE)
        attributes.check()
        attributes.set_now(b"user.y", b"y")


def test_flags_of_setxattr(attributes: Attributes) -> None:
    attributes.set_now(b"user.x", b"1", os.XATTR_CREATE)
    with pytest.raises(ExistsError):
        attributes.set_now(b"user.x", b"2", os.XATTR_CREATE)
    attributes.check()
    attributes.set_now(b"user.x", b"3", os.XATTR_REPLACE)
    attributes.set_now(b"user.y", b"4")
    attributes.check()


def test_nothing_is_destroyed_where_nothing_is(attributes: Attributes) -> None:
    attributes.space.change(attributes.inode, lambda: attributes.xattrs.destroy(attributes.inode))
    assert attributes.xattrs.list(attributes.inode) == []


def test_a_value_that_is_longer_than_any(attributes: Attributes) -> None:
    """Its length is looked at before memory for it is taken."""
    attributes.set_now(b"user.x", noise(600))
    leaf = bytes(attributes.leaf())
    at = leaf.index(b"user.x") - 4
    assert leaf[at : at + 4] == struct.pack("<I", 600)
    attributes.edit(attributes.inode.xattr_root, at, struct.pack("<I", 65537), MAGIC_TREE)
    with pytest.raises(CorruptionError, match="inode 77: attribute too long: got 65537"):
        attributes.xattrs.get(attributes.inode, b"user.x")


def test_a_value_whose_pages_are_damaged(attributes: Attributes) -> None:
    """It cannot be replaced or removed either; another one can."""
    attributes.set_now(b"user.x", noise(600))
    attributes.set_now(b"user.y", b"y")
    [page] = [int.from_bytes(item[-8:], "little") for _, item in attributes.items() if item[1]]
    attributes.edit(PageNo(page), OVERFLOW_OFFSET, OVERFLOW.pack(0, 599))
    with pytest.raises(CorruptionError):
        attributes.xattrs.get(attributes.inode, b"user.x")
    for change in (
        lambda: attributes.set(b"user.x", b"new"),
        lambda: attributes.remove(b"user.x"),
        lambda: attributes.xattrs.destroy(attributes.inode),
    ):
        with pytest.raises(CorruptionError):
            attributes.space.change(attributes.inode, change)
        assert sorted(attributes.xattrs.list(attributes.inode)) == [b"user.x", b"user.y"]
    attributes.space.change(attributes.inode, lambda: attributes.remove(b"user.y"))
    assert attributes.xattrs.list(attributes.inode) == [b"user.x"]


def test_targets_of_symlinks() -> None:
    with pytest.raises(InvalidError, match="symlink target is empty"):
        check_target(b"")
    with pytest.raises(NameTooLongError, match="symlink target of 4096 bytes"):
        check_target(b"x" * 4096)
    check_target(b"x")
    check_target(b"\0/" * 2047 + b"x")
