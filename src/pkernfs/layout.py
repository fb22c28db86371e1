"""The on-region format: constants and structures. docs/format.md is the same in words.

Only declarations and pure conversions live here; nothing reads or writes a region. All integers
are little-endian and naturally aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple, cast

from pkernfs.quantities import BlockNo, Ino, PageNo, PhysAddr, RegionOff

try:  # as random.py does: hashlib loads OpenSSL, for which every command would wait 3 ms
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b

PAGE = 4096
BLOCK = 2 << 20
PAGES_PER_BLOCK = BLOCK // PAGE
GIB = 1 << 30
BLOCKS_PER_GIB = GIB // BLOCK

VERSION_MAJOR = 1
VERSION_MINOR = 0
SIGNATURE = b"pkernfs\0"
MIN_REGION_BYTES = 4 * BLOCK

FEATURES_COMPAT = 0
FEATURES_RO_COMPAT = 0
#: Files may have segments, memory of their own outside the region (section 12).
FEATURE_SEGMENTS = 1
FEATURES_INCOMPAT = FEATURE_SEGMENTS

MAX_FILE_BYTES = (1 << 63) - 1
MAX_NAME_BYTES = 255
MAX_TARGET_BYTES = 4095
MAX_XATTR_BYTES = 65536
MAX_LINKS = (1 << 32) - 1


def _magic(text: bytes) -> int:
    return int.from_bytes(text, "little")


MAGIC_SUPERBLOCK = _magic(b"PKSB")
MAGIC_STATE = _magic(b"PKST")
MAGIC_BLOCK_MAP = _magic(b"PKBM")
MAGIC_PAGE_MAP = _magic(b"PKPM")
MAGIC_INODES = _magic(b"PKIN")
MAGIC_TREE = _magic(b"PKTR")
MAGIC_OVERFLOW = _magic(b"PKOV")
MAGIC_RECORD = _magic(b"PKJR")

MAGIC_NAMES = {
    MAGIC_SUPERBLOCK: "superblock",
    MAGIC_STATE: "state page",
    MAGIC_BLOCK_MAP: "block map",
    MAGIC_PAGE_MAP: "page map",
    MAGIC_INODES: "inode page",
    MAGIC_TREE: "tree node",
    MAGIC_OVERFLOW: "overflow page",
}

SUPERBLOCK_PAGE = PageNo(0)
STATE_PAGE = PageNo(1)
FIRST_MAP_PAGE = PageNo(2)
MAX_MAP_PAGES_IN_BLOCK_0 = PAGES_PER_BLOCK - FIRST_MAP_PAGE
BACKUP_PAGE = PageNo(PAGES_PER_BLOCK)
JOURNAL_PAGE = PageNo(PAGES_PER_BLOCK + 1)
JOURNAL_PAGES = PAGES_PER_BLOCK - 1

#: Owner of the pages that belong to no inode, and the inode number of nothing.
NO_INO = Ino(0)
#: In fields of structures: there is none. The page with this number is the superblock's.
NO_PAGE = PageNo(0)

# ------------------------------------------------------------------------------ page header

HEADER_BYTES = 64
# magic, checksum, self, owner, uuid
HEADER = Struct("<IIQQ16s")

# ------------------------------------------------------------------------------ superblock

SUPERBLOCK = Struct("<8sHHIIIQQQQQQQ16s64s")
SUPERBLOCK_OFFSET = 64
RANGES_OFFSET = 512
RANGE = Struct("<QQQQQI20x")
MAX_RANGES = 50
NO_PHYSICAL = PhysAddr((1 << 64) - 1)

# Where the region was: kind, number of pieces, alignment, name of the device; then the pieces
PLACEMENT = Struct("<HHI24s")
PLACEMENT_OFFSET = 224
PLACEMENT_DAX = 1
PIECE = Struct("<QQ")
PIECES_OFFSET = 256
MAX_PIECES = 16
NO_NODE = (1 << 32) - 1

# The pool that segments come from: kind, bytes that each segment's length is a multiple of
POOL = Struct("<II")
POOL_OFFSET = 3712
POOL_NONE = 0
POOL_DIRECTORY = 1
POOL_DAX = 2


class PoolFields(NamedTuple):
    """The kind of the pool that segments come from (section 3), and their unit in bytes."""

    pool: int
    granule: int


NO_POOL = PoolFields(POOL_NONE, 0)


class SuperblockFields(NamedTuple):
    """Superblock from offset 64, in the order of the format (section 3)."""

    signature: bytes
    version_major: int
    version_minor: int
    page_size: int
    block_size: int
    range_count: int
    feature_compat: int
    feature_ro_compat: int
    feature_incompat: int
    region_bytes: int
    created: int
    journal_page: PageNo
    journal_pages: int
    hash_key: bytes
    label: bytes


class RangeFields(NamedTuple):
    """Range table entry (section 3); block numbers, page numbers."""

    first_block: BlockNo
    blocks: int
    phys_base: PhysAddr
    map_page: PageNo
    map_pages: int
    node: int


# ------------------------------------------------------------------------------ state page

STATE = Struct("<IIQQQ16sQQQQQQ")
STATE_OFFSET = 64
STATE_CLEAN = 1
STATE_MOUNTED = 2
STATE_FROZEN = 3
STATE_FLAG_ERROR = 1


class StateFields(NamedTuple):
    """State page from offset 64 (section 4).

    ``free_inode_page`` is 1 + the index of an inode page, 0: none.
    """

    state: int
    flags: int
    mounts: int
    mounted_at: int
    unmounted_at: int
    boot_id: bytes
    inode_root: PageNo
    inode_pages: int
    free_inode_page: int
    inodes_used: int
    arrival: int
    written_by: int


ARRIVAL_FIRST_BOOT = 1
ARRIVAL_LIVE_UPDATE = 2
ARRIVAL_REMOUNT = 3

# Offsets of single fields that are stored on their own.
STATE_INODE_ROOT_OFFSET = 112
STATE_INODE_PAGES_OFFSET = 120
STATE_FREE_INODE_PAGE_OFFSET = 128
# The table of segments: root of its tree, the largest number that a segment has had.
STATE_SEGMENTS = Struct("<QQ")
STATE_SEGMENTS_OFFSET = 232

HANDOVER = Struct("<QQ16sQQQQQ")
HANDOVER_OFFSET = 160
HANDOVER_FLAG_DIGESTS = 1


class HandoverFields(NamedTuple):
    """Handover record in the state page (section 4); all zero: none."""

    number: int
    handed_over_at: int
    boot_id: bytes
    list_ino: Ino
    list_bytes: int
    list_digest: int
    flags: int
    phys_base: PhysAddr


NO_HANDOVER = HandoverFields(0, 0, bytes(16), NO_INO, 0, 0, 0, PhysAddr(0))

HISTORY = Struct("<QQQ16s16sIIQ")  # and 8 reserved bytes
HISTORY_OFFSET = 256
HISTORY_BYTES = 80
HISTORY_ENTRIES = 16
RESULT_UNKNOWN = 0
RESULT_METADATA = 1
RESULT_EVERYTHING = 2
RESULT_CHANGED = 3


class HistoryFields(NamedTuple):
    """Entry of the history in the state page (section 4)."""

    number: int
    handed_over_at: int
    mounted_at: int
    boot_id_before: bytes
    boot_id_after: bytes
    arrival: int
    result: int
    changed: int


LIST = Struct("<8sQQQQQ16s")
LIST_SIGNATURE = b"pkernfsH"
LIST_SIGNATURE_SEGMENTS = b"pkernfsS"
LIST_PAGE = Struct("<QQII")
LIST_SLOTS = Struct("<16I")
LIST_FILE = Struct("<QQ")
LIST_CHUNK = Struct("<QQ")
LIST_CHUNK_BYTES = BLOCK


class ListFields(NamedTuple):
    """Head of a handover's list (section 11)."""

    signature: bytes
    number: int
    pages: int
    inode_pages: int
    files: int
    chunks: int
    uuid: bytes


