"""B+ trees of 4 KiB nodes (docs/format.md, section 7): extents, names, extended attributes.

A :class:`Tree` is a root page number and what it takes to follow it; whoever holds the root stores
it back after a change. Nodes are changed only inside a transaction.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple, NoReturn, cast

from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import CorruptionError
from pkernfs.journal import PageStore
from pkernfs.layout import (
    EXTENT,
    EXTENT_BYTES,
    INNER_SLOT,
    ITEM_SLOT,
    MAGIC_TREE,
    MAX_EXTENT_SLOTS,
    MAX_INNER_SLOTS,
    MAX_TREE_LEVELS,
    NAME_ITEM,
    NO_PAGE,
    PAGE,
    TREE,
    TREE_EXTENTS,
    TREE_NAMES,
    TREE_OFFSET,
    TREE_SLOTS_OFFSET,
    XATTR_ITEM,
    Extent,
)
from pkernfs.quantities import Ino, PageNo

# owner, then kind, level, count, heap, garbage: from offset 16 of a node
_NODE = Struct("<Q16xBBHHH")
_NODE_OFFSET = 16
_SLOTS = TREE_SLOTS_OFFSET
_WORD0 = _SLOTS // 8
_MERGE_BELOW = (PAGE - _SLOTS) // 4
_MERGE_UP_TO = (PAGE - _SLOTS) * 3 // 4

_ITEM_SLOT_BYTES = ITEM_SLOT.size
# An item has at least one byte behind its fixed part.
_NAME_BYTES = NAME_ITEM.size
_XATTR_BYTES = XATTR_ITEM.size

_unpack_node = _NODE.unpack_from
_pack_tree = TREE.pack_into
_unpack_inner = INNER_SLOT.unpack_from
_unpack_item = ITEM_SLOT.unpack_from
_unpack_extent = EXTENT.unpack_from
_as_extent = Extent._make

_NO_BOUND = 1 << 64

_MAX_DECODED = 1024  # inner nodes kept as lists, up to 16 KiB each

# Bare: every look-up makes one of each, and a named tuple costs it 4 per cent.
#: Pages from the root to a leaf, each with the slot that is taken there.
Path = list[tuple[PageNo, int]]
#: Path, leaf, its count, the lowest key of the leaves to the right.
Place = tuple[Path, memoryview, int, int]
#: Key and bytes.
Item = tuple[int, memoryview]


@dataclass(slots=True)
class Inner:
    """An inner node; ``keys`` are the lowest ones of its children."""

    owner: Ino
    kind: int
    level: int
    keys: list[int]
    children: list[PageNo]


class Leaf(NamedTuple):
    """A leaf, the first slot that is asked for, and the end of its slots."""

    node: memoryview
    first: int
    end: int


class Tree:
    """One tree. ``root`` is 0 while it is empty; ``owner`` is the inode it belongs to."""

    __slots__ = ("_least", "_pages", "_slot", "_store", "_words", "kind", "owner", "root")

    def __init__(
        self, store: PageStore, pages: PageAllocator, kind: int, owner: Ino, root: PageNo
    ) -> None:
        self._store = store
        self._pages = pages
        self.kind = kind
        self.owner = owner
        self.root = root
        slot = self._slot = EXTENT_BYTES if kind == TREE_EXTENTS else _ITEM_SLOT_BYTES
        self._words = slot // 8
        self._least = _NAME_BYTES if kind == TREE_NAMES else _XATTR_BYTES

    # ------------------------------------------------------------------ nodes

    def _node(self, page: PageNo, level: int) -> tuple[memoryview, int, int]:
        """A node, its level and its number of slots; ``level`` -1 accepts any (the root's)."""
        node = self._store.read(page, MAGIC_TREE)
        owner, kind, got, count, _heap, _garbage = _unpack_node(node, _NODE_OFFSET)
        if owner != self.owner or kind != self.kind:
            self._bad(
                page,
                f"wrong owner or kind: got {owner}/{kind}, expected {self.owner}/{self.kind}",
            )
        if (got != level and level >= 0) or got >= MAX_TREE_LEVELS:
            self._bad(page, f"wrong level: got {got}, expected {level}")
        if not 0 < count <= (PAGE - _SLOTS) // (16 if got else self._slot):
            self._bad(page, f"wrong count: got {count}")
        return node, got, count

    def _bad(self, page: PageNo, reason: str) -> NoReturn:
        raise CorruptionError(f"tree node at {page * PAGE:#x}: {reason}")

    def _keys(self, node: memoryview, level: int, count: int) -> memoryview:
        words = 2 if level else self._words
        return node.cast("Q")[_WORD0 : _WORD0 + count * words : words]

    def place(self, key: int) -> Place:
        """Find the place that ``key`` has or would have; the tree is not empty.

        The slot at the end of its path is that of the first key >= ``key``.
        """
        path: Path = []
        page = self.root
        level = -1
        bound = _NO_BOUND
        decoded = self._store.decoded
        while True:
            inner: Inner | None = decoded.get(page)
            if inner is None or inner.owner != self.owner or inner.kind != self.kind:
                node, level, count = self._node(page, level)
                if not level:
                    words = self._words
                    keys = node.cast("Q")[_WORD0 : _WORD0 + count * words : words]
                    path.append((page, bisect_left(keys, key)))
                    return path, node, count, bound
                inner = self._decode(page, node, level, count)
            elif level >= 0 and inner.level != level:
                self._bad(page, f"wrong level: got {inner.level}, expected {level}")
            level, lowest, children = inner.level, inner.keys, inner.children
            slot = bisect_right(lowest, key) - 1
            if slot < 0:
                slot = 0
            if slot + 1 < len(lowest):
                bound = lowest[slot + 1]
            path.append((page, slot))
            page = children[slot]
            level -= 1

    def _decode(self, page: PageNo, node: memoryview, level: int, count: int) -> Inner:
        """An inner node's keys and children as lists, kept while the node does not change."""
        words = node.cast("Q")[_WORD0 : _WORD0 + 2 * count]
        children = cast(list[PageNo], words[1::2].tolist())  # one call for all of them
        inner = Inner(self.owner, self.kind, level, words[::2].tolist(), children)
        if not self._store.is_open:
            decoded = self._store.decoded
            if len(decoded) >= _MAX_DECODED:
                decoded.clear()
            decoded[page] = inner
        return inner

    # ------------------------------------------------------------------ reading

    def item(self, node: memoryview, slot: int) -> Item:
        """Key and bytes of an item in a leaf; there is at least one byte behind its fixed part."""
        key, offset, length, _ = _unpack_item(node, _SLOTS + 16 * slot)
        if offset < _SLOTS or offset + length > PAGE or length <= self._least:
            raise CorruptionError(f"inode {self.owner}: bad item at slot {slot} of a tree leaf")
        return key, node[offset : offset + length]

    def items(self, key: int) -> Iterator[Item]:
        """Items from ``key`` on, ascending."""
        for node, slot in self._leaf_slots(key):
            yield self.item(node, slot)

    def extents(self, key: int) -> Iterator[Extent]:
        """Extents from the first whose key is >= ``key`` on."""
        for node, slot in self._leaf_slots(key):
            yield _as_extent(_unpack_extent(node, _SLOTS + EXTENT_BYTES * slot))

    def _leaf_slots(self, key: int) -> Iterator[tuple[memoryview, int]]:
        for node, first, end in self.leaves(key):
            for slot in range(first, end):
                yield node, slot

    def leaves(self, key: int) -> Iterator[Leaf]:
        """Leaves from that of ``key`` on; ``first`` is the first slot from ``key`` on."""
        while self.root:
            path, node, count, bound = self.place(key)
            yield Leaf(node, path[-1][1], count)
            if bound >= _NO_BOUND:
                return
            key = bound

    def extent_at(self, key: int) -> Extent | None:
        """The last extent whose key is <= ``key``."""
        page = self.root
        level = -1
        left: tuple[PageNo, int] | None = None  # the last node passed to the left of the path
        while page:
            node, level, count = self._node(page, level)
            slot = bisect_right(self._keys(node, level, count), key) - 1
            if not level:
                if slot >= 0:
                    return self._extent(node, slot)
                # The leaf has lost its first extents: what is before the key is in another one.
                return self._last_extent(*left) if left else None
            slot = max(slot, 0)
            level -= 1
            if slot:
                left = _unpack_inner(node, _SLOTS + 16 * (slot - 1))[1], level
            page = _unpack_inner(node, _SLOTS + 16 * slot)[1]
        return None

    def _last_extent(self, page: PageNo, level: int) -> Extent:
        while True:
            node, level, count = self._node(page, level)
            if not level:
                return self._extent(node, count - 1)
            page = _unpack_inner(node, _SLOTS + 16 * (count - 1))[1]
            level -= 1

    @staticmethod
    def _extent(node: memoryview, slot: int) -> Extent:
        return _as_extent(_unpack_extent(node, _SLOTS + EXTENT_BYTES * slot))

    def find(self, key: int, group_bits: int, place: Place | None = None) -> Iterator[Item]:
        """Items whose key agrees with ``key`` but for the lowest ``group_bits`` bits."""
        if not self.root:
            return
        path, node, count, bound = place or self.place(key)
        end = key + (1 << group_bits)
        for slot in range(path[-1][1], count):
            found = self.item(node, slot)
            if found[0] >= end:
                return
            yield found
        if bound < end:
            for found in self.items(bound):
                if found[0] >= end:
                    return
                yield found

    def pages(self) -> Iterator[PageNo]:
        """Every page of the tree, parents first."""
        if not self.root:
            return
        todo = [(self.root, -1)]
        while todo:
            page, level = todo.pop()
            node, level, count = self._node(page, level)
            yield page
            if level:
                todo += [
                    (_unpack_inner(node, _SLOTS + 16 * slot)[1], level - 1) for slot in range(count)
                ]

    # ------------------------------------------------------------------ inserting

    def insert_extent(self, extent: Extent) -> None:
        """Add an extent; its key must be new."""
        fresh = not self.root
        if fresh:
            self._plant()
        key, _page, _pages = extent
        path, _node, count, _ = self.place(key) if not fresh else self._top()
        page, slot = path[-1]
        if count == MAX_EXTENT_SLOTS:
            page, slot = self._split(path, key)
            count = self._count(page)
        node = self._store.edit(page, MAGIC_TREE)
        at = _SLOTS + EXTENT_BYTES * slot
        end = _SLOTS + EXTENT_BYTES * count
        node[at + EXTENT_BYTES : end + EXTENT_BYTES] = bytes(node[at:end])
        EXTENT.pack_into(node, at, *extent)
        _pack_tree(node, TREE_OFFSET, self.kind, 0, count + 1, PAGE, 0)

    def replace_extent(self, key: int, extent: Extent) -> None:
        """Put another extent in the place of the one at ``key``, order kept."""
        path, found, count, _ = self.place(key)
        page, slot = path[-1]
        if slot >= count or _unpack_extent(found, _SLOTS + EXTENT_BYTES * slot)[0] != key:
            self._bad(page, f"no extent at {key}")
        node = self._store.edit(page, MAGIC_TREE)
        EXTENT.pack_into(node, _SLOTS + EXTENT_BYTES * slot, *extent)

    def insert_item(self, key: int, data: bytes, place: Place | None = None) -> bool:
        """Add an item of at most about 1300 bytes; False, and no change, if the key is taken.

        ``place`` is the key's :meth:`place`, if the tree has not changed since.
        """
        if not self.root:
            self._plant()
            place = self._top()
        path, found, count, _ = place or self.place(key)
        page, slot = path[-1]
        if slot < count and _unpack_item(found, _SLOTS + 16 * slot)[0] == key:
            return False
        _o, _k, _l, _c, heap, garbage = _unpack_node(found, _NODE_OFFSET)
        need = len(data) + 16
        while heap + garbage - _SLOTS - 16 * count < need:
            page, slot = self._split(path, key)
            path, found, count, _ = self.place(key)
            page, slot = path[-1]
            _o, _k, _l, _c, heap, garbage = _unpack_node(found, _NODE_OFFSET)
        node = self._store.edit(page, MAGIC_TREE)
        if heap - _SLOTS - 16 * count < need:
            heap = self._compact(node, count)
            garbage = 0
        heap -= len(data)
        node[heap : heap + len(data)] = data
        at = _SLOTS + 16 * slot
        end = _SLOTS + 16 * count
        if at < end:
            node[at + 16 : end + 16] = bytes(node[at:end])
        ITEM_SLOT.pack_into(node, at, key, heap, len(data), 0)
        _pack_tree(node, TREE_OFFSET, self.kind, 0, count + 1, heap, garbage)
        return True

    def _plant(self) -> None:
        self.root = self._pages.alloc_one()
        node = self._store.new(self.root, MAGIC_TREE, self.owner)
        _pack_tree(node, TREE_OFFSET, self.kind, 0, 0, PAGE, 0)

    def _count(self, page: PageNo) -> int:
        count: int = _unpack_node(self._store.read(page, MAGIC_TREE), _NODE_OFFSET)[3]
        return count

    def _top(self) -> Place:
        """The path of an empty root, which only exists inside a transaction."""
        return [(self.root, 0)], self._store.read(self.root, MAGIC_TREE), 0, _NO_BOUND

    def _compact(self, node: memoryview, count: int) -> int:
        """Push the items of a leaf together at its end; returns the new heap offset."""
        items = []
        for slot in range(count):
            _key, offset, length, _ = _unpack_item(node, _SLOTS + 16 * slot)
            items.append(bytes(node[offset : offset + length]))
        heap = PAGE
        for slot, data in enumerate(items):
            heap -= len(data)
            node[heap : heap + len(data)] = data
            node[_SLOTS + 16 * slot + 8 : _SLOTS + 16 * slot + 10] = heap.to_bytes(2, "little")
        return heap

    def _split(self, path: Path, key: int) -> tuple[PageNo, int]:
        """Split the full node at the end of ``path``; returns leaf and slot for ``key``."""
        page, slot = path[-1]
        _node, level, count = self._node(page, -1)
        # A node filled in ascending order stays full.
        ascending = slot >= count - 1 and (self.kind == TREE_EXTENTS or level)
        half = count - 1 if ascending else count // 2
        right = self._pages.alloc_one()
        left_node = self._store.edit(page, MAGIC_TREE)
        right_node = self._store.new(right, MAGIC_TREE, self.owner)
        size = 16 if level else self._slot
        if level or self.kind == TREE_EXTENTS:
            body = left_node[_SLOTS + half * size : _SLOTS + count * size]
            right_node[_SLOTS : _SLOTS + len(body)] = body
            _pack_tree(right_node, TREE_OFFSET, self.kind, level, count - half, PAGE, 0)
            _pack_tree(left_node, TREE_OFFSET, self.kind, level, half, PAGE, 0)
        else:
            self._move_items(left_node, half, count, right_node, 0)
        first_right = self._keys(right_node, level, 1)[0]
        self._link(path[:-1], page, first_right, right, level)
        if level:
            return right, 0
        if key >= first_right:
            right_count = count - half
            return right, bisect_left(self._keys(right_node, 0, right_count), key)
        return page, slot

    def _move_items(
        self, source: memoryview, start: int, count: int, target: memoryview, have: int
    ) -> None:
        """Move items start..count-1 of one leaf behind the ``have`` ones of another."""
        heap = PAGE if not have else _unpack_node(target, _NODE_OFFSET)[4]
        for slot in range(start, count):
            key, offset, length, _ = _unpack_item(source, _SLOTS + 16 * slot)
            heap -= length
            target[heap : heap + length] = source[offset : offset + length]
            ITEM_SLOT.pack_into(target, _SLOTS + 16 * have, key, heap, length, 0)
            have += 1
        _pack_tree(target, TREE_OFFSET, self.kind, 0, have, heap, 0)
        if start:
            kept = self._compact(source, start)
            _pack_tree(source, TREE_OFFSET, self.kind, 0, start, kept, 0)

    def _link(self, path: Path, left: PageNo, key: int, right: PageNo, level: int) -> None:
        """Enter a new right neighbour of ``left`` into the level above."""
        if not path:
            root = self._pages.alloc_one()
            node = self._store.new(root, MAGIC_TREE, self.owner)
            first = self._keys(self._store.read(left, MAGIC_TREE), level, 1)[0]
            INNER_SLOT.pack_into(node, _SLOTS, first, left)
            INNER_SLOT.pack_into(node, _SLOTS + 16, key, right)
            _pack_tree(node, TREE_OFFSET, self.kind, level + 1, 2, PAGE, 0)
            self.root = root
            return
        page, slot = path[-1]
        count = self._count(page)
        if count == MAX_INNER_SLOTS:
            self._split(path, key)
            page, slot = self._parent_of(left, key, level)
            count = self._count(page)
        node = self._store.edit(page, MAGIC_TREE)
        if not slot and _unpack_inner(node, _SLOTS)[0] >= key:
            # Lower keys than the first slot's came to its child: now they need a lower one there.
            first = self._keys(self._store.read(left, MAGIC_TREE), level, 1)[0]
            INNER_SLOT.pack_into(node, _SLOTS, first, left)
        at = _SLOTS + 16 * (slot + 1)
        end = _SLOTS + 16 * count
        if at < end:
            node[at + 16 : end + 16] = bytes(node[at:end])
        INNER_SLOT.pack_into(node, at, key, right)
        _pack_tree(node, TREE_OFFSET, self.kind, level + 1, count + 1, PAGE, 0)

    def _parent_of(self, child: PageNo, key: int, level: int) -> tuple[PageNo, int]:
        """The inner node that holds ``child`` of ``level``, and the slot, after a split above."""
        page = self.root
        below = -1
        while True:
            node, below, count = self._node(page, below)
            slot = max(bisect_right(self._keys(node, below, count), key) - 1, 0)
            target = _unpack_inner(node, _SLOTS + 16 * slot)[1]
            if below == level + 1:
                if target != child:
                    self._bad(page, f"lost child {child}")
                return page, slot
            page = target
            below -= 1

    # ------------------------------------------------------------------ removing

    def remove(self, key: int, place: Place | None = None) -> None:
        """Take out the item or extent at ``key``; ``place`` as in :meth:`insert_item`.

        :raises CorruptionError: there is none.
        """
        path, found, count, _ = place or self.place(key)
        page, slot = path[-1]
        if slot >= count or self._keys(found, 0, count)[slot] != key:
            self._bad(page, f"no key {key:#x}")
        if count == 1:
            self._unlink(path)
            return
        node = self._store.edit(page, MAGIC_TREE)
        _o, _k, _l, _c, heap, garbage = _unpack_node(node, _NODE_OFFSET)
        size = self._slot
        if self.kind != TREE_EXTENTS:
            _key, offset, length, _ = _unpack_item(node, _SLOTS + 16 * slot)
            if offset == heap:
                heap += length
            else:
                garbage += length
        at = _SLOTS + size * slot
        end = _SLOTS + size * count
        node[at : end - size] = bytes(node[at + size : end])
        _pack_tree(node, TREE_OFFSET, self.kind, 0, count - 1, heap, garbage)
        if len(path) > 1 and self._in_use(node, 0, count - 1) < _MERGE_BELOW:
            self._merge(path)

    def _in_use(self, node: memoryview, level: int, count: int) -> int:
        if level:
            return 16 * count
        _o, _k, _l, _c, heap, garbage = _unpack_node(node, _NODE_OFFSET)
        return self._slot * count + PAGE - int(heap) - int(garbage)

    def _unlink(self, path: Path) -> None:
        """Free the node at the end of ``path`` and take it out of its parent."""
        page, _ = path[-1]
        self._pages.free(page)
        if len(path) == 1:
            self.root = NO_PAGE
            return
        self._cut(path[:-1])

    def _cut(self, path: Path) -> None:
        """Take the slot at the end of ``path`` out of its inner node."""
        page, slot = path[-1]
        count = self._count(page)
        if count == 1:
            self._unlink(path)
            return
        node = self._store.edit(page, MAGIC_TREE)
        at = _SLOTS + 16 * slot
        end = _SLOTS + 16 * count
        node[at : end - 16] = bytes(node[at + 16 : end])
        level = node[TREE_OFFSET + 1]
        _pack_tree(node, TREE_OFFSET, self.kind, level, count - 1, PAGE, 0)
        if len(path) == 1:
            self._lower_root()
        elif 16 * (count - 1) < _MERGE_BELOW:
            self._merge(path)

    def _lower_root(self) -> None:
        """A root with a single child is the child's to be."""
        while True:
            node, level, count = self._node(self.root, -1)
            if not level or count > 1:
                return
            child = _unpack_inner(node, _SLOTS)[1]
            self._pages.free(self.root)
            self.root = child

    def _merge(self, path: Path) -> None:
        """Join the sparse node at the end of ``path`` with a neighbour if both fit well."""
        parent, slot = path[-2]
        count = self._count(parent)
        for left_slot in (slot, slot - 1):
            if left_slot < 0 or left_slot + 1 >= count:
                continue
            node = self._store.read(parent, MAGIC_TREE)
            left = _unpack_inner(node, _SLOTS + 16 * left_slot)[1]
            bound, right = _unpack_inner(node, _SLOTS + 16 * (left_slot + 1))
            if self._join(left, right, bound):
                self._pages.free(right)
                self._cut([*path[:-2], (parent, left_slot + 1)])
                return

    def _join(self, left: PageNo, right: PageNo, bound: int) -> bool:
        """Move what is in ``right``, all of it >= ``bound``, into ``left`` if that leaves room."""
        left_node, level, left_count = self._node(left, -1)
        right_node, _, right_count = self._node(right, level)
        used = self._in_use(left_node, level, left_count)
        if used + self._in_use(right_node, level, right_count) > _MERGE_UP_TO:
            return False
        target = self._store.edit(left, MAGIC_TREE)
        total = left_count + right_count
        if level or self.kind == TREE_EXTENTS:
            size = 16 if level else self._slot
            at = _SLOTS + size * left_count
            body = right_node[_SLOTS : _SLOTS + size * right_count]
            target[at : at + len(body)] = body
            if level:
                # No longer a first slot: its child may hold keys below the slot's.
                target[at : at + 8] = bound.to_bytes(8, "little")
            _pack_tree(target, TREE_OFFSET, self.kind, level, total, PAGE, 0)
        else:
            heap = self._compact(target, left_count)
            _pack_tree(target, TREE_OFFSET, self.kind, 0, left_count, heap, 0)
            self._move_items(right_node, 0, right_count, target, left_count)
        return True

    def destroy(self) -> None:
        """Free every node (not what the items refer to)."""
        for page in list(self.pages()):
            self._pages.free(page)
        self.root = NO_PAGE
