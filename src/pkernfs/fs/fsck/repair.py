"""Pass 11: putting right what the passes before have noted down.

Orphans are freed, data that lies where it cannot stay is copied, and trees with a fault are built
anew: in the overlay, as all changes are.
"""

from __future__ import annotations

from pkernfs import layout
from pkernfs.fs.fsck.context import Context, NewName, Relocation, TreeId, TreeParts
from pkernfs.fs.fsck.data import joined, release_extent, show, triples
from pkernfs.fs.fsck.names import attributes_of, entries_of
from pkernfs.fs.fsck.segments import let_go
from pkernfs.fs.fsck.structures import (
    T_LNK,
    T_REG,
    file_type,
    has_segment,
    inline_extents,
    parse_attribute,
    parse_overflow,
)
from pkernfs.fs.fsck.trees import (
    Allocator,
    NoRoomError,
    build_extents,
    build_items,
    parts_of,
    release,
)
from pkernfs.layout import (
    COLLISION_BITS,
    EXTENT,
    INODE_FLAG_BODY,
    INODE_INLINE_SHIFT,
    MAX_INLINE_EXTENTS,
    NAME_ITEM,
    NO_INO,
    NO_PAGE,
    PAGE,
    PAGES_PER_BLOCK,
    TREE_EXTENTS,
    TREE_NAMES,
    TREE_XATTRS,
    Extent,
    first_page,
    name_key,
    page_offset,
)
from pkernfs.quantities import Ino, PageNo, PageRun, RegionOff


def rebuild(ctx: Context, space: Allocator) -> None:
    """Free orphans, move data, build trees anew."""
    for ino in ctx.orphans:
        _free(ctx, ino)
    copies: dict[Ino, list[Extent]] = {}
    for todo in ctx.relocations:
        if ctx.inodes.type_of(todo.ino) == T_REG:
            copies.setdefault(todo.ino, []).extend(_relocate(ctx, space, todo))
    for ino, copied in copies.items():
        ctx.extents[ino] = joined(ctx, sorted(_current_extents(ctx, ino) + copied))
    files = ctx.extents.keys() | {ino for ino, kind in ctx.trees if kind == TREE_EXTENTS}
    for ino in sorted(files):
        if ctx.inodes.type_of(ino) == T_REG:
            _rebuild_extents(ctx, space, ino)
    directories = ctx.directories.keys() | {i for i, kind in ctx.trees if kind == TREE_NAMES}
    for ino in sorted(directories):
        if ctx.inodes.type_of(ino):
            _rebuild_names(ctx, space, ino)
    attributes = ctx.attributes.keys() | {i for i, kind in ctx.trees if kind == TREE_XATTRS}
    for ino in sorted(attributes):
        if ctx.inodes.type_of(ino):
            _rebuild_attributes(ctx, space, ino)
    if ctx.rebuild_table or ctx.table.faulty:
        _rebuild_table(ctx, space)


# ------------------------------------------------------------------------------ orphans


def _free(ctx: Context, ino: Ino) -> None:
    """Free an inode without a name and all that it holds."""
    f = ctx.fields(ino)
    body = f.body if f.flags & INODE_FLAG_BODY else NO_PAGE
    kind = file_type(f.mode)
    if has_segment(f):
        let_go(ctx, f)
    if kind == T_REG:
        for extent in _current_extents(ctx, ino):
            release_extent(ctx, extent)
        if body:
            release(ctx, parts_of(ctx, body, ino, TREE_EXTENTS))
    elif kind == T_LNK and body:
        _release_chain(ctx, body, ino)
    elif body:
        release(ctx, parts_of(ctx, body, ino, TREE_NAMES))
    if f.xattr_root:
        parts = parts_of(ctx, f.xattr_root, ino, TREE_XATTRS)
        for item in attributes_of(ctx, ino, parts):
            page = parse_attribute(item).page
            if page:
                _release_chain(ctx, page, ino)
        release(ctx, parts)
    for table in (ctx.extents, ctx.directories, ctx.attributes):
        table.pop(ino, None)
    for kind in (TREE_EXTENTS, TREE_NAMES, TREE_XATTRS):
        ctx.trees.pop(TreeId(ino, kind), None)
    ctx.drop_inode(ino)


def _release_chain(ctx: Context, page: PageNo, ino: Ino) -> None:
    """Give back the overflow pages of a value that was checked before."""
    while page:
        ctx.released_pages.append(PageRun(page, 1))
        page = parse_overflow(ctx.image.raw(page), ino).following


# ------------------------------------------------------------------------------ extents


def _current_extents(ctx: Context, ino: Ino) -> list[Extent]:
    known = ctx.extents.get(ino)
    if known is not None:
        return known
    f = ctx.fields(ino)
    if f.flags & INODE_FLAG_BODY:
        return triples(ctx.tree_extents[ino])
    return inline_extents(ctx.inode_page(ino), ino & 15, f.flags)


