"""Pass 4: the table of segments; later, whether each segment and its file know each other.

Only the region is looked at: the memory of segments is outside. But if a row is lost, the file of a
segment in a directory is looked for, beside the region, and the row is made again. Nodes of the
table's tree are claimed here, before any file data. Kept for later: the rows, and whether the tree
is built anew. Rows that are new or dead are left alone: a mount destroys their segments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.context import EVERY_KEY, Context, KeyRange, TreeId, at
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.rows import (
    Row,
    Settled,
    Taken,
    pack_row,
    parse_row,
    row_of_file,
    settle,
)
from pkernfs.fs.fsck.scavenge import free_ino, make_inode
from pkernfs.fs.fsck.structures import T_REG, check_items, has_segment, item_slots, parse_node
from pkernfs.fs.fsck.trees import (
    Allocator,
    Leaf,
    build_items,
    check_keys,
    items_fault,
    node_at,
    release,
    walk,
)
from pkernfs.layout import (
    INODE_FLAG_NATIVE,
    INODE_FLAG_PENDING,
    INODE_FLAG_SEGMENT,
    IOMMU_INO,
    MAGIC_TREE,
    NO_INO,
    NO_PAGE,
    PAGE,
    POOL_DIRECTORY,
    ROOT_INO,
    SEGMENT_DEAD,
    SEGMENT_IN_USE,
    SEGMENT_NEW,
    STATE_PAGE,
    STATE_SEGMENTS,
    STATE_SEGMENTS_OFFSET,
    TREE_EXTENTS,
    TREE_NAMES,
    TREE_SEGMENTS,
    InodeFields,
)
from pkernfs.quantities import Ino, PageNo, SegmentNo

_STATE = f"state page at {at(STATE_PAGE)}"
_TREE = TreeId(NO_INO, TREE_SEGMENTS)
_MODE = 0o100600
# A row in one of these states has no file.
_UNOWNED = (SEGMENT_NEW, SEGMENT_DEAD)


def load_rows(ctx: Context) -> None:
    """Find every row, through the table's tree or else in the leaves themselves."""
    table = ctx.segments
    pool = ctx.sb.pool.kind
    if ctx.state is None:
        table.is_new = True
        if pool:
            table.parts.lost.append(EVERY_KEY)
    else:
        page = ctx.image.raw(STATE_PAGE)
        table.root, table.last = STATE_SEGMENTS.unpack_from(page, STATE_SEGMENTS_OFFSET)
        if not pool:
            _refuse(ctx)
        elif table.root:
            _walk(ctx)
    if table.parts.lost:
        _search(ctx, table.parts.lost)
    elif pool and any(_segment_of(ctx, ino) not in table.rows for ino in table.files):
        _search(ctx, [EVERY_KEY])


def _refuse(ctx: Context) -> None:
    """Without a pool there are no segments."""
    table = ctx.segments
    if table.root or table.last:
        ctx.report.add(Code.SEGMENTS_STRAY, _STATE, root=table.root, last=table.last)
        table.root, table.last = NO_PAGE, 0
        table.is_new = True


def _walk(ctx: Context) -> None:
    parts = ctx.segments.parts
    for leaf in walk(ctx, ctx.segments.root, NO_INO, TREE_SEGMENTS, parts):
        check_keys(ctx, leaf, NO_INO, parts, [s.key for s in item_slots(leaf.buffer, leaf.node)])
        _take_leaf(ctx, leaf, [EVERY_KEY])


def _search(ctx: Context, ranges: list[KeyRange]) -> None:
    """Leaves say what they are: those in use that the tree does not lead to."""
    table = ctx.segments
    for number in list(ctx.find_pages(MAGIC_TREE)):
        try:
            page = ctx.image.load(number, MAGIC_TREE)
            node = parse_node(page, NO_INO, TREE_SEGMENTS)
        except CorruptionError:
            continue
        if node.level or not ctx.claims.claim_meta(number):
            continue
        table.parts.nodes.append(number)
        table.is_new = True
        count = _take_leaf(ctx, Leaf(number, page, node, *EVERY_KEY), ranges)
        ctx.report.add(Code.TREE_LEAF_FOUND, node_at(number, _TREE), count=count)


def _take_leaf(ctx: Context, leaf: Leaf, ranges: list[KeyRange]) -> int:
    """Take the rows of a leaf whose keys are in the ranges; returns how many these were."""
    table = ctx.segments
    slots = item_slots(leaf.buffer, leaf.node)
    good, reason = check_items(slots, leaf.node)
    if reason:
        items_fault(ctx, leaf, NO_INO, table.parts, reason)
    taken = 0
    for (key, offset, length, _), is_whole in zip(slots, good, strict=True):
        number = SegmentNo(key)
        is_wanted = any(low <= key < end for low, end in ranges)
        if not is_whole or not is_wanted or number in table.rows:
            continue
        try:
            table.rows[number] = parse_row(number, bytes(leaf.buffer[offset : offset + length]))
            taken += 1
        except CorruptionError as e:
            _drop_row(ctx, number, str(e))
    return taken


