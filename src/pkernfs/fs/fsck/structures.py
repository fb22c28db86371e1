"""Each structure of the format, checked: from bytes of a page to a frozen value, or a refusal.

Pure functions of bytes; docs/format.md is the only authority. A :class:`CorruptionError` raised
here carries the reason alone (``bad magic: got .., expected ..``): the caller knows what and where.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from struct import Struct, calcsize
from typing import Any, NamedTuple

from pkernfs import layout
from pkernfs.alloc import bitmap
from pkernfs.errors import CorruptionError, FormatError
from pkernfs.layout import (
    BLOCK,
    HEADER,
    INODE,
    INODE_BYTES,
    INODE_INLINE_BYTES,
    INODE_INLINE_OFFSET,
    MAGIC_NAMES,
    MAP_BLOCKS,
    MAP_BYTES,
    NO_PAGE,
    PAGE,
    PAGES_PER_BLOCK,
    TREE_EXTENTS,
    TREE_SLOTS_OFFSET,
    Extent,
    uuid_text,
)
from pkernfs.quantities import BlockNo, Ino, PageNo, PhysRange
from pkernfs.region.checksum import page_checksum

Buffer = bytes | bytearray | memoryview

# No file reaches beyond this many pages.
MAX_FILE_PAGES = (layout.MAX_FILE_BYTES + 1) // PAGE

_FILE_TYPES = frozenset(
    (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFBLK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
    )
)
# Found once: every inode is parsed several times.
_unpack_inode = INODE.unpack_from
_as_inode = layout.InodeFields._make


def _unpack_only(*names: str) -> Callable[[Buffer, int], tuple[Any, ...]]:
    """Unpack some fields of an inode, in the order of the format: 0.1 us, not 0.6."""
    codes = zip(layout.InodeFields._fields, INODE.format.removeprefix("<"), strict=True)
    parts = (code if name in names else f"{calcsize(f'<{code}')}x" for name, code in codes)
    return Struct("<" + "".join(parts)).unpack_from


_unpack_nlink = _unpack_only("nlink")
_unpack_trees = _unpack_only("flags", "xattr_root")
# Flags of a file whose data is in the region: it has no segment.
_SEGMENT_CHOICE = layout.INODE_FLAG_SEGMENT_ON | layout.INODE_FLAG_SEGMENT_OFF
_WITHOUT_SEGMENT = (
    layout.INODE_FLAG_BODY | layout.INODE_FLAG_TABLE | 0xFF << layout.INODE_INLINE_SHIFT
)

_XATTR_PREFIXES = (b"user.", b"trusted.", b"security.")


def file_type(mode: int) -> int:
    """``mode >> 12`` without what may be above it: the type as names have it."""
    return mode >> 12 & 15


T_DIR = stat.S_IFDIR >> 12
T_REG = stat.S_IFREG >> 12
T_LNK = stat.S_IFLNK >> 12


# ------------------------------------------------------------------------------ header


def check_header(
    page: Buffer, number: PageNo, magic: int, uuid: bytes | None, *, sealed: bool = True
) -> Ino:
    """Check a page's header (section 2); return its owner, which is 0 for no inode.

    ``sealed`` False skips the checksum: an image in memory gets it when it is stored.

    :raises CorruptionError: magic, checksum, self or uuid.
    """
    got, checksum, itself, owner, its_uuid = HEADER.unpack_from(page)
    if got != magic:
        name = MAGIC_NAMES.get(got)
        raise CorruptionError(
            f"bad magic: got {name or f'{got:#010x}'}, expected {MAGIC_NAMES[magic]}"
        )
    if sealed:
        expected = page_checksum(page)
        if checksum != expected:
            raise CorruptionError(f"bad checksum: got {checksum:#010x}, expected {expected:#010x}")
    if itself != number:
        raise CorruptionError(f"not its own page: got {itself:#x}, expected {number:#x}")
    if uuid is not None and its_uuid != uuid:
        raise CorruptionError(f"of another file system: got uuid {uuid_text(its_uuid)}")
    return Ino(owner)


# ------------------------------------------------------------------------------ superblock


class MapPage(NamedTuple):
    """A block map page, and which blocks it has the bits of."""

    page: PageNo
    first_block: BlockNo
    blocks: int


class Pool(NamedTuple):
    """The pool that segments come from (section 12).

    ``granule`` in bytes. ``base`` are the physical ranges of the region itself, if they are known.
    """

    kind: int
    granule: int
    base: tuple[PhysRange, ...] = ()


class Superblock(NamedTuple):
    """Superblock (section 3); ``ranges`` as in the table."""

    uuid: bytes
    fields: layout.SuperblockFields
    ranges: tuple[layout.RangeFields, ...]
    pool: Pool

    @property
    def blocks(self) -> int:
        """Blocks of the region."""
        return self.fields.region_bytes // BLOCK

    def map_pages(self) -> list[MapPage]:
        """List the block map pages, in the order of their blocks."""
        found = []
        for r in self.ranges:
            for i in range(r.map_pages):
                first = i * MAP_BLOCKS
                blocks = min(MAP_BLOCKS, r.blocks - first)
                block = BlockNo(r.first_block + first)
                found.append(MapPage(PageNo(r.map_page + i), block, blocks))
        return found


def parse_superblock(page: Buffer, number: PageNo) -> Superblock:
    """Parse the superblock at page ``number``.

    :raises CorruptionError: damaged.
    :raises FormatError: intact, but of a version or with features that this code must not touch.
    """
    check_header(page, number, layout.MAGIC_SUPERBLOCK, None)
    fields = layout.SuperblockFields._make(
        layout.SUPERBLOCK.unpack_from(page, layout.SUPERBLOCK_OFFSET)
    )
    _expect("signature", fields.signature, layout.SIGNATURE)
    _refuse_unknown(fields)
    _expect("page_size", fields.page_size, PAGE)
    _expect("block_size", fields.block_size, BLOCK)
    _expect("journal_page", fields.journal_page, layout.JOURNAL_PAGE)
    _expect("journal_pages", fields.journal_pages, layout.JOURNAL_PAGES)
    if fields.region_bytes % BLOCK or fields.region_bytes < layout.MIN_REGION_BYTES:
        raise CorruptionError(f"bad region_bytes: got {fields.region_bytes:#x}")
    if not 1 <= fields.range_count <= layout.MAX_RANGES:
        raise CorruptionError(f"bad range_count: got {fields.range_count}, expected 1..50")
    ranges = tuple(
        layout.RangeFields._make(
            layout.RANGE.unpack_from(page, layout.RANGES_OFFSET + i * layout.RANGE.size)
        )
        for i in range(fields.range_count)
    )
    _check_ranges(ranges, fields.region_bytes // BLOCK)
    pool = _parse_pool(page, bool(fields.feature_incompat & layout.FEATURE_SEGMENTS))
    return Superblock(bytes(HEADER.unpack_from(page)[4]), fields, ranges, pool)


def _refuse_unknown(fields: layout.SuperblockFields) -> None:
    if fields.version_major != layout.VERSION_MAJOR:
        raise FormatError(
            f"superblock: unsupported version: got {fields.version_major}.{fields.version_minor}, "
            f"expected {layout.VERSION_MAJOR}.x"
        )
    for word, got, known in (
        ("feature_incompat", fields.feature_incompat, layout.FEATURES_INCOMPAT),
        ("feature_ro_compat", fields.feature_ro_compat, layout.FEATURES_RO_COMPAT),
    ):
        if got & ~known:
            raise FormatError(f"superblock: unknown {word}: got {got & ~known:#x}")


def _check_ranges(ranges: tuple[layout.RangeFields, ...], blocks: int) -> None:
    end = 0
    for i, r in enumerate(ranges):
        if r.first_block != end or not 0 < r.blocks <= blocks - end:
            raise CorruptionError(f"bad range {i}: got blocks {r.first_block}+{r.blocks}")
        end = r.first_block + r.blocks
        _expect(f"map_pages of range {i}", r.map_pages, -(-r.blocks // MAP_BLOCKS))
        first, last = r.map_page, r.map_page + r.map_pages - 1
        in_block_0 = i == 0 and first == layout.FIRST_MAP_PAGE and last < PAGES_PER_BLOCK
        in_own = r.first_block * PAGES_PER_BLOCK <= first and last < end * PAGES_PER_BLOCK
        if not in_block_0 and not (in_own and first >= 2 * PAGES_PER_BLOCK):
            raise CorruptionError(f"bad map_page of range {i}: got {first:#x}")
    _expect("blocks of the ranges", end, blocks)


def _parse_pool(page: Buffer, may_have_segments: bool) -> Pool:
    kind, granule = layout.POOL.unpack_from(page, layout.POOL_OFFSET)
    if kind not in (layout.POOL_NONE, layout.POOL_DIRECTORY, layout.POOL_DAX):
        raise CorruptionError(f"bad pool: got {kind}, expected 0..2")
    if bool(kind) != may_have_segments:
        raise CorruptionError(f"bad pool: got {kind}, but the feature bit {may_have_segments:d}")
    if not kind:
        _expect("granule without a pool", granule, 0)
    elif granule < BLOCK or granule & (granule - 1):
        raise CorruptionError(f"bad granule: got {granule:#x}, expected a power of two >= 2 MiB")
    return Pool(kind, granule, _parse_placement(page) if kind == layout.POOL_DAX else ())


def _parse_placement(page: Buffer) -> tuple[PhysRange, ...]:
    """Where the region was; nothing if that is not recorded. A mount for writing corrects it."""
    kind, count, _, _ = layout.PLACEMENT.unpack_from(page, layout.PLACEMENT_OFFSET)
    if kind != layout.PLACEMENT_DAX:
        return ()
    end = layout.PIECES_OFFSET + min(count, layout.MAX_PIECES) * layout.PIECE.size
    pieces = layout.PIECE.iter_unpack(page[layout.PIECES_OFFSET : end])
    return tuple(PhysRange.of(start, length) for start, length in pieces)


def _expect(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise CorruptionError(f"bad {what}: got {got!r}, expected {expected!r}")


# ------------------------------------------------------------------------------ state page


def parse_state(page: Buffer) -> layout.StateFields:
    """Fields of a state page whose header was checked (section 4).

    :raises CorruptionError: an unknown state.
    """
    fields = layout.StateFields._make(layout.STATE.unpack_from(page, layout.STATE_OFFSET))
    if fields.state not in (layout.STATE_CLEAN, layout.STATE_MOUNTED, layout.STATE_FROZEN):
        raise CorruptionError(f"bad state: got {fields.state}, expected 1..3")
    return fields


# ------------------------------------------------------------------------------ free space


class BlockMap(NamedTuple):
    """Block map page (section 5): one byte for each block, and whether all else is in order."""

    used: bytearray
    carved: bytearray
    zero: bytearray
    tidy: bool


def pack_bits(flags: Buffer) -> bytes:
    """The bitmap (whole bytes) of one byte, 0 or 1, for each bit."""
    if flags == bytes(len(flags)):
        return bytes(-(-len(flags) // 8))
    text = bytes(flags[::-1]).translate(bytes([48, 49]) + bytes(254))
    return int(text or b"0", 2).to_bytes(-(-len(flags) // 8), "little")


def parse_block_map(page: Buffer, first: BlockNo, blocks: int) -> BlockMap:
    """Bitmaps of a block map page whose header was checked.

    :raises CorruptionError: it is for other blocks.
    """
    got = layout.BLOCK_MAP.unpack_from(page, layout.BLOCK_MAP_OFFSET)
    if got != (first, blocks):
        raise CorruptionError(f"bad blocks: got {got[0]}+{got[1]}, expected {first}+{blocks}")
    maps = []
    tidy = True
    for offset in (
        layout.MAP_USED_OFFSET,
        layout.MAP_CARVED_OFFSET,
        layout.MAP_ZERO_OFFSET,
    ):
        data = page[offset : offset + MAP_BYTES]
        tidy = tidy and not int.from_bytes(data, "little") >> blocks
        maps.append(bitmap.expand(bytes(data), blocks))
    return BlockMap(maps[0], maps[1], maps[2], tidy)


class PageMap(NamedTuple):
    """Page map (section 5): class, and an integer bitmap of the pages in use."""

    kind: int
    used: int


def parse_page_map(page: Buffer) -> PageMap:
    """A page map whose header was checked."""
    at = layout.PAGE_MAP_CLASS_OFFSET
    kind = int.from_bytes(page[at : at + 4], "little")
    start = layout.PAGE_MAP_USED_OFFSET
    used = int.from_bytes(page[start : start + layout.PAGE_MAP_USED_BYTES], "little")
    return PageMap(kind, used)


# ------------------------------------------------------------------------------ inodes


class InodePage(NamedTuple):
    """Header of an inode page from offset 40 on (section 6)."""

    own_index: int
    next_free: int
    used: int
    pending: int
    listed: int
    generation: int


def parse_inode_page(page: Buffer) -> InodePage:
    """Header of an inode page whose common header was checked."""
    return InodePage._make(layout.INODE_PAGE.unpack_from(page, layout.INODE_PAGE_OFFSET))


def parse_inode(page: Buffer, slot: int) -> layout.InodeFields:
    """The fields of the inode in a slot, unchecked."""
    return _as_inode(_unpack_inode(page, slot * INODE_BYTES))


def link_count(page: Buffer, slot: int) -> int:
    """The field ``nlink`` of the inode in a slot, unchecked."""
    (nlink,) = _unpack_nlink(page, slot * INODE_BYTES)
    return int(nlink)


def has_tree(page: Buffer, slot: int) -> bool:
    """Tell whether the inode in a slot says that it has attributes, or a body outside."""
    flags, xattr_root = _unpack_trees(page, slot * INODE_BYTES)
    return bool(xattr_root or flags & layout.INODE_FLAG_BODY)


def check_inode(f: layout.InodeFields, ino: Ino) -> None:
    """Refuse an inode that cannot be told for what it is; small faults are not looked at.

    :raises CorruptionError: with the field, what it is and what it must be.
    """
    _expect("ino", f.ino, ino)
    if f.mode & 0xF000 not in _FILE_TYPES:
        raise CorruptionError(f"bad type in mode: got {f.mode:#o}")
    kind = file_type(f.mode)
    if f.size > layout.MAX_FILE_BYTES:
        raise CorruptionError(f"bad size: got {f.size:#x}")
    if kind == T_LNK:
        if not 1 <= f.size <= layout.MAX_TARGET_BYTES:
            raise CorruptionError(f"bad size of a symlink: got {f.size}, expected 1..4095")
        outside = bool(f.flags & layout.INODE_FLAG_BODY)
        if not outside and f.size > INODE_INLINE_BYTES:
            raise CorruptionError(f"bad size of an inline symlink: got {f.size}, expected 1..128")


def flag_faults(f: layout.InodeFields) -> int:
    """Flag bits that the inode must not have."""
    kind = file_type(f.mode)
    allowed = layout.INODE_FLAG_BODY if kind in (T_REG, T_DIR, T_LNK) else 0
    if kind == T_REG:
        allowed |= layout.INODE_FLAG_PENDING | layout.INODE_FLAG_TABLE
        if not f.flags & layout.INODE_FLAG_BODY:
            allowed |= 0xFF << layout.INODE_INLINE_SHIFT
        if not f.flags & _WITHOUT_SEGMENT:
            allowed |= layout.INODE_FLAG_SEGMENT
            if has_segment(f):
                allowed |= layout.INODE_FLAG_NATIVE
        choice = f.flags & _SEGMENT_CHOICE
        if choice != _SEGMENT_CHOICE and not f.flags & layout.INODE_FLAG_TABLE:
            allowed |= choice
    return f.flags & ~allowed


def has_segment(f: layout.InodeFields) -> bool:
    """Tell if the inode's data is a segment (section 12), and not in the region."""
    return bool(f.flags & layout.INODE_FLAG_SEGMENT)


