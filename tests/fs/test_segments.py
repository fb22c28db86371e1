"""Files with segments, on a pool in memory: who gets one, its bytes, how it grows and goes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    BusyError,
    CorruptionError,
    NoSpaceError,
    ReadOnlyError,
    RegionError,
    TooBigError,
    WorkNeeded,
)
from pkernfs.fs import mkfs
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import (
    INODE_FLAG_PENDING,
    INODE_FLAG_SEGMENT,
    INODE_FLAG_SEGMENT_OFF,
    INODE_FLAG_SEGMENT_ON,
    PAGE,
    ROOT_INO,
    SEGMENT_IN_USE,
)
from pkernfs.pool.pool import Owner
from pkernfs.quantities import Ino, RegionOff, SegmentNo
from pkernfs.region.region import Region
from support.memory_pool import POOL, Memory, MemoryPool, QuietRegion

MIB = 1 << 20
REG = stat.S_IFREG | 0o640
T = TypeVar("T")
Run = Callable[[Callable[[], T]], T]


@pytest.fixture
def pool() -> Iterator[MemoryPool]:
    with MemoryPool() as pool:
        yield pool


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(16 * MIB) as region:
        mkfs.make_filesystem(region, pool=POOL)
        yield region


@pytest.fixture
def fs(region: Region, pool: MemoryPool) -> FileSystem:
    return mount(region, pool)


def mount(region: Region, pool: MemoryPool, *, segments: bool = True) -> FileSystem:
    return mount_filesystem(region, open_pool=pool.opener(), segments=segments)


def make(fs: FileSystem, size: int, name: bytes = b"f") -> Ino:
    ino = fs.create(ROOT_INO, name, REG, 3, 4).ino
    fs.run(lambda: fs.setattr(ino, size=size))
    return ino


def write(fs: FileSystem, ino: Ino, offset: int, data: bytes) -> None:
    fs.run(lambda: fs.write(ino, offset, data))


def resize(fs: FileSystem, ino: Ino, size: int) -> None:
    fs.run(lambda: fs.setattr(ino, size=size))


def number(fs: FileSystem, ino: Ino) -> SegmentNo:
    row = fs.segments.find(ino)
    assert row is not None
    return row.number


def test_truncate_to_2_mib_gives_a_segment(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 4 * MIB)
    row = fs.segments.find(ino)
    assert row is not None
    assert row.length == row.valid == 4 * MIB
    assert row.state == SEGMENT_IN_USE
    assert pool.owners[row.number] == Owner(3, 4, 0o640)
    assert fs.stat(ino).data_pages * PAGE == 4 * MIB
    assert fs.read(ino, 0, 16) == bytes(16)
    write(fs, ino, 3 * MIB, b"guest")
    assert bytes(fs.read(ino, 3 * MIB, 5)) == b"guest"
    assert pool.bytes(row.number)[3 * MIB :][:5] == b"guest"


@pytest.mark.parametrize("size", [1, 2 * MIB - 1])
def test_less_than_2_mib_gives_none(fs: FileSystem, size: int) -> None:
    assert fs.segments.find(make(fs, size)) is None


def test_fallocate_gives_one_too(fs: FileSystem, pool: MemoryPool) -> None:
    ino = fs.create(ROOT_INO, b"f", REG, 0, 0).ino
    fs.run(lambda: fs.fallocate(ino, FALLOC_KEEP_SIZE, 0, 3 * MIB))
    assert fs.inode(ino).size == 0
    assert pool.length(number(fs, ino)) == 4 * MIB


def test_fallocate_at_the_end_gives_none(fs: FileSystem) -> None:
    """Databases lengthen their files so. A file that wants a segment gets it all the same."""
    plain, wanted = (fs.create(ROOT_INO, name, REG, 0, 0).ino for name in (b"f", b"g"))
    fs.inode(wanted).flags |= INODE_FLAG_SEGMENT_ON
    for ino in (plain, wanted):
        for offset in (0, MIB, 2 * MIB):
            fs.run(lambda ino=ino, offset=offset: fs.fallocate(ino, 0, offset, MIB))  # type: ignore[misc]
        assert fs.inode(ino).size == 3 * MIB
    assert fs.segments.find(plain) is None
    assert fs.segments.find(wanted) is not None


def test_a_write_gives_none(fs: FileSystem) -> None:
    ino = fs.create(ROOT_INO, b"f", REG, 0, 0).ino
    write(fs, ino, 0, b"x" * 3 * MIB)
    assert fs.segments.find(ino) is None
    resize(fs, ino, 5 * MIB)  # it has its memory already
    assert fs.segments.find(ino) is None


def test_a_small_file_is_copied(fs: FileSystem) -> None:
    ino = fs.create(ROOT_INO, b"f", REG, 0, 0).ino
    data = os.urandom(70_000)
    write(fs, ino, 5000, data)
    before = fs.super.statfs().free
    resize(fs, ino, 2 * MIB)
    assert fs.segments.find(ino) is not None
    assert not fs.inode(ino).extents
    assert bytes(fs.read(ino, 0, 75_000)) == bytes(5000) + data
    assert fs.super.statfs().free >= before


def test_none_where_they_are_not_wanted(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool, segments=False)
    assert fs.segments.find(make(fs, 4 * MIB)) is None


def choose(fs: FileSystem, flag: int) -> Ino:
    """An empty file that says itself whether it is to have a segment."""
    inode = fs.inode(fs.create(ROOT_INO, b"f", REG, 0, 0).ino)
    with fs.store:
        fs.super.inodes.touch(inode)
        inode.flags |= flag
        fs.super.inodes.save(inode)
    return inode.ino


@pytest.mark.parametrize("segments", [True, False])
def test_a_file_that_wants_one_gets_it_with_any_size(
    region: Region, pool: MemoryPool, segments: bool
) -> None:
    fs = mount(region, pool, segments=segments)
    ino = choose(fs, INODE_FLAG_SEGMENT_ON)
    write(fs, ino, 0, b"written")
    assert fs.segments.find(ino) is None
    fs.unmount()
    fs = mount(region, pool, segments=segments)
    resize(fs, ino, 8)
    assert fs.segments.find(ino) is not None
    assert bytes(fs.read(ino, 0, 9)) == b"written\0"
    resize(fs, ino, 0)
    assert fs.segments.find(ino) is None
    resize(fs, ino, 1)
    assert fs.segments.find(ino) is not None


def test_a_file_that_wants_none_gets_none(fs: FileSystem) -> None:
    ino = choose(fs, INODE_FLAG_SEGMENT_OFF)
    resize(fs, ino, 4 * MIB)
    assert fs.segments.find(ino) is None


def test_a_full_pool_changes_nothing(fs: FileSystem, pool: MemoryPool) -> None:
    pool.total = 4 * MIB
    ino = fs.create(ROOT_INO, b"f", REG, 0, 0).ino
    with pytest.raises(NoSpaceError):
        resize(fs, ino, 6 * MIB)
    assert not fs.segments.table.rows
    assert not fs.inode(ino).size


def test_what_is_removed_makes_room(fs: FileSystem, pool: MemoryPool) -> None:
    pool.total = 4 * MIB
    make(fs, 4 * MIB)
    fs.unlink(ROOT_INO, b"f")
    ino = make(fs, 4 * MIB, b"g")
    assert list(pool.memories) == [number(fs, ino)]


def test_grows_with_truncate_and_write(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 2 * MIB)
    resize(fs, ino, 2 * MIB + 1)
    assert pool.length(number(fs, ino)) == 4 * MIB
    write(fs, ino, 4 * MIB - 2, b"abcd")
    assert pool.length(number(fs, ino)) == 6 * MIB
    assert fs.inode(ino).size == 4 * MIB + 2
    assert fs.stat(ino).data_pages * PAGE == 6 * MIB


def test_does_not_grow_without_room(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 2 * MIB)
    pool.total = 3 * MIB
    with pytest.raises(NoSpaceError):
        resize(fs, ino, 6 * MIB)
    row = fs.segments.find(ino)
    assert row is not None
    assert row.length == row.valid == 2 * MIB == fs.inode(ino).size


def test_shrinks_and_reads_as_zeros_when_it_grows_again(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 6 * MIB)
    write(fs, ino, 0, b"x" * 6 * MIB)
    resize(fs, ino, 3 * MIB - 7)
    assert pool.length(number(fs, ino)) == 4 * MIB
    assert fs.stat(ino).data_pages * PAGE == 4 * MIB
    resize(fs, ino, 6 * MIB)
    assert bytes(fs.read(ino, 0, 6 * MIB)) == b"x" * (3 * MIB - 7) + bytes(3 * MIB + 7)


def test_cut_to_nothing_it_has_none(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 4 * MIB)
    resize(fs, ino, 0)
    assert fs.segments.find(ino) is None
    assert not fs.stat(ino).data_pages
    assert fs.segments.reap() == {}
    assert not pool.memories
    assert not fs.segments.table.rows


def test_punched_bytes_read_as_zeros(fs: FileSystem) -> None:
    ino = make(fs, 4 * MIB)
    write(fs, ino, 0, b"x" * 4 * MIB)
    mode = FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE
    fs.run(lambda: fs.fallocate(ino, mode, MIB + 1, MIB))
    wanted = b"x" * (MIB + 1) + bytes(MIB) + b"x" * (2 * MIB - 1)
    assert bytes(fs.read(ino, 0, 4 * MIB)) == wanted
    assert not fs.inode(ino).flags & ~INODE_FLAG_SEGMENT


def test_what_is_held_is_neither_cut_nor_punched(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 4 * MIB)
    write(fs, ino, 0, b"x" * 4 * MIB)
    pool.busy.add(number(fs, ino))
    for change in (
        lambda: fs.setattr(ino, size=MIB),
        lambda: fs.setattr(ino, size=0),
        lambda: fs.fallocate(ino, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, 0, MIB),
    ):
        with pytest.raises(BusyError, match="a test holds it"):
            fs.run(change)
    assert fs.inode(ino).size == 4 * MIB
    assert bytes(fs.read(ino, 0, 4 * MIB)) == b"x" * 4 * MIB


def test_removed_while_held_it_stays_until_the_last_holder_goes(
    fs: FileSystem, pool: MemoryPool
) -> None:
    ino = make(fs, 4 * MIB)
    held = number(fs, ino)
    pool.busy.add(held)
    fs.unlink(ROOT_INO, b"f")
    assert "a test holds it" in fs.segments.reap()[held]
    assert held in pool.memories
    pool.busy.clear()
    assert fs.segments.reap() == {}
    assert not pool.memories
    assert not fs.segments.table.rows


def test_owner_and_mode_follow(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 4 * MIB)
    fs.setattr(ino, mode=0o600)
    fs.setattr(ino, uid=7, gid=8)
    assert pool.owners[number(fs, ino)] == Owner(7, 8, 0o600)


def test_space_adds_up(fs: FileSystem, pool: MemoryPool) -> None:
    before = fs.statfs()
    ino = make(fs, 6 * MIB)
    now = fs.statfs()
    assert now.blocks == before.blocks
    assert 0 <= before.free - now.free - 6 * MIB // PAGE < 8  # and the table's node
    fs.unlink(ROOT_INO, b"f")
    assert before.free - fs.statfs().free < 8
    del ino


def test_nothing_but_statfs_asks_for_the_space(
    fs: FileSystem, pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take milliseconds: a caller who knows it already says it."""
    space = pool.space()
    before = fs.statfs()
    monkeypatch.setattr(pool, "space", lambda: pytest.fail("asked"))
    ino = make(fs, 6 * MIB)
    capacity = fs.super.statfs().blocks * PAGE + pool.total
    with pytest.raises(TooBigError, match=f"the file system holds {capacity} bytes"):
        resize(fs, ino, 6 * MIB + capacity + 1)
    with pytest.raises(NoSpaceError):
        resize(fs, ino, pool.total + 2 * MIB)
    now = fs.statfs(space._replace(free=space.free - 6 * MIB))
    assert now.blocks == before.blocks
    assert 0 <= before.free - now.free - 6 * MIB // PAGE < 8


