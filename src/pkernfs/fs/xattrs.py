"""Extended attributes and overflow pages (docs/format.md, section 8)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import (
    ArgumentTooLongError,
    CorruptionError,
    ExistsError,
    InvalidError,
    NameTooLongError,
    NoDataError,
    NoSpaceError,
    NotSupportedError,
    RangeTooSmallError,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.inodes import Inode
from pkernfs.journal import PageStore
from pkernfs.layout import (
    COLLISION_BITS,
    MAGIC_OVERFLOW,
    MAX_COLLISIONS,
    MAX_NAME_BYTES,
    MAX_TARGET_BYTES,
    MAX_XATTR_BYTES,
    NO_PAGE,
    OVERFLOW,
    OVERFLOW_DATA_BYTES,
    OVERFLOW_DATA_OFFSET,
    OVERFLOW_OFFSET,
    PAGE,
    TREE_XATTRS,
    XATTR_INLINE,
    XATTR_ITEM,
    XATTR_OVERFLOW,
    name_key,
)
from pkernfs.quantities import Ino, PageNo

NAMESPACES = (b"user.", b"trusted.", b"security.")
_MAX_INLINE = 512
_HEAD = XATTR_ITEM.size


class _Item(NamedTuple):
    """An attribute as it is stored: its key in the tree, its bytes."""

    key: int
    data: bytes


class Overflow:
    """Values that do not fit an item or an inode: chains of pages."""

    def __init__(self, store: PageStore, pages: PageAllocator) -> None:
        self._store = store
        self._pages = pages

    def write(self, owner: Ino, value: bytes) -> PageNo:
        """Store a value of at least one byte; returns its first page."""
        parts = [
            value[i : i + OVERFLOW_DATA_BYTES] for i in range(0, len(value), OVERFLOW_DATA_BYTES)
        ]
        numbers = [self._pages.alloc_one() for _ in parts]
        for i, part in enumerate(parts):
            image = self._store.new(numbers[i], MAGIC_OVERFLOW, owner)
            following = numbers[i + 1] if i + 1 < len(numbers) else NO_PAGE
            OVERFLOW.pack_into(image, OVERFLOW_OFFSET, following, len(part))
            image[OVERFLOW_DATA_OFFSET : OVERFLOW_DATA_OFFSET + len(part)] = part
        return numbers[0]

    def _chain(self, owner: Ino, page: PageNo, length: int) -> Iterator[tuple[PageNo, memoryview]]:
        left = length
        while left > 0:
            node = self._store.read(page, MAGIC_OVERFLOW)
            following, count = OVERFLOW.unpack_from(node, OVERFLOW_OFFSET)
            if not 0 < count <= min(left, OVERFLOW_DATA_BYTES) or (
                int.from_bytes(node[16:24], "little") != owner
            ):
                raise CorruptionError(f"overflow page at {page * PAGE:#x}: bad length or owner")
            yield page, node[OVERFLOW_DATA_OFFSET : OVERFLOW_DATA_OFFSET + count]
            left -= count
            page = following
        if page:
            raise CorruptionError(f"inode {owner}: overflow chain longer than {length} bytes")

    def read(self, owner: Ino, page: PageNo, length: int) -> bytes:
        """A value of ``length`` bytes from its first page."""
        return b"".join([bytes(part) for _, part in self._chain(owner, page, length)])

    def free(self, owner: Ino, page: PageNo, length: int) -> None:
        """Free a value's pages."""
        for number in [n for n, _ in self._chain(owner, page, length)]:
            self._pages.free(number)


