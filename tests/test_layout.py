"""The format, typed out by hand: offset and size of every field (docs/format.md)."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import struct
from pathlib import Path
from struct import Struct

import pytest

from pkernfs import layout

DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"

Row = tuple[int, int, str]

HEADER: list[Row] = [
    (0, 4, "magic"),
    (4, 4, "checksum"),
    (8, 8, "self"),
    (16, 8, "owner"),
    (24, 16, "uuid"),
]
SUPERBLOCK: list[Row] = [
    (64, 8, "signature"),
    (72, 2, "version_major"),
    (74, 2, "version_minor"),
    (76, 4, "page_size"),
    (80, 4, "block_size"),
    (84, 4, "range_count"),
    (88, 8, "feature_compat"),
    (96, 8, "feature_ro_compat"),
    (104, 8, "feature_incompat"),
    (112, 8, "region_bytes"),
    (120, 8, "created"),
    (128, 8, "journal_page"),
    (136, 8, "journal_pages"),
    (144, 16, "hash_key"),
    (160, 64, "label"),
]
PLACEMENT: list[Row] = [
    (224, 2, "placement"),
    (226, 2, "pieces"),
    (228, 4, "align"),
    (232, 24, "device"),
]
PIECE: list[Row] = [
    (0, 8, "start"),
    (8, 8, "bytes"),
]
RANGE: list[Row] = [
    (0, 8, "first_block"),
    (8, 8, "blocks"),
    (16, 8, "phys_base"),
    (24, 8, "map_page"),
    (32, 8, "map_pages"),
    (40, 4, "node"),
]
STATE: list[Row] = [
    (64, 4, "state"),
    (68, 4, "flags"),
    (72, 8, "mounts"),
    (80, 8, "mounted_at"),
    (88, 8, "unmounted_at"),
    (96, 16, "boot_id"),
    (112, 8, "inode_root"),
    (120, 8, "inode_pages"),
    (128, 8, "free_inode_page"),
    (136, 8, "inodes_used"),
    (144, 8, "arrival"),
    (152, 8, "written_by"),
]
HANDOVER: list[Row] = [
    (0, 8, "number"),
    (8, 8, "handed_over_at"),
    (16, 16, "boot_id"),
    (32, 8, "list_ino"),
    (40, 8, "list_bytes"),
    (48, 8, "list_digest"),
    (56, 8, "flags"),
    (64, 8, "phys_base"),
]
HISTORY: list[Row] = [
    (0, 8, "number"),
    (8, 8, "handed_over_at"),
    (16, 8, "mounted_at"),
    (24, 16, "boot_id_before"),
    (40, 16, "boot_id_after"),
    (56, 4, "arrival"),
    (60, 4, "result"),
    (64, 8, "changed"),
]
LIST: list[Row] = [
    (0, 8, "signature"),
    (8, 8, "number"),
    (16, 8, "pages"),
    (24, 8, "inode_pages"),
    (32, 8, "files"),
    (40, 8, "chunks"),
    (48, 16, "uuid"),
]
POOL: list[Row] = [(3712, 4, "pool"), (3716, 4, "granule")]
STATE_SEGMENTS: list[Row] = [(232, 8, "segment_root"), (240, 8, "last_segment")]
SEGMENT: list[Row] = [
    (0, 8, "ino"),
    (8, 1, "kind"),
    (9, 1, "state"),
    (10, 2, "pieces"),
    (12, 4, "node"),
    (16, 8, "length"),
    (24, 8, "valid"),
    (32, 8, "handle"),
    (40, 4, "align"),
    (48, 24, "name"),
]
BLOCK_MAP: list[Row] = [(40, 8, "first_block"), (48, 8, "blocks")]
INODE_PAGE: list[Row] = [
    (40, 8, "index"),
    (48, 8, "next_free"),
    (56, 2, "used"),
    (58, 2, "pending"),
    (60, 2, "listed"),
    (64, 4, "generation"),
]
INODE: list[Row] = [
    (0, 8, "ino"),
    (8, 4, "generation"),
    (12, 4, "mode"),
    (16, 4, "uid"),
    (20, 4, "gid"),
    (24, 4, "nlink"),
    (28, 4, "flags"),
    (32, 8, "size"),
    (40, 8, "atime"),
    (48, 8, "mtime"),
    (56, 8, "ctime"),
    (64, 8, "btime"),
    (72, 4, "rdev_major"),
    (76, 4, "rdev_minor"),
    (80, 8, "data_pages"),
    (88, 8, "xattr_root"),
    (96, 8, "pending_start"),
    (104, 8, "pending_end"),
    (112, 8, "parent"),
    (120, 8, "body"),
]
TREE: list[Row] = [
    (40, 1, "kind"),
    (41, 1, "level"),
    (42, 2, "count"),
    (44, 2, "heap"),
    (46, 2, "garbage"),
]
OVERFLOW: list[Row] = [(40, 8, "next"), (48, 2, "length")]
RECORD: list[Row] = [
    (0, 8, "commit"),
    (8, 4, "magic"),
    (12, 4, "checksum"),
    (16, 8, "sequence"),
    (24, 8, "length"),
    (32, 8, "runs"),
    (40, 16, "uuid"),
    (56, 8, "reserved"),
]
# In the text of the format, not in tables.
EXTENT: list[Row] = [(0, 8, "file_page"), (8, 8, "page"), (16, 8, "pages")]
INNER_SLOT: list[Row] = [(0, 8, "key"), (8, 8, "page")]
ITEM_SLOT: list[Row] = [(0, 8, "key"), (8, 2, "offset"), (10, 2, "length"), (12, 4, "zero")]
NAME_ITEM: list[Row] = [(0, 8, "ino"), (8, 1, "type")]
XATTR_ITEM: list[Row] = [
    (0, 1, "name_length"),
    (1, 1, "where"),
    (2, 2, "zero"),
    (4, 4, "value_length"),
]
RUN: list[Row] = [(0, 8, "offset"), (8, 8, "words")]
LIST_PAGE: list[Row] = [(0, 8, "page"), (8, 8, "owner"), (16, 4, "magic"), (20, 4, "checksum")]
LIST_FILE: list[Row] = [(0, 8, "ino"), (8, 8, "chunks")]
LIST_CHUNK: list[Row] = [(0, 8, "number"), (8, 8, "digest")]

TABLES = {
    "HEADER": (layout.HEADER, 0, HEADER),
    "SUPERBLOCK": (layout.SUPERBLOCK, layout.SUPERBLOCK_OFFSET, SUPERBLOCK),
    "PLACEMENT": (layout.PLACEMENT, layout.PLACEMENT_OFFSET, PLACEMENT),
    "PIECE": (layout.PIECE, 0, PIECE),
    "RANGE": (layout.RANGE, 0, RANGE),
    "STATE": (layout.STATE, layout.STATE_OFFSET, STATE),
    "POOL": (layout.POOL, layout.POOL_OFFSET, POOL),
    "STATE_SEGMENTS": (layout.STATE_SEGMENTS, layout.STATE_SEGMENTS_OFFSET, STATE_SEGMENTS),
    "SEGMENT": (layout.SEGMENT, 0, SEGMENT),
    "BLOCK_MAP": (layout.BLOCK_MAP, layout.BLOCK_MAP_OFFSET, BLOCK_MAP),
    "INODE_PAGE": (layout.INODE_PAGE, layout.INODE_PAGE_OFFSET, INODE_PAGE),
    "INODE": (layout.INODE, 0, INODE),
    "TREE": (layout.TREE, layout.TREE_OFFSET, TREE),
    "OVERFLOW": (layout.OVERFLOW, layout.OVERFLOW_OFFSET, OVERFLOW),
    "RECORD": (layout.RECORD, 0, RECORD),
    "EXTENT": (layout.EXTENT, 0, EXTENT),
    "INNER_SLOT": (layout.INNER_SLOT, 0, INNER_SLOT),
    "ITEM_SLOT": (layout.ITEM_SLOT, 0, ITEM_SLOT),
    "NAME_ITEM": (layout.NAME_ITEM, 0, NAME_ITEM),
    "XATTR_ITEM": (layout.XATTR_ITEM, 0, XATTR_ITEM),
    "RUN": (layout.RUN, 0, RUN),
    "HANDOVER": (layout.HANDOVER, 0, HANDOVER),
    "HISTORY": (layout.HISTORY, 0, HISTORY),
    "LIST": (layout.LIST, 0, LIST),
    "LIST_PAGE": (layout.LIST_PAGE, 0, LIST_PAGE),
    "LIST_FILE": (layout.LIST_FILE, 0, LIST_FILE),
    "LIST_CHUNK": (layout.LIST_CHUNK, 0, LIST_CHUNK),
}
IN_TEXT = {"PIECE", "EXTENT", "INNER_SLOT", "ITEM_SLOT", "NAME_ITEM", "XATTR_ITEM", "RUN"}
IN_TEXT |= {"LIST_PAGE", "LIST_FILE", "LIST_CHUNK"}


def _spans(structure: Struct) -> list[tuple[int, int]]:
    """Offset and size of each field, found by what changes when it does."""
    nothing = structure.unpack(bytes(structure.size))
    spans = []
    for i, zero in enumerate(nothing):
        fillings = [-1, *((1 << bits) - 1 for bits in (8, 16, 32, 64))]
        widest: list[int] = []
        for value in [b"\xff" * len(zero)] if isinstance(zero, bytes) else fillings:
            try:
                packed = structure.pack(*nothing[:i], value, *nothing[i + 1 :])
            except struct.error:  # not that wide, or not signed
                continue
            found = [at for at, byte in enumerate(packed) if byte]
            widest = max(widest, found, key=len)
        assert widest == list(range(widest[0], widest[-1] + 1))
        spans.append((widest[0], len(widest)))
    return spans


@pytest.mark.parametrize("name", TABLES)
def test_offsets_and_sizes(name: str) -> None:
    structure, base, rows = TABLES[name]
    assert [(at + base, size) for at, size in _spans(structure)] == [row[:2] for row in rows]
    assert structure.format.startswith("<")
    assert all(offset % size == 0 for offset, size, _ in rows if size <= 8)


@pytest.mark.parametrize("name", sorted(set(TABLES) - IN_TEXT))
def test_the_document_says_the_same(name: str) -> None:
    lines = [
        [cell.strip() for cell in line.split("|")[1:4]]
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("|")
    ]
    for offset, size, field in TABLES[name][2]:
        assert [str(offset), str(size), field] in lines


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        (layout.SuperblockFields, SUPERBLOCK),
        (layout.RangeFields, RANGE),
        (layout.StateFields, STATE),
        (layout.InodeFields, INODE),
        (layout.HandoverFields, HANDOVER),
        (layout.HistoryFields, HISTORY),
        (layout.ListFields, LIST),
        (layout.SegmentFields, SEGMENT),
        (layout.PoolFields, POOL),
    ],
)
def test_names_of_fields(fields: type, rows: list[Row]) -> None:
    assert list(fields._fields) == [name for *_, name in rows]  # type: ignore[attr-defined]


def section(number: int) -> str:
    """The text of a section of the document."""
    parts = re.split(r"^## (\d+)\. ", DOCUMENT.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[str(number)]


def test_classes_name_the_section_that_has_their_fields() -> None:
    named = 0
    for _, fields in inspect.getmembers(layout, inspect.isclass):
        if match := re.search(r"\(section (\d+)\)", fields.__doc__ or ""):
            named += 1
            for name in fields._fields:  # type: ignore[attr-defined]
                assert f"| {name} |" in section(int(match[1])), (fields, name)
    assert named == 9


def test_sections_that_are_named_anywhere_are_there() -> None:
    root = Path(layout.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for number in re.findall(r"(?:format\.md, |\()section (\d+)", path.read_text()):
            assert section(int(number)), path


def test_only_declarations_and_pure_conversions() -> None:
    """Neither a region nor a file can be read or written with what the module imports."""
    tree = ast.parse(inspect.getsource(layout))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert names == {
        "__future__",
        "collections.abc",
        "_blake2",
        "hashlib",
        "pkernfs.quantities",
        "struct",
        "typing",
    }
    assert "open" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_every_structure_is_typed_out_here() -> None:
    """But for the slots of a handover's list, sixteen words of the same kind."""
    found = {name for name, value in vars(layout).items() if isinstance(value, Struct)}
    assert found - {"LIST_SLOTS"} == set(TABLES)
    assert layout.LIST_SLOTS.format == "<16I"


