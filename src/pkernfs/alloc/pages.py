"""4 KiB pages inside page-granular blocks (*carved* in the format): metadata, data of small files.

Page 0 of each such block is its page map. In memory there is an integer bitmap of free pages for
each block.
"""

from __future__ import annotations

from functools import partial

from pkernfs.alloc import bitmap
from pkernfs.alloc.blocks import BlockAllocator
from pkernfs.errors import CorruptionError, NoSpaceError
from pkernfs.journal import PageStore
from pkernfs.layout import (
    CLASS_META,
    MAGIC_PAGE_MAP,
    NO_INO,
    PAGE_MAP_CLASS_OFFSET,
    PAGE_MAP_USED_BYTES,
    PAGE_MAP_USED_OFFSET,
    PAGES_PER_BLOCK,
    block_of,
    first_page,
)
from pkernfs.quantities import BlockNo, PageNo, PageRun

_ALL = (1 << PAGES_PER_BLOCK) - 1
_ALL_FREE = _ALL & ~1  # but the map itself
_TRIES = 16
_USED = slice(PAGE_MAP_USED_OFFSET, PAGE_MAP_USED_OFFSET + PAGE_MAP_USED_BYTES)


class PageAllocator:
    """Claims and frees pages inside transactions of the page store."""

    def __init__(self, store: PageStore, blocks: BlockAllocator) -> None:
        self._store = store
        self._blocks = blocks
        self._free: dict[BlockNo, int] = {}
        self._class: dict[BlockNo, int] = {}
        # Blocks with a free page, by class; dicts for their order.
        self._partial: dict[int, dict[BlockNo, None]] = {}
        self.free_pages = 0
        for block in blocks.page_granular_blocks():
            page = store.read(first_page(block), MAGIC_PAGE_MAP)
            used = int.from_bytes(page[_USED], "little")
            if not used & 1:
                raise CorruptionError(f"page map of block {block}: the map itself is not in use")
            self._class[block] = page[PAGE_MAP_CLASS_OFFSET]
            self._set_free(block, _ALL & ~used)

    def _set_free(self, block: BlockNo, mask: int) -> None:
        self.free_pages += mask.bit_count() - self._free.get(block, 0).bit_count()
        self._free[block] = mask
        blocks = self._partial.setdefault(self._class[block], {})
        if mask:
            blocks[block] = None
        else:
            blocks.pop(block, None)

    def _drop(self, block: BlockNo) -> None:
        mask = self._free.pop(block, 0)
        self.free_pages -= mask.bit_count()
        self._partial[self._class.pop(block)].pop(block, None)

    # ------------------------------------------------------------------ allocating

    def alloc_one(self, kind: int = CLASS_META) -> PageNo:
        """Allocate one page of class ``kind``; its bytes may be anything.

        :raises NoSpaceError: no page and no block is free.
        """
        for block in self._partial.get(kind, ()):
            mask = self._free[block]
            bit = (mask & -mask).bit_length() - 1
            self._allocate(block, bit, 1)
            return PageNo(block * PAGES_PER_BLOCK + bit)
        return self.alloc(1, kind)[0].first

    def alloc(self, count: int, kind: int, goal: PageNo | None = None) -> list[PageRun]:
        """Allocate ``count`` pages (at most 511) in runs, as few as possible.

        ``goal`` is the page that would be best. The bytes may be anything.

        :raises NoSpaceError: not that many pages and no block are free.
        """
        found = []
        if goal is not None:
            run = self._at_goal(count, goal)
            if run is not None:
                found.append(run)
                count -= run.pages
        if count:
            run = self._in_partial(count, kind) or self._in_new_block(count, kind)
            found += [run] if run else self._anywhere(count, kind)
        return found

    def _at_goal(self, count: int, goal: PageNo) -> PageRun | None:
        block, bit = block_of(goal), goal % PAGES_PER_BLOCK
        mask = self._free.get(block, 0) >> bit
        length = min((~mask & (mask + 1)).bit_length() - 1, count)
        if not length:
            return None
        self._allocate(block, bit, length)
        return PageRun(goal, length)

    def _in_partial(self, count: int, kind: int) -> PageRun | None:
        for tries, block in enumerate(self._partial.get(kind, ())):
            if tries == _TRIES:
                break
            bit = bitmap.find_run(self._free[block], count)
            if bit >= 0:
                self._allocate(block, bit, count)
                return PageRun(PageNo(block * PAGES_PER_BLOCK + bit), count)
        return None

    def _in_new_block(self, count: int, kind: int) -> PageRun | None:
        try:
            block = self._blocks.alloc_page_granular()
        except NoSpaceError:
            return None
        page = self._store.new(first_page(block), MAGIC_PAGE_MAP, NO_INO)
        page[PAGE_MAP_CLASS_OFFSET] = kind
        page[PAGE_MAP_USED_OFFSET] = 1
        self._class[block] = kind
        self._set_free(block, _ALL_FREE)
        self._store.on_abort.append(partial(self._drop, block))
        self._allocate(block, 1, count)
        return PageRun(PageNo(block * PAGES_PER_BLOCK + 1), count)

    def _anywhere(self, count: int, kind: int) -> list[PageRun]:
        """Allocate the last pages of a full region, of any class and in any pieces."""
        if count > self.free_pages:
            raise NoSpaceError(f"no space: {count} pages wanted, {self.free_pages} free")
        found: list[PageRun] = []
        while count:
            block = next(iter(self._partial.get(kind, ())), None)
            if block is None:
                block = max(self._free, key=lambda b: self._free[b].bit_count())
                if kind == CLASS_META:
                    self._set_class(block, kind)
            for bit, length in bitmap.runs(self._free[block]):
                length = min(length, count)
                self._allocate(block, bit, length)
                found.append(PageRun(PageNo(block * PAGES_PER_BLOCK + bit), length))
                count -= length
                if not count:
                    break
        return found

    def _set_class(self, block: BlockNo, kind: int) -> None:
        """Make the block one for metadata: one is kept from being whole again, not many."""
        self._store.on_abort.append(partial(self._move, block, self._class[block]))
        self._move(block, kind)
        image = self._store.edit(first_page(block), MAGIC_PAGE_MAP)
        image[PAGE_MAP_CLASS_OFFSET] = kind

    def _move(self, block: BlockNo, kind: int) -> None:
        self._partial[self._class[block]].pop(block, None)
        self._class[block] = kind
        self._set_free(block, self._free[block])

    def _allocate(self, block: BlockNo, bit: int, count: int) -> None:
        before = self._free[block]
        run = ((1 << count) - 1) << bit
        self._store.on_abort.append(partial(self._restore, block, before))
        self._set_free(block, before & ~run)
        image = self._store.edit(PageNo(block * PAGES_PER_BLOCK), MAGIC_PAGE_MAP)
        used = int.from_bytes(image[_USED], "little") | run
        image[_USED] = used.to_bytes(PAGE_MAP_USED_BYTES, "little")

    def _restore(self, block: BlockNo, mask: int) -> None:
        if block in self._free:
            self._set_free(block, mask)

    # ------------------------------------------------------------------ freeing

    def free(self, first: PageNo, count: int = 1) -> None:
        """Free pages of one block; a block with none left in use is freed with them.

        :raises CorruptionError: not all of them are in use, or one is the page map.
        """
        block, bit = BlockNo(first // PAGES_PER_BLOCK), first % PAGES_PER_BLOCK
        run = ((1 << count) - 1) << bit
        image = self._store.edit(PageNo(first - bit), MAGIC_PAGE_MAP)
        used = int.from_bytes(image[_USED], "little")
        if block not in self._free or used & run != run or bit + count > PAGES_PER_BLOCK or not bit:
            raise CorruptionError(f"page {first}: {count} pages freed that are not all in use")
        used &= ~run
        image[_USED] = used.to_bytes(PAGE_MAP_USED_BYTES, "little")
        self._store.forget(first, count)
        if used == 1 and self._has_other(block):
            self._blocks.free(block, 1)
            self._store.forget(first_page(block))
            before = self._free[block]
            self._set_free(block, 0)
            self._store.on_abort.append(partial(self._restore, block, before))
            self._store.on_commit.append(partial(self._drop, block))
        else:
            self._store.on_commit.append(partial(self._freed, block, run))

    def _has_other(self, block: BlockNo) -> bool:
        """Tell if another block of the class has free pages: the last one is kept."""
        blocks = self._partial.get(self._class[block], {})
        return len(blocks) > (1 if block in blocks else 0)

    def _freed(self, block: BlockNo, run: int) -> None:
        if block in self._free:
            self._set_free(block, self._free[block] | run)
