"""The attribute with the extents: in pages, with addresses for root, and read back."""

from __future__ import annotations

import errno
import struct
from types import SimpleNamespace

import pytest

from pkernfs.fs.filesystem import FileSystem
from pkernfs.fuse.extents_xattr import NAME, Extent, parse
from pkernfs.fuse.operations import Operations
from pkernfs.quantities import PhysAddr, RegionOff
from support.fuse_handlers import (
    AS_ROOT,
    AS_USER,
    Waiting,
    do,
    fails,
    make,
    make_operations,
)

EXTENTS_XATTR = NAME.encode()


@pytest.fixture
def ops(fs: FileSystem) -> Operations:
    return make_operations(fs)


def test_extents_come_in_pages(
    ops: Operations, fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = make(ops)
    many = [SimpleNamespace(offset=i, length=1, region_offset=2 * i) for i in range(5000)]
    monkeypatch.setattr(fs, "extents", lambda _: many)
    monkeypatch.setattr(fs.region, "existing_runs", lambda at, length: [(at, length, 1 << 40 | at)])
    found: list[tuple[int, ...]] = []
    while page := do(ops.getxattr(ino, EXTENTS_XATTR + b".%d" % len(found), AS_ROOT)):
        assert len(page) <= 65536
        found += struct.iter_unpack("<QQQQ", page)
    assert found == [(i, 1, 2 * i, 1 << 40 | 2 * i) for i in range(5000)]
    page = do(ops.getxattr(ino, EXTENTS_XATTR, AS_USER))
    assert {record[3] for record in struct.iter_unpack("<QQQQ", page)} == {2**64 - 1}
    for suffix in (b".", b".x", b".-1", b"x", b".99999999999999999999999", b".1.2"):
        assert fails(ops.getxattr(ino, EXTENTS_XATTR + suffix, AS_ROOT)) == errno.ENODATA


def test_addresses_that_the_kernel_is_asked_for_come_beside_other_requests(
    ops: Operations, fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = make(ops)
    fs.write(ino, 0, b"x")
    monkeypatch.setattr(type(fs.region), "asks_for_addresses", True)
    assert isinstance(ops.waiting, Waiting)
    do(ops.getxattr(ino, EXTENTS_XATTR, AS_USER))
    assert ops.waiting.asked == []
    do(ops.getxattr(ino, EXTENTS_XATTR, AS_ROOT))
    assert ops.waiting.asked == ["aside"]


def test_what_was_packed_is_parsed(ops: Operations, fs: FileSystem) -> None:
    ino = make(ops)
    fs.write(ino, 0, b"x" * 4096)
    fs.write(ino, 1 << 20, b"y")
    found = list(parse(do(ops.getxattr(ino, EXTENTS_XATTR, AS_USER))))
    assert [(e.offset, e.region_offset, e.physical) for e in found] == [
        (e.offset, e.region_offset, None) for e in fs.extents(ino)
    ]
    packed = struct.pack("<QQQQ", 1, 2, 3, 0) + b"part of one"
    assert list(parse(packed)) == [Extent(1, 2, RegionOff(3), PhysAddr(0))]
