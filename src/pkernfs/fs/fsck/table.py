"""Pass 2: the inode table, its pages, and each inode by itself.

Kept for later: where each inode page is, the type of each inode, which inode pages were lost, and
which inodes come from a damaged page. Symlink targets are checked here, because an inode that goes
must be gone before names are looked at.
"""

from __future__ import annotations

import time

from pkernfs import layout
from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.context import EVERY_KEY, Context, at
from pkernfs.fs.fsck.image import Buffer
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.structures import (
    T_DIR,
    T_LNK,
    T_REG,
    InodePage,
    check_header,
    check_inode,
    device_number_fits,
    extent_slots,
    file_type,
    flag_faults,
    inline_extents,
    parse_inode,
    parse_inode_page,
    parse_overflow,
)
from pkernfs.fs.fsck.trees import check_keys, walk
from pkernfs.layout import (
    FULL_INODE_PAGE,
    HEADER,
    INODE_BYTES,
    MAGIC_INODES,
    MAGIC_OVERFLOW,
    NO_INO,
    PAGES_PER_BLOCK,
    SLOTS_PER_INODE_PAGE,
    TREE_EXTENTS,
    Extent,
    InodeFields,
    block_of,
    inos_of,
)
from pkernfs.quantities import Ino, PageNo, pages_from

# Gaps in a table are filled with empty pages; an index further beyond the last good one is wrong.
_MAX_GAP = 4096


def load_table(ctx: Context) -> None:
    """Find every inode page, through the table's tree or else by itself."""
    pages = _walk_table(ctx)
    if ctx.table.lost:
        _search(ctx, pages)
    indexes = sorted(pages)
    end = 0
    for index in indexes:
        if index - end > _MAX_GAP:
            ctx.report.add(
                Code.TABLE_ENTRY, "inode table", reason=f"got index {index}, expected below {end}"
            )
            ctx.claims.release_pages(pages.pop(index))
            ctx.rebuild_table = True
            continue
        if index > end:
            _note_gap(ctx, end, index - end)
        end = index + 1
    for index in sorted(pages):
        ctx.inodes.add_page(index, pages[index])
    ctx.lost_indexes = {i for i in ctx.lost_indexes if i < end or not indexes}
    ctx.lost_indexes |= set(range(end)) - pages.keys()


def _note_gap(ctx: Context, index: int, count: int) -> None:
    ctx.report.add(Code.TABLE_GAP, "inode table", index=index, count=count)
    ctx.rebuild_table = True


def _walk_table(ctx: Context) -> dict[int, PageNo]:
    """``{index: page}`` of the pages that the table's tree leads to, each claimed."""
    pages: dict[int, PageNo] = {}
    parts = ctx.table
    if ctx.state is None:
        parts.lost.append(EVERY_KEY)
        parts.faulty = True
        return pages
    for leaf in walk(ctx, ctx.state.inode_root, NO_INO, TREE_EXTENTS, parts):
        extents = extent_slots(leaf.buffer, leaf.node)
        check_keys(ctx, leaf, NO_INO, parts, [e.file_page for e in extents])
        for extent in extents:
            _take_entry(ctx, pages, extent)
    return pages


def _take_entry(ctx: Context, pages: dict[int, PageNo], extent: Extent) -> None:
    index, page, count = extent
    if not count or count > ctx.pages or page >= ctx.pages:
        _bad_entry(ctx, f"got {index} at {page:#x}+{count:#x}")
        return
    for i, number in enumerate(pages_from(page, count)):
        reason = _page_fault(ctx, number, index + i, pages)
        if reason:
            # Garbage goes on for as long as it says; the rest is searched for, not walked.
            _bad_entry(ctx, reason)
            return
        pages[index + i] = number


def _bad_entry(ctx: Context, reason: str) -> None:
    ctx.report.add(Code.TABLE_ENTRY, "inode table", reason=reason)
    ctx.rebuild_table = True
    ctx.table.lost.append(EVERY_KEY)


def _page_fault(ctx: Context, number: PageNo, index: int, pages: dict[int, PageNo]) -> str:
    """Return why this cannot be the inode page of an index; ``""`` for a damaged one that can."""
    if index in pages:
        return f"index {index} twice"
    try:
        page = ctx.image.load(number, MAGIC_INODES)
        got = parse_inode_page(page).own_index
        if got != index:
            return f"inode page at {at(number)}: got index {got}, expected {index}"
    except CorruptionError as e:
        if number >= ctx.pages or ctx.image.is_intact(number) or not _plausible(ctx, number):
            return f"index {index} at {number:#x}: {e}"
    if not ctx.claims.claim_meta(number):
        return f"index {index} at {number:#x}: in use elsewhere, or where no inode page can be"
    return ""


def _plausible(ctx: Context, number: PageNo) -> bool:
    """Tell if a damaged page lies where a page of metadata can be in use."""
    block, bit = block_of(number), number % PAGES_PER_BLOCK
    used = ctx.page_map(block)
    return bool(bit) and ctx.map_carved[block] != 0 and (used is None or bool(used >> bit & 1))


