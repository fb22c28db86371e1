"""Pass 1: both superblocks, the journal, the state page, the block maps.

Kept for later: which superblock counts, the state (None if it must be made anew), and what the
block maps say of each block.
"""

from __future__ import annotations

from pkernfs import layout
from pkernfs.errors import CorruptionError, FormatError
from pkernfs.fs.fsck.claims import FREE, STATIC
from pkernfs.fs.fsck.context import UNKNOWN, Context, Progress, at
from pkernfs.fs.fsck.image import Image
from pkernfs.fs.fsck.problems import Code, Report
from pkernfs.fs.fsck.structures import Superblock, parse_block_map, parse_state, parse_superblock
from pkernfs.journal import JOURNAL_DAMAGED, JOURNAL_PENDING
from pkernfs.layout import (
    BACKUP_PAGE,
    MAGIC_BLOCK_MAP,
    MAGIC_NAMES,
    MAGIC_STATE,
    MAGIC_SUPERBLOCK,
    MIN_REGION_BYTES,
    PAGE,
    PAGES_PER_BLOCK,
    STATE_CLEAN,
    STATE_FLAG_ERROR,
    STATE_PAGE,
    SUPERBLOCK_PAGE,
    page_offset,
)
from pkernfs.quantities import PageNo
from pkernfs.region.region import Region

_COPIES = (SUPERBLOCK_PAGE, BACKUP_PAGE)
_JOURNAL = f"journal at {layout.JOURNAL_PAGE * PAGE:#x}"
_STATE = f"state page at {STATE_PAGE * PAGE:#x}"


def open_image(region: Region, report: Report, progress: Progress, *, repair: bool) -> Context:
    """Find the superblock, carry out the journal, and compare the copies.

    :raises FormatError: no pkernfs, one that this version must not touch, or no superblock left.
    """
    if region.size < MIN_REGION_BYTES:
        raise FormatError(
            f"{region.name}: region too small: got {region.size} bytes, "
            f"expected {MIN_REGION_BYTES} or more"
        )
    sb = _choose(region)
    image = Image(region, sb.blocks * PAGES_PER_BLOCK)
    image.uuid = sb.uuid
    state = image.journal_state(sb.uuid)
    if state == JOURNAL_DAMAGED:
        report.add(Code.JOURNAL_DAMAGED, _JOURNAL)
    elif state == JOURNAL_PENDING:
        report.add(Code.JOURNAL_PENDING, _JOURNAL)
        if repair:
            image.replay_in_region(sb.uuid)
        else:
            image.replay()
    sb = _compare(image, report, sb)
    ctx = Context(image, sb, report, progress)
    image.on_flip = lambda page, magic, byte, bit: report.add(
        Code.BIT_FLIPPED, f"{MAGIC_NAMES[magic]} at {at(page)}", byte=byte, bit=bit
    )
    return ctx


def _choose(region: Region) -> Superblock:
    """The first usable superblock, before the journal."""
    reasons = []
    for number in _COPIES:
        page = region.read(page_offset(number), PAGE)
        try:
            sb = parse_superblock(page, number)
        except CorruptionError as e:
            reasons.append(str(e))
            continue
        if sb.fields.region_bytes > region.size:
            raise FormatError(
                f"{region.name}: region is truncated: got {region.size} bytes, "
                f"expected {sb.fields.region_bytes}"
            )
        return sb
    if not any(_is_trace(region, number) for number in _COPIES):
        raise FormatError(f"{region.name}: not a pkernfs: no superblock")
    raise FormatError(
        f"{region.name}: both superblocks are damaged: {reasons[0]}; backup: {reasons[1]}"
    )


def _is_trace(region: Region, number: PageNo) -> bool:
    page = region.read(page_offset(number), PAGE)
    return (
        int.from_bytes(page[:4], "little") == MAGIC_SUPERBLOCK
        or page[layout.SUPERBLOCK_OFFSET :][: len(layout.SIGNATURE)] == layout.SIGNATURE
    )


def _compare(image: Image, report: Report, before: Superblock) -> Superblock:
    """Check both copies as they are after the journal; the one to go by."""
    good: dict[PageNo, Superblock] = {}
    for number in _COPIES:
        try:
            good[number] = parse_superblock(image.raw(number), number)
            if good[number].blocks != before.blocks:
                del good[number]
                raise CorruptionError("bad region_bytes: not that of the other copy")
        except CorruptionError as e:
            report.add(Code.SUPERBLOCK_DAMAGED, f"superblock at {at(number)}", reason=str(e))
    if not good:
        raise FormatError("superblock: both copies are damaged")
    source = next(number for number in _COPIES if number in good)
    for number in _COPIES:
        if number == source:
            continue
        if number in good and good[number] != good[source]:
            report.add(Code.SUPERBLOCKS_DIFFER, f"superblock at {at(number)}")
        elif number in good:
            continue
        page = image.edit(number)
        page[:] = image.raw(source)
        page[8:16] = number.to_bytes(8, "little")
    return good[source]


# ------------------------------------------------------------------------------ state page


def load_state(ctx: Context) -> None:
    """Load the state page and report what is wrong with it."""
    try:
        page = ctx.image.load(STATE_PAGE, MAGIC_STATE)
        state = parse_state(page)
    except CorruptionError as e:
        ctx.report.add(Code.STATE_DAMAGED, _STATE, reason=str(e))
        return
    ctx.state = state
    if state.flags & STATE_FLAG_ERROR:
        ctx.report.add(Code.STATE_ERROR_FLAG, _STATE)
    if state.state == layout.STATE_MOUNTED:
        ctx.report.add(Code.NOT_UNMOUNTED, _STATE)


def is_clean(ctx: Context) -> bool:
    """Tell if the last mount ended with an unmount, so that all counts are valid."""
    return ctx.state is not None and ctx.state.state == STATE_CLEAN


# ------------------------------------------------------------------------------ block maps


def load_block_maps(ctx: Context) -> None:
    """Load the block maps into the context, and claim the static area."""
    kind = ctx.claims.kind
    maps = ctx.sb.map_pages()
    for done, (page, first, blocks) in enumerate(maps):
        ctx.progress("block maps", done / len(maps))
        kind[first : first + blocks] = bytes([FREE]) * blocks
        try:
            bits = parse_block_map(ctx.image.load(page, MAGIC_BLOCK_MAP), first, blocks)
        except CorruptionError as e:
            ctx.report.add(Code.BLOCK_MAP_DAMAGED, f"block map at {at(page)}", reason=str(e))
            ctx.rewrite_maps.add(page)
            continue
        ctx.map_used[first : first + blocks] = bits.used
        ctx.map_carved[first : first + blocks] = bits.carved
        ctx.map_zero[first : first + blocks] = bits.zero
        if not bits.tidy:
            ctx.report.add(Code.BLOCK_MAP_UNTIDY, f"block map at {at(page)}")
            ctx.rewrite_maps.add(page)
    for block in {0, 1} | {page // PAGES_PER_BLOCK for page, _, _ in maps}:
        kind[block] = STATIC
    _assume_zero(ctx)


def _assume_zero(ctx: Context) -> None:
    """Mark holes of the region as zero where a map is lost: they are, without a doubt."""
    if UNKNOWN in ctx.map_used:
        for first, count in ctx.image.region.known_zero():
            for block in range(first, min(first + count, ctx.blocks)):
                if ctx.map_used[block] == UNKNOWN:
                    ctx.map_zero[block] = 1
