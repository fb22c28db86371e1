"""The virtual attribute with a file's segment."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import NoDataError, NotSupportedError, RegionError
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fuse.segment_xattr import SegmentInfo, parse, read, value
from pkernfs.layout import ROOT_INO
from pkernfs.region.region import Region
from support.memory_pool import POOL, MemoryPool


def test_it_tells_number_path_and_length() -> None:
    with MemoryPool() as pool, Region.anonymous(16 << 20) as region:
        make_filesystem(region, pool=POOL)
        fs = mount_filesystem(region, open_pool=pool.opener())
        ino = fs.create(ROOT_INO, b"f", stat.S_IFREG | 0o600, 0, 0).ino
        with pytest.raises(NoDataError):
            value(fs, ino)
        fs.run(lambda: fs.setattr(ino, size=3 << 20))
        row = fs.segments.find(ino)
        assert row is not None
        path = pool.native_path(row)
        assert parse(value(fs, ino)) == SegmentInfo(1, "directory", path, 4 << 20, 2 << 20)


def test_what_is_lost_has_no_path() -> None:
    """What has its name now may be another file's."""
    with MemoryPool() as pool, Region.anonymous(16 << 20) as region:
        make_filesystem(region, pool=POOL)
        fs = mount_filesystem(region, open_pool=pool.opener())
        ino = fs.create(ROOT_INO, b"f", stat.S_IFREG | 0o600, 0, 0).ino
        fs.run(lambda: fs.setattr(ino, size=3 << 20))
        row = fs.segments.of(fs.inode(ino))
        fs.segments.lose(row, RegionError("a test has lost it"))
        with pytest.raises(RegionError, match="a test has lost it") as told:
            value(fs, ino)
        assert told.value.errno == errno.EIO
        fs.segments.lost.clear()
        os.close(pool.memories.pop(row.number))  # nobody has noticed, as at a read-only mount
        with pytest.raises(RegionError, match="segment 1: it is not there"):
            value(fs, ino)


def test_who_asks_for_a_lost_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def getxattr(path: str, name: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "getxattr", getxattr)
    with pytest.raises(NotSupportedError, match="guest: its segment is lost"):
        read("guest")


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{", b"\xff"])
def test_what_is_none_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)