def _search(ctx: Context, pages: dict[int, PageNo]) -> None:
    """Inode pages say what they are: those in use that the table does not lead to."""
    for number in list(ctx.find_pages(MAGIC_INODES)):
        try:
            page = ctx.image.load(number, MAGIC_INODES)
        except CorruptionError:
            continue
        index = parse_inode_page(page).own_index
        if HEADER.unpack_from(page)[3] or index in pages or index >= ctx.pages:
            continue
        if ctx.claims.claim_meta(number):
            pages[index] = number
            ctx.rebuild_table = True
            ctx.report.add(Code.INODE_PAGE_FOUND, f"inode page {index} at {at(number)}")


# ------------------------------------------------------------------------------ pages


def check_inodes(ctx: Context) -> None:
    """Every inode page, and every inode in it by itself."""
    for index, _ in ctx.load_inode_pages():
        number = ctx.inodes.page_of[index]
        try:
            page = ctx.image.load(number, MAGIC_INODES)
            head = parse_inode_page(page)
            if head.own_index != index or HEADER.unpack_from(page)[3]:
                raise CorruptionError("bad owner or index")
        except CorruptionError as e:
            _salvage(ctx, index, number, str(e))
            continue
        _check_page(ctx, index, number, page, head)
    for ino in (layout.ROOT_INO, layout.IOMMU_INO):
        if ctx.inodes.type_of(ino) not in (0, T_DIR):
            _drop(ctx, Code.INODE_BAD, ino, "not a directory, as it must be")


def _check_page(ctx: Context, index: int, number: PageNo, page: Buffer, head: InodePage) -> None:
    where = f"inode page {index} at {at(number)}"
    if head.used & ~FULL_INODE_PAGE:
        _bad_mask(ctx, where, "used", head.used, head.used & FULL_INODE_PAGE)
    if head.listed > 1:
        _bad_mask(ctx, where, "listed", head.listed, int(head.used != FULL_INODE_PAGE))
    row = ctx.inodes.row_of[index]
    inos = inos_of(index)
    pending = 0
    used = head.used & FULL_INODE_PAGE
    ctx.inodes_on_media += used.bit_count()
    while used:
        slot = (used & -used).bit_length() - 1
        used &= used - 1
        ino = inos[slot]
        fields = parse_inode(page, slot)
        try:
            check_inode(fields, ino)
            _check_target(ctx, fields, ino)
        except CorruptionError as e:
            code = Code.SYMLINK_TARGET if isinstance(e, _TargetError) else Code.INODE_BAD
            _drop(ctx, code, ino, str(e))
            pending |= head.pending & 1 << slot
            continue
        ctx.inodes.type[row + slot] = file_type(fields.mode)
        if not fields.nlink or fields.flags & layout.INODE_FLAG_PENDING:
            pending |= 1 << slot
        _check_fields(ctx, ino, fields)
    if pending != head.pending:
        _bad_mask(ctx, where, "pending", head.pending, pending)


def _bad_mask(ctx: Context, where: str, field: str, got: int, expected: int) -> None:
    ctx.report.add(Code.INODE_PAGE_MASKS, where, field=field, got=got, expected=expected)


def _drop(ctx: Context, code: Code, ino: Ino, reason: str) -> None:
    ctx.report.add(code, ctx.file(ino), reason=reason)
    ctx.drop_inode(ino)
    ctx.lost_inos.add(ino)


def _check_fields(ctx: Context, ino: Ino, f: InodeFields) -> None:
    """Fields that can be put right without knowing anything else."""
    good: dict[str, int] = {}
    kind = file_type(f.mode)
    flags = f.flags & ~flag_faults(f)
    if not ctx.sb.pool.kind:
        flags &= ~(layout.INODE_FLAG_SEGMENT | layout.INODE_FLAG_NATIVE)
    if flags & layout.INODE_FLAG_BODY and not f.body:
        flags &= ~layout.INODE_FLAG_BODY
    if f.mode >> 16:
        good["mode"] = f.mode & 0xFFFF
    if flags != f.flags:
        good["flags"] = flags
    if f.body and not flags & (layout.INODE_FLAG_BODY | layout.INODE_FLAG_SEGMENT):
        good["body"] = 0
    if kind != T_DIR and f.parent:
        good["parent"] = 0
    if kind not in (T_REG,) and f.data_pages:
        good["data_pages"] = 0
    if not device_number_fits(f):
        good["rdev_major"] = good["rdev_minor"] = 0
    for field, expected in good.items():
        ctx.report.add(
            Code.INODE_FIELD,
            ctx.file(ino),
            field=field,
            got=getattr(f, field),
            expected=expected,
        )
    if good:
        ctx.set_fields(ino, **good)
    if flags & layout.INODE_FLAG_PENDING and f.pending_start > f.pending_end:
        ctx.report.add(Code.INODE_PENDING, ctx.file(ino), start=f.pending_start, end=f.pending_end)
        ctx.set_fields(
            ino, flags=flags & ~layout.INODE_FLAG_PENDING, pending_start=0, pending_end=0
        )
    if flags & layout.INODE_FLAG_SEGMENT:
        ctx.segments.files.append(ino)