def device_number_fits(f: layout.InodeFields) -> bool:
    """Tell if Linux can have the device number; anything but a device must have 0."""
    if stat.S_ISCHR(f.mode) or stat.S_ISBLK(f.mode):
        return f.rdev_major < 1 << 12 and f.rdev_minor < 1 << 20
    return not f.rdev_major and not f.rdev_minor


def inline_extents(page: Buffer, slot: int, flags: int) -> list[Extent]:
    """The extents in an inode, unchecked.

    :raises CorruptionError: more than fit.
    """
    count = flags >> layout.INODE_INLINE_SHIFT & 0xFF
    if count > layout.MAX_INLINE_EXTENTS:
        raise CorruptionError(f"bad number of inline extents: got {count}, expected 0..5")
    if not count:  # so it is for most inodes
        return []
    start = slot * INODE_BYTES + INODE_INLINE_OFFSET
    raw = layout.EXTENT.iter_unpack(page[start : start + count * layout.EXTENT_BYTES])
    return list(map(Extent._make, raw))


# ------------------------------------------------------------------------------ trees


class Node(NamedTuple):
    """Header of a tree node (section 7)."""

    owner: Ino
    kind: int
    level: int
    slots: int
    heap: int
    garbage: int


def parse_node(page: Buffer, owner: Ino, kind: int) -> Node:
    """A tree node whose common header was checked (but the owner).

    :raises CorruptionError: owner, kind, level or count.
    """
    its_owner = HEADER.unpack_from(page)[3]
    node = Node(its_owner, *layout.TREE.unpack_from(page, layout.TREE_OFFSET))
    _expect("owner", node.owner, owner)
    _expect("kind of tree", node.kind, kind)
    if node.level >= layout.MAX_TREE_LEVELS:
        raise CorruptionError(f"bad level: got {node.level}, expected 0..15")
    size = 16 if node.level or kind != TREE_EXTENTS else layout.EXTENT_BYTES
    most = (PAGE - TREE_SLOTS_OFFSET) // size
    if not 1 <= node.slots <= most:
        raise CorruptionError(f"bad count: got {node.slots}, expected 1..{most}")
    return node


