"""Pass 4: where the data of files is.

Every extent is claimed, block by block or page by page: after all metadata, files of damaged inode
pages last. Who comes second gets a copy later on (a :class:`Relocation`). Kept for later: the
final extents of files that do not keep theirs as they are.
"""

from __future__ import annotations

import re
from array import array

from pkernfs import layout
from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck import superblocks
from pkernfs.fs.fsck.claims import CARVED, FREE, WHOLE
from pkernfs.fs.fsck.context import Context, Relocation
from pkernfs.fs.fsck.image import Buffer
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.structures import (
    MAX_FILE_PAGES,
    T_REG,
    Extent,
    inline_extents,
    parse_inode,
)
from pkernfs.layout import (
    BLOCK,
    INODE_FLAG_BODY,
    INODE_FLAG_PENDING,
    PAGE,
    PAGES_PER_BLOCK,
    SLOTS_PER_INODE_PAGE,
    InodeFields,
)

_SAME = [re.compile(re.escape(bytes([kind])) + b"+") for kind in range(5)]


def check_data(ctx: Context) -> None:
    """Claim what every regular file holds."""
    late = []
    for index, page in ctx.load_inode_pages():
        row = ctx.inodes.row_of[index]
        for slot in range(1, SLOTS_PER_INODE_PAGE):
            if ctx.inodes.type[row + slot] == T_REG:
                ino = index * SLOTS_PER_INODE_PAGE + slot
                if ino in ctx.salvaged:
                    late.append(ino)
                else:
                    check_file(ctx, ino, page, parse_inode(page, slot))
    for ino in late:
        check_file(ctx, ino, ctx.inode_page(ino), ctx.fields(ino))


def extents_of(ctx: Context, ino: int, page: Buffer, fields: InodeFields) -> list[Extent]:
    """The extents that an inode says it has, unchecked."""
    if fields.flags & INODE_FLAG_BODY:
        return triples(ctx.tree_extents.get(ino, array("Q")))
    try:
        return inline_extents(page, ino & 15, fields.flags)
    except CorruptionError as e:
        ctx.report.add(Code.INODE_BAD, ctx.file(ino), reason=f"{e}: no data left")
        ctx.extents[ino] = []
        return []


def triples(flat: array[int]) -> list[Extent]:
    """Extents from an array of their numbers."""
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def check_file(ctx: Context, ino: int, page: Buffer, fields: InodeFields) -> None:
    """Claim the extents of one file, and find out which it keeps."""
    stored = extents_of(ctx, ino, page, fields)
    if not stored and not fields.data_pages and not fields.flags & INODE_FLAG_PENDING:
        return
    work = _File(ctx, ino)
    for extent in _in_order(ctx, fields.size, stored, work):
        work.claim(extent)
    final = joined(ctx, work.kept)
    if not work.faulty and final != stored:
        _report_shape(ctx, ino, stored, final)
    if final != stored:
        ctx.extents[ino] = final
    pages = sum(count for _, _, count in final)
    if final == stored and pages != fields.data_pages:
        ctx.report.add(Code.INODE_DATA_PAGES, ctx.file(ino), got=fields.data_pages, expected=pages)
        ctx.set_fields(ino, data_pages=pages)
    pending = fields.flags & INODE_FLAG_PENDING
    if pending:
        _finish_pending(ctx, ino, fields, final)
    if not pending or fields.pending_start > fields.size:
        check_tail(ctx, ino, fields.size, ctx.extents.get(ino, final))


