"""The allocators of a fresh file system, each call a transaction of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pkernfs.alloc import bitmap
from pkernfs.alloc.blocks import BlockAllocator, IsolatedBlocks, MapRange
from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import PkernfsError, ZeroingNeeded
from pkernfs.fs import superblock
from pkernfs.fs.inodes import Inode
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.journal import PageStore
from pkernfs.layout import BLOCK, FIRST_MAP_PAGE, MAGIC_BLOCK_MAP, MAP_BYTES, PAGE, PAGES_PER_BLOCK
from pkernfs.quantities import BlockNo, Ino, PhysAddr
from support.checking import MemoryFile

#: The first page-granular block of a small region.
META_BLOCK = BlockNo(2)


class GiveUp(Exception):
    """Ends a transaction without its changes."""


class Space:
    """The allocators of a fresh file system."""

    def __init__(self, size: int, phys_base: PhysAddr | None = None) -> None:
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
                    phys_base=None if base is None else PhysAddr(base + r.first_block * BLOCK),
                )
                for r in sb.ranges
            ],
        )
        self.pages = PageAllocator(self.store, self.blocks)

    def close(self) -> None:
        self.region.close()
        self.memory.close()

    def alloc(self, count: int, goal: int | None = None, owner: int | None = None) -> list[BlockNo]:
        """One transaction; the blocks, in order of use."""
        near = None if goal is None else BlockNo(goal)
        growing = None if owner is None else Ino(owner)
        while True:
            try:
                with self.store:
                    runs = self.blocks.alloc(count, near, owner=growing)
                return [BlockNo(b) for first, n in runs for b in range(first, first + n)]
            except ZeroingNeeded as e:
                self.zero(self.blocks.isolate(e.blocks))

    def zero(self, isolated: IsolatedBlocks) -> None:
        for offset, length in isolated.pieces():
            self.region.zero(offset, length)
        with self.store:
            self.blocks.finish_zeroing(isolated)

    def free(self, first: BlockNo, count: int) -> None:
        with self.store:
            self.blocks.free(first, count)

    def free_bytes(self) -> int:
        """What may be had in pages, but for the page maps of blocks that are not carved yet."""
        pages = PAGES_PER_BLOCK - 1
        return (self.blocks.free_blocks * pages + self.pages.free_pages) * PAGE

    def change(self, inode: Inode, work: Callable[[], object], *, give_up: bool = False) -> bool:
        """A transaction over an inode that is in no table; False if it was given up.

        Like the table, it puts the inode's fields back after any failure.
        """
        before = copy.copy(inode)
        while True:
            try:
                with self.store:
                    work()
                    if give_up:
                        raise GiveUp
            except (GiveUp, ZeroingNeeded, PkernfsError) as e:
                for field in Inode.__slots__:
                    setattr(inode, field, getattr(before, field))
                if isinstance(e, GiveUp):
                    return False
                if not isinstance(e, ZeroingNeeded):
                    raise
                self.zero(self.blocks.isolate(e.blocks))
            else:
                return True

    def bits(self, offset: int) -> set[int]:
        """A bitmap of the block map, as it is in the region (small regions: one page)."""
        page = self.store.read(FIRST_MAP_PAGE, MAGIC_BLOCK_MAP)
        return {
            b for b, bit in enumerate(bitmap.expand(page[offset:][:MAP_BYTES], self.total)) if bit
        }


@contextmanager
def space(size: int, phys_base: PhysAddr | None = None) -> Iterator[Space]:
    made = Space(size, phys_base)
    try:
        yield made
    finally:
        made.close()