class InnerSlot(NamedTuple):
    """Slot of an inner node: the lowest key of a child, and the child's page."""

    key: int
    page: PageNo


class ItemSlot(NamedTuple):
    """Slot of a leaf of kind 2, 3 or 4: a key, and where in the page its item is, in bytes."""

    key: int
    offset: int
    length: int
    reserved: int


class ItemCheck(NamedTuple):
    """Which items of a leaf can be used, by slot; and what is wrong with them, or ``""``."""

    good: list[bool]
    reason: str


def inner_slots(page: Buffer, node: Node) -> list[InnerSlot]:
    """The slots of an inner node."""
    end = TREE_SLOTS_OFFSET + node.slots * layout.INNER_SLOT.size
    return list(map(InnerSlot._make, layout.INNER_SLOT.iter_unpack(page[TREE_SLOTS_OFFSET:end])))


def extent_slots(page: Buffer, node: Node) -> list[Extent]:
    """The extents of a leaf of kind 1."""
    end = TREE_SLOTS_OFFSET + node.slots * layout.EXTENT_BYTES
    return list(map(Extent._make, layout.EXTENT.iter_unpack(page[TREE_SLOTS_OFFSET:end])))


def item_slots(page: Buffer, node: Node) -> list[ItemSlot]:
    """The slots of a leaf of kind 2, 3 or 4."""
    end = TREE_SLOTS_OFFSET + node.slots * layout.ITEM_SLOT.size
    return list(map(ItemSlot._make, layout.ITEM_SLOT.iter_unpack(page[TREE_SLOTS_OFFSET:end])))


