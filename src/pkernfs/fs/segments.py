"""Changes of the segments of files: who gets one, how it grows and goes (docs/format.md, 12).

A pool makes the memory, which may take long: an operation that needs it raises
:class:`~pkernfs.errors.WorkNeeded`, and gets a turn (:mod:`pkernfs.fs.pool_turns`). Each
transaction on the way leaves a state that a mount completes or undoes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pkernfs.errors import (
    BusyError,
    CorruptionError,
    NoSpaceError,
    PkernfsError,
    RegionError,
)
from pkernfs.fs.dead_segments import Reaped, destroy, unreached
from pkernfs.fs.extents import LAST_PAGE, ExtentMap
from pkernfs.fs.pins import PinGuard
from pkernfs.fs.segment_memory import SegmentMemory, copy_bytes, owner_of
from pkernfs.fs.segment_table import SegmentTable
from pkernfs.host.iomem import Span, overlap
from pkernfs.journal import TransactionTooLarge
from pkernfs.layout import (
    BLOCK,
    INODE_FLAG_NATIVE,
    INODE_FLAG_PENDING,
    INODE_FLAG_SEGMENT,
    INODE_FLAG_SEGMENT_OFF,
    INODE_FLAG_SEGMENT_ON,
    INODE_FLAG_TABLE,
    NO_INO,
    NO_PAGE,
    PAGE,
    PENDING_TO_END,
    SEGMENT_DEAD,
    SEGMENT_IN_USE,
    page_offset,
)
from pkernfs.pool import pieces
from pkernfs.pool.pool import Owner, Pool, Segment, Space
from pkernfs.quantities import Ino, PageNo, RegionOff, SegmentNo
from pkernfs.ratelimit import RateLimit

if TYPE_CHECKING:
    from pkernfs.fs.inodes import Inode
    from pkernfs.fs.super import StatFs, Super
    from pkernfs.region.region import Region

log = logging.getLogger(__name__)

#: A file gets a segment when truncate, or fallocate from its start, first gives it that much, in
#: bytes.
LEAST_BYTES = BLOCK
_NEVER = INODE_FLAG_SEGMENT | INODE_FLAG_SEGMENT_OFF | INODE_FLAG_TABLE

T = TypeVar("T")


class Segments(SegmentMemory):
    """The segments of one file system; ``pool`` is None if it has none.

    :param wanted: files get segments by themselves.
    """

    def __init__(
        self,
        state: Super,
        extents: ExtentMap,
        table: SegmentTable,
        pool: Pool | None,
        pins: PinGuard,
        *,
        wanted: bool = True,
    ) -> None:
        super().__init__(state, table, pool)
        self._extents = extents
        self._pins = pins
        self._store = state.store
        self.wanted = wanted
        self._new: dict[Ino, Segment] = {}  # recorded, and not yet a file's
        self._owner_due: set[SegmentNo] = set()  # that the pool was changing
        self._held: tuple[Span, ...] = ()  # what no segment has, but a device may reach
        self._refusals = RateLimit(log)
        #: Files that get none by themselves now, as :mod:`pkernfs.fs.conversion` sees to them.
        self.converting: set[Ino] = set()
        #: Called when there is something for :meth:`reaping`.
        self.died: Callable[[], object] = lambda: None

    # ------------------------------------------------------------------ which file has one

    def is_wanted(self, inode: Inode, size: int, *, appends: bool = False) -> bool:
        """Tell if a file that is given its first ``size`` bytes gets a segment: it holds them all.

        What reaches beyond them stays where it is. What the file itself says counts more than what
        the mount says. A file that is lengthened piece by piece is no memory (``appends``).
        """
        flags = inode.flags
        by_itself = self.wanted and size >= LEAST_BYTES and not appends
        chosen = flags & INODE_FLAG_SEGMENT_ON or by_itself
        return (
            bool(chosen)
            and self.pool is not None
            and size >= inode.size
            and not flags & _NEVER
            and (inode.nlink > 0 or inode.ino in self._new)
            and inode.ino not in self.converting
            and inode.data_pages * PAGE < LEAST_BYTES
        )

    # ------------------------------------------------------------------ turns at the pool

    def run(self, operation: Callable[[], T]) -> T:
        """Carry out an operation for a caller without an event loop: does what it needs."""
        return self.turns.run(partial(self._super.run, operation))

    def aside(self, ino: Ino, step: str, work: Callable[[], Any]) -> Any:
        """Have ``work`` for a file done aside; what it returned, when called again after that.

        :raises WorkNeeded: it is not done yet.
        :raises PkernfsError: what ``work`` failed with.
        """
        return self.turns.result((step, ino), work)

    def _result(self, row: Segment, step: str, work: Callable[[], Any]) -> Any:
        """What ``work`` on a segment returned; nobody has it mapped here while it is done.

        :raises WorkNeeded: it is not done yet.
        """
        key = (step, row)
        if not self.turns.is_done(key):  # so it is given up for now, and with it what it maps
            self.unmap(row.number)
        return self.turns.result(key, work, row.number)

    def settle(self, changed: Iterable[SegmentNo] = ()) -> None:
        """End what an operation has left undone that was given up, as far as that is possible now.

        What cannot be done the next turn does, or the next mount.

        :param changed: the segments that the pool has changed: their files may have got another
            owner meanwhile.
        """
        due, self._owner_due = self._owner_due, set()
        for row in map(self.table.rows.get, due & set(changed)):
            if row is not None and row.state == SEGMENT_IN_USE:
                with _told(row.number):
                    self.set_owner(self._inodes.get(row.ino))
        renamed, self._renamed = self._renamed, []
        if self._super.read_only:
            return
        for row in map(self.table.rows.get, renamed):
            if row is not None:
                with _told(row.number), self._store:
                    self.table.replace(row)
        for ino, row in list(self._new.items()):
            del self._new[ino]
            with _told(row.number):
                self.kill(row)

    # ------------------------------------------------------------------ a new one

    def give(self, inode: Inode, size: int) -> None:
        """Give a file a segment of ``size`` bytes or more. What it has in the region is copied.

        :raises NoSpaceError: the pool has no room; the file stays as it was.
        """
        made = self._make(inode, size)
        try:
            self._hand_over(inode, made)
        except TransactionTooLarge:
            raise NoSpaceError(f"inode {inode.ino}: in too many pieces to get a segment") from None
        del self._new[inode.ino]  # else the turn ends it
        self.set_owner(inode)

    def make(self, inode: Inode, size: int) -> Segment:
        """Make a segment of ``size`` bytes or more, which no file has yet.

        It is the caller's, to :meth:`become` a file's or to :meth:`kill`.

        :raises NoSpaceError: the pool has no room; nothing was changed.
        """
        made = self._make(inode, size)
        del self._new[inode.ino]
        return made

    def _make(self, inode: Inode, size: int) -> Segment:
        row = self._new.get(inode.ino)
        if row is not None and row.length < size:  # the file has grown meanwhile
            self.kill(self._new.pop(inode.ino))
            row = None
        if row is None:
            row = self._record_new(inode, size)
        try:
            made: Segment = self._result(row, "create", partial(self.need_pool().create, row))
        except PkernfsError as e:
            self._refused(e)
            raise
        self._new[inode.ino] = made
        return made

    def _refused(self, error: PkernfsError) -> None:
        """Log why there is no memory: the caller learns no more than the errno."""
        if not isinstance(error, RegionError):  # that is logged by who answers the caller
            self._refusals.warning(str(error))

    def _record_new(self, inode: Inode, size: int) -> Segment:
        pool = self.need_pool()
        length = -(-size // pool.granule) * pool.granule
        planned = self._plan(Segment(self.table.new_number(), inode.ino, pool.kind, length))
        row = planned._replace(number=self.table.new_number())
        with self._store:
            self.table.add(row)
            self._super.leave_reserve()
        self._new[inode.ino] = row
        return row

    def _hand_over(self, inode: Inode, made: Segment) -> None:
        """Copy what the file has, and let it have the segment instead."""
        if inode.data_pages:
            with self.open(made, write=True) as target:
                self._copy(inode, target)
        with self._store:
            self.become(inode, made)

    def _copy(self, inode: Inode, target: Region) -> None:
        region = self._super.region
        for file_page, page, count in self._extents.within(inode, 0, target.size // PAGE):
            to = RegionOff(file_page * PAGE)
            copy_bytes(region, page_offset(page), target, to, count * PAGE)

    def become(self, inode: Inode, made: Segment) -> None:
        """Inside a transaction: let a file have a segment that holds its bytes, and no blocks.

        :raises TransactionTooLarge: those are too many for one transaction.
        """
        self._inodes.touch(inode)
        if self._extents.remove(inode, 0, LAST_PAGE + 1):
            raise TransactionTooLarge("more extents than one transaction frees")
        inode.flags |= INODE_FLAG_SEGMENT
        inode.body = PageNo(made.number)
        inode.data_pages = made.length // PAGE
        self._inodes.save(inode)
        self.table.replace(made._replace(state=SEGMENT_IN_USE))

    def kill(self, row: Segment) -> None:
        """A segment that no file gets: nobody needs it any more. A mount sees to what is left."""
        if self._super.read_only:
            return
        with self._store:
            self.table.replace(row._replace(state=SEGMENT_DEAD))
        self.died()

    def give_up(self, ino: Ino) -> None:
        """Undo what was begun for a file, and what nobody goes on with."""
        row = self._new.pop(ino, None)
        if row is not None:
            self.kill(row)

    def _plan(self, wanted: Segment) -> Segment:
        """Have the pool choose memory; what dead segments have comes back first if there is none.

        Memory that a device may reach is nobody's to have, even if no segment has it: after damage.

        :raises NoSpaceError: there is none.
        :raises RegionError: it cannot be told what is free.
        """
        if self.table.damaged:
            raise RegionError(f"{self.table.damaged[0]}: run fsck.pkernfs", errno.EUCLEAN)
        while True:
            self._held = tuple(self._pins.held_memory(self._held))
            planned = self._planned(wanted)
            more = pieces.tail(planned.pieces, pieces.size_of(wanted.pieces))
            held = self._pins.held_memory(more)
            if not held:
                return planned
            reason = f"memory at {held[0].start:#x}: {self._pins.holder_of_memory(held)}"
            self._refusals.warning(reason)
            if any(overlap(one, other) for one in held for other in self._held):
                raise BusyError(f"segment {wanted.number}: {reason}")  # it is its device's already
            self._held += tuple(held)

    def _planned(self, wanted: Segment) -> Segment:
        """Have the pool choose memory that is neither another segment's nor in :attr:`_held`."""
        pool = self.need_pool()
        others = [row for row in self.table.rows.values() if row.number != wanted.number]
        if self._held:
            size = pieces.size_of(self._held)
            others.append(Segment(SegmentNo(0), NO_INO, pool.kind, size, pieces=self._held))
        dead = unreached(self._dead(), self._pins)

        def plan() -> tuple[Segment | None, NoSpaceError | None, Reaped]:
            try:
                return pool.plan(wanted, others), None, Reaped([], {})
            except NoSpaceError as e:
                reaped = destroy(pool, dead)
                left = [row for row in others if row.number not in reaped.gone]
                if not reaped.gone:
                    return None, e, reaped
                try:
                    return pool.plan(wanted, left), None, reaped
                except NoSpaceError as still:
                    return None, still, reaped

        planned, error, reaped = self.turns.result(("plan", wanted, self._held), plan)
        self.reaped(reaped)
        if planned is None:
            assert error is not None
            self._refusals.warning(str(error))
            raise error
        chosen: Segment = planned
        return chosen

    # ------------------------------------------------------------------ longer and shorter

    def grow(self, inode: Inode, size: int) -> None:
        """Make a segment long enough for ``size`` bytes. What it gains is zero.

        :raises NoSpaceError: there is no memory; nothing was changed.
        :raises BusyError: somebody has it, and this kind of segment cannot grow meanwhile.
        """
        row = self.check_there(self.of(inode))
        if size <= row.valid:
            return
        if row.valid < row.length:  # it grows already: this is a second call
            row = self._finish_growth(inode, row)
        if size <= row.valid:
            return
        granule = self.need_pool().granule
        planned = self._plan(row._replace(length=-(-size // granule) * granule))
        with self._store:
            self.table.replace(planned._replace(valid=row.length))
            self._super.leave_reserve()
        self._finish_growth(inode, self.of(inode))

    def _finish_growth(self, inode: Inode, row: Segment) -> Segment:
        pool = self.need_pool()
        try:
            grown: Segment = self._result(row, "grow", partial(pool.resize, row))
        except PkernfsError as e:
            self._refused(e)
            with self._store:
                self.table.replace(_cut(row, row.valid))
            raise
        self._save(inode, grown)
        return grown

    def _save(self, inode: Inode, row: Segment) -> None:
        with self._store:
            self._inodes.touch(inode)
            self.table.replace(row)
            inode.data_pages = row.valid // PAGE
            self._inodes.save(inode)

    def check_unused(self, inode: Inode, size: int) -> None:
        """Before a file with a segment is cut to ``size`` bytes, or punched.

        :raises BusyError: somebody has the segment open or mapped: who.
        :raises RegionError: it is lost; such a file can only be cut to nothing.
        """
        row = self.of(inode)
        if row.number in self.lost and not size:
            return
        row = self.check_there(row)
        try:
            self._result(row, "unused", partial(self.need_pool().check_unused, row))
        except BusyError as e:
            self._refusals.warning(f"inode {inode.ino}: {e}")
            raise

    def cut(self, inode: Inode, size: int) -> None:
        """Inside a transaction: the file has ``size`` bytes now. With none, it has no segment."""
        if not size:
            self.drop(inode)
            return
        row = self.of(inode)
        granule = self.need_pool().granule
        row = _cut(row, min(-(-size // granule) * granule, row.valid))
        self.table.replace(row)
        inode.data_pages = row.valid // PAGE

    def finish_pending(self, inode: Inode) -> None:
        """Give the memory behind a cut segment back, and zero the pending range.

        :raises RegionError: the segment is lost.
        """
        row, pool = self.check_there(self.of(inode)), self.need_pool()
        was_cut = inode.pending_end == PENDING_TO_END
        start, end = inode.pending_start, min(inode.pending_end, row.valid)

        def work() -> None:
            if was_cut:
                try:
                    pool.resize(_cut(row, row.valid))
                except BusyError as e:  # it was not, a moment ago; a mount cuts it
                    log.warning("%s", e)
            if start < end:
                _zero(pool, row, start, end)

        self._result(row, f"finish {start} {end}", work)

    # ------------------------------------------------------------------ the end of one

    def drop(self, inode: Inode) -> None:
        """Inside a transaction: take the segment from a file."""
        row = self.of(inode)
        self.table.replace(row._replace(state=SEGMENT_DEAD))
        inode.flags &= ~(INODE_FLAG_SEGMENT | INODE_FLAG_NATIVE)
        inode.body = NO_PAGE
        inode.data_pages = 0
        self._store.on_commit += [partial(self.unmap, row.number), lambda: self.died()]

    def _dead(self) -> list[Segment]:
        return [row for row in self.table.rows.values() if row.state == SEGMENT_DEAD]

    def reaping(self) -> Callable[[], Reaped] | None:
        """What destroys the segments that nobody has; any thread may call it. None: there are none.

        :meth:`reaped` gets its result.
        """
        dead = self._dead()
        if self.pool is None or not dead or self._super.read_only:
            return None
        return partial(destroy, self.pool, unreached(dead, self._pins))

    def reap(self) -> dict[SegmentNo, str]:
        """Destroy the segments that nobody has, here and now; why some cannot be, by number."""
        work = self.reaping()
        if work is None:
            return {}
        done = work()
        self.reaped(done)
        return done.reasons

    def reaped(self, done: Reaped) -> None:
        """Remove the rows of segments that are destroyed; a mount does, if nobody may now."""
        for number in [] if self._super.read_only else done.gone:
            if number in self.table.rows:
                with self._store:
                    self.table.remove(number)
                self.lost.pop(number, None)
        for reason in done.reasons.values():
            self._refusals.once(reason)

    # ------------------------------------------------------------------ owners

    def set_owner(self, inode: Inode, owner: Owner | None = None) -> None:
        """Let ``owner`` open the segment of a file; None: as the file's own attributes say.

        While the pool changes the segment, that is done when it has. One that is absent gets the
        owner of its file when it is restored.

        :raises RegionError: the kernel refuses, or the segment is not there: nothing was changed.
        """
        row = self.of(inode)
        if self.pool is None or row.number in self.lost or row.number in self.absent:
            return
        if self.turns.is_changing(row.number):
            self._owner_due.add(row.number)
        else:
            self.pool.set_owner(row, owner or owner_of(inode))

    def lock_out(self, inode: Inode) -> None:
        """Let nobody but root open the segment of a file, until :meth:`set_owner`."""
        self.need_pool().set_owner(self.of(inode), Owner(0, 0, 0o600))

    # ------------------------------------------------------------------ at a mount

    def restore(self, *, park: bool = False) -> list[Ino]:
        """Bring table and pool together; what is lost is told, and nothing else fails.

        What no file has is destroyed; what a file has is there, as long as the table says, and its
        owner's. Growth that was interrupted is undone: that needs no memory.

        :param park: some are only kept for later, as :attr:`absent`.

        Returns the files that still have a pending range.
        """
        for reason in self.table.damaged:
            log.error("%s: %s: run fsck.pkernfs", self._super.region.name, reason)
        if self.pool is None:
            for number in self.table.rows:
                self.lost[number] = f"segment {number}: {self._super.region.name} has no pool here"
            return []
        if self._super.read_only:
            return []
        self._end_unowned()
        rows = [row for row in self.table.rows.values() if row.state == SEGMENT_IN_USE]
        whole = [row for row in rows if park and row.valid == row.length]
        self.absent = dict.fromkeys(self.pool.park(whole))
        unfinished = [row.ino for row in rows if self._restore(self.pool, row)]
        if not self.table.damaged:  # else what seems to be a stray may be a file's
            for stray in self.pool.strays(list(self.table.rows.values())):
                log.warning("%s: %s", self._super.region.name, stray)
        return unfinished

    def _end_unowned(self) -> None:
        for row in list(self.table.rows.values()):
            if row.state != SEGMENT_IN_USE and row.state != SEGMENT_DEAD:
                self.kill(row)
        self.reap()

    def _restore(self, pool: Pool, row: Segment) -> bool:
        """Bring one segment in use back; True if its file has a pending range."""
        try:
            inode = self._inodes.get(row.ino)
            if not inode.flags & INODE_FLAG_SEGMENT or SegmentNo(inode.body) != row.number:
                raise CorruptionError(f"segment {row.number}: inode {row.ino} does not have it")
            now = row if row.number in self.absent else self._restore_now(pool, inode, row)
        except PkernfsError as e:
            self.absent.pop(row.number, None)
            self.lose(row, e)
            return False
        if inode.size > now.valid:  # what is there can be read, and the rest cannot
            log.error(
                "%s: inode %d: larger than its segment: got %d bytes, expected up to %d: "
                "run fsck.pkernfs",
                self._super.region.name, row.ino, inode.size, now.valid,
            )  # fmt: skip
        return bool(inode.flags & INODE_FLAG_PENDING)

    def _restore_now(self, pool: Pool, inode: Inode, row: Segment) -> Segment:
        now = pool.restore(self._ungrown(row))
        if now != row:
            self._save(inode, now)
        pool.set_owner(now, owner_of(inode))
        return now

    def _ungrown(self, row: Segment) -> Segment:
        """A row as it was before growth that was interrupted; where a device reaches it, after."""
        before = _cut(row, row.valid or row.length)
        more = pieces.tail(row.pieces, before.length)
        return row if more and self._pins.holder_of_memory(more) else before

    def close(self) -> None:
        """Unmap everything, and let go of the pool."""
        for number in list(self._mapped):
            self.unmap(number)
        if self.pool is not None:
            self.pool.close()

    # ------------------------------------------------------------------ space

    def capacity(self) -> int:
        """How many bytes of files region and pool can hold, however much is freed."""
        base = self._super.statfs().blocks * PAGE
        return base if self.pool is None else base + self.pool.capacity()

    def statfs(self, space: Space | None = None) -> StatFs:
        """The space of the region and of the pool, in 4 KiB units.

        :param space: of the pool, as it was a moment ago. None: the pool is asked, which may take
            milliseconds.
        """
        base = self._super.statfs()
        if self.pool is None:
            return base
        rows = self.table.rows.values()
        held = sum(row.length for row in rows if row.state != SEGMENT_DEAD) // PAGE
        dead = sum(row.length for row in rows if row.state == SEGMENT_DEAD) // PAGE
        free = (space or self.pool.space()).free // PAGE + dead
        return replace(
            base,
            blocks=base.blocks + held + free,
            free=base.free + free,
            available=base.available + free,
        )


@contextmanager
def _told(number: SegmentNo) -> Iterator[None]:
    """Log an error that has nobody to be raised to."""
    try:
        yield
    except PkernfsError as e:
        log.error("segment %d: %s", number, e)


def _zero(pool: Pool, row: Segment, start: int, end: int) -> None:
    """Zero bytes start..end-1; who has come to hold them sees it."""
    try:
        pool.punch(row, start, end)
    except BusyError:
        with pool.open(row, write=True) as memory:
            memory.zero(RegionOff(start), end - start)


def _cut(row: Segment, length: int) -> Segment:
    """A row that is only ``length`` bytes long."""
    left = pieces.head(row.pieces, length)
    return row._replace(length=length, valid=min(row.valid, length), pieces=left)
