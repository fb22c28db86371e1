"""Pass 3: the trees of each inode: names, extended attributes, and the nodes of extent trees.

Every node is claimed here, before any file data: a node says whose it is, an extent does not. Kept
for later: how many names each inode has and where, what directories lose or get, the extents of
files that have a tree.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs import layout
from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.context import Context, Dangling, DirectoryFix, Slot, TreeId, TreeParts
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.structures import (
    T_DIR,
    T_REG,
    Attribute,
    ItemSlot,
    check_items,
    extent_slots,
    has_tree,
    item_slots,
    name_fault,
    parse_attribute,
    parse_inode,
)
from pkernfs.fs.fsck.table import overflow_chain
from pkernfs.fs.fsck.trees import Leaf, check_keys, items_fault, parts_of, walk
from pkernfs.layout import (
    COLLISION_BITS,
    INODE_FLAG_BODY,
    NAME_ITEM,
    NO_INO,
    SLOTS_PER_INODE_PAGE,
    TREE_EXTENTS,
    TREE_NAMES,
    TREE_XATTRS,
    inos_of,
    name_key,
)
from pkernfs.quantities import Ino, PageNo

_HEAD = NAME_ITEM.size


def check_trees(ctx: Context) -> None:
    """Walk every tree of every inode."""
    for index, page in ctx.load_inode_pages():
        row = ctx.inodes.row_of[index]
        inos = inos_of(index)
        for slot in range(1, SLOTS_PER_INODE_PAGE):
            kind = ctx.inodes.type[row + slot]
            if not kind or not has_tree(page, slot):
                continue
            fields = parse_inode(page, slot)
            ino = inos[slot]
            if fields.xattr_root:
                _walk_attributes(ctx, ino, fields.xattr_root)
            if fields.flags & INODE_FLAG_BODY:
                if kind == T_DIR:
                    _walk_names(ctx, ino, fields.body)
                elif kind == T_REG:
                    _walk_extents(ctx, ino, fields.body)


def _parts(ctx: Context, ino: Ino, kind: int) -> TreeParts:
    """To be filled by a walk; kept if the tree turns out to have a fault."""
    parts = ctx.trees[TreeId(ino, kind)] = TreeParts()
    return parts


def _keep_if_faulty(ctx: Context, ino: Ino, kind: int) -> None:
    tree = TreeId(ino, kind)
    if not ctx.trees[tree].faulty:
        del ctx.trees[tree]


def _walk_extents(ctx: Context, ino: Ino, root: PageNo) -> None:
    parts = _parts(ctx, ino, TREE_EXTENTS)
    found = ctx.tree_extents[ino] = array("Q")
    for leaf in walk(ctx, root, ino, TREE_EXTENTS, parts):
        extents = extent_slots(leaf.buffer, leaf.node)
        check_keys(ctx, leaf, ino, parts, [e.file_page for e in extents])
        for extent in extents:
            found.extend(extent)
    _keep_if_faulty(ctx, ino, TREE_EXTENTS)


# ------------------------------------------------------------------------------ names


def _walk_names(ctx: Context, ino: Ino, root: PageNo) -> None:
    parts = _parts(ctx, ino, TREE_NAMES)
    group = Group()
    for leaf in walk(ctx, root, ino, TREE_NAMES, parts):
        slots = item_slots(leaf.buffer, leaf.node)
        check_keys(ctx, leaf, ino, parts, [s.key for s in slots])
        scan_names(ctx, ino, leaf, slots, group, parts)
    if group.moved or parts.faulty:
        drop_duplicates(ctx, ino, parts)
    _keep_if_faulty(ctx, ino, TREE_NAMES)


class Group:
    """Names that share a hash, of which no two may be the same."""

    def __init__(self) -> None:
        self.hash = -1
        self.names: list[bytes] = []
        self.moved = False

    def repeats(self, base: int, name: bytes) -> bool:
        """Tell if the name was there before, and remember it."""
        if base != self.hash:
            self.hash = base
            self.names = [name]
            return False
        if name in self.names:
            return True
        self.names.append(name)
        return False


def scan_names(
    ctx: Context,
    ino: Ino,
    leaf: Leaf,
    slots: list[ItemSlot],
    group: Group,
    parts: TreeParts,
) -> None:
    """Check the names in a leaf of directory ``ino`` and count them for the inodes they name."""
    page, buffer, node, _, _ = leaf
    good, reason = check_items(slots, node)
    if reason:
        items_fault(ctx, leaf, ino, parts, reason)
    hash_key = ctx.sb.fields.hash_key
    unpack = NAME_ITEM.unpack_from
    dropped = ctx.directories[ino].drop if ino in ctx.directories else ()
    for i, (key, offset, length, _) in enumerate(slots):
        if not good[i] or (page, i) in dropped:
            fix_of(ctx, ino).drop.add(Slot(page, i))
            continue
        name = bytes(buffer[offset + _HEAD : offset + length])
        reason = name_fault(name)
        if reason:
            ctx.report.add(Code.NAME_BAD, ctx.file(ino), name=repr(name), reason=reason)
            fix_of(ctx, ino).drop.add(Slot(page, i))
            continue
        base = name_key(name, hash_key)
        if base >> COLLISION_BITS != key >> COLLISION_BITS:
            ctx.report.add(Code.NAME_KEY, ctx.file(ino), name=repr(name), got=key, expected=base)
            group.moved = True
            fix_of(ctx, ino)
        elif group.repeats(base, name):
            ctx.report.add(Code.NAME_DUPLICATE, ctx.file(ino), name=repr(name))
            fix_of(ctx, ino).drop.add(Slot(page, i))
            continue
        target, kind = unpack(buffer, offset)
        count_name(ctx, ino, page, i, name, target, kind)


def fix_of(ctx: Context, ino: Ino) -> DirectoryFix:
    """Return the changes of a directory, to be added to."""
    fix = ctx.directories.get(ino)
    if fix is None:
        fix = ctx.directories[ino] = DirectoryFix()
    return fix


def count_name(
    ctx: Context, ino: Ino, leaf: PageNo, place: int, name: bytes, target: Ino, kind: int
) -> None:
    """Count a name for the inode it names; note it if there is none (yet).

    ``leaf`` and ``place`` are its :class:`Slot`, which is made only where it is kept.
    """
    inodes = ctx.inodes
    row = inodes.row(target)
    if row < 0:
        ctx.dangling.append(Dangling(ino, Slot(leaf, place), target, kind, name))
        return
    expected = inodes.type[row]
    if expected == T_DIR:
        if inodes.names[row] or target in (ino, layout.ROOT_INO):
            ctx.report.add(Code.NAME_SECOND, ctx.file(ino), name=repr(name), got=target)
            fix_of(ctx, ino).drop.add(Slot(leaf, place))
            return
        inodes.parent[row] = ino
        inodes.subdirs[inodes.row(ino)] += 1
    if kind != expected:
        ctx.report.add(Code.NAME_TYPE, ctx.file(ino), name=repr(name), got=kind, expected=expected)
        fix_of(ctx, ino).retype[Slot(leaf, place)] = expected
    inodes.names[row] += 1
    inodes.entries[inodes.row(ino)] += 1


def drop_duplicates(ctx: Context, ino: Ino, parts: TreeParts) -> None:
    """Names that are not where their hash says may be there twice: keep the first of each."""
    fix = fix_of(ctx, ino)
    seen: set[bytes] = set()
    unresolved = {d.slot for d in ctx.dangling if d.directory == ino}
    for entry in entries_of(ctx, ino, parts):
        if entry.slot in fix.drop:
            continue
        if entry.name not in seen:
            seen.add(entry.name)
            continue
        ctx.report.add(Code.NAME_DUPLICATE, ctx.file(ino), name=repr(entry.name))
        fix.drop.add(entry.slot)
        if entry.slot not in unresolved:
            uncount_name(ctx, ino, entry.target)


def uncount_name(ctx: Context, ino: Ino, target: Ino) -> None:
    """A name that was counted goes."""
    row = ctx.inodes.row(target)
    ctx.inodes.names[row] -= 1
    ctx.inodes.entries[ctx.inodes.row(ino)] -= 1
    if ctx.inodes.type[row] == T_DIR:
        ctx.inodes.subdirs[ctx.inodes.row(ino)] -= 1
        ctx.inodes.parent[row] = NO_INO


class Entry(NamedTuple):
    """An entry of a directory."""

    slot: Slot
    key: int
    target: Ino
    kind: int
    name: bytes


def entries_of(ctx: Context, ino: Ino, parts: TreeParts | None = None) -> list[Entry]:
    """List the entries of a directory; broken items are left out."""
    if parts is None:
        body = ctx.fields(ino).body
        parts = parts_of(ctx, body, ino, TREE_NAMES)
    drop = ctx.directories[ino].drop if ino in ctx.directories else set()
    found: list[Entry] = []
    for slot, key, item in _items_left(ctx, parts, drop):
        target, kind = NAME_ITEM.unpack_from(item)
        found.append(Entry(slot, key, target, kind, item[_HEAD:]))
    return found


class _ItemLeft(NamedTuple):
    """An item that stays, where it is, and its key."""

    slot: Slot
    key: int
    item: bytes


def _items_left(ctx: Context, parts: TreeParts, drop: set[Slot]) -> Iterator[_ItemLeft]:
    """The items in a tree's leaves, but for the slots to drop."""
    for page in parts.leaves:
        buffer = ctx.image.raw(page)
        count = layout.TREE.unpack_from(buffer, layout.TREE_OFFSET)[2]
        for i in range(count):
            slot = Slot(page, i)
            if slot in drop:
                continue
            key, offset, length, _ = layout.ITEM_SLOT.unpack_from(
                buffer, layout.TREE_SLOTS_OFFSET + 16 * i
            )
            yield _ItemLeft(slot, key, bytes(buffer[offset : offset + length]))