def check_items(slots: list[ItemSlot], node: Node) -> ItemCheck:
    """Tell of each item of a leaf if it lies inside and clear of others.

    ``heap`` and ``garbage`` are compared with what the items take.
    """
    floor = TREE_SLOTS_OFFSET + node.slots * layout.ITEM_SLOT.size
    good = [True] * len(slots)
    reason = ""
    end = total = 0
    lowest = PAGE
    in_order = sorted([(offset, length, i) for i, (_, offset, length, _) in enumerate(slots)])
    for offset, length, i in in_order:
        if offset < floor or offset + length > PAGE:
            reason = f"item outside the heap: got {offset}+{length}, expected {floor}..{PAGE}"
            good[i] = False
        elif offset < end:
            reason = f"items overlap: got {offset}+{length} below {end}"
            good[i] = False
        else:
            end = offset + length
            total += length
            lowest = min(lowest, offset)
    if not reason and not floor <= node.heap <= lowest:
        reason = f"bad heap: got {node.heap}, expected {lowest}"
    if not reason and node.garbage != PAGE - node.heap - total:
        reason = f"bad garbage: got {node.garbage}, expected {PAGE - node.heap - total}"
    return ItemCheck(good, reason)


# ------------------------------------------------------------------------------ names, attributes


def name_fault(name: bytes) -> str:
    """Return the reason why this cannot be a file name; ``""`` if it can."""
    if not 1 <= len(name) <= layout.MAX_NAME_BYTES:
        return f"bad length: got {len(name)}, expected 1..255"
    if b"/" in name or b"\0" in name or name in (b".", b".."):
        return "not a file name"
    return ""