def test_all_of_it_is_data(fs: FileSystem) -> None:
    ino = make(fs, 5 * MIB)
    assert fs.seek(ino, MIB, os.SEEK_DATA) == MIB
    assert fs.seek(ino, MIB, os.SEEK_HOLE) == 5 * MIB
    assert [tuple(e) for e in fs.extents(ino)] == [(0, 5 * MIB, 0)]
    assert fs.memory(ino).size == 6 * MIB


def test_a_later_mount_finds_it(region: Region, pool: MemoryPool, fs: FileSystem) -> None:
    ino = make(fs, 4 * MIB)
    write(fs, ino, 0, b"guest")
    fs.unmount()
    again = mount(region, pool)
    assert bytes(again.read(ino, 0, 5)) == b"guest"
    assert not again.segments.lost


def test_a_lost_segment_is_one_files_loss(region: Region, pool: MemoryPool, fs: FileSystem) -> None:
    ino, other = make(fs, 4 * MIB), make(fs, 4 * MIB, b"g")
    fs.unmount()
    os.close(pool.memories.pop(number(fs, ino)))
    again = mount(region, pool)
    with pytest.raises(RegionError, match="lost"):
        again.read(ino, 0, 1)
    assert again.read(other, 0, 1) == b"\0"
    again.unlink(ROOT_INO, b"f")
    again.segments.reap()
    assert not again.segments.lost


