"""Pass 7: find the leaves that damaged nodes and lost inodes led to.

Leaves of trees say whose they are. Where a node above them or the inode itself was lost, they are
searched for in all carved blocks, and claimed if a page map marks them as in use. After the maps
and the counts are compared they are put back: names and extents under the file's own number, so
that its name still leads to it.
"""

from __future__ import annotations

import time

from pkernfs import layout
from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.context import EVERY_KEY, Context, KeyRange, Slot, TreeId, TreeParts
from pkernfs.fs.fsck.data import check_tail, claim_found
from pkernfs.fs.fsck.names import (
    Group,
    count_name,
    drop_duplicates,
    fix_of,
    scan_attributes,
    scan_names,
)
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.structures import (
    T_DIR,
    T_REG,
    extent_slots,
    item_slots,
    parse_inode_page,
    parse_node,
)
from pkernfs.fs.fsck.table import new_inode_page
from pkernfs.fs.fsck.trees import Allocator, Leaf, node_at, parts_of
from pkernfs.layout import (
    HEADER,
    INODE,
    INODE_BYTES,
    INODE_FLAG_BODY,
    IOMMU_INO,
    MAGIC_TREE,
    NO_INO,
    NO_PAGE,
    PAGE,
    ROOT_INO,
    TREE_EXTENTS,
    TREE_NAMES,
    TREE_OFFSET,
    TREE_XATTRS,
    Extent,
    InodeFields,
    inos_of,
)
from pkernfs.quantities import Ino, PageNo, PageRun


def find_leaves(ctx: Context) -> None:
    """Claim the leaves of damaged trees and lost inodes, and the data that their extents name."""
    if not (ctx.lost_indexes or ctx.lost_inos or any(p.lost for p in ctx.trees.values())):
        return
    for number in list(ctx.find_pages(MAGIC_TREE)):
        try:
            page = ctx.image.load(number, MAGIC_TREE)
        except CorruptionError:
            continue
        owner = HEADER.unpack_from(page)[3]
        kind, level = page[TREE_OFFSET], page[TREE_OFFSET + 1]
        if level or not _wanted(ctx, owner, kind):
            continue
        try:
            parse_node(page, owner, kind)
        except CorruptionError:
            continue
        if ctx.claims.claim_meta(number):
            ctx.found_leaves.setdefault(TreeId(owner, kind), []).append(number)
    for (owner, kind), numbers in ctx.found_leaves.items():
        if kind == TREE_EXTENTS and ctx.inodes.type_of(owner) in (0, T_REG):
            _take_extents(ctx, owner, numbers)


def _wanted(ctx: Context, owner: Ino, kind: int) -> bool:
    if ctx.inodes.row(owner) >= 0:
        parts = ctx.trees.get(TreeId(owner, kind))
        return parts is not None and bool(parts.lost)
    if kind not in (TREE_EXTENTS, TREE_NAMES) or not owner & 15:
        return False
    return owner >> 4 in ctx.lost_indexes or owner in ctx.lost_inos


def _lost_ranges(ctx: Context, owner: Ino, kind: int) -> list[KeyRange]:
    parts = ctx.trees.get(TreeId(owner, kind))
    return parts.lost if parts is not None else [EVERY_KEY]


def _is_in(key: int, ranges: list[KeyRange]) -> bool:
    return any(low <= key < end for low, end in ranges)


def _take_extents(ctx: Context, owner: Ino, numbers: list[PageNo]) -> None:
    ranges = _lost_ranges(ctx, owner, TREE_EXTENTS)
    have = {e.file_page for e in ctx.extents.get(owner, [])}
    found: list[Extent] = []
    for number in numbers:
        page = ctx.image.raw(number)
        extents = [
            e
            for e in extent_slots(page, parse_node(page, owner, TREE_EXTENTS))
            if _is_in(e.file_page, ranges) and e.file_page not in have
        ]
        have |= {e.file_page for e in extents}
        found += extents
        _report_leaf(ctx, owner, number, len(extents))
    claim_found(ctx, owner, found)
    if ctx.inodes.row(owner) >= 0:
        check_tail(ctx, owner, ctx.fields(owner).size, ctx.extents[owner])


def _report_leaf(ctx: Context, owner: Ino, number: PageNo, count: int) -> None:
    tree = TreeId(owner, ctx.image.raw(number)[TREE_OFFSET])
    ctx.report.add(Code.TREE_LEAF_FOUND, node_at(number, tree), count=count)


# ------------------------------------------------------------------------------ putting back


def fill_gaps(ctx: Context, space: Allocator) -> None:
    """Empty inode pages where the table misses some, so that its numbers go through again."""
    if not ctx.inodes.page_of:
        ctx.lost_indexes.add(0)
    for index in sorted(ctx.lost_indexes - ctx.inodes.page_of.keys()):
        number = space.page()
        new_inode_page(ctx, index, number, fresh=True)
        ctx.inodes.add_page(index, number)
        ctx.rebuild_table = True


def put_back(ctx: Context) -> None:
    """Give the leaves found back to their inodes, made anew where they were lost."""
    owners = sorted({owner for owner, _ in ctx.found_leaves})
    made = [owner for owner in owners if ctx.inodes.row(owner) < 0 and _remake(ctx, owner)]
    for owner in owners:
        kind = ctx.inodes.type_of(owner)
        if kind == T_DIR:
            _put_names(ctx, owner, ctx.found_leaves.get(TreeId(owner, TREE_NAMES), []))
        attributes = ctx.found_leaves.get(TreeId(owner, TREE_XATTRS))
        if attributes and owner not in made:
            _put_attributes(ctx, owner, attributes)
    for numbers in ctx.found_leaves.values():
        ctx.released_pages += [PageRun(number, 1) for number in numbers]
    _resolve_dangling(ctx)


