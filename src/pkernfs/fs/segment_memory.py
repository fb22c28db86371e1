"""The segments that files have, and their bytes: mapped when they are asked for, and read."""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from pkernfs.errors import NotSupportedError, PkernfsError, RegionError
from pkernfs.fs.pool_turns import PoolTurns
from pkernfs.fs.segment_table import SegmentTable
from pkernfs.layout import INODE_FLAG_SEGMENT, SEGMENT_IN_USE
from pkernfs.pool.pool import Owner, Pool, Segment
from pkernfs.quantities import Ino, RegionOff, SegmentNo

if TYPE_CHECKING:
    from pkernfs.fs.inodes import Inode
    from pkernfs.fs.super import Super
    from pkernfs.region.region import Region

log = logging.getLogger(__name__)

_MOST_MAPPED = 64


class SegmentMemory:
    """The segments of files as they are; :class:`pkernfs.fs.segments.Segments` changes them.

    ``pool`` is None for a file system that has none.
    """

    def __init__(self, state: Super, table: SegmentTable, pool: Pool | None) -> None:
        self._super = state
        self._inodes = state.inodes
        self.pool = pool
        self.table = table
        #: The segment of a file that has one.
        self.of = table.of
        #: Why a segment cannot be used, by number.
        self.lost: dict[SegmentNo, str] = {}
        #: Segments that the pool keeps the memory of, and has to restore: the next one first.
        self.absent: dict[SegmentNo, None] = {}
        self._renamed: list[SegmentNo] = []  # since they were restored
        self._mapped: OrderedDict[SegmentNo, Region] = OrderedDict()
        self.turns = PoolTurns(self.settle)
        #: Gives an operation its turn at the pool.
        self.turn = self.turns.turn

    def settle(self, changed: Iterable[SegmentNo] = ()) -> None:
        """A turn begins or ends: see to what was left undone.

        :param changed: the segments that the pool has changed.
        """

    # ------------------------------------------------------------------ which file has one

    def find(self, ino: Ino) -> Segment | None:
        """The segment of a file; None if it has none."""
        inode = self._inodes.get(ino)
        return self.of(inode) if inode.flags & INODE_FLAG_SEGMENT else None

    def has_one(self, ino: Ino) -> bool:
        """Tell if a file has a segment, also one that the table does not know."""
        return bool(self._inodes.get(ino).flags & INODE_FLAG_SEGMENT)

    # ------------------------------------------------------------------ the bytes

    def memory(self, inode: Inode) -> Region:
        """The mapped segment of a file; good until the next operation.

        :raises RegionError: it is lost: why.
        :raises WorkNeeded: the pool is changing it.
        """
        row = self.of(inode)
        region = self._mapped.get(row.number)
        if region is not None:
            self._mapped.move_to_end(row.number)
            return region
        row = self.check_there(row)
        self.turns.check_unchanging(row.number)
        region = self.need_pool().open(row, write=self._super.region.writable)
        self._mapped[row.number] = region
        if len(self._mapped) > _MOST_MAPPED:
            self._mapped.popitem(last=False)[1].close()
        return region

    def check_unchanging(self, ino: Ino) -> None:
        """:raises WorkNeeded: the pool is changing the segment of a file: that has to end first."""
        inode = self._inodes.get(ino)
        if inode.flags & INODE_FLAG_SEGMENT:
            self.turns.check_unchanging(SegmentNo(inode.body))

    def descriptor(self, ino: Ino) -> int | None:
        """The descriptor of a file's segment, until the next operation; None: it has none.

        :raises RegionError: it is lost.
        """
        inode = self._inodes.get(ino)
        return self.memory(inode).descriptor if inode.flags & INODE_FLAG_SEGMENT else None

    @contextmanager
    def own_mapping(self, row: Segment | None) -> Iterator[Region]:
        """The memory of a file for another thread: a mapping of its own, or the region.

        A mapping is in the way of a pool: nobody else has a turn at it until it is closed.

        :param row: the file's segment, if it has one.
        :raises RegionError: the segment is lost.
        """
        if row is None:
            yield self._super.region
            return
        with self.open(row, write=False) as memory:
            yield memory

    def open(self, row: Segment, *, write: bool) -> Region:
        """Map a segment for another thread, or one that no file has.

        :raises RegionError: it is not there, or not what it was.
        """
        return self.need_pool().open(row, write=write)

    def check_there(self, row: Segment) -> Segment:
        """The row of a segment as it is, once that is there.

        :raises RegionError: it is lost: why.
        :raises WorkNeeded: the pool has to restore it.
        """
        if row.number in self.absent:
            row = self._restored(row)
        if reason := self.lost.get(row.number):
            raise RegionError(reason, errno.EIO)
        return row

    def there(self, ino: Ino) -> Segment | None:
        """The segment of a file, there or lost; None if it has none.

        :raises WorkNeeded: the pool has to restore it.
        """
        row = self.find(ino)
        return row if row is None or row.number in self.lost else self.check_there(row)

    def native_path(self, row: Segment) -> str | None:
        """The path by which others open a segment; None: it is lost, or not there yet."""
        if self.pool is None or row.number in self.lost or row.number in self.absent:
            return None
        try:
            return self.pool.native_path(row)
        except RegionError:
            return None

    def bring(self, number: SegmentNo) -> None:
        """Have one of :attr:`absent` restored; if that fails, it is lost, and was told.

        :raises WorkNeeded: the pool has to do it.
        """
        row = self.table.rows.get(number)
        if row is None or row.state != SEGMENT_IN_USE:
            self.absent.pop(number, None)
            return
        with suppress(RegionError):
            self.check_there(row)

    def bring_all(self) -> None:
        """Have all of them restored, here and now."""
        for number in list(self.absent):
            self.turns.run(partial(self.bring, number))

    def _restored(self, row: Segment) -> Segment:
        pool = self.need_pool()
        try:
            now: Segment = self.turns.result(
                ("restore", row.number), partial(pool.restore, row), row.number
            )
            pool.set_owner(now, owner_of(self._inodes.get(row.ino)))
        except PkernfsError as e:
            del self.absent[row.number]
            self.lose(row, e)
            return row
        del self.absent[row.number]
        if now != row:
            self.table.note(now)
            self._renamed.append(now.number)
        return now

    def lose(self, row: Segment, error: PkernfsError) -> None:
        """Know that a segment cannot be used, and tell it."""
        self.lost[row.number] = str(error)
        log.error("%s: inode %d: %s", self._super.region.name, row.ino, error)

    def is_lost(self, inode: Inode) -> bool:
        """Tell if a file has a segment whose memory is not there."""
        return bool(inode.flags & INODE_FLAG_SEGMENT) and SegmentNo(inode.body) in self.lost

    def unmap(self, number: SegmentNo) -> None:
        """Let the daemon hold a segment no longer."""
        region = self._mapped.pop(number, None)
        if region is not None:
            region.close()

    def need_pool(self) -> Pool:
        """:raises NotSupportedError: the file system was opened without its pool."""
        if self.pool is None:
            raise NotSupportedError("the file system was opened without its pool of segments")
        return self.pool

    def read(self, inode: Inode, offset: int, length: int) -> memoryview:
        """``length`` bytes, all before the end of the file; reading gives no memory to holes.

        A copy: the owner of a segment may cut it at any moment, and a view of it is a fault then.

        :raises RegionError: the segment is lost, or was cut.
        """
        region = self.memory(inode)
        at = RegionOff(offset)
        data = bytearray(length)
        if region.has_data(at, RegionOff(offset + length)):
            region.copy_out(at, data)
        else:
            region.check_there(RegionOff(offset + length))
        return memoryview(data)


def owner_of(inode: Inode) -> Owner:
    """Who may open the segment of a file."""
    return Owner(inode.uid, inode.gid, inode.mode & 0o777)


def copy_bytes(source: Region, at: RegionOff, target: Region, to: RegionOff, length: int) -> None:
    """Copy between a region and a segment; a hole of the source's file stays one in the target.

    So the target is zero there before. Any thread may do it.
    """
    for start, end in source.data_ranges(at, RegionOff(at + length)):
        target.copy_in(RegionOff(to + start - at), source.view(start, end - start))