def test_without_its_pool_all_are_lost(region: Region, fs: FileSystem) -> None:
    ino = make(fs, 4 * MIB)
    fs.unmount()
    again = mount_filesystem(region, open_pool=lambda sb: None)
    with pytest.raises(RegionError):
        again.read(ino, 0, 1)


# ---------------------------------------------------------------------- operations that meet


class Turn:
    """An operation in its turn, step by step: another one can come between."""

    def __init__(self, fs: FileSystem, operation: Callable[[], object]) -> None:
        self._fs = fs
        self._turn = fs.segments.turn()
        self._call = self._turn.__enter__()
        self._operation = operation
        self.need: WorkNeeded | None = None
        self.step()

    def step(self) -> None:
        """Do the work that it needs, and call it again."""
        if self.need is not None:
            self.need.work()
        try:
            self._call(self._operation)
            self.need = None
        except WorkNeeded as need:
            self.need = need

    def end(self) -> None:
        """Let it come to its end."""
        while self.need is not None:
            self.step()
        self.give_up()

    def give_up(self) -> None:
        self._turn.__exit__(None, None, None)

    def kill(self) -> None:
        """The daemon ends here, and does nothing more."""
        self._fs.segments.turns._end = lambda changed: None


def waits(operation: Callable[[], object]) -> bool:
    """Tell if an operation without a turn waits for one."""
    try:
        operation()
    except WorkNeeded:
        return True
    return False


