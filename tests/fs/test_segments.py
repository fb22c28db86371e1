"""Files with segments, on a pool in memory: who gets one, its bytes, how it grows and goes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import BusyError, NoSpaceError, RegionError, TooBigError
from pkernfs.fs import mkfs
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import (
    INODE_FLAG_SEGMENT,
    INODE_FLAG_SEGMENT_OFF,
    INODE_FLAG_SEGMENT_ON,
    PAGE,
    ROOT_INO,
    SEGMENT_IN_USE,
)
from pkernfs.pool.pool import Owner
from pkernfs.quantities import Ino, SegmentNo
from pkernfs.region.region import Region
from support.memory_pool import POOL, MemoryPool

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


def reap(fs: FileSystem) -> dict[SegmentNo, str]:
    work = fs.segments.reaping()
    if work is None:
        return {}
    done = work()
    fs.segments.reaped(done)
    return done.reasons


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
    assert reap(fs) == {}
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
    assert "a test holds it" in reap(fs)[held]
    assert held in pool.memories
    pool.busy.clear()
    assert reap(fs) == {}
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
    reap(again)
    assert not again.segments.lost


def test_without_its_pool_all_are_lost(region: Region, fs: FileSystem) -> None:
    ino = make(fs, 4 * MIB)
    fs.unmount()
    again = mount_filesystem(region, open_pool=lambda sb: None)
    with pytest.raises(RegionError):
        again.read(ino, 0, 1)
