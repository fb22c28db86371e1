"""Metadata pages and the transactions that change them.

A transaction works on private images of pages. Committing stores the words that differ as one
redo record and then in place (docs/format.md, section 9); giving up drops the images. So a change
is all or nothing at every store, and nothing has to be undone in the region. One transaction at a
time, and no await inside one.

What the pages mean is not this module's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import NamedTuple

from pkernfs._native import ffi, lib
from pkernfs.errors import CorruptionError, NoSpaceError, ReadOnlyError
from pkernfs.layout import (
    HEADER,
    MAGIC_NAMES,
    PAGE,
    RECORD,
    RUN,
)
from pkernfs.region import Region

MAX_PAGES = 1024
SAFE_PAGES = 400  # their images fill less than the 2 MiB of the journal
_ZERO_PAGE = bytes(PAGE)
_unpack_magic = Struct("<I").unpack_from
_MAX_VERIFIED = 1 << 17

JOURNAL_EMPTY = 0
JOURNAL_PENDING = 1
JOURNAL_DAMAGED = -1


class TransactionTooLarge(NoSpaceError):
    """More changed pages than one journal record holds; the caller splits the change."""


class PageStore:
    """Checked reads of metadata pages, and transactions over them.

    Use it as a context manager for one transaction: leaving the block commits, an exception drops
    every change. ``on_commit`` and ``on_abort`` callbacks keep what is derived in memory in step.
    """

    def __init__(
        self, region: Region, uuid: bytes, journal_page: int, journal_pages: int, total_pages: int
    ) -> None:
        self.region = region
        self.uuid = uuid
        self.total_pages = total_pages
        self.on_commit: list[Callable[[], object]] = []
        self.on_abort: list[Callable[[], object]] = []
        self._view = region.view(0, total_pages * PAGE)
        self._journal = journal_page * PAGE
        self._capacity = journal_pages * PAGE
        self.sequence = 0  # of the last transaction that changed something
        self._verified: dict[int, int] = {}
        self._overlay: dict[int, bytearray] = {}
        self._images: dict[int, memoryview] = {}
        self._arena = ffi.new("uint8_t[]", MAX_PAGES * PAGE)
        self._arena_view = memoryview(ffi.buffer(self._arena))
        self._slots: list[memoryview] = []
        self._numbers = ffi.new("uint64_t[]", MAX_PAGES)
        self._fresh = ffi.new("uint8_t[]", MAX_PAGES)
        self._used = 0
        self._open = False
        self._uuid_c = ffi.from_buffer("uint8_t[]", uuid)

    # ------------------------------------------------------------------ recovery

    def journal_state(self) -> int:
        """``JOURNAL_EMPTY``, ``JOURNAL_PENDING`` (a whole record waits) or ``JOURNAL_DAMAGED``."""
        return int(
            lib.pk_journal_state(
                self.region.base, self.region.size, self._journal, self._capacity, self._uuid_c
            )
        )

    def recover(self, *, write: bool = True) -> bool:
        """Carry out a pending record: in the region, or unless ``write`` in private copies.

        Returns whether there was one.

        :raises CorruptionError: the record is damaged.
        """
        state = self.journal_state()
        if state == JOURNAL_DAMAGED:
            raise CorruptionError(f"journal at {self._journal:#x}: damaged record: run fsck")
        if state == JOURNAL_EMPTY:
            return False
        if write and self.region.writable:
            lib.pk_journal_replay(self.region.base, self._journal)
        else:
            self._replay_in_memory()
        self._verified.clear()
        return True

    def _replay_in_memory(self) -> None:
        length = RECORD.unpack_from(self._view, self._journal)[4]
        at = self._journal + RECORD.size
        end = at + length
        while at < end:
            offset, words = RUN.unpack_from(self._view, at)
            at += RUN.size
            self._overlay_store(offset, self._view[at : at + 8 * words])
            at += 8 * words

    def _overlay_store(self, offset: int, data: memoryview) -> None:
        while len(data):
            number, start = divmod(offset, PAGE)
            length = min(PAGE - start, len(data))
            page = self._overlay.get(number)
            if page is None:
                page = self._overlay[number] = bytearray(
                    self._view[number * PAGE : (number + 1) * PAGE]
                )
            page[start : start + length] = data[:length]
            offset += length
            data = data[length:]

    # ------------------------------------------------------------------ pages

    def read(self, page: int, magic: int) -> memoryview:
        """The current contents of a metadata page: of this transaction, or of the region.

        :raises CorruptionError: out of the region, or not an intact page of that kind.
        """
        image = self._images.get(page)
        if image is not None:
            return image
        if self._verified.get(page) != magic:
            self._verify(page, magic)
        if self._overlay and page in self._overlay:
            return memoryview(self._overlay[page]).toreadonly()
        return self._view[page * PAGE : page * PAGE + PAGE]

    def edit(self, page: int, magic: int) -> memoryview:
        """A private image of a metadata page, to be changed in this transaction."""
        image = self._images.get(page)
        if image is None:
            if self._verified.get(page) != magic:
                self._verify(page, magic)
            image = self._take(page, 0)
            image[:] = self._view[page * PAGE : page * PAGE + PAGE]
        return image

    def new(self, page: int, magic: int, owner: int) -> memoryview:
        """A zeroed image with its header, for a page that nothing refers to yet."""
        image = self._images.get(page)
        if image is None:
            image = self._take(page, 1)
        image[:] = _ZERO_PAGE
        HEADER.pack_into(image, 0, magic, 0, page, owner, self.uuid)
        return image

    def forget(self, page: int) -> None:
        """The page is free from this transaction on: what kind it was is no longer known."""
        self.on_commit.append(lambda: self._verified.pop(page, None))

    def change_now(self, page: int, magic: int, change: Callable[[memoryview], object]) -> None:
        """Change one page for good, as a transaction of its own inside the open one.

        For what has to be known before the open transaction may store in place. ``change`` gets
        the page's image, and the open transaction's own one if it has one.
        """
        changed = self._images.pop(page, None)
        try:
            image = bytearray(self.read(page, magic))
        finally:
            if changed is not None:
                self._images[page] = changed
        change(memoryview(image))
        if changed is not None:
            change(changed)
        self.sequence += 1
        lib.pk_commit(
            self.region.base,
            self._journal,
            self._capacity,
            self.sequence,
            self._uuid_c,
            ffi.from_buffer("uint8_t[]", image),
            ffi.new("uint64_t[]", [page]),
            ffi.new("uint8_t[]", [0]),
            1,
        )

    def commit_words(self, words: Sequence[tuple[int, int]]) -> None:
        """Store ``(region offset, word)`` as one, in that order, each as an aligned 8-byte store.

        For memory that is no metadata page: its own journal record, outside any transaction.

        :raises TransactionTooLarge: more than one record holds; nothing was stored.
        """
        if self._open:
            raise RuntimeError("a transaction is open")
        if not self.region.writable:
            raise ReadOnlyError("read-only file system")
        end = self.total_pages * PAGE
        for offset, _word in words:
            if offset % 8 or not 0 <= offset < end or 0 <= offset - self._journal < self._capacity:
                raise RuntimeError(f"a word cannot be stored at {offset:#x}")
        offsets = ffi.new("uint64_t[]", [offset for offset, _word in words])
        values = ffi.new("uint64_t[]", [word for _offset, word in words])
        self.sequence += 1
        done = lib.pk_commit_words(
            self.region.base,
            self._journal,
            self._capacity,
            self.sequence,
            self._uuid_c,
            offsets,
            values,
            len(words),
        )
        if done < 0:
            raise TransactionTooLarge("change too large for the journal")

    def _take(self, page: int, fresh: int) -> memoryview:
        if not self._open:
            raise RuntimeError("a page is changed outside a transaction")
        used = self._used
        if used == MAX_PAGES:
            raise TransactionTooLarge("change too large for one transaction")
        if used == len(self._slots):
            self._slots.append(self._arena_view[used * PAGE : (used + 1) * PAGE])
        image = self._slots[used]
        self._numbers[used] = page
        self._fresh[used] = fresh
        self._images[page] = image
        self._used = used + 1
        return image

    def _verify(self, page: int, magic: int) -> None:
        kind = MAGIC_NAMES[magic]
        if not 0 <= page < self.total_pages:
            raise CorruptionError(
                f"{kind} {page}: out of the region: expected 0..{self.total_pages - 1}"
            )
        data = self._overlay.get(page) or self._view[page * PAGE : page * PAGE + PAGE]
        got_magic, checksum, itself, _owner, uuid = HEADER.unpack_from(data)
        where = f"{kind} at {page * PAGE:#x}"
        if got_magic != magic:
            raise CorruptionError(
                f"{where}: bad magic: got {got_magic:#010x}, expected {magic:#010x}"
            )
        expected = int(lib.pk_page_crc(ffi.from_buffer("uint8_t[]", data)))
        if checksum != expected:
            raise CorruptionError(
                f"{where}: bad checksum: got {checksum:#010x}, expected {expected:#010x}"
            )
        if itself != page:
            raise CorruptionError(f"{where}: not its own page: got {itself}, expected {page}")
        if uuid != self.uuid:
            raise CorruptionError(f"{where}: of another file system: got {uuid.hex()}")
        if len(self._verified) > _MAX_VERIFIED:
            self._verified.clear()
        self._verified[page] = magic

    # ------------------------------------------------------------------ transactions

    @property
    def pages_changed(self) -> int:
        """Pages changed in the open transaction; up to ``SAFE_PAGES`` always fit one record."""
        return self._used

    @property
    def is_open(self) -> bool:
        """Whether a transaction is open."""
        return self._open

    def __enter__(self) -> PageStore:
        if self._open:
            raise RuntimeError("a transaction is open")
        if not self.region.writable:
            raise ReadOnlyError("read-only file system")
        self._open = True
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._commit()
        else:
            self._abort()

    def _commit(self) -> None:
        if self._used:
            sequence = self.sequence = self.sequence + 1
            done = lib.pk_commit(
                self.region.base,
                self._journal,
                self._capacity,
                sequence,
                self._uuid_c,
                self._arena,
                self._numbers,
                self._fresh,
                self._used,
            )
            if done < 0:
                self._abort()
                raise TransactionTooLarge("change too large for the journal")
            if len(self._verified) > _MAX_VERIFIED:
                self._verified.clear()
            for page, image in self._images.items():
                self._verified[page] = _unpack_magic(image)[0]
        self._images.clear()
        self._used = 0
        self._open = False
        self.on_abort.clear()
        if self.on_commit:
            callbacks = self.on_commit
            self.on_commit = []
            for callback in callbacks:
                callback()

    def _abort(self) -> None:
        self._images.clear()
        self._used = 0
        self._open = False
        self.on_commit.clear()
        callbacks = self.on_abort
        self.on_abort = []
        for callback in reversed(callbacks):
            callback()


class Mapping(NamedTuple):
    """Consecutive addresses that map consecutive memory; ``perm`` has bit 0 for R, 1 for W."""

    iova: int
    physical: int
    length: int
    perm: int


class RawFinding(NamedTuple):
    """What native.c's walk found wrong: a code, and the entry (its address, what it holds)."""

    code: int
    level: int
    iova: int
    where: int
    value: int


