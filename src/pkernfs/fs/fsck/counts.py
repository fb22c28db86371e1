"""Pass 9: the counts in the state page, and the list of inode pages with a free slot.

They are compared as the region has them; after all repairs, :func:`write` stores them as
everything then is.
"""

from __future__ import annotations

from itertools import pairwise

from pkernfs import layout
from pkernfs.fs.fsck import superblocks
from pkernfs.fs.fsck.claims import CARVED, WHOLE
from pkernfs.fs.fsck.context import Context
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.structures import T_DIR, parse_inode_page
from pkernfs.layout import (
    FULL_INODE_PAGE,
    INODE_FLAG_PENDING,
    NO_INO,
    NO_PAGE,
    PAGE,
    SLOTS_PER_INODE_PAGE,
    STATE_CLEAN,
    STATE_FROZEN,
    STATE_PAGE,
)


def compare(ctx: Context) -> None:
    """Compare the counts in the state page and the list of free slots with the table."""
    state = ctx.state
    if state is None or ctx.lost_indexes or ctx.rebuild_table or ctx.table.faulty:
        return
    where = f"state page at {STATE_PAGE * PAGE:#x}"
    count = len(ctx.inodes.page_of)
    if state.inode_pages != count:
        ctx.report.add(Code.INODE_PAGE_COUNT, where, got=state.inode_pages, expected=count)
    if superblocks.is_clean(ctx) and state.inodes_used != ctx.inodes_on_media:
        ctx.report.add(Code.INODES_USED, where, got=state.inodes_used, expected=ctx.inodes_on_media)
    listed, reason = _free_list(ctx, state.free_inode_page)
    if not reason:
        for index, page in ctx.load_inode_pages():
            head = parse_inode_page(page)
            full = head.used & FULL_INODE_PAGE == FULL_INODE_PAGE
            if (index in listed) == full or bool(head.listed) == full:
                reason = f"inode page {index}: listed {head.listed}, used {head.used:#06x}"
                break
    if reason:
        ctx.report.add(Code.INODE_FREE_LIST, where, reason=reason)


def _free_list(ctx: Context, head: int) -> tuple[dict[int, None], str]:
    """Indexes in the list of pages with free slots, in order; why it ends too early, if it does."""
    listed: dict[int, None] = {}
    while head:
        index = head - 1
        number = ctx.inodes.page_of.get(index)
        if number is None:
            return listed, f"leads to inode page {index}, which does not exist"
        if index in listed:
            return listed, f"leads to inode page {index} twice"
        listed[index] = None
        head = parse_inode_page(ctx.image.raw(number)).next_free
    return listed, ""


def write(ctx: Context) -> None:
    """Store masks, the list of pages with free slots, and the state page, as everything now is."""
    inodes = ctx.inodes
    masks = {}
    for index, row in inodes.row_of.items():
        types = inodes.type[row : row + SLOTS_PER_INODE_PAGE]
        masks[index] = sum(1 << slot for slot, kind in enumerate(types) if kind)
    head = ctx.state.free_inode_page if ctx.state else 0
    order, _ = _free_list(ctx, head)
    order.update(dict.fromkeys(sorted(masks)))
    chain = [index for index in order if masks[index] != FULL_INODE_PAGE]
    following = {index: after + 1 for index, after in pairwise(chain)}
    listed = set(chain)
    pending = _pending_masks(ctx)
    for index, used in masks.items():
        number = inodes.page_of[index]
        old = parse_inode_page(ctx.image.raw(number))
        new = old._replace(
            next_free=following.get(index, 0),
            used=used,
            pending=pending.get(index, 0),
            listed=int(index in listed),
        )
        if new != old:
            layout.INODE_PAGE.pack_into(ctx.image.edit(number), layout.INODE_PAGE_OFFSET, *new)
    _write_state(ctx, chain[0] + 1 if chain else 0, sum(m.bit_count() for m in masks.values()))


def _pending_masks(ctx: Context) -> dict[int, int]:
    """By index of the page: a handover's list, and what a mount has to complete in segments."""
    inos = {ino for ino in ctx.segments.files if ctx.fields(ino).flags & INODE_FLAG_PENDING}
    masks: dict[int, int] = {}
    for ino in inos | ({ctx.list_ino} - {NO_INO}):
        index, slot = divmod(ino, SLOTS_PER_INODE_PAGE)
        masks[index] = masks.get(index, 0) | 1 << slot
    return masks


def _write_state(ctx: Context, free: int, used: int) -> None:
    old = ctx.state
    if old is None:
        old = layout.StateFields(STATE_CLEAN, 0, 0, 0, 0, bytes(16), NO_PAGE, 0, 0, 0, 0, 0)
        ctx.image.make(STATE_PAGE, layout.MAGIC_STATE, NO_INO, fresh=False)
    new = old._replace(
        state=STATE_FROZEN if old.state == STATE_FROZEN else STATE_CLEAN,
        flags=0,
        inode_root=ctx.inode_root or old.inode_root,
        inode_pages=len(ctx.inodes.page_of),
        free_inode_page=free,
        inodes_used=used,
    )
    if new != ctx.state:
        layout.STATE.pack_into(ctx.image.edit(STATE_PAGE), layout.STATE_OFFSET, *new)
    table = ctx.segments
    if table.is_new:
        page = ctx.image.edit(STATE_PAGE)
        layout.STATE_SEGMENTS.pack_into(page, layout.STATE_SEGMENTS_OFFSET, table.root, table.last)


def summarize(ctx: Context) -> dict[str, int]:
    """Count what there is after the repair, for the report."""
    used = ctx.claims.in_use()
    types = ctx.inodes.type
    return {
        "inodes": len(types) - types.count(0),
        "directories": types.count(T_DIR),
        "blocks": ctx.blocks,
        "blocks_free": ctx.blocks - len(used),
        "blocks_used": len(used),
        "blocks_data": used.count(WHOLE),
        "blocks_carved": used.count(CARVED),
        "segments": len(ctx.segments.rows),
        "pages_used": sum(m.bit_count() for m in ctx.claims.pages.values()),
    }