def test_creation_that_is_given_up_leaves_nothing(fs: FileSystem, pool: MemoryPool) -> None:
    ino = fs.create(ROOT_INO, b"f", REG, 3, 4).ino
    turn = Turn(fs, lambda: fs.setattr(ino, size=4 * MIB))
    turn.step()
    assert turn.need is not None
    turn.need.work()
    assert len(pool.memories) == 1
    turn.give_up()
    fs.segments.reap()
    assert not pool.memories
    assert not fs.segments.table.rows
    resize(fs, ino, 6 * MIB)
    assert pool.length(number(fs, ino)) == 6 * MIB


def test_creation_for_a_file_that_goes(fs: FileSystem, pool: MemoryPool) -> None:
    ino = fs.create(ROOT_INO, b"f", REG, 3, 4).ino
    fs.open(ino)
    turn = Turn(fs, lambda: fs.setattr(ino, size=4 * MIB))
    turn.step()
    fs.unlink(ROOT_INO, b"f")
    turn.end()
    assert pool.length(number(fs, ino)) == 4 * MIB
    fs.release(ino)
    fs.segments.reap()
    assert not pool.memories


def test_creation_for_a_file_that_grows(fs: FileSystem, pool: MemoryPool) -> None:
    """What is written meanwhile is in the segment, too."""
    ino = fs.create(ROOT_INO, b"f", REG, 3, 4).ino
    turn = Turn(fs, lambda: fs.fallocate(ino, 0, 0, 2 * MIB))
    turn.step()
    write(fs, ino, 3 * MIB, b"far out")
    turn.end()
    fs.segments.reap()
    assert bytes(fs.read(ino, 3 * MIB, 9)) == b"far out"
    assert len(pool.memories) == len(fs.segments.table.rows) == 0, "it has a hole, so it has none"


