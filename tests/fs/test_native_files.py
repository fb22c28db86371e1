"""Which files are native: the choice, its refusals, and its end with the segment."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    BusyError,
    InvalidError,
    NotSupportedError,
    PermissionDeniedError,
    ReadOnlyError,
    RegionError,
)
from pkernfs.fs import mkfs
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import INODE_FLAG_NATIVE, IOMMU_INO, ROOT_INO
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
    fs.run(lambda: fs.setattr(ino, size=0))
    assert not fs.inode(ino).flags & INODE_FLAG_NATIVE
    assert_clean(region)
    other = make(fs, name=b"other")
    fs.natives.on(other)
    fs.unlink(ROOT_INO, b"other")
    assert fs.natives.all() == []


def test_a_native_file_keeps_its_segment(fs: FileSystem) -> None:
    ino = make(fs)
    fs.natives.on(ino)
    for convert in (fs.conversions.off, fs.conversions.on):
        with pytest.raises(BusyError, match="it is native: pkernfs native FILE off"):
            fs.run(lambda convert=convert: convert(ino))  # type: ignore[misc]


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