# ------------------------------------------------------------------------------ free space

BLOCK_MAP = Struct("<QQ")
BLOCK_MAP_OFFSET = 40
MAP_BYTES = 1344
MAP_BLOCKS = MAP_BYTES * 8
MAP_USED_OFFSET = 64
MAP_CARVED_OFFSET = MAP_USED_OFFSET + MAP_BYTES
MAP_ZERO_OFFSET = MAP_CARVED_OFFSET + MAP_BYTES

PAGE_MAP_CLASS_OFFSET = 40
PAGE_MAP_USED_OFFSET = 64
PAGE_MAP_USED_BYTES = PAGES_PER_BLOCK // 8
CLASS_META = 1
CLASS_DATA = 2

# ------------------------------------------------------------------------------ inodes

ROOT_INO = Ino(1)
IOMMU_INO = Ino(2)
INODE_BYTES = 256
SLOTS_PER_INODE_PAGE = 16
FULL_INODE_PAGE = 0xFFFE
# index, next_free, used, pending, listed, reserved, generation
INODE_PAGE = Struct("<QQHHH2xI")
INODE_PAGE_OFFSET = 40

INODE = Struct("<QIIIIIIQqqqqIIQQQQQQ")
INODE_INLINE_OFFSET = 128
INODE_INLINE_BYTES = 128
INODE_FLAG_BODY = 1
INODE_FLAG_PENDING = 2
INODE_FLAG_TABLE = 4
INODE_FLAG_SEGMENT = 8
INODE_FLAG_SEGMENT_ON = 16
INODE_FLAG_SEGMENT_OFF = 32
INODE_FLAG_NATIVE = 64
INODE_INLINE_SHIFT = 8
MAX_INLINE_EXTENTS = 5
PENDING_TO_END = MAX_FILE_BYTES


