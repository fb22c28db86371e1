"""Directories: names in the directory's tree (docs/format.md, section 8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
    NO_INO,
    NO_PAGE,
    PAGE,
    TREE_NAMES,
    TREE_SLOTS_OFFSET,
    name_key,
)
from pkernfs.quantities import Ino

_unpack = NAME_ITEM.unpack_from
_HEAD = NAME_ITEM.size
_unpack_slot = ITEM_SLOT.unpack_from
_SLOT_BYTES = ITEM_SLOT.size
#: The name of the root table's file in /iommu.
ROOT_PGTABLES = b"root-pgtables"
_MAX_KNOWN = 131072  # some 200 bytes each

#: Name, inode number, type, key: an entry of a listing. Bare: a named tuple would cost half of
#: what an entry costs.
DirectoryEntry = tuple[bytes, Ino, int, int]


class Entry(NamedTuple):
    """A name that is there: its key in the directory's tree, and what it means."""

    key: int
    ino: Ino
    kind: int


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
        # Inode numbers of names used lately, by directory; 0: that name is not there. A directory
        # is freed when its last name is gone, so what is known is true when its number is reused.
        self._known: dict[Ino, dict[bytes, Ino]] = {}
        self._count = 0
        # The last descent: directory, name, key, transaction, and where it led.
        self._last: tuple[Ino, bytes, int, int, Place] | None = None

    def _tree(self, directory: Inode) -> Tree:
        root = directory.body if directory.flags & INODE_FLAG_BODY else NO_PAGE
        return Tree(self._store, self._pages, TREE_NAMES, directory.ino, root)

    def find(self, directory: Inode, name: bytes) -> Ino:
        """The inode number of a name; 0 if it is not there.

        :raises NameTooLongError: no name can be that long.
        """
        known = self._known.get(directory.ino)
        ino = known.get(name) if known is not None else None
        if ino is None:
            found = self._look_up(directory, name)
            ino = found[1] if found is not None else NO_INO
            self._know(directory, name, ino)
        return ino

    def locate(self, directory: Inode, name: bytes) -> Entry | None:
        """The entry of a name; None if it is not there.

        :raises NameTooLongError: no name can be that long.
        """
        known = self._known.get(directory.ino)
        if known is not None and known.get(name) == 0:
            return None
        found = self._look_up(directory, name)
        return None if found is None else Entry._make(found)

    def _look_up(self, directory: Inode, name: bytes) -> tuple[int, Ino, int] | None:
        """The entry of a name; bare, for most look-ups want its inode number and no more."""
        if len(name) > MAX_NAME_BYTES:
            raise NameTooLongError(f"name of {len(name)} bytes: expected at most {MAX_NAME_BYTES}")
        if not directory.flags & INODE_FLAG_BODY:
            return None
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
        return None

    def _know(self, directory: Inode, name: bytes, ino: Ino) -> None:
        if self._count >= _MAX_KNOWN:
            self._forget_all()
        known = self._known.get(directory.ino)
        if known is None:
            known = self._known[directory.ino] = {}
        before = len(known)
        known[name] = ino
        self._count += len(known) - before

    def _forget_all(self) -> None:
        self._known.clear()
        self._count = 0

    def _changed(self, directory: Inode, name: bytes, ino: Ino) -> None:
        """In a transaction: from now on the name means ``ino``, unless that comes to nothing."""
        self._know(directory, name, ino)
        self._store.on_abort.append(self._forget_all)

    def _place(self, directory: Inode, name: bytes) -> tuple[int, Place | None]:
        """A name's first key, and where it is if that was just looked up and still is so."""
        last = self._last
        self._last = None
        if last and last[0] == directory.ino and last[1] == name:
            return last[2], last[4] if last[3] == self._store.sequence else None
        return name_key(name, self._hash_key), None

    def add(self, directory: Inode, name: bytes, ino: Ino, kind: int) -> None:
        """Enter a new name; ``kind`` is mode >> 12. The caller saves the directory."""
        tree = self._tree(directory)
        key, place = self._place(directory, name)
        item = NAME_ITEM.pack(ino, kind) + name
        last = key + MAX_COLLISIONS - 1
        while not tree.insert_item(key, item, place):  # another name with the same hash has it
            if key == last:
                raise NoSpaceError("too many names with the same hash")
            key += 1
            place = None
        directory.size += 1
        self._set_root(directory, tree)
        self._changed(directory, name, ino)

    def remove(self, directory: Inode, name: bytes, key: int) -> None:
        """Take out the name at ``key``. The caller saves the directory."""
        if not directory.size:
            raise CorruptionError(f"directory {directory.ino}: more names than its size")
        tree = self._tree(directory)
        first, place = self._place(directory, name)
        tree.remove(key, place if key == first else None)
        directory.size -= 1
        self._set_root(directory, tree)
        self._changed(directory, name, NO_INO)

    def replace(self, directory: Inode, name: bytes, key: int, ino: Ino, kind: int) -> None:
        """Let the name at ``key`` mean another inode. The caller saves the directory."""
        tree = self._tree(directory)
        self._last = None
        tree.remove(key)
        tree.insert_item(key, NAME_ITEM.pack(ino, kind) + name)
        self._set_root(directory, tree)
        self._changed(directory, name, ino)

    def entries(self, directory: Inode, key: int) -> Iterator[DirectoryEntry]:
        """The entries from ``key`` on."""
        for node, first, end in self._tree(directory).leaves(key):
            for slot in range(first, end):
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


def is_table_name(name: bytes) -> bool:
    """True for the names that files in /iommu may have."""
    if name == ROOT_PGTABLES:
        return True
    number = name[4:]
    if not name.startswith(b"dom-") or not number.isdigit() or len(number) > 5:
        return False
    return int(number) <= 65535 and str(int(number)).encode() == number
