"""Data and sizes of regular files: reading, writing, allocating, truncating, punching, seeking."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from pkernfs.errors import (
    BusyError,
    InvalidError,
    IsDirError,
    NoSpaceError,
    NoSuchAddressError,
    NotSupportedError,
    PermissionDeniedError,
    PkernfsError,
    TooBigError,
    ZeroingNeeded,
)
from pkernfs.fs.extents import LAST_PAGE, ExtentMap, FilePages
from pkernfs.fs.inodes import Inode, clear_set_id
from pkernfs.fs.pins import PinGuard
from pkernfs.fs.segments import Segments
from pkernfs.fs.super import Access, Super
from pkernfs.journal import TransactionTooLarge
from pkernfs.layout import (
    BLOCK,
    INODE_FLAG_NATIVE,
    INODE_FLAG_PENDING,
    INODE_FLAG_SEGMENT,
    INODE_FLAG_TABLE,
    MAX_FILE_BYTES,
    PAGE,
    PAGES_PER_BLOCK,
    PENDING_TO_END,
    page_offset,
)
from pkernfs.quantities import FileSpan, Ino, RegionOff
from pkernfs.region.region import Region

FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_ZERO_RANGE = 16

_TYPE, _REGULAR = 0o170000, stat.S_IFREG
_WRITABLE = Access.WRITABLE
_DAY_NS = 86400 * 10**9
_ZERO_STEP_BYTES = 4 << 20


class Files:
    """The bytes of the regular files of one file system."""

    def __init__(
        self, state: Super, extents: ExtentMap, segments: Segments, pins: PinGuard
    ) -> None:
        self._super = state
        self._segments = segments
        self._region = state.region
        self._store = state.store
        self._blocks = state.blocks
        self._inodes = state.inodes
        self._map = extents
        self._pins = pins

    # ------------------------------------------------------------------ data

    def read(self, ino: Ino, offset: int, length: int) -> bytes | memoryview:
        """Up to ``length`` bytes; fewer at the end of the file, zeros in holes.

        A view of the region itself if one extent has it all: good until the next operation.
        """
        inode = self._inodes.get(ino)
        if inode.mode & _TYPE != _REGULAR:  # is_reg, but for the call: each read asks
            raise IsDirError(f"inode {ino}: not a regular file")
        length = min(length, inode.size - offset)
        if length <= 0:
            return b""
        if self._super.access is _WRITABLE:
            self._update_atime(inode)
        pending = inode.flags & INODE_FLAG_PENDING
        if inode.flags & INODE_FLAG_SEGMENT and not pending:
            return self._segments.read(inode, offset, length)
        found = self._map.at(inode, offset // PAGE)
        if found is not None and not pending:
            file_page, page, count = found
            if (file_page + count) * PAGE >= offset + length:
                at = RegionOff((page - file_page) * PAGE + offset)
                return self._region.view(at, length)
        data = bytearray(length)
        memory = self._memory(inode)
        for low, count, at in self._pieces(inode, offset, offset + length):
            memory.copy_out(at, memoryview(data)[low - offset : low - offset + count])
        if pending:  # a read-only mount cannot finish it
            low = max(inode.pending_start - offset, 0)
            high = min(inode.pending_end - offset, length)
            data[low:high] = bytes(max(high - low, 0))
        return bytes(data)

    def _update_atime(self, inode: Inode) -> None:
        """As with relatime: the first read after a change, and once a day."""
        atime = inode.atime
        if atime > inode.mtime and atime > inode.ctime and self._super.clock() - atime < _DAY_NS:
            return
        with self._store:
            self._inodes.touch(inode, content=False)
            inode.atime = self._super.clock()
            self._inodes.save(inode)

    def write(
        self, ino: Ino, offset: int, data: bytes | memoryview, privileged: bool = True
    ) -> int:
        """Write at ``offset``: all of it, or an error and nothing.

        A daemon that stops in between leaves the old size or the new one with all the data; what
        was there before the old end (holes of a file in blocks included) may be old in part.

        :raises NoSpaceError: nothing was written.
        :raises PermissionDeniedError: a table file.
        :raises BusyError: it would lengthen a native file.
        """
        self._super.check_writable()
        inode = self._inodes.get(ino)
        if not inode.is_reg:
            raise IsDirError(f"inode {ino}: not a regular file")
        if inode.flags & INODE_FLAG_TABLE:
            raise PermissionDeniedError("a table file: changed by `pkernfs iommu` only")
        if not data:
            return 0
        end = offset + len(data)
        if offset < 0 or end > MAX_FILE_BYTES - BLOCK:
            raise TooBigError(f"offset {offset}: beyond the largest file")
        first, last = offset // PAGE, -(-end // PAGE)
        size = max(end, inode.size)
        if inode.flags & INODE_FLAG_SEGMENT:
            if end > inode.size:
                _check_not_native(inode)
            self.finish_earlier(inode)
            self._segments.grow(inode, end)
        elif self._map.holes(inode, first, last):
            self._promote(inode, size)
            if size > BLOCK // 2 or last - first > PAGES_PER_BLOCK // 2:
                self._fill(inode, first, last, size)
        memory = self._memory(inode)
        marked = self._mark_tail(inode, max(inode.size, offset), end)
        try:
            with self._store:
                self._inodes.touch(inode)
                # New pages are not reachable before the commit: so the data is there with them.
                if memory is self._region and self._map.fill(inode, first, last, size):
                    self._super.leave_reserve()
                for low, count, at in self._pieces(inode, offset, end):
                    memory.copy_in(at, memoryview(data)[low - offset : low - offset + count])
                inode.size = size
                inode.mtime = inode.ctime = self._super.clock()
                if not privileged:
                    clear_set_id(inode)
                if marked:
                    self._clear_pending(inode)
                self._inodes.save(inode)
        except PkernfsError:
            if marked:
                self._take_back(inode)
            raise
        return len(data)

    def _mark_tail(self, inode: Inode, start: int, end: int) -> bool:
        """Before data goes into memory that the file has beyond its end: let a mount zero it.

        Without that, what a write that was cut has stored there would come to light when the
        file grows. False if there is no such memory, or if the data stays before the end.
        """
        if start >= end:
            return False
        if not inode.flags & INODE_FLAG_SEGMENT and self._map.is_hole(
            inode, start // PAGE, -(-end // PAGE)
        ):
            return False
        with self._store:
            self._inodes.touch(inode)
            self._set_pending(inode, start, end)
            self._inodes.save(inode)
        return True

    def _take_back(self, inode: Inode) -> None:
        """Zero what a write that failed has stored beyond the end; it needs no work of a pool."""
        if not inode.flags & INODE_FLAG_SEGMENT:
            self.finish_pending(inode)
            return
        self._zero_mapped(inode, inode.pending_start, inode.pending_end)
        self._end_pending(inode)

    # ------------------------------------------------------------------ sizes

    def check_resize(self, inode: Inode, size: int) -> None:
        """:raises PkernfsError: a file cannot have that size, or not now: why."""
        if inode.is_dir:
            raise IsDirError(f"inode {inode.ino}: is a directory")
        if not inode.is_reg:
            raise InvalidError(f"inode {inode.ino}: not a regular file")
        if size < 0:
            raise InvalidError("negative size")
        if size > MAX_FILE_BYTES - BLOCK:
            raise TooBigError(f"size {size}: expected at most {MAX_FILE_BYTES - BLOCK}")
        capacity = self._segments.capacity()
        if size - inode.size > capacity:  # however much is freed
            raise TooBigError(f"size {size}: the file system holds {capacity} bytes")
        if inode.flags & INODE_FLAG_TABLE and (size < inode.size or size % BLOCK):
            raise PermissionDeniedError("a table file only grows, in steps of 2 MiB")
        if size != inode.size:
            _check_not_native(inode)

    def grow(self, inode: Inode, size: int) -> None:
        """Allocate what a larger size needs, in transactions of its own.

        Each of them leaves the file as it was: what is allocated beyond the old size reads as
        zeros, and is not seen until the size follows.
        """
        self._allocate(inode, inode.size, size, size, appends=False)

    def _allocate(self, inode: Inode, start: int, end: int, size: int, *, appends: bool) -> None:
        """Give bytes start..end-1 their memory; a file that gets enough of it gets a segment.

        :param appends: the file is lengthened piece by piece, as by a database
        """
        if self._segments.is_wanted(inode, end, appends=appends) and not self._is_pinned(inode):
            self._segments.give(inode, end)
        elif inode.flags & INODE_FLAG_SEGMENT:
            self._segments.grow(inode, end)
        else:
            self._promote(inode, size)
            self._fill(inode, start // PAGE, -(-end // PAGE), size)

    def _is_pinned(self, inode: Inode) -> bool:
        """Tell if a device would go on using a file's pages when they are free."""
        return self._pins.holder_of(inode, 0, LAST_PAGE + 1) is not None

    def _fill(self, inode: Inode, start: int, end: int, size: int) -> None:
        """Allocate file pages start..end-1 in as few transactions as they fit; or nothing."""
        added: list[FilePages] = []
        todo = [(start, end)]
        try:
            while todo:
                low, high = todo.pop()
                try:
                    self._fill_once(inode, low, high, size, added)
                except TransactionTooLarge:
                    middle = (low + high) // 2 // PAGES_PER_BLOCK * PAGES_PER_BLOCK
                    if not low < middle < high:
                        raise
                    todo += [(middle, high), (low, middle)]
        except (NoSpaceError, ZeroingNeeded):
            for file_page, count in added:
                self._remove_range(inode, file_page, file_page + count)
            raise

    def _fill_once(
        self, inode: Inode, start: int, end: int, size: int, added: list[FilePages]
    ) -> None:
        with self._store:
            self._inodes.touch(inode)
            new = self._map.fill(inode, start, end, size)
            if inode.flags & INODE_FLAG_TABLE:  # what is stored in tables cannot be refused
                for extent in new:
                    self._region.reserve(page_offset(extent.page), extent.pages * PAGE)
            if new:
                self._inodes.save(inode)
                self._super.leave_reserve()
        added += [FilePages(extent.file_page, extent.pages) for extent in new]

    def _remove_range(self, inode: Inode, start: int, end: int) -> None:
        while end > start:
            with self._store:
                self._inodes.touch(inode)
                end = self._map.remove(inode, start, end)
                self._inodes.save(inode)

    def _promote(self, inode: Inode, size: int) -> None:
        """Move a file that outgrows 4 KiB pages into a block."""
        if not self._map.needs_promotion(inode, size):
            return
        if self._is_pinned(inode):
            return
        try:
            with self._store:
                block = self._blocks.choose(-(-size // BLOCK), inode.ino)
        except NoSpaceError:
            return  # it stays in pages
        try:
            for file_page, page, count in self._map.within(inode, 0, PAGES_PER_BLOCK):
                data = self._region.view(page_offset(page), count * PAGE)
                self._region.copy_in(RegionOff(block * BLOCK + file_page * PAGE), data)
            with self._store:
                self._inodes.touch(inode)
                self._blocks.alloc_chosen(block)
                self._map.promote(inode, block)
                self._inodes.save(inode)
        except PkernfsError:
            self._blocks.free_chosen(block)
            raise

    def set_size(self, inode: Inode, size: int) -> None:
        """Inside a transaction: the new size, and what a smaller one frees."""
        old = inode.size
        inode.size = size
        if size > old or not inode.data_pages:
            return
        if inode.flags & INODE_FLAG_SEGMENT:
            if size < old:
                self._segments.cut(inode, size)
                if size:
                    self._set_pending(inode, size, PENDING_TO_END)
            return
        self._blocks.drop_preallocation(inode.ino)
        kept = self._map.allocation_end(inode, size)
        left = self._map.remove(inode, kept // PAGE, LAST_PAGE + 1)
        if left > kept // PAGE or min(kept, old) > size:
            self._set_pending(inode, size, PENDING_TO_END)

    @staticmethod
    def is_being_cut(inode: Inode, size: int) -> bool:
        """Tell if a file has been cut to ``size`` bytes, but not yet what it held behind them."""
        now = inode.size, inode.pending_start, inode.pending_end
        return bool(inode.flags & INODE_FLAG_PENDING) and now == (size, size, PENDING_TO_END)

    def _set_pending(self, inode: Inode, start: int, end: int) -> None:
        inode.flags |= INODE_FLAG_PENDING
        inode.pending_start = start
        inode.pending_end = end

    @staticmethod
    def _clear_pending(inode: Inode) -> None:
        inode.flags &= ~INODE_FLAG_PENDING
        inode.pending_start = inode.pending_end = 0

    def finish_pending(self, inode: Inode) -> None:
        """Free the whole units of the pending range, zero the rest of it, clear it."""
        if inode.flags & INODE_FLAG_SEGMENT:
            self._segments.finish_pending(inode)
        else:
            self._free_pending(inode)
        self._end_pending(inode)

    def _end_pending(self, inode: Inode) -> None:
        with self._store:
            self._inodes.touch(inode)
            self._clear_pending(inode)
            self._inodes.save(inode)

    def finish_earlier(self, inode: Inode) -> None:
        """Before a file with a segment changes: complete what another operation has under way."""
        if inode.flags & INODE_FLAG_PENDING:
            self.finish_pending(inode)

    def _free_pending(self, inode: Inode) -> None:
        start, end = inode.pending_start, inode.pending_end
        first, last = -(-start // PAGE), min(end // PAGE, LAST_PAGE + 1)
        while last > first:
            with self._store:
                self._inodes.touch(inode)
                last = self._map.remove(inode, first, last)
                self._inodes.save(inode)
        self._zero_mapped(inode, start, end)

    def _zero_mapped(self, inode: Inode, start: int, end: int) -> None:
        """Zero the bytes start..end-1 of a file where it has memory."""
        memory = self._memory(inode)
        for _offset, length, at in self._pieces(inode, start, end):
            memory.zero(at, length)

    # ------------------------------------------------------------------ fallocate

    def fallocate(self, ino: Ino, mode: int, offset: int, length: int) -> None:
        """Allocate, punch or zero a range, as fallocate(2).

        :raises NotSupportedError: another mode.
        :raises BusyError: it would lengthen or punch a native file.
        """
        for _ in self.fallocate_steps(ino, mode, offset, length):
            pass

    def fallocate_steps(self, ino: Ino, mode: int, offset: int, length: int) -> Iterator[None]:
        """:meth:`fallocate` in pieces of less than a millisecond: others may run at each yield."""
        self._super.check_writable()
        inode = self._inodes.get(ino)
        if inode.is_dir or not inode.is_reg:
            raise NotSupportedError(f"inode {ino}: not a regular file")
        if offset < 0 or length <= 0:
            raise InvalidError("bad range")
        if offset + length > MAX_FILE_BYTES - BLOCK:
            raise TooBigError("range beyond the largest file")
        if inode.flags & INODE_FLAG_TABLE:
            raise PermissionDeniedError("a table file: it is sized with truncate")
        if mode & FALLOC_PUNCH_HOLE or offset + length > inode.size:
            _check_not_native(inode)
        if mode == FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE:
            self._punch(inode, offset, offset + length)
        elif mode & ~FALLOC_KEEP_SIZE in (0, FALLOC_ZERO_RANGE):
            self.finish_earlier(inode)
            end = offset + length
            size = max(inode.size, end)
            self._allocate(inode, offset, end, size, appends=offset > 0)
            if mode & FALLOC_ZERO_RANGE:
                yield from self._zero_steps(ino, offset, end)
            self._finish_fallocate(ino, mode, end)
        else:
            raise NotSupportedError(f"fallocate mode {mode:#x}: not supported")

    def _finish_fallocate(self, ino: Ino, mode: int, end: int) -> None:
        inode = self._inodes.get(ino)
        grows = end > inode.size and not mode & FALLOC_KEEP_SIZE
        if grows:  # it may be native meanwhile
            _check_not_native(inode)
        if grows and inode.flags & INODE_FLAG_SEGMENT:  # it may have been cut meanwhile
            self._segments.grow(inode, end)
        with self._store:
            self._inodes.touch(inode)
            inode.ctime = self._super.clock()
            if grows:
                inode.size = end
            if grows or mode & FALLOC_ZERO_RANGE:
                inode.mtime = inode.ctime
            self._inodes.save(inode)

    def _zero_steps(self, ino: Ino, start: int, end: int) -> Iterator[None]:
        while start < end:
            inode = self._inodes.get(ino)
            stop = min(end, start + _ZERO_STEP_BYTES)
            self._zero_mapped(inode, start, min(stop, inode.size))
            start = stop
            if start < end:
                yield
                self._super.check_writable()

    def _punch(self, inode: Inode, start: int, end: int) -> None:
        if start >= inode.size:
            end = max(end, start)
        elif end >= inode.size:
            end = -(-max(end, inode.size) // BLOCK) * BLOCK
        self._pins.check_unpinned(inode, start // PAGE, -(-end // PAGE))
        if inode.flags & INODE_FLAG_SEGMENT:
            is_second_call = (inode.pending_start, inode.pending_end) == (start, end)
            self.finish_earlier(inode)
            if is_second_call:
                return
            self._segments.check_unused(inode, inode.size)
        with self._store:
            self._inodes.touch(inode)
            self._set_pending(inode, start, end)
            inode.mtime = inode.ctime = self._super.clock()
            self._inodes.save(inode)
        self.finish_pending(inode)

    # ------------------------------------------------------------------ where the memory is

    def seek(self, ino: Ino, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; allocated memory counts as data.

        :raises NoSuchAddressError: at or beyond the end, or no more data.
        """
        inode = self._inodes.get(ino)
        if not inode.is_reg:
            raise InvalidError(f"inode {ino}: not a regular file")
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise InvalidError(f"whence {whence}: not supported")
        if offset < 0 or offset >= inode.size:
            raise NoSuchAddressError("beyond the end")
        if inode.flags & INODE_FLAG_SEGMENT:  # memory of its own counts as data
            return offset if whence == os.SEEK_DATA else inode.size
        end = -(-inode.size // PAGE)
        at = offset
        for file_page, _page, count in self._map.within(inode, offset // PAGE, end):
            if file_page * PAGE > at:
                break
            if whence == os.SEEK_DATA:
                return at
            at = (file_page + count) * PAGE
        else:
            if whence == os.SEEK_HOLE:
                return min(at, inode.size)
            raise NoSuchAddressError("no more data")
        return at if whence == os.SEEK_HOLE else file_page * PAGE

    def memory(self, ino: Ino) -> Region:
        """What the offsets of a file's memory are in: its segment, or the region.

        :raises RegionError: the segment is lost.
        """
        return self._memory(self._inodes.get(ino))

    def _memory(self, inode: Inode) -> Region:
        if inode.flags & INODE_FLAG_SEGMENT:
            return self._segments.memory(inode)
        return self._region

    def pieces(self, ino: Ino, offset: int, length: int) -> Iterator[FileSpan]:
        """The memory of a range of a file, in file order; offsets are in :meth:`memory`."""
        return map(FileSpan._make, self._pieces(self._inodes.get(ino), offset, offset + length))

    def extents(self, ino: Ino) -> list[FileSpan]:
        """List the memory of a file, in file order; only what lies before its end.

        Offsets are in :meth:`memory`.

        :raises InvalidError: not a regular file.
        """
        inode = self._inodes.get(ino)
        if not inode.is_reg:
            raise InvalidError(f"inode {ino}: not a regular file")
        if inode.flags & INODE_FLAG_SEGMENT:
            return [FileSpan(0, -(-inode.size // PAGE) * PAGE, RegionOff(0))] if inode.size else []
        return [
            FileSpan(file_page * PAGE, count * PAGE, page_offset(page))
            for file_page, page, count in self._map.within(inode, 0, -(-inode.size // PAGE))
        ]

    def _pieces(self, inode: Inode, start: int, end: int) -> Iterator[tuple[int, int, RegionOff]]:
        """The memory of bytes start..end-1; bare, in the order of :class:`FileSpan`."""
        if end <= start:
            return
        if inode.flags & INODE_FLAG_SEGMENT:
            end = min(end, inode.data_pages * PAGE)
            if start < end:
                yield start, end - start, RegionOff(start)
            return
        for file_page, page, count in self._map.within(inode, start // PAGE, -(-end // PAGE)):
            low = max(start, file_page * PAGE)
            high = min(end, (file_page + count) * PAGE)
            yield low, high - low, RegionOff((page - file_page) * PAGE + low)


def _check_not_native(inode: Inode) -> None:
    """Before a file's segment is cut, lengthened or punched.

    What is mounted over the names of a native file stays what it is. Were the memory behind it
    given back, somebody else's could come to be there.

    :raises BusyError: the file is native.
    """
    if inode.flags & INODE_FLAG_NATIVE:
        raise BusyError(f"inode {inode.ino}: it is native: pkernfs native FILE off")
