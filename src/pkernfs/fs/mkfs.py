"""Formatting a region, and finding out what is in it first."""

from __future__ import annotations

import enum
import os
import stat
import time
import uuid as uuid_module
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pkernfs.alloc import bitmap
from pkernfs.errors import CorruptionError, FormatError, RegionError, UsageError
from pkernfs.fs import placement, superblock
from pkernfs.fs.inodes import Inode
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    BLOCK_MAP,
    BLOCK_MAP_OFFSET,
    CLASS_META,
    EXTENT,
    FEATURE_SEGMENTS,
    FIRST_MAP_PAGE,
    HEADER,
    INODE_BYTES,
    INODE_PAGE,
    INODE_PAGE_OFFSET,
    IOMMU_INO,
    ITEM_SLOT,
    JOURNAL_PAGE,
    JOURNAL_PAGES,
    MAGIC_BLOCK_MAP,
    MAGIC_INODES,
    MAGIC_PAGE_MAP,
    MAGIC_STATE,
    MAGIC_TREE,
    MAP_BLOCKS,
    MAP_BYTES,
    MAP_CARVED_OFFSET,
    MAP_USED_OFFSET,
    MAP_ZERO_OFFSET,
    MAX_MAP_PAGES_IN_BLOCK_0,
    MIN_REGION_BYTES,
    NAME_ITEM,
    NO_INO,
    NO_NODE,
    NO_PHYSICAL,
    NO_POOL,
    PAGE,
    PAGE_MAP_CLASS_OFFSET,
    PAGE_MAP_USED_OFFSET,
    PAGES_PER_BLOCK,
    ROOT_INO,
    SIGNATURE,
    STATE,
    STATE_CLEAN,
    STATE_OFFSET,
    STATE_PAGE,
    SUPERBLOCK_PAGE,
    TREE,
    TREE_EXTENTS,
    TREE_NAMES,
    TREE_OFFSET,
    TREE_SLOTS_OFFSET,
    VERSION_MAJOR,
    VERSION_MINOR,
    PoolFields,
    RangeFields,
    StateFields,
    SuperblockFields,
    first_page,
    name_key,
    page_offset,
)
from pkernfs.quantities import BlockNo, BlockRun, Ino, PageNo, RegionOff
from pkernfs.region.checksum import page_checksum
from pkernfs.region.region import Region

_PROBE_BYTES = 1 << 20
IOMMU_NAME = b"iommu"
_META_PAGES = 4  # page map, tree of the inode table, first inode page, names of the root directory

_START = RegionOff(0)


class _Foreign(NamedTuple):
    """Content that mkfs would not want to destroy, by bytes at an offset."""

    offset: RegionOff
    signature: bytes
    name: str


_FOREIGN = (
    _Foreign(RegionOff(0x438), b"\x53\xef", "ext2/3/4"),
    _Foreign(_START, b"XFSB", "xfs"),
    _Foreign(RegionOff(0x10040), b"_BHRfS_M", "btrfs"),
    _Foreign(_START, b"hsqs", "squashfs"),
    _Foreign(RegionOff(0x8001), b"CD001", "iso9660"),
    _Foreign(_START, b"LUKS\xba\xbe", "LUKS"),
    _Foreign(RegionOff(0x218), b"LVM2 001", "LVM"),
    _Foreign(RegionOff(0x1FE), b"\x55\xaa", "a partition table or FAT"),
    _Foreign(RegionOff(0x402), b"\x10\x20\xf5\xf2", "f2fs"),
    _Foreign(_START, b"QFI\xfb", "qcow2"),
    _Foreign(_START, b"\x7fELF", "an ELF file"),
)


class Content(enum.Enum):
    """The content of a region before mkfs."""

    EMPTY = "nothing"
    PKERNFS = "a pkernfs"
    DAMAGED = "a damaged pkernfs"
    FOREIGN = "something else"
    DATA = "data"


@dataclass(frozen=True)
class Probe:
    """Result of :func:`probe`; ``what`` is for the message."""

    content: Content
    what: str


