"""Walking the trees of the format, and building new ones (docs/format.md, section 7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import lt
from typing import NamedTuple

from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.claims import ALL_PAGES, CARVED, FREE
from pkernfs.fs.fsck.context import KEY_END, Context, KeyRange, TreeId, TreeParts, at
from pkernfs.fs.fsck.image import Buffer
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.structures import InnerSlot, Node, inner_slots, parse_node
from pkernfs.layout import (
    EXTENT,
    INNER_SLOT,
    ITEM_SLOT,
    MAGIC_TREE,
    MAX_EXTENT_SLOTS,
    MAX_INNER_SLOTS,
    NO_PAGE,
    PAGE,
    PAGES_PER_BLOCK,
    TREE,
    TREE_EXTENTS,
    TREE_OFFSET,
    TREE_SEGMENTS,
    TREE_SLOTS_OFFSET,
    Extent,
    block_of,
)
from pkernfs.quantities import BlockNo, Ino, PageNo, PageRun


class Leaf(NamedTuple):
    """A leaf of a tree, and the keys that may be in it: ``low`` <= key < ``end``."""

    page: PageNo
    buffer: Buffer
    node: Node
    low: int
    end: int


def walk(ctx: Context, root: PageNo, owner: Ino, kind: int, parts: TreeParts) -> Iterator[Leaf]:
    """Claim every node and yield the leaves.

    Faults are reported and noted in ``parts``; what is below a node that cannot be used is in
    ``parts.lost``. No page is visited twice, so this ends whatever the region holds.
    """
    todo = [(root, -1, 0, KEY_END)]
    while todo:
        page, level, low, end = todo.pop()
        try:
            buffer, node = _node(ctx, page, owner, kind, level)
        except CorruptionError as e:
            _fault(ctx, Code.TREE_NODE, page, TreeId(owner, kind), parts, str(e))
            parts.lost.append(KeyRange(low, end))
            continue
        parts.nodes.append(page)
        if not node.level:
            parts.leaves.append(page)
            yield Leaf(page, buffer, node, low, end)
            continue
        slots = inner_slots(buffer, node)
        keys = [key for key, _ in slots]
        if not all(map(lt, keys, keys[1:])) or keys[-1] >= end or (level >= 0 and keys[0] < low):
            tree = TreeId(owner, kind)
            _fault(ctx, Code.TREE_SHAPE, page, tree, parts, "keys out of order")
            # The bounds are worth nothing: each child may hold any key.
            todo += [(child, node.level - 1, low, end) for _, child in reversed(slots)]
            continue
        ends = [*keys[1:], end]
        lows = [low, *keys[1:]]
        todo += [
            (slots[i].page, node.level - 1, lows[i], ends[i]) for i in range(len(slots) - 1, -1, -1)
        ]


def _node(ctx: Context, page: PageNo, owner: Ino, kind: int, level: int) -> tuple[Buffer, Node]:
    buffer = ctx.image.load(page, MAGIC_TREE)
    node = parse_node(buffer, owner, kind)
    if level >= 0 and node.level != level:
        raise CorruptionError(f"bad level: got {node.level}, expected {level}")
    if not ctx.claims.claim_meta(page):
        raise CorruptionError("reached twice, or where no tree can be")
    return buffer, node


def _fault(
    ctx: Context, code: Code, page: PageNo, tree: TreeId, parts: TreeParts, reason: str
) -> None:
    parts.faulty = True
    ctx.report.add(code, node_at(page, tree), reason=reason)


def node_at(page: PageNo, tree: TreeId) -> str:
    """A node of a tree, as messages show it."""
    table = "table of segments" if tree.kind == TREE_SEGMENTS else "inode table"
    of = f"inode {tree.owner}" if tree.owner else f"the {table}"
    return f"tree node at {at(page)} of {of}"


def shape_fault(ctx: Context, leaf: Leaf, owner: Ino, parts: TreeParts, reason: str) -> None:
    """Report a leaf whose slots are not as they must be; the tree will be built anew."""
    _fault(ctx, Code.TREE_SHAPE, leaf.page, TreeId(owner, leaf.node.kind), parts, reason)


def items_fault(ctx: Context, leaf: Leaf, owner: Ino, parts: TreeParts, reason: str) -> None:
    """Report a leaf whose items are not as they must be; the tree will be built anew."""
    _fault(ctx, Code.TREE_ITEMS, leaf.page, TreeId(owner, leaf.node.kind), parts, reason)


def key_fault(keys: Sequence[int], low: int, end: int) -> str:
    """Return why these are not keys of a leaf for ``low`` <= key < ``end``; ``""`` if they are."""
    if not all(map(lt, keys, keys[1:])):
        return "keys out of order"
    if keys[0] < low or keys[-1] >= end:
        return (
            f"keys out of bounds: got {keys[0]:#x}..{keys[-1]:#x}, expected {low:#x}..{end - 1:#x}"
        )
    return ""


def check_keys(ctx: Context, leaf: Leaf, owner: Ino, parts: TreeParts, keys: Sequence[int]) -> None:
    """Report a leaf whose keys are out of order or beyond its bounds."""
    fault = key_fault(keys, leaf.low, leaf.end)
    if fault:
        shape_fault(ctx, leaf, owner, parts, fault)


def parts_of(ctx: Context, root: PageNo, owner: Ino, kind: int) -> TreeParts:
    """The nodes of a tree that was walked before."""
    known = ctx.trees.get(TreeId(owner, kind))
    if known is not None:
        return known
    parts = TreeParts()
    todo = [root] if root else []
    while todo:
        page = todo.pop()
        buffer = ctx.image.raw(page)
        node = parse_node(buffer, owner, kind)
        parts.nodes.append(page)
        if node.level:
            todo += [child for _, child in reversed(inner_slots(buffer, node))]
        else:
            parts.leaves.append(page)
    return parts


def release(ctx: Context, parts: TreeParts) -> None:
    """The tree's nodes are free once the repair is stored."""
    ctx.released_pages += [PageRun(page, 1) for page in parts.nodes]