def test_two_creations(fs: FileSystem, pool: MemoryPool) -> None:
    """The second one waits, and then plans with what the first one has left."""
    pool.total = 4 * MIB
    inos = [fs.create(ROOT_INO, name, REG, 3, 4).ino for name in (b"f", b"g")]
    turn = Turn(fs, lambda: fs.setattr(inos[0], size=4 * MIB))
    assert waits(lambda: fs.setattr(inos[1], size=2 * MIB))
    turn.end()
    with pytest.raises(NoSpaceError):
        resize(fs, inos[1], 2 * MIB)


def cutting(fs: FileSystem, ino: Ino, size: int) -> Turn:
    """A cut whose transaction is there, and whose memory is still what it was."""
    turn = Turn(fs, lambda: fs.setattr(ino, size=size))
    turn.step()
    assert fs.inode(ino).size == size
    return turn


def test_nobody_sees_or_loses_bytes_while_a_file_is_cut(fs: FileSystem) -> None:
    ino = make(fs, 4 * MIB)
    write(fs, ino, 0, b"x" * 4 * MIB)
    turn = cutting(fs, ino, MIB)
    assert waits(lambda: fs.read(ino, 0, 10))
    assert waits(lambda: fs.write(ino, 3 * MIB, b"new"))
    assert waits(lambda: fs.setattr(ino, size=3 * MIB))
    assert waits(lambda: fs.fallocate(ino, 0, 0, 3 * MIB))
    turn.end()
    write(fs, ino, 3 * MIB, b"new")
    assert bytes(fs.read(ino, 0, 4 * MIB)) == b"x" * MIB + bytes(2 * MIB) + b"new"


def test_another_hole_is_punched_too(fs: FileSystem) -> None:
    ino = make(fs, 4 * MIB)
    write(fs, ino, 0, b"x" * 4 * MIB)
    mode = FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE
    turn = Turn(fs, lambda: fs.fallocate(ino, mode, 0, MIB))
    turn.step()
    assert fs.inode(ino).flags & INODE_FLAG_PENDING
    assert waits(lambda: fs.fallocate(ino, mode, 2 * MIB, MIB))
    turn.give_up()  # its caller is gone: what it has begun is the next one's to end
    fs.run(lambda: fs.fallocate(ino, mode, 2 * MIB, MIB))
    assert bytes(fs.read(ino, 0, 4 * MIB)) == (bytes(MIB) + b"x" * MIB) * 2


def test_a_cut_sets_times_once(fs: FileSystem) -> None:
    ino = make(fs, 4 * MIB)
    turn = cutting(fs, ino, MIB)
    mtime = fs.inode(ino).mtime
    turn.end()
    assert fs.inode(ino).mtime == mtime


def test_a_zeroed_range_that_is_cut_meanwhile(fs: FileSystem, pool: MemoryPool) -> None:
    """The file gets its memory back before it gets its size."""
    ino = make(fs, 12 * MIB)
    steps = fs.fallocate_steps(ino, FALLOC_ZERO_RANGE, 0, 12 * MIB)
    next(steps)
    resize(fs, ino, MIB)
    with pytest.raises(WorkNeeded):
        list(steps)
    fs.run(lambda: fs.fallocate(ino, FALLOC_ZERO_RANGE, 0, 12 * MIB))
    assert fs.inode(ino).size == pool.length(number(fs, ino)) == 12 * MIB


def test_an_owner_that_comes_while_the_memory_changes(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 2 * MIB)
    turn = Turn(fs, lambda: fs.setattr(ino, size=4 * MIB))
    turn.step()
    fs.setattr(ino, mode=0o600)
    assert pool.owners[number(fs, ino)].mode == 0o640, "the pool is changing it"
    turn.end()
    assert pool.owners[number(fs, ino)].mode == 0o600


