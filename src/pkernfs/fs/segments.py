"""Segments of files: who gets one, how it grows and goes, and its bytes (docs/format.md, 12).

A pool makes the memory, which may take long: an operation that needs it raises
:class:`~pkernfs.errors.WorkNeeded`, and is called again when that is done. Each transaction between
leaves a state that a mount completes or undoes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pkernfs.errors import (
    BusyError,
    CorruptionError,
    NoSpaceError,
    NotSupportedError,
    PkernfsError,
    RegionError,
    WorkNeeded,
)
from pkernfs.fs.extents import LAST_PAGE, ExtentMap
from pkernfs.fs.segment_table import SegmentTable
from pkernfs.host.iomem import Span
from pkernfs.journal import TransactionTooLarge
from pkernfs.layout import (
    BLOCK,
    INODE_FLAG_SEGMENT,
    INODE_FLAG_SEGMENT_OFF,
    INODE_FLAG_SEGMENT_ON,
    INODE_FLAG_TABLE,
    NO_PAGE,
    PAGE,
    SEGMENT_DEAD,
    SEGMENT_IN_USE,
    page_offset,
)
from pkernfs.pool.pool import Owner, Pool, Segment, Space
from pkernfs.quantities import Ino, PageNo, RegionOff, SegmentNo
from pkernfs.ratelimit import RateLimit

if TYPE_CHECKING:
    from pkernfs.fs.inodes import Inode
    from pkernfs.fs.super import StatFs, Super
    from pkernfs.region.region import Region

log = logging.getLogger(__name__)

#: A file gets a segment when truncate or fallocate first gives it that much, in bytes.
LEAST_BYTES = BLOCK
_MOST_MAPPED = 64
_NEVER = INODE_FLAG_SEGMENT | INODE_FLAG_SEGMENT_OFF | INODE_FLAG_TABLE


class _Step(NamedTuple):
    """A step of what is done for a file."""

    ino: Ino
    name: str


class _Outcome(NamedTuple):
    """The result of work that was done aside: a value, or why there is none."""

    value: Any
    error: PkernfsError | None


class Reaped(NamedTuple):
    """The dead segments whose memory is gone, and why that of others is not."""

    gone: list[SegmentNo]
    reasons: dict[SegmentNo, str]


class Segments:
    """The segments of one file system; ``pool`` is None if it has none.

    :param wanted: files get segments by themselves.
    """

    def __init__(
        self, state: Super, extents: ExtentMap, pool: Pool | None, *, wanted: bool = True
    ) -> None:
        self._super = state
        self._extents = extents
        self._store = state.store
        self._inodes = state.inodes
        self.pool = pool
        self.wanted = wanted
        self.table = SegmentTable(state.store, state.pages)
        #: Why a segment cannot be used, by number.
        self.lost: dict[SegmentNo, str] = {}
        self._mapped: OrderedDict[SegmentNo, Region] = OrderedDict()
        self._outcomes: dict[_Step, _Outcome] = {}
        self._new: dict[Ino, Segment] = {}  # recorded, and not yet a file's
        self._refusals = RateLimit(log)
        #: Files that get none by themselves now, as :mod:`pkernfs.fs.conversion` sees to them.
        self.converting: set[Ino] = set()
        #: Called when there is something for :meth:`reaping`.
        self.died: Callable[[], object] = lambda: None

    # ------------------------------------------------------------------ which file has one

    def of(self, inode: Inode) -> Segment:
        """The segment of a file that has one.

        :raises CorruptionError: the table does not know it.
        """
        row = self.table.rows.get(SegmentNo(inode.body))
        if row is None or row.ino != inode.ino or row.state != SEGMENT_IN_USE:
            raise CorruptionError(f"inode {inode.ino}: no such segment: got {inode.body}")
        return row

    def find(self, ino: Ino) -> Segment | None:
        """The segment of a file; None if it has none."""
        inode = self._inodes.get(ino)
        return self.of(inode) if inode.flags & INODE_FLAG_SEGMENT else None

    def is_wanted(self, inode: Inode, size: int) -> bool:
        """Tell if a file that is given ``size`` bytes gets a segment.

        What the file itself says counts more than what the mount says.
        """
        flags = inode.flags
        chosen = flags & INODE_FLAG_SEGMENT_ON or (self.wanted and size >= LEAST_BYTES)
        return (
            bool(chosen)
            and self.pool is not None
            and not flags & _NEVER
            and inode.nlink > 0
            and inode.ino not in self.converting
            and inode.data_pages * PAGE < LEAST_BYTES
        )

    # ------------------------------------------------------------------ the bytes

    def memory(self, inode: Inode) -> Region:
        """The mapped segment of a file.

        :raises RegionError: it is lost: why.
        """
        row = self.of(inode)
        region = self._mapped.get(row.number)
        if region is not None:
            self._mapped.move_to_end(row.number)
            return region
        if reason := self.lost.get(row.number):
            raise RegionError(reason)
        region = self._pool().open(row, write=self._super.region.writable)
        self._mapped[row.number] = region
        if len(self._mapped) > _MOST_MAPPED:
            self._mapped.popitem(last=False)[1].close()
        return region

    def descriptor(self, ino: Ino) -> int | None:
        """The descriptor of a file's segment, until the next operation; None: it has none.

        :raises RegionError: it is lost.
        """
        inode = self._inodes.get(ino)
        return self.memory(inode).descriptor if inode.flags & INODE_FLAG_SEGMENT else None

    @contextmanager
    def own_mapping(self, ino: Ino) -> Iterator[Region]:
        """The memory of a file for another thread: a mapping of its own, or the region.

        :raises RegionError: the segment is lost.
        """
        row = self.find(ino)
        if row is None:
            yield self._super.region
            return
        with self._pool().open(row, write=False) as memory:
            yield memory

    def open(self, row: Segment, *, write: bool) -> Region:
        """Map a segment for another thread, or one that no file has.

        :raises RegionError: it is not there, or not what it was.
        """
        return self._pool().open(row, write=write)

    def _unmap(self, number: SegmentNo) -> None:
        """Let the daemon hold a segment no longer."""
        region = self._mapped.pop(number, None)
        if region is not None:
            region.close()

    def _pool(self) -> Pool:
        if self.pool is None:
            raise NotSupportedError("the file system was opened without its pool of segments")
        return self.pool

    def read(self, inode: Inode, offset: int, length: int) -> bytes:
        """``length`` bytes, all before the end of the file; reading gives no memory to holes.

        A copy: the owner of a segment may cut it at any moment, and a view of it is a fault then.

        :raises RegionError: the segment is lost, or was cut.
        """
        region = self.memory(inode)
        at = RegionOff(offset)
        data = bytearray(length)
        if next(region.data_ranges(at, RegionOff(offset + length)), None) is not None:
            region.copy_out(at, data)
        else:
            region.check_there(RegionOff(offset + length))
        return bytes(data)

    # ------------------------------------------------------------------ work aside

    def aside(self, ino: Ino, step: str, work: Callable[[], Any]) -> Any:
        """Have ``work`` done aside; what it returned, once the operation is called again.

        :raises WorkNeeded: it is not done yet.
        :raises PkernfsError: what ``work`` failed with.
        """
        key = _Step(ino, step)
        outcome = self._outcomes.pop(key, None)
        if outcome is None:
            raise WorkNeeded(partial(self._work, key, work))
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def _work(self, key: _Step, work: Callable[[], Any]) -> None:
        try:
            self._outcomes[key] = _Outcome(work(), None)
        except PkernfsError as e:
            self._outcomes[key] = _Outcome(None, e)

    # ------------------------------------------------------------------ a new one

    def give(self, inode: Inode, size: int) -> None:
        """Give a file a segment of ``size`` bytes or more. What it has in the region is copied.

        :raises NoSpaceError: the pool has no room; the file stays as it was.
        :raises BusyError: the file has been changed meanwhile.
        """
        made = self.make(inode, size)
        try:
            self._hand_over(inode, made)
        except TransactionTooLarge:
            self.kill(made)
            raise NoSpaceError(f"inode {inode.ino}: in too many pieces to get a segment") from None
        except PkernfsError:
            self.kill(made)
            raise
        self.set_owner(inode)

    def make(self, inode: Inode, size: int) -> Segment:
        """Make a segment of ``size`` bytes or more, which no file has yet.

        :raises NoSpaceError: the pool has no room; nothing was changed.
        """
        pool, ino = self._pool(), inode.ino
        row = self._new.get(ino)
        if row is None:
            length = -(-size // pool.granule) * pool.granule
            wanted = Segment(self.table.new_number(), ino, pool.kind, length)
            planned = self._plan(inode, wanted)
            row = planned._replace(number=self.table.new_number())
            with self._store:
                self.table.add(row)
                self._super.leave_reserve()
            self._new[ino] = row
        try:
            made: Segment = self.aside(ino, "create", partial(pool.create, row))
        except PkernfsError:
            self._new.pop(ino)
            self.kill(row)
            raise
        self._new.pop(ino)
        return made

    def _hand_over(self, inode: Inode, made: Segment) -> None:
        """Copy what the file has, and let it have the segment instead."""
        if inode.data_pages:
            with self._pool().open(made, write=True) as target:
                self._copy(inode, target)
        with self._store:
            self.become(inode, made)

    def _copy(self, inode: Inode, target: Region) -> None:
        region = self._super.region
        for file_page, page, count in self._extents.within(inode, 0, target.size // PAGE):
            data = region.view(page_offset(page), count * PAGE)
            target.copy_in(RegionOff(file_page * PAGE), data)

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
        for key in [key for key in self._outcomes if key.ino == ino]:
            del self._outcomes[key]
        row = self._new.pop(ino, None)
        if row is not None:
            self.kill(row)

    def _plan(self, inode: Inode, wanted: Segment) -> Segment:
        """Have the pool choose memory; what dead segments have comes back first if there is none.

        :raises NoSpaceError: there is none.
        """
        pool = self._pool()
        others = [row for row in self.table.rows.values() if row.number != wanted.number]
        dead = self._dead()

        def plan() -> tuple[Segment | None, NoSpaceError | None, Reaped]:
            try:
                return pool.plan(wanted, others), None, Reaped([], {})
            except NoSpaceError as e:
                reaped = _destroy(pool, dead)
                left = [row for row in others if row.number not in reaped.gone]
                if not reaped.gone:
                    return None, e, reaped
                try:
                    return pool.plan(wanted, left), None, reaped
                except NoSpaceError as still:
                    return None, still, reaped

        planned, error, reaped = self.aside(inode.ino, f"plan {wanted.length}", plan)
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
        row, pool = self.of(inode), self._pool()
        if reason := self.lost.get(row.number):
            raise RegionError(reason)
        if row.valid < row.length:  # it grows already: this is the second call
            self._finish_growth(inode, row)
        if size <= row.length:
            return
        length = -(-size // pool.granule) * pool.granule
        self._unmap(row.number)
        planned = self._plan(inode, row._replace(length=length))
        with self._store:
            self.table.replace(planned._replace(valid=row.length))
            self._super.leave_reserve()
        self._finish_growth(inode, self.of(inode), row)

    def _finish_growth(self, inode: Inode, row: Segment, before: Segment | None = None) -> None:
        pool = self._pool()
        try:
            grown = self.aside(inode.ino, "grow", partial(pool.resize, row))
        except PkernfsError:
            with self._store:
                self.table.replace(_cut(row, row.valid))
            raise
        with self._store:
            self._inodes.touch(inode)
            self.table.replace(grown)
            inode.data_pages = grown.length // PAGE
            self._inodes.save(inode)

    def check_unused(self, inode: Inode) -> None:
        """Log who has the segment of a file open or mapped.

        :raises BusyError: somebody has.
        """
        row = self.of(inode)
        self._unmap(row.number)
        try:
            self.aside(inode.ino, "unused", partial(self._pool().check_unused, row))
        except BusyError as e:
            self._refusals.warning(f"inode {inode.ino}: {e}")
            raise

    def cut(self, inode: Inode, size: int) -> None:
        """Inside a transaction: the file has ``size`` bytes now. With none, it has no segment."""
        if not size:
            self.drop(inode)
            return
        row = self.of(inode)
        granule = self._pool().granule
        length = min(-(-size // granule) * granule, row.length)
        self.table.replace(_cut(row, length))
        inode.data_pages = length // PAGE

    def finish_pending(self, inode: Inode) -> None:
        """Give the memory behind a cut segment back, and zero the pending range."""
        row, pool = self.of(inode), self._pool()
        start, end = inode.pending_start, min(inode.pending_end, row.length)
        self._unmap(row.number)

        def work() -> None:
            try:
                pool.resize(row)
            except BusyError as e:  # it was not, a moment ago; a mount cuts it
                log.warning("%s", e)
            if start < end:
                _zero(pool, row, start, end)

        self.aside(inode.ino, "finish", work)

    # ------------------------------------------------------------------ the end of one

    def drop(self, inode: Inode) -> None:
        """Inside a transaction: take the segment from a file."""
        row = self.of(inode)
        self.table.replace(row._replace(state=SEGMENT_DEAD))
        inode.flags &= ~INODE_FLAG_SEGMENT
        inode.body = NO_PAGE
        inode.data_pages = 0
        self._store.on_commit += [partial(self._unmap, row.number), lambda: self.died()]

    def _dead(self) -> list[Segment]:
        return [row for row in self.table.rows.values() if row.state == SEGMENT_DEAD]

    def reaping(self) -> Callable[[], Reaped] | None:
        """What destroys the segments that nobody has; any thread may call it. None: there are none.

        :meth:`reaped` gets its result.
        """
        dead = self._dead()
        if self.pool is None or not dead or self._super.read_only:
            return None
        return partial(_destroy, self.pool, dead)

    def reaped(self, done: Reaped) -> None:
        """Remove the rows of segments that are destroyed."""
        for number in done.gone:
            if number in self.table.rows:
                with self._store:
                    self.table.remove(number)
                self.lost.pop(number, None)
        for reason in done.reasons.values():
            self._refusals.once(reason)

    # ------------------------------------------------------------------ owners

    def set_owner(self, inode: Inode, owner: Owner | None = None) -> None:
        """Let ``owner`` open the segment of a file; None: as the file's own attributes say.

        :raises RegionError: the kernel refuses, or the segment is lost: nothing was changed.
        """
        row = self.of(inode)
        if self.pool is not None:
            self.pool.set_owner(row, owner or _owner_of(inode))

    def lock_out(self, inode: Inode) -> None:
        """Let nobody but root open the segment of a file, until :meth:`set_owner`."""
        self._pool().set_owner(self.of(inode), Owner(0, 0, 0o600))

    # ------------------------------------------------------------------ at a mount

    def restore(self) -> None:
        """Bring table and pool together; what is lost is told, and nothing else fails.

        What no file has is destroyed; what a file has is there, as long as the table says, and its
        owner's.
        """
        for reason in self.table.damaged:
            log.error("%s: %s: run fsck.pkernfs", self._super.region.name, reason)
        if self.pool is None:
            for number in self.table.rows:
                self.lost[number] = f"segment {number}: {self._super.region.name} has no pool here"
            return
        if self._super.read_only:
            return
        self._end_unowned()
        for row in [r for r in self.table.rows.values() if r.state == SEGMENT_IN_USE]:
            self._restore(self.pool, row)
        for stray in self.pool.strays(list(self.table.rows.values())):
            log.warning("%s: %s", self._super.region.name, stray)

    def _end_unowned(self) -> None:
        for row in list(self.table.rows.values()):
            if row.state != SEGMENT_IN_USE and row.state != SEGMENT_DEAD:
                self.kill(row)
        work = self.reaping()
        if work is not None:
            self.reaped(work())

    def _restore(self, pool: Pool, row: Segment) -> None:
        try:
            inode = self._inodes.get(row.ino)
            if not inode.flags & INODE_FLAG_SEGMENT or SegmentNo(inode.body) != row.number:
                raise CorruptionError(f"segment {row.number}: inode {row.ino} does not have it")
            now = pool.restore(row)
            if now != row:
                with self._store:
                    self._inodes.touch(inode)
                    self.table.replace(now)
                    inode.data_pages = now.length // PAGE
                    self._inodes.save(inode)
            pool.set_owner(now, _owner_of(inode))
        except PkernfsError as e:
            self.lost[row.number] = str(e)
            log.error("%s: inode %d: %s", self._super.region.name, row.ino, e)

    def close(self) -> None:
        """Unmap everything, and let go of the pool."""
        for number in list(self._mapped):
            self._unmap(number)
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


def _zero(pool: Pool, row: Segment, start: int, end: int) -> None:
    """Zero bytes start..end-1; who has come to hold them sees it."""
    try:
        pool.punch(row, start, end)
    except BusyError:
        with pool.open(row, write=True) as memory:
            memory.zero(RegionOff(start), end - start)


def _destroy(pool: Pool, dead: list[Segment]) -> Reaped:
    """Destroy segments, as far as nobody has them."""
    done = Reaped([], {})
    for row in dead:
        try:
            pool.destroy(row)
            done.gone.append(row.number)
        except PkernfsError as e:
            done.reasons[row.number] = str(e)
    return done


def _cut(row: Segment, length: int) -> Segment:
    """A row that is only ``length`` bytes long."""
    pieces = []
    left = length
    for piece in row.pieces:
        if left > 0:
            pieces.append(Span(piece.start, min(piece.size, left)))
            left -= piece.size
    return row._replace(length=length, valid=min(row.valid, length), pieces=tuple(pieces))


def _owner_of(inode: Inode) -> Owner:
    return Owner(inode.uid, inode.gid, inode.mode & 0o777)
