"""Metadata pages and the transactions that change them.

A transaction works on private images of pages. Committing stores the words that differ as one
redo record and then in place (docs/format.md, section 9); giving up drops the images. So a change
is all or nothing at every store, and nothing has to be undone in the region. One transaction at a
time, and no await inside one.

What the pages mean is not this module's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pkernfs.errors import CorruptionError, NoSpaceError, ReadOnlyError
from pkernfs.layout import (
    HEADER,
    MAGIC_NAMES,
    PAGE,
    RECORD,
    RUN,
    uuid_text,
)
from pkernfs.native._native import ffi, lib
from pkernfs.quantities import Ino, PageNo, RegionOff, Word, pages_from
from pkernfs.region.region import Region

MAX_PAGES = 1024
SAFE_PAGES = 400  # their images fill less than the 2 MiB of the journal
_ZERO_PAGE = bytes(PAGE)
_MAX_VERIFIED = 1 << 17
#: So that cffi refuses fewer bytes than C reads.
_C_PAGE = ffi.typeof(f"uint8_t[{PAGE}]")
#: Memory that is not zeroed: to zero 4 MiB of images takes a check or a mount 3 ms.
_allocate = ffi.new_allocator(should_clear_after_alloc=False)

JOURNAL_EMPTY: int = lib.JOURNAL_EMPTY
JOURNAL_PENDING: int = lib.JOURNAL_PENDING
JOURNAL_DAMAGED: int = lib.JOURNAL_DAMAGED


class TransactionTooLarge(NoSpaceError):
    """More changed pages than one journal record holds; the caller splits the change."""


class PageStore:
    """Checked reads of metadata pages, and transactions over them.

    Use it as a context manager for one transaction: leaving the block commits, an exception drops
    every change. ``on_commit`` and ``on_abort`` callbacks keep what is derived in memory in step.
    """

    def __init__(
        self,
        region: Region,
        uuid: bytes,
        journal_page: PageNo,
        journal_pages: int,
        total_pages: int,
    ) -> None:
        self.region = region
        self.uuid = uuid
        self.total_pages = total_pages
        self.on_commit: list[Callable[[], object]] = []
        self.on_abort: list[Callable[[], object]] = []
        self._view = region.view(RegionOff(0), total_pages * PAGE)
        self._journal = RegionOff(journal_page * PAGE)
        self._capacity = journal_pages * PAGE
        self.sequence = 0  # of the last transaction that changed something
        self._verified: dict[PageNo, int] = {}
        self._overlay: dict[PageNo, bytearray] = {}
        self._images: dict[PageNo, memoryview] = {}
        self._made: dict[PageNo, int] = {}  # of them: those of :meth:`new`, and their magic
        #: What callers made of unchanged pages; an entry goes when its page is changed.
        self.decoded: dict[PageNo, Any] = {}
        #: Gets the numbers of the pages that transactions change, if it is a set.
        self.touched: set[PageNo] | None = None
        self._arena = _allocate("uint8_t[]", MAX_PAGES * PAGE)  # whoever takes an image fills it
        self._arena_view = memoryview(ffi.buffer(self._arena))
        self._slots: list[memoryview] = []
        self._numbers = ffi.new("uint64_t[]", MAX_PAGES)
        self._fresh = ffi.new("uint8_t[]", MAX_PAGES)
        self._used = 0
        self._open = False
        self._uuid_c = ffi.from_buffer("uint8_t[16]", uuid)

    @property
    def _place(self) -> tuple[Any, int, RegionOff, int]:
        """The first arguments of what C does with the journal; a closed region has none."""
        return (self.region.base, self.region.size, self._journal, self._capacity)

    # ------------------------------------------------------------------ recovery

    def journal_state(self) -> int:
        """``JOURNAL_EMPTY``, ``JOURNAL_PENDING`` (a whole record waits) or ``JOURNAL_DAMAGED``."""
        return int(lib.pk_journal_state(*self._place, self._uuid_c))

    def recover(self, *, write: bool = True) -> bool:
        """Carry out a pending record: in the region, or unless ``write`` in private copies.

        Returns whether there was one.

        :raises CorruptionError: the record is damaged.
        """
        state = self.journal_state()
        if state == JOURNAL_DAMAGED:
            raise CorruptionError(f"journal at {self._journal:#x}: damaged record")
        if state == JOURNAL_EMPTY:
            return False
        if write and self.region.writable:
            lib.pk_journal_replay(*self._place, self._uuid_c)
        else:
            replay_in_copies(self._view, self._journal, self._overlay)
        self._verified.clear()
        self.decoded.clear()
        return True

    # ------------------------------------------------------------------ pages

    def read(self, page: PageNo, magic: int) -> memoryview:
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

    def edit(self, page: PageNo, magic: int) -> memoryview:
        """A private image of a metadata page, to be changed in this transaction."""
        image = self._images.get(page)
        if image is None:
            if self._verified.get(page) != magic:
                self._verify(page, magic)
            image = self._take(page, 0)
            image[:] = self._view[page * PAGE : page * PAGE + PAGE]
        return image

    def new(self, page: PageNo, magic: int, owner: Ino) -> memoryview:
        """A zeroed image with its header, for a page that nothing refers to yet."""
        image = self._images.get(page)
        if image is None:
            image = self._take(page, 1)
        image[:] = _ZERO_PAGE
        HEADER.pack_into(image, 0, magic, 0, page, owner, self.uuid)
        self._made[page] = magic
        return image

    def forget(self, first: PageNo, count: int = 1) -> None:
        """Pages are free from this transaction on: what kind they were is no longer known."""
        pages = (first,) if count == 1 else pages_from(first, count)
        for page in pages:
            self.decoded.pop(page, None)
            self.on_commit.append(partial(self._verified.pop, page, None))

    def change_now(self, page: PageNo, magic: int, change: Callable[[memoryview], object]) -> None:
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
        done = lib.pk_commit(
            *self._place,
            self.sequence,
            self._uuid_c,
            ffi.from_buffer(_C_PAGE, image),
            ffi.new("uint64_t[]", [page]),
            ffi.new("uint8_t[]", [0]),
            1,
        )
        if done < 0:
            raise _refusal(done)

    def commit_words(self, words: Sequence[Word]) -> None:
        """Store words as one, in that order, each as an aligned 8-byte store.

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
            *self._place, self.sequence, self._uuid_c, offsets, values, len(words)
        )
        if done < 0:
            raise _refusal(done)

    def _take(self, page: PageNo, fresh: int) -> memoryview:
        if not self._open:
            raise RuntimeError("a page is changed outside a transaction")
        used = self._used
        if used == MAX_PAGES:
            raise TransactionTooLarge("change too large for one transaction")
        if used == len(self._slots):
            self._slots.append(self._arena_view[used * PAGE : (used + 1) * PAGE])
        image = self._slots[used]
        self.decoded.pop(page, None)
        self._numbers[used] = page
        self._fresh[used] = fresh
        self._images[page] = image
        self._used = used + 1
        return image

    def _verify(self, page: PageNo, magic: int) -> None:
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
        expected = int(lib.pk_page_crc(ffi.from_buffer(_C_PAGE, data)))
        if checksum != expected:
            raise CorruptionError(
                f"{where}: bad checksum: got {checksum:#010x}, expected {expected:#010x}"
            )
        if itself != page:
            raise CorruptionError(f"{where}: not its own page: got {itself}, expected {page}")
        if uuid != self.uuid:
            raise CorruptionError(f"{where}: of another file system: got {uuid_text(uuid)}")
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
        """Tell if a transaction is open."""
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
                *self._place,
                sequence,
                self._uuid_c,
                self._arena,
                self._numbers,
                self._fresh,
                self._used,
            )
            if done < 0:
                self._abort()
                raise _refusal(done)
            if len(self._verified) > _MAX_VERIFIED:
                self._verified.clear()
            self._verified.update(self._made)  # the others are what they were found to be
            if self.touched is not None:
                self.touched.update(self._images)
        self._images.clear()
        self._made.clear()
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
        self._made.clear()
        self._used = 0
        self._open = False
        self.on_commit.clear()
        callbacks = self.on_abort
        self.on_abort = []
        for callback in reversed(callbacks):
            callback()


def replay_in_copies(view: memoryview, record: RegionOff, pages: dict[PageNo, bytearray]) -> None:
    """Carry out a record in private copies of pages; those that lack are made of ``view``."""
    at = record + RECORD.size
    end = at + RECORD.unpack_from(view, record)[4]
    while at < end:
        offset, words = RUN.unpack_from(view, at)
        at += RUN.size
        data = view[at : at + 8 * words]
        at += 8 * words
        while len(data):
            number, start = PageNo(offset // PAGE), offset % PAGE
            length = min(PAGE - start, len(data))
            page = pages.get(number)
            if page is None:
                page = pages[number] = bytearray(view[number * PAGE : (number + 1) * PAGE])
            page[start : start + length] = data[:length]
            offset += length
            data = data[length:]


def _refusal(code: int) -> Exception:
    """Why C did not commit; nothing that is in use was touched."""
    if code == lib.COMMIT_OUTSIDE:
        return CorruptionError("a change reaches out of the region")
    return TransactionTooLarge("change too large for the journal")
