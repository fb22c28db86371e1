"""The state that the passes share: the image, their findings, and the changes still to be made."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pkernfs import layout
from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck import claims as owners
from pkernfs.fs.fsck.claims import Claims
from pkernfs.fs.fsck.image import Buffer, Image
from pkernfs.fs.fsck.problems import Code, Report
from pkernfs.fs.fsck.rows import Row
from pkernfs.fs.fsck.structures import Superblock, parse_inode, parse_page_map
from pkernfs.layout import (
    INODE_BYTES,
    MAGIC_NAMES,
    MAGIC_PAGE_MAP,
    NO_INO,
    NO_PAGE,
    PAGE,
    PAGES_PER_BLOCK,
    SLOTS_PER_INODE_PAGE,
    Extent,
    InodeFields,
    first_page,
    inos_of,
    page_offset,
)
from pkernfs.quantities import BlockNo, BlockRun, Ino, PageNo, PageRun, RegionOff, SegmentNo

Progress = Callable[[str, float], None]
KEY_END = 1 << 64

# Not known: the map page of the block is damaged.
UNKNOWN = 2


def at(page: PageNo) -> str:
    """A page's offset, as messages show it."""
    return f"{page * PAGE:#x}"


class TreeId(NamedTuple):
    """Whose tree it is, and of which kind."""

    owner: Ino
    kind: int


class KeyRange(NamedTuple):
    """Keys of a tree: ``low`` <= key < ``end``."""

    low: int
    end: int


EVERY_KEY = KeyRange(0, KEY_END)


class Slot(NamedTuple):
    """Where an item is: page of the leaf, and its place among the leaf's slots from 0 on.

    Not to be made for each name of a file system: that would take too long.
    """

    page: PageNo
    place: int


class TablePage(NamedTuple):
    """A page of the inode table: its index there, and what it holds."""

    own_index: int
    page: Buffer


# Nobody compares or shows these three: to make what would, each command waits 0.2 ms a class.
@dataclass(eq=False, repr=False)
class TreeParts:
    """Nodes of a tree: all of them, the leaves, and the keys of what was lost."""

    nodes: list[PageNo] = field(default_factory=list)
    leaves: list[PageNo] = field(default_factory=list)
    lost: list[KeyRange] = field(default_factory=list)
    faulty: bool = False


@dataclass
class SegmentTable:
    """The table of segments: where its tree is, and its rows as they are after the repair.

    ``files`` say that they have a segment. ``homeless`` segments are in use, but no file has them.
    ``is_new``: the tree and the fields of the state page are to be stored anew.
    """

    root: PageNo = NO_PAGE
    last: int = 0
    rows: dict[SegmentNo, Row] = field(default_factory=dict)
    files: list[Ino] = field(default_factory=list)
    parts: TreeParts = field(default_factory=TreeParts)
    homeless: list[SegmentNo] = field(default_factory=list)
    is_new: bool = False


class NewName(NamedTuple):
    """A name that a directory gets."""

    name: bytes
    target: Ino
    kind: int


class Dangling(NamedTuple):
    """A name in a directory whose inode has not been found."""

    directory: Ino
    slot: Slot
    target: Ino
    kind: int
    name: bytes


@dataclass(eq=False, repr=False)
class DirectoryFix:
    """Changes of a directory: slots to drop, slots that get another type, and names to add."""

    drop: set[Slot] = field(default_factory=set)
    retype: dict[Slot, int] = field(default_factory=dict)
    add: list[NewName] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Relocation:
    """File pages whose place belongs to another: they get a copy, or become a hole."""

    ino: Ino
    file_page: int
    source: PageNo
    pages: int
    code: Code


