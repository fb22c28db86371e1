"""The file system: every operation, synchronous, without FUSE. The only writer while mounted.

Each public method runs to its end without giving way to another one; what it changes in the
metadata is one transaction (or several of which each leaves a state that is before or after). All
expected failures are :class:`PkernfsError`.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pkernfs.alloc.blocks import BlockAllocator, Claim, MapRange
from pkernfs.alloc.pages import PageAllocator
from pkernfs.errors import (
    BusyError,
    CorruptionError,
    ExistsError,
    InvalidError,
    IsDirError,
    NoSpaceError,
    NoSuchAddressError,
    NotDirError,
    NotEmptyError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    PkernfsError,
    ReadOnlyError,
    StaleError,
    TooBigError,
    TooManyLinksError,
    ZeroingNeeded,
)
from pkernfs.fs import manifest, state_page, superblock
from pkernfs.fs.extents import LAST_PAGE, ExtentMap
from pkernfs.fs.inodes import Inode, InodeTable, Stat
from pkernfs.fs.names import Names, check_name, is_table_name
from pkernfs.fs.xattrs import Overflow, Xattrs, check_target
from pkernfs.journal import PageStore, TransactionTooLarge
from pkernfs.layout import (
    ARRIVAL_FIRST_BOOT,
    ARRIVAL_LIVE_UPDATE,
    ARRIVAL_REMOUNT,
    BLOCK,
    INODE_FLAG_BODY,
    INODE_FLAG_PENDING,
    INODE_FLAG_TABLE,
    INODE_INLINE_BYTES,
    IOMMU_INO,
    MAGIC_STATE,
    MAX_FILE_BYTES,
    MAX_LINKS,
    NO_HANDOVER,
    NO_PHYSICAL,
    PAGE,
    PAGES_PER_BLOCK,
    PENDING_TO_END,
    ROOT_INO,
    STATE,
    STATE_CLEAN,
    STATE_FLAG_ERROR,
    STATE_FROZEN,
    STATE_MOUNTED,
    STATE_OFFSET,
    STATE_PAGE,
    HandoverFields,
    HistoryFields,
    StateFields,
)
from pkernfs.ratelimit import Quiet
from pkernfs.region import digest
from pkernfs.region.region import Region

if TYPE_CHECKING:
    from pkernfs.dma.table_files import TableFiles

log = logging.getLogger(__name__)

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_ZERO_RANGE = 16

_PERMISSIONS = 0o7777
_S64_MAX = (1 << 63) - 1
_DAY_NS = 86400 * 10**9
_ZERO_STEP_BYTES = 4 << 20
_RESERVED_PAGES = 16
_VERSION_WORD = (0 << 32) | (1 << 16)

T = TypeVar("T")


@dataclass(frozen=True)
class StatFs:
    """What statfs(2) reports; blocks are of ``block_size`` bytes."""

    block_size: int
    blocks: int
    free: int
    available: int
    files: int
    free_files: int


@dataclass(frozen=True)
class Extent:
    """A piece of a file: offsets and length in bytes."""

    offset: int
    length: int
    region_offset: int


class FileSystem:
    """A mounted file system; make one with :meth:`mount`."""

    def __init__(
        self,
        region: Region,
        sb: superblock.Superblock,
        clock: Callable[[], int],
        may_write: bool,
    ) -> None:
        self.region = region
        self.superblock = sb
        self.read_only = not may_write
        self.frozen = False  # for a handover; read_only as well then
        self._failed_frozen: str | None = None  # the first reason to stay read-only afterwards
        self.arrival: manifest.Arrival | None = None
        self._list_ino = 0  # of the handover that is under way
        self._clock = clock
        self.store = PageStore(
            region,
            sb.uuid,
            sb.fields.journal_page,
            sb.fields.journal_pages,
            sb.total_blocks * PAGES_PER_BLOCK,
        )
        self.recovered = self.store.recover(write=may_write)
        ranges = [
            MapRange(
                r.first_block,
                r.blocks,
                r.map_page,
                None if region.phys_base is None else region.phys_base + r.first_block * BLOCK,
            )
            for r in sb.ranges
        ]
        self._blocks = BlockAllocator(self.store, ranges)
        self._pages = PageAllocator(self.store, self._blocks)
        self._inodes = InodeTable(self.store, self._pages)
        self._map = ExtentMap(self.store, self._blocks, self._pages)
        self._names = Names(self.store, self._pages, sb.fields.hash_key)
        self._overflow = Overflow(self.store, self._pages)
        self._xattrs = Xattrs(self.store, self._pages, sb.fields.hash_key, self._overflow)
        self._opens: dict[int, int] = {}
        self._lookups: dict[int, int] = {}
        self._nameless: set[int] = set()  # in use, to be freed when they no longer are
        self._replaced: set[int] = set()  # those of them that have their data without being open
        self._tables: TableFiles | None = None
        self._refusals = Quiet(log)
        static = min(r.map_page // PAGES_PER_BLOCK for r in sb.ranges)
        self._static_blocks = 2 if static == 0 else static + 1

    # ------------------------------------------------------------------ mounting

    @classmethod
    def mount(
        cls, region: Region, *, read_only: bool = False, clock: Callable[[], int] = time.time_ns
    ) -> FileSystem:
        """Open the file system in a region; recovers what an interrupted writer left.

        :raises FormatError: no pkernfs, or one that this version must not touch.
        :raises CorruptionError: too damaged to be mounted.
        """
        sb = superblock.load(region)
        may_write = superblock.check_features(sb)
        if not may_write and region.writable and not read_only:
            log.warning("unknown ro_compat features %#x: read-only", sb.fields.feature_ro_compat)
        may_write = may_write and not read_only and region.writable
        fs = cls(region, sb, clock, may_write)
        fs._start()
        return fs

    def _start(self) -> None:
        state = state_page.load(self.store.read(STATE_PAGE, MAGIC_STATE))
        if state.flags & STATE_FLAG_ERROR:
            log.warning("%s: errors were found earlier: run fsck.pkernfs", self.region.name)
        if state.state == STATE_CLEAN:
            self._inodes.used = state.inodes_used
            unfinished: list[int] = []
        else:
            unfinished = self._inodes.count_used()
        for reason in self._inodes.damaged:  # what is in there is lost, and nothing else
            log.error("%s: %s: run fsck.pkernfs", self.region.name, reason)
        root = self._inodes.get(ROOT_INO)
        if not root.is_dir:
            raise CorruptionError("root inode: not a directory")
        boot_id = _boot_id()
        arrival = self._arrive(state, boot_id)
        if self.read_only:
            return
        self._set_state(
            arrival=arrival,
            state=STATE_MOUNTED,
            flags=state.flags | (STATE_FLAG_ERROR if self._inodes.damaged else 0),
            mounts=state.mounts + 1,
            mounted_at=arrival.mounted_at,
            boot_id=boot_id,
            written_by=_VERSION_WORD,
        )
        try:
            if self._inodes.get(IOMMU_INO).size:
                _ = self.tables  # from here on, what they map is known
        except PkernfsError as e:
            self.fail(f"iommu: what is mapped for DMA cannot be told: {e}")
            return
        for ino in unfinished:
            self._finish_inode(self._inodes.get(ino))
        if arrival.verifier is not None:
            self._inodes.watch = arrival.verifier.changed_meanwhile

    def _set_state(
        self,
        *,
        record: HandoverFields | None = None,
        arrival: manifest.Arrival | None = None,
        **changes: int | bytes,
    ) -> None:
        """Change fields of the state page, and the handover record and history if given."""
        with self.store:
            page = self.store.edit(STATE_PAGE, MAGIC_STATE)
            before = state_page.load(page)
            if arrival is not None:
                changes["arrival"] = arrival.kind
                entry = _history_entry(before, arrival, changes["boot_id"])
                if entry is not None:
                    state_page.push_history(page, entry)
                record = NO_HANDOVER
            STATE.pack_into(page, STATE_OFFSET, *before._replace(**changes))  # type: ignore[arg-type]
            if record is not None:
                state_page.write_record(page, record)

    # ------------------------------------------------------------------ handover

    def _arrive(self, state: StateFields, boot_id: bytes) -> manifest.Arrival:
        """See what kind of mount this is, and compare with the handover before it."""
        kind = ARRIVAL_REMOUNT if state.boot_id == boot_id else ARRIVAL_LIVE_UPDATE
        if not state.mounts:
            kind = ARRIVAL_FIRST_BOOT
        arrival = self.arrival = manifest.Arrival(kind, self._clock())
        if state.state != STATE_FROZEN:
            return arrival
        record = state_page.read_record(self.store.read(STATE_PAGE, MAGIC_STATE))
        arrival.record = record
        if not record.list_ino:
            arrival.trouble = "the handover has left no list to compare with"
            return arrival
        try:
            manifest.load(self, record, self._read_list(record), arrival)
        except PkernfsError as e:
            arrival.trouble = str(e)
        base = NO_PHYSICAL if self.region.phys_base is None else self.region.phys_base
        if base != record.phys_base:
            arrival.changes.add_structure(
                f"physical address: {_address(base)}, {_address(record.phys_base)} at the handover"
            )
        return arrival

    def _read_list(self, record: HandoverFields) -> bytes:
        inode = self._inodes.get(record.list_ino)
        if not inode.is_reg or inode.nlink or inode.size != record.list_bytes:
            raise CorruptionError(f"the handover's list: inode {inode.ino} is something else")
        data = bytearray(inode.size)
        for offset, at, length in self._pieces(inode, 0, inode.size):
            data[offset : offset + length] = self.region.view(at, length)
        return bytes(data)

    def index_of_inode_pages(self) -> dict[int, int]:
        """Index of each page of the inode table."""
        return {page: index for index, page in enumerate(self._inodes.where)}

    def freeze(self) -> None:
        """Refuse every change from here on, until :meth:`thaw`. Nothing is stored.

        :raises ReadOnlyError: read-only, or frozen.
        """
        self._check_writable()
        self.read_only = self.frozen = True

    def thaw(self) -> None:
        """End :meth:`freeze`, and the handover that it was for if there is one.

        After a :meth:`fail` meanwhile it stays read-only.
        """
        if not self.frozen:
            raise InvalidError("there is no handover to undo")
        self.read_only = self.frozen = False
        page = self.store.read(STATE_PAGE, MAGIC_STATE)
        record = state_page.read_record(page)
        if state_page.load(page).state == STATE_FROZEN:
            self._set_state(state=STATE_MOUNTED, record=NO_HANDOVER)
        if self._failed_frozen is not None:
            self.fail(self._failed_frozen)
            return
        for ino in {record.list_ino, self._list_ino} - {0}:
            self._drop_list(ino)
        self._list_ino = 0
        for ino in list(self._nameless):
            self._reclaim(ino)

    def _drop_list(self, ino: int) -> None:
        try:
            inode = self._inodes.get(ino)
            if inode.is_reg and not inode.nlink:
                self._evict(inode)
        except NotFoundError:
            pass

    def make_list(self, size: int) -> tuple[int, set[int]]:
        """Make room for a handover's list while frozen.

        Returns its inode and the metadata pages that this has changed.

        :raises NoSpaceError: there is none; nothing was changed.
        """
        if not self.frozen:
            raise InvalidError("not frozen")
        touched: set[int] = set()
        self.store.touched = touched
        self.read_only = False
        ino = 0
        try:
            with self.store:
                inode = self._new_inode(stat.S_IFREG | 0o600, 0, 0)
                self._inodes.save(inode)
            ino = inode.ino
            self.run(lambda: self._grow(inode, size))
            with self.store:
                self._inodes.touch(inode)
                self._set_size(inode, size)
                self._inodes.save(inode)
        except BaseException:
            if ino:
                self._drop_list(ino)
            raise
        finally:
            self.read_only = True
            self.store.touched = None
        self._list_ino = ino
        return ino, touched

    def write_list(self, ino: int, offset: int, data: bytes) -> None:
        """Fill a part of the list; no metadata changes.

        :raises InvalidError: not the list that :meth:`make_list` made, or beyond its end.
        """
        inode = self._inodes.get(ino)
        if not self.frozen or inode.nlink or offset < 0 or offset + len(data) > inode.size:
            raise InvalidError(f"the handover's list: cannot store {len(data)} bytes at {offset}")
        for low, at, length in self._pieces(inode, offset, offset + len(data)):
            self.region.copy_in(at, data[low - offset : low - offset + length])

    def hand_over(self, list_ino: int, list_bytes: int, list_digest: int, flags: int) -> int:
        """Record that the frozen file system is handed over; the handover's number.

        :raises CorruptionError: the list is not what it should be.
        """
        if not self.frozen:
            raise InvalidError("not frozen")
        page = self.store.read(STATE_PAGE, MAGIC_STATE)
        record = HandoverFields(
            self.next_handover,
            self._clock(),
            _boot_id(),
            list_ino,
            list_bytes,
            list_digest,
            flags,
            NO_PHYSICAL if self.region.phys_base is None else self.region.phys_base,
        )
        if state_page.load(page).state == STATE_FROZEN:
            raise InvalidError("handed over already")
        if list_ino and digest.crc64(self._read_list(record)) != list_digest:
            raise CorruptionError("the handover's list: its bytes did not arrive")
        self._set_state(state=STATE_FROZEN, record=record)
        self.region.sync()
        return record.number

    def cut_off_transient(self) -> list[int]:
        """Detach the devices whose entries a handover clears, while frozen; their source ids."""
        if self._tables is None:
            return []
        self.read_only = False
        try:
            return self._tables.zap()
        finally:
            self.read_only = True

    @property
    def next_handover(self) -> int:
        """The number of the next handover."""
        entries = state_page.read_history(self.store.read(STATE_PAGE, MAGIC_STATE))
        return 1 + max((entry.number for entry in entries), default=0)

    def end_verification(self) -> None:
        """The verifier has finished: note the result in the history."""
        self._inodes.watch = None
        arrival = self.arrival
        if arrival is None or self.read_only:
            return
        with self.store:
            page = self.store.edit(STATE_PAGE, MAGIC_STATE)
            entries = state_page.read_history(page)
            if entries and entries[0].mounted_at == arrival.mounted_at:
                state_page.set_newest(
                    page, entries[0]._replace(result=arrival.result, changed=len(arrival.changes))
                )

    def _leave_reserve(self) -> None:
        """At the end of a transaction that takes space: freeing must stay possible.

        Cutting a piece out of a file can need new tree nodes before it gives anything back.

        :raises NoSpaceError: this would take the last pages.
        """
        if self._pages.free_pages < _RESERVED_PAGES and not self._blocks.free_blocks:
            raise NoSpaceError("no space: the last pages are kept for freeing")

    # ------------------------------------------------------------------ tables

    @property
    def tables(self) -> TableFiles:
        """root-pgtables and the domains; opened when they are first asked for."""
        if self._tables is None:
            from pkernfs.dma.table_files import (
                TableFiles,  # most mounts have none, and it takes time
            )

            self._tables = TableFiles(self)
        return self._tables

    def _tables_changed(self, directory: Inode) -> None:
        if self._tables is not None and directory.ino == IOMMU_INO:
            self._tables.refresh()

    def _check_unpinned(self, inode: Inode, start: int = 0, end: int = LAST_PAGE + 1) -> None:
        """:raises BusyError: a device may reach file pages start..end-1, or a table is in use."""
        if inode.flags & INODE_FLAG_TABLE:
            self._log_busy(inode, self.tables.check_unused)
        elif self._pinned(inode, start, end):
            raise BusyError("mapped for DMA")

    def _pinned(self, inode: Inode, start: int, end: int) -> bool:
        holder = self._holder(inode, start, end)
        if holder is not None:
            self._refusals.warning(f"inode {inode.ino}: busy: {holder}")
        return holder is not None

    def holder(self, ino: int) -> str | None:
        """What maps a file's bytes for devices; None: nothing does."""
        return self._holder(self._inodes.get(ino), 0, LAST_PAGE + 1)

    def _holder(self, inode: Inode, start: int, end: int) -> str | None:
        """What maps one of file pages start..end-1 for devices."""
        if self._tables is None or not inode.is_reg or not inode.data_pages:
            return None
        pages = self._map.within(inode, start, end)
        return self._tables.holder((page * PAGE, count * PAGE) for _file, page, count in pages)

    def _log_busy(self, inode: Inode, check: Callable[[int], None]) -> None:
        try:
            check(inode.ino)
        except BusyError as e:
            self._refusals.warning(str(e))
            raise

    # ------------------------------------------------------------------ unfinished business

    def _finish_inode(self, inode: Inode) -> None:
        """Complete what an interrupted operation left of an inode."""
        if (not inode.nlink or inode.flags & INODE_FLAG_PENDING) and self._pinned(
            inode, 0, LAST_PAGE + 1
        ):
            log.error("inode %d: to be freed, but mapped for DMA: run fsck.pkernfs", inode.ino)
            return
        if not inode.nlink:
            self._evict(inode)
        elif inode.flags & INODE_FLAG_PENDING:
            self._finish_pending(inode)

    def unmount(self) -> None:
        """Reclaim what was unlinked but open, and mark the region clean.

        One that was handed over stays as it is.
        """
        if self.frozen:
            self.region.sync()
        if self.read_only:
            return
        self._opens.clear()
        self._lookups.clear()
        for ino in self._inodes.count_used():
            self._finish_inode(self._inodes.get(ino))
        if self._inodes.damaged:
            self.fail(self._inodes.damaged[0])
            return
        self._set_state(
            state=STATE_CLEAN, unmounted_at=self._clock(), inodes_used=self._inodes.used
        )
        self.region.sync()

    def fail(self, reason: str) -> None:
        """Something in the region is wrong: note it there, and change nothing more."""
        if self.frozen:
            self._failed_frozen = self._failed_frozen or reason
            log.error("%s: %s: run fsck.pkernfs", self.region.name, reason)
        if self.read_only:
            return
        log.error("%s: %s: read-only from here on; run fsck.pkernfs", self.region.name, reason)
        try:
            page = self.store.read(STATE_PAGE, MAGIC_STATE)
            flags = state_page.load(page).flags
            self._set_state(flags=flags | STATE_FLAG_ERROR)
        except PkernfsError as e:
            log.error("%s: cannot note the error: %s", self.region.name, e)
        self.read_only = True

    def sync(self) -> None:
        """Bring everything to where the region is kept (nothing to do for memory)."""
        if not self.read_only:
            self.region.sync()

    # ------------------------------------------------------------------ inodes

    def inode(self, ino: int) -> Inode:
        """The inode of that number.

        :raises NotFoundError: there is none.
        """
        return self._inodes.get(ino)

    def stat(self, ino: int) -> Stat:
        """What stat(2) tells of an inode; cheaper than the inode itself if that is not in memory.

        :raises NotFoundError: there is none.
        """
        return self._inodes.stat(ino)

    def numbers(self) -> Iterator[int]:
        """Every inode number in use, ascending. Others may run in between: what is there all the
        time is returned once, whatever name it has.
        """
        for ino in self._inodes.numbers():
            yield ino
            self._inodes.trim()

    @property
    def cookies(self) -> dict[int, Any]:
        """For the caller to keep what it made of an inode's attributes, by number.

        An entry goes when the inode changes; all go when there are too many.
        """
        return self._inodes.cookies

    def remember(self, ino: int, n: int = 1) -> None:
        """The kernel knows the inode ``n`` times more."""
        self._lookups[ino] = self._lookups.get(ino, 0) + n

    def forget(self, ino: int, n: int) -> None:
        """The kernel knows the inode ``n`` times less; one without names goes with the last."""
        left = self._lookups.get(ino, 0) - n
        if left > 0:
            self._lookups[ino] = left
        else:
            self._lookups.pop(ino, None)
            self._reclaim(ino)

    def open(self, ino: int) -> Inode:
        """Count an open handle; the inode lives at least as long.

        :raises StaleError: the last name of a file was removed since it was looked up.
        """
        inode = self._inodes.get(ino)
        gone = inode.is_reg and not inode.nlink and ino not in self._replaced
        if gone and ino not in self._opens:
            raise StaleError(f"inode {ino}: was removed")
        self._opens[ino] = self._opens.get(ino, 0) + 1
        return inode

    def release(self, ino: int) -> None:
        """An open handle less."""
        left = self._opens.get(ino, 0) - 1
        if left > 0:
            self._opens[ino] = left
        else:
            self._opens.pop(ino, None)
            self._reclaim(ino)

    def _in_use(self, ino: int) -> bool:
        return ino in self._opens or ino in self._lookups

    def _reclaim(self, ino: int) -> None:
        if ino not in self._nameless or self._in_use(ino) or self.read_only:
            return
        self._nameless.discard(ino)
        self._replaced.discard(ino)
        inode = self._inodes.get(ino)
        if not inode.nlink:
            self._evict(inode)

    def _evict(self, inode: Inode) -> None:
        """Free an inode that has no name and all it holds."""
        while inode.is_reg and inode.data_pages:
            with self.store:
                self._inodes.touch(inode)
                self._remove_data(inode)
                self._inodes.save(inode)
        self._blocks.forget_window(inode.ino)
        with self.store:
            self._inodes.touch(inode)
            self._free_inode(inode)

    def _remove_data(self, inode: Inode) -> bool:
        """Free as much of a file's data as fits the transaction; True if that was all."""
        return self._map.remove(inode, 0, LAST_PAGE + 1) == 0

    def _free_inode(self, inode: Inode) -> None:
        self._xattrs.destroy(inode)
        if stat.S_ISLNK(inode.mode) and inode.flags & INODE_FLAG_BODY:
            self._overflow.free(inode.ino, inode.body, inode.size)
        self._inodes.free(inode)

    def _check_writable(self) -> None:
        if self.frozen:
            raise ReadOnlyError("frozen by pkernfs handover")
        if self.read_only:
            raise ReadOnlyError("read-only file system")

    def _directory(self, ino: int) -> Inode:
        inode = self._inodes.get(ino)
        if not inode.is_dir:
            raise NotDirError(f"inode {ino}: not a directory")
        return inode

    def _live_directory(self, ino: int) -> Inode:
        inode = self._directory(ino)
        if not inode.nlink:
            raise NotFoundError(f"inode {ino}: the directory was removed")
        return inode

    # ------------------------------------------------------------------ names

    def lookup(self, parent: int, name: bytes) -> Inode:
        """The inode that a name in a directory means.

        :raises NotFoundError: there is no such name.
        :raises NotDirError: ``parent`` is not a directory.
        """
        ino = self.find(parent, name)
        if not ino:
            raise NotFoundError("no such name")
        return self._named(self._inodes.get(parent), ino)

    def find(self, parent: int, name: bytes) -> int:
        """The inode number that a name in a directory means; 0 if there is no such name.

        :raises NotDirError: ``parent`` is not a directory.
        """
        self._inodes.trim()
        directory = self._directory(parent)
        if name == b".":
            return parent
        if name == b"..":
            return directory.parent
        return self._names.find(directory, name)

    def _named(self, directory: Inode, ino: int) -> Inode:
        try:
            return self._inodes.get(ino)
        except NotFoundError:
            raise CorruptionError(
                f"directory {directory.ino}: a name for inode {ino}, which is free"
            ) from None

    def create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0
    ) -> Inode:
        """Make a file, fifo, socket or device node; ``mode`` includes the type.

        A set-gid directory passes its group on.

        :raises ExistsError: the name is taken.
        """
        kind = stat.S_IFMT(mode)
        if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            raise InvalidError(f"file type {kind:#o}: cannot be made")
        directory = self._check_new(parent, name, kind)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        with self.store:
            inode = self._new_inode(mode, uid, gid)
            inode.nlink = 1
            if kind in (stat.S_IFCHR, stat.S_IFBLK):
                inode.rdev = rdev
            if directory.ino == IOMMU_INO:
                inode.flags |= INODE_FLAG_TABLE
                inode.mode = stat.S_IFREG | 0o400
            self._inodes.save(inode)
            self._enter(directory, name, inode)
        self._tables_changed(directory)
        return inode

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        """Make a directory; a set-gid parent passes group and set-gid bit on.

        :raises ExistsError: the name is taken.
        """
        directory = self._check_new(parent, name, stat.S_IFDIR)
        mode = stat.S_IFDIR | mode & _PERMISSIONS
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            mode |= stat.S_ISGID
        if directory.nlink >= MAX_LINKS:
            raise TooManyLinksError("too many subdirectories")
        with self.store:
            inode = self._new_inode(mode, uid, gid)
            inode.nlink = 2
            inode.parent = directory.ino
            self._inodes.save(inode)
            self._enter(directory, name, inode, links=1)
        return inode

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        """Make a symbolic link.

        :raises ExistsError: the name is taken.
        :raises NameTooLongError: the target has more than 4095 bytes.
        """
        directory = self._check_new(parent, name, stat.S_IFLNK)
        check_target(target)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        with self.store:
            inode = self._new_inode(stat.S_IFLNK | 0o777, uid, gid)
            inode.nlink = 1
            inode.size = len(target)
            if len(target) <= INODE_INLINE_BYTES:
                inode.target = target
            else:
                inode.body = self._overflow.write(inode.ino, target)
                inode.flags |= INODE_FLAG_BODY
            self._inodes.save(inode)
            self._enter(directory, name, inode)
        return inode

    def readlink(self, ino: int) -> bytes:
        """A symbolic link's target.

        :raises InvalidError: not a symbolic link.
        """
        inode = self._inodes.get(ino)
        if not stat.S_ISLNK(inode.mode):
            raise InvalidError(f"inode {ino}: not a symbolic link")
        if inode.flags & INODE_FLAG_BODY:
            return self._overflow.read(ino, inode.body, inode.size)
        return inode.target

    def link(self, ino: int, parent: int, name: bytes) -> Inode:
        """Give an inode another name.

        :raises ExistsError: the name is taken.
        :raises PermissionDeniedError: a directory, or a file of /iommu.
        """
        inode = self._inodes.get(ino)
        if inode.is_dir or inode.flags & INODE_FLAG_TABLE:
            raise PermissionDeniedError(f"inode {ino}: cannot have a second name")
        directory = self._check_new(parent, name, stat.S_IFMT(inode.mode))
        if not inode.nlink:
            raise NotFoundError(f"inode {ino}: was removed")
        if inode.nlink >= MAX_LINKS:
            raise TooManyLinksError(f"inode {ino}: too many names")
        with self.store:
            self._inodes.touch(inode)
            inode.nlink += 1
            inode.ctime = self._clock()
            self._inodes.save(inode)
            self._enter(directory, name, inode)
        return inode

    def _check_new(self, parent: int, name: bytes, kind: int) -> Inode:
        self._check_writable()
        directory = self._live_directory(parent)
        check_name(name)
        if parent == IOMMU_INO and not (kind == stat.S_IFREG and is_table_name(name)):
            raise PermissionDeniedError("iommu: only root-pgtables and dom-N live here")
        if self._names.find(directory, name):
            raise ExistsError("name exists")
        return directory

    def _new_inode(self, mode: int, uid: int, gid: int) -> Inode:
        inode = self._inodes.new(mode)
        inode.uid = uid
        inode.gid = gid
        inode.atime = inode.mtime = inode.ctime = inode.btime = self._clock()
        return inode

    def _enter(self, directory: Inode, name: bytes, inode: Inode, links: int = 0) -> None:
        self._inodes.touch(directory)
        self._names.add(directory, name, inode.ino, inode.mode >> 12)
        directory.nlink += links
        directory.mtime = directory.ctime = self._clock()
        self._inodes.save(directory)
        self._leave_reserve()

    def unlink(self, parent: int, name: bytes) -> None:
        """Take a name away; the inode goes with its last name, last handle and last look-up.

        :raises NotFoundError, IsDirError: not a name, or a directory's.
        """
        self._check_writable()
        directory = self._live_directory(parent)
        found = self._names.locate(directory, name)
        if found is None:
            raise NotFoundError("no such name")
        inode = self._named(directory, found[1])
        if inode.is_dir:
            raise IsDirError("is a directory")
        if inode.nlink == 1:
            self._check_unpinned(inode)
        with self.store:
            self._leave(directory, name, found[0])
            done = self._drop_link(inode)
        self._tables_changed(directory)
        if not done:
            self._evict(inode)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory.

        :raises NotDirError, NotEmptyError, BusyError: not one, not empty, or /iommu.
        """
        self._check_writable()
        directory = self._live_directory(parent)
        found = self._names.locate(directory, name)
        if found is None:
            raise NotFoundError("no such name")
        inode = self._named(directory, found[1])
        self._check_removable_dir(inode)
        with self.store:
            self._leave(directory, name, found[0], links=1)
            self._drop_dir(inode)

    def _check_removable_dir(self, inode: Inode) -> None:
        if not inode.is_dir:
            raise NotDirError("not a directory")
        if inode.ino in (ROOT_INO, IOMMU_INO):
            raise BusyError("iommu: always there")
        if inode.size:
            raise NotEmptyError("directory not empty")

    def _leave(self, directory: Inode, name: bytes, key: int, links: int = 0) -> None:
        self._inodes.touch(directory)
        self._names.remove(directory, name, key)
        directory.nlink -= links
        directory.mtime = directory.ctime = self._clock()
        self._inodes.save(directory)

    def _drop_link(self, inode: Inode, *, replaced: bool = False) -> bool:
        """One name less; False if the inode is to be evicted after the transaction.

        ``replaced``: the name goes on to be another inode's.
        """
        self._inodes.touch(inode)
        if not inode.nlink:
            raise CorruptionError(f"inode {inode.ino}: a name, but a link count of 0")
        inode.nlink -= 1
        inode.ctime = self._clock()
        if inode.nlink:
            self._inodes.save(inode)
            return True
        self._blocks.forget_window(inode.ino)
        # Who has looked the name up may be about to open it: the old file is as good as the new,
        # and to be told to look again and again, while it is replaced as often, is no answer.
        if replaced and inode.is_reg and inode.ino in self._lookups:
            self._replaced.add(inode.ino)
        if inode.ino in self._opens or inode.ino in self._replaced:
            self._nameless.add(inode.ino)
            self._inodes.save(inode)
            return True
        # Nobody can open it any more: its space is free at once, its number when it is forgotten.
        whole = not inode.is_reg or not inode.data_pages or self._remove_data(inode)
        if whole and inode.ino not in self._lookups:
            self._free_inode(inode)
            return True
        self._nameless.add(inode.ino)
        self._inodes.save(inode)
        return whole or inode.ino in self._lookups

    def _drop_dir(self, inode: Inode) -> None:
        self._inodes.touch(inode)
        inode.nlink = 0
        inode.ctime = self._clock()
        if self._in_use(inode.ino):
            self._nameless.add(inode.ino)
            self._inodes.save(inode)
        else:
            self._free_inode(inode)

    # ------------------------------------------------------------------ rename

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """Rename, replace or exchange, as renameat2(2).

        :raises InvalidError: unknown flags, or a directory into itself.
        """
        self._check_writable()
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise InvalidError(f"rename flags {flags:#x}: not supported")
        source = self._live_directory(parent)
        target = self._live_directory(new_parent)
        found = self._names.locate(source, name)
        if found is None:
            raise NotFoundError("no such name")
        if new_name in (b".", b"..") or name in (b".", b".."):
            raise BusyError("name is . or ..")
        check_name(new_name)
        inode = self._named(source, found[1])
        taken = self._names.locate(target, new_name)
        if flags & RENAME_EXCHANGE:
            if taken is None:
                raise NotFoundError("no such name")
            self._exchange(source, name, found[0], inode, target, new_name, taken)
            return
        if taken is not None and flags & RENAME_NOREPLACE:
            raise ExistsError("name exists")
        if taken is not None and taken[1] == inode.ino:
            return
        self._check_move(inode, source, name, target, new_name)
        old = self._named(target, taken[1]) if taken is not None else None
        if old is not None:
            self._check_replace(inode, old)
        done = True
        with self.store:
            self._inodes.touch(source)
            self._inodes.touch(target)
            self._inodes.touch(inode)
            self._names.remove(source, name, found[0])
            if taken is not None:
                self._names.replace(target, new_name, taken[0], inode.ino, inode.mode >> 12)
            else:
                self._names.add(target, new_name, inode.ino, inode.mode >> 12)
            if inode.is_dir:
                source.nlink -= 1
                target.nlink += 1
                inode.parent = target.ino
            now = self._clock()
            inode.ctime = now
            source.mtime = source.ctime = target.mtime = target.ctime = now
            if old is not None and old.is_dir:
                target.nlink -= 1
            self._inodes.save(inode)
            self._inodes.save(source)
            if target is not source:
                self._inodes.save(target)
            if old is not None:
                if old.is_dir:
                    self._drop_dir(old)
                else:
                    done = self._drop_link(old, replaced=True)
        self._tables_changed(target)
        if not done and old is not None:
            self._evict(old)

    def _check_move(
        self, inode: Inode, source: Inode, name: bytes, target: Inode, new_name: bytes
    ) -> None:
        if inode.ino == IOMMU_INO:
            raise BusyError("iommu: always there")
        if (source.ino == IOMMU_INO) != (target.ino == IOMMU_INO):
            raise PermissionDeniedError("iommu: files do not move in or out")
        if target.ino == IOMMU_INO:
            self._check_table_move(inode, name, new_name)
        if inode.is_dir and source is not target:
            self._check_not_below(inode, target)
            if target.nlink >= MAX_LINKS:
                raise TooManyLinksError("too many subdirectories")

    def _check_table_move(self, inode: Inode, name: bytes, new_name: bytes) -> None:
        """A domain that nothing uses may get another number."""
        if not is_table_name(new_name):
            raise PermissionDeniedError("iommu: only root-pgtables and dom-N live here")
        if not (name.startswith(b"dom-") and new_name.startswith(b"dom-")):
            raise PermissionDeniedError("iommu: root-pgtables has no other name")
        self._check_unpinned(inode)

    def _check_not_below(self, inode: Inode, directory: Inode) -> None:
        """:raises InvalidError: ``directory`` is ``inode`` or below it."""
        at = directory
        for _ in range(self._inodes.used + 1):
            if at.ino == inode.ino:
                raise InvalidError("a directory cannot move into itself")
            if at.ino == ROOT_INO:
                return
            at = self._inodes.get(at.parent)
        raise CorruptionError(f"directory {directory.ino}: its parents are a loop")

    def _check_replace(self, inode: Inode, old: Inode) -> None:
        if inode.is_dir:
            self._check_removable_dir(old)
        elif old.is_dir:
            raise IsDirError("is a directory")
        elif old.nlink == 1:
            self._check_unpinned(old)

    def _exchange(
        self,
        source: Inode,
        name: bytes,
        key: int,
        inode: Inode,
        target: Inode,
        new_name: bytes,
        taken: tuple[int, int, int],
    ) -> None:
        other = self._named(target, taken[1])
        if inode.ino == other.ino:
            return
        for one, to in ((inode, target), (other, source)):
            if one.ino == IOMMU_INO:
                raise BusyError("iommu: always there")
            if one.is_dir and source is not target:
                self._check_not_below(one, to)
        if IOMMU_INO in (source.ino, target.ino) and source is not target:
            raise PermissionDeniedError("iommu: files do not move in or out")
        if source.ino == IOMMU_INO:
            self._check_table_move(inode, name, new_name)
            self._check_table_move(other, new_name, name)
        with self.store:
            for touched in (source, target, inode, other):
                self._inodes.touch(touched)
            self._names.replace(source, name, key, other.ino, other.mode >> 12)
            self._names.replace(target, new_name, taken[0], inode.ino, inode.mode >> 12)
            if source is not target:
                moved = inode.is_dir - other.is_dir
                source.nlink -= moved
                target.nlink += moved
                if inode.is_dir:
                    inode.parent = target.ino
                if other.is_dir:
                    other.parent = source.ino
            now = self._clock()
            inode.ctime = other.ctime = now
            source.mtime = source.ctime = target.mtime = target.ctime = now
            for touched in (source, target, inode, other):
                self._inodes.save(touched)
        self._tables_changed(target)

    # ------------------------------------------------------------------ directories

    def opendir(self, ino: int) -> Inode:
        """:meth:`open` for a directory.

        :raises NotDirError: it is none.
        """
        self._directory(ino)
        return self.open(ino)

    def readdir(self, ino: int, cookie: int) -> Iterator[tuple[bytes, int, int, int]]:
        """``(name, inode number, type, cookie)`` of the entries behind ``cookie`` (0: all).

        ``.`` and ``..`` are not among them. A cookie stays good while entries come and go: an
        entry that is there all the time is returned once. The iterator itself must not be used
        across a change.
        """
        self._inodes.trim()
        directory = self._directory(ino)
        if directory.flags & INODE_FLAG_BODY:
            yield from self._names.entries(directory, cookie + 1 if cookie else 0)

    # ------------------------------------------------------------------ attributes

    def setattr(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
        privileged: bool = True,
        group_member: bool = True,
    ) -> Inode:
        """Change attributes. Times are ns since 1970; times beyond the format's are clamped.

        A new owner or group clears the set-id bits of a file, and so does a new size unless
        ``privileged``; a mode set by someone who is neither ``privileged`` nor in the group loses
        set-gid. Growing allocates, shrinking frees.

        :raises IsDirError, InvalidError, TooBigError, PermissionDeniedError: a bad size.
        :raises NoSpaceError: nothing was changed.
        """
        self._check_writable()
        inode = self._inodes.get(ino)
        if size is not None:
            self._check_resize(inode, size)
            if size > inode.size:
                self._grow(inode, size)
            elif size < inode.size:
                self._check_unpinned(inode, size // PAGE)
        with self.store:
            self._inodes.touch(inode)
            now = self._clock()
            inode.ctime = now
            if mode is not None:
                self._set_mode(inode, mode, privileged or group_member)
            if uid is not None or gid is not None:
                self._set_owner(inode, uid, gid)
            if size is not None:
                inode.mtime = now
                if not privileged:
                    clear_set_id(inode)
                self._set_size(inode, size)
            if atime is not None:
                inode.atime = _clamp(atime)
            if mtime is not None:
                inode.mtime = _clamp(mtime)
            self._inodes.save(inode)
        if inode.flags & INODE_FLAG_PENDING:
            self._finish_pending(inode)
        if size is not None and inode.flags & INODE_FLAG_TABLE:
            self.tables.refresh()
        return inode

    def _set_mode(self, inode: Inode, mode: int, may_set_gid: bool) -> None:
        mode &= _PERMISSIONS
        if not may_set_gid and not inode.is_dir:
            mode &= ~stat.S_ISGID
        inode.mode = stat.S_IFMT(inode.mode) | mode

    def _set_owner(self, inode: Inode, uid: int | None, gid: int | None) -> None:
        if uid is not None:
            inode.uid = uid
        if gid is not None:
            inode.gid = gid
        if not inode.is_dir:
            clear_set_id(inode)

    def _check_resize(self, inode: Inode, size: int) -> None:
        if inode.is_dir:
            raise IsDirError(f"inode {inode.ino}: is a directory")
        if not inode.is_reg:
            raise InvalidError(f"inode {inode.ino}: not a regular file")
        if size < 0:
            raise InvalidError("negative size")
        if size > MAX_FILE_BYTES - BLOCK:
            raise TooBigError(f"size {size}: expected at most {MAX_FILE_BYTES - BLOCK}")
        if inode.flags & INODE_FLAG_TABLE and (size < inode.size or size % BLOCK):
            raise PermissionDeniedError("a table file only grows, in steps of 2 MiB")

    # ------------------------------------------------------------------ sizes

    def _grow(self, inode: Inode, size: int) -> None:
        """Allocate what a larger size needs, in transactions of its own.

        What is allocated beyond the old size reads as zeros and is invisible until the size
        follows, so each of them leaves the file as it was.
        """
        self._promote(inode, size)
        first = inode.size // PAGE
        self._fill(inode, first, -(-size // PAGE), size)

    def _fill(self, inode: Inode, start: int, end: int, size: int) -> None:
        """Allocate file pages start..end-1 in as few transactions as they fit; or nothing."""
        added: list[tuple[int, int]] = []
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
        self, inode: Inode, start: int, end: int, size: int, added: list[tuple[int, int]]
    ) -> None:
        with self.store:
            self._inodes.touch(inode)
            new = self._map.fill(inode, start, end, size)
            if new:
                self._inodes.save(inode)
                self._leave_reserve()
        added += [(file_page, count) for file_page, _page, count in new]

    def _remove_range(self, inode: Inode, start: int, end: int) -> None:
        while end > start:
            with self.store:
                self._inodes.touch(inode)
                end = self._map.remove(inode, start, end)
                self._inodes.save(inode)

    def _promote(self, inode: Inode, size: int) -> None:
        """Move a file that outgrows 4 KiB pages into a block."""
        if not self._map.needs_promotion(inode, size):
            return
        if self._holder(inode, 0, PAGES_PER_BLOCK) is not None:
            return  # a device would go on using the pages
        try:
            with self.store:
                block = self._blocks.choose(-(-size // BLOCK), inode.ino)
        except NoSpaceError:
            return  # it stays in pages
        try:
            for file_page, page, count in self._map.within(inode, 0, PAGES_PER_BLOCK):
                self.region.copy_in(
                    block * BLOCK + file_page * PAGE, self.region.view(page * PAGE, count * PAGE)
                )
            with self.store:
                self._inodes.touch(inode)
                self._blocks.take_chosen(block)
                self._map.promote(inode, block)
                self._inodes.save(inode)
        except PkernfsError:
            self._blocks.release_chosen(block)
            raise

    def _set_size(self, inode: Inode, size: int) -> None:
        """Inside a transaction: the new size, and what a smaller one frees."""
        old = inode.size
        inode.size = size
        if size > old or not inode.data_pages:
            return
        self._blocks.forget_window(inode.ino)
        kept = self._map.units_end(inode, size)
        left = self._map.remove(inode, kept // PAGE, LAST_PAGE + 1)
        if left > kept // PAGE or min(kept, old) > size:
            self._set_pending(inode, size, PENDING_TO_END)

    def _set_pending(self, inode: Inode, start: int, end: int) -> None:
        inode.flags |= INODE_FLAG_PENDING
        inode.pending_start = start
        inode.pending_end = end

    @staticmethod
    def _clear_pending(inode: Inode) -> None:
        inode.flags &= ~INODE_FLAG_PENDING
        inode.pending_start = inode.pending_end = 0

    def _finish_pending(self, inode: Inode) -> None:
        """Free the whole units of the pending range, zero the rest of it, clear it."""
        start, end = inode.pending_start, inode.pending_end
        first, last = -(-start // PAGE), min(end // PAGE, LAST_PAGE + 1)
        while last > first:
            with self.store:
                self._inodes.touch(inode)
                last = self._map.remove(inode, first, last)
                self._inodes.save(inode)
        self._zero_mapped(inode, start, end)
        with self.store:
            self._inodes.touch(inode)
            self._clear_pending(inode)
            self._inodes.save(inode)

    def _zero_mapped(self, inode: Inode, start: int, end: int) -> None:
        """Zero the bytes start..end-1 of a file where it has memory."""
        for offset, at, length in self._pieces(inode, start, end):
            del offset
            self.region.zero(at, length)

    def _pieces(self, inode: Inode, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """``(file offset, region offset, length)`` of the memory of bytes start..end-1."""
        if end <= start:
            return
        for file_page, page, count in self._map.within(inode, start // PAGE, -(-end // PAGE)):
            low = max(start, file_page * PAGE)
            high = min(end, (file_page + count) * PAGE)
            yield low, page * PAGE + low - file_page * PAGE, high - low

    # ------------------------------------------------------------------ data

    def read(self, ino: int, offset: int, length: int) -> bytes | memoryview:
        """Up to ``length`` bytes; fewer at the end of the file, zeros in holes.

        A view of the region itself if one extent has it all: good until the next operation.
        """
        inode = self._inodes.get(ino)
        if not inode.is_reg:
            raise IsDirError(f"inode {ino}: not a regular file")
        length = min(length, inode.size - offset)
        if length <= 0:
            return b""
        if not self.read_only:
            self._update_atime(inode)
        page, skip = divmod(offset, PAGE)
        found = self._map.at(inode, page)
        pending = inode.flags & INODE_FLAG_PENDING
        if found is not None and not pending and (found[0] + found[2]) * PAGE >= offset + length:
            return self.region.view((found[1] + page - found[0]) * PAGE + skip, length)
        data = bytearray(length)
        for low, at, count in self._pieces(inode, offset, offset + length):
            data[low - offset : low - offset + count] = self.region.view(at, count)
        if pending:  # a read-only mount cannot finish it
            low = max(inode.pending_start - offset, 0)
            high = min(inode.pending_end - offset, length)
            data[low:high] = bytes(max(high - low, 0))
        return bytes(data)

    def _update_atime(self, inode: Inode) -> None:
        """As with relatime: the first read after a change, and once a day."""
        atime = inode.atime
        if atime > inode.mtime and atime > inode.ctime and self._clock() - atime < _DAY_NS:
            return
        with self.store:
            self._inodes.touch(inode, content=False)
            inode.atime = self._clock()
            self._inodes.save(inode)

    def write(
        self, ino: int, offset: int, data: bytes | memoryview, privileged: bool = True
    ) -> int:
        """Write at ``offset``: all of it, or an error and nothing.

        A daemon that stops in between leaves the old size or the new one with all the data; what
        was there before the old end (holes of a file in blocks included) may be old in part.

        :raises NoSpaceError: nothing was written.
        :raises PermissionDeniedError: a table file.
        """
        self._check_writable()
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
        if self._map.holes(inode, first, last):
            self._promote(inode, size)
            if size > BLOCK // 2 or last - first > PAGES_PER_BLOCK // 2:
                self._fill(inode, first, last, size)
        marked = self._mark_tail(inode, max(inode.size, offset), end)
        try:
            with self.store:
                self._inodes.touch(inode)
                # New pages are not reachable before the commit: so the data is there with them.
                if self._map.fill(inode, first, last, size):
                    self._leave_reserve()
                for low, at, count in self._pieces(inode, offset, end):
                    self.region.copy_in(at, memoryview(data)[low - offset : low - offset + count])
                inode.size = size
                inode.mtime = inode.ctime = self._clock()
                if not privileged:
                    clear_set_id(inode)
                if marked:
                    self._clear_pending(inode)
                self._inodes.save(inode)
        except PkernfsError:
            if marked:
                self._finish_pending(inode)
            raise
        return len(data)

    def _mark_tail(self, inode: Inode, start: int, end: int) -> bool:
        """Before data goes into memory that the file has beyond its end: let a mount zero it.

        Without that, what a write that was cut has stored there would come to light when the
        file grows. False if there is no such memory, or if the data stays before the end.
        """
        if start >= end or not any(self._pieces(inode, start, end)):
            return False
        with self.store:
            self._inodes.touch(inode)
            self._set_pending(inode, start, end)
            self._inodes.save(inode)
        return True

    # ------------------------------------------------------------------ fallocate and seek

    def fallocate(self, ino: int, mode: int, offset: int, length: int) -> None:
        """Allocate, punch or zero a range, as fallocate(2).

        :raises NotSupportedError: another mode.
        """
        for _ in self.fallocate_steps(ino, mode, offset, length):
            pass

    def fallocate_steps(self, ino: int, mode: int, offset: int, length: int) -> Iterator[None]:
        """:meth:`fallocate` in pieces of less than a millisecond: others may run at each yield."""
        self._check_writable()
        inode = self._inodes.get(ino)
        if inode.is_dir or not inode.is_reg:
            raise NotSupportedError(f"inode {ino}: not a regular file")
        if offset < 0 or length <= 0:
            raise InvalidError("bad range")
        if offset + length > MAX_FILE_BYTES - BLOCK:
            raise TooBigError("range beyond the largest file")
        if inode.flags & INODE_FLAG_TABLE:
            raise PermissionDeniedError("a table file: it is sized with truncate")
        if mode == FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE:
            self._punch(inode, offset, offset + length)
        elif mode & ~FALLOC_KEEP_SIZE in (0, FALLOC_ZERO_RANGE):
            end = offset + length
            size = max(inode.size, end)
            self._promote(inode, size)
            self._fill(inode, offset // PAGE, -(-end // PAGE), size)
            if mode & FALLOC_ZERO_RANGE:
                yield from self._zero_steps(ino, offset, end)
            self._finish_fallocate(ino, mode, end)
        else:
            raise NotSupportedError(f"fallocate mode {mode:#x}: not supported")

    def _finish_fallocate(self, ino: int, mode: int, end: int) -> None:
        inode = self._inodes.get(ino)
        with self.store:
            self._inodes.touch(inode)
            inode.ctime = self._clock()
            grows = end > inode.size and not mode & FALLOC_KEEP_SIZE
            if grows:
                inode.size = end
            if grows or mode & FALLOC_ZERO_RANGE:
                inode.mtime = inode.ctime
            self._inodes.save(inode)

    def _zero_steps(self, ino: int, start: int, end: int) -> Iterator[None]:
        while start < end:
            inode = self._inodes.get(ino)
            stop = min(end, start + _ZERO_STEP_BYTES)
            self._zero_mapped(inode, start, min(stop, inode.size))
            start = stop
            if start < end:
                yield
                self._check_writable()

    def _punch(self, inode: Inode, start: int, end: int) -> None:
        if start >= inode.size:
            end = max(end, start)
        elif end >= inode.size:
            end = -(-max(end, inode.size) // BLOCK) * BLOCK
        self._check_unpinned(inode, start // PAGE, -(-end // PAGE))
        with self.store:
            self._inodes.touch(inode)
            self._set_pending(inode, start, end)
            inode.mtime = inode.ctime = self._clock()
            self._inodes.save(inode)
        self._finish_pending(inode)

    def seek(self, ino: int, offset: int, whence: int) -> int:
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

    def pieces(self, ino: int, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """``(file offset, region offset, length)`` in bytes of the memory of a range of a file."""
        return self._pieces(self._inodes.get(ino), offset, offset + length)

    def extents(self, ino: int) -> list[Extent]:
        """Where a file's bytes are, in file order; only what lies before its end."""
        inode = self._inodes.get(ino)
        if not inode.is_reg:
            raise InvalidError(f"inode {ino}: not a regular file")
        return [
            Extent(file_page * PAGE, count * PAGE, page * PAGE)
            for file_page, page, count in self._map.within(inode, 0, -(-inode.size // PAGE))
        ]

    # ------------------------------------------------------------------ extended attributes

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """:raises NoDataError: there is no such attribute."""
        return self._xattrs.get(self._inodes.get(ino), name)

    def listxattr(self, ino: int) -> list[bytes]:
        """Names of the attributes, with their namespaces."""
        return self._xattrs.list(self._inodes.get(ino))

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute; ``flags`` are XATTR_CREATE and XATTR_REPLACE.

        :raises ExistsError, NoDataError, NotSupportedError, ArgumentTooLongError: as setxattr(2).
        """
        self._check_writable()
        inode = self._inodes.get(ino)
        with self.store:
            self._inodes.touch(inode)
            self._xattrs.set(inode, name, bytes(value), flags)
            inode.ctime = self._clock()
            self._inodes.save(inode)
            self._leave_reserve()

    def removexattr(self, ino: int, name: bytes) -> None:
        """:raises NoDataError: there is no such attribute."""
        self._check_writable()
        inode = self._inodes.get(ino)
        with self.store:
            self._inodes.touch(inode)
            self._xattrs.remove(inode, name)
            inode.ctime = self._clock()
            self._inodes.save(inode)

    # ------------------------------------------------------------------ space

    def statfs(self) -> StatFs:
        """Space in 4 KiB units; every block of the region is either free or used.

        A few pages are free but not available: they are kept for what frees others.
        """
        free = self._blocks.free_blocks * PAGES_PER_BLOCK + self._pages.free_pages
        spare = len(self._inodes) - self._inodes.used
        free_files = spare + free * 15
        return StatFs(
            block_size=PAGE,
            blocks=(self._blocks.total_blocks - self._static_blocks) * PAGES_PER_BLOCK,
            free=free,
            available=max(free - _RESERVED_PAGES, 0),
            files=self._inodes.used + free_files,
            free_files=free_files,
        )

    def claim_zeroing(self, blocks: list[tuple[int, int]]) -> Claim:
        """Keep blocks from being allocated while the caller zeroes them."""
        return self._blocks.claim(blocks)

    def next_dirty(self, most_bytes: int) -> Claim | None:
        """Claim some free blocks that need zeroing; None if there are none."""
        if self.read_only:
            return None
        return self._blocks.next_dirty(max(1, most_bytes // BLOCK))

    def finish_zeroing(self, claim: Claim) -> None:
        """The claimed blocks are zero now: record that, and let them be allocated."""
        if self.read_only:
            self._blocks.release(claim)
            return
        try:
            with self.store:
                self._blocks.finish(claim)
        except PkernfsError:
            self._blocks.release(claim)
            raise

    def abandon_zeroing(self, claim: Claim) -> None:
        """The claimed blocks were not zeroed."""
        self._blocks.release(claim)

    def run(self, operation: Callable[[], T]) -> T:
        """Carry out an operation for a caller without an event loop: zeroes what it needs."""
        while True:
            try:
                return operation()
            except ZeroingNeeded as e:
                claim = self.claim_zeroing(e.blocks)
                for offset, length in claim.pieces():
                    self.region.zero(offset, length)
                self.finish_zeroing(claim)


def clear_set_id(inode: Inode) -> None:
    """Clear set-uid, and set-gid where it means a group to run as."""
    inode.mode &= ~stat.S_ISUID
    if inode.mode & stat.S_IXGRP:
        inode.mode &= ~stat.S_ISGID


def _history_entry(
    before: StateFields, arrival: manifest.Arrival, boot_id: int | bytes
) -> HistoryFields | None:
    """What the history is told of a mount; None if it is an ordinary one."""
    record = arrival.record
    if record is None and arrival.kind != ARRIVAL_LIVE_UPDATE:
        return None
    assert isinstance(boot_id, bytes)
    return HistoryFields(
        record.number if record else 0,
        record.handed_over_at if record else 0,
        arrival.mounted_at,
        record.boot_id if record else before.boot_id,
        boot_id,
        arrival.kind,
        arrival.result,
        len(arrival.changes),
    )


def _address(physical: int) -> str:
    return "none" if physical == NO_PHYSICAL else f"{physical:#x}"


def _clamp(ns: int) -> int:
    return max(-_S64_MAX - 1, min(ns, _S64_MAX))


def _boot_id() -> bytes:
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return bytes.fromhex(f.read().strip().replace("-", ""))
    except OSError:
        return bytes(16)
