"""A process that hands over the file system that it has."""

from __future__ import annotations

import stat

import pytest

from pkernfs.errors import InvalidError, NoSpaceError, ReadOnlyError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.kexec.local import LocalFileSystem
from pkernfs.layout import ROOT_INO
from pkernfs.quantities import Ino, RegionOff
from pkernfs.region.digest import crc64

REG = stat.S_IFREG | 0o644


def create(fs: FileSystem, name: bytes) -> None:
    fs.create(ROOT_INO, name, REG, 0, 0)


def test_frozen_to_the_end_of_the_context(fs: FileSystem) -> None:
    mounted = LocalFileSystem(fs)
    with mounted.frozen() as frozen:
        assert frozen.number == 1
        assert frozen.uuid == fs.superblock.uuid
        with pytest.raises(ReadOnlyError):
            create(fs, b"x")
        with pytest.raises(ReadOnlyError), mounted.frozen():
            pass
    create(fs, b"x")
    with pytest.raises(KeyboardInterrupt), mounted.frozen():
        raise KeyboardInterrupt
    create(fs, b"y")


def test_after_a_commit_it_stays(fs: FileSystem) -> None:
    mounted = LocalFileSystem(fs)
    for manifest in (b"", b"something" * 1000):
        with mounted.frozen() as frozen:
            ino = Ino(0)
            if manifest:
                made = mounted.make_manifest(len(manifest))
                assert made.pages
                mounted.write_manifest(made.ino, manifest)
                ino = made.ino
            assert mounted.commit(ino, crc64(manifest) if ino else 0, 0) == frozen.number
        with pytest.raises(ReadOnlyError):
            create(fs, b"x")
        mounted.abort()
        create(fs, b"x%d" % len(manifest))
    with pytest.raises(InvalidError, match="no handover to undo"):
        mounted.abort()


def test_a_manifest_that_has_no_room(fs: FileSystem) -> None:
    mounted = LocalFileSystem(fs)
    with pytest.raises(NoSpaceError), mounted.frozen():
        mounted.make_manifest(1 << 40)
    create(fs, b"x")


def test_its_region_is_nobody_else_s(fs: FileSystem) -> None:
    mounted = LocalFileSystem(fs)
    assert mounted.name == fs.region.name
    assert list(mounted.other_mappers()) == []
    with mounted.open_region() as region:
        assert region is fs.region
    assert region.read(RegionOff(0), 8)  # it is still open
