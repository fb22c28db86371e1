"""Pass 6: the handover record in the state page, and its list (docs/format.md, 4 and 11)."""

from __future__ import annotations

import stat

from pkernfs import layout
from pkernfs.fs.fsck.context import Context
from pkernfs.fs.fsck.data import extents_of
from pkernfs.fs.fsck.problems import Code
from pkernfs.layout import (
    HANDOVER,
    HANDOVER_OFFSET,
    NO_INO,
    PAGE,
    STATE_FROZEN,
    STATE_PAGE,
    HandoverFields,
    page_offset,
)
from pkernfs.region import digest

_WHERE = f"handover record in the state page at {STATE_PAGE * PAGE:#x}"


def check_record(ctx: Context) -> None:
    """Check that the record belongs there and its list is whole; set :attr:`Context.list_ino`."""
    if ctx.state is None:
        return
    record = HandoverFields(*HANDOVER.unpack_from(ctx.image.raw(STATE_PAGE), HANDOVER_OFFSET))
    if ctx.state.state != STATE_FROZEN:
        if record != layout.NO_HANDOVER:
            ctx.report.add(Code.HANDOVER_STRAY, _WHERE)
            _store(ctx, layout.NO_HANDOVER)
        return
    if not record.list_ino:
        return
    reason = _fault(ctx, record)
    if reason:
        ctx.report.add(Code.HANDOVER_LIST, _WHERE, reason=reason)
        _store(ctx, record._replace(list_ino=NO_INO, list_bytes=0, list_digest=0, flags=0))
    else:
        ctx.list_ino = record.list_ino


def _fault(ctx: Context, record: HandoverFields) -> str:
    """Return the reason why the list cannot be used; ``""`` if it can."""
    ino = record.list_ino
    if not ctx.inodes.type_of(ino):
        return f"inode {ino} of its list does not exist"
    fields = ctx.fields(ino)
    if not stat.S_ISREG(fields.mode) or fields.nlink:
        return f"inode {ino} of its list is another file"
    if fields.size != record.list_bytes:
        return f"bad length of its list: got {fields.size}, expected {record.list_bytes}"
    extents = ctx.extents.get(ino)
    if extents is None:
        extents = extents_of(ctx, ino, ctx.inode_page(ino), fields)
    crc = done = 0
    for file_page, page, count in extents:
        length = min(count * PAGE, fields.size - file_page * PAGE)
        if file_page * PAGE != done or length <= 0:
            break
        crc = digest.crc64(ctx.image.region.view(page_offset(page), length), crc)
        done += length
    if done != fields.size:
        return "its list has a hole"
    if crc != record.list_digest:
        return f"bad digest of its list: got {crc:#018x}, expected {record.list_digest:#018x}"
    return ""


def _store(ctx: Context, record: HandoverFields) -> None:
    HANDOVER.pack_into(ctx.image.edit(STATE_PAGE), HANDOVER_OFFSET, *record)
