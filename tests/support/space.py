"""The allocators of a fresh file system, each call a transaction of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pkernfs.alloc import bitmap
from pkernfs.alloc.blocks import BlockAllocator, IsolatedBlocks, MapRange
from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import ZeroingNeeded
from pkernfs.fs import superblock
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.journal import PageStore
from pkernfs.layout import BLOCK, MAGIC_BLOCK_MAP, MAP_BYTES, PAGES_PER_BLOCK
from support.checking import MemoryFile

#: The first page-granular block of a small region.
META_BLOCK = 2


class Space:
    """The allocators of a fresh file system."""

    def __init__(self, size: int, phys_base: int | None = None) -> None:
        self.memory = MemoryFile(size)
        self.region = self.memory.open(phys_base=phys_base)
        make_filesystem(self.region)
        self.total = size // BLOCK
        self.load()

    def load(self) -> None:
        """From what the region says, and nothing else."""
        sb = superblock.load(self.region)
        base = self.region.phys_base
        self.store = PageStore(
            self.region,
            sb.uuid,
            sb.fields.journal_page,
            sb.fields.journal_pages,
            sb.total_blocks * PAGES_PER_BLOCK,
        )
        self.store.recover()
        self.blocks = BlockAllocator(
            self.store,
            [
                MapRange(
                    first_block=r.first_block,
                    blocks=r.blocks,
                    map_page=r.map_page,
                    phys_base=None if base is None else base + r.first_block * BLOCK,
                )
                for r in sb.ranges
            ],
        )
        self.pages = PageAllocator(self.store, self.blocks)

    def close(self) -> None:
        self.region.close()
        self.memory.close()

    def alloc(self, count: int, goal: int | None = None, owner: int | None = None) -> list[int]:
        """One transaction; the blocks, in order of use."""
        while True:
            try:
                with self.store:
                    runs = self.blocks.alloc(count, goal, owner=owner)
                return [b for first, n in runs for b in range(first, first + n)]
            except ZeroingNeeded as e:
                self.zero(self.blocks.isolate(e.blocks))

    def zero(self, isolated: IsolatedBlocks) -> None:
        for offset, length in isolated.pieces():
            self.region.zero(offset, length)
        with self.store:
            self.blocks.finish_zeroing(isolated)

    def free(self, first: int, count: int) -> None:
        with self.store:
            self.blocks.free(first, count)

    def bits(self, offset: int) -> set[int]:
        """A bitmap of the block map, as it is in the region (small regions: one page)."""
        page = self.store.read(2, MAGIC_BLOCK_MAP)
        return {
            b for b, bit in enumerate(bitmap.expand(page[offset:][:MAP_BYTES], self.total)) if bit
        }


@contextmanager
def space(size: int, phys_base: int | None = None) -> Iterator[Space]:
    made = Space(size, phys_base)
    try:
        yield made
    finally:
        made.close()
