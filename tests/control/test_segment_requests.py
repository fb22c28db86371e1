"""Requests about segments over a file system in memory: what is changed, refused, told."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest
import trio

from pkernfs.control import segment_protocol
from pkernfs.control.protocol import Nothing
from pkernfs.control.segment_protocol import ListSegments, SegmentRow, SetSegment
from pkernfs.control.segment_requests import SegmentRequests
from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    BusyError,
    CorruptionError,
    InvalidError,
    NotSupportedError,
    WorkNeeded,
)
from pkernfs.fs import mkfs
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.inodes import Inode
from pkernfs.layout import ROOT_INO, SEGMENT_NEW
from pkernfs.pool.pool import Segment
from pkernfs.quantities import Ino, SegmentNo
from pkernfs.region.region import Region
from support.made_up_session import MadeUpSession, items_of, reply_of
from support.memory_pool import POOL, MemoryPool

MIB = 1 << 20


class Rig:
    """A file system with a pool, a file of 3 MiB in blocks, and the handlers."""

    def __init__(self, region: Region, pool: MemoryPool) -> None:
        self.pool = pool
        self.fs = mount_filesystem(region, open_pool=pool.opener())
        self.session = MadeUpSession(self.fs)
        self.requests = SegmentRequests(self.fs, self.session)
        self.ino = make(self.fs, ROOT_INO, b"f")
        self.fs.run(lambda: self.fs.write(self.ino, 0, b"x" * 3 * MIB))

    def set(self, on: bool, ino: Ino | None = None) -> Nothing:
        request = SetSegment(self.ino if ino is None else ino, on)
        return trio.run(reply_of, self.requests.handlers(), request)

    def list(self) -> list[SegmentRow]:
        return trio.run(items_of, self.requests.handlers(), ListSegments())


def make(fs: FileSystem, directory: Ino, name: bytes) -> Ino:
    return fs.create(directory, name, stat.S_IFREG | 0o600, 0, 0).ino


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Region.anonymous(32 * MIB) as region, MemoryPool() as pool:
        mkfs.make_filesystem(region, pool=POOL)
        yield Rig(region, pool)


def test_there_and_back(rig: Rig) -> None:
    assert rig.set(True) == Nothing()
    row = rig.fs.segments.find(rig.ino)
    assert row is not None
    assert rig.session.asked == ["freed", f"invalidate data of {rig.ino}"]
    rig.set(False)
    assert rig.fs.segments.find(rig.ino) is None
    assert bytes(rig.fs.read(rig.ino, 0, 4 * MIB)) == b"x" * 3 * MIB


def test_a_file_that_is_open_for_writing_is_refused(rig: Rig) -> None:
    rig.session.open_for_writing[rig.ino] = 1
    for on in (True, False):
        with pytest.raises(BusyError, match="open for writing"):
            rig.set(on)
    assert not rig.pool.memories


def test_a_reader_keeps_a_segment_but_no_blocks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkernfs.control.segment_requests._CLOSING_SECONDS", 0.01)
    rig.fs.open(rig.ino)
    rig.set(True)
    with pytest.raises(BusyError, match="it is open"):
        rig.set(False)
    rig.fs.release(rig.ino)
    rig.set(False)


def test_what_has_just_been_closed_is_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.set(True)
    rig.fs.open(rig.ino)

    async def drain() -> None:
        rig.fs.release(rig.ino)

    monkeypatch.setattr(rig.session, "drain", drain)
    rig.set(False)
    assert rig.fs.segments.find(rig.ino) is None


def test_who_goes_away_leaves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def with_zeroing(operation: object) -> None:
        with pytest.raises(WorkNeeded):
            operation()  # type: ignore[operator]
        assert rig.fs.conversions.under_way == [rig.ino]
        await trio.sleep_forever()

    monkeypatch.setattr(rig.session, "with_zeroing", with_zeroing)

    async def go_away() -> None:
        with trio.move_on_after(0.01):
            await rig.requests.set_segment(SetSegment(rig.ino, True))

    trio.run(go_away)
    assert not rig.fs.conversions.under_way
    assert rig.fs.segments.find(rig.ino) is None


def test_bad_requests(rig: Rig) -> None:
    with pytest.raises(InvalidError, match="not a regular file"):
        rig.set(True, ROOT_INO)
    rig.fs.segments.pool = None
    with pytest.raises(NotSupportedError, match="no pool"):
        rig.set(True)


def test_rows_are_told(rig: Rig) -> None:
    directory = rig.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
    rig.fs.rename(ROOT_INO, b"f", directory, b"g\xff")
    rig.set(True)
    removed = make(rig.fs, ROOT_INO, b"removed")
    rig.fs.run(lambda: rig.fs.setattr(removed, size=2 * MIB))
    rig.fs.unlink(ROOT_INO, b"removed")
    with rig.fs.store:
        rig.fs.segments.table.add(Segment(SegmentNo(9), rig.ino, 1, 2 * MIB, SEGMENT_NEW))
    rig.pool.memories[SegmentNo(9)] = -1
    rig.fs.segments.lost[SegmentNo(9)] = "a test has lost it"
    first, second, third = rig.list()
    path = f"/proc/self/fd/{rig.pool.memories[SegmentNo(1)]}"
    assert first == SegmentRow(
        SegmentNo(1), rig.ino, "/d/g\udcff", "in use", 4 * MIB, path, "", False
    )
    assert (second.number, second.path, second.state) == (2, "", "dead")
    assert (third.state, third.lost, third.native_path) == ("new", "a test has lost it", "")
    del rig.pool.memories[SegmentNo(9)]
    rig.fs.segments.pool = None
    assert rig.list()[0].native_path == ""


def test_a_damaged_inode_hides_no_row(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.set(True)
    rig.fs.natives.on(rig.ino)
    assert [row.native for row in rig.list()] == [True]

    def read(ino: Ino) -> Inode:
        raise CorruptionError(f"inode {ino}: a test")

    monkeypatch.setattr(rig.fs.super.inodes, "get", read)
    (row,) = rig.list()
    assert (row.ino, row.path, row.native) == (rig.ino, "", False)


def test_no_row_no_walk(rig: Rig) -> None:
    assert rig.list() == []


def test_every_request_has_a_handler(rig: Rig) -> None:
    of_others = {segment_protocol.SetNative}
    assert set(rig.requests.handlers()) == set(segment_protocol.REQUESTS) - of_others
