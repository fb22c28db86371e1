"""The inode table: inodes as objects, and their slots in inode pages (docs/format.md, 6)."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterator, MutableSequence
from functools import partial
from struct import Struct
from typing import Any, NamedTuple, cast

from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import CorruptionError, NotFoundError, PkernfsError
from pkernfs.fs.btree import Tree
from pkernfs.journal import PageStore
from pkernfs.layout import (
    CLASS_META,
    EXTENT,
    EXTENT_BYTES,
    FULL_INODE_PAGE,
    INODE,
    INODE_BYTES,
    INODE_FLAG_BODY,
    INODE_FLAG_NATIVE,
    INODE_FLAG_PENDING,
    INODE_FLAG_SEGMENT,
    INODE_FLAG_SEGMENT_OFF,
    INODE_FLAG_SEGMENT_ON,
    INODE_FLAG_TABLE,
    INODE_INLINE_BYTES,
    INODE_INLINE_OFFSET,
    INODE_INLINE_SHIFT,
    INODE_PAGE,
    INODE_PAGE_OFFSET,
    MAGIC_INODES,
    MAGIC_STATE,
    MAX_INLINE_EXTENTS,
    NO_INO,
    NO_PAGE,
    PAGE,
    SLOTS_PER_INODE_PAGE,
    STATE_FREE_INODE_PAGE_OFFSET,
    STATE_INODE_PAGES_OFFSET,
    STATE_INODE_ROOT_OFFSET,
    STATE_PAGE,
    TREE_EXTENTS,
    Extent,
    inos_of,
)
from pkernfs.quantities import Ino, PageNo, pages_from

_unpack = INODE.unpack_from
_pack = INODE.pack_into
_unpack_page = INODE_PAGE.unpack_from
_pack_page = INODE_PAGE.pack_into
_MASKS = Struct("<HH")  # used and pending, as they follow next_free
_unpack_masks = _MASKS.unpack_from
_pack_masks = _MASKS.pack_into
_MASKS_OFFSET = INODE_PAGE_OFFSET + 16
_TYPES = {
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFLNK,
    stat.S_IFIFO,
    stat.S_IFSOCK,
    stat.S_IFCHR,
    stat.S_IFBLK,
}
_SEGMENT_FLAGS = INODE_FLAG_SEGMENT | INODE_FLAG_SEGMENT_ON | INODE_FLAG_SEGMENT_OFF
_FLAGS = (
    INODE_FLAG_BODY | INODE_FLAG_PENDING | INODE_FLAG_TABLE | INODE_FLAG_NATIVE | _SEGMENT_FLAGS
)
_MAX_CACHED = 8192
_MAX_CACHED_ATTRIBUTES = 131072  # some 250 bytes each, if they are pyfuse3's
_MAX_NEW_PAGES = 64
_NO_INLINE = bytes(INODE_INLINE_BYTES)
_SECTOR = 512
_MAX_MAJOR = (1 << 12) - 1
_MAX_MINOR = (1 << 20) - 1


class Inode:
    """An inode in memory. Change it only between :meth:`InodeTable.touch` and ``save``."""

    __slots__ = (
        "atime",
        "body",
        "btime",
        "ctime",
        "data_pages",
        "extents",
        "flags",
        "generation",
        "gid",
        "ino",
        "mode",
        "mtime",
        "nlink",
        "parent",
        "pending_end",
        "pending_start",
        "rdev",
        "size",
        "target",
        "uid",
        "xattr_root",
    )

    def __init__(self) -> None:
        self.ino = NO_INO
        self.generation = 0
        self.mode = 0
        self.uid = 0
        self.gid = 0
        self.nlink = 0
        self.flags = 0
        self.size = 0
        self.atime = 0
        self.mtime = 0
        self.ctime = 0
        self.btime = 0
        self.rdev = 0
        self.data_pages = 0
        self.xattr_root = NO_PAGE
        self.pending_start = 0
        self.pending_end = 0
        self.parent = NO_INO
        self.body = NO_PAGE
        self.extents: list[Extent] = []  # inline extents of a regular file
        self.target = b""  # inline target of a symlink

    def load(self, page: memoryview, at: int) -> None:
        """Take every field from the inode at offset ``at`` of an inode page.

        :raises CorruptionError: a field contradicts the format.
        """
        (
            self.ino, self.generation, self.mode, self.uid, self.gid, self.nlink, flags,
            self.size, self.atime, self.mtime, self.ctime, self.btime, major, minor,
            self.data_pages, self.xattr_root, self.pending_start, self.pending_end,
            self.parent, self.body,
        ) = _unpack(page, at)  # fmt: skip
        if major > _MAX_MAJOR or minor > _MAX_MINOR:
            raise CorruptionError(f"inode {self.ino}: bad device number: got {major}:{minor}")
        self.rdev = os.makedev(major, minor) if major or minor else 0
        count = flags >> INODE_INLINE_SHIFT & 0xFF
        self.flags = flags & _FLAGS
        self.extents = []
        self.target = b""
        kind = self.mode & 0o170000
        if kind not in _TYPES or self.size < 0 or self.size >> 63:
            raise CorruptionError(
                f"inode {self.ino}: bad mode or size: got {self.mode:#o}, {self.size}"
            )
        if kind != stat.S_IFREG:
            self.flags &= ~_SEGMENT_FLAGS
        if not self.flags & INODE_FLAG_SEGMENT:
            self.flags &= ~INODE_FLAG_NATIVE
        if self.flags & INODE_FLAG_SEGMENT:
            if not self.body or count or flags & INODE_FLAG_BODY:
                raise CorruptionError(f"inode {self.ino}: bad segment: got {self.body}")
        elif flags & INODE_FLAG_BODY:
            if not self.body or count:
                raise CorruptionError(
                    f"inode {self.ino}: bad body: got {self.body}, {count} inline"
                )
        elif kind == stat.S_IFREG:
            if count > MAX_INLINE_EXTENTS:
                raise CorruptionError(
                    f"inode {self.ino}: bad extent count: got {count}, expected 0..5"
                )
            start = at + INODE_INLINE_OFFSET
            inline = EXTENT.iter_unpack(page[start : start + count * EXTENT_BYTES])
            self.extents = list(map(Extent._make, inline))
        elif kind == stat.S_IFLNK:
            if self.size > INODE_INLINE_BYTES:
                raise CorruptionError(f"inode {self.ino}: bad target length: got {self.size}")
            start = at + INODE_INLINE_OFFSET
            self.target = bytes(page[start : start + self.size])

    def store(self, page: memoryview, at: int) -> None:
        """Put every field into an inode page's image."""
        rdev = self.rdev
        _pack(
            page, at,
            self.ino, self.generation, self.mode, self.uid, self.gid, self.nlink,
            self.flags | len(self.extents) << INODE_INLINE_SHIFT,
            self.size, self.atime, self.mtime, self.ctime, self.btime,
            os.major(rdev) if rdev else 0, os.minor(rdev) if rdev else 0,
            self.data_pages, self.xattr_root, self.pending_start, self.pending_end,
            self.parent, self.body,
        )  # fmt: skip
        start = at + INODE_INLINE_OFFSET
        if self.extents:
            inline = b"".join([EXTENT.pack(*e) for e in self.extents])
            page[start : start + len(inline)] = inline
            start += len(inline)
        elif self.target:
            page[start : start + len(self.target)] = self.target
            start += len(self.target)
        end = at + INODE_BYTES
        page[start:end] = _NO_INLINE[: end - start]

    @property
    def is_dir(self) -> bool:
        """True for a directory."""
        return self.mode & 0o170000 == stat.S_IFDIR

    @property
    def is_reg(self) -> bool:
        """True for a regular file."""
        return self.mode & 0o170000 == stat.S_IFREG

    @property
    def blocks512(self) -> int:
        """The st_blocks of stat: 512-byte units held."""
        return self.data_pages * (PAGE // _SECTOR)


def clear_set_id(inode: Inode) -> None:
    """Clear set-uid, and set-gid where it means a group to run as."""
    inode.mode &= ~stat.S_ISUID
    if inode.mode & stat.S_IXGRP:
        inode.mode &= ~stat.S_ISGID


class Stat(NamedTuple):
    """The attributes of an inode; times in ns, ``data_pages`` in 4 KiB."""

    ino: Ino
    generation: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    atime: int
    mtime: int
    ctime: int
    rdev: int
    data_pages: int


class InodeTable:
    """Finds, makes and frees inodes; keeps a bounded number of them in memory."""

    def __init__(self, store: PageStore, pages: PageAllocator) -> None:
        self._store = store
        self._pages = pages
        self._cache: dict[Ino, Inode] = {}
        self.attribute_cache: dict[Ino, Any] = {}
        #: The inode pages, by index. An array cannot have items of another type than int.
        self.where = cast(MutableSequence[PageNo], array("Q"))
        state = store.read(STATE_PAGE, MAGIC_STATE)
        self._root = PageNo(
            int.from_bytes(state[STATE_INODE_ROOT_OFFSET : STATE_INODE_ROOT_OFFSET + 8], "little")
        )
        count = int.from_bytes(
            state[STATE_INODE_PAGES_OFFSET : STATE_INODE_PAGES_OFFSET + 8], "little"
        )
        self._load_where(count)
        self.used = 0
        self.damaged: list[str] = []
        #: Gets the number of each inode whose file is changed, if it is a set.
        self.watch: set[Ino] | None = None

    def _load_where(self, count: int) -> None:
        tree = Tree(self._store, self._pages, TREE_EXTENTS, NO_INO, self._root)
        for index, page, length in tree.extents(0):
            if index != len(self.where) or length > count - index:
                raise CorruptionError(f"inode table at index {index}: out of order")
            self.where.extend(pages_from(page, length))
        if len(self.where) != count:
            raise CorruptionError(
                f"inode table: wrong size: got {len(self.where)}, expected {count}"
            )

    def __len__(self) -> int:
        """Number of inode slots in the table."""
        return len(self.where) * (SLOTS_PER_INODE_PAGE - 1)

    def count_used(self) -> list[Ino]:
        """Count the inodes in use into :attr:`used`; returns those with work left (see format).

        Pages that cannot be read are left out, and told in :attr:`damaged`.
        """
        self.used = 0
        self.damaged = []
        left = []
        for index, number in enumerate(self.where):
            try:
                page = self._store.read(number, MAGIC_INODES)
            except CorruptionError as e:
                self.damaged.append(str(e))
                continue
            used, pending = _unpack_masks(page, _MASKS_OFFSET)
            self.used += used.bit_count()
            if pending:
                left += [
                    ino for slot, ino in enumerate(inos_of(index)) if slot and pending >> slot & 1
                ]
        return left

    def numbers(self) -> Iterator[Ino]:
        """The numbers in use, ascending; those that come or go meanwhile may be among them."""
        for index, number in enumerate(self.where):
            used, _pending = _unpack_masks(self._store.read(number, MAGIC_INODES), _MASKS_OFFSET)
            for slot, ino in enumerate(inos_of(index)):
                if slot and used >> slot & 1:
                    yield ino

    # ------------------------------------------------------------------ finding

    def get(self, ino: Ino) -> Inode:
        """The inode of that number.

        :raises NotFoundError: the number is not in use.
        :raises CorruptionError: the slot does not hold what it should.
        """
        inode = self._cache.get(ino)
        if inode is None:
            inode = Inode()
            self._load(inode, ino)
            self._cache[ino] = inode
        return inode

    def stat(self, ino: Ino) -> Stat:
        """The attributes of that inode, without keeping it.

        :raises NotFoundError, CorruptionError: as :meth:`get`.
        """
        i = self._cache.get(ino)
        if i is None:
            page = self._page_of(ino)
            f = _unpack(page, (ino & 15) * INODE_BYTES)
            if f[0] == ino and not f[12] and not f[13] and f[2] & 0o170000 in _TYPES:
                return Stat(ino, f[1], f[2], f[3], f[4], f[5], f[7], f[8], f[9], f[10], 0, f[14])
            i = Inode()  # a device node, or something to complain about
            self._load(i, ino)
        return Stat(
            ino,
            i.generation,
            i.mode,
            i.uid,
            i.gid,
            i.nlink,
            i.size,
            i.atime,
            i.mtime,
            i.ctime,
            i.rdev,
            i.data_pages,
        )

    def _page_of(self, ino: Ino) -> memoryview:
        """The inode page of an inode that is in use."""
        index, slot = ino >> 4, ino & 15
        if not slot or not 0 <= index < len(self.where):
            raise NotFoundError(f"inode {ino}: no such inode")
        page = self._store.read(self.where[index], MAGIC_INODES)
        if not _unpack_page(page, INODE_PAGE_OFFSET)[2] >> slot & 1:
            raise NotFoundError(f"inode {ino}: no such inode")
        return page

    def _load(self, inode: Inode, ino: Ino) -> None:
        inode.load(self._page_of(ino), (ino & 15) * INODE_BYTES)
        if inode.ino != ino:
            raise CorruptionError(f"inode {ino}: wrong number: got {inode.ino}")

    def trim(self) -> None:
        """Let old inodes go; to be called when no operation holds one."""
        if len(self._cache) > _MAX_CACHED:
            for ino in list(self._cache)[: _MAX_CACHED // 2]:
                del self._cache[ino]
        if len(self.attribute_cache) > _MAX_CACHED_ATTRIBUTES:
            self.attribute_cache.clear()

    # ------------------------------------------------------------------ changing

    def touch(self, inode: Inode, content: bool = True) -> None:
        """From here on the inode is changed by the open transaction: put it back if that fails.

        ``content``: what users call the file changes, not only when it was read.
        """
        if self.watch is not None and content:
            self.watch.add(inode.ino)
        self.attribute_cache.pop(inode.ino, None)
        self._store.on_abort.append(partial(self._reload, inode))

    def _reload(self, inode: Inode) -> None:
        """Put an inode back; one that cannot be read is told by whoever asks for it next."""
        try:
            self._load(inode, inode.ino)
        except PkernfsError:
            self._cache.pop(inode.ino, None)

    def save(self, inode: Inode) -> None:
        """Store a changed inode in the open transaction."""
        ino = inode.ino
        slot = ino & 15
        page = self._store.edit(self.where[ino >> 4], MAGIC_INODES)
        inode.store(page, slot * INODE_BYTES)
        used, pending = _unpack_masks(page, _MASKS_OFFSET)
        bit = 1 << slot
        now = pending & ~bit
        if not inode.nlink or inode.flags & INODE_FLAG_PENDING:
            now |= bit
        if now != pending:
            _pack_masks(page, _MASKS_OFFSET, used, now)

    def new(self, mode: int) -> Inode:
        """A new inode of that mode; the caller fills and saves it.

        :raises NoSpaceError: the table cannot grow.
        """
        head = self._free_head()
        if not head:
            head = self._grow(self._store.edit(STATE_PAGE, MAGIC_STATE)) + 1
        index = head - 1
        if index >= len(self.where):
            raise CorruptionError(f"inode table: bad free list: got {index}")
        page = self._store.edit(self.where[index], MAGIC_INODES)
        got, following, used, pending, listed, generation = _unpack_page(page, INODE_PAGE_OFFSET)
        if got != index or used & FULL_INODE_PAGE == FULL_INODE_PAGE:
            raise CorruptionError(f"inode page {index}: full or misplaced, but in the free list")
        free = ~used & FULL_INODE_PAGE
        slot = (free & -free).bit_length() - 1
        used |= 1 << slot
        if used == FULL_INODE_PAGE:
            self._set_free_head(following)
            following = listed = 0
        _pack_page(
            page,
            INODE_PAGE_OFFSET,
            index,
            following,
            used,
            pending,
            listed,
            (generation + 1) & 0xFFFFFFFF,
        )
        inode = Inode()
        inode.ino = Ino(index * SLOTS_PER_INODE_PAGE + slot)
        inode.mode = mode
        inode.generation = generation
        self._cache[inode.ino] = inode
        self.used += 1
        self._store.on_abort.append(partial(self._unmake, inode.ino))
        return inode

    def _free_head(self) -> int:
        """1 + index of the first inode page with a free slot; 0: none."""
        at = STATE_FREE_INODE_PAGE_OFFSET
        page = self._store.read(STATE_PAGE, MAGIC_STATE)
        return int.from_bytes(page[at : at + 8], "little")

    def _set_free_head(self, head: int) -> None:
        at = STATE_FREE_INODE_PAGE_OFFSET
        page = self._store.edit(STATE_PAGE, MAGIC_STATE)
        page[at : at + 8] = head.to_bytes(8, "little")

    def _unmake(self, ino: Ino) -> None:
        self._cache.pop(ino, None)
        self.used -= 1

    def _grow(self, state: memoryview) -> int:
        """Add inode pages (more the larger the table is); returns the index of the first."""
        first = len(self.where)
        want = min(max(1, first // 8), _MAX_NEW_PAGES)
        goal = PageNo(self.where[-1] + 1) if first else None
        self._store.on_abort.append(partial(self._ungrow, first, self._root))
        runs = self._pages.alloc(want, CLASS_META, goal)
        tree = Tree(self._store, self._pages, TREE_EXTENTS, NO_INO, self._root)
        index = first
        for start, count in runs:
            self._extend_tree(tree, index, start, count)
            for page in pages_from(start, count):
                image = self._store.new(page, MAGIC_INODES, NO_INO)
                following = index + 2 if index + 1 < first + want else 0
                _pack_page(image, INODE_PAGE_OFFSET, index, following, 0, 0, 1, 1)
                self.where.append(page)
                index += 1
        self._root = tree.root
        state[STATE_INODE_ROOT_OFFSET : STATE_INODE_ROOT_OFFSET + 8] = tree.root.to_bytes(
            8, "little"
        )
        at = STATE_INODE_PAGES_OFFSET
        state[at : at + 8] = len(self.where).to_bytes(8, "little")
        self._set_free_head(first + 1)
        return first

    @staticmethod
    def _extend_tree(tree: Tree, index: int, start: PageNo, count: int) -> None:
        last = tree.extent_at(index)
        if last and last.file_page + last.pages == index and last.page + last.pages == start:
            tree.replace_extent(last.file_page, last._replace(pages=last.pages + count))
        else:
            tree.insert_extent(Extent(index, start, count))

    def _ungrow(self, count: int, root: PageNo) -> None:
        del self.where[count:]
        self._root = root

    def free(self, inode: Inode) -> None:
        """Give the slot back; what the inode referred to is the caller's to free."""
        ino = inode.ino
        slot = ino & 15
        page = self._store.edit(self.where[ino >> 4], MAGIC_INODES)
        page[slot * INODE_BYTES : (slot + 1) * INODE_BYTES] = bytes(INODE_BYTES)
        index, following, used, pending, listed, generation = _unpack_page(page, INODE_PAGE_OFFSET)
        if not listed:
            following = self._free_head()
            self._set_free_head(index + 1)
            listed = 1
        keep = ~(1 << slot)
        _pack_page(
            page,
            INODE_PAGE_OFFSET,
            index,
            following,
            used & keep,
            pending & keep,
            listed,
            generation,
        )
        self.used -= 1
        self._store.on_abort.append(self._unfree)
        self._store.on_commit.append(partial(self._cache.pop, ino, None))

    def _unfree(self) -> None:
        self.used += 1
