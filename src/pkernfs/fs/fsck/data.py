"""Pass 5: where the data of files is.

Every extent is claimed, block by block or page by page: after all metadata, files of damaged inode
pages last. Who comes second gets a copy later on (a :class:`Relocation`). Kept for later: the
final extents of files that do not keep theirs as they are.
"""

from __future__ import annotations

import re
from array import array
from typing import NamedTuple

from pkernfs import layout
from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck import superblocks
from pkernfs.fs.fsck.claims import CARVED, FREE, WHOLE
from pkernfs.fs.fsck.context import Context, Relocation, at
from pkernfs.fs.fsck.image import Buffer
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.structures import (
    MAX_FILE_PAGES,
    T_REG,
    has_segment,
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
    Extent,
    InodeFields,
    block_of,
    inos_of,
)
from pkernfs.quantities import BlockNo, BlockRun, Ino, PageNo, PageRun, RegionOff, RegionRange

_SAME = [re.compile(re.escape(bytes([kind])) + b"+") for kind in range(5)]


def check_data(ctx: Context) -> None:
    """Claim what every regular file holds."""
    late: list[Ino] = []
    for index, page in ctx.load_inode_pages():
        row = ctx.inodes.row_of[index]
        inos = inos_of(index)
        for slot in range(1, SLOTS_PER_INODE_PAGE):
            if ctx.inodes.type[row + slot] == T_REG:
                ino = inos[slot]
                if ino in ctx.salvaged:
                    late.append(ino)
                else:
                    check_file(ctx, ino, page, parse_inode(page, slot))
    for ino in late:
        check_file(ctx, ino, ctx.inode_page(ino), ctx.fields(ino))


def bound_sizes(ctx: Context) -> None:
    """Files of damaged inode pages end where their memory does, at the latest.

    Nothing proves a size that is larger: it would be as many zeros as the damage says. Of an intact
    inode it is a hole at the end.
    """
    for ino in sorted(ctx.salvaged):
        if ctx.inodes.type_of(ino) != T_REG:
            continue
        fields = ctx.fields(ino)
        if has_segment(fields):
            continue
        extents = ctx.extents.get(ino)
        if extents is None:
            extents = sorted(extents_of(ctx, ino, ctx.inode_page(ino), fields))
        most = (extents[-1].file_page + extents[-1].pages) * PAGE if extents else 0
        if fields.size > most:
            ctx.report.add(
                Code.INODE_FIELD, ctx.file(ino), field="size", got=fields.size, expected=most
            )
            ctx.set_fields(ino, size=most)


def extents_of(ctx: Context, ino: Ino, page: Buffer, fields: InodeFields) -> list[Extent]:
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
    return list(map(Extent._make, zip(flat[::3], flat[1::3], flat[2::3], strict=True)))


def check_file(ctx: Context, ino: Ino, page: Buffer, fields: InodeFields) -> None:
    """Claim the extents of one file, and find out which it keeps.

    Data in a segment is not in the region: a mount completes what is pending there.
    """
    if has_segment(fields):
        return
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
    pages = sum(extent.pages for extent in final)
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
            extent = Extent(file_page, page, count)
        found.append(extent)
    if not work.faulty and found != stored:
        work.complain(Code.EXTENT_ORDER, stored[0])
    return found


def claim_found(ctx: Context, ino: Ino, extents: list[Extent]) -> None:
    """Claim extents found by themselves, beside those that the file has."""
    kept = ctx.extents.get(ino)
    if kept is None:
        kept = triples(ctx.tree_extents.get(ino, array("Q")))
    work = _File(ctx, ino)
    for extent in _in_order(ctx, layout.MAX_FILE_BYTES, extents, work):
        work.claim(extent)
    ctx.extents[ino] = joined(ctx, sorted(kept + work.kept))


def _report_shape(ctx: Context, ino: Ino, stored: list[Extent], final: list[Extent]) -> None:
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
    return f"file page {extent.file_page} at {at(extent.page)}, {extent.pages} pages"


