"""The segments that files have, and their bytes: mapped when asked for, so many at once."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, NotSupportedError
from pkernfs.fs import mkfs, segment_memory
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import ROOT_INO
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
