"""The outcome of a check, as a handover needs it: every metadata page and every file's data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.alloc.bitmap import expand
from pkernfs.fs.fsck.context import Context
from pkernfs.fs.fsck.data import extents_of
from pkernfs.fs.fsck.problems import Report
from pkernfs.fs.fsck.rows import pack_row
from pkernfs.fs.fsck.structures import T_REG, has_segment
from pkernfs.layout import (
    BACKUP_PAGE,
    INODE_FLAG_PENDING,
    INODE_FLAG_TABLE,
    PAGE,
    PAGE_MAP_USED_BYTES,
    PAGES_PER_BLOCK,
    SUPERBLOCK_PAGE,
    first_page,
    page_offset,
)
from pkernfs.quantities import FileSpan, Ino, PageNo, SegmentNo, pages_from

if TYPE_CHECKING:
    from pkernfs.pool.pool import Segment


class FileSpans(NamedTuple):
    """What a file has memory for, up to its last page, ascending."""

    ino: Ino
    spans: list[FileSpan]


class SegmentFile(NamedTuple):
    """A file whose data is a segment; ``size`` in bytes."""

    ino: Ino
    row: Segment
    size: int


class Survey:
    """Metadata pages and files as a check has found them; right only if the report is clean."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    @property
    def report(self) -> Report:
        """The report of the check."""
        return self._ctx.report

    @property
    def uuid(self) -> bytes:
        """The UUID of the file system."""
        return self._ctx.sb.uuid

    def metadata_pages(self) -> list[PageNo]:
        """List every metadata page in use but the state page and the journal, ascending."""
        ctx = self._ctx
        pages = [SUPERBLOCK_PAGE, BACKUP_PAGE, *(m.page for m in ctx.sb.map_pages())]
        for block, mask in ctx.claims.meta.items():
            bits = expand(mask.to_bytes(PAGE_MAP_USED_BYTES, "little"), PAGES_PER_BLOCK)
            pages += compress(pages_from(first_page(block), PAGES_PER_BLOCK), bits)
        return sorted(pages)

    def files(self) -> Iterator[FileSpans]:
        """Yield where the data of each regular file in the region is that has a name.

        Not those of tables: they are proved right by their own check, and a unit may set bits in
        them meanwhile.
        """
        ctx = self._ctx
        for ino in ctx.inodes.of_type(T_REG):
            fields = ctx.fields(ino)
            if not fields.nlink or fields.flags & INODE_FLAG_TABLE or has_segment(fields):
                continue
            spans: list[FileSpan] = []
            for file_page, page, count in extents_of(ctx, ino, ctx.inode_page(ino), fields):
                pages = min(count, -(-fields.size // PAGE) - file_page)
                if pages > 0:
                    spans.append(FileSpan(file_page * PAGE, pages * PAGE, page_offset(page)))
            yield FileSpans(ino, spans)

    def segment_files(self) -> Iterator[SegmentFile]:
        """Yield each file that has a segment and a name, ascending.

        Not one with a pending range: the next mount zeroes that.
        """
        from pkernfs.fs.segment_table import parse  # for those only who have such files

        ctx = self._ctx
        for ino in sorted(ctx.segments.files):
            fields = ctx.fields(ino)
            if fields.nlink and has_segment(fields) and not fields.flags & INODE_FLAG_PENDING:
                number = SegmentNo(fields.body)
                row = parse(number, pack_row(ctx.segments.rows[number]))
                yield SegmentFile(ino, row, fields.size)