def test_growth_that_is_given_up_goes_on(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 2 * MIB)
    turn = Turn(fs, lambda: fs.setattr(ino, size=4 * MIB))
    turn.step()
    turn.give_up()
    assert fs.inode(ino).size == 2 * MIB
    resize(fs, ino, 6 * MIB)
    assert pool.length(number(fs, ino)) == 6 * MIB == fs.inode(ino).data_pages * PAGE


def test_what_is_frozen_while_the_pool_works(
    region: Region, fs: FileSystem, pool: MemoryPool
) -> None:
    held, ino = make(fs, 2 * MIB), fs.create(ROOT_INO, b"g", REG, 3, 4).ino
    fs.unlink(ROOT_INO, b"f")
    del held
    reaping = fs.segments.reaping()
    assert reaping is not None
    turn = Turn(fs, lambda: fs.setattr(ino, size=2 * MIB))
    turn.step()
    fs.freeze()
    before = region.read(RegionOff(0), region.size)
    fs.segments.reaped(reaping())
    with pytest.raises(ReadOnlyError):
        turn.end()
    turn.give_up()
    assert region.read(RegionOff(0), region.size) == before
    fs.thaw()
    fs.segments.reap()
    assert not pool.memories
    assert not fs.segments.table.rows


# ---------------------------------------------------------------------- what must not happen


def test_a_file_gets_none_that_is_too_short_for_it(fs: FileSystem) -> None:
    ino = fs.create(ROOT_INO, b"f", REG, 0, 0).ino
    write(fs, ino, 9 * MIB, b"far out")
    fs.fallocate(ino, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, 0, 10 * MIB)  # it has no memory now
    fs.run(lambda: fs.fallocate(ino, 0, 0, 2 * MIB))
    assert fs.segments.find(ino) is None
    assert bytes(fs.read(ino, 9 * MIB, 9)) == bytes(7)


