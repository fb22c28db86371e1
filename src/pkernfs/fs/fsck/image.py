"""The region as the check sees it: its pages, with changes kept in private copies.

A check and a repair are the same work: every change is made to a copy of its page, and only
:meth:`Image.store` brings the copies into the region. A check forgets them. Changes of file data
(zeroing, copying) are written down and carried out by :meth:`Image.store` as well.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from pkernfs.errors import CorruptionError
from pkernfs.fs.fsck.structures import check_header
from pkernfs.journal import PageStore, replay_in_copies
from pkernfs.layout import (
    HEADER,
    JOURNAL_PAGE,
    JOURNAL_PAGES,
    PAGE,
    STATE_FLAG_ERROR,
    STATE_OFFSET,
    STATE_PAGE,
    page_offset,
)
from pkernfs.quantities import Ino, PageNo, RegionOff, RegionRange
from pkernfs.region.checksum import page_checksum
from pkernfs.region.region import Region

Buffer = bytearray | memoryview

_JOURNAL = page_offset(JOURNAL_PAGE)
# With every word changed a record of so many pages still fits.
_BATCH = 400
_MAX_COPY = 8 << 20


class _Copy(NamedTuple):
    """So many bytes to be copied inside the region."""

    source: RegionOff
    target: RegionOff
    length: int


class Image:
    """Pages of a region, overlaid with changes."""

    def __init__(self, region: Region, pages: int) -> None:
        self.region = region
        self.pages = pages
        self.uuid = b""
        #: Gets page, magic, byte in the page and bit in the byte of a bit that was flipped back.
        self.on_flip: Callable[[PageNo, int, int, int], None] = lambda *_: None
        self._view = region.view(RegionOff(0), pages * PAGE)
        self._changed: dict[PageNo, bytearray] = {}
        self._unsealed: set[PageNo] = set()
        self._fresh: set[PageNo] = set()
        self._first: dict[PageNo, bytearray] = {}
        self._between: dict[PageNo, bytearray] = {}
        self._zeroed: list[RegionRange] = []
        self._copied: list[_Copy] = []
        ranges = list(region.data_ranges())
        self._data_starts = [start for start, _ in ranges]
        self._data_ends = [end for _, end in ranges]

    # ------------------------------------------------------------------ reading

    def raw(self, number: PageNo) -> Buffer:
        """A page as it is, unchecked; the number is inside the region."""
        page = self._changed.get(number)
        if page is not None:
            return page
        return self._view[number * PAGE : number * PAGE + PAGE]

    def load(self, number: PageNo, magic: int) -> Buffer:
        """A checked metadata page. A single flipped bit is flipped back.

        :raises CorruptionError: out of the region, or not an intact page of this kind.
        """
        if not 0 <= number < self.pages:
            raise CorruptionError(f"out of the region: got {number:#x}, expected <{self.pages:#x}")
        page = self.raw(number)
        try:
            check_header(page, number, magic, self.uuid, sealed=number not in self._unsealed)
        except CorruptionError:
            bit = None if number in self._changed else flipped_bit(page)
            if bit is None:
                raise
            mended = bytearray(page)
            mended[bit >> 3] ^= 1 << (bit & 7)
            check_header(mended, number, magic, self.uuid)
            page = self.edit(number)
            page[:] = mended
            self.on_flip(number, magic, bit >> 3, bit & 7)
        return page

    def stored(self, number: PageNo) -> memoryview:
        """A page as it is in the region."""
        return self._view[number * PAGE : number * PAGE + PAGE]

    def is_intact(self, number: PageNo) -> bool:
        """Tell if the page is an intact metadata page of this file system, of any kind."""
        if not 0 <= number < self.pages:
            return False
        page = self.raw(number)
        try:
            check_header(page, number, HEADER.unpack_from(page)[0], self.uuid)
        except (CorruptionError, KeyError):
            return False
        return True

    def data_in(self, offset: RegionOff, length: int) -> list[RegionRange]:
        """The parts of a byte range that are not holes of the region."""
        found = []
        end = RegionOff(offset + length)
        i = max(bisect_right(self._data_starts, offset) - 1, 0)
        while i < len(self._data_starts) and self._data_starts[i] < end:
            start = max(offset, self._data_starts[i])
            stop = min(end, self._data_ends[i])
            if start < stop:
                found.append(RegionRange(start, stop))
            i += 1
        return found

    @property
    def tells_holes(self) -> bool:
        """Tell if some of the region is known to be a hole, which reads as zeros."""
        return self._data_starts != [0] or self._data_ends != [self.region.size]

    # ------------------------------------------------------------------ changing

    def edit(self, number: PageNo) -> bytearray:
        """The private copy of a page, to be changed."""
        page = self._changed.get(number)
        if page is None:
            page = self._changed[number] = bytearray(self.stored(number))
        self._unsealed.add(number)
        return page

    def make(self, number: PageNo, magic: int, owner: Ino, *, fresh: bool) -> bytearray:
        """A zeroed page with its header. ``fresh``: nothing in the region refers to it yet."""
        page = self.edit(number)
        page[:] = bytes(PAGE)
        HEADER.pack_into(page, 0, magic, 0, number, owner, self.uuid)
        if fresh:
            self._fresh.add(number)
        return page

    def store_first(self, number: PageNo, image: bytearray) -> None:
        """Store this for a page before all else; its private copy follows as any other."""
        self._first[number] = image

    def store_between(self, number: PageNo, image: bytearray) -> None:
        """Store this for a page before others lead to or away from what it tells."""
        self._between[number] = image

    def zero_data(self, offset: RegionOff, length: int) -> None:
        """Zero a byte range when the repair is stored."""
        self._zeroed.append(RegionRange(offset, RegionOff(offset + length)))

    def copy_data(self, source: RegionOff, target: RegionOff, length: int) -> None:
        """Copy bytes inside the region when the repair is stored."""
        if self._copied:
            last = self._copied[-1]
            if (source - last.length, target - last.length) == (last.source, last.target):
                self._copied[-1] = last._replace(length=last.length + length)
                return
        self._copied.append(_Copy(source, target, length))

    # ------------------------------------------------------------------ the journal

    def journal_state(self, uuid: bytes) -> int:
        """Look at the region's journal: one of the ``JOURNAL_`` answers of journal.py."""
        return self._transactions(uuid).journal_state()

    def _transactions(self, uuid: bytes) -> _Transactions:
        return _Transactions(self.region, uuid, JOURNAL_PAGE, JOURNAL_PAGES, self.pages)

    def replay(self) -> None:
        """Carry out the whole record in private copies."""
        replay_in_copies(self._view, _JOURNAL, self._changed)

    def replay_in_region(self, uuid: bytes) -> None:
        """Carry out the whole record in the region, as a mount does."""
        self._transactions(uuid).recover()

    # ------------------------------------------------------------------ storing

    def store(self) -> None:
        """Bring all changes into the region; at any instant of it, fsck can start over.

        First, what is free and about to be stored into is no longer marked as zero; then data and
        new pages, into places that nothing refers to; then the changed pages, in one transaction
        if they fit. If they do not, the state page says until the last one that there is an
        error, and the maps first mark as in use what is so before or after: even a mount in
        between finds nothing free that is not.
        """
        self._commit(sorted(self._first), self._first, fresh=False)
        for source, target, length in self._copied:
            for at in range(0, length, _MAX_COPY):
                piece = min(_MAX_COPY, length - at)
                data = self.region.read(RegionOff(source + at), piece)
                self.region.copy_in(RegionOff(target + at), data)
        for start, end in self._zeroed:
            self.region.zero(start, end - start)
        fresh = sorted(self._fresh & self._changed.keys())
        changed = sorted(self._changed.keys() - self._fresh, reverse=True)
        for i in range(0, len(fresh), _BATCH):
            self._commit(fresh[i : i + _BATCH], self._changed, fresh=True)
        if len(changed) > _BATCH:
            self._mark_error()
            between = sorted(self._between)
            for i in range(0, len(between), _BATCH):
                self._commit(between[i : i + _BATCH], self._between, fresh=False)
        for i in range(0, len(changed), _BATCH):
            self._commit(changed[i : i + _BATCH], self._changed, fresh=False)
        self.region.store_u64(_JOURNAL, 0)
        self.region.sync()

    def _mark_error(self) -> None:
        final = self._changed.get(STATE_PAGE)
        if final is None:
            return
        marked = bytearray(final)
        flags = int.from_bytes(marked[STATE_OFFSET + 4 : STATE_OFFSET + 8], "little")
        flags |= STATE_FLAG_ERROR
        marked[STATE_OFFSET + 4 : STATE_OFFSET + 8] = flags.to_bytes(4, "little")
        self._commit([STATE_PAGE], {STATE_PAGE: marked}, fresh=False)

    def _commit(
        self, numbers: list[PageNo], images: dict[PageNo, bytearray], *, fresh: bool
    ) -> None:
        if not numbers:
            return
        transactions = self._transactions(self.uuid)
        with transactions:
            for number in numbers:
                transactions.put(number, images[number], fresh)


class _Transactions(PageStore):
    """The journal alone: what a page held before does not matter to a repair."""

    def put(self, page: PageNo, data: bytearray, fresh: bool) -> None:
        """Make ``data`` the contents of a page in the open transaction."""
        self._take(page, int(fresh))[:] = data


@cache
def _syndromes() -> dict[int, int]:
    """Bit number for each difference of checksums that one flipped bit makes."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ 0x82F63B78 if value & 1 else value >> 1
        table.append(value)
    found = {}
    row = [table[1 << bit] for bit in range(8)]
    for byte in range(PAGE - 1, -1, -1):
        for bit, value in enumerate(row):
            if 4 <= byte < 8:
                found[1 << (8 * (byte - 4) + bit)] = 8 * byte + bit
            else:
                found[value] = 8 * byte + bit
            row[bit] = value >> 8 ^ table[value & 255]
    return found


def flipped_bit(page: Buffer) -> int | None:
    """The one bit of a page that is flipped, as its checksum tells; None if it is not one bit.

    This is no guess: in 4 KiB, CRC-32C tells one flipped bit from any other one and from any two.
    """
    stored = int.from_bytes(page[4:8], "little")
    return _syndromes().get(stored ^ page_checksum(page))