def probe(region: Region) -> Probe:
    """Find out what is in a region, without changing it."""
    if region.untouched:
        return Probe(Content.EMPTY, "nothing")
    traces = [
        superblock.is_trace(region.view(page_offset(page), PAGE))
        for page in (SUPERBLOCK_PAGE, BACKUP_PAGE)
        if (page + 1) * PAGE <= region.size
    ]
    if any(traces):
        try:
            sb = superblock.load(region)
        except (FormatError, CorruptionError):
            return Probe(Content.DAMAGED, "a damaged or newer pkernfs")
        return Probe(
            Content.PKERNFS, f"a pkernfs (label {sb.label!r})" if sb.label else "a pkernfs"
        )
    for offset, signature, name in _FOREIGN:
        if (
            offset + len(signature) <= region.size
            and region.read(offset, len(signature)) == signature
        ):
            return Probe(Content.FOREIGN, name)
    if not region.is_zero(_START, min(region.size, _PROBE_BYTES)):
        return Probe(Content.DATA, "data of an unknown kind")
    if region.size >= BACKUP_PAGE * PAGE + _PROBE_BYTES and not region.is_zero(
        page_offset(BACKUP_PAGE), PAGE
    ):
        return Probe(Content.DATA, "data of an unknown kind")
    return Probe(Content.EMPTY, "nothing")


def make_filesystem(
    region: Region,
    *,
    label: str = "",
    uuid: bytes | None = None,
    pool: PoolFields = NO_POOL,
    clock: Callable[[], int] = time.time_ns,
) -> None:
    """Format a region; what it held is lost. The caller has probed it.

    Only metadata is written: free blocks are zeroed later, unless the region knows that they are
    zero. The superblock is stored last; a region whose formatting was cut short is no file system.

    :raises RegionError: smaller than 8 MiB, not writable, or a dax device of too many ranges.
    :raises UsageError: the label has more than 64 bytes.
    """
    blocks = region.size // BLOCK
    if region.size < MIN_REGION_BYTES:
        raise RegionError(
            f"{region.name}: region too small: got {region.size} bytes, "
            f"expected at least {MIN_REGION_BYTES}"
        )
    if len(label.encode()) > 64:
        raise UsageError(f"label too long: got {len(label.encode())} bytes, expected at most 64")
    known_zero = region.known_zero()
    maker = _Maker(region, blocks, uuid or uuid_module.uuid4().bytes, clock())
    for page in (SUPERBLOCK_PAGE, BACKUP_PAGE):
        region.zero(page_offset(page), PAGE)
    region.zero(page_offset(JOURNAL_PAGE), PAGE)
    maker.write_metadata()
    maker.write_block_maps(known_zero)
    maker.write_superblocks(label, pool)


