"""A pool of segments in memfds, for tests of the file system without a directory or a device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple, Self

from pkernfs.errors import BusyError, NoSpaceError, RegionError
from pkernfs.fs.superblock import Superblock
from pkernfs.host.iomem import Span
from pkernfs.layout import BLOCK, POOL_DAX, POOL_DIRECTORY, PoolFields
from pkernfs.pool.pieces import gaps, merged, size_of
from pkernfs.pool.pool import Holder, Owner, Passed, Segment, Space, nothing_is_passed
from pkernfs.quantities import PhysAddr, RegionOff, SegmentNo
from pkernfs.region.backing import Backing
from pkernfs.region.region import Region

POOL = PoolFields(POOL_DIRECTORY, BLOCK)
DAX = PoolFields(POOL_DAX, BLOCK)
ROOT_ONLY = Owner(0, 0, 0o600)
_OLD = b"\xdb"  # what memory holds that nobody has zeroed yet


class Memory(NamedTuple):
    """A segment's memory at some moment: its bytes, and who may open it."""

    data: bytes
    owner: Owner


class QuietRegion(Region):
    """A mapped segment whose stores are in no trace: that is the region's alone.

    ``stored`` is called in the middle of each store, and behind it.
    """

    stored: Callable[[], object]

    def copy_in(self, offset: RegionOff, data: bytes | bytearray | memoryview) -> None:
        self._store(offset, memoryview(data))

    def zero(self, offset: RegionOff, length: int) -> None:
        self._store(offset, memoryview(bytes(length)))

    def _store(self, offset: RegionOff, data: memoryview) -> None:
        to, middle = self.view(offset, len(data)), len(data) // 2
        to[:middle] = data[:middle]
        self.stored()
        to[middle:] = data[middle:]
        self.stored()