def _remake(ctx: Context, ino: Ino) -> bool:
    """A new inode for leaves without one: a directory if it has names, else a file."""
    if ino >> 4 not in ctx.inodes.page_of:
        return False
    is_dir = TreeId(ino, TREE_NAMES) in ctx.found_leaves
    mode = 0o040700 if is_dir else 0o100600
    size = 0
    if not is_dir:
        extents = ctx.extents.get(ino, [])
        end = extents[-1].file_page + extents[-1].pages if extents else 0
        size = min(end * PAGE, layout.MAX_FILE_BYTES)
    make_inode(ctx, ino, 0o040755 if ino == ROOT_INO else mode, size=size)
    ctx.report.add(
        Code.INODE_RECOVERED, ctx.file(ino), what="names were" if is_dir else "extents were"
    )
    return True


def make_inode(ctx: Context, ino: Ino, mode: int, *, size: int = 0) -> None:
    """Put a new inode, root's own, into a free slot."""
    number = ctx.inodes.page_of[ino >> 4]
    page = ctx.image.edit(number)
    head = parse_inode_page(page)
    layout.INODE_PAGE.pack_into(
        page,
        layout.INODE_PAGE_OFFSET,
        *head._replace(generation=(head.generation + 1) & 0xFFFFFFFF),
    )
    now = time.time_ns()
    fields = InodeFields(
        ino=ino,
        generation=head.generation,
        mode=mode,
        uid=0,
        gid=0,
        nlink=1,
        flags=0,
        size=size,
        atime=now,
        mtime=now,
        ctime=now,
        btime=now,
        rdev_major=0,
        rdev_minor=0,
        data_pages=0,
        xattr_root=NO_PAGE,
        pending_start=0,
        pending_end=0,
        parent=NO_INO,
        body=NO_PAGE,
    )
    slot = ino & 15
    page[slot * INODE_BYTES : (slot + 1) * INODE_BYTES] = bytes(INODE_BYTES)
    INODE.pack_into(page, slot * INODE_BYTES, *fields)
    ctx.inodes.type[ctx.inodes.row_of[ino >> 4] + slot] = mode >> 12
    ctx.made.add(ino)


def free_ino(ctx: Context, space: Allocator) -> Ino:
    """A free number for a new inode, but for those of the root and of /iommu.

    :raises NoRoomError: the table has no free slot, and there is no page for more.
    """
    inodes = ctx.inodes
    for index in sorted(inodes.page_of):
        row = inodes.row_of[index]
        for slot, ino in enumerate(inos_of(index)):
            if slot and not inodes.type[row + slot] and ino not in (ROOT_INO, IOMMU_INO):
                return ino
    index = len(inodes.page_of)
    number = space.page()
    new_inode_page(ctx, index, number, fresh=True)
    inodes.add_page(index, number)
    ctx.rebuild_table = True
    return inos_of(index)[1]


def _tree_parts(ctx: Context, ino: Ino, kind: int, root: PageNo) -> TreeParts:
    tree = TreeId(ino, kind)
    parts = ctx.trees.get(tree)
    if parts is None:
        parts = ctx.trees[tree] = parts_of(ctx, root, ino, kind)
    parts.faulty = True
    return parts


def _put_names(ctx: Context, ino: Ino, numbers: list[PageNo]) -> None:
    if not numbers:
        return
    fields = ctx.fields(ino)
    ranges = _lost_ranges(ctx, ino, TREE_NAMES)
    root = fields.body if fields.flags & INODE_FLAG_BODY else NO_PAGE
    parts = _tree_parts(ctx, ino, TREE_NAMES, root)
    for number in numbers:
        page = ctx.image.raw(number)
        node = parse_node(page, ino, TREE_NAMES)
        slots = item_slots(page, node)
        outside = {Slot(number, i) for i, s in enumerate(slots) if not _is_in(s.key, ranges)}
        fix_of(ctx, ino).drop |= outside
        scan_names(ctx, ino, Leaf(number, page, node, *EVERY_KEY), slots, Group(), parts)
        parts.leaves.append(number)
        _report_leaf(ctx, ino, number, len(slots) - len(outside))
    drop_duplicates(ctx, ino, parts)


def _put_attributes(ctx: Context, ino: Ino, numbers: list[PageNo]) -> None:
    ranges = _lost_ranges(ctx, ino, TREE_XATTRS)
    parts = _tree_parts(ctx, ino, TREE_XATTRS, ctx.fields(ino).xattr_root)
    names = dict.fromkeys(ctx.attribute_names.get(ino, ()), 0)
    for number in numbers:
        page = ctx.image.raw(number)
        node = parse_node(page, ino, TREE_XATTRS)
        slots = item_slots(page, node)
        outside = {Slot(number, i) for i, s in enumerate(slots) if not _is_in(s.key, ranges)}
        ctx.attributes.setdefault(ino, set()).update(outside)
        scan_attributes(ctx, ino, Leaf(number, page, node, *EVERY_KEY), slots, names, parts)
        parts.leaves.append(number)
        _report_leaf(ctx, ino, number, len(slots) - len(outside))


def _resolve_dangling(ctx: Context) -> None:
    """Drop the names whose inode did not come back, and count the others."""
    for ino, slot, target, kind, name in ctx.dangling:
        if ctx.inodes.row(target) >= 0:
            count_name(ctx, ino, slot.page, slot.place, name, target, kind)
            continue
        ctx.report.add(Code.NAME_DANGLING, ctx.file(ino), name=repr(name), got=target)
        fix_of(ctx, ino).drop.add(slot)
    ctx.dangling.clear()
