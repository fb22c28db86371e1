"""The 2 MiB block allocator over the block maps.

The region holds which blocks are in use, page-granular (*carved* in the format) or known to be
zero. Only memory holds what is in flight: blocks that the open transaction frees, that are isolated
for zeroing, or that are kept for a file that grows.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from pkernfs.alloc import bitmap
from pkernfs.errors import CorruptionError, NoSpaceError, ZeroingNeeded
from pkernfs.journal import PageStore
from pkernfs.layout import (
    BLOCK,
    BLOCK_MAP,
    BLOCK_MAP_OFFSET,
    BLOCKS_PER_GIB,
    MAGIC_BLOCK_MAP,
    MAP_BLOCKS,
    MAP_BYTES,
    MAP_CARVED_OFFSET,
    MAP_USED_OFFSET,
    MAP_ZERO_OFFSET,
    PAGES_PER_BLOCK,
)
from pkernfs.quantities import BlockNo, BlockRun, Ino, PageNo, PhysAddr, RegionOff, RegionRun

_FREE = 0
_USED = 1
_PAGE_GRANULAR = 2
_ISOLATED = 3  # free, being zeroed
_KEPT = 4  # free, kept for a file that grows
_FREED = 5  # free once the open transaction is committed
_HELD = 6  # free, but somebody still stores into it

_FREE_RUNS = re.compile(rb"\x00+")
_MAX_PREALLOCATIONS = 64
_MAX_PREALLOCATED_BLOCKS = BLOCKS_PER_GIB

# So much is zeroed on the spot; more is the caller's to do elsewhere.
INLINE_ZERO_BLOCKS = 4


@dataclass(frozen=True)
class MapRange:
    """A range of the region, as far as the allocator is concerned."""

    first_block: BlockNo
    blocks: int
    map_page: PageNo
    phys_base: PhysAddr | None


@dataclass
class IsolatedBlocks:
    """Free blocks that are being zeroed and that nobody else may allocate meanwhile."""

    runs: list[BlockRun]

    def pieces(self, most: int = 8 << 20) -> list[RegionRun]:
        """Cut the runs into pieces of the region of at most ``most`` bytes."""
        found = []
        for first, count in self.runs:
            end = (first + count) * BLOCK
            for offset in range(first * BLOCK, end, most):
                found.append(RegionRun(RegionOff(offset), min(most, end - offset)))
        return found


class BlockAllocator:
    """Claims and frees 2 MiB blocks inside transactions of the page store."""

    def __init__(self, store: PageStore, ranges: list[MapRange]) -> None:
        self._store = store
        self._ranges = ranges
        total = ranges[-1].first_block + ranges[-1].blocks
        self.total_blocks = total
        self._state = bytearray([_USED]) * total
        self._zero = bytearray(total)
        self._windows: OrderedDict[Ino, BlockRun] = OrderedDict()
        for r in ranges:
            self._load(r)
        self.free_blocks = self._state.count(_FREE)
        # What has become free, isolated until someone has looked at it; None: nobody looks.
        self._freed_runs: list[BlockRun] | None = None

    def _load(self, r: MapRange) -> None:
        for i in range(-(-r.blocks // MAP_BLOCKS)):
            page = self._store.read(PageNo(r.map_page + i), MAGIC_BLOCK_MAP)
            first, count = BLOCK_MAP.unpack_from(page, BLOCK_MAP_OFFSET)
            expected = (r.first_block + i * MAP_BLOCKS, min(MAP_BLOCKS, r.blocks - i * MAP_BLOCKS))
            if (first, count) != expected:
                raise CorruptionError(
                    f"block map {i}: wrong blocks: got {first}+{count}, "
                    f"expected {expected[0]}+{expected[1]}"
                )
            used = bitmap.expand(page[MAP_USED_OFFSET : MAP_USED_OFFSET + MAP_BYTES], count)
            for bit, length in bitmap.runs(
                int.from_bytes(page[MAP_CARVED_OFFSET : MAP_CARVED_OFFSET + MAP_BYTES], "little")
            ):
                used[bit : bit + length] = bytes([_PAGE_GRANULAR]) * length
            self._state[first : first + count] = used
            self._zero[first : first + count] = bitmap.expand(
                page[MAP_ZERO_OFFSET : MAP_ZERO_OFFSET + MAP_BYTES], count
            )

    # ------------------------------------------------------------------ questions

    def is_in_page_granular(self, page: PageNo) -> bool:
        """Tell if a page is in a block whose pages are allocated one by one.

        :raises CorruptionError: there is no such page.
        """
        block = page // PAGES_PER_BLOCK
        if not 0 <= block < self.total_blocks:
            raise CorruptionError(f"block {block}: out of the region")
        return self._state[block] == _PAGE_GRANULAR

    def page_granular_blocks(self) -> list[BlockNo]:
        """List the page-granular blocks, ascending."""
        found = []
        block = self._state.find(_PAGE_GRANULAR)
        while block >= 0:
            found.append(BlockNo(block))
            block = self._state.find(_PAGE_GRANULAR, block + 1)
        return found

    def next_dirty(self, most: int) -> IsolatedBlocks | None:
        """Isolate up to ``most`` free blocks that are not known to be zero, in one run."""
        state, zero = self._state, self._zero
        at = 0
        while True:
            at = zero.find(0, at)
            if at < 0:
                return None
            if state[at] == _FREE:
                break
            # skip to the next free block
            at = state.find(_FREE, at)
            if at < 0:
                return None
        end = at
        while end < len(state) and end - at < most and state[end] == _FREE and not zero[end]:
            end += 1
        return self.isolate([BlockRun(BlockNo(at), end - at)])

    # ------------------------------------------------------------------ zeroing

    def isolate(self, runs: Iterable[tuple[int, int]]) -> IsolatedBlocks:
        """Keep free blocks from being allocated until :meth:`finish_zeroing` or :meth:`putback`.

        Blocks that are no longer free are left out. The runs are bare, ``(first, blocks)``: those
        of :class:`ZeroingNeeded` are, for errors know no other module.
        """
        kept: list[BlockRun] = []
        for first, count in runs:
            for block in range(first, first + count):
                if self._state[block] in (_FREE, _KEPT) and not self._zero[block]:
                    if kept and sum(kept[-1]) == block:
                        kept[-1] = BlockRun(kept[-1].first, kept[-1].blocks + 1)
                    else:
                        kept.append(BlockRun(BlockNo(block), 1))
        for first, count in kept:
            self._state[first : first + count] = bytes([_ISOLATED]) * count
        return IsolatedBlocks(kept)

    def putback(self, isolated: IsolatedBlocks) -> None:
        """Let isolated blocks be allocated as they are."""
        for first, count in isolated.runs:
            self._state[first : first + count] = bytes(count)

    def finish_zeroing(self, isolated: IsolatedBlocks) -> None:
        """Record isolated blocks as zero and let them be allocated; inside a transaction."""
        for first, count in isolated.runs:
            self._mark(first, count, zero=True)

        def done() -> None:
            for first, count in isolated.runs:
                self._zero[first : first + count] = b"\1" * count
            self.putback(isolated)

        self._store.on_commit.append(done)

    # ------------------------------------------------------------------ what others still use

    def watch_freed(self, *, dirty: bool) -> None:
        """Isolate what becomes free from here on, until someone has looked: :meth:`take_freed`.

        :param dirty: likewise what is free already and not known to be zero.
        """
        self._freed_runs = []
        if dirty:
            free = (
                BlockRun(BlockNo(r.start()), len(r[0])) for r in _FREE_RUNS.finditer(self._state)
            )
            self._freed_runs = self._dirty(free)
            for first, count in self._freed_runs:
                self._state[first : first + count] = bytes([_ISOLATED]) * count

    def take_freed(self) -> IsolatedBlocks:
        """What has become free since the last call.

        The caller puts it back, holds it, or leaves it to the next call: :meth:`leave_freed`.
        """
        taken = IsolatedBlocks(self._freed_runs or [])
        if self._freed_runs is not None:
            self._freed_runs = []
        return taken

    def leave_freed(self, isolated: IsolatedBlocks) -> None:
        """Have the next :meth:`take_freed` return them again: nobody has looked."""
        assert self._freed_runs is not None
        self._freed_runs += isolated.runs

    def hold(self, isolated: IsolatedBlocks) -> None:
        """Keep isolated blocks from being allocated or zeroed until :meth:`let_go`."""
        for first, count in isolated.runs:
            self._state[first : first + count] = bytes([_HELD]) * count
            self.free_blocks -= count

    def let_go(self, held: IsolatedBlocks) -> None:
        """Let held blocks be allocated, as they are."""
        for _, count in held.runs:
            self.free_blocks += count
        self.putback(held)

    # ------------------------------------------------------------------ allocating

    def alloc(
        self,
        count: int,
        goal: BlockNo | None = None,
        *,
        owner: Ino | None = None,
        zeroed: bool = True,
    ) -> list[BlockRun]:
        """Allocate ``count`` blocks: at ``goal`` if that is free, in one run if there is one.

        Runs of 1 GiB or more start at a 1 GiB aligned (physical) address where possible. Of runs
        that are as good, one that is known to be zero is taken first. A file
        (``owner``) that asks again and again has the blocks behind its last ones kept for it.
        With ``zeroed``, blocks that are not known to be zero are zeroed here if they are few.
        Returns runs of blocks in the order of use.

        :raises NoSpaceError: fewer than ``count`` blocks are free.
        :raises ZeroingNeeded: too many would have to be zeroed here.
        """
        if owner is not None:
            self.drop_preallocation(owner)
        runs = self._plan_or_drop_preallocations(count, goal, clean=zeroed)
        if zeroed:
            self._zero_now(runs)
        for first, length in runs:
            self._allocate(first, length, _USED)
        if owner is not None and goal is not None:
            self._keep(owner, BlockNo(sum(runs[-1])), count)
        return runs

    def choose(self, count: int, owner: Ino) -> BlockNo:
        """The first block of where ``count`` blocks would go, isolated and known to be dirty.

        For a caller that fills the block before it becomes part of a file: isolation keeps it
        from others, and its known-zero bit is cleared by this transaction.

        :raises NoSpaceError: no block is free.
        """
        self.drop_preallocation(owner)
        try:
            runs = self._plan_or_drop_preallocations(count, None, clean=True)
        except NoSpaceError:
            runs = self._plan_or_drop_preallocations(1, None, clean=True)
        block = runs[0].first
        old_zero = bytes(self._zero[block : block + 1])
        if self._zero[block]:
            self._mark(block, 1, zero=False)
            self._zero[block] = 0
        else:
            self._store.region.zero(RegionOff(block * BLOCK), BLOCK)
        self._state[block] = _ISOLATED

        def undo() -> None:
            self._state[block] = _FREE
            self._zero[block : block + 1] = old_zero

        self._store.on_abort.append(undo)
        return block

    def alloc_chosen(self, block: BlockNo) -> None:
        """Make the block from :meth:`choose` file data."""
        # Undone last: giving up leaves the block dirty and free.
        self._store.on_abort.append(partial(self.free_chosen, block))
        self._allocate(block, 1, _USED)

    def free_chosen(self, block: BlockNo) -> None:
        """Let the block from :meth:`choose` be allocated by others: it is not wanted after all."""
        self._state[block] = _FREE

    def alloc_page_granular(self) -> BlockNo:
        """Allocate one block for pages; its bytes may be anything.

        :raises NoSpaceError: none is free, or the region's file can have no memory for it: what a
            transaction stores in pages cannot be refused any more.
        """
        runs = self._plan_or_drop_preallocations(1, None)
        block = runs[0].first
        self._store.region.reserve(RegionOff(block * BLOCK), BLOCK)
        if self._zero[block]:
            # Its pages are filled before the transaction is committed: should it not be, the
            # block is free and must not be taken for zero.
            self._clear_zero_now(block)
        self._allocate(block, 1, _PAGE_GRANULAR)
        return block

    def _plan_or_drop_preallocations(
        self, count: int, goal: BlockNo | None, *, clean: bool = False
    ) -> list[BlockRun]:
        runs = self._plan(count, goal, clean)
        if runs is None and self._windows:
            self.drop_preallocations()
            runs = self._plan(count, goal, clean)
        if runs is None:
            if count <= self.free_blocks and _ISOLATED in self._state:
                raise ZeroingNeeded([])  # enough, once isolated ones are put back
            raise NoSpaceError(f"no space: {count} blocks wanted, {self.free_blocks} free")
        return runs

    def free(self, first: BlockNo, count: int) -> None:
        """Free blocks; they can be allocated once the transaction is committed.

        :raises CorruptionError: not all of them are in use.
        """
        old = bytes(self._state[first : first + count])
        if old.count(_USED) + old.count(_PAGE_GRANULAR) != count:
            raise CorruptionError(f"block {first}: {count} blocks freed that are not all in use")
        self._mark(first, count, used=False, page_granular=False if _PAGE_GRANULAR in old else None)
        self._state[first : first + count] = bytes([_FREED]) * count
        self._store.on_abort.append(partial(self._restore, first, old, None))
        self._store.on_commit.append(partial(self._freed, first, count))

    def _freed(self, first: BlockNo, count: int) -> None:
        self.free_blocks += count
        if self._freed_runs is None:
            self._state[first : first + count] = bytes(count)
        else:
            self._state[first : first + count] = bytes([_ISOLATED]) * count
            self._freed_runs.append(BlockRun(first, count))

    def _restore(self, first: BlockNo, state: bytes, zero: bytes | None) -> None:
        self._state[first : first + len(state)] = state
        if zero is not None:
            self._zero[first : first + len(zero)] = zero
            self.free_blocks += len(state)

    def _allocate(self, first: BlockNo, count: int, kind: int) -> None:
        old = bytes(self._state[first : first + count])
        old_zero = bytes(self._zero[first : first + count])
        self._mark(
            first,
            count,
            used=True,
            page_granular=True if kind == _PAGE_GRANULAR else None,
            zero=False if 1 in old_zero else None,
        )
        self._state[first : first + count] = bytes([kind]) * count
        self._zero[first : first + count] = bytes(count)
        self.free_blocks -= count
        self._store.on_abort.append(partial(self._restore, first, old, old_zero))

    def _mark(
        self,
        first: BlockNo,
        count: int,
        *,
        used: bool | None = None,
        page_granular: bool | None = None,
        zero: bool | None = None,
    ) -> None:
        for r in self._ranges:
            start: int = max(first, r.first_block)
            end = min(first + count, r.first_block + r.blocks)
            while start < end:
                index, bit = divmod(start - r.first_block, MAP_BLOCKS)
                length = min(end - start, MAP_BLOCKS - bit)
                page = self._store.edit(PageNo(r.map_page + index), MAGIC_BLOCK_MAP)
                for offset, value in (
                    (MAP_USED_OFFSET, used),
                    (MAP_CARVED_OFFSET, page_granular),
                    (MAP_ZERO_OFFSET, zero),
                ):
                    if value is not None:
                        bitmap.set_run(page[offset : offset + MAP_BYTES], bit, length, value)
                start += length

    def _clear_zero_now(self, block: BlockNo) -> None:
        """Clear the block's zero bit for good, whatever becomes of the transaction."""
        r = next(r for r in self._ranges if r.first_block <= block < r.first_block + r.blocks)
        index, bit = divmod(block - r.first_block, MAP_BLOCKS)

        def change(page: memoryview) -> None:
            bitmap.set_run(page[MAP_ZERO_OFFSET : MAP_ZERO_OFFSET + MAP_BYTES], bit, 1, False)

        self._store.change_now(PageNo(r.map_page + index), MAGIC_BLOCK_MAP, change)
        self._zero[block] = 0

    def _dirty(self, runs: Iterable[BlockRun]) -> list[BlockRun]:
        """What of some runs is not known to be zero."""
        dirty: list[BlockRun] = []
        for first, count in runs:
            end = first + count
            at = self._zero.find(0, first, end)
            while at >= 0:
                stop = self._zero.find(1, at, end)
                if stop < 0:
                    stop = end
                dirty.append(BlockRun(BlockNo(at), stop - at))
                at = self._zero.find(0, stop, end)
        return dirty

    def _zero_now(self, runs: list[BlockRun]) -> None:
        dirty = self._dirty(runs)
        if sum(count for _, count in dirty) > INLINE_ZERO_BLOCKS:
            raise ZeroingNeeded(dirty)
        for first, count in dirty:
            self._store.region.zero(RegionOff(first * BLOCK), count * BLOCK)

    # ------------------------------------------------------------------ choosing

    def _plan(self, count: int, goal: BlockNo | None, clean: bool) -> list[BlockRun] | None:
        """Choose the runs to allocate; None: too few blocks are free outside the windows.

        ``clean``: better blocks that are known to be zero, if one run has them all. To zero is
        cheaper than to cut a file up.
        """
        if count > self.free_blocks:
            return None
        head: list[BlockRun] = []
        if goal is not None and 0 <= goal < self.total_blocks:
            length = self._free_at(goal, count)
            if length == count:
                return [BlockRun(goal, count)]
            if length:
                head = [BlockRun(goal, length)]
                count -= length
        # What is allocated at the goal must not be found again.
        for first, length in head:
            self._state[first : first + length] = bytes([_USED]) * length
        try:
            found = self._find(count, clean)
            rest = [BlockRun(found, count)] if found is not None else self._pick_largest(count)
        finally:
            for first, length in head:
                self._state[first : first + length] = bytes(length)
        return head + rest if rest is not None else None

    def _free_at(self, block: BlockNo, most: int) -> int:
        end = min(block + most, self.total_blocks)
        run = _FREE_RUNS.match(self._state, block, end)
        return run.end() - block if run else 0

    def _find(self, count: int, clean: bool) -> BlockNo | None:
        if count >= BLOCKS_PER_GIB:
            aligned = self._find_aligned(count, clean)
            if aligned is not None:
                return aligned
        if clean:
            found = self._find_clean(count)
            if found is not None:
                return found
        at = self._state.find(bytes(count))
        return BlockNo(at) if at >= 0 else None

    def _find_clean(self, count: int) -> BlockNo | None:
        """The first run of free blocks that are known to be zero."""
        wanted = b"\1" * count
        at = self._zero.find(wanted)
        while at >= 0:
            free = self._free_at(BlockNo(at), count)
            if free == count:
                return BlockNo(at)
            at = self._zero.find(wanted, at + free + 1)  # what is kept for a file is zero, too
        return None

    def _find_aligned(self, count: int, clean: bool) -> BlockNo | None:
        dirty = None
        for r in self._ranges:
            base = (r.phys_base or 0) // BLOCK
            first = r.first_block + -base % BLOCKS_PER_GIB
            for at in range(first, r.first_block + r.blocks - count + 1, BLOCKS_PER_GIB):
                block = BlockNo(at)
                if self._free_at(block, count) < count:
                    continue
                if not clean or self._zero.find(0, block, block + count) < 0:
                    return block
                dirty = block if dirty is None else dirty
        return dirty

    def _pick_largest(self, count: int) -> list[BlockRun] | None:
        found = [
            BlockRun(BlockNo(m.start()), m.end() - m.start())
            for m in _FREE_RUNS.finditer(self._state)
        ]
        found.sort(key=lambda run: (-run.blocks, run.first))
        picked = []
        for first, length in found:
            length = min(length, count)
            picked.append(BlockRun(first, length))
            count -= length
            if not count:
                return picked
        return None

    # ------------------------------------------------------------------ room for growth

    def _keep(self, owner: Ino, start: BlockNo, count: int) -> None:
        """Keep as many blocks behind a growing file as it just took, at least 8."""
        length = (
            self._free_at(start, min(max(8, 2 * count), _MAX_PREALLOCATED_BLOCKS))
            if (start < self.total_blocks)
            else 0
        )
        if length:
            self._state[start : start + length] = bytes([_KEPT]) * length
            self._windows[owner] = BlockRun(start, length)
            if len(self._windows) > _MAX_PREALLOCATIONS:
                self._unkeep(self._windows.popitem(last=False)[1])

    def _unkeep(self, window: BlockRun) -> None:
        for block in range(window.first, sum(window)):
            if self._state[block] == _KEPT:
                self._state[block] = _FREE

    def drop_preallocation(self, owner: Ino) -> None:
        """Let others allocate what was kept for a file that has stopped growing."""
        window = self._windows.pop(owner, None)
        if window:
            self._unkeep(window)

    def drop_preallocations(self) -> None:
        """Keep nothing for anybody: space is short."""
        while self._windows:
            self._unkeep(self._windows.popitem()[1])
