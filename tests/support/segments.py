"""A region whose files have segments, made from the format alone, and ways to damage its table.

Only the region is there: no pool, and no memory of the segments.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    FEATURE_SEGMENTS,
    GIB,
    INNER_SLOT,
    INODE_FLAG_SEGMENT,
    MAGIC_TREE,
    NO_INO,
    NO_NODE,
    NO_PAGE,
    PAGE,
    PIECE,
    POOL,
    POOL_DAX,
    POOL_OFFSET,
    ROOT_INO,
    SEGMENT,
    SEGMENT_DEAD,
    SEGMENT_IN_USE,
    SEGMENT_NEW,
    STATE_PAGE,
    STATE_SEGMENTS,
    STATE_SEGMENTS_OFFSET,
    SUPERBLOCK_OFFSET,
    SUPERBLOCK_PAGE,
    TREE,
    TREE_OFFSET,
    TREE_SEGMENTS,
    TREE_SLOTS_OFFSET,
    SegmentFields,
)
from pkernfs.quantities import Ino, PageNo
from pkernfs.region.region import Region
from support.damage import Damage, Populated

REGION_BYTES = 8 << 20
#: Where the memory of the segments is.
MEMORY = 4 * GIB
GUEST, NEW, SECOND, DEAD = 1, 2, 3, 5
_FEATURES_OFFSET = SUPERBLOCK_OFFSET + 40  # feature_incompat

Pieces = Sequence[tuple[int, int]]


class Row(NamedTuple):
    """A row of the table, as it is stored."""

    fields: SegmentFields
    pieces: tuple[tuple[int, int], ...]

    @property
    def item(self) -> bytes:
        return SEGMENT.pack(*self.fields) + b"".join(PIECE.pack(*p) for p in self.pieces)


def make_row(
    kind: int, ino: int, pieces: Pieces, state: int = SEGMENT_IN_USE, name: bytes = b""
) -> Row:
    """A row of a pool; all of the segment is valid."""
    length = sum(bytes_ for _, bytes_ in pieces)
    in_dax = kind == POOL_DAX
    fields = SegmentFields(
        ino=Ino(ino),
        kind=kind,
        state=state,
        pieces=len(pieces) if in_dax else 0,
        node=NO_NODE,
        length=length,
        valid=length,
        handle=0 if in_dax else 1000 + ino,
        align=BLOCK if in_dax else 0,
        name=name if in_dax else b"",
    )
    return Row(fields, tuple(pieces) if in_dax else ())


def populate(region: Region, kind: int, others: int = 0) -> dict[str, Ino]:
    """Format a region; give two files segments, beside a new and a dead one. Its inodes by name.

    ``others``: how many empty files there are beside those four.
    """
    make_filesystem(region, label="segments")
    fs = mount_filesystem(region)
    names = ["guest", "second", "flat", "none", *map(str, range(others))]
    inos = {n: fs.create(ROOT_INO, n.encode(), stat.S_IFREG | 0o640, 7, 8).ino for n in names}
    fs.write(inos["flat"], 0, b"flat " * 2000)
    fs.unmount()
    d = Damage(Populated(region, inos))
    set_pool(d, kind, BLOCK)
    at = [MEMORY + 8 * i * BLOCK for i in range(8)]
    guest = make_row(kind, inos["guest"], [(at[0], 4 * BLOCK), (at[2], 2 * BLOCK)], name=b"dax0.1")
    new = make_row(kind, inos["flat"], [(at[3], BLOCK)], SEGMENT_NEW)
    second = make_row(kind, inos["second"], [(at[1], BLOCK)], name=b"dax0.12")
    dead = make_row(kind, inos["none"], [(at[4], BLOCK)], SEGMENT_DEAD)
    plant(d, [{GUEST: guest, NEW: new}, {SECOND: second, DEAD: dead}], last=6)
    give(d, inos["guest"], GUEST, guest, 5 * BLOCK + 100)
    give(d, inos["second"], SECOND, second, BLOCK)
    return inos


def set_pool(d: Damage, kind: int, granule: int, *, feature: bool = True) -> None:
    """Change the pool in both superblocks."""
    for number in (SUPERBLOCK_PAGE, BACKUP_PAGE):
        with d.edit(number) as page:
            POOL.pack_into(page, POOL_OFFSET, kind, granule)
            page[_FEATURES_OFFSET] = FEATURE_SEGMENTS if feature else 0


def give(d: Damage, ino: Ino, number: int, row: Row, size: int) -> None:
    """Let a file have a segment."""
    pages = row.fields.valid // PAGE
    d.set_inode(ino, flags=INODE_FLAG_SEGMENT, body=number, data_pages=pages, size=size)


def plant(d: Damage, leaves: Iterable[dict[int, Row]], last: int) -> None:
    """Make the tree of the table: an inner node above so many leaves."""
    children = []
    for rows in leaves:
        leaf = d.new_page(MAGIC_TREE, NO_INO)
        with d.edit(leaf) as page:
            page[TREE_OFFSET] = TREE_SEGMENTS
        d.set_items(leaf, [(number, row.item) for number, row in rows.items()])
        children.append((min(rows), leaf))
    root = d.new_page(MAGIC_TREE, NO_INO)
    with d.edit(root) as page:
        TREE.pack_into(page, TREE_OFFSET, TREE_SEGMENTS, 1, len(children), PAGE, 0)
        for i, child in enumerate(children):
            INNER_SLOT.pack_into(page, TREE_SLOTS_OFFSET + i * INNER_SLOT.size, *child)
    set_table(d, root, last)


def table(d: Damage) -> tuple[PageNo, int]:
    """Root of the tree, and the largest number of a segment."""
    root, last = STATE_SEGMENTS.unpack_from(d.page(STATE_PAGE), STATE_SEGMENTS_OFFSET)
    return PageNo(root), last


def set_table(d: Damage, root: int, last: int) -> None:
    with d.edit(STATE_PAGE) as page:
        STATE_SEGMENTS.pack_into(page, STATE_SEGMENTS_OFFSET, root, last)


def leaves(d: Damage) -> list[PageNo]:
    """The leaves of the tree, which has one level above them, or none."""
    root, _ = table(d)
    if root == NO_PAGE:
        return []
    return d.children(root) if d.page(root)[TREE_OFFSET + 1] else [root]


def nodes(d: Damage) -> list[PageNo]:
    """Every page of the tree."""
    return sorted({table(d)[0], *leaves(d)})


def rows(d: Damage) -> dict[int, Row]:
    """The rows by number."""
    found = {}
    for leaf in leaves(d):
        for number, item in d.items(leaf):
            fields = SegmentFields._make(SEGMENT.unpack_from(item))
            found[number] = Row(fields, tuple(PIECE.iter_unpack(item[SEGMENT.size :])))
    return found


def set_item(d: Damage, number: int, item: bytes | None, *, key: int | None = None) -> None:
    """Replace the item of a row, and its key; None takes it out."""
    leaf = next(n for n in leaves(d) if number in dict(d.items(n)))
    items = dict(d.items(leaf))
    del items[number]
    if item is not None:
        items[number if key is None else key] = item
    d.set_items(leaf, sorted(items.items()))


def set_row(d: Damage, number: int, /, pieces: Pieces | None = None, **fields: object) -> None:
    """Change fields or pieces of a row; nothing else follows but the number of pieces."""
    old = rows(d)[number]
    new = old.pieces if pieces is None else tuple(pieces)
    changed = SegmentFields(**old.fields._asdict() | {"pieces": len(new)} | fields)
    set_item(d, number, Row(changed, new).item)