def _in_order(ctx: Context, size: int, stored: list[Extent], work: _File) -> list[Extent]:
    """The extents ascending, without those that overlap one before or lie out of all range.

    One that reaches beyond the region has a wrong length: no more of it than ``size`` needs stays.
    """
    end = 0
    found = []
    for extent in sorted(stored):
        file_page, page, count = extent
        if (
            not count
            or count > MAX_FILE_PAGES
            or file_page + count > MAX_FILE_PAGES
            or page >= ctx.pages
        ):
            work.complain(Code.EXTENT_RANGE, extent)
            continue
        if file_page < end:
            work.complain(Code.EXTENT_ORDER, extent)
            continue
        end = file_page + count
        if page + count > ctx.pages:
            work.complain(Code.EXTENT_RANGE, extent)
            count = min(ctx.pages - page, -(-size // PAGE) - file_page)
            if count <= 0:
                continue
        found.append((file_page, page, count))
    if not work.faulty and found != stored:
        work.complain(Code.EXTENT_ORDER, stored[0])
    return found


def claim_found(ctx: Context, ino: int, extents: list[Extent]) -> None:
    """Claim extents found by themselves, beside those that the file has."""
    kept = ctx.extents.get(ino)
    if kept is None:
        kept = triples(ctx.tree_extents.get(ino, array("Q")))
    work = _File(ctx, ino)
    for extent in _in_order(ctx, layout.MAX_FILE_BYTES, extents, work):
        work.claim(extent)
    ctx.extents[ino] = joined(ctx, sorted(kept + work.kept))


def _report_shape(ctx: Context, ino: int, stored: list[Extent], final: list[Extent]) -> None:
    extra = next(e for e in stored if e not in final)
    if len(final) < len(stored):
        ctx.report.add(Code.EXTENT_SPLIT, ctx.file(ino), extent=show(extra))
    else:
        ctx.report.add(
            Code.EXTENT_SHAPE,
            ctx.file(ino),
            reason="mixes whole blocks and pages",
            extent=show(extra),
            remedy="split",
        )


def show(extent: Extent) -> str:
    """An extent, as messages show it."""
    return f"file page {extent[0]} at {extent[1] * PAGE:#x}, {extent[2]} pages"


def joined(ctx: Context, extents: list[Extent]) -> list[Extent]:
    """Neighbours made one where the format wants it."""
    kind = ctx.claims.kind
    found: list[Extent] = []
    for file_page, page, count in extents:
        if found:
            last = found[-1]
            if (
                last[0] + last[2] == file_page
                and last[1] + last[2] == page
                and kind[last[1] // PAGES_PER_BLOCK] == kind[page // PAGES_PER_BLOCK]
            ):
                found[-1] = (last[0], last[1], last[2] + count)
                continue
        found.append((file_page, page, count))
    return found


class _File:
    """The claims of one file."""

    def __init__(self, ctx: Context, ino: int) -> None:
        self._ctx = ctx
        self._ino = ino
        self.kept: list[Extent] = []
        self.faulty = False

    def complain(self, code: Code, extent: Extent) -> None:
        """Report something that changes the extents of the file."""
        self.faulty = True
        self._ctx.report.add(code, self._ctx.file(self._ino), extent=show(extent))

    def claim(self, extent: Extent) -> None:
        """Claim an extent that lies in the region."""
        file_page, page, count = extent
        while count:
            bit = page % PAGES_PER_BLOCK
            if bit or count < PAGES_PER_BLOCK:
                length = min(count, PAGES_PER_BLOCK - bit)
                self._part((file_page, page, length))
            else:
                length = self._blocks(file_page, page, count // PAGES_PER_BLOCK) * PAGES_PER_BLOCK
            file_page += length
            page += length
            count -= length

    def _blocks(self, file_page: int, page: int, most: int) -> int:
        """Claim whole blocks as far as they are alike; returns how many that is."""
        ctx = self._ctx
        claims = ctx.claims
        first = page // PAGES_PER_BLOCK
        kind = claims.kind[first]
        same = _SAME[kind].match(claims.kind, first, first + most)
        count = same.end() - first if same else 1
        if kind == FREE:
            carved = ctx.map_carved.find(1, first, first + count)
            if carved == first and ctx.page_map(first) is not None:
                kind, count = CARVED, 1
            elif carved >= 0:
                count = max(carved - first, 1)
        extent = (file_page, page, count * PAGES_PER_BLOCK)
        if kind == FREE and not (page - file_page) % PAGES_PER_BLOCK:
            claims.claim_run(first, count)
            self.kept.append(extent)
        elif kind == FREE:
            claims.claim_run(first, count)
            ctx.released_blocks.append((first, count))
            self._relocate(Code.EXTENT_SHAPE, extent)
        elif kind == WHOLE:
            self._relocate(Code.DOUBLE_CLAIM, extent)
        else:
            self.complain(Code.EXTENT_METADATA if kind == CARVED else Code.EXTENT_RANGE, extent)
        return count

    def _part(self, extent: Extent) -> None:
        """Claim pages of one block."""
        ctx = self._ctx
        file_page, page, count = extent
        block, bit = divmod(page, PAGES_PER_BLOCK)
        kind = ctx.claims.kind[block]
        carved = kind == CARVED or (
            kind == FREE and (ctx.map_carved[block] == 1 or ctx.page_map(block) is not None)
        )
        if carved:
            self._pages(file_page, block, bit, count)
        elif kind == FREE:
            ctx.claims.claim_block(block)
            ctx.released_blocks.append((block, 1))
            self._relocate(Code.EXTENT_SHAPE, extent)
        elif kind == WHOLE:
            self._relocate(Code.DOUBLE_CLAIM, extent)
        else:
            self.complain(Code.EXTENT_RANGE, extent)

    def _pages(self, file_page: int, block: int, bit: int, count: int) -> None:
        claims = self._ctx.claims
        before = claims.pages.get(block, 1)
        wanted = ((1 << count) - 1) << bit
        if not before & wanted:
            claims.claim_pages(block, bit, count)
            self.kept.append((file_page, block * PAGES_PER_BLOCK + bit, count))
            return
        claims.claim_pages(block, bit, count)
        meta = claims.meta[block]
        for page in range(bit, bit + count):
            extent = (file_page + page - bit, block * PAGES_PER_BLOCK + page, 1)
            if meta >> page & 1:
                self.complain(Code.EXTENT_METADATA, extent)
            elif before >> page & 1:
                self._relocate(Code.DOUBLE_CLAIM, extent)
            else:
                self.kept.append(extent)

    def _relocate(self, code: Code, extent: Extent) -> None:
        self.faulty = True
        file_page, page, count = extent
        todo = self._ctx.relocations
        if todo:
            last = todo[-1]
            if (
                (last.ino, last.code) == (self._ino, code)
                and last.file_page + last.pages == file_page
                and last.source + last.pages == page
            ):
                last.pages += count
                return
        todo.append(Relocation(self._ino, file_page, page, count, code))


# ------------------------------------------------------------------------------ ends


def _finish_pending(ctx: Context, ino: int, fields: InodeFields, extents: list[Extent]) -> None:
    """Do what is left of a truncation or a punch (format, section 6)."""
    clean = superblocks.is_clean(ctx)
    start, end = fields.pending_start, fields.pending_end
    ctx.report.add(
        Code.PENDING_LEFT if clean else Code.PENDING_RANGE, ctx.file(ino), start=start, end=end
    )
    left: list[Extent] = []
    for file_page, page, count in extents:
        whole = ctx.claims.kind[page // PAGES_PER_BLOCK] == WHOLE
        unit = PAGES_PER_BLOCK if whole else 1
        low = max(-(-start // (unit * PAGE)) * unit, file_page)
        stop = file_page + count
        if end < layout.PENDING_TO_END:
            stop = min(end // (unit * PAGE) * unit, stop)
        if low >= stop:
            left.append((file_page, page, count))
            continue
        if low > file_page:
            left.append((file_page, page, low - file_page))
        if stop < file_page + count:
            left.append((stop, page + stop - file_page, file_page + count - stop))
        release_extent(ctx, (low, page + low - file_page, stop - low))
    for file_page, page, count in left:
        low_byte = max(start, file_page * PAGE)
        end_byte = min(end, (file_page + count) * PAGE)
        if low_byte < end_byte:
            ctx.image.zero_data(page * PAGE + low_byte - file_page * PAGE, end_byte - low_byte)
    ctx.extents[ino] = left
    ctx.set_fields(ino, flags=fields.flags & ~INODE_FLAG_PENDING, pending_start=0, pending_end=0)


def release_extent(ctx: Context, extent: Extent) -> None:
    """Free the pages or blocks of a kept extent once the repair is stored."""
    _, page, count = extent
    if ctx.claims.kind[page // PAGES_PER_BLOCK] == WHOLE:
        ctx.released_blocks.append((page // PAGES_PER_BLOCK, count // PAGES_PER_BLOCK))
    else:
        ctx.released_pages.append((page, count))


def check_tail(ctx: Context, ino: int, size: int, extents: list[Extent]) -> None:
    """Bytes behind the end of the file must be zero, where there is memory for them."""
    dirty = []
    for file_page, page, count in reversed(extents):
        end = (file_page + count) * PAGE
        if end <= size:
            break
        start = max(size, file_page * PAGE)
        at = page * PAGE + start - file_page * PAGE
        for offset, length in ctx.image.data_in(at, end - start):
            dirty += _dirty_parts(ctx, offset, length, start - at)
    if dirty:
        code = Code.TAIL_NOT_ZERO if superblocks.is_clean(ctx) else Code.TAIL_AFTER_CRASH
        ctx.report.add(code, ctx.file(ino), start=min(dirty)[0], end=max(d[1] for d in dirty))


def _dirty_parts(ctx: Context, offset: int, length: int, shift: int) -> list[tuple[int, int]]:
    """Have what is not zero zeroed, at most a block at a time; its place in the file."""
    found = []
    for at in range(offset, offset + length, BLOCK):
        piece = min(BLOCK, offset + length - at)
        if not ctx.image.region.is_zero(at, piece):
            ctx.image.zero_data(at, piece)
            found.append((at + shift, at + shift + piece))
    return found