class MemoryPool:
    """``memories`` has a descriptor for each segment that there is; it outlives the mounts.

    ``busy`` are those that somebody holds; ``changed`` is called after each step of a change.

    :param total: bytes.
    :param parks: a mount may leave segments to be restored later; before, nobody can open them.
    :param dirty: new memory holds old bytes until it has been zeroed, as that of a dax device; else
        it is zero from the start, as that of a file.
    """

    kind = POOL_DIRECTORY
    granule = BLOCK
    name = "memory"
    passes = False

    def __init__(
        self, total: int = 64 * BLOCK, *, dirty: bool = False, parks: bool = False
    ) -> None:
        self.total = total
        self.passed: Passed = nothing_is_passed
        self.dirty = dirty
        self.memories: dict[SegmentNo, int] = {}
        self.owners: dict[SegmentNo, Owner] = {}
        self.parks = parks
        self.parked: set[SegmentNo] = set()
        self.busy: set[SegmentNo] = set()
        #: Bytes that somebody else has taken, of which nobody knows before they are needed.
        self.taken = 0
        self.changed: Callable[[], object] = lambda: None

    def opener(self) -> Callable[[Superblock], MemoryPool]:
        """For the mount."""
        return lambda sb: self

    def length(self, number: SegmentNo) -> int:
        """Bytes that a segment has."""
        return os.fstat(self.memories[number]).st_size

    def bytes(self, number: SegmentNo) -> bytes:
        """All bytes of a segment."""
        return os.pread(self.memories[number], self.length(number), 0)

    def state(self) -> dict[SegmentNo, Memory]:
        """All there is, for :meth:`put`."""
        return {n: Memory(self.bytes(n), self.owners[n]) for n in self.memories}

    def put(self, state: dict[SegmentNo, Memory]) -> None:
        """Let there be what there was at :meth:`state`."""
        for number in self.memories.keys() - state.keys():
            os.close(self.memories.pop(number))
        self.owners.clear()
        for number, memory in state.items():
            if number not in self.memories:
                self.memories[number] = os.memfd_create("segment")
            os.ftruncate(self.memories[number], len(memory.data))
            os.pwrite(self.memories[number], memory.data, 0)
            self.owners[number] = memory.owner

    # ------------------------------------------------------------------ the protocol

    def capacity(self) -> int:
        return self.total

    def space(self) -> Space:
        free = self._free()
        return Space(self.total, free, free)

    def _free(self) -> int:
        return max(self.total - sum(map(self.length, self.memories)), 0)

    def plan(self, wanted: Segment, others: list[Segment]) -> Segment:
        used = sum(row.length for row in others)
        if used + wanted.length > self.total:
            raise NoSpaceError(f"{self.name}: full: the largest piece has {self.total - used}")
        return wanted

    def create(self, segment: Segment) -> Segment:
        assert segment.number not in self.memories, "made twice"
        fd = self.memories[segment.number] = os.memfd_create("segment")
        self.owners[segment.number] = ROOT_ONLY
        self.changed()
        try:
            self._check_room(segment.length)
        except NoSpaceError:
            self.destroy(segment)
            raise
        self._set_length(segment.number, segment.length, 0)
        return segment._replace(valid=segment.length, handle=os.fstat(fd).st_ino)

    def _check_room(self, length: int) -> None:
        if length > max(self._free() - self.taken, 0):
            raise NoSpaceError(f"{self.name}: full")

    def _set_length(self, number: SegmentNo, length: int, valid: int) -> None:
        """Cut or add, and zero what is there from ``valid`` on."""
        fd, old = self.memories[number], self.length(number)
        if length != old:
            os.ftruncate(fd, length)
            if self.dirty and length > old:
                os.pwrite(fd, _OLD * (length - old), old)
            self.changed()
        middle = (valid + length) // 2
        for start, end in ((valid, middle), (middle, length)):
            zeros = bytes(end - start)
            if os.pread(fd, end - start, start) != zeros:
                os.pwrite(fd, zeros, start)
                self.changed()

    def park(self, rows: list[Segment]) -> list[SegmentNo]:
        there = [row.number for row in rows if row.number in self.memories]
        self.parked = set(there) if self.parks else set()
        return there[::-1] if self.parks else []

    def restore(self, segment: Segment) -> Segment:
        if segment.number in self.parked:
            self.parked.discard(segment.number)
            segment = segment._replace(handle=segment.handle + 1)  # as that of a new device
        if segment.number not in self.memories:
            raise RegionError(f"segment {segment.number}: lost: it is not there")
        if self.length(segment.number) < segment.valid:
            raise RegionError(f"segment {segment.number}: lost: it is too short")
        return self.resize(segment)

    def check_unused(self, segment: Segment) -> None:
        if segment.number in self.busy:
            raise BusyError(f"segment {segment.number}: busy: a test holds it")

    def resize(self, segment: Segment) -> Segment:
        old = self.length(segment.number)
        if segment.length < old:
            self.check_unused(segment)
        self._check_room(segment.length - old)
        self._set_length(segment.number, segment.length, segment.valid)
        return segment._replace(valid=segment.length)

    def punch(self, segment: Segment, start: int, end: int) -> None:
        self.check_unused(segment)
        middle = (start + end) // 2
        for low, high in ((start, middle), (middle, end)):
            os.pwrite(self.memories[segment.number], bytes(high - low), low)
            self.changed()

    def destroy(self, segment: Segment) -> None:
        self.check_unused(segment)
        fd = self.memories.pop(segment.number, None)
        if fd is not None:
            self.owners.pop(segment.number, None)
            os.close(fd)
            self.changed()

    def strays(self, known: list[Segment]) -> list[str]:
        return [
            f"segment {number}: a stray"
            for number in self.memories
            if number not in {row.number for row in known}
        ]

    def set_owner(self, segment: Segment, owner: Owner) -> None:
        if segment.number in self.parked:
            return
        if segment.number not in self.memories:
            raise RegionError(f"segment {segment.number}: lost: it is not there")
        if self.owners.get(segment.number) != owner:
            self.owners[segment.number] = owner
            self.changed()

    def open(self, segment: Segment, *, write: bool) -> Region:
        assert segment.number not in self.parked, "opened before it is restored"
        if segment.number not in self.memories:
            raise RegionError(f"segment {segment.number}: lost: it is not there")
        backing = Backing(f"segment {segment.number}", self.length(segment.number))
        backing.fd = os.dup(self.memories[segment.number])
        backing._fds = [backing.fd]
        region = QuietRegion(backing, writable=write)
        region.stored = lambda: self.changed()
        return region

    def native_path(self, segment: Segment) -> str:
        if segment.number not in self.memories:
            raise RegionError(f"segment {segment.number}: it is not there")
        return f"/proc/self/fd/{self.memories[segment.number]}"

    def holders(self, segment: Segment) -> list[Holder]:
        return [Holder(0, "a test", "holds")] if segment.number in self.busy else []

    def close(self) -> None:
        """The memories stay."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.put({})


class PiecedPool(MemoryPool):
    """As one on device-dax: each segment has physical pieces, as many as can be.

    Nothing is at those addresses.
    """

    kind = POOL_DAX
    #: Where its memory begins.
    start = PhysAddr(1 << 41)

    def plan(self, wanted: Segment, others: list[Segment]) -> Segment:
        taken = [piece for row in others for piece in row.pieces]
        free = gaps(Span(self.start, self.total), [*taken, *wanted.pieces])
        blocks = [at for gap in free for at in range(gap.start, gap.end, BLOCK)]
        blocks.sort(key=lambda at: at // BLOCK % 2)  # no two that touch, as long as there are some
        missing = (wanted.length - size_of(wanted.pieces)) // BLOCK
        if missing > len(blocks):
            raise NoSpaceError(f"{self.name}: full")
        more = [Span(PhysAddr(at), BLOCK) for at in blocks[:missing]]
        return wanted._replace(pieces=merged([*wanted.pieces, *more]), align=BLOCK)

    def create(self, segment: Segment) -> Segment:
        made = super().create(segment)
        return made._replace(handle=0, name=f"dax0.{segment.number}")