class TreeFigures(NamedTuple):
    """What one walk saw: the first findings, how many there were, and sizes."""

    findings: list[RawFinding]
    found: int
    tables: int
    leaves: int
    mapped_bytes: int


NO_PAGE = (1 << 64) - 1
_BROKEN = NO_PAGE - 1
_FREE, _LIVE, _NEW, _DEAD, _ASIDE = range(5)
_SCAN_BATCH = 512


class TablePool:
    """The pages of one domain's page tables, as the loops of native.c see them.

    Which pages are in use is found by :meth:`check`. A change runs between :meth:`begin` and
    :meth:`commit` or :meth:`abort`; pages that it takes are not reachable before the caller's
    commit, and those that it gives back stay as they are until then.

    :param pieces: ``(physical address, region offset, length)`` in bytes, sorted.
    """

    def __init__(self, region: Region, pieces: Sequence[tuple[int, int, int]]) -> None:
        self._base = region.base
        self._pieces = ffi.new("struct pk_piece[]", len(pieces))
        first = 0
        for at, (physical, offset, length) in enumerate(pieces):
            self._pieces[at] = (physical, offset, length, first)
            first += length // PAGE
        self._state = bytearray(first)
        self._state_c = ffi.from_buffer("uint8_t[]", self._state)
        self._pool = ffi.new("struct pk_pool *")
        self._pool.pieces = self._pieces
        self._pool.n_pieces = len(pieces)
        self._pool.state = self._state_c
        self._pool.n_pages = first

    # ------------------------------------------------------------------ pages

    @property
    def free_pages(self) -> int:
        """Pages that a change may take."""
        return self._state.count(_FREE)

    @property
    def used_pages(self) -> int:
        """Pages that are reachable from the top-level table."""
        return self._state.count(_LIVE)

    @property
    def pages_aside(self) -> int:
        """Pages that are free but may not be taken yet."""
        return self._state.count(_ASIDE)

    def begin(self) -> None:
        """Start a change."""
        pool = self._pool
        pool.cursor = pool.wanted = pool.peak = 0
        pool.free = self._state.count(_FREE)

    @property
    def missing_pages(self) -> int:
        """How many free pages too few the change has had so far."""
        return max(0, int(self._pool.peak - self._pool.free))

    def commit(self, *, aside: bool) -> None:
        """What was taken is live; what was given back is free, or put ``aside``."""
        self._become({_NEW: _LIVE, _DEAD: _ASIDE if aside else _FREE})

    def abort(self) -> None:
        """Nothing has changed."""
        self._become({_NEW: _FREE, _DEAD: _LIVE})

    def release(self) -> None:
        """What was put aside is free."""
        self._become({_ASIDE: _FREE})

    def _become(self, changes: dict[int, int]) -> None:
        table = bytes(changes.get(state, state) for state in range(256))
        self._state[:] = self._state.translate(table)

    def is_live(self, physical: int) -> bool:
        """Whether a table that was found by the walk, and is still wanted, is there."""
        return bool(lib.pk_pt_is_live(self._pool, physical))

    def take(self) -> int:
        """Physical address of a free page; ``NO_PAGE``: there is none, which is counted."""
        return int(lib.pk_pt_take(self._pool))

    def give_back(self, physical: int) -> None:
        """The table there is no longer wanted."""
        lib.pk_pt_give_back(self._pool, physical)

    # ------------------------------------------------------------------ tables

    def build(self, level: int, leaf: int, physical: int, perm: int) -> int:
        """A new full table that maps memory from ``physical`` on; its address or ``NO_PAGE``."""
        return int(lib.pk_pt_build(self._base, self._pool, level, leaf, physical, perm))

    def verify(self, table: int, level: int, physical: int, perm: int) -> int | None:
        """Offset in bytes of the first page that is mapped to something else; None: no page."""
        found = int(lib.pk_pt_verify(self._base, self._pool, table, level, physical, perm))
        return None if found == NO_PAGE else found

    def drop(self, table: int, level: int) -> int:
        """Give back a table and all below it; the bytes that it mapped."""
        return int(lib.pk_pt_drop(self._base, self._pool, table, level))

    def copy(self, table: int, level: int, perm: int) -> tuple[int, int]:
        """A copy with other permissions, for the old one: its address or ``NO_PAGE``, and bytes.

        :raises CorruptionError: something below the table is no live table.
        """
        mapped = ffi.new("uint64_t *")
        new = int(lib.pk_pt_copy(self._base, self._pool, table, level, perm, mapped))
        if new == _BROKEN:
            raise CorruptionError(f"page table at {table:#x}: damaged below: run the check")
        return new, int(mapped[0])

    def scan(
        self, root: int, levels: int, start: int, end: int
    ) -> tuple[list[Mapping], int | None] | None:
        """Some mappings from ``start`` on, and where to go on; None: the tables are damaged."""
        out = ffi.new("struct pk_mapping[]", _SCAN_BATCH)
        at = ffi.new("uint64_t *", start)
        count = int(lib.pk_pt_scan(self._base, self._pool, root, levels, at, end, out, _SCAN_BATCH))
        if count < 0:
            return None
        found = [Mapping(m.iova, m.physical, m.length, m.bits) for m in out[0:count]]
        return found, None if at[0] == NO_PAGE else int(at[0])

    def check(
        self,
        root: int,
        levels: int,
        *,
        reserved: Sequence[tuple[int, int]],
        allowed: Sequence[tuple[int, int]],
        tables: Sequence[tuple[int, int]],
        max_findings: int,
    ) -> TreeFigures:
        """Walk all tables below ``root``, each once, and note which pages they are.

        ``reserved`` has masks of a table entry and of a leaf for each level from 0 on; ``allowed``
        and ``tables`` are sorted ranges of physical addresses that leaves may, and must not, reach.
        """
        self._state[:] = bytes(len(self._state))
        c = ffi.new("struct pk_check *")
        c.table_reserved = [table for table, _leaf in reserved]
        c.leaf_reserved = [leaf for _table, leaf in reserved]
        allowed_c = ffi.new("uint64_t[]", [x for pair in allowed for x in pair] or [0])
        tables_c = ffi.new("uint64_t[]", [x for pair in tables for x in pair] or [0])
        found_c = ffi.new("struct pk_finding[]", max_findings)
        c.allowed, c.n_allowed = allowed_c, len(allowed)
        c.tables, c.n_tables = tables_c, len(tables)
        c.found, c.max_found = found_c, max_findings
        lib.pk_pt_check(self._base, self._pool, c, root, levels)
        findings = [
            RawFinding(f.code, f.level, f.iova, f.where, f.value)
            for f in found_c[0 : min(c.n_found, max_findings)]
        ]
        return TreeFigures(findings, c.n_found, c.n_seen, c.n_leaves, c.bytes)


def fill_entries(words: memoryview, first: int, step: int) -> None:
    """A run of leaves into those of ``words`` (8-byte items) that are not present."""
    lib.pk_pt_fill(ffi.from_buffer("uint64_t[]", words), first, step, len(words))


def conflicting_entry(words: memoryview, first: int, step: int) -> int:
    """Index of the first entry that is present and not what that run has there; or the length."""
    entries = ffi.from_buffer("uint64_t[]", words)
    return int(lib.pk_pt_conflict(entries, first, step, len(words)))


def any_present(words: memoryview) -> bool:
    """Whether one of the entries is present."""
    return bool(lib.pk_pt_any(ffi.from_buffer("uint64_t[]", words), len(words)))


def merged_entry(words: memoryview, step: int) -> int:
    """The leaf that can stand for a whole table of leaves of ``step`` bytes; 0: none can."""
    return int(lib.pk_pt_merged(ffi.from_buffer("uint64_t[]", words), step))