# ------------------------------------------------------------------------------ space for new pages


class NoRoomError(Exception):
    """A repair finds no space: what it is for stays as it is, or loses what was damaged."""


class Allocator:
    """New pages and blocks, from what neither the walk nor the maps have seen in use.

    Blocks that the map says are in use although nothing refers to them are taken last: they may
    be all that is left of a file.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._open: list[BlockNo] | None = None
        self._next_block = 0
        self._careful = True
        self._fresh: set[BlockNo] = set()

    def page(self) -> PageNo:
        """One page for metadata.

        :raises NoRoomError: there is none.
        """
        page = self._take()
        self._ctx.claims.meta[block_of(page)] |= 1 << page % PAGES_PER_BLOCK
        return page

    def data_page(self) -> PageNo:
        """One page for file data.

        :raises NoRoomError: there is none.
        """
        return self._take()

    def _take(self) -> PageNo:
        claims = self._ctx.claims
        while True:
            page = self._in_carved()
            if page is not None:
                return page
            careful = self._careful
            try:
                block = self._block()
            except NoRoomError:
                if not careful:
                    raise
                self._open = None  # now also what is marked, but used by nothing
                continue
            claims.carve(block)
            self._fresh.add(block)
            self._open = [block]

    def _in_carved(self) -> PageNo | None:
        claims = self._ctx.claims
        if self._open is None:
            self._open = [b for b, used in claims.pages.items() if ~used & ALL_PAGES]
        while self._open:
            block = self._open[-1]
            free = ALL_PAGES & ~claims.pages[block]
            if self._careful and block not in self._fresh:
                free &= ~(self._ctx.page_map(block) or 0)
            if free and claims.kind[block] == CARVED:
                bit = (free & -free).bit_length() - 1
                claims.pages[block] |= 1 << bit
                return PageNo(block * PAGES_PER_BLOCK + bit)
            self._open.pop()
        return None

    def block(self) -> BlockNo:
        """One block, for file data as a whole.

        :raises NoRoomError: there is none.
        """
        block = self._block()
        self._ctx.claims.claim_block(block)
        return block

    def _block(self) -> BlockNo:
        ctx = self._ctx
        while True:
            block = ctx.claims.kind.find(FREE, self._next_block)
            if block < 0:
                if not self._careful:
                    raise NoRoomError
                self._careful = False
                self._next_block = 0
                continue
            self._next_block = block + 1
            if not (self._careful and ctx.map_used[block]):
                taken = BlockNo(block)
                ctx.taken_blocks.append(taken)
                return taken

    def give_back(self, page: PageNo) -> None:
        """A page that was taken is not needed."""
        self._ctx.claims.release_pages(page)
        self._open = None


# ------------------------------------------------------------------------------ building


def build_extents(
    ctx: Context, space: Allocator, owner: Ino, extents: list[Extent], old: TreeParts
) -> PageNo:
    """A new tree of kind 1; returns its root.

    Without space for it, it takes the place of the ``old`` one.

    :raises NoRoomError: not even that is enough; nothing was built.
    """
    batches = [extents[i : i + MAX_EXTENT_SLOTS] for i in range(0, len(extents), MAX_EXTENT_SLOTS)]
    nodes = _Nodes(ctx, space, owner, TREE_EXTENTS, len(batches), old)
    level: list[InnerSlot] = []
    for batch in batches:
        page, node = nodes.make()
        TREE.pack_into(node, TREE_OFFSET, TREE_EXTENTS, 0, len(batch), PAGE, 0)
        body = b"".join([EXTENT.pack(*e) for e in batch])
        node[TREE_SLOTS_OFFSET : TREE_SLOTS_OFFSET + len(body)] = body
        level.append(InnerSlot(batch[0].file_page, page))
    return nodes.join(level)


def build_items(
    ctx: Context, space: Allocator, owner: Ino, kind: int, items: dict[int, bytes], old: TreeParts
) -> PageNo:
    """A new tree of kind 2, 3 or 4 from ``{key: item}``; returns its root, no page for no items.

    Without space for it, it takes the place of the ``old`` one.

    :raises NoRoomError: not even that is enough; nothing was built.
    """
    if not items:
        return NO_PAGE
    batches: list[list[tuple[int, bytes]]] = []
    room = 0
    for key, item in sorted(items.items()):
        need = ITEM_SLOT.size + len(item)
        if need > room:
            batches.append([])
            room = PAGE - TREE_SLOTS_OFFSET
        room -= need
        batches[-1].append((key, item))
    nodes = _Nodes(ctx, space, owner, kind, len(batches), old)
    level: list[InnerSlot] = []
    for batch in batches:
        page, node = nodes.make()
        heap = PAGE
        for i, (key, item) in enumerate(batch):
            heap -= len(item)
            node[heap : heap + len(item)] = item
            ITEM_SLOT.pack_into(node, TREE_SLOTS_OFFSET + 16 * i, key, heap, len(item), 0)
        TREE.pack_into(node, TREE_OFFSET, kind, 0, len(batch), heap, 0)
        level.append(InnerSlot(batch[0][0], page))
    return nodes.join(level)


class _NewNode(NamedTuple):
    """A node to be filled: its page, and the image of it."""

    page: PageNo
    image: bytearray


class _NodePage(NamedTuple):
    """A page for a node. ``fresh``: nothing in the region refers to it."""

    page: PageNo
    fresh: bool


class _Nodes:
    """The nodes of a new tree, of which there are enough or none."""

    def __init__(
        self, ctx: Context, space: Allocator, owner: Ino, kind: int, leaves: int, old: TreeParts
    ) -> None:
        self._ctx = ctx
        self._owner = owner
        self._kind = kind
        total = width = leaves
        while width > 1:
            width = -(-width // MAX_INNER_SLOTS)
            total += width
        self._pages: list[_NodePage] = []
        spare = list(old.nodes)
        try:
            while len(self._pages) < total:
                self._pages.append(_NodePage(space.page(), True))
        except NoRoomError:
            if len(spare) < total - len(self._pages):
                for page, _ in self._pages:
                    space.give_back(page)
                raise
            while len(self._pages) < total:
                self._pages.append(_NodePage(spare.pop(), False))
            old.nodes = spare

    def make(self) -> _NewNode:
        """The next one."""
        page, fresh = self._pages.pop()
        return _NewNode(page, self._ctx.image.make(page, MAGIC_TREE, self._owner, fresh=fresh))

    def join(self, level: list[InnerSlot]) -> PageNo:
        """Build the levels above the leaves, given as slots that lead to them; the root."""
        height = 0
        while len(level) > 1:
            height += 1
            above: list[InnerSlot] = []
            for i in range(0, len(level), MAX_INNER_SLOTS):
                batch = level[i : i + MAX_INNER_SLOTS]
                page, node = self.make()
                TREE.pack_into(node, TREE_OFFSET, self._kind, height, len(batch), PAGE, 0)
                for j, slot in enumerate(batch):
                    INNER_SLOT.pack_into(node, TREE_SLOTS_OFFSET + 16 * j, *slot)
                above.append(InnerSlot(batch[0].key, page))
            level = above
        return level[0].page