class Inodes:
    """All inodes, 16 rows a page: type (0: none), names, subdirectories, entries, parent found.

    ``page_of`` and ``row_of`` are by the index of a page in the table.
    """

    def __init__(self) -> None:
        self.page_of: dict[int, PageNo] = {}
        self.row_of: dict[int, int] = {}
        self.type = bytearray()
        self.names = array("L")
        self.subdirs = array("L")
        self.entries = array("L")
        self.parent = array("Q")

    def add_page(self, index: int, page: PageNo) -> None:
        """Take an inode page in, its slots empty."""
        self.page_of[index] = page
        self.row_of[index] = len(self.type)
        self.type.extend(bytes(SLOTS_PER_INODE_PAGE))
        self.names.extend([0] * SLOTS_PER_INODE_PAGE)
        self.subdirs.extend([0] * SLOTS_PER_INODE_PAGE)
        self.entries.extend([0] * SLOTS_PER_INODE_PAGE)
        self.parent.extend([0] * SLOTS_PER_INODE_PAGE)

    def parent_of(self, ino: Ino) -> Ino:
        """The directory that an inode in use was found in, :data:`NO_INO` if in none."""
        return Ino(self.parent[self.row(ino)])

    def row(self, ino: Ino) -> int:
        """Row of an inode in use, else -1."""
        first = self.row_of.get(ino >> 4, -1)
        if first < 0 or not self.type[first + (ino & 15)]:
            return -1
        return first + (ino & 15)

    def type_of(self, ino: Ino) -> int:
        """``mode >> 12`` of an inode, 0 if there is none."""
        row = self.row(ino)
        return self.type[row] if row >= 0 else 0

    def of_type(self, kind: int) -> Iterator[Ino]:
        """Numbers of the inodes of a type, ascending."""
        for index in sorted(self.page_of):
            first = self.row_of[index]
            inos = inos_of(index)
            for slot in range(1, SLOTS_PER_INODE_PAGE):
                if self.type[first + slot] == kind:
                    yield inos[slot]