class InodeFields(NamedTuple):
    """Inode but for its inline bytes (section 6)."""

    ino: Ino
    generation: int
    mode: int
    uid: int
    gid: int
    nlink: int
    flags: int
    size: int
    atime: int
    mtime: int
    ctime: int
    btime: int
    rdev_major: int
    rdev_minor: int
    data_pages: int
    xattr_root: PageNo
    pending_start: int
    pending_end: int
    parent: Ino
    body: PageNo


EXTENT = Struct("<QQQ")
EXTENT_BYTES = EXTENT.size


class Extent(NamedTuple):
    """``pages`` pages of a file, from its page ``file_page`` on: region pages, from ``page`` on.

    In the tree of the inode table ``file_page`` is the index of an inode page.
    """

    file_page: int
    page: PageNo
    pages: int


# ------------------------------------------------------------------------------ trees

TREE_OFFSET = 40
# kind, level, count, heap, garbage
TREE = Struct("<BBHHH")
TREE_SLOTS_OFFSET = 64
TREE_EXTENTS = 1
TREE_NAMES = 2
TREE_XATTRS = 3
TREE_SEGMENTS = 4
MAX_TREE_LEVELS = 16
INNER_SLOT = Struct("<QQ")
ITEM_SLOT = Struct("<QHHI")
MAX_INNER_SLOTS = (PAGE - TREE_SLOTS_OFFSET) // INNER_SLOT.size
MAX_EXTENT_SLOTS = (PAGE - TREE_SLOTS_OFFSET) // EXTENT_BYTES

# ------------------------------------------------------------------------------ names, attributes

NAME_ITEM = Struct("<QB")
XATTR_ITEM = Struct("<BBHI")
XATTR_INLINE = 0
XATTR_OVERFLOW = 1
HASH_BITS = 52
COLLISION_BITS = 11
MAX_COLLISIONS = 1 << COLLISION_BITS

OVERFLOW = Struct("<QH")
OVERFLOW_OFFSET = 40
OVERFLOW_DATA_OFFSET = 64
OVERFLOW_DATA_BYTES = PAGE - OVERFLOW_DATA_OFFSET

# ------------------------------------------------------------------------------ segments

# ino, kind, state, pieces, node, length, valid, handle, align, name; then the pieces
SEGMENT = Struct("<QBBHIQQQI4x24s")
SEGMENT_NEW = 1
SEGMENT_IN_USE = 2
SEGMENT_DEAD = 3
MAX_SEGMENT_PIECES = 64


class SegmentFields(NamedTuple):
    """Row of the table of segments (section 12) but for its pieces."""

    ino: Ino
    kind: int
    state: int
    pieces: int
    node: int
    length: int
    valid: int
    handle: int
    align: int
    name: bytes


# ------------------------------------------------------------------------------ journal

# commit, magic, checksum, sequence, length, runs, uuid, reserved
RECORD = Struct("<QIIQQQ16sQ")
RUN = Struct("<QQ")

# ------------------------------------------------------------------------------ conversions


def block_of(page: PageNo) -> BlockNo:
    """The block that a page is in."""
    return BlockNo(page // PAGES_PER_BLOCK)


def first_page(block: BlockNo) -> PageNo:
    """The first page of a block; its page map, if it has one."""
    return PageNo(block * PAGES_PER_BLOCK)


def page_offset(page: PageNo) -> RegionOff:
    """Where a page starts."""
    return RegionOff(page * PAGE)


def uuid_text(uuid: bytes) -> str:
    """16 bytes as a UUID is written."""
    h = uuid.hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def name_key(name: bytes, hash_key: bytes) -> int:
    """First of the 2048 keys that a name may have in a name or attribute tree (section 8)."""
    digest = blake2b(name, digest_size=8, key=hash_key).digest()
    value = int.from_bytes(digest, "little") & ((1 << HASH_BITS) - 1)
    return (value or 1) << COLLISION_BITS


def inos_of(index: int) -> Sequence[Ino]:
    """Return the numbers of the inodes in a page of the inode table, by slot (section 6)."""
    first = index * SLOTS_PER_INODE_PAGE
    return cast(Sequence[Ino], range(first, first + SLOTS_PER_INODE_PAGE))  # one call for all