def _drop_row(ctx: Context, number: SegmentNo, reason: str) -> None:
    ctx.report.add(Code.SEGMENT_ROW, _where(number), reason=reason)
    ctx.segments.rows.pop(number, None)
    ctx.segments.is_new = True


def _where(number: SegmentNo) -> str:
    return f"segment {number}"


def _segment_of(ctx: Context, ino: Ino) -> SegmentNo:
    """The number of the segment that a file says it has."""
    return SegmentNo(ctx.fields(ino).body)


# ------------------------------------------------------------------------------ rows and files


def match(ctx: Context) -> None:
    """Have each segment in use belong to exactly the file that says so."""
    if not ctx.sb.pool.kind:
        return
    owners, others = _owners(ctx)
    _settle_rows(ctx, owners)
    for number in [number for number in owners if number not in ctx.segments.rows]:
        others.append(owners.pop(number))
    for ino in others:
        _find_another(ctx, ino, owners)
    for number, ino in owners.items():
        _confirm(ctx, ctx.segments.rows[number], ino)
    for number in sorted(ctx.segments.rows.keys() - owners.keys()):
        _without_file(ctx, ctx.segments.rows[number])
    _check_last(ctx)


def _files(ctx: Context) -> Iterator[Ino]:
    """The files that say they have a segment; those of damaged inode pages last."""
    for ino in sorted(ctx.segments.files, key=lambda ino: (ino in ctx.salvaged, ino)):
        if ctx.inodes.type_of(ino) == T_REG and has_segment(ctx.fields(ino)):
            yield ino


def _owners(ctx: Context) -> tuple[dict[SegmentNo, Ino], list[Ino]]:
    """The file of each segment; and the files that cannot have the one they name."""
    rows = ctx.segments.rows
    files = {ino: _segment_of(ctx, ino) for ino in _files(ctx)}
    owners = {n: ino for ino, n in files.items() if n in rows and rows[n].ino == ino}
    others: list[Ino] = []
    for ino, number in files.items():
        if owners.get(number) == ino:
            continue
        if number in rows and number not in owners and rows[number].fields.state not in _UNOWNED:
            owners[number] = ino
        else:
            others.append(ino)
    return owners, others


def _settle_rows(ctx: Context, owners: dict[SegmentNo, Ino]) -> None:
    """Check rows by themselves, and their memory: whom the file names comes before others."""
    table = ctx.segments

    def rank(row: Row) -> tuple[bool, bool, SegmentNo]:
        is_named = owners.get(row.number) == row.ino
        return row.fields.state != SEGMENT_IN_USE, not is_named, row.number

    taken = Taken(ctx.sb.pool.base)
    for row in sorted(table.rows.values(), key=rank):
        number = row.number
        is_named = number in owners
        if is_named or row.fields.state not in _UNOWNED:
            row = row.with_fields(state=SEGMENT_IN_USE)
        size = ctx.fields(owners[number]).size if is_named else None
        new, reason, faults = settle(row, ctx.sb.pool, taken, size)
        if new is None:
            _drop_row(ctx, number, reason)
            continue
        if reason:
            ctx.report.add(
                Code.SEGMENT_PIECES, _where(number), reason=reason, length=new.fields.length
            )
        for fault in faults:
            _bad_field(ctx, number, *fault)
        _set_row(ctx, new)


def _bad_field(ctx: Context, number: SegmentNo, field: str, got: object, expected: object) -> None:
    where = _where(number)
    ctx.report.add(Code.SEGMENT_FIELD, where, field=field, got=got, expected=expected)


def _set_row(ctx: Context, row: Row) -> None:
    table = ctx.segments
    old = table.rows[row.number]
    if old == row:
        return
    if old.fields.state not in (SEGMENT_IN_USE, row.fields.state):
        _bad_field(ctx, row.number, "state", old.fields.state, row.fields.state)
    table.rows[row.number] = row
    table.is_new = True


def _find_another(ctx: Context, ino: Ino, owners: dict[SegmentNo, Ino]) -> None:
    """A file whose segment is lost, or another's: it has the one that says so, or none."""
    named = _segment_of(ctx, ino)
    for number, row in ctx.segments.rows.items():
        if row.ino == ino and number not in owners and row.fields.state not in _UNOWNED:
            owners[number] = ino
            ctx.report.add(
                Code.INODE_FIELD, ctx.file(ino), field="body", got=named, expected=number
            )
            ctx.set_fields(ino, body=number)
            return
    if named in owners:
        ctx.report.add(Code.SEGMENT_SHARED, ctx.file(ino), number=named, other=owners[named])
    elif _remake_row(ctx, ino, named):
        owners[named] = ino
        return
    else:
        ctx.report.add(Code.SEGMENT_LOST, ctx.file(ino), number=named)
    _take_away(ctx, ino)


