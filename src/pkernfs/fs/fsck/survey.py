"""The outcome of a check, as a handover needs it: every metadata page and every file's data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress
from typing import NamedTuple

from pkernfs.alloc.bitmap import expand
from pkernfs.fs.fsck.context import Context
from pkernfs.fs.fsck.data import extents_of
from pkernfs.fs.fsck.problems import Report
from pkernfs.fs.fsck.structures import T_REG
from pkernfs.layout import (
    BACKUP_PAGE,
    INODE_FLAG_TABLE,
    PAGE,
    PAGE_MAP_USED_BYTES,
    PAGES_PER_BLOCK,
    SUPERBLOCK_PAGE,
    first_page,
    page_offset,
)
from pkernfs.quantities import FileSpan, Ino, PageNo, pages_from


class FileSpans(NamedTuple):
    """What a file has memory for, up to its last page, ascending."""

    ino: Ino
    spans: list[FileSpan]


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
        """Yield where the data of each regular file is that has a name, but for tables.

        Tables are proved right by their own check, and a unit may set bits in them meanwhile.
        """
        ctx = self._ctx
        for ino in ctx.inodes.of_type(T_REG):
            fields = ctx.fields(ino)
            if not fields.nlink or fields.flags & INODE_FLAG_TABLE:
                continue
            spans: list[FileSpan] = []
            for file_page, page, count in extents_of(ctx, ino, ctx.inode_page(ino), fields):
                pages = min(count, -(-fields.size // PAGE) - file_page)
                if pages > 0:
                    spans.append(FileSpan(file_page * PAGE, pages * PAGE, page_offset(page)))
            yield FileSpans(ino, spans)
