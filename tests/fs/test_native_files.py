"""Which files are native: the choice, its refusals, and its end with the segment."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    BusyError,
    CorruptionError,
    InvalidError,
    NotSupportedError,
    PermissionDeniedError,
    ReadOnlyError,
    RegionError,
)
from pkernfs.fs import mkfs
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.inodes import Inode
from pkernfs.layout import (
    INODE_FLAG_PENDING,
    IOMMU_INO,
    PENDING_TO_END,
    ROOT_INO,
)
from pkernfs.quantities import Ino, SegmentNo
from pkernfs.region.region import Region
from support.checking import assert_clean
from support.memory_pool import POOL, MemoryPool

MIB = 1 << 20


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
def fs(region: Region, pool: MemoryPool) -> Iterator[FileSystem]:
    yield mount_filesystem(region, open_pool=pool.opener())
    assert_clean(region)


def make(fs: FileSystem, size: int = 2 * MIB, name: bytes = b"f") -> Ino:
    ino = fs.create(ROOT_INO, name, stat.S_IFREG | 0o600, 0, 0).ino
    fs.run(lambda: fs.setattr(ino, size=size))
    return ino


def test_the_choice_outlives_a_mount(fs: FileSystem, region: Region, pool: MemoryPool) -> None:
    ino, other = make(fs), make(fs, name=b"other")
    fs.natives.on(ino)
    fs.natives.on(ino)
    assert fs.natives.all() == [ino]
    again = mount_filesystem(region, open_pool=pool.opener())
    assert again.natives.all() == [ino]
    assert (again.natives.is_native(ino), again.natives.is_native(other)) == (True, False)
    assert again.natives.path(ino) == f"/proc/self/fd/{pool.memories[SegmentNo(1)]}"
    again.natives.off(ino)
    again.natives.off(ino)
    assert again.natives.all() == []


def test_every_change_changes_the_time(fs: FileSystem) -> None:
    ino = make(fs)
    times = [fs.stat(ino).ctime]
    for change in (fs.natives.on, fs.natives.off):
        change(ino)
        times.append(fs.stat(ino).ctime)
    assert times == sorted(set(times))


def test_it_ends_with_the_segment(fs: FileSystem, region: Region) -> None:
    ino = make(fs)
    fs.natives.on(ino)
    with pytest.raises(BusyError, match="it is native"):
        fs.run(lambda: fs.setattr(ino, size=0))
    assert fs.natives.all() == [ino]
    assert_clean(region)
    fs.unlink(ROOT_INO, b"f")
    assert fs.natives.all() == []


def test_a_native_file_keeps_its_segment(fs: FileSystem) -> None:
    ino = make(fs)
    fs.natives.on(ino)
    for convert in (fs.conversions.off, fs.conversions.on):
        with pytest.raises(BusyError, match="it is native: pkernfs native FILE off"):
            fs.run(lambda convert=convert: convert(ino))  # type: ignore[misc]


def test_the_segment_below_the_names_is_not_resized(fs: FileSystem) -> None:
    """It is mounted over the names: memory that it lost could become another file's."""
    size = 3 * MIB
    ino = make(fs, size)
    row = fs.segments.find(ino)
    fs.natives.on(ino)
    refused: list[Callable[[], object]] = [
        *(partial(fs.setattr, ino, size=new) for new in (0, 1, MIB, size - 1, size + 1, 8 * MIB)),
        partial(fs.write, ino, size - 1, b"xy"),
        partial(fs.write, ino, 9 * MIB, b"x"),
        partial(fs.fallocate, ino, 0, 0, 5 * MIB),
        partial(fs.fallocate, ino, FALLOC_KEEP_SIZE, 4 * MIB, MIB),
        partial(fs.fallocate, ino, FALLOC_ZERO_RANGE, 2 * MIB, 2 * MIB),
        partial(fs.fallocate, ino, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, MIB),
    ]
    for change in refused:
        with pytest.raises(BusyError, match="it is native: pkernfs native FILE off"):
            fs.run(change)
        assert (fs.stat(ino).size, fs.segments.find(ino)) == (size, row)
    fs.run(lambda: fs.setattr(ino, size=size, mode=0o600))
    fs.run(lambda: fs.write(ino, size - 2, b"xy"))
    fs.run(lambda: fs.fallocate(ino, FALLOC_ZERO_RANGE, 0, size - 1))
    assert bytes(fs.read(ino, size - 2, 9)) == b"\0y"
    fs.natives.off(ino)
    fs.run(lambda: fs.setattr(ino, size=0))
    assert fs.segments.find(ino) is None


def test_a_cut_ends_first(fs: FileSystem) -> None:
    """What is left of it would be done to the segment while it is mounted over the names."""
    ino = make(fs, 4 * MIB)
    with fs.store:
        inode = fs.inode(ino)
        fs.super.inodes.touch(inode)
        inode.flags |= INODE_FLAG_PENDING
        inode.pending_start, inode.pending_end = 4 * MIB, PENDING_TO_END
        fs.super.inodes.save(inode)
    with pytest.raises(BusyError, match="it is being changed"):
        fs.natives.on(ino)
    fs.run(lambda: fs.write(ino, 0, b"x"))
    fs.natives.on(ino)


def test_a_damaged_inode_is_known_as_none(fs: FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, sound = make(fs), make(fs, name=b"other")
    for ino in (damaged, sound):
        fs.natives.on(ino)
    inodes = fs.super.inodes
    get = inodes.get

    def read(ino: Ino) -> Inode:
        if ino == damaged:
            raise CorruptionError("a test")
        return get(ino)

    with monkeypatch.context() as patch:
        patch.setattr(inodes, "get", read)
        assert fs.natives.all() == [sound]
        assert not fs.natives.is_known(damaged)
    assert fs.natives.is_known(damaged)


def test_refusals(fs: FileSystem) -> None:
    empty, small = make(fs, 0), make(fs, 5000, b"small")
    with pytest.raises(InvalidError, match="no memory of its own: truncate -s SIZE FILE"):
        fs.natives.on(empty)
    with pytest.raises(InvalidError, match="no memory of its own: pkernfs segment FILE on"):
        fs.natives.on(small)
    with pytest.raises(InvalidError, match="not a regular file"):
        fs.natives.on(ROOT_INO)
    table = fs.create(IOMMU_INO, b"dom-0", stat.S_IFREG | 0o600, 0, 0).ino
    with pytest.raises(PermissionDeniedError, match="table file"):
        fs.natives.on(table)
    assert fs.natives.path(small) is None


def test_a_lost_segment(fs: FileSystem) -> None:
    ino = make(fs)
    fs.natives.on(ino)
    fs.segments.lost[SegmentNo(1)] = "a test has lost it"
    with pytest.raises(RegionError, match="a test has lost it"):
        fs.natives.path(ino)
    fs.natives.off(ino)
    with pytest.raises(RegionError, match="a test has lost it"):
        fs.natives.on(ino)


def test_read_only_and_without_a_pool(fs: FileSystem) -> None:
    ino = make(fs)
    pool, fs.segments.pool = fs.segments.pool, None
    with pytest.raises(NotSupportedError, match="no pool"):
        fs.natives.on(ino)
    fs.segments.pool = pool
    fs.fail("a test")
    for change in (fs.natives.on, fs.natives.off):
        with pytest.raises(ReadOnlyError):
            change(ino)