def _relocate(ctx: Context, space: Allocator, todo: Relocation) -> list[Extent]:
    """Copy data that lies where it cannot stay; without room, the file gets a hole there.

    Returns the extents of the copy.
    """
    size = ctx.fields(todo.ino).size
    file_page = todo.file_page
    # What lies behind the end of the file needs no copy.
    end = min(todo.file_page + todo.pages, -(-size // PAGE))
    copied: list[Extent] = []
    try:
        while file_page < end and ctx.may_copy:
            source = PageNo(todo.source + file_page - todo.file_page)
            copied.append(_copy_unit(ctx, space, Extent(file_page, source, end - file_page)))
            file_page += copied[-1].pages
    except NoRoomError:
        pass
    left = end - file_page
    reason = "part of a block that is not carved, or at a wrong offset in it"
    remedy = "copied to another place" if copied else "dropped: behind the end of the file"
    if left > 0:
        remedy = "no space for a copy, reads as zeros"
    if left > 0 and copied:
        remedy = f"copied but for {left} pages: no space, they read as zeros"
    ctx.report.add(
        todo.code,
        ctx.file(todo.ino),
        extent=show(Extent(todo.file_page, todo.source, todo.pages)),
        reason=reason,
        remedy=remedy,
    )
    if copied:
        start, page, count = copied[-1]
        tail = size - start * PAGE
        if tail < count * PAGE:
            ctx.image.zero_data(RegionOff(page * PAGE + tail), count * PAGE - tail)
    return copied


def _copy_unit(ctx: Context, space: Allocator, extent: Extent) -> Extent:
    """Copy the first block, or page, of an extent; returns the copy."""
    file_page, source, most = extent
    if file_page % PAGES_PER_BLOCK == 0 and most >= PAGES_PER_BLOCK:
        try:
            page = first_page(space.block())
            count = PAGES_PER_BLOCK
        except NoRoomError:
            page, count = space.data_page(), 1
    else:
        page, count = space.data_page(), 1
    ctx.image.copy_data(page_offset(source), page_offset(page), count * PAGE)
    return Extent(file_page, page, count)


def _rebuild_extents(ctx: Context, space: Allocator, ino: Ino) -> None:
    f = ctx.fields(ino)
    extents = joined(ctx, _current_extents(ctx, ino))
    old = TreeParts()
    if f.flags & INODE_FLAG_BODY:
        old = parts_of(ctx, f.body, ino, TREE_EXTENTS)
    root = NO_PAGE
    if len(extents) > MAX_INLINE_EXTENTS:
        root = build_extents(ctx, space, ino, extents, old)
    release(ctx, old)
    flags = f.flags & ~(INODE_FLAG_BODY | 0xFF << INODE_INLINE_SHIFT)
    inline = b""
    if root:
        flags |= INODE_FLAG_BODY
    else:
        flags |= len(extents) << INODE_INLINE_SHIFT
        inline = b"".join([EXTENT.pack(*e) for e in extents])
    pages = sum(extent.pages for extent in extents)
    ctx.set_fields(ino, flags=flags, body=root, data_pages=pages)
    ctx.set_inline(ino, inline)


# ------------------------------------------------------------------------------ names, attributes


def _free_key(base: int, taken: set[int]) -> int:
    """The lowest of a hash's 2048 keys that is not taken, or -1."""
    for key in range(base, base + layout.MAX_COLLISIONS):
        if key not in taken:
            return key
    return -1


def _rebuild_names(ctx: Context, space: Allocator, ino: Ino) -> None:
    f = ctx.fields(ino)
    body = f.body if f.flags & INODE_FLAG_BODY else NO_PAGE
    parts = parts_of(ctx, body, ino, TREE_NAMES)
    fix = ctx.directories.get(ino)
    hash_key = ctx.sb.fields.hash_key
    items: dict[int, bytes] = {}
    misplaced = list(fix.add) if fix else []
    for slot, key, target, kind, name in entries_of(ctx, ino, parts):
        if fix and slot in fix.retype:
            kind = fix.retype[slot]
        if name_key(name, hash_key) >> COLLISION_BITS == key >> COLLISION_BITS and (
            key not in items
        ):
            items[key] = NAME_ITEM.pack(target, kind) + name
        else:
            misplaced.append(NewName(name, target, kind))
    taken = set(items)
    for name, target, kind in misplaced:
        key = _free_key(name_key(name, hash_key), taken)
        taken.add(key)
        items[key] = NAME_ITEM.pack(target, kind) + name
    root = build_items(ctx, space, ino, TREE_NAMES, items, parts)
    release(ctx, parts)
    flags = f.flags | INODE_FLAG_BODY if root else f.flags & ~INODE_FLAG_BODY
    ctx.set_fields(ino, flags=flags, body=root, size=len(items))


def _rebuild_attributes(ctx: Context, space: Allocator, ino: Ino) -> None:
    f = ctx.fields(ino)
    parts = parts_of(ctx, f.xattr_root, ino, TREE_XATTRS)
    items: dict[int, bytes] = {}
    for item in attributes_of(ctx, ino, parts):
        base = name_key(parse_attribute(item).name, ctx.sb.fields.hash_key)
        items[_free_key(base, set(items))] = item
    root = build_items(ctx, space, ino, TREE_XATTRS, items, parts)
    release(ctx, parts)
    ctx.set_fields(ino, xattr_root=root)


def _rebuild_table(ctx: Context, space: Allocator) -> None:
    extents: list[Extent] = []
    for index in sorted(ctx.inodes.page_of):
        page = ctx.inodes.page_of[index]
        if extents and extents[-1].page + extents[-1].pages == page:
            extents[-1] = extents[-1]._replace(pages=extents[-1].pages + 1)
        else:
            extents.append(Extent(index, page, 1))
    ctx.inode_root = build_extents(ctx, space, NO_INO, extents, ctx.table)
    release(ctx, ctx.table)
