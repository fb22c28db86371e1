"""The state that all parts of a mounted file system share: access, space, the state page.

The allocators and the inode table are here, since every part takes from them; what is made of them
is the parts' business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from pkernfs.alloc.blocks import BlockAllocator, IsolatedBlocks, MapRange
from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import (
    InvalidError,
    NoSpaceError,
    PkernfsError,
    ReadOnlyError,
    ZeroingNeeded,
)
from pkernfs.fs import state_page
from pkernfs.fs.inodes import InodeTable
from pkernfs.fs.superblock import Superblock
from pkernfs.journal import PageStore
from pkernfs.layout import (
    BLOCK,
    MAGIC_STATE,
    NO_HANDOVER,
    PAGE,
    PAGES_PER_BLOCK,
    STATE,
    STATE_CLEAN,
    STATE_FLAG_ERROR,
    STATE_MOUNTED,
    STATE_OFFSET,
    STATE_PAGE,
    HandoverFields,
    HistoryFields,
    StateFields,
)
from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region.region import Region

log = logging.getLogger(__name__)

_RESERVED_PAGES = 16
_VERSION_WORD = (0 << 32) | (1 << 16)

T = TypeVar("T")


class Access(Enum):
    """The state of a mounted file system: its users may change it, or why not."""

    WRITABLE = "writable"
    #: It was mounted so.
    READ_ONLY = "read-only"
    #: An error was found in the region.
    FAILED = "failed"
    #: A handover is being prepared, or was made.
    FROZEN = "frozen"
    #: Frozen, but for the changes that the handover makes itself.
    HANDING_OVER = "handing over"
    #: An error was found while it was frozen: it fails when it is thawed.
    FROZEN_FAILED = "frozen, failed"


# Members of an Enum are slow to find in Python 3.11.
_WRITABLE = Access.WRITABLE
_CHANGING = (Access.WRITABLE, Access.HANDING_OVER)
_FROZEN = (Access.FROZEN, Access.HANDING_OVER, Access.FROZEN_FAILED)


@dataclass(frozen=True)
class StatFs:
    """The figures of statfs(2); blocks are of ``block_size`` bytes."""

    block_size: int
    blocks: int
    free: int
    available: int
    files: int
    free_files: int


class Super:
    """The state that the parts of one file system share.

    :param clock: the time now, ns since 1970.
    :param may_write: the region may be stored into.
    """

    def __init__(
        self, region: Region, superblock: Superblock, clock: Callable[[], int], may_write: bool
    ) -> None:
        self.region = region
        self.superblock = superblock
        self.clock = clock
        self.access = Access.WRITABLE if may_write else Access.READ_ONLY
        #: Why it failed: the first reason; "" if it has not.
        self.failure = ""
        self.store = PageStore(
            region,
            superblock.uuid,
            superblock.fields.journal_page,
            superblock.fields.journal_pages,
            superblock.total_blocks * PAGES_PER_BLOCK,
        )
        self.store.recover(write=may_write)
        ranges = [
            MapRange(
                r.first_block,
                r.blocks,
                r.map_page,
                None
                if region.phys_base is None
                else PhysAddr(region.phys_base + r.first_block * BLOCK),
            )
            for r in superblock.ranges
        ]
        self.blocks = BlockAllocator(self.store, ranges)
        self.pages = PageAllocator(self.store, self.blocks)
        self.inodes = InodeTable(self.store, self.pages)
        static = min(r.map_page // PAGES_PER_BLOCK for r in superblock.ranges)
        self._static_blocks = 2 if static == 0 else static + 1
        if may_write:
            self._reserve_metadata()

    def _reserve_metadata(self) -> None:
        """Give all metadata its memory: a commit cannot be refused half way.

        :raises NoSpaceError: the file system that a sparse region is on is full.
        """
        self.region.reserve(RegionOff(0), self._static_blocks * BLOCK)
        for block in self.blocks.page_granular_blocks():
            self.region.reserve(RegionOff(block * BLOCK), BLOCK)

    # ------------------------------------------------------------------ access

    @property
    def read_only(self) -> bool:
        """Nobody may change anything now."""
        return self.access not in _CHANGING

    @property
    def frozen(self) -> bool:
        """Frozen for a handover, failed meanwhile or not."""
        return self.access in _FROZEN

    def check_writable(self) -> None:
        """:raises ReadOnlyError: users may not change anything."""
        if self.access is not _WRITABLE:
            raise ReadOnlyError(
                "frozen by pkernfs handover" if self.frozen else "read-only file system"
            )

    def freeze(self) -> None:
        """Refuse every change from here on, until :meth:`thaw`. Nothing is stored.

        :raises ReadOnlyError: read-only, or frozen.
        """
        self.check_writable()
        self.access = Access.FROZEN

    @contextmanager
    def handing_over(self) -> Iterator[None]:
        """Let the handover's own changes through, while frozen.

        :raises InvalidError: not frozen.
        """
        if not self.frozen:
            raise InvalidError("not frozen")
        self.access = Access.HANDING_OVER
        try:
            yield
        finally:
            self.access = Access.FROZEN_FAILED if self.failure else Access.FROZEN

    def thaw(self) -> str:
        """End :meth:`freeze`. Returns why to :meth:`fail` now, as it failed meanwhile; "": no need.

        :raises InvalidError: not frozen.
        """
        if not self.frozen:
            raise InvalidError("there is no handover to undo")
        self.access = Access.WRITABLE
        return self.failure

    def fail(self, reason: str) -> None:
        """Something in the region is wrong: note it there, and change nothing more."""
        frozen, stored_into = self.frozen, not self.read_only
        if frozen:
            log.error("%s: %s: run fsck.pkernfs", self.region.name, reason)
            self.failure = self.failure or reason
            self.access = Access.FROZEN_FAILED
        if not stored_into:
            return
        log.error("%s: %s: read-only from here on; run fsck.pkernfs", self.region.name, reason)
        try:
            self.set_state(flags=self.state().flags | STATE_FLAG_ERROR)
        except PkernfsError as e:
            log.error("%s: cannot note the error: %s", self.region.name, e)
        if not frozen:
            self.failure = reason
            self.access = Access.FAILED

    # ------------------------------------------------------------------ the state page

    def state(self) -> StateFields:
        """The state as it is stored.

        :raises CorruptionError: the page is damaged.
        """
        return state_page.load(self.store.read(STATE_PAGE, MAGIC_STATE))

    def set_state(
        self,
        *,
        record: HandoverFields | None = None,
        history: HistoryFields | None = None,
        **changes: int | bytes,
    ) -> None:
        """Change fields of the state page, the handover's record if given, and add to the history.

        :param changes: by names of :class:`StateFields`.
        """
        with self.store:
            page = self.store.edit(STATE_PAGE, MAGIC_STATE)
            before = state_page.load(page)
            if history is not None:
                state_page.push_history(page, history)
            STATE.pack_into(page, STATE_OFFSET, *before._replace(**changes))  # type: ignore[arg-type]
            if record is not None:
                state_page.write_record(page, record)

    @staticmethod
    def boot_id() -> bytes:
        """The 16 bytes that tell this boot of the machine from others; zeros if it has none."""
        try:
            with open("/proc/sys/kernel/random/boot_id") as f:
                return bytes.fromhex(f.read().strip().replace("-", ""))
        except OSError:
            return bytes(16)

    def mark_mounted(
        self, before: StateFields, kind: int, mounted_at: int, history: HistoryFields | None
    ) -> None:
        """Store that the file system is in use; no handover's record outlives that.

        :param before: the state that the mount has found.
        :param kind: the kind of mount, an ARRIVAL_ constant; ``mounted_at`` in ns since 1970.
        """
        damaged = STATE_FLAG_ERROR if self.inodes.damaged else 0
        self.set_state(
            record=NO_HANDOVER,
            history=history,
            state=STATE_MOUNTED,
            arrival=kind,
            flags=before.flags | damaged,
            mounts=before.mounts + 1,
            mounted_at=mounted_at,
            boot_id=self.boot_id(),
            written_by=_VERSION_WORD,
        )

    def mark_clean(self) -> None:
        """Store that nothing is left to do."""
        self.set_state(state=STATE_CLEAN, unmounted_at=self.clock(), inodes_used=self.inodes.used)
        self.region.sync()

    def sync(self) -> None:
        """Bring everything to where the region is kept (nothing to do for memory)."""
        if not self.read_only:
            self.region.sync()

    # ------------------------------------------------------------------ space

    def leave_reserve(self) -> None:
        """At the end of a transaction that takes space: freeing must stay possible.

        Cutting a piece out of a file can need new tree nodes before it gives anything back.

        :raises NoSpaceError: this would take the last pages.
        """
        if self.pages.free_pages < _RESERVED_PAGES and not self.blocks.free_blocks:
            raise NoSpaceError("no space: the last pages are kept for freeing")

    def statfs(self) -> StatFs:
        """Space in 4 KiB units; every block of the region is either free or used.

        A few pages are free but not available: they are kept for what frees others.
        """
        free = self.blocks.free_blocks * PAGES_PER_BLOCK + self.pages.free_pages
        spare = len(self.inodes) - self.inodes.used
        free_files = spare + free * 15
        return StatFs(
            block_size=PAGE,
            blocks=(self.blocks.total_blocks - self._static_blocks) * PAGES_PER_BLOCK,
            free=free,
            available=max(free - _RESERVED_PAGES, 0),
            files=self.inodes.used + free_files,
            free_files=free_files,
        )

    def isolate_for_zeroing(self, blocks: Iterable[tuple[int, int]]) -> IsolatedBlocks:
        """Keep blocks from being allocated while the caller zeroes them.

        :param blocks: those of a :class:`ZeroingNeeded`.
        """
        return self.blocks.isolate(blocks)

    def next_dirty(self, most_bytes: int) -> IsolatedBlocks | None:
        """Isolate some free blocks that need zeroing; None if there are none."""
        if self.read_only:
            return None
        return self.blocks.next_dirty(max(1, most_bytes // BLOCK))

    def finish_zeroing(self, isolated: IsolatedBlocks) -> None:
        """The isolated blocks are zero now: record that, and let them be allocated."""
        if self.read_only:
            self.blocks.putback(isolated)
            return
        try:
            with self.store:
                self.blocks.finish_zeroing(isolated)
        except PkernfsError:
            self.blocks.putback(isolated)
            raise

    def abandon_zeroing(self, isolated: IsolatedBlocks) -> None:
        """The isolated blocks were not zeroed."""
        self.blocks.putback(isolated)

    def run(self, operation: Callable[[], T]) -> T:
        """Carry out an operation for a caller without an event loop: zeroes what it needs.

        :raises NoSpaceError: it needs what somebody else has isolated, who cannot go on meanwhile.
        """
        while True:
            try:
                return operation()
            except ZeroingNeeded as e:
                isolated = self.isolate_for_zeroing(e.blocks)
                if not isolated.runs:
                    raise NoSpaceError("no space: what was freed cannot be had yet") from None
                for offset, length in isolated.pieces():
                    self.region.zero(offset, length)
                self.finish_zeroing(isolated)
