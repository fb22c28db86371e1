"""Changes of dom-N: what is mapped there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.dma.open_tables import OpenTables
from pkernfs.dma.root_pgtables import RootPgtables
from pkernfs.dma.unit_notices import UnitNotices
from pkernfs.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoSpaceError,
    NoTablePagesError,
    NotFoundError,
    PermissionDeniedError,
    PkernfsError,
)
from pkernfs.fs.file import FALLOC_KEEP_SIZE
from pkernfs.host.bars import Bar
from pkernfs.host.iomem import Span
from pkernfs.iommu.config import forget_bar, record_bar
from pkernfs.iommu.page_pool import Mapping
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import INODE_FLAG_SEGMENT, INODE_FLAG_TABLE, PAGE
from pkernfs.pool.pieces import part
from pkernfs.pool.pool import Segment
from pkernfs.quantities import Ino, Iova, PhysAddr
from pkernfs.vtd.entries import INTERRUPT_FIRST, INTERRUPT_LAST, in_interrupt_range

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem


class FilePiece(NamedTuple):
    """Memory of a file: the offset in it, the physical address, bytes."""

    offset: int
    physical: PhysAddr
    length: int


class Domains:
    """Maps and unmaps in the domains of one mounted file system.

    Each change runs to its end without giving way, through
    :meth:`pkernfs.journal.PageStore.commit_words`.
    """

    def __init__(
        self, fs: FileSystem, tables: OpenTables, units: UnitNotices, root: RootPgtables
    ) -> None:
        self._fs = fs
        self._tables = tables
        self._units = units
        self._root = root

    # ------------------------------------------------------------------ files

    def map_file(
        self, number: int, iova: Iova, ino: Ino, offset: int, length: int | None, perm: int
    ) -> int:
        """Map a range of a file; holes of it are allocated and zeroed. Returns the bytes.

        :param length: bytes; None: to the end of the file.
        :raises ExistsError: something of the range of addresses is mapped otherwise.
        :raises NoTablePagesError: the domain file must grow; it is as it was.
        :raises InvalidError: addresses for interrupts are among them.
        :raises ZeroingNeeded: see :meth:`FileSystem.fallocate`.
        """
        self._tables.check_writable()
        table = self._tables.domain(number)
        length = self._check_file_range(ino, offset, length)
        table.check_perm(perm)
        table.check_range(iova, length)
        _check_no_interrupts(iova, length)
        self._units.check_domain(number)
        self._root.have()
        if self._has_hole(ino, offset, length):
            self._check_overlap(table, iova, ino, offset, length, perm)
            self._fs.fallocate(ino, FALLOC_KEEP_SIZE, offset, length)
            self._check_file_range(ino, offset, length)  # it may have got a segment just now
        pieces = [Span(at, count) for _low, at, count in self.file_pieces(ino, offset, length)]
        self._map_pieces(number, iova, pieces, perm)
        return length

    def _check_file_range(self, ino: Ino, offset: int, length: int | None) -> int:
        inode = self._fs.inode(ino)
        if not inode.is_reg:
            raise InvalidError("not a regular file")
        if inode.flags & INODE_FLAG_TABLE:
            raise PermissionDeniedError("a table file cannot be mapped")
        if not inode.nlink:
            raise NotFoundError("the file was removed")
        if ino in self._fs.conversions.under_way:
            raise BusyError(f"inode {ino}: it gets a segment, or loses it: try again")
        if length is None:
            length = max(inode.size - offset, 0)
        if offset < 0 or offset > inode.size or offset + length > inode.size:
            raise InvalidError(
                f"offset {offset:#x}: beyond the end of the file: "
                f"got {length:#x} bytes, expected an end up to {inode.size:#x}"
            )
        if length == 0:
            raise InvalidError("bad length: got 0, expected more")
        if offset % PAGE:
            raise InvalidError(f"offset {offset:#x}: unaligned: expected a multiple of {PAGE:#x}")
        if length % PAGE:
            raise InvalidError(
                f"offset {offset:#x}: bad length: got {length:#x} bytes, expected whole pages"
            )
        if inode.flags & INODE_FLAG_SEGMENT:
            self._check_segment(self._fs.segments.of(inode), offset + length)
        return length

    def _check_segment(self, row: Segment, end: int) -> None:
        """Check that bytes of a segment up to ``end`` are there, and stay where they are.

        :raises InvalidError: they are not, or do not.
        :raises RegionError: it is lost.
        """
        self._fs.segments.check_there(row)
        if not row.pieces:
            raise InvalidError(
                f"segment {row.number}: memory of tmpfs or hugetlbfs has no physical address that "
                "stays: have the VMM map it by VFIO, or pkernfs segment FILE off"
            )
        if end > row.valid:
            raise InvalidError(
                f"segment {row.number}: the file is larger: got an end at {end:#x}, "
                f"expected up to {row.valid:#x}: run fsck.pkernfs"
            )

    def _check_overlap(
        self, table: PageTable, iova: Iova, ino: Ino, offset: int, length: int, perm: int
    ) -> None:
        """Look at a range of addresses before the file gets memory for it.

        :raises ExistsError: something there is mapped, and not just so.
        """
        pieces = list(self.file_pieces(ino, offset, length))
        starts = [low for low, _physical, _count in pieces]
        for m in table.mappings(iova, Iova(iova + length)):
            at: int = max(m.iova, iova)
            end = min(m.iova + m.length, iova + length)
            while at < end:
                in_file = at - iova + offset
                number = bisect_right(starts, in_file) - 1
                low, physical, count = pieces[number] if number >= 0 else (0, 0, 0)
                same = physical + in_file - low == m.physical + at - m.iova and perm == m.perm
                if in_file >= low + count or not same:
                    raise ExistsError(f"iova {at:#x}: already mapped to something else")
                at += low + count - in_file

    def _has_hole(self, ino: Ino, offset: int, length: int) -> bool:
        at = offset
        for low, count, _region_offset in self._fs.pieces(ino, offset, length):
            if low > at:
                return True
            at = low + count
        return at < offset + length

    def file_pieces(self, ino: Ino, offset: int, length: int) -> Iterator[FilePiece]:
        """The memory of a range of a file that is allocated, in order.

        :raises InvalidError: it has no physical address.
        """
        inode, region = self._fs.inode(ino), self._fs.region
        if inode.flags & INODE_FLAG_SEGMENT:
            yield from self._segment_pieces(self._fs.segments.of(inode), offset, length)
            return
        for low, count, at in self._fs.pieces(ino, offset, length):
            for start, run, physical in region.physical_runs(at, count):
                if physical is None:
                    raise InvalidError(f"{region.name}: no physical address at {at:#x}")
                yield FilePiece(low + start - at, physical, run)

    def _segment_pieces(self, row: Segment, offset: int, length: int) -> Iterator[FilePiece]:
        for span in part(row.pieces, offset, min(offset + length, row.valid)):
            yield FilePiece(offset, span.start, span.size)
            offset += span.size

    # ------------------------------------------------------------------ BARs

    def map_bar(
        self, number: int, iova: Iova, bar: Bar, offset: int, length: int | None, perm: int
    ) -> int:
        """Map a range of a device's BAR. Returns the bytes.

        :raises InvalidError: beyond the BAR, or unaligned.
        :raises ExistsError, NoTablePagesError: as :meth:`map_file`.
        """
        self._tables.check_writable()
        table = self._tables.domain(number)
        length = bar.length - offset if length is None else length
        if offset < 0 or offset + length > bar.length:
            raise InvalidError(
                f"{bar.name}: offset {offset:#x}: beyond its end: got {length:#x} bytes, "
                f"expected an end up to {bar.length:#x}"
            )
        table.check_perm(perm)
        table.check_range(iova, length)
        _check_no_interrupts(iova, length)
        if offset % PAGE:
            raise InvalidError(
                f"{bar.name}: offset {offset:#x}: unaligned: expected a multiple of {PAGE:#x}"
            )
        self._units.check_domain(number)
        self._record_bar(self._root.have(), bar)
        try:
            self._map_pieces(number, iova, [Span(PhysAddr(bar.start + offset), length)], perm)
        except PkernfsError:
            self._forget_bars()
            raise
        return length

    def _record_bar(self, root: RootTables, bar: Bar) -> None:
        try:
            record_bar(root.memory, self._fs.store.commit_words, bar)
        except NoSpaceError:  # some may be of domains that were removed
            self._forget_bars()
            record_bar(root.memory, self._fs.store.commit_words, bar)

    def _forget_bars(self) -> None:
        """Drop the records of BARs that nothing maps any more."""
        for bar in self._tables.bars():
            if all(tree.find([bar.range]) is None for tree in self._tables.trees.values()):
                forget_bar(self._tables.need_root().memory, self._fs.store.commit_words, bar)

    # ------------------------------------------------------------------ anything

    def replace(
        self, number: int, wanted: Sequence[Mapping], bars: Sequence[Bar], largest: int
    ) -> None:
        """Have dom-N map ``wanted``, which is of live files and of ``bars``, and nothing else.

        :raises InvalidError, NoTablePagesError: see :meth:`PageTable.replace`; it is as it was.
        """
        self._tables.check_writable()
        self._units.check_domain(number)
        for m in wanted:
            _check_no_interrupts(m.iova, m.length)
        root = self._root.have()
        try:
            for bar in bars:
                self._record_bar(root, bar)
            self._tables.domain(number).replace(wanted, largest)
        except NoTablePagesError as e:
            raise NoTablePagesError(f"dom-{number}", e.missing) from None
        finally:
            self._tables.generation += 1
            self._forget_bars()
        self._units.mapped(number)

    def _map_pieces(self, number: int, iova: Iova, pieces: list[Span], perm: int) -> None:
        table = self._tables.domain(number)
        try:
            table.map_pieces(iova, pieces, perm)
        except NoTablePagesError as e:
            raise NoTablePagesError(f"dom-{number}", e.missing) from None
        self._tables.generation += 1
        self._units.mapped(number)

    def unmap(self, number: int, iova: Iova, length: int) -> int:
        """Unmap all that is mapped there; returns how many bytes were.

        :raises NotFoundError: nothing is.
        """
        self._tables.check_writable()
        table = self._tables.domain(number)
        table.check_range(iova, length)
        self._units.check_domain(number)
        try:
            done = table.unmap(iova, length)
        except NoTablePagesError as e:
            raise NoTablePagesError(f"dom-{number}", e.missing) from None
        self._units.mapped(number)
        if not done:
            raise NotFoundError(f"iova {iova:#x}: nothing is mapped there: got {length:#x} bytes")
        self._tables.generation += 1
        self._forget_bars()
        return done


def _check_no_interrupts(iova: Iova, length: int) -> None:
    """:raises InvalidError: some of these addresses are for interrupts: nothing translates them."""
    if in_interrupt_range(iova, length):
        raise InvalidError(
            f"iova {iova:#x}: a unit takes requests to {INTERRUPT_FIRST:#x}-{INTERRUPT_LAST:#x} "
            f"for interrupts, and translates none: got {length:#x} bytes, expected an end up to "
            f"{INTERRUPT_FIRST:#x}, or a start from {INTERRUPT_LAST + 1:#x} on"
        )
