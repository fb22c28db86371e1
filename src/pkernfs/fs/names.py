"""Directories: names in the directory's tree (docs/format.md, section 8)."""

from __future__ import annotations

from collections.abc import Iterator

from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import (
    CorruptionError,
    ExistsError,
    InvalidError,
    NameTooLongError,
    NoSpaceError,
)
from pkernfs.fs.btree import Place, Tree
from pkernfs.fs.inodes import Inode
from pkernfs.journal import PageStore
from pkernfs.layout import (
    COLLISION_BITS,
    INODE_FLAG_BODY,
    ITEM_SLOT,
    MAX_COLLISIONS,
    MAX_NAME_BYTES,
    NAME_ITEM,
    PAGE,
    TREE_NAMES,
    TREE_SLOTS_OFFSET,
    name_key,
)

_unpack = NAME_ITEM.unpack_from
_HEAD = NAME_ITEM.size
_unpack_slot = ITEM_SLOT.unpack_from
_SLOT_BYTES = ITEM_SLOT.size
_MAX_REMEMBERED = 16384
_ABSENT = (0, 0, 0)

Entry = tuple[int, int, int]


def check_name(name: bytes) -> None:
    """:raises InvalidError, NameTooLongError, ExistsError: not a name that can be made."""
    if len(name) > MAX_NAME_BYTES:
        raise NameTooLongError(f"name of {len(name)} bytes: expected at most {MAX_NAME_BYTES}")
    if name in (b".", b".."):
        raise ExistsError("name is . or ..")
    if not name or b"/" in name or b"\0" in name:
        raise InvalidError("name is empty or has a / or a zero byte")


class Names:
    """The entries of any directory of one file system."""

    def __init__(self, store: PageStore, pages: PageAllocator, hash_key: bytes) -> None:
        self._store = store
        self._pages = pages
        self._hash_key = hash_key
        # Names looked up lately, also those that are not there: the kernel looks up first. A
        # directory is freed when its last name is gone, so its number can be used anew.
        self._remembered: dict[tuple[int, bytes], Entry] = {}
        # The last descent: directory, name, key, transaction, and where it led.
        self._last: tuple[int, bytes, int, int, Place] | None = None

    def _tree(self, directory: Inode) -> Tree:
        root = directory.body if directory.flags & INODE_FLAG_BODY else 0
        return Tree(self._store, self._pages, TREE_NAMES, directory.ino, root)

    def find(self, directory: Inode, name: bytes) -> Entry | None:
        """``(key, inode number, type)`` of a name; None if it is not there.

        :raises NameTooLongError: no name can be that long.
        """
        if len(name) > MAX_NAME_BYTES:
            raise NameTooLongError(f"name of {len(name)} bytes: expected at most {MAX_NAME_BYTES}")
        found = self._remembered.get((directory.ino, name))
        if found is None:
            found = self._look_up(directory, name)
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[directory.ino, name] = found
        return found if found[1] else None

    def _look_up(self, directory: Inode, name: bytes) -> Entry:
        if directory.flags & INODE_FLAG_BODY:
            key = name_key(name, self._hash_key)
            tree = self._tree(directory)
            place = tree.place(key)
            if not self._store.is_open:  # what a transaction shows may come to nothing
                self._last = directory.ino, name, key, self._store.sequence, place
            for found, item in tree.find(key, COLLISION_BITS, place):
                if item[_HEAD:] == name:
                    ino, kind = _unpack(item)
                    if not ino:
                        raise CorruptionError(f"directory {directory.ino}: a name for inode 0")
                    return found, ino, kind
        return _ABSENT

    def _remember(self, directory: Inode, name: bytes, entry: Entry) -> None:
        if len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[directory.ino, name] = entry
        self._store.on_abort.append(self._remembered.clear)

    def _place(self, directory: Inode, name: bytes, key: int) -> Place | None:
        """Where a key is, if that was just looked up and nothing has changed since."""
        last = self._last
        self._last = None
        if last and last[:4] == (directory.ino, name, key, self._store.sequence):
            return last[4]
        return None

    def add(self, directory: Inode, name: bytes, ino: int, kind: int) -> None:
        """Enter a new name; ``kind`` is mode >> 12. The caller saves the directory."""
        tree = self._tree(directory)
        key = name_key(name, self._hash_key)
        item = NAME_ITEM.pack(ino, kind) + name
        last = key + MAX_COLLISIONS - 1
        place = self._place(directory, name, key)
        while not tree.insert_item(key, item, place):  # another name with the same hash has it
            if key == last:
                raise NoSpaceError("too many names with the same hash")
            key += 1
            place = None
        directory.size += 1
        self._set_root(directory, tree)
        self._remember(directory, name, (key, ino, kind))

    def remove(self, directory: Inode, name: bytes, key: int) -> None:
        """Take out the name at ``key``. The caller saves the directory."""
        if not directory.size:
            raise CorruptionError(f"directory {directory.ino}: more names than its size")
        tree = self._tree(directory)
        tree.remove(key, self._place(directory, name, key))
        directory.size -= 1
        self._set_root(directory, tree)
        self._remember(directory, name, _ABSENT)

    def replace(self, directory: Inode, name: bytes, key: int, ino: int, kind: int) -> None:
        """Let the name at ``key`` mean another inode. The caller saves the directory."""
        tree = self._tree(directory)
        tree.remove(key, self._place(directory, name, key))
        tree.insert_item(key, NAME_ITEM.pack(ino, kind) + name)
        self._set_root(directory, tree)
        self._remember(directory, name, (key, ino, kind))

    def entries(self, directory: Inode, key: int) -> Iterator[tuple[bytes, int, int, int]]:
        """``(name, inode number, type, key)`` of the entries from ``key`` on."""
        for node, first, count in self._tree(directory).leaves(key):
            for slot in range(first, count):
                found, at, length, _ = _unpack_slot(node, TREE_SLOTS_OFFSET + slot * _SLOT_BYTES)
                if at + length > PAGE or length <= _HEAD:
                    raise CorruptionError(f"directory {directory.ino}: bad item at slot {slot}")
                ino, kind = _unpack(node, at)
                yield bytes(node[at + _HEAD : at + length]), ino, kind, found

    @staticmethod
    def _set_root(directory: Inode, tree: Tree) -> None:
        directory.body = tree.root
        if tree.root:
            directory.flags |= INODE_FLAG_BODY
        else:
            directory.flags &= ~INODE_FLAG_BODY
