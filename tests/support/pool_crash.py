"""Crash points of a file system with a pool of segments: each of the pool's steps is one too.

An image of such a file system is the region's bytes and, as ``pool``, the state of a
:class:`~support.memory_pool.MemoryPool`; see :mod:`support.crash` for what is done with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs import mkfs
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import INODE_FLAG_SEGMENT, PAGE, SEGMENT_DEAD, SEGMENT_IN_USE
from pkernfs.pool.pool import Owner, Segment
from pkernfs.quantities import PhysAddr, RegionOff, SegmentNo
from pkernfs.region import trace
from pkernfs.region.region import Region
from pkernfs.region.trace import Store
from support.crash import MIB, Clock, Operation, Replay, Sweep
from support.handover import verify
from support.memory_pool import POOL, Memory, MemoryPool

REGION_BYTES = 8 * MIB
POOL_BYTES = 10 * MIB


class Image(bytes):
    """The bytes of a region, and the pool beside it."""

    pool: PoolStep


class PoolStep(NamedTuple):
    """The pool after a step of one of its changes; ``busy`` is who is held, in any state of it."""

    memories: dict[SegmentNo, Memory]
    busy: frozenset[SegmentNo]
    dirty: bool

    def __str__(self) -> str:
        return "pool: " + ", ".join(
            f"{number}: {len(memory.data)} of {memory.owner.uid}"
            for number, memory in self.memories.items()
        )


def image_of(region: bytes, pool: PoolStep) -> Image:
    """Put an image together."""
    image = Image(region)
    image.pool = pool
    return image


class PoolReplay(Replay):
    """A region and its pool at some point of a trace."""

    def __init__(self, image: bytes, phys_base: PhysAddr | None = None) -> None:
        super().__init__(image, phys_base)
        assert isinstance(image, Image)
        self.step = image.pool
        self.pool = MemoryPool(POOL_BYTES, dirty=self.step.dirty)
        self.pool.changed = self._pool_changed
        self.pool.put(self.step.memories)
        self.pool.busy = set(self.step.busy)
        #: How often the pool has changed in all.
        self.changes = 0
        self._fs: FileSystem | None = None
        self._steps: list[Any] | None = None

    def _pool_changed(self) -> None:
        self.changes += 1
        if self._steps is not None:
            self._steps += trace.trace_stop()
            self._steps.append(self._pool_now())
            trace.trace_start()

    def _pool_now(self) -> PoolStep:
        return PoolStep(self.pool.state(), frozenset(self.pool.busy), self.pool.dirty)

    def now(self) -> Image:
        return image_of(super().now(), self._pool_now())

    def mount(self, clock: Clock, *, read_only: bool = False) -> FileSystem:
        self._let_go()
        self._fs = mount_filesystem(
            self.region, clock=clock, read_only=read_only, open_pool=self.pool.opener()
        )
        return self._fs

    def _let_go(self) -> None:
        """What was mounted is gone, as a daemon that was killed."""
        if self._fs is not None:
            self._fs.segments.close()
            self._fs = None

    def record(self, operation: Callable[[], object]) -> list[Any]:
        self._steps = []
        trace.trace_start()
        try:
            operation()
        finally:
            self._steps += trace.trace_stop()
            steps, self._steps = self._steps, None
        return steps

    def store(self, piece: Any) -> bool:
        if not isinstance(piece, PoolStep):
            return super().store(piece)
        changed = piece != self.step
        self.step = piece
        self.pool.put(piece.memories)
        return changed

    def look(self, check: Callable[[Region], object]) -> list[Store]:
        before = self.changes
        try:
            return super().look(check)
        finally:
            self._let_go()
            if self.changes != before:
                self.pool.put(self.step.memories)

    def steps_of(self, operation: Callable[[], object]) -> list[Any]:
        steps = self.record(operation)
        self._let_go()
        self.undo([step for step in steps if isinstance(step, Store)])
        self.pool.put(self.step.memories)
        return steps

    def close(self) -> None:
        self._let_go()
        self.pool.put({})
        super().close()


def formatted(populate: Operation, *, dirty: bool) -> Image:
    """A file system with a pool, made and unmounted; the same in every run."""
    with Region.anonymous(REGION_BYTES) as region:
        with mock.patch("pkernfs.fs.mkfs.os.urandom", lambda n: bytes(range(n))):
            mkfs.make_filesystem(region, uuid=bytes(range(16, 32)), clock=Clock(), pool=POOL)
        image = image_of(region.read(RegionOff(0), REGION_BYTES), PoolStep({}, frozenset(), dirty))
    replay = PoolReplay(image)
    fs = replay.mount(Clock())
    populate(fs)
    fs.unmount()
    made = replay.now()
    replay.close()
    return made


# ---------------------------------------------------------------------- what is right


def check_pool(fs: FileSystem, pool: MemoryPool) -> None:
    """What holds between two operations, and so after each mount.

    :raises AssertionError: files, rows and memories do not fit each other, or the space is wrong.
    """
    rows = fs.segments.table.rows
    assert pool.memories.keys() == rows.keys(), "memory without a row, or a row without memory"
    files = {SegmentNo(i.body): i for i in map(fs.inode, fs.numbers()) if _has_segment(fs, i.ino)}
    for number, row in rows.items():
        assert pool.length(number) == row.length, f"segment {number}: another length than its row"
        if row.state == SEGMENT_DEAD:
            assert number in pool.busy, f"segment {number}: dead, but not destroyed"
            continue
        _check_file(fs, pool, row)
    assert files.keys() == {n for n, row in rows.items() if row.state == SEGMENT_IN_USE}
    assert sum(i.data_pages * PAGE for i in files.values()) == _held(fs, SEGMENT_IN_USE)
    check_space(fs, pool)


def _held(fs: FileSystem, state: int) -> int:
    """Bytes of the segments in a state."""
    return sum(row.length for row in fs.segments.table.rows.values() if row.state == state)


def check_space(fs: FileSystem, pool: MemoryPool) -> None:
    """:raises AssertionError: what statfs tells, the rows and the pool do not add up."""
    held, dead = _held(fs, SEGMENT_IN_USE), _held(fs, SEGMENT_DEAD)
    now, base = fs.statfs(), fs.super.statfs()
    assert now.blocks - base.blocks == pool.total // PAGE, "the pool's size"
    assert now.free - base.free == (pool.total - held) // PAGE, "free memory"
    assert pool.space().free == pool.total - held - dead, "what segments have"


def _has_segment(fs: FileSystem, ino: Any) -> bool:
    return bool(fs.inode(ino).flags & INODE_FLAG_SEGMENT)


def _check_file(fs: FileSystem, pool: MemoryPool, row: Segment) -> None:
    inode, number = fs.inode(row.ino), row.number
    assert row.state == SEGMENT_IN_USE, f"segment {number}: state {row.state}"
    assert fs.segments.find(row.ino) == row, f"segment {number}: its file has another one"
    assert row.valid == row.length == inode.data_pages * PAGE, f"segment {number}: {row}"
    assert inode.size <= row.length, f"segment {number}: shorter than its file"
    assert pool.owners[number] == Owner(inode.uid, inode.gid, inode.mode & 0o777)
    behind = pool.bytes(number)[inode.size :]
    assert behind == bytes(len(behind)), f"segment {number}: not zero behind the end"


class PoolSweep(Sweep):
    """All cuts of one scenario, of the pool's steps too."""

    replay = PoolReplay

    def check_more(self, fs: FileSystem, replay: Replay) -> FileSystem:
        """What the mount leaves, and that another mount finds nothing to do."""
        assert isinstance(replay, PoolReplay)
        check_pool(fs, replay.pool)
        report = verify(fs)
        assert not report.changes.all(), "the mount accuses somebody"
        assert not report.lost, "the mount misses a segment"
        rows, changes = dict(fs.segments.table.rows), replay.changes
        again = replay.mount(Clock(1 << 61))
        assert again.segments.table.rows == rows, "the second mount changes rows"
        assert replay.changes == changes, "the second mount changes the pool"
        assert not again.segments.lost
        return again
