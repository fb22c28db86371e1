"""Pass 8: compare what the maps mark as in use with what is; after all repairs, mark it right.

The comparison is made before anything is allocated or freed for a repair, so that only what the
region itself has wrong is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pkernfs.alloc.bitmap import runs
from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.claims import ALL_PAGES, CARVED, FREE, flag_runs
from pkernfs.fs.fsck.context import Context, at
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.structures import MapPage, pack_bits, parse_page_map
from pkernfs.layout import (
    BLOCK,
    BLOCK_MAP,
    BLOCK_MAP_OFFSET,
    CLASS_DATA,
    CLASS_META,
    MAGIC_BLOCK_MAP,
    MAGIC_PAGE_MAP,
    MAP_BYTES,
    MAP_USED_OFFSET,
    MAP_ZERO_OFFSET,
    NO_INO,
    PAGE_MAP_CLASS_OFFSET,
    PAGE_MAP_USED_BYTES,
    PAGE_MAP_USED_OFFSET,
    first_page,
)
from pkernfs.quantities import BlockNo, BlockRun, PageNo, RegionOff, RegionRange

_TO_USED = bytes([0] + [1] * 255)
_TO_FREE = bytes([1] + [0] * 255)
_ONLY_ONE = bytes([0, 1] + [0] * 254)
_TO_CARVED = bytes(int(kind == CARVED) for kind in range(256))
# Blocks whose zero mark is checked in one piece.
_MANY = 64
_STRIDE = 8192  # blocks


def compare(ctx: Context) -> None:
    """Report every difference between the maps and the claims."""
    _keep_empty_carved(ctx)
    spans = list(_spans(ctx))
    for span in spans:
        _compare_blocks(ctx, span)
    for span in spans:
        _compare_zero(ctx, span)
    _verify_zero(ctx)
    blocks = sorted(ctx.claims.pages)
    for done, block in enumerate(blocks):
        if not done % 64:
            ctx.progress("page maps", done / len(blocks))
        _compare_page_map(ctx, block)


def _keep_empty_carved(ctx: Context) -> None:
    """A carved block may have no page in use at all; only its page map tells it from a lost one."""
    number = ctx.map_carved.find(1)
    while number >= 0:
        block = BlockNo(number)
        if (
            ctx.claims.kind[block] == FREE
            and ctx.map_used[block] == 1
            and ctx.page_map(block) is not None
        ):
            ctx.claims.carve(block)
        number = ctx.map_carved.find(1, number + 1)


def _spans(ctx: Context) -> Iterator[BlockRun]:
    """All blocks but for long runs that are free and not marked otherwise.

    Most of a large region is: looking at it more closely would take most of the time.
    """
    nothing = bytes(_STRIDE)
    start = -1
    for first in range(0, ctx.blocks, _STRIDE):
        end = min(first + _STRIDE, ctx.blocks)
        maps = (ctx.claims.kind, ctx.map_used, ctx.map_carved)
        if any(flags[first:end] != nothing[: end - first] for flags in maps):
            start = first if start < 0 else start
        elif start >= 0:
            yield BlockRun(BlockNo(start), first - start)
            start = -1
    if start >= 0:
        yield BlockRun(BlockNo(start), ctx.blocks - start)


def _report_runs(ctx: Context, code: Code, base: int, flags: bytes, **words: Any) -> None:
    for first, count in flag_runs(flags):
        first += base
        last = f"..{first + count - 1}" if count > 1 else ""
        ctx.report.add(code, f"block {first}{last} at {first * BLOCK:#x}", **words)


def _both(a: bytes | bytearray, b: bytes | bytearray) -> bytes:
    """One where both are one."""
    value = int.from_bytes(a, "little") & int.from_bytes(b, "little")
    return value.to_bytes(len(a), "little")


def _compare_blocks(ctx: Context, span: BlockRun) -> None:
    first, end = span.first, span.first + span.blocks
    kind = ctx.claims.kind[first:end]
    map_used, map_carved = ctx.map_used[first:end], ctx.map_carved[first:end]
    in_use, free = kind.translate(_TO_USED), kind.translate(_TO_FREE)
    marked = map_used.translate(_ONLY_ONE)
    unmarked = map_used.translate(_TO_FREE)
    _report_runs(ctx, Code.BLOCK_LOST, first, _both(marked, free))
    _report_runs(ctx, Code.BLOCK_UNMARKED, first, _both(unmarked, in_use))
    carved = kind.translate(_TO_CARVED)
    whole = _both(in_use, carved.translate(_TO_FREE))
    marked_carved = map_carved.translate(_ONLY_ONE)
    not_carved = map_carved.translate(_TO_FREE)
    _report_runs(ctx, Code.BLOCK_CARVED, first, _both(marked_carved, whole), got=1, expected=0)
    _report_runs(ctx, Code.BLOCK_CARVED, first, _both(not_carved, carved), got=0, expected=1)
    stray = _both(_both(marked_carved, free), unmarked)
    _report_runs(ctx, Code.BLOCK_CARVED, first, stray, got=1, expected=0)


def _compare_zero(ctx: Context, span: BlockRun) -> None:
    """Marks on blocks in use."""
    first, end = span.first, span.first + span.blocks
    map_used = ctx.map_used[first:end]
    marked = map_used.translate(_ONLY_ONE)
    free = _both(ctx.claims.kind[first:end].translate(_TO_FREE), marked.translate(_TO_FREE))
    in_use = free.translate(_TO_FREE)
    wrong = _both(ctx.map_zero[first:end], in_use)
    known = map_used.translate(bytes([1, 1, 0] + [0] * 253))
    _report_runs(ctx, Code.ZERO_IN_USE, first, _both(wrong, known))
    for block, count in flag_runs(wrong):
        ctx.map_zero[first + block : first + block + count] = bytes(count)


def _verify_zero(ctx: Context) -> None:
    """Read the blocks that are marked as zero, where holes can be told or all is to be read."""
    if ctx.verify_zero is False or (ctx.verify_zero is None and not ctx.image.tells_holes):
        return
    not_zero = bytearray(ctx.blocks)
    for first, count in flag_runs(ctx.map_zero):
        for start in range(first, first + count, _MANY):
            ctx.progress("free blocks", start / ctx.blocks)
            length = min(_MANY, first + count - start)
            for part in ctx.image.data_in(RegionOff(start * BLOCK), length * BLOCK):
                _find_dirty(ctx, part, not_zero)
    _report_runs(ctx, Code.ZERO_NOT_ZERO, 0, bytes(not_zero))
    for first, count in flag_runs(not_zero):
        ctx.map_zero[first : first + count] = bytes(count)


def _find_dirty(ctx: Context, part: RegionRange, not_zero: bytearray) -> None:
    start: int = part.start
    while start < part.end:
        block = start // BLOCK
        stop = min(part.end, (block + 1) * BLOCK)
        if not not_zero[block] and not ctx.image.region.is_zero(RegionOff(start), stop - start):
            not_zero[block] = 1
        start = stop


def _compare_page_map(ctx: Context, block: BlockNo) -> None:
    number = first_page(block)
    where = f"page map at {at(number)}"
    try:
        found = parse_page_map(ctx.image.load(number, MAGIC_PAGE_MAP))
    except CorruptionError as e:
        ctx.report.add(Code.PAGE_MAP_DAMAGED, where, reason=str(e))
        return
    if found.kind not in (CLASS_META, CLASS_DATA):
        ctx.report.add(Code.PAGE_MAP_CLASS, where, got=found.kind)
    claimed = ctx.claims.pages[block]
    for code, mask in (
        (Code.PAGE_LOST, found.used & ~claimed),
        (Code.PAGE_UNMARKED, claimed & ~found.used),
    ):
        for bit, count in runs(mask):
            ctx.report.add(code, f"pages {at(PageNo(number + bit))}+{count} in block {block}")


# ------------------------------------------------------------------------------ marking it right


def write(ctx: Context) -> None:
    """Bring all maps in line with the claims, less what the repair has freed."""
    for run in ctx.released_pages:
        ctx.claims.release_pages(run.first, run.pages)
    for first, count in ctx.released_blocks:
        ctx.claims.release_blocks(first, count)
        ctx.map_zero[first : first + count] = bytes(count)
    for block in sorted(ctx.claims.pages):
        _write_page_map(ctx, block)
    unmark_zero(ctx)
    for map_page in ctx.sb.map_pages():
        _write_block_map(ctx, map_page)


def unmark_zero(ctx: Context) -> None:
    """Before anything is stored into a free block, the region must not say that it is zero."""
    for page, first, blocks in ctx.sb.map_pages():
        taken = [b - first for b in ctx.taken_blocks if first <= b < first + blocks]
        if not taken or page in ctx.rewrite_maps:
            continue
        image = bytearray(ctx.image.stored(page))
        for bit in taken:
            image[MAP_ZERO_OFFSET + bit // 8] &= ~(1 << bit % 8)
        ctx.image.store_first(page, image)


def _write_page_map(ctx: Context, block: BlockNo) -> None:
    number = first_page(block)
    used = ctx.claims.pages[block] & ALL_PAGES
    meta = ctx.claims.meta[block]
    if used == 1 and (ctx.map_carved[block] != 1 or ctx.page_map(block) is None):
        ctx.claims.release_blocks(block, 1)  # nothing is left that it was carved for
        return
    end = PAGE_MAP_USED_OFFSET + PAGE_MAP_USED_BYTES
    kind = CLASS_META if meta != 1 or used == 1 else CLASS_DATA
    known = ctx.map_carved[block] and ctx.page_map(block) is not None
    if known:
        found = parse_page_map(ctx.image.raw(number))
        if found.used == used and found.kind in (CLASS_META, CLASS_DATA):
            return
        both = bytearray(ctx.image.raw(number))
        both[PAGE_MAP_USED_OFFSET:end] = (used | found.used).to_bytes(PAGE_MAP_USED_BYTES, "little")
        ctx.image.store_between(number, both)
        page = ctx.image.edit(number)
        if found.kind not in (CLASS_META, CLASS_DATA):
            page[PAGE_MAP_CLASS_OFFSET : PAGE_MAP_CLASS_OFFSET + 4] = kind.to_bytes(4, "little")
    else:
        page = ctx.image.make(number, MAGIC_PAGE_MAP, NO_INO, fresh=not ctx.map_used[block])
        page[PAGE_MAP_CLASS_OFFSET] = kind
    page[PAGE_MAP_USED_OFFSET:end] = used.to_bytes(PAGE_MAP_USED_BYTES, "little")


def _write_block_map(ctx: Context, map_page: MapPage) -> None:
    page, first, blocks = map_page
    end = first + blocks
    kind = ctx.claims.kind[first:end]
    zero = _both(ctx.map_zero[first:end], kind.translate(_TO_FREE))
    bitmaps = [
        pack_bits(flags).ljust(MAP_BYTES, b"\0")
        for flags in (kind.translate(_TO_USED), kind.translate(_TO_CARVED), zero)
    ]
    body = b"".join(bitmaps)
    start = MAP_USED_OFFSET
    if page in ctx.rewrite_maps:
        image = ctx.image.make(page, MAGIC_BLOCK_MAP, NO_INO, fresh=False)
        BLOCK_MAP.pack_into(image, BLOCK_MAP_OFFSET, first, blocks)
    elif bytes(ctx.image.raw(page)[start : start + len(body)]) == body:
        return
    else:
        image = ctx.image.edit(page)
        _store_union(ctx, page, bytearray(image), body)
    image[start : start + len(body)] = body


def _store_union(ctx: Context, page: PageNo, image: bytearray, body: bytes) -> None:
    """In between, what is in use before or after is marked so, and no more as zero than in both."""
    old = int.from_bytes(image[MAP_USED_OFFSET:MAP_ZERO_OFFSET], "little")
    new = int.from_bytes(body[: MAP_ZERO_OFFSET - MAP_USED_OFFSET], "little")
    zero = image[MAP_ZERO_OFFSET : MAP_ZERO_OFFSET + MAP_BYTES]
    image[MAP_USED_OFFSET:MAP_ZERO_OFFSET] = (old | new).to_bytes(2 * MAP_BYTES, "little")
    image[MAP_ZERO_OFFSET : MAP_ZERO_OFFSET + MAP_BYTES] = _both(zero, body[2 * MAP_BYTES :])
    ctx.image.store_between(page, image)