# ------------------------------------------------------------------------------ damaged pages


def _salvage(ctx: Context, index: int, number: PageNo, reason: str) -> None:
    """A damaged page: inodes that pass every check are kept, but not who may read them.

    They have not been proved intact, so they become root's alone, and they have to yield wherever
    another file claims the same space.
    """
    page = ctx.image.raw(number)
    kept: dict[int, bytes] = {}
    inos = inos_of(index)
    if _is_like(ctx, page, index, number):
        used = parse_inode_page(page).used
        for slot in range(1, SLOTS_PER_INODE_PAGE):
            if used >> slot & 1 and _looks_intact(ctx, page, slot, inos[slot]):
                kept[slot] = bytes(page[slot * INODE_BYTES : (slot + 1) * INODE_BYTES])
    ctx.report.add(
        Code.INODE_PAGE_DAMAGED,
        f"inode page {index} at {at(number)}",
        reason=reason,
        kept=len(kept),
    )
    new_inode_page(ctx, index, number, fresh=False)
    image = ctx.image.edit(number)
    row = ctx.inodes.row_of[index]
    for slot, data in kept.items():
        ino = inos[slot]
        image[slot * INODE_BYTES : (slot + 1) * INODE_BYTES] = data
        f = ctx.fields(ino)
        kind = f.mode & 0xF000
        ctx.set_fields(ino, mode=kind | (0o700 if kind >> 12 == T_DIR else 0o600), uid=0, gid=0)
        ctx.inodes.type[row + slot] = kind >> 12
        ctx.salvaged.add(ino)
        _check_fields(ctx, ino, ctx.fields(ino))
    ctx.lost_indexes.add(index)


def _is_like(ctx: Context, page: Buffer, index: int, number: PageNo) -> bool:
    try:
        check_header(page, number, MAGIC_INODES, ctx.image.uuid, sealed=False)
    except CorruptionError:
        return False
    return parse_inode_page(page).own_index == index and HEADER.unpack_from(page)[3] == 0


def _looks_intact(ctx: Context, page: Buffer, slot: int, ino: Ino) -> bool:
    f = parse_inode(page, slot)
    try:
        check_inode(f, ino)
        if file_type(f.mode) == T_REG and not f.flags & layout.INODE_FLAG_BODY:
            end = 0
            for file_page, first, count in inline_extents(page, slot, f.flags):
                if file_page < end or not count or first + count > ctx.pages:
                    return False
                end = file_page + count
        _check_target(ctx, f, ino)
    except CorruptionError:
        return False
    has_body = f.flags & (layout.INODE_FLAG_BODY | layout.INODE_FLAG_SEGMENT)
    no_body = bool(has_body) != bool(f.body)
    return not (flag_faults(f) or f.mode >> 16 or no_body or not f.nlink)


def new_inode_page(ctx: Context, index: int, number: PageNo, *, fresh: bool) -> None:
    """An empty inode page. Its generations start at the time, above those of the one before."""
    image = ctx.image.make(number, MAGIC_INODES, NO_INO, fresh=fresh)
    generation = int(time.time()) & 0xFFFFFFFF
    layout.INODE_PAGE.pack_into(image, layout.INODE_PAGE_OFFSET, index, 0, 0, 0, 1, generation)


# ------------------------------------------------------------------------------ overflow pages


def overflow_chain(ctx: Context, first: PageNo, owner: Ino, length: int) -> list[PageNo]:
    """Claim the pages of a value of ``length`` bytes.

    :raises CorruptionError: damaged, of another length, or in a circle; nothing is claimed then.
    """
    pages: list[PageNo] = []
    number = first
    try:
        while number:
            page = ctx.image.load(number, MAGIC_OVERFLOW)
            following, held = parse_overflow(page, owner)
            if not ctx.claims.claim_meta(number):
                raise CorruptionError(f"page {number:#x} in use elsewhere")
            pages.append(number)
            length -= held
            if length < 0:
                raise CorruptionError("longer than it should be")
            number = following
        if length:
            raise CorruptionError(f"{length} bytes are missing")
    except CorruptionError:
        for number in pages:
            ctx.claims.release_pages(number)
        raise
    return pages


def _check_target(ctx: Context, f: InodeFields, ino: Ino) -> None:
    if file_type(f.mode) == T_LNK and f.flags & layout.INODE_FLAG_BODY:
        try:
            overflow_chain(ctx, f.body, ino, f.size)
        except CorruptionError as e:
            raise _TargetError(str(e)) from None


class _TargetError(CorruptionError):
    """The target of a symlink cannot be read."""