class Xattrs:
    """The extended attributes of any inode of one file system."""

    def __init__(
        self, store: PageStore, pages: PageAllocator, hash_key: bytes, overflow: Overflow
    ) -> None:
        self._store = store
        self._pages = pages
        self._hash_key = hash_key
        self._overflow = overflow

    def _tree(self, inode: Inode) -> Tree:
        return Tree(self._store, self._pages, TREE_XATTRS, inode.ino, inode.xattr_root)

    def _find(self, inode: Inode, name: bytes) -> _Item | None:
        for key, item in self._tree(inode).find(name_key(name, self._hash_key), COLLISION_BITS):
            data = bytes(item)
            if _name(data) == name:
                return _Item(key, data)
        return None

    def get(self, inode: Inode, name: bytes) -> bytes:
        """The value.

        :raises NoDataError: there is no such attribute.
        """
        found = self._find(inode, name)
        if found is None:
            raise NoDataError("no such attribute")
        return self._value(inode, found.data)

    def _value(self, inode: Inode, data: bytes) -> bytes:
        name_length, where, _, length = XATTR_ITEM.unpack_from(data)
        value = data[_HEAD + name_length :]
        if where == XATTR_INLINE:
            return value[:length]
        if length > MAX_XATTR_BYTES:
            raise CorruptionError(f"inode {inode.ino}: attribute too long: got {length}")
        return self._overflow.read(inode.ino, _page_number(value), length)

    def list(self, inode: Inode) -> list[bytes]:
        """The names."""
        return [_name(bytes(item)) for _, item in self._tree(inode).items(0)]

    @staticmethod
    def check(name: bytes, value: bytes) -> None:
        """:raises NotSupportedError, RangeTooSmallError, ArgumentTooLongError: cannot be set."""
        namespace = next((n for n in NAMESPACES if name.startswith(n)), None)
        if namespace is None:
            raise NotSupportedError("attribute namespace is not supported")
        if name == namespace:
            raise InvalidError("attribute name is empty")
        if len(name) > MAX_NAME_BYTES:
            raise RangeTooSmallError(f"attribute name of {len(name)} bytes")
        if len(value) > MAX_XATTR_BYTES:
            raise ArgumentTooLongError(f"attribute of {len(value)} bytes")

    def set(self, inode: Inode, name: bytes, value: bytes, flags: int) -> None:
        """Set a value; flags as in setxattr(2). The caller saves the inode."""
        self.check(name, value)
        if flags & os.XATTR_CREATE and flags & os.XATTR_REPLACE:
            raise InvalidError("attribute flags: got both create and replace")
        found = self._find(inode, name)
        if flags & os.XATTR_CREATE and found:
            raise ExistsError("attribute exists")
        if flags & os.XATTR_REPLACE and not found:
            raise NoDataError("no such attribute")
        tree = self._tree(inode)
        key = last = name_key(name, self._hash_key)
        if found:
            key = last = found.key
            self._drop(inode, found.data)
            tree.remove(key)
        else:
            last += MAX_COLLISIONS - 1
        if len(value) <= _MAX_INLINE:
            item = XATTR_ITEM.pack(len(name), XATTR_INLINE, 0, len(value)) + name + value
        else:
            page = self._overflow.write(inode.ino, value)
            item = XATTR_ITEM.pack(len(name), XATTR_OVERFLOW, 0, len(value)) + name
            item += page.to_bytes(8, "little")
        while not tree.insert_item(key, item):  # another name with the same hash has it
            if key == last:
                raise NoSpaceError("too many attributes with the same hash")
            key += 1
        inode.xattr_root = tree.root

    def remove(self, inode: Inode, name: bytes) -> None:
        """Remove an attribute. The caller saves the inode.

        :raises NoDataError: there is none.
        """
        found = self._find(inode, name)
        if found is None:
            raise NoDataError("no such attribute")
        self._drop(inode, found.data)
        tree = self._tree(inode)
        tree.remove(found.key)
        inode.xattr_root = tree.root

    def _drop(self, inode: Inode, data: bytes) -> None:
        name_length, where, _, length = XATTR_ITEM.unpack_from(data)
        if where == XATTR_OVERFLOW:
            at = _HEAD + name_length
            self._overflow.free(inode.ino, _page_number(data[at:]), length)

    def destroy(self, inode: Inode) -> None:
        """Free all attributes of an inode that goes."""
        if inode.xattr_root:
            tree = self._tree(inode)
            for _, item in tree.items(0):
                self._drop(inode, bytes(item))
            tree.destroy()
            inode.xattr_root = NO_PAGE


def _page_number(data: bytes) -> PageNo:
    return PageNo(int.from_bytes(data[:8], "little"))


def _name(data: bytes) -> bytes:
    return data[_HEAD : _HEAD + data[0]]


def check_target(target: bytes) -> None:
    """:raises InvalidError, NameTooLongError: not a symlink target that can be stored."""
    if not target:
        raise InvalidError("symlink target is empty")
    if len(target) > MAX_TARGET_BYTES:
        raise NameTooLongError(f"symlink target of {len(target)} bytes")