def joined(ctx: Context, extents: list[Extent]) -> list[Extent]:
    """Neighbours made one where the format wants it."""
    kind = ctx.claims.kind
    found: list[Extent] = []
    for extent in extents:
        if found:
            last = found[-1]
            if (
                last.file_page + last.pages == extent.file_page
                and last.page + last.pages == extent.page
                and kind[last.page // PAGES_PER_BLOCK] == kind[extent.page // PAGES_PER_BLOCK]
            ):
                found[-1] = last._replace(pages=last.pages + extent.pages)
                continue
        found.append(extent)
    return found


def _start(extent: Extent, count: int) -> Extent:
    """The first pages of an extent; all of it as it is."""
    return extent if count == extent.pages else Extent(extent.file_page, extent.page, count)


def _rest(extent: Extent, skip: int) -> Extent:
    """An extent without its first pages."""
    file_page, page, count = extent
    return Extent(file_page + skip, PageNo(page + skip), count - skip)


class _File:
    """The claims of one file."""

    def __init__(self, ctx: Context, ino: Ino) -> None:
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
        left = extent
        while True:
            bit = left.page % PAGES_PER_BLOCK
            if bit or left.pages < PAGES_PER_BLOCK:
                done = min(left.pages, PAGES_PER_BLOCK - bit)
                self._part(_start(left, done))
            else:
                done = self._blocks(left) * PAGES_PER_BLOCK
            if done == left.pages:
                return
            left = _rest(left, done)

    def _blocks(self, extent: Extent) -> int:
        """Claim whole blocks as far as they are alike; returns how many that is."""
        ctx = self._ctx
        claims = ctx.claims
        file_page, page, pages = extent
        first, most = block_of(page), pages // PAGES_PER_BLOCK
        kind = claims.kind[first]
        same = _SAME[kind].match(claims.kind, first, first + most)
        count = same.end() - first if same else 1
        if kind == FREE:
            carved = ctx.map_carved.find(1, first, first + count)
            if carved == first and ctx.page_map(first) is not None:
                kind, count = CARVED, 1
            elif carved >= 0:
                count = max(carved - first, 1)
        extent = _start(extent, count * PAGES_PER_BLOCK)
        if kind == FREE and not (page - file_page) % PAGES_PER_BLOCK:
            claims.claim_run(first, count)
            self.kept.append(extent)
        elif kind == FREE:
            claims.claim_run(first, count)
            ctx.released_blocks.append(BlockRun(first, count))
            self._relocate(Code.EXTENT_SHAPE, extent)
        elif kind == WHOLE:
            self._relocate(Code.DOUBLE_CLAIM, extent)
        else:
            self.complain(Code.EXTENT_METADATA if kind == CARVED else Code.EXTENT_RANGE, extent)
        return count

    def _part(self, extent: Extent) -> None:
        """Claim pages of one block."""
        ctx = self._ctx
        page = extent.page
        block, bit = block_of(page), page % PAGES_PER_BLOCK
        kind = ctx.claims.kind[block]
        carved = kind == CARVED or (
            kind == FREE and (ctx.map_carved[block] == 1 or ctx.page_map(block) is not None)
        )
        if carved:
            self._pages(extent, block, bit)
        elif kind == FREE:
            ctx.claims.claim_block(block)
            ctx.released_blocks.append(BlockRun(block, 1))
            self._relocate(Code.EXTENT_SHAPE, extent)
        elif kind == WHOLE:
            self._relocate(Code.DOUBLE_CLAIM, extent)
        else:
            self.complain(Code.EXTENT_RANGE, extent)

    def _pages(self, extent: Extent, block: BlockNo, bit: int) -> None:
        claims = self._ctx.claims
        count = extent.pages
        before = claims.pages.get(block, 1)
        wanted = ((1 << count) - 1) << bit
        claims.claim_pages(block, bit, count)
        if not before & wanted:
            self.kept.append(extent)
            return
        meta = claims.meta[block]
        for i in range(count):
            single = Extent(extent.file_page + i, PageNo(extent.page + i), 1)
            if meta >> bit + i & 1:
                self.complain(Code.EXTENT_METADATA, single)
            elif before >> bit + i & 1:
                self._relocate(Code.DOUBLE_CLAIM, single)
            else:
                self.kept.append(single)

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


def _finish_pending(ctx: Context, ino: Ino, fields: InodeFields, extents: list[Extent]) -> None:
    """Do what is left of a truncation or a punch (format, section 6)."""
    clean = superblocks.is_clean(ctx)
    start, end = fields.pending_start, fields.pending_end
    ctx.report.add(
        Code.PENDING_LEFT if clean else Code.PENDING_RANGE, ctx.file(ino), start=start, end=end
    )
    left: list[Extent] = []
    for extent in extents:
        file_page, page, count = extent
        whole = ctx.claims.kind[page // PAGES_PER_BLOCK] == WHOLE
        unit = PAGES_PER_BLOCK if whole else 1
        low = max(-(-start // (unit * PAGE)) * unit, file_page)
        stop = file_page + count
        if end < layout.PENDING_TO_END:
            stop = min(end // (unit * PAGE) * unit, stop)
        if low >= stop:
            left.append(extent)
            continue
        if low > file_page:
            left.append(_start(extent, low - file_page))
        if stop < file_page + count:
            left.append(_rest(extent, stop - file_page))
        release_extent(ctx, _rest(_start(extent, stop - file_page), low - file_page))
    for file_page, page, count in left:
        low_byte = max(start, file_page * PAGE)
        end_byte = min(end, (file_page + count) * PAGE)
        if low_byte < end_byte:
            start_of_range = RegionOff(page * PAGE + low_byte - file_page * PAGE)
            ctx.image.zero_data(start_of_range, end_byte - low_byte)
    ctx.extents[ino] = left
    ctx.set_fields(ino, flags=fields.flags & ~INODE_FLAG_PENDING, pending_start=0, pending_end=0)


def release_extent(ctx: Context, extent: Extent) -> None:
    """Free the pages or blocks of a kept extent once the repair is stored."""
    _, page, count = extent
    block = block_of(page)
    if ctx.claims.kind[block] == WHOLE:
        ctx.released_blocks.append(BlockRun(block, count // PAGES_PER_BLOCK))
    else:
        ctx.released_pages.append(PageRun(page, count))


def check_tail(ctx: Context, ino: Ino, size: int, extents: list[Extent]) -> None:
    """Bytes behind the end of the file must be zero, where there is memory for them."""
    dirty: list[_FileRange] = []
    for file_page, page, count in reversed(extents):
        end = (file_page + count) * PAGE
        if end <= size:
            break
        start = max(size, file_page * PAGE)
        offset = RegionOff(page * PAGE + start - file_page * PAGE)
        for part in ctx.image.data_in(offset, end - start):
            dirty += _dirty_parts(ctx, part, start - offset)
    if dirty:
        code = Code.TAIL_NOT_ZERO if superblocks.is_clean(ctx) else Code.TAIL_AFTER_CRASH
        first, last = min(d.start for d in dirty), max(d.end for d in dirty)
        ctx.report.add(code, ctx.file(ino), start=first, end=last)


class _FileRange(NamedTuple):
    """Bytes of a file, from ``start`` up to ``end``."""

    start: int
    end: int


def _dirty_parts(ctx: Context, part: RegionRange, shift: int) -> list[_FileRange]:
    """Have what is not zero zeroed, at most a block at a time; its place in the file."""
    found = []
    for offset in map(RegionOff, range(part.start, part.end, BLOCK)):
        piece = min(BLOCK, part.end - offset)
        if not ctx.image.region.is_zero(offset, piece):
            ctx.image.zero_data(offset, piece)
            found.append(_FileRange(offset + shift, offset + shift + piece))
    return found