class Attribute(NamedTuple):
    """Item of an extended attribute (section 8); ``page`` 0: the value is in the item."""

    name: bytes
    value_bytes: int
    page: PageNo


def parse_attribute(item: bytes) -> Attribute:
    """An item of an attribute tree.

    :raises CorruptionError: lengths, name or place of the value.
    """
    head = layout.XATTR_ITEM.size
    if len(item) < head:
        raise CorruptionError(f"item too short: got {len(item)} bytes")
    name_bytes, where, _, value_bytes = layout.XATTR_ITEM.unpack_from(item)
    if where not in (layout.XATTR_INLINE, layout.XATTR_OVERFLOW):
        raise CorruptionError(f"bad place of the value: got {where}, expected 0 or 1")
    if value_bytes > layout.MAX_XATTR_BYTES:
        raise CorruptionError(f"value too long: got {value_bytes}, expected 0..65536")
    rest = 8 if where else value_bytes
    _expect("length of the item", len(item), head + name_bytes + rest)
    name = item[head : head + name_bytes]
    if b"\0" in name or not any(name.startswith(p) and name != p for p in _XATTR_PREFIXES):
        raise CorruptionError(f"bad name: got {name!r}")
    page = PageNo(int.from_bytes(item[-8:], "little")) if where else NO_PAGE
    if where and not page:
        raise CorruptionError("value without a page")
    return Attribute(name, value_bytes, page)


class Overflow(NamedTuple):
    """Header of an overflow page (section 8); ``following`` 0: the last of its value."""

    following: PageNo
    length: int


def parse_overflow(page: Buffer, owner: Ino) -> Overflow:
    """Parse an overflow page whose common header was checked.

    :raises CorruptionError: owner or length.
    """
    _expect("owner", HEADER.unpack_from(page)[3], owner)
    following, length = layout.OVERFLOW.unpack_from(page, layout.OVERFLOW_OFFSET)
    if not 1 <= length <= layout.OVERFLOW_DATA_BYTES:
        raise CorruptionError(f"bad length: got {length}, expected 1..4032")
    return Overflow(following, length)
