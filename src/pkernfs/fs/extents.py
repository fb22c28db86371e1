"""The extents of files: lookup, allocation, freeing (docs/format.md, section 6).

File pages are offset / 4096. Everything that changes runs inside a transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.alloc.blocks import BlockAllocator
from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import CorruptionError, NoSpaceError
from pkernfs.fs.btree import Tree
from pkernfs.fs.inodes import Inode
from pkernfs.journal import SAFE_PAGES, PageStore
from pkernfs.layout import (
    BLOCK,
    CLASS_DATA,
    INODE_FLAG_BODY,
    INODE_FLAG_TABLE,
    MAX_FILE_BYTES,
    MAX_INLINE_EXTENTS,
    NO_PAGE,
    PAGE,
    PAGES_PER_BLOCK,
    TREE_EXTENTS,
    Extent,
    block_of,
    first_page,
    page_offset,
)
from pkernfs.quantities import BlockNo, PageNo

# A file up to this size lives in 4 KiB pages; a larger one in blocks, so that no file of more
# than 1 MiB wastes more than half of what it holds.
PAGES_UP_TO_BYTES = 1 << 20
LAST_PAGE = MAX_FILE_BYTES // PAGE
_MAX_PAGE_RUN = 256


class FilePages(NamedTuple):
    """``pages`` pages of a file, from ``first`` on, which is offset / 4096."""

    first: int
    pages: int


class ExtentMap:
    """The extents of any inode of one file system."""

    def __init__(self, store: PageStore, blocks: BlockAllocator, pages: PageAllocator) -> None:
        self._store = store
        self._blocks = blocks
        self._pages = pages
        self._is_carved = blocks.is_in_page_granular
        self._total_pages = blocks.total_blocks * PAGES_PER_BLOCK

    def _tree(self, inode: Inode) -> Tree:
        root = inode.body if inode.flags & INODE_FLAG_BODY else NO_PAGE
        return Tree(self._store, self._pages, TREE_EXTENTS, inode.ino, root)

    # ------------------------------------------------------------------ looking up

    def at(self, inode: Inode, file_page: int) -> Extent | None:
        """The last extent that starts at or before a file page."""
        if inode.flags & INODE_FLAG_BODY:
            found = self._tree(inode).extent_at(file_page)
        else:
            found = None
            for extent in inode.extents:  # up to five: a search would cost more
                if extent.file_page > file_page:
                    break
                found = extent
        if found is not None and found.page + found.pages > self._total_pages:
            raise _outside(inode, found)
        return found

    def after(self, inode: Inode, file_page: int) -> Iterator[Extent]:
        """Extents that start at a file page or later."""
        if inode.flags & INODE_FLAG_BODY:
            yield from self._tree(inode).extents(file_page)
        else:
            yield from [e for e in inode.extents if e.file_page >= file_page]

    def within(self, inode: Inode, start: int, end: int) -> Iterator[Extent]:
        """Extents in file pages start..end-1, cut to that range."""
        first = self.at(inode, start)
        if first is not None and first.file_page + first.pages > start:
            skip = start - first.file_page
            yield Extent(start, PageNo(first.page + skip), min(first.pages - skip, end - start))
        for extent in self.after(inode, start + 1):
            if extent.file_page >= end:
                return
            if extent.page + extent.pages > self._total_pages:
                raise _outside(inode, extent)
            left = end - extent.file_page
            yield extent if extent.pages <= left else extent._replace(pages=left)

    def holes(self, inode: Inode, start: int, end: int) -> list[FilePages]:
        """What has no extent in file pages start..end-1."""
        first = self.at(inode, start)
        if first is None:
            if _has_none(inode):
                return [FilePages(start, end - start)] if start < end else []
        elif first.file_page + first.pages >= end:
            return []
        found = []
        for file_page, _page, count in self.within(inode, start, end):
            if file_page > start:
                found.append(FilePages(start, file_page - start))
            start = file_page + count
        if start < end:
            found.append(FilePages(start, end - start))
        return found

    def is_hole(self, inode: Inode, start: int, end: int) -> bool:
        """True if nothing in file pages start..end-1 has an extent."""
        return _has_none(inode) or next(self.within(inode, start, end), None) is None

    def allocation_end(self, inode: Inode, size: int) -> int:
        """End in bytes of the units (blocks or pages) that hold the first ``size`` bytes."""
        if not size:
            return 0
        last = (size - 1) // PAGE
        found = self.at(inode, last)
        mapped = found is not None and found.file_page + found.pages > last
        if found is None or not mapped or self._is_carved(_page_in(found, last)):
            return (last + 1) * PAGE
        return (last // PAGES_PER_BLOCK + 1) * BLOCK

    # ------------------------------------------------------------------ the list itself

    def _insert(self, inode: Inode, extent: Extent) -> None:
        """Add an extent, joined with its neighbours where that is allowed."""
        inode.data_pages += extent.pages
        if _has_none(inode):
            inode.extents = [extent]
            return
        before = self.at(inode, extent.file_page)
        if before is not None and self._joins(before, extent):
            self._delete(inode, before)
            extent = Extent(before.file_page, before.page, before.pages + extent.pages)
        following = next(self.after(inode, extent.file_page + extent.pages), None)
        if following is not None and self._joins(extent, following):
            self._delete(inode, following)
            extent = Extent(extent.file_page, extent.page, extent.pages + following.pages)
        self._add(inode, extent)

    def _joins(self, left: Extent, right: Extent) -> bool:
        return (
            left.file_page + left.pages == right.file_page
            and left.page + left.pages == right.page
            and self._is_carved(left.page) == self._is_carved(right.page)
        )

    def _add(self, inode: Inode, extent: Extent) -> None:
        if not inode.flags & INODE_FLAG_BODY:
            extents = sorted([*inode.extents, extent])
            if len(extents) <= MAX_INLINE_EXTENTS:
                inode.extents = extents
                return
            tree = self._tree(inode)
            for e in extents:
                tree.insert_extent(e)
            inode.extents = []
        else:
            tree = self._tree(inode)
            tree.insert_extent(extent)
        inode.flags |= INODE_FLAG_BODY
        inode.body = tree.root

    def _delete(self, inode: Inode, extent: Extent) -> None:
        if not inode.flags & INODE_FLAG_BODY:
            inode.extents = [e for e in inode.extents if e.file_page != extent.file_page]
            return
        tree = self._tree(inode)
        tree.remove(extent.file_page)
        inode.body = tree.root
        if not tree.root:
            inode.flags &= ~INODE_FLAG_BODY

    # ------------------------------------------------------------------ allocating

    def fill(self, inode: Inode, start: int, end: int, size: int) -> list[Extent]:
        """Give every hole in file pages start..end-1 its memory; all of it reads as zeros.

        ``size`` is what the file's size will be in bytes: it decides between pages and blocks.
        Returns the new extents (which may reach beyond ``end``: blocks are taken whole).

        :raises NoSpaceError: not enough free; the caller gives the transaction up.
        :raises ZeroingNeeded: see :meth:`BlockAllocator.alloc`.
        """
        added: list[Extent] = []
        for hole, count in self.holes(inode, start, end):
            at = hole
            while at < hole + count:
                slots = self._whole_slots(inode, at, hole + count, size)
                if slots and self._fill_blocks(inode, at // PAGES_PER_BLOCK, slots, added):
                    at = (at // PAGES_PER_BLOCK + slots) * PAGES_PER_BLOCK
                    continue
                stop = min(hole + count, (at // PAGES_PER_BLOCK + 1) * PAGES_PER_BLOCK)
                self._fill_pages(inode, at, stop - at, added)
                at = stop
        return added

    def _whole_slots(self, inode: Inode, file_page: int, end: int, size: int) -> int:
        """Count the 2 MiB slots from that of a file page on that are to be whole blocks; 0: pages.

        ``end`` is the first file page that is not wanted.
        """
        slot = file_page // PAGES_PER_BLOCK
        last = -(-end // PAGES_PER_BLOCK)
        if not slot and size <= PAGES_UP_TO_BYTES and not inode.flags & INODE_FLAG_TABLE:
            return 0
        first = slot * PAGES_PER_BLOCK
        # Only the first and the last slot can have something in them already.
        if next(self.within(inode, first, first + PAGES_PER_BLOCK), None) is not None:
            return 0
        if last - slot > 1:
            tail = (last - 1) * PAGES_PER_BLOCK
            if next(self.within(inode, tail, tail + PAGES_PER_BLOCK), None) is not None:
                last -= 1
        return last - slot

    def _fill_blocks(self, inode: Inode, slot: int, count: int, added: list[Extent]) -> bool:
        """Whole blocks for ``count`` slots; False if it has to be the last free pages instead."""
        file_page = slot * PAGES_PER_BLOCK
        goal = None
        before = self.at(inode, file_page)
        if before is not None and before.file_page + before.pages == file_page:
            behind = before.page + before.pages
            if not behind % PAGES_PER_BLOCK:
                goal = BlockNo(behind // PAGES_PER_BLOCK)
        try:
            runs = self._blocks.alloc(count, goal, owner=inode.ino)
        except NoSpaceError:
            if count > 1 or inode.flags & INODE_FLAG_TABLE:
                raise
            return False
        for block, length in runs:
            extent = Extent(file_page, first_page(block), length * PAGES_PER_BLOCK)
            self._insert(inode, extent)
            added.append(extent)
            file_page += extent.pages
        return True

    def _fill_pages(self, inode: Inode, file_page: int, count: int, added: list[Extent]) -> None:
        while count:
            want = min(count, _MAX_PAGE_RUN)
            before = self.at(inode, file_page)
            goal = None
            if before is not None and before.file_page + before.pages == file_page:
                goal = PageNo(before.page + before.pages)
            for first, length in self._pages.alloc(want, CLASS_DATA, goal):
                self._store.region.zero(page_offset(first), length * PAGE)
                extent = Extent(file_page, first, length)
                self._insert(inode, extent)
                added.append(extent)
                file_page += length
                count -= length

    def needs_promotion(self, inode: Inode, size: int) -> bool:
        """True if the file's first slot is in pages but its new ``size`` calls for a block."""
        if size <= PAGES_UP_TO_BYTES or not inode.data_pages:
            return False
        first = next(self.within(inode, 0, PAGES_PER_BLOCK), None)
        return first is not None and self._is_carved(first.page)

    def promote(self, inode: Inode, block: BlockNo) -> None:
        """Let ``block``, which holds a copy of the first slot already, take the pages' place."""
        for extent in list(self.within(inode, 0, PAGES_PER_BLOCK)):
            self._cut(inode, extent)
        self._insert(inode, Extent(0, first_page(block), PAGES_PER_BLOCK))

    def move(self, source: Inode, target: Inode) -> None:
        """Let ``target``, which has no extents, have those of ``source``."""
        extents = list(self.after(source, 0))
        if source.flags & INODE_FLAG_BODY:
            self._tree(source).destroy()
            source.flags &= ~INODE_FLAG_BODY
            source.body = NO_PAGE
        source.extents = []
        for extent in extents:
            self._add(target, extent)
        target.data_pages, source.data_pages = source.data_pages, 0

    # ------------------------------------------------------------------ freeing

    def remove(self, inode: Inode, start: int, end: int) -> int:
        """Free what lies in file pages start..end-1, from the end on: whole units only.

        Returns the file page from which on nothing is left to do: ``start`` when done, more if
        the transaction is full and another one has to go on with ``end`` lowered to that.
        """
        while True:
            found = self.at(inode, end - 1)
            if found is None or found.file_page + found.pages <= start:
                return start
            if self._store.pages_changed >= SAFE_PAGES:
                return min(end, found.file_page + found.pages)
            low = max(found.file_page, start)
            high = min(found.file_page + found.pages, end)
            if not self._is_carved(found.page):
                low = -(-low // PAGES_PER_BLOCK) * PAGES_PER_BLOCK
                high = high // PAGES_PER_BLOCK * PAGES_PER_BLOCK
            if low < high:
                low = self._remove_part(inode, found, low, high)
            end = max(low if low < high else found.file_page, start)
            if end <= start:
                return start

    def _remove_part(self, inode: Inode, extent: Extent, low: int, high: int) -> int:
        """Cut file pages low..high-1 out of one extent; page runs only as far as one block goes.

        Returns where the cut starts.
        """
        page = _page_in(extent, low)
        if self._is_carved(page):
            in_last_block = (page + high - low - 1) % PAGES_PER_BLOCK + 1
            if in_last_block < high - low:
                low = high - in_last_block
                page = _page_in(extent, low)
        whole = high - low == extent.pages
        self._cut(inode, extent if whole else Extent(low, page, high - low), extent)
        return low

    def _cut(self, inode: Inode, part: Extent, whole: Extent | None = None) -> None:
        """Free ``part`` of the extent ``whole`` and put back what is left on both sides."""
        if whole is None:
            whole = self.at(inode, part.file_page)
            assert whole is not None
        self._delete(inode, whole)
        end = part.file_page + part.pages
        left = part.file_page - whole.file_page
        right = whole.file_page + whole.pages - end
        if left:
            self._add(inode, whole._replace(pages=left))
        if right:
            self._add(inode, Extent(end, PageNo(part.page + part.pages), right))
        inode.data_pages -= part.pages
        self._free(part.page, part.pages)

    def _free(self, page: PageNo, count: int) -> None:
        if not self._is_carved(page):
            self._blocks.free(block_of(page), count // PAGES_PER_BLOCK)
            return
        while True:
            length = min(count, PAGES_PER_BLOCK - page % PAGES_PER_BLOCK)
            self._pages.free(page, length)
            count -= length
            if not count:
                return
            page = PageNo(page + length)


def _has_none(inode: Inode) -> bool:
    return not inode.extents and not inode.flags & INODE_FLAG_BODY


def _page_in(extent: Extent, file_page: int) -> PageNo:
    """Where a file page of an extent is."""
    return PageNo(extent.page + file_page - extent.file_page)


def _outside(inode: Inode, extent: Extent) -> CorruptionError:
    return CorruptionError(
        f"inode {inode.ino} at page {extent.file_page}: extent out of the region: "
        f"got {extent.page}+{extent.pages}"
    )
