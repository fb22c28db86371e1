"""The segments that files have, and their bytes: mapped when asked for, so many at once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, NotSupportedError, RegionError, WorkNeeded
from pkernfs.fs import mkfs, segment_memory
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import ROOT_INO
from pkernfs.pool.pool import Owner
from pkernfs.quantities import Ino, SegmentNo
from pkernfs.region.region import Region
from support.memory_pool import POOL, MemoryPool

MIB = 1 << 20


@pytest.fixture
def fs() -> Iterator[FileSystem]:
    with MemoryPool() as pool, Region.anonymous(16 * MIB) as region:
        mkfs.make_filesystem(region, pool=POOL)
        yield mount_filesystem(region, open_pool=pool.opener())


def make(fs: FileSystem, name: bytes, size: int = 2 * MIB) -> Ino:
    ino = fs.create(ROOT_INO, name, stat.S_IFREG | 0o600, 0, 0).ino
    fs.run(lambda: fs.setattr(ino, size=size))
    return ino


def test_only_so_many_are_mapped_and_the_oldest_goes_first(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_memory, "_MOST_MAPPED", 2)
    inos = [make(fs, b"%d" % i) for i in range(3)]
    for ino in inos:
        fs.run(lambda ino=ino: fs.write(ino, 0, b"%d" % ino))  # type: ignore[misc]
    assert [bytes(fs.read(ino, 0, 1)) for ino in inos] == [b"%d" % ino for ino in inos]
    assert list(fs.segments._mapped) == [2, 3]
    fs.read(inos[1], 0, 1)
    assert list(fs.segments._mapped) == [3, 2]


def test_a_row_of_another_file_is_damage(fs: FileSystem) -> None:
    one, other = make(fs, b"a"), make(fs, b"b")
    inode = fs.inode(one)
    inode.body = fs.inode(other).body
    with pytest.raises(CorruptionError, match="no such segment"):
        fs.segments.of(inode)


def test_a_file_without_one_has_the_region(fs: FileSystem) -> None:
    ino = make(fs, b"a", 5)
    assert fs.segments.find(ino) is None
    assert fs.segments.descriptor(ino) is None
    with fs.segments.own_mapping(fs.segments.find(ino)) as memory:
        assert memory is fs.region
    assert fs.memory(ino) is fs.region


def test_another_thread_has_a_mapping_of_its_own(fs: FileSystem) -> None:
    ino = make(fs, b"a")
    fs.run(lambda: fs.write(ino, 0, b"guest"))
    mine = fs.memory(ino)
    with fs.segments.own_mapping(fs.segments.find(ino)) as memory:
        assert memory is not mine
        assert bytes(memory.view(0, 5)) == b"guest"  # type: ignore[arg-type]


def test_what_is_lost_is_known(fs: FileSystem) -> None:
    ino = make(fs, b"a")
    assert not fs.segments.is_lost(fs.inode(ino))
    fs.segments.lost[SegmentNo(1)] = "segment 1: lost"
    assert fs.segments.is_lost(fs.inode(ino))


def test_nothing_without_a_pool(fs: FileSystem) -> None:
    fs.segments.pool = None
    with pytest.raises(NotSupportedError):
        fs.segments.need_pool()


# ---------------------------------------------------------------------- restored later


@pytest.fixture
def region() -> Iterator[Region]:
    """A region beside which a pool has the segments of the files a, b and c."""
    with Region.anonymous(16 * MIB) as region:
        mkfs.make_filesystem(region, pool=POOL)
        yield region


@pytest.fixture
def pool(region: Region) -> Iterator[MemoryPool]:
    with MemoryPool(parks=True) as pool:
        fs = mount_filesystem(region, open_pool=pool.opener())
        for name in (b"a", b"b", b"c"):
            ino = make(fs, name)
            fs.run(lambda ino=ino, name=name: fs.write(ino, 0, name))  # type: ignore[misc]
        fs.unmount()
        yield pool


def mount(region: Region, pool: MemoryPool, *, park: bool = True) -> FileSystem:
    return mount_filesystem(region, open_pool=pool.opener(), park=park)


def ino_of(fs: FileSystem, name: bytes) -> Ino:
    return fs.lookup(ROOT_INO, name).ino


def read(fs: FileSystem, name: bytes) -> bytes:
    ino = ino_of(fs, name)
    return fs.run(lambda: bytes(fs.read(ino, 0, 1)))


def test_who_asks_for_it_parks(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool, park=False)
    assert (fs.segments.absent, pool.parked) == ({}, set())
    assert bytes(fs.read(ino_of(fs, b"a"), 0, 1)) == b"a"
    fs.unmount()
    pool.parks = False  # as one that has nothing to gain by it
    assert mount(region, pool).segments.absent == {}


def test_a_segment_is_restored_by_who_needs_it(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool)
    assert list(fs.segments.absent) == [3, 2, 1]
    with pytest.raises(WorkNeeded):
        fs.read(ino_of(fs, b"b"), 0, 1)
    assert read(fs, b"b") == b"b"
    assert (list(fs.segments.absent), pool.parked) == ([3, 1], {3, 1})
    assert bytes(fs.read(ino_of(fs, b"b"), 0, 1)) == b"b"  # without work
    row = fs.run(lambda: fs.segments.there(ino_of(fs, b"c")))
    assert row == fs.segments.find(ino_of(fs, b"c"))
    assert list(fs.segments.absent) == [1]


def test_what_a_new_device_is_called_is_recorded(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool)
    before = dict(fs.segments.table.rows)
    fs.segments.bring_all()
    fs.segments.close()  # killed
    again = mount(region, pool, park=False)
    assert {n: row.handle for n, row in again.segments.table.rows.items()} == {
        n: row.handle + 1 for n, row in before.items()
    }


def test_the_owner_of_what_is_restored(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool)
    fs.setattr(ino_of(fs, b"a"), uid=7, gid=8, mode=0o640)  # nobody waits for that
    assert list(fs.segments.absent) == [3, 2, 1]
    fs.segments.bring_all()
    assert pool.owners[SegmentNo(1)] == Owner(7, 8, 0o640)


def test_the_owner_of_what_is_nowhere_for_a_moment(region: Region, pool: MemoryPool) -> None:
    """As one that is parked with a segment that is being restored."""
    fs = mount(region, pool)
    kept = pool.memories.pop(SegmentNo(1))
    pool.parked.discard(SegmentNo(1))
    fs.setattr(ino_of(fs, b"a"), uid=7, gid=8, mode=0o640)
    pool.memories[SegmentNo(1)] = kept
    fs.segments.bring_all()
    assert pool.owners[SegmentNo(1)] == Owner(7, 8, 0o640)


def test_an_absent_segment_goes(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool)
    fs.unlink(ROOT_INO, b"b")
    fs.segments.reap()
    assert sorted(pool.memories) == [1, 3]
    fs.segments.bring_all()
    assert (fs.segments.absent, fs.segments.lost) == ({}, {})


def test_an_absent_segment_changes(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool)
    a, b, c = (ino_of(fs, name) for name in (b"a", b"b", b"c"))
    fs.run(lambda: fs.setattr(a, size=4 * MIB))
    fs.run(lambda: fs.setattr(b, size=0))
    fs.run(lambda: fs.write(c, 1, b"!"))
    assert fs.segments.absent == {}
    assert pool.length(SegmentNo(1)) == 4 * MIB
    assert bytes(fs.run(lambda: fs.read(c, 0, 2))) == b"c!"
    fs.unmount()
    assert mount(region, pool, park=False).segments.lost == {}


def test_one_that_cannot_be_restored_is_lost(
    region: Region, pool: MemoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    fs = mount(region, pool)
    os.close(pool.memories.pop(SegmentNo(2)))  # somebody has taken it
    with pytest.raises(RegionError, match="segment 2: lost: it is not there"):
        read(fs, b"b")
    assert "inode 4: segment 2: lost" in caplog.text
    assert list(fs.segments.absent) == [3, 1]
    fs.segments.bring(SegmentNo(2))  # told already
    row = fs.segments.there(ino_of(fs, b"b"))
    assert row is not None
    assert row.number == 2
    assert read(fs, b"a") == b"a"


def test_an_unmount_restores_what_is_left(region: Region, pool: MemoryPool) -> None:
    mount(region, pool).unmount()
    assert pool.parked == set()


def test_a_killed_mount_leaves_what_it_has_parked(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool)
    read(fs, b"a")
    fs.segments.close()
    again = mount(region, pool)
    assert list(again.segments.absent) == [3, 2, 1]
    again.segments.bring_all()
    assert [read(again, name) for name in (b"a", b"b", b"c")] == [b"a", b"b", b"c"]


def test_one_in_change_is_not_parked(region: Region, pool: MemoryPool) -> None:
    """It is completed before anybody is served."""
    fs = mount(region, pool, park=False)
    row = fs.segments.table.rows[SegmentNo(2)]
    with fs.super.store:
        fs.segments.table.replace(row._replace(length=4 * MIB))
    fs.segments.close()
    again = mount(region, pool)
    assert list(again.segments.absent) == [3, 1]
    assert again.segments.table.rows[SegmentNo(2)].length == 2 * MIB
