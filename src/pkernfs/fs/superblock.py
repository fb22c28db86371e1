"""The superblock: loading, validating, describing what is in a region (docs/format.md, 3)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from pkernfs.errors import BeyondRepairError, CorruptionError, FormatError
from pkernfs.fs import state_page
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    FEATURE_SEGMENTS,
    FEATURES_INCOMPAT,
    FEATURES_RO_COMPAT,
    HEADER,
    JOURNAL_PAGE,
    JOURNAL_PAGES,
    MAGIC_STATE,
    MAGIC_SUPERBLOCK,
    MAX_RANGES,
    MIN_REGION_BYTES,
    NO_NODE,
    NO_PHYSICAL,
    NO_POOL,
    PAGE,
    PLACEMENT_OFFSET,
    POOL,
    POOL_DAX,
    POOL_DIRECTORY,
    POOL_OFFSET,
    RANGE,
    RANGES_OFFSET,
    SIGNATURE,
    STATE_FLAG_ERROR,
    STATE_FROZEN,
    STATE_PAGE,
    SUPERBLOCK,
    SUPERBLOCK_OFFSET,
    SUPERBLOCK_PAGE,
    VERSION_MAJOR,
    PoolFields,
    RangeFields,
    StateFields,
    SuperblockFields,
    first_page,
    page_offset,
    uuid_text,
)
from pkernfs.quantities import BlockNo, PageNo
from pkernfs.region.checksum import page_checksum
from pkernfs.region.region import Region

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Superblock:
    """A valid superblock. ``from_backup``: the first copy was damaged."""

    uuid: bytes
    fields: SuperblockFields
    ranges: tuple[RangeFields, ...]
    pool: PoolFields = NO_POOL
    from_backup: bool = False

    @property
    def label(self) -> str:
        """The label as text."""
        return self.fields.label.rstrip(b"\0").decode("utf-8", "replace")

    @property
    def total_blocks(self) -> int:
        """Blocks of all ranges."""
        return sum(r.blocks for r in self.ranges)


def encode(
    uuid: bytes,
    fields: SuperblockFields,
    ranges: list[RangeFields],
    page: PageNo,
    placement: bytes = b"",
    pool: PoolFields = NO_POOL,
) -> bytes:
    """The image of a superblock for page ``page``, checksum included.

    ``placement`` is the record of :mod:`pkernfs.fs.placement`.
    """
    image = bytearray(PAGE)
    HEADER.pack_into(image, 0, MAGIC_SUPERBLOCK, 0, page, 0, uuid)
    SUPERBLOCK.pack_into(image, SUPERBLOCK_OFFSET, *fields)
    image[PLACEMENT_OFFSET : PLACEMENT_OFFSET + len(placement)] = placement
    for i, r in enumerate(ranges):
        RANGE.pack_into(image, RANGES_OFFSET + i * RANGE.size, *r)
    POOL.pack_into(image, POOL_OFFSET, *pool)
    image[4:8] = page_checksum(image).to_bytes(4, "little")
    return bytes(image)


def is_trace(page: bytes | memoryview) -> bool:
    """True if these 4 KiB were ever a pkernfs superblock, damaged or not."""
    at = SUPERBLOCK_OFFSET
    return (
        bytes(page[0:4]) == MAGIC_SUPERBLOCK.to_bytes(4, "little")
        or bytes(page[at : at + len(SIGNATURE)]) == SIGNATURE
    )


def parse(page: bytes, number: PageNo) -> Superblock:
    """Decode and check one copy; features are :func:`check_features`'s business.

    :raises FormatError: no trace of a pkernfs, or another version.
    :raises CorruptionError: damaged.
    """
    where = f"superblock at {number * PAGE:#x}"
    if not is_trace(page):
        raise FormatError(f"{where}: not a pkernfs")
    magic, checksum, itself, _owner, uuid = HEADER.unpack_from(page)
    fields = SuperblockFields(*SUPERBLOCK.unpack_from(page, SUPERBLOCK_OFFSET))
    expected = page_checksum(page)
    if checksum != expected:
        raise CorruptionError(
            f"{where}: bad checksum: got {checksum:#010x}, expected {expected:#010x}"
        )
    if magic != MAGIC_SUPERBLOCK or fields.signature != SIGNATURE or itself != number:
        raise CorruptionError(f"{where}: bad signature")
    if fields.version_major != VERSION_MAJOR:
        raise FormatError(
            f"{where}: format version {fields.version_major}: this program knows {VERSION_MAJOR}"
        )
    if fields.page_size != PAGE or fields.block_size != BLOCK:
        raise FormatError(
            f"{where}: page or block size: got {fields.page_size}, {fields.block_size}"
        )
    return Superblock(uuid, fields, _parse_ranges(page, fields, where), _parse_pool(page, fields))


def _parse_ranges(page: bytes, fields: SuperblockFields, where: str) -> tuple[RangeFields, ...]:
    if not 0 < fields.range_count <= MAX_RANGES:
        raise CorruptionError(f"{where}: bad range count: got {fields.range_count}")
    ranges = tuple(
        RangeFields(*RANGE.unpack_from(page, RANGES_OFFSET + i * RANGE.size))
        for i in range(fields.range_count)
    )
    block = BlockNo(0)
    for i, r in enumerate(ranges):
        if r.first_block != block or not r.blocks:
            raise CorruptionError(f"{where}: bad range {i}: got {r.first_block}+{r.blocks}")
        first, block = first_page(r.first_block), BlockNo(block + r.blocks)
        if not first <= r.map_page <= first_page(block) - r.map_pages:
            raise CorruptionError(
                f"{where}: bad range {i}: got its map at page {r.map_page}+{r.map_pages}, "
                f"expected in its blocks {r.first_block}+{r.blocks}"
            )
    if block * BLOCK != fields.region_bytes or fields.region_bytes < MIN_REGION_BYTES:
        raise CorruptionError(f"{where}: bad size: got {fields.region_bytes}")
    if fields.journal_page != JOURNAL_PAGE or fields.journal_pages != JOURNAL_PAGES:
        raise CorruptionError(f"{where}: bad journal: got {fields.journal_page}")
    return ranges


def _parse_pool(page: bytes, fields: SuperblockFields) -> PoolFields:
    """The record of the pool; of a file system without segments nothing is read."""
    if not fields.feature_incompat & FEATURE_SEGMENTS:
        return NO_POOL
    pool = PoolFields(*POOL.unpack_from(page, POOL_OFFSET))
    granule = pool.granule
    if pool.pool not in (POOL_DIRECTORY, POOL_DAX) or granule < BLOCK or granule & (granule - 1):
        raise CorruptionError(f"superblock: bad pool: got kind {pool.pool}, granule {granule:#x}")
    return pool


def load(region: Region) -> Superblock:
    """The superblock of a region, from the backup if the first copy is damaged.

    :raises FormatError: no pkernfs, or one of another version.
    :raises BeyondRepairError: both copies are damaged, or the region is shorter than it was.
    """
    page = region.read(page_offset(SUPERBLOCK_PAGE), PAGE)
    try:
        found = parse(page, SUPERBLOCK_PAGE)
    except FormatError as e:
        if is_trace(page):
            raise  # intact, and of another format: an older backup says nothing of it
        found = _load_backup(region, e)
    except CorruptionError as e:
        found = _load_backup(region, e)
    if region.size < found.fields.region_bytes:
        raise BeyondRepairError(
            f"{region.name}: region is truncated: got {region.size} bytes, "
            f"expected {found.fields.region_bytes}"
        )
    return found


def _load_backup(region: Region, first_error: CorruptionError | FormatError) -> Superblock:
    if region.size < (BACKUP_PAGE + 1) * PAGE:
        raise first_error
    try:
        found = parse(region.read(page_offset(BACKUP_PAGE), PAGE), BACKUP_PAGE)
    except FormatError:
        raise first_error from None
    except CorruptionError as e:
        if isinstance(first_error, CorruptionError):
            raise BeyondRepairError(f"{first_error}; {e}") from None
        raise
    log.warning(
        "%s; the backup at %#x is used: run fsck.pkernfs -y", first_error, BACKUP_PAGE * PAGE
    )
    return replace(found, from_backup=True)


def check_features(sb: Superblock) -> bool:
    """Check the features; True if this version may write to the file system.

    :raises FormatError: an unknown incompat feature.
    """
    unknown = sb.fields.feature_incompat & ~FEATURES_INCOMPAT
    if unknown:
        raise FormatError(f"superblock: unknown incompat features: got {unknown:#x}")
    return not sb.fields.feature_ro_compat & ~FEATURES_RO_COMPAT


def describe(region: Region) -> dict[str, Any]:
    """Gather what `pkernfs info` shows, from the region alone (it may be mounted meanwhile).

    :raises FormatError, CorruptionError: as :func:`load`.
    """
    sb = load(region)
    page = region.read(page_offset(STATE_PAGE), PAGE)
    info: dict[str, Any] = {
        "label": sb.label,
        "uuid": uuid_text(sb.uuid),
        "version": f"{sb.fields.version_major}.{sb.fields.version_minor}",
        "region_bytes": sb.fields.region_bytes,
        "page_bytes": PAGE,
        "block_bytes": BLOCK,
        "created_ns": sb.fields.created,
        "features": {
            "compat": sb.fields.feature_compat,
            "ro_compat": sb.fields.feature_ro_compat,
            "incompat": sb.fields.feature_incompat,
        },
        "superblock": "backup" if sb.from_backup else "primary",
        "ranges": [_describe_range(region, r) for r in sb.ranges],
    }
    state = _intact_state(page)
    if state is not None:
        info |= {
            "state": state_page.STATE_NAMES[state.state],
            "errors": bool(state.flags & STATE_FLAG_ERROR),
            "mounts": state.mounts,
            "mounted_ns": state.mounted_at,
            "unmounted_ns": state.unmounted_at,
            "boot_id": uuid_text(state.boot_id),
            "arrival": state_page.MOUNT_KINDS.get(state.arrival),
            **state_page.describe(page, state.state == STATE_FROZEN),
        }
    else:
        info["state"] = "damaged"
    return info


def _intact_state(page: bytes) -> StateFields | None:
    magic, checksum, *_ = HEADER.unpack_from(page)
    if magic != MAGIC_STATE or checksum != page_checksum(page):
        return None
    try:
        return state_page.load(page)
    except CorruptionError:
        return None


def _describe_range(region: Region, r: RangeFields) -> dict[str, Any]:
    offset = page_offset(first_page(r.first_block))
    return {
        "offset": offset,
        "length": r.blocks * BLOCK,
        "physical": region.phys_base + offset if region.phys_base is not None else None,
        "physical_at_mkfs": None if r.phys_base == NO_PHYSICAL else r.phys_base,
        "node": None if r.node == NO_NODE else r.node,
    }