class Context:
    """State of one run."""

    def __init__(self, image: Image, sb: Superblock, report: Report, progress: Progress) -> None:
        self.image = image
        self.sb = sb
        self.report = report
        self.progress = progress
        self.blocks = sb.blocks
        self.pages = sb.blocks * PAGES_PER_BLOCK
        self.claims = Claims(sb.blocks)
        # From the block maps, one byte each: 0, 1 or UNKNOWN.
        self.map_used = bytearray([UNKNOWN]) * sb.blocks
        self.map_carved = bytearray([UNKNOWN]) * sb.blocks
        self.map_zero = bytearray(sb.blocks)
        self.rewrite_maps: set[PageNo] = set()
        self.verify_zero: bool | None = None
        self.only_look = False
        # Whether data that cannot stay where it is may be copied; else it is lost.
        self.may_copy = True
        self._page_maps: dict[BlockNo, int] = {}

        self.state: layout.StateFields | None = None
        self.inodes = Inodes()
        self.table = TreeParts()
        self.rebuild_table = False
        self.inode_root = NO_PAGE  # of the new tree, if the table gets one
        self.lost_indexes: set[int] = set()
        self.lost_inos: set[Ino] = set()
        self.found_leaves: dict[TreeId, list[PageNo]] = {}
        self.salvaged: set[Ino] = set()
        self.inodes_on_media = 0

        self.segments = SegmentTable()
        # Trees with a fault; the others are walked anew when needed.
        self.trees: dict[TreeId, TreeParts] = {}
        # Of all files with a tree: the three numbers of each extent.
        self.tree_extents: dict[Ino, array[int]] = {}
        # Final extents of files whose extents change.
        self.extents: dict[Ino, list[Extent]] = {}
        self.relocations: list[Relocation] = []
        self.directories: dict[Ino, DirectoryFix] = {}
        self.dangling: list[Dangling] = []
        # Slots of attributes that go; an inode with an entry gets a new tree.
        self.attributes: dict[Ino, set[Slot]] = {}
        self.attribute_names: dict[Ino, list[bytes]] = {}
        # Inodes made by this run.
        self.made: set[Ino] = set()
        self.orphans: list[Ino] = []
        self.list_ino = NO_INO  # of a handover: without a name, and not to be freed
        # Free blocks that the repair stores into.
        self.taken_blocks: list[BlockNo] = []
        self.released_pages: list[PageRun] = []
        self.released_blocks: list[BlockRun] = []

    # ------------------------------------------------------------------ inodes

    def inode_page(self, ino: Ino) -> Buffer:
        """The page that holds an inode."""
        return self.image.raw(self.inodes.page_of[ino >> 4])

    def fields(self, ino: Ino) -> InodeFields:
        """The fields of an inode in use."""
        return parse_inode(self.inode_page(ino), ino & 15)

    def set_fields(self, ino: Ino, **values: Any) -> None:
        """Change fields of an inode: numbers, of several types."""
        number = self.inodes.page_of[ino >> 4]
        slot = ino & 15
        new = parse_inode(self.image.raw(number), slot)._replace(**values)
        layout.INODE.pack_into(self.image.edit(number), slot * INODE_BYTES, *new)

    def set_inline(self, ino: Ino, data: bytes) -> None:
        """Fill an inode's inline bytes, zeros behind them."""
        page = self.image.edit(self.inodes.page_of[ino >> 4])
        start = (ino & 15) * INODE_BYTES + layout.INODE_INLINE_OFFSET
        size = layout.INODE_INLINE_BYTES
        page[start : start + size] = data + bytes(size - len(data))

    def drop_inode(self, ino: Ino) -> None:
        """Take an inode out of its slot; what it refers to is the caller's business."""
        page = self.image.edit(self.inodes.page_of[ino >> 4])
        slot = ino & 15
        page[slot * INODE_BYTES : (slot + 1) * INODE_BYTES] = bytes(INODE_BYTES)
        self.inodes.type[self.inodes.row_of[ino >> 4] + slot] = 0

    def load_inode_pages(self) -> Iterator[TablePage]:
        """Every page of the table, by index."""
        total = len(self.inodes.page_of) or 1
        for done, index in enumerate(sorted(self.inodes.page_of)):
            if not done % 256:
                self.progress("inodes", done / total)
            yield TablePage(index, self.image.raw(self.inodes.page_of[index]))

    # ------------------------------------------------------------------ carved blocks

    def page_map(self, block: BlockNo) -> int | None:
        """Bitmap of the pages in use that the block's page map claims; None if it is damaged."""
        known = self._page_maps.get(block, -2)
        if known == -2:
            try:
                page = self.image.load(first_page(block), MAGIC_PAGE_MAP)
                known = parse_page_map(page).used
            except CorruptionError:
                known = -1
            self._page_maps[block] = known
        return None if known < 0 else known

    def likely_carved(self) -> list[BlockNo]:
        """Blocks that the map or a page map says are carved, whatever the walk has found."""
        found = []
        for first, count in owners.flag_runs(self.map_carved):
            for block in map(BlockNo, range(first, first + count)):
                if self.claims.kind[block] not in (owners.FREE, owners.CARVED):
                    continue
                if self.map_carved[block] == 1 or self._has_page_map(block):
                    found.append(block)
        return found

    def _has_page_map(self, block: BlockNo) -> bool:
        page = first_page(block)
        if not self.image.data_in(page_offset(page), PAGE):
            return False
        raw = self.image.raw(page)
        magic = int.from_bytes(raw[:4], "little")
        return magic in MAGIC_NAMES and self.page_map(block) is not None

    def find_pages(self, magic: int) -> Iterator[PageNo]:
        """Unclaimed pages in use of carved blocks that start with a magic, ascending."""
        blocks = self.likely_carved()
        for done, block in enumerate(blocks):
            self.progress("searching", done / len(blocks))
            used = self.page_map(block)
            mask = (owners.ALL_PAGES if used is None else used) & ~self.claims.pages.get(block, 0)
            view = self.image.region.view(RegionOff(block * layout.BLOCK), layout.BLOCK).cast("I")
            for bit, word in enumerate(view[:: PAGE // 4].tolist()):
                if word == magic and bit and mask >> bit & 1:
                    yield PageNo(block * PAGES_PER_BLOCK + bit)

    # ------------------------------------------------------------------ words

    def file(self, ino: Ino) -> str:
        """An inode, as messages show it."""
        page = self.inodes.page_of.get(ino >> 4)
        if page is None:
            return f"inode {ino}"
        return f"inode {ino} at {page * PAGE + (ino & 15) * INODE_BYTES:#x}"