def test_sizes() -> None:
    assert layout.HEADER_BYTES == 64
    assert layout.RANGE.size == 64
    assert layout.RANGES_OFFSET + layout.MAX_RANGES * layout.RANGE.size <= layout.PAGE
    assert layout.SUPERBLOCK_OFFSET + layout.SUPERBLOCK.size == 224
    assert layout.PLACEMENT_OFFSET == 224
    assert layout.PLACEMENT_OFFSET + layout.PLACEMENT.size == layout.PIECES_OFFSET
    assert layout.PIECES_OFFSET + layout.MAX_PIECES * layout.PIECE.size == layout.RANGES_OFFSET
    assert layout.STATE_OFFSET + layout.STATE.size == 160
    assert layout.INODE.size == 128 == layout.INODE_INLINE_OFFSET
    assert layout.INODE_INLINE_OFFSET + layout.INODE_INLINE_BYTES == 256 == layout.INODE_BYTES
    assert layout.EXTENT.size == 24
    assert layout.INNER_SLOT.size == layout.ITEM_SLOT.size == layout.RUN.size == 16
    assert layout.NAME_ITEM.size == 9
    assert layout.XATTR_ITEM.size == 8
    assert layout.RECORD.size == 64
    assert layout.STATE_OFFSET + layout.STATE.size == layout.HANDOVER_OFFSET
    assert layout.HANDOVER_OFFSET + layout.HANDOVER.size <= layout.HISTORY_OFFSET == 256
    assert layout.HISTORY.size <= layout.HISTORY_BYTES == 80
    assert layout.RANGES_OFFSET + layout.MAX_RANGES * layout.RANGE.size == layout.POOL_OFFSET
    assert layout.HANDOVER_OFFSET + layout.HANDOVER.size == layout.STATE_SEGMENTS_OFFSET
    assert layout.STATE_SEGMENTS_OFFSET + layout.STATE_SEGMENTS.size <= layout.HISTORY_OFFSET
    assert layout.SEGMENT.size == 72
    assert layout.HISTORY_OFFSET + layout.HISTORY_ENTRIES * layout.HISTORY_BYTES <= layout.PAGE
    assert (layout.LIST.size, layout.LIST_SLOTS.size, layout.LIST_PAGE.size) == (64, 64, 24)