class _Maker:
    def __init__(self, region: Region, blocks: int, uuid: bytes, now: int) -> None:
        self.region = region
        self.blocks = blocks
        self.uuid = uuid
        self.now = now
        self.hash_key = os.urandom(16)
        device = region.dax
        self.placement = placement.encode(None if device is None else placement.of_device(device))
        self.map_pages = -(-blocks // MAP_BLOCKS)
        in_block_0 = self.map_pages <= MAX_MAP_PAGES_IN_BLOCK_0
        self.map_page = FIRST_MAP_PAGE if in_block_0 else first_page(BlockNo(2))
        self.static_blocks = 2 if in_block_0 else 2 + -(-self.map_pages // PAGES_PER_BLOCK)
        # The first carved block: page map, tree of the inode table, inodes, names of the root.
        self.meta = BlockNo(self.static_blocks)
        self.meta_map = first_page(self.meta)
        self.tree_page = PageNo(self.meta_map + 1)
        self.inode_page = PageNo(self.meta_map + 2)
        self.names_page = PageNo(self.meta_map + 3)

    def page(
        self, number: PageNo, magic: int, fill: Callable[[bytearray], None], owner: Ino = NO_INO
    ) -> None:
        image = bytearray(PAGE)
        HEADER.pack_into(image, 0, magic, 0, number, owner, self.uuid)
        fill(image)
        image[4:8] = page_checksum(image).to_bytes(4, "little")
        self.region.copy_in(page_offset(number), image)

    def write_metadata(self) -> None:
        self.page(self.meta_map, MAGIC_PAGE_MAP, self._page_map)
        self.page(self.tree_page, MAGIC_TREE, self._inode_tree)
        self.page(self.inode_page, MAGIC_INODES, self._inodes)
        self.page(self.names_page, MAGIC_TREE, self._root_names, ROOT_INO)
        self.page(STATE_PAGE, MAGIC_STATE, self._state)

    def _page_map(self, image: bytearray) -> None:
        image[PAGE_MAP_CLASS_OFFSET] = CLASS_META
        image[PAGE_MAP_USED_OFFSET] = (1 << _META_PAGES) - 1

    def _inode_tree(self, image: bytearray) -> None:
        TREE.pack_into(image, TREE_OFFSET, TREE_EXTENTS, 0, 1, PAGE, 0)
        EXTENT.pack_into(image, TREE_SLOTS_OFFSET, 0, self.inode_page, 1)

    def _root_names(self, image: bytearray) -> None:
        item = NAME_ITEM.pack(IOMMU_INO, stat.S_IFDIR >> 12) + IOMMU_NAME
        at = PAGE - len(item)
        image[at:] = item
        ITEM_SLOT.pack_into(
            image, TREE_SLOTS_OFFSET, name_key(IOMMU_NAME, self.hash_key), at, len(item), 0
        )
        TREE.pack_into(image, TREE_OFFSET, TREE_NAMES, 0, 1, at, 0)

    def _inodes(self, image: bytearray) -> None:
        INODE_PAGE.pack_into(image, INODE_PAGE_OFFSET, 0, 0, 0b110, 0, 1, 1)
        for ino, nlink in ((ROOT_INO, 3), (IOMMU_INO, 2)):
            inode = Inode()
            inode.ino, inode.nlink, inode.parent = ino, nlink, ROOT_INO
            inode.mode = stat.S_IFDIR | 0o755
            inode.atime = inode.mtime = inode.ctime = inode.btime = self.now
            if ino == ROOT_INO:
                inode.size, inode.flags, inode.body = 1, 1, self.names_page
            inode.store(memoryview(image), ino * INODE_BYTES)

    def _state(self, image: bytearray) -> None:
        state = StateFields(
            state=STATE_CLEAN,
            flags=0,
            mounts=0,
            mounted_at=0,
            unmounted_at=0,
            boot_id=bytes(16),
            inode_root=self.tree_page,
            inode_pages=1,
            free_inode_page=1,
            inodes_used=2,
            arrival=0,
            written_by=0,
        )
        STATE.pack_into(image, STATE_OFFSET, *state)

    def write_block_maps(self, known_zero: list[BlockRun]) -> None:
        used = self.static_blocks + 1
        for index in range(self.map_pages):
            first = index * MAP_BLOCKS
            count = min(MAP_BLOCKS, self.blocks - first)

            def fill(image: bytearray, first: int = first, count: int = count) -> None:
                BLOCK_MAP.pack_into(image, BLOCK_MAP_OFFSET, first, count)
                if not first:
                    bitmap.set_run(memoryview(image)[MAP_USED_OFFSET:], 0, used, True)
                    bitmap.set_run(memoryview(image)[MAP_CARVED_OFFSET:], self.meta, 1, True)
                zero = memoryview(image)[MAP_ZERO_OFFSET : MAP_ZERO_OFFSET + MAP_BYTES]
                for run in known_zero:
                    start = max(run.first, first, used)
                    end = min(run.first + run.blocks, first + count)
                    if start < end:
                        bitmap.set_run(zero, start - first, end - start, True)

            self.page(PageNo(self.map_page + index), MAGIC_BLOCK_MAP, fill)

    def write_superblocks(self, label: str, pool: PoolFields) -> None:
        base = self.region.phys_base
        ranges = [
            RangeFields(
                first_block=BlockNo(0),
                blocks=self.blocks,
                phys_base=NO_PHYSICAL if base is None else base,
                map_page=self.map_page,
                map_pages=self.map_pages,
                node=NO_NODE if self.region.node is None else self.region.node,
            )
        ]
        fields = SuperblockFields(
            signature=SIGNATURE,
            version_major=VERSION_MAJOR,
            version_minor=VERSION_MINOR,
            page_size=PAGE,
            block_size=BLOCK,
            range_count=len(ranges),
            feature_compat=0,
            feature_ro_compat=0,
            feature_incompat=FEATURE_SEGMENTS if pool.pool else 0,
            region_bytes=self.blocks * BLOCK,
            created=self.now,
            journal_page=JOURNAL_PAGE,
            journal_pages=JOURNAL_PAGES,
            hash_key=self.hash_key,
            label=label.encode(),
        )
        for page in (BACKUP_PAGE, SUPERBLOCK_PAGE):
            image = superblock.encode(self.uuid, fields, ranges, page, self.placement, pool)
            self.region.copy_in(page_offset(page), image)
