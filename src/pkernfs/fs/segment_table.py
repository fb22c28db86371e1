"""The table of segments (docs/format.md, section 12): its rows, kept in memory and in a tree."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import CorruptionError
from pkernfs.fs import superblock
from pkernfs.fs.btree import Tree
from pkernfs.host.iomem import Span
from pkernfs.journal import PageStore
from pkernfs.layout import (
    BLOCK,
    MAGIC_STATE,
    NO_INO,
    NO_NODE,
    PAGES_PER_BLOCK,
    PIECE,
    SEGMENT,
    SEGMENT_DEAD,
    SEGMENT_IN_USE,
    SEGMENT_NEW,
    STATE_PAGE,
    STATE_SEGMENTS,
    STATE_SEGMENTS_OFFSET,
    TREE_SEGMENTS,
    SegmentFields,
)
from pkernfs.pool.pool import Segment
from pkernfs.quantities import PageNo, SegmentNo
from pkernfs.region.region import Region

if TYPE_CHECKING:
    from pkernfs.fs.inodes import Inode

_LOOKS = 3


def encode(row: Segment) -> bytes:
    """The item of a row."""
    fields = SegmentFields(
        row.ino,
        row.kind,
        row.state,
        len(row.pieces),
        NO_NODE if row.node is None else row.node,
        row.length,
        row.valid,
        row.handle,
        row.align,
        row.name.encode(),
    )
    return SEGMENT.pack(*fields) + b"".join(PIECE.pack(p.start, p.size) for p in row.pieces)


def parse(number: SegmentNo, item: bytes) -> Segment:
    """Decode a row.

    :raises CorruptionError: it contradicts the format.
    """
    if len(item) < SEGMENT.size:
        raise CorruptionError(f"segment {number}: bad row: got {len(item)} bytes")
    fields = SegmentFields._make(SEGMENT.unpack_from(item))
    if len(item) != SEGMENT.size + fields.pieces * PIECE.size:
        raise CorruptionError(f"segment {number}: bad row: got {len(item)} bytes")
    pieces = tuple(Span(*p) for p in PIECE.iter_unpack(item[SEGMENT.size :]))
    if not SEGMENT_NEW <= fields.state <= SEGMENT_DEAD:
        raise CorruptionError(f"segment {number}: bad state: got {fields.state}, expected 1..3")
    if not fields.length or fields.length % BLOCK or fields.valid > fields.length:
        raise CorruptionError(
            f"segment {number}: bad length: got {fields.length:#x}, valid {fields.valid:#x}"
        )
    bad = any(not p.size or p.start % BLOCK or p.size % BLOCK or p.end >> 52 for p in pieces)
    if bad or (pieces and sum(p.size for p in pieces) != fields.length):
        raise CorruptionError(f"segment {number}: bad pieces")
    return Segment(
        number,
        fields.ino,
        fields.kind,
        fields.length,
        fields.state,
        None if fields.node == NO_NODE else fields.node,
        fields.valid,
        fields.handle,
        fields.align,
        fields.name.rstrip(b"\0").decode("ascii", "replace"),
        pieces,
    )


class SegmentTable:
    """The rows by their numbers. Every change belongs to the open transaction."""

    def __init__(self, store: PageStore, pages: PageAllocator) -> None:
        self._store = store
        self._pages = pages
        #: What of the table cannot be read; its segments are lost.
        self.damaged: list[str] = []
        self.rows: dict[SegmentNo, Segment] = {}
        state = store.read(STATE_PAGE, MAGIC_STATE)
        self._root, self._last = STATE_SEGMENTS.unpack_from(state, STATE_SEGMENTS_OFFSET)
        try:
            for key, item in self._tree().items(0):
                self._load(SegmentNo(key), bytes(item))
        except CorruptionError as e:
            self.damaged.append(f"table of segments: {e}")

    def _load(self, number: SegmentNo, item: bytes) -> None:
        try:
            self.rows[number] = parse(number, item)
        except CorruptionError as e:
            self.damaged.append(str(e))

    def _tree(self) -> Tree:
        return Tree(self._store, self._pages, TREE_SEGMENTS, NO_INO, PageNo(self._root))

    def of(self, inode: Inode) -> Segment:
        """The segment of a file that has one.

        :raises CorruptionError: there is no such row.
        """
        row = self.rows.get(SegmentNo(inode.body))
        if row is None or row.ino != inode.ino or row.state != SEGMENT_IN_USE:
            raise CorruptionError(f"inode {inode.ino}: no such segment: got {inode.body}")
        return row

    def new_number(self) -> SegmentNo:
        """The number that the next new row gets: no segment has had it."""
        return SegmentNo(self._last + 1)

    def add(self, row: Segment) -> None:
        """Add a row with a new number.

        :raises NoSpaceError: there is none for a node of the tree.
        """
        self._remember(row.number)
        self.rows[row.number] = row
        tree = self._tree()
        tree.insert_item(row.number, encode(row))
        self._set(tree.root, max(self._last, row.number))

    def replace(self, row: Segment) -> None:
        """Store a row in the place of the one with its number."""
        self._remember(row.number)
        self.rows[row.number] = row
        tree = self._tree()
        tree.remove(row.number)
        tree.insert_item(row.number, encode(row))
        self._set(tree.root, self._last)

    def note(self, row: Segment) -> None:
        """Know a row as it is now, until :meth:`replace` stores it; outside a transaction."""
        self.rows[row.number] = row

    def remove(self, number: SegmentNo) -> None:
        """Remove a row. Its number is not used again."""
        self._remember(number)
        del self.rows[number]
        tree = self._tree()
        tree.remove(number)
        self._set(tree.root, self._last)

    def _remember(self, number: SegmentNo) -> None:
        """Have an abort of the transaction put back what is in memory."""
        before = self.rows.get(number)
        self._store.on_abort.append(partial(self._put_back, number, before, self._root, self._last))

    def _put_back(self, number: SegmentNo, row: Segment | None, root: int, last: int) -> None:
        if row is None:
            self.rows.pop(number, None)
        else:
            self.rows[number] = row
        self._root, self._last = root, last

    def _set(self, root: int, last: int) -> None:
        if (root, last) == (self._root, self._last):
            return
        self._root, self._last = root, last
        page = self._store.edit(STATE_PAGE, MAGIC_STATE)
        STATE_SEGMENTS.pack_into(page, STATE_SEGMENTS_OFFSET, root, last)


class Totals(NamedTuple):
    """The segments that files have: how many, and how many bytes they are long."""

    segments: int
    bytes: int


def totals(region: Region) -> Totals | None:
    """Count what a region records, which may be mounted; None: it cannot be told just now."""
    for _ in range(_LOOKS):  # a daemon may change the table meanwhile
        try:
            table = SegmentTable(_store_of(region), cast("PageAllocator", None))
        except CorruptionError:
            continue
        if not table.damaged:
            used = [row.length for row in table.rows.values() if row.state == SEGMENT_IN_USE]
            return Totals(len(used), sum(used))
    return None


def _store_of(region: Region) -> PageStore:
    """The pages of a region, for reading only."""
    sb = superblock.load(region)
    journal, pages = sb.fields.journal_page, sb.total_blocks * PAGES_PER_BLOCK
    store = PageStore(region, sb.uuid, journal, sb.fields.journal_pages, pages)
    store.recover(write=False)
    return store
