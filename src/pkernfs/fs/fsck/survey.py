"""The outcome of a check, as a handover needs it: every metadata page and every file's data."""

from __future__ import annotations

from collections.abc import Iterator

from pkernfs.fs.fsck.context import Context
from pkernfs.fs.fsck.data import extents_of
from pkernfs.fs.fsck.problems import Report
from pkernfs.fs.fsck.structures import T_REG
from pkernfs.layout import (
    BACKUP_PAGE,
    INODE_FLAG_TABLE,
    PAGE,
    PAGES_PER_BLOCK,
    SUPERBLOCK_PAGE,
)


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

    def metadata_pages(self) -> list[int]:
        """List every metadata page in use but the state page and the journal, ascending."""
        ctx = self._ctx
        pages = [SUPERBLOCK_PAGE, BACKUP_PAGE, *(m.page for m in ctx.sb.map_pages())]
        for block, mask in ctx.claims.meta.items():
            first = block * PAGES_PER_BLOCK
            while mask:
                pages.append(first + (mask & -mask).bit_length() - 1)
                mask &= mask - 1
        return sorted(pages)

    def files(self) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """Yield inode number and extents of each regular file that has a name, but for tables.

        Tables are proved right by their own check, and a unit may set bits in them meanwhile.

        Extents are ``(file offset, length, region offset)`` in bytes, up to the file's last page.
        """
        ctx = self._ctx
        for ino in ctx.inodes.of_type(T_REG):
            fields = ctx.fields(ino)
            if not fields.nlink or fields.flags & INODE_FLAG_TABLE:
                continue
            spans = []
            for file_page, page, count in extents_of(ctx, ino, ctx.inode_page(ino), fields):
                pages = min(count, -(-fields.size // PAGE) - file_page)
                if pages > 0:
                    spans.append((file_page * PAGE, pages * PAGE, page * PAGE))
            yield ino, spans
