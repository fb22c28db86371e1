"""The extents of files: lookup, allocation, freeing (docs/format.md, section 6).

Page numbers are file pages (offset / 4096) or region pages. Everything that changes runs inside a
transaction.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from pkernfs.alloc.blocks import BlockAllocator
from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import CorruptionError, NoSpaceError
from pkernfs.fs.btree import Tree
from pkernfs.fs.inodes import Extent, Inode
from pkernfs.journal import SAFE_PAGES, PageStore
from pkernfs.layout import (
    BLOCK,
    CLASS_DATA,
    INODE_FLAG_BODY,
    INODE_FLAG_TABLE,
    MAX_FILE_BYTES,
    MAX_INLINE_EXTENTS,
    PAGE,
    PAGES_PER_BLOCK,
    TREE_EXTENTS,
)

# A file up to this size lives in 4 KiB pages; a larger one in blocks, so that no file of more
# than 1 MiB wastes more than half of what it holds.
PAGES_UP_TO_BYTES = 1 << 20
LAST_PAGE = MAX_FILE_BYTES // PAGE
_MAX_PAGE_RUN = 256


class ExtentMap:
    """The extents of any inode of one file system."""

    def __init__(self, store: PageStore, blocks: BlockAllocator, pages: PageAllocator) -> None:
        self._store = store
        self._blocks = blocks
        self._pages = pages
        self._total_pages = blocks.total_blocks * PAGES_PER_BLOCK

    def _tree(self, inode: Inode) -> Tree:
        root = inode.body if inode.flags & INODE_FLAG_BODY else 0
        return Tree(self._store, self._pages, TREE_EXTENTS, inode.ino, root)

    # ------------------------------------------------------------------ looking up

    def at(self, inode: Inode, page: int) -> Extent | None:
        """The last extent that starts at or before file page ``page``."""
        if inode.flags & INODE_FLAG_BODY:
            found = self._tree(inode).extent_at(page)
        else:
            extents = inode.extents
            slot = bisect_right(extents, page, key=_start) - 1
            found = extents[slot] if slot >= 0 else None
        if found is not None and found[1] + found[2] > self._total_pages:
            raise CorruptionError(
                f"inode {inode.ino} at page {found[0]}: extent out of the region: "
                f"got {found[1]}+{found[2]}"
            )
        return found

    def after(self, inode: Inode, page: int) -> Iterator[Extent]:
        """Extents that start at file page ``page`` or later."""
        if inode.flags & INODE_FLAG_BODY:
            yield from self._tree(inode).extents(page)
        else:
            yield from [e for e in inode.extents if e[0] >= page]

    def within(self, inode: Inode, start: int, end: int) -> Iterator[Extent]:
        """Extents in file pages start..end-1, cut to that range."""
        first = self.at(inode, start)
        if first is not None and first[0] + first[2] > start:
            skip = start - first[0]
            yield start, first[1] + skip, min(first[2] - skip, end - start)
        for file_page, page, count in self.after(inode, start + 1):
            if file_page >= end:
                return
            if page + count > self._total_pages:
                raise CorruptionError(
                    f"inode {inode.ino} at page {file_page}: extent out of the region: "
                    f"got {page}+{count}"
                )
            yield file_page, page, min(count, end - file_page)

    def holes(self, inode: Inode, start: int, end: int) -> list[tuple[int, int]]:
        """``(file page, pages)`` of what has no extent in file pages start..end-1."""
        found = []
        for file_page, _page, count in self.within(inode, start, end):
            if file_page > start:
                found.append((start, file_page - start))
            start = file_page + count
        if start < end:
            found.append((start, end - start))
        return found

    def allocation_end(self, inode: Inode, size: int) -> int:
        """End in bytes of the units (blocks or pages) that hold the first ``size`` bytes."""
        if not size:
            return 0
        page = (size - 1) // PAGE
        found = self.at(inode, page)
        mapped = found is not None and found[0] + found[2] > page
        if found is None or not mapped or self._is_carved(found[1] + page - found[0]):
            return (page + 1) * PAGE
        return (page // PAGES_PER_BLOCK + 1) * BLOCK

    def _is_carved(self, page: int) -> bool:
        return self._blocks.is_page_granular(page // PAGES_PER_BLOCK)

    # ------------------------------------------------------------------ the list itself

    def _insert(self, inode: Inode, file_page: int, page: int, count: int) -> None:
        """Add an extent, joined with its neighbours where that is allowed."""
        inode.data_pages += count
        before = self.at(inode, file_page)
        if before is not None and self._joins(before, (file_page, page, count)):
            self._delete(inode, before)
            file_page, page, count = before[0], before[1], before[2] + count
        following = next(self.after(inode, file_page + count), None)
        if following is not None and self._joins((file_page, page, count), following):
            self._delete(inode, following)
            count += following[2]
        self._add(inode, (file_page, page, count))

    def _joins(self, left: Extent, right: Extent) -> bool:
        return (
            left[0] + left[2] == right[0]
            and left[1] + left[2] == right[1]
            and self._is_carved(left[1]) == self._is_carved(right[1])
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
            inode.extents = [e for e in inode.extents if e[0] != extent[0]]
            return
        tree = self._tree(inode)
        tree.remove(extent[0])
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

    def _whole_slots(self, inode: Inode, page: int, end: int, size: int) -> int:
        """Count the 2 MiB slots from that of ``page`` on that are to be whole blocks; 0: pages."""
        slot = page // PAGES_PER_BLOCK
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
        first = slot * PAGES_PER_BLOCK
        goal = None
        before = self.at(inode, first)
        if before is not None and before[0] + before[2] == first:
            goal, rest = divmod(before[1] + before[2], PAGES_PER_BLOCK)
            if rest:
                goal = None
        try:
            runs = self._blocks.alloc(count, goal, owner=inode.ino)
        except NoSpaceError:
            if count > 1 or inode.flags & INODE_FLAG_TABLE:
                raise
            return False
        for block, length in runs:
            extent = (first, block * PAGES_PER_BLOCK, length * PAGES_PER_BLOCK)
            self._insert(inode, *extent)
            added.append(extent)
            first += extent[2]
        return True

    def _fill_pages(self, inode: Inode, page: int, count: int, added: list[Extent]) -> None:
        while count:
            want = min(count, _MAX_PAGE_RUN)
            before = self.at(inode, page)
            goal = None
            if before is not None and before[0] + before[2] == page:
                goal = before[1] + before[2]
            for first, length in self._pages.alloc(want, CLASS_DATA, goal):
                self._store.region.zero(first * PAGE, length * PAGE)
                self._insert(inode, page, first, length)
                added.append((page, first, length))
                page += length
                count -= length

    def needs_promotion(self, inode: Inode, size: int) -> bool:
        """True if the file's first slot is in pages but its new ``size`` calls for a block."""
        if size <= PAGES_UP_TO_BYTES or not inode.data_pages:
            return False
        first = next(self.within(inode, 0, PAGES_PER_BLOCK), None)
        return first is not None and self._is_carved(first[1])

    def promote(self, inode: Inode, block: int) -> None:
        """Let ``block``, which holds a copy of the first slot already, take the pages' place."""
        for extent in list(self.within(inode, 0, PAGES_PER_BLOCK)):
            self._cut(inode, extent)
        self._insert(inode, 0, block * PAGES_PER_BLOCK, PAGES_PER_BLOCK)

    # ------------------------------------------------------------------ freeing

    def remove(self, inode: Inode, start: int, end: int) -> int:
        """Free what lies in file pages start..end-1, from the end on: whole units only.

        Returns the file page from which on nothing is left to do: ``start`` when done, more if
        the transaction is full and another one has to go on with ``end`` lowered to that.
        """
        while True:
            found = self.at(inode, end - 1)
            if found is None or found[0] + found[2] <= start:
                return start
            if self._store.pages_changed >= SAFE_PAGES:
                return min(end, found[0] + found[2])
            low = max(found[0], start)
            high = min(found[0] + found[2], end)
            if not self._is_carved(found[1]):
                low = -(-low // PAGES_PER_BLOCK) * PAGES_PER_BLOCK
                high = high // PAGES_PER_BLOCK * PAGES_PER_BLOCK
            if low < high:
                low = self._remove_part(inode, found, low, high)
            end = max(low if low < high else found[0], start)
            if end <= start:
                return start

    def _remove_part(self, inode: Inode, extent: Extent, low: int, high: int) -> int:
        """Cut file pages low..high-1 out of one extent; page runs only as far as one block goes.

        Returns where the cut starts.
        """
        page = extent[1] + low - extent[0]
        if self._is_carved(page):
            last = extent[1] + high - extent[0] - 1
            block_start = last // PAGES_PER_BLOCK * PAGES_PER_BLOCK
            low = max(low, high - (last + 1 - block_start))
            page = extent[1] + low - extent[0]
        self._cut(inode, (low, page, high - low), extent)
        return low

    def _cut(self, inode: Inode, part: Extent, whole: Extent | None = None) -> None:
        """Free ``part`` of the extent ``whole`` and put back what is left on both sides."""
        if whole is None:
            whole = self.at(inode, part[0])
            assert whole is not None
        self._delete(inode, whole)
        left = part[0] - whole[0]
        right = whole[0] + whole[2] - part[0] - part[2]
        if left:
            self._add(inode, (whole[0], whole[1], left))
        if right:
            self._add(inode, (part[0] + part[2], part[1] + part[2], right))
        inode.data_pages -= part[2]
        self._free(part[1], part[2])

    def _free(self, page: int, count: int) -> None:
        if not self._is_carved(page):
            self._blocks.free(page // PAGES_PER_BLOCK, count // PAGES_PER_BLOCK)
            return
        while count:
            length = min(count, PAGES_PER_BLOCK - page % PAGES_PER_BLOCK)
            self._pages.free(page, length)
            page += length
            count -= length


def _start(extent: Extent) -> int:
    return extent[0]
