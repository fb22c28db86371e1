"""Claims: a byte for each block, a bit for each page of carved blocks, as the walk finds them."""

from __future__ import annotations

import re

from pkernfs.alloc.bitmap import Run
from pkernfs.layout import PAGES_PER_BLOCK, block_of
from pkernfs.quantities import BlockNo, PageNo

FREE = 0
STATIC = 1
WHOLE = 2
CARVED = 3
OUTSIDE = 4

ALL_PAGES = (1 << PAGES_PER_BLOCK) - 1

_STRIDE = 8192
_NO_FLAGS = bytes(_STRIDE)
_SET = re.compile(rb"[^\0]+")


class Claims:
    """The first claim of a block or a page wins; a second one fails.

    ``kind`` has a byte for each block. ``pages`` and ``meta`` have an integer bitmap for each
    block that is known to be carved: all claimed pages, and those of them that are metadata. Bit 0
    is the page map.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.kind = bytearray([OUTSIDE]) * blocks
        self.pages: dict[BlockNo, int] = {}
        self.meta: dict[BlockNo, int] = {}

    def claim_meta(self, page: PageNo) -> bool:
        """Claim one page for metadata; False if it cannot be one, or is claimed."""
        block, bit = block_of(page), page % PAGES_PER_BLOCK
        if not bit or not self.carve(block):
            return False
        mask = 1 << bit
        used = self.pages[block]
        if used & mask:
            return False
        self.pages[block] = used | mask
        self.meta[block] |= mask
        return True

    def claim_pages(self, block: BlockNo, bit: int, count: int) -> int:
        """Claim pages of a block for data; returns the mask of those that were free."""
        if not self.carve(block):
            return 0
        mask = ((1 << count) - 1) << bit
        used = self.pages[block]
        self.pages[block] = used | mask
        return mask & ~used

    def claim_block(self, block: BlockNo) -> bool:
        """Claim a block as a whole for data."""
        if self.kind[block] != FREE:
            return False
        self.kind[block] = WHOLE
        return True

    def claim_run(self, first: BlockNo, count: int) -> bool:
        """Claim blocks as a whole if all are free."""
        if self.kind.count(FREE, first, first + count) != count:
            return False
        self.kind[first : first + count] = bytes([WHOLE]) * count
        return True

    def carve(self, block: BlockNo) -> bool:
        """Note that a block is carved; False if it is something else."""
        kind = self.kind[block]
        if kind == FREE:
            self.kind[block] = CARVED
            self.pages[block] = self.meta[block] = 1
            return True
        return kind == CARVED

    def in_use(self) -> bytes:
        """Return the kinds of all blocks that are not free."""
        return b"".join(self.kind[first : first + count] for first, count in flag_runs(self.kind))

    def release_pages(self, first: PageNo, count: int = 1) -> None:
        """Take pages of carved blocks back."""
        page: int = first
        end = first + count
        while page < end:
            block, bit = BlockNo(page // PAGES_PER_BLOCK), page % PAGES_PER_BLOCK
            length = min(end - page, PAGES_PER_BLOCK - bit)
            keep = ~(((1 << length) - 1) << bit) | 1
            self.pages[block] &= keep
            self.meta[block] &= keep
            page += length

    def release_blocks(self, first: BlockNo, count: int) -> None:
        """Take whole blocks back."""
        self.kind[first : first + count] = bytes(count)


def flag_runs(flags: bytes | bytearray) -> list[Run]:
    """List the runs of bytes that are not zero, ascending."""
    runs: list[Run] = []
    for start in range(0, len(flags), _STRIDE):  # most of a large region is free
        piece = flags[start : start + _STRIDE]
        if piece == _NO_FLAGS[: len(piece)]:
            continue
        for match in _SET.finditer(piece):
            first, count = start + match.start(), match.end() - match.start()
            if runs and sum(runs[-1]) == first:
                runs[-1] = Run(runs[-1].first, runs[-1].length + count)
            else:
                runs.append(Run(first, count))
    return runs