# ------------------------------------------------------------------------------ attributes


def _walk_attributes(ctx: Context, ino: Ino, root: PageNo) -> None:
    parts = _parts(ctx, ino, TREE_XATTRS)
    names: dict[bytes, int] = {}
    for leaf in walk(ctx, root, ino, TREE_XATTRS, parts):
        slots = item_slots(leaf.buffer, leaf.node)
        check_keys(ctx, leaf, ino, parts, [s.key for s in slots])
        scan_attributes(ctx, ino, leaf, slots, names, parts)
    if parts.lost:
        ctx.attribute_names[ino] = list(names)
    _keep_if_faulty(ctx, ino, TREE_XATTRS)


def scan_attributes(
    ctx: Context,
    ino: Ino,
    leaf: Leaf,
    slots: list[ItemSlot],
    names: dict[bytes, int],
    parts: TreeParts,
) -> None:
    """Check the attributes in a leaf and claim the pages of long values."""
    good, reason = check_items(slots, leaf.node)
    if reason:
        items_fault(ctx, leaf, ino, parts, reason)
    for i, (key, offset, length, _) in enumerate(slots):
        if (leaf.page, i) in ctx.attributes.get(ino, ()):
            continue
        item = bytes(leaf.buffer[offset : offset + length])
        if not good[i] or not _attribute(ctx, ino, key, item, names):
            ctx.attributes.setdefault(ino, set()).add(Slot(leaf.page, i))