def _remake_row(ctx: Context, ino: Ino, number: SegmentNo) -> bool:
    """Make a lost row again; False: nothing proves what memory the segment has."""
    table = ctx.segments
    path = os.path.join(os.path.dirname(ctx.image.region.name), f"segment-{number}")
    is_known = number in table.rows or ino in ctx.salvaged
    if is_known or ctx.sb.pool.kind != POOL_DIRECTORY or number < 1:
        return False
    try:
        info = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    row = row_of_file(number, ino, ctx.fields(ino), info)
    size = ctx.fields(ino).size
    if row is None or settle(row, ctx.sb.pool, Taken(), size) != Settled(row, "", []):
        return False
    ctx.report.add(Code.SEGMENT_REMADE, ctx.file(ino), number=number, path=path)
    table.rows[number] = row
    table.is_new = True
    return True


def _take_away(ctx: Context, ino: Ino) -> None:
    """Leave a file without its segment: all of it is a hole. Nothing proves a salvaged size."""
    f = ctx.fields(ino)
    ctx.set_fields(
        ino,
        flags=f.flags & ~(INODE_FLAG_SEGMENT | INODE_FLAG_NATIVE | INODE_FLAG_PENDING),
        body=NO_PAGE,
        data_pages=0,
        size=0 if ino in ctx.salvaged else f.size,
        pending_start=0,
        pending_end=0,
    )


def _confirm(ctx: Context, row: Row, ino: Ino) -> None:
    """Compare a segment and its file field by field."""
    if row.ino != ino:
        _bad_field(ctx, row.number, "ino", row.ino, ino)
        _set_row(ctx, row.with_fields(ino=ino))
    f = ctx.fields(ino)
    if f.size > row.fields.valid:
        ctx.report.add(Code.SEGMENT_SIZE, ctx.file(ino), got=f.size, expected=row.fields.valid)
        ctx.set_fields(ino, size=row.fields.valid)
    pages = row.fields.valid // PAGE
    if f.data_pages != pages:
        ctx.report.add(Code.INODE_DATA_PAGES, ctx.file(ino), got=f.data_pages, expected=pages)
        ctx.set_fields(ino, data_pages=pages)


def _without_file(ctx: Context, row: Row) -> None:
    """A segment in use that no file names: nothing else leads to what is in it."""
    if row.fields.state in _UNOWNED:
        return
    ctx.report.add(Code.SEGMENT_UNOWNED, _where(row.number), ino=row.ino)
    if _can_remake(ctx, row.ino):
        _give(ctx, row, row.ino)
    else:
        ctx.segments.homeless.append(row.number)


def _can_remake(ctx: Context, ino: Ino) -> bool:
    """Tell if a file can be made again under its number: its names lead to it then."""
    return (
        ino >> 4 in ctx.inodes.page_of
        and bool(ino & 15)
        and ino not in (ROOT_INO, IOMMU_INO)
        and ctx.inodes.row(ino) < 0
        and not any(TreeId(ino, kind) in ctx.found_leaves for kind in (TREE_EXTENTS, TREE_NAMES))
    )


def _give(ctx: Context, row: Row, ino: Ino) -> None:
    """Make a file, root's own, that has a segment. What is not valid is not in it."""
    _set_row(ctx, row.with_fields(ino=ino))
    make_inode(ctx, ino, _MODE, size=row.fields.valid)
    ctx.set_fields(
        ino,
        flags=INODE_FLAG_SEGMENT,
        body=PageNo(row.number),
        data_pages=row.fields.valid // PAGE,
    )
    ctx.segments.files.append(ino)


def make_files(ctx: Context, space: Allocator) -> None:
    """Make a file for each segment whose own number is another's; it goes to lost+found."""
    for number in ctx.segments.homeless:
        _give(ctx, ctx.segments.rows[number], free_ino(ctx, space))


def _check_last(ctx: Context) -> None:
    """No segment gets a number that another one has had."""
    table = ctx.segments
    last = max(table.rows, default=0)
    if table.last < last:
        if ctx.state is not None:
            ctx.report.add(Code.SEGMENT_LAST, _STATE, got=table.last, expected=last)
        table.last = last
        table.is_new = True


# ------------------------------------------------------------------------------ after all repairs


def let_go(ctx: Context, f: InodeFields) -> None:
    """A file with a segment is freed: the segment is dead, and the next mount destroys it."""
    row = ctx.segments.rows.get(SegmentNo(f.body))
    if row is not None:
        _set_row(ctx, row.with_fields(state=SEGMENT_DEAD))


def write(ctx: Context, space: Allocator) -> None:
    """Build the tree anew if a row has changed."""
    table = ctx.segments
    if not table.is_new and not table.parts.faulty:
        return
    items = {int(number): pack_row(row) for number, row in table.rows.items()}
    table.root = build_items(ctx, space, NO_INO, TREE_SEGMENTS, items, table.parts)
    release(ctx, table.parts)
    table.is_new = True