def test_constants() -> None:
    assert (layout.PAGE, layout.BLOCK, layout.PAGES_PER_BLOCK) == (4096, 2097152, 512)
    assert layout.SIGNATURE == b"pkernfs\0"
    assert (layout.VERSION_MAJOR, layout.VERSION_MINOR) == (1, 0)
    assert (layout.FEATURES_COMPAT, layout.FEATURES_RO_COMPAT, layout.FEATURES_INCOMPAT) == (
        0,
        0,
        1,
    )
    assert layout.MIN_REGION_BYTES == 8 << 20
    assert (layout.SUPERBLOCK_PAGE, layout.STATE_PAGE, layout.FIRST_MAP_PAGE) == (0, 1, 2)
    assert (layout.BACKUP_PAGE, layout.JOURNAL_PAGE, layout.JOURNAL_PAGES) == (512, 513, 511)
    assert layout.MAX_MAP_PAGES_IN_BLOCK_0 == 510
    assert (layout.MAP_BYTES, layout.MAP_BLOCKS) == (1344, 10752)
    assert (layout.MAP_USED_OFFSET, layout.MAP_CARVED_OFFSET, layout.MAP_ZERO_OFFSET) == (
        64, 1408, 2752,
    )  # fmt: skip
    assert layout.MAP_ZERO_OFFSET + layout.MAP_BYTES == 4096
    assert (layout.PAGE_MAP_CLASS_OFFSET, layout.PAGE_MAP_USED_OFFSET) == (40, 64)
    assert layout.PAGE_MAP_USED_BYTES == 64
    assert (layout.CLASS_META, layout.CLASS_DATA) == (1, 2)
    assert (layout.STATE_CLEAN, layout.STATE_MOUNTED, layout.STATE_FROZEN) == (1, 2, 3)
    assert layout.STATE_FLAG_ERROR == 1
    assert (
        layout.ARRIVAL_FIRST_BOOT,
        layout.ARRIVAL_LIVE_UPDATE,
        layout.ARRIVAL_REMOUNT,
    ) == (1, 2, 3)
    assert (
        layout.RESULT_UNKNOWN,
        layout.RESULT_METADATA,
        layout.RESULT_EVERYTHING,
        layout.RESULT_CHANGED,
    ) == (0, 1, 2, 3)
    assert layout.HANDOVER_FLAG_DIGESTS == 1
    assert layout.HISTORY_ENTRIES == 16
    assert layout.LIST_SIGNATURE == b"pkernfsH"
    assert layout.LIST_CHUNK_BYTES == 2 << 20
    assert (layout.STATE_INODE_ROOT_OFFSET, layout.STATE_INODE_PAGES_OFFSET) == (112, 120)
    assert layout.STATE_FREE_INODE_PAGE_OFFSET == 128
    assert (layout.ROOT_INO, layout.IOMMU_INO) == (1, 2)
    assert (layout.INODE_FLAG_BODY, layout.INODE_FLAG_PENDING, layout.INODE_FLAG_TABLE) == (1, 2, 4)
    assert layout.INODE_FLAG_SEGMENT == 8
    assert (layout.INODE_FLAG_SEGMENT_ON, layout.INODE_FLAG_SEGMENT_OFF) == (16, 32)
    assert layout.INODE_FLAG_NATIVE == 64
    assert (layout.INODE_INLINE_SHIFT, layout.MAX_INLINE_EXTENTS) == (8, 5)
    assert layout.SLOTS_PER_INODE_PAGE == 16
    assert layout.FULL_INODE_PAGE == 0xFFFE
    assert layout.PENDING_TO_END == (1 << 63) - 1
    assert (layout.TREE_EXTENTS, layout.TREE_NAMES, layout.TREE_XATTRS) == (1, 2, 3)
    assert (layout.TREE_SLOTS_OFFSET, layout.MAX_TREE_LEVELS) == (64, 16)
    assert (layout.MAX_INNER_SLOTS, layout.MAX_EXTENT_SLOTS) == (252, 168)
    assert (layout.HASH_BITS, layout.COLLISION_BITS, layout.MAX_COLLISIONS) == (52, 11, 2048)
    assert (layout.XATTR_INLINE, layout.XATTR_OVERFLOW) == (0, 1)
    assert (layout.OVERFLOW_DATA_OFFSET, layout.OVERFLOW_DATA_BYTES) == (64, 4032)
    assert layout.NO_PHYSICAL == (1 << 64) - 1
    assert layout.NO_NODE == (1 << 32) - 1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (layout.MAGIC_SUPERBLOCK, "0x42534b50"),
        (layout.MAGIC_STATE, "0x54534b50"),
        (layout.MAGIC_BLOCK_MAP, "0x4d424b50"),
        (layout.MAGIC_PAGE_MAP, "0x4d504b50"),
        (layout.MAGIC_INODES, "0x4e494b50"),
        (layout.MAGIC_TREE, "0x52544b50"),
        (layout.MAGIC_OVERFLOW, "0x564f4b50"),
        (layout.MAGIC_RECORD, "0x524a4b50"),
    ],
)
def test_magics(number: int, text: str) -> None:
    assert f"{number:#010x}" == text
    assert text in DOCUMENT.read_text()


def test_keys_of_names() -> None:
    key = bytes(range(16))
    digest = hashlib.blake2b(b"name", key=key, digest_size=8).digest()
    expected = (int.from_bytes(digest, "little") & (1 << 52) - 1) << 11
    assert layout.name_key(b"name", key) == expected
    # As other programs compute it: a known answer.
    assert layout.name_key(b"name", key) == 0x35B678F97FA13800
    assert layout.name_key(b"name", bytes(16)) != expected
    for i in range(1_000):
        found = layout.name_key(b"%d" % i, key)
        assert 2048 <= found < 1 << 63
        assert found % 2048 == 0


def test_a_hash_of_zero_counts_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero:
        def digest(self) -> bytes:
            return b"\0\0\0\0\0\0\xf0\xff"

    monkeypatch.setattr(layout, "blake2b", lambda *_args, **_kw: Zero())
    assert layout.name_key(b"any", b"") == 2048


def test_inode_numbers() -> None:
    assert [*layout.inos_of(0)] == [*range(16)]
    assert layout.inos_of(1)[1] == 17
    assert layout.inos_of(1000)[9] == 16 * 1000 + 9