def test_what_a_device_reaches_stays(fs: FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    ino = fs.create(ROOT_INO, b"f", REG, 0, 0).ino
    write(fs, ino, 0, b"x" * 5000)
    monkeypatch.setattr(fs.pins, "active", True)
    monkeypatch.setattr(fs.pins, "holder", lambda extents: "dom-1" if list(extents) else None)
    resize(fs, ino, 4 * MIB)
    assert fs.segments.find(ino) is None


def test_a_failed_write_leaves_zeros(fs: FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a file on tmpfs can be full at any store."""
    ino = make(fs, 3 * MIB)

    def full(self: Region, offset: RegionOff, data: bytes) -> None:
        self.view(offset, 5)[:] = b"stale"
        raise NoSpaceError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(QuietRegion, "copy_in", full)
        with pytest.raises(NoSpaceError):
            write(fs, ino, 3 * MIB, b"new" * 100)
    assert not fs.inode(ino).flags & INODE_FLAG_PENDING
    resize(fs, ino, 4 * MIB)
    assert bytes(fs.read(ino, 3 * MIB, MIB)) == bytes(MIB)


def test_no_old_byte_after_a_cut_that_somebody_prevented(fs: FileSystem, pool: MemoryPool) -> None:
    """Between the look and the cut somebody has come to hold it."""
    ino = make(fs, 4 * MIB)
    write(fs, ino, 0, b"x" * 4 * MIB)
    turn = cutting(fs, ino, MIB)
    pool.busy.add(number(fs, ino))
    turn.end()
    assert pool.length(number(fs, ino)) == 4 * MIB
    pool.busy.clear()
    resize(fs, ino, 4 * MIB)
    assert bytes(fs.read(ino, 0, 4 * MIB)) == b"x" * MIB + bytes(3 * MIB)


def test_preallocated_memory_stays_with_the_same_size(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 2 * MIB)
    fs.run(lambda: fs.fallocate(ino, FALLOC_KEEP_SIZE, 0, 4 * MIB))
    resize(fs, ino, 2 * MIB)
    row = fs.segments.find(ino)
    assert row is not None
    assert row.length == pool.length(row.number) == 4 * MIB


def test_more_segments_than_are_mapped(fs: FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkernfs.fs.segment_memory._MOST_MAPPED", 2)
    inos = [make(fs, 2 * MIB, b"%d" % i) for i in range(4)]
    for _ in range(2):
        for i, ino in enumerate(inos):
            write(fs, ino, 0, b"%d" % i)
    assert [bytes(fs.read(ino, 0, 1)) for ino in inos] == [b"0", b"1", b"2", b"3"]


def test_a_damaged_table_costs_no_memory(
    region: Region, fs: FileSystem, pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What seems to be nobody's may be a file's, and what seems to be free may not be."""
    ino = make(fs, 2 * MIB)
    fs.unmount()
    monkeypatch.setattr(
        "pkernfs.fs.segment_table.parse", lambda *_: (_ for _ in ()).throw(CorruptionError("bad"))
    )
    monkeypatch.setattr(pool, "strays", lambda known: pool.put({}))
    again = mount(region, pool)
    assert pool.memories
    other = again.create(ROOT_INO, b"g", REG, 0, 0).ino
    with pytest.raises(RegionError, match="run fsck"):
        resize(again, other, 2 * MIB)
    with pytest.raises(CorruptionError):
        again.read(ino, 0, 1)


# ---------------------------------------------------------------------- lost memory


def lose(pool: MemoryPool) -> dict[SegmentNo, Memory]:
    """Take all memory away; for a later :meth:`MemoryPool.put`."""
    before = pool.state()
    pool.put({})
    return before


def test_a_lost_segment_fails_as_a_disk_does(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 4 * MIB)
    lose(pool)
    again = mount(fs.region, pool)
    for change in (
        lambda: again.read(ino, 0, 1),
        lambda: again.write(ino, 0, b"x"),
        lambda: again.setattr(ino, size=MIB),
        lambda: again.setattr(ino, size=9 * MIB),
    ):
        with pytest.raises(RegionError) as caught:
            again.run(change)
        assert caught.value.errno == errno.EIO
    again.setattr(ino, mode=0o600)
    resize(again, ino, 0)
    assert again.segments.find(ino) is None
    again.segments.reap()
    assert not again.segments.table.rows


def test_memory_that_is_lost_and_comes_back(fs: FileSystem, pool: MemoryPool) -> None:
    """What a cut has left to do is done when there is memory to do it with."""
    ino = make(fs, 4 * MIB)
    write(fs, ino, 0, b"x" * 4 * MIB)
    cutting(fs, ino, MIB).kill()
    before = lose(pool)
    again = mount(fs.region, pool)
    again.unmount()
    pool.put(before)
    again = mount(fs.region, pool)
    assert not again.inode(ino).flags & INODE_FLAG_PENDING
    assert pool.length(number(again, ino)) == 2 * MIB
    resize(again, ino, 2 * MIB)
    assert bytes(again.read(ino, 0, 2 * MIB)) == b"x" * MIB + bytes(MIB)


def test_without_the_pool_a_cut_is_not_finished(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 4 * MIB)
    cutting(fs, ino, MIB).kill()
    again = mount_filesystem(fs.region, open_pool=lambda sb: None)
    again.unmount()
    again = mount(fs.region, pool)
    assert not again.inode(ino).flags & INODE_FLAG_PENDING


def test_a_file_that_is_larger_than_its_segment(
    fs: FileSystem, pool: MemoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    """What is there can be read."""
    ino = make(fs, 4 * MIB)
    write(fs, ino, 0, b"guest")
    with fs.store:
        inode = fs.inode(ino)
        fs.super.inodes.touch(inode)
        inode.size = 5 * MIB
        fs.super.inodes.save(inode)
    again = mount(fs.region, pool)
    assert "larger than its segment: got 5242880 bytes" in caplog.text
    assert bytes(again.read(ino, 0, 5)) == b"guest"
    with pytest.raises(RegionError) as caught:
        again.read(ino, 4 * MIB, 5)
    assert caught.value.errno == errno.EIO


def test_a_read_only_mount_changes_nothing(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, 4 * MIB)
    write(fs, ino, 0, b"x" * 4 * MIB)
    make(fs, 2 * MIB, b"g")
    fs.unlink(ROOT_INO, b"g")
    cutting(fs, ino, MIB).kill()
    before = pool.state()
    again = mount_filesystem(fs.region, read_only=True, open_pool=pool.opener())
    assert bytes(again.read(ino, 0, 4 * MIB)) == b"x" * MIB
    again.unmount()
    assert pool.state() == before
