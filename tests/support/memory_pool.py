"""A pool of segments in memfds, for tests of the file system without a directory or a device."""

from __future__ import annotations

import os
from collections.abc import Callable

from pkernfs.errors import BusyError, NoSpaceError, RegionError
from pkernfs.fs.superblock import Superblock
from pkernfs.layout import BLOCK, POOL_DIRECTORY, PoolFields
from pkernfs.pool.pool import Holder, Owner, Passed, Segment, Space, nothing_is_passed
from pkernfs.quantities import RegionOff, SegmentNo
from pkernfs.region.backing import Backing
from pkernfs.region.region import Region

POOL = PoolFields(POOL_DIRECTORY, BLOCK)


class QuietRegion(Region):
    """A mapped segment whose stores are in no trace: that is the region's alone."""

    def copy_in(self, offset: RegionOff, data: bytes | bytearray | memoryview) -> None:
        self.view(offset, len(data))[:] = data

    def zero(self, offset: RegionOff, length: int) -> None:
        self.view(offset, length)[:] = bytes(length)


class MemoryPool:
    """``memories`` has a descriptor for each segment that there is; it outlives the mounts.

    ``busy`` are those that somebody holds; ``log`` gets a word for each change.
    """

    kind = POOL_DIRECTORY
    granule = BLOCK
    name = "memory"
    passes = False

    def __init__(self, total: int = 64 * BLOCK) -> None:
        self.total = total
        self.passed: Passed = nothing_is_passed
        self.memories: dict[SegmentNo, int] = {}
        self.owners: dict[SegmentNo, Owner] = {}
        self.busy: set[SegmentNo] = set()
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

    # ------------------------------------------------------------------ the protocol

    def capacity(self) -> int:
        return self.total

    def space(self) -> Space:
        free = self.total - sum(map(self.length, self.memories))
        return Space(self.total, free, free)

    def plan(self, wanted: Segment, others: list[Segment]) -> Segment:
        used = sum(row.length for row in others)
        if used + wanted.length > self.total:
            raise NoSpaceError(f"{self.name}: full: the largest piece has {self.total - used}")
        return wanted

    def create(self, segment: Segment) -> Segment:
        assert segment.number not in self.memories
        fd = os.memfd_create("segment")
        os.ftruncate(fd, segment.length)
        self.memories[segment.number] = fd
        self.owners[segment.number] = Owner(0, 0, 0o600)
        self.changed()
        return segment._replace(valid=segment.length, handle=os.fstat(fd).st_ino)

    def restore(self, segment: Segment) -> Segment:
        if segment.number not in self.memories:
            raise RegionError(f"segment {segment.number}: lost: it is not there")
        if self.length(segment.number) < segment.valid:
            raise RegionError(f"segment {segment.number}: lost: it is too short")
        return self.resize(segment)

    def check_unused(self, segment: Segment) -> None:
        if segment.number in self.busy:
            raise BusyError(f"segment {segment.number}: busy: a test holds it")

    def resize(self, segment: Segment) -> Segment:
        if segment.length < self.length(segment.number):
            self.check_unused(segment)
        os.ftruncate(self.memories[segment.number], segment.length)
        self.changed()
        return segment._replace(valid=segment.length)

    def punch(self, segment: Segment, start: int, end: int) -> None:
        self.check_unused(segment)
        os.pwrite(self.memories[segment.number], bytes(end - start), start)
        self.changed()

    def destroy(self, segment: Segment) -> None:
        self.check_unused(segment)
        fd = self.memories.pop(segment.number, None)
        if fd is not None:
            os.close(fd)
        self.changed()

    def strays(self, known: list[Segment]) -> list[str]:
        return [
            f"segment {number}: a stray"
            for number in self.memories
            if number not in {row.number for row in known}
        ]

    def set_owner(self, segment: Segment, owner: Owner) -> None:
        self.owners[segment.number] = owner
        self.changed()

    def open(self, segment: Segment, *, write: bool) -> Region:
        if segment.number not in self.memories:
            raise RegionError(f"segment {segment.number}: lost: it is not there")
        backing = Backing(f"segment {segment.number}", self.length(segment.number))
        backing.fd = os.dup(self.memories[segment.number])
        backing._fds = [backing.fd]
        return QuietRegion(backing, writable=write)

    def native_path(self, segment: Segment) -> str:
        return f"/proc/self/fd/{self.memories[segment.number]}"

    def holders(self, segment: Segment) -> list[Holder]:
        return [Holder(0, "a test", "holds")] if segment.number in self.busy else []

    def close(self) -> None:
        """The memories stay."""

    def __enter__(self) -> MemoryPool:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self.memories.values():
            os.close(fd)