def _attribute(ctx: Context, ino: Ino, key: int, item: bytes, names: dict[bytes, int]) -> bool:
    """Check one attribute; False if it is to go."""
    where = ctx.file(ino)
    try:
        found = parse_attribute(item)
    except CorruptionError as e:
        ctx.report.add(Code.XATTR_BAD, where, reason=str(e))
        return False
    name = repr(found.name)
    if found.name in names:
        ctx.report.add(Code.XATTR_DUPLICATE, where, name=name)
        return False
    if name_key(found.name, ctx.sb.fields.hash_key) >> COLLISION_BITS != key >> COLLISION_BITS:
        ctx.report.add(Code.XATTR_KEY, where, name=name, got=key)
        ctx.attributes.setdefault(ino, set())
    if not _claim_value(ctx, ino, found):
        return False
    names[found.name] = key
    return True


def _claim_value(ctx: Context, ino: Ino, found: Attribute) -> bool:
    if not found.page:
        return True
    try:
        overflow_chain(ctx, found.page, ino, found.value_bytes)
    except CorruptionError as e:
        ctx.report.add(Code.XATTR_VALUE, ctx.file(ino), name=repr(found.name), reason=str(e))
        return False
    return True


def attributes_of(ctx: Context, ino: Ino, parts: TreeParts) -> list[bytes]:
    """The items of the attributes that stay."""
    drop = ctx.attributes.get(ino, set())
    return [left.item for left in _items_left(ctx, parts, drop)]
