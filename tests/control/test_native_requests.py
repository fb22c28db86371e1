"""Requests about native files over a file system in memory: the order of steps, and refusals."""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Iterator

import pytest
import trio

from pkernfs.control.native_requests import Name, NativeRequests, names_of
from pkernfs.control.protocol import Nothing
from pkernfs.control.segment_protocol import SetNative
from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import BusyError, CorruptionError, InvalidError, RegionError
from pkernfs.fs import mkfs
from pkernfs.fs.names import DirectoryEntry
from pkernfs.host.holders import Holding, Target
from pkernfs.layout import ROOT_INO
from pkernfs.quantities import Ino
from pkernfs.region.region import Region
from support.made_up_session import MadeUpSession, reply_of
from support.memory_pool import POOL, MemoryPool

MIB = 1 << 20


class Rig:
    """A file system with a pool, a file that has a segment, and the handlers."""

    def __init__(self, region: Region, pool: MemoryPool) -> None:
        self.fs = mount_filesystem(region, open_pool=pool.opener())
        self.session = MadeUpSession(self.fs)
        self.requests = NativeRequests(self.fs, self.session)
        self.directory = self.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
        self.ino = self.fs.create(self.directory, b"f\xff", stat.S_IFREG | 0o600, 0, 0).ino
        self.fs.run(lambda: self.fs.setattr(self.ino, size=2 * MIB))

    def set(self, on: bool, ino: Ino | None = None) -> Nothing:
        request = SetNative(self.ino if ino is None else ino, on)
        return trio.run(reply_of, self.requests.handlers(), request)

    def names(self, *inos: Ino) -> list[Name]:
        return trio.run(names_of, self.fs, inos, self.session.pause)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Region.anonymous(16 * MIB) as region, MemoryPool() as pool:
        mkfs.make_filesystem(region, pool=POOL)
        yield Rig(region, pool)


def test_there_and_back(rig: Rig) -> None:
    rig.fs.link(rig.ino, ROOT_INO, b"other")
    rig.set(True)
    assert rig.fs.natives.is_native(rig.ino)
    covered = {f"cover /d/f\udcff of {rig.ino}", f"cover /other of {rig.ino}"}
    assert set(rig.session.asked) == covered
    rig.set(True)  # of a mount that could not cover them all
    assert set(rig.session.asked[2:]) == covered
    rig.set(False)
    rig.set(False)
    assert rig.session.asked[4:] == [f"uncover {rig.ino}"]
    assert not rig.fs.natives.is_native(rig.ino)


def test_who_has_it_is_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkernfs.control.native_requests._CLOSING_SECONDS", 0.01)
    target = Target(1, rig.ino)
    rig.session.processes = [Holding(target, 7, "vmm", maps=True), Holding(target, 8, "x", False)]
    with pytest.raises(BusyError, match=r"busy: process 7 \(vmm\) maps it, and 1 more"):
        rig.set(True)
    rig.session.processes = []
    rig.fs.open(rig.ino)
    with pytest.raises(BusyError, match="it is open"):
        rig.set(True)
    rig.fs.release(rig.ino)
    rig.set(True)
    rig.session.processes = [Holding(target, 8, "x", maps=False)]
    with pytest.raises(BusyError, match=r"process 8 \(x\) has opened it"):
        rig.set(False)
    assert rig.fs.natives.is_native(rig.ino)


def test_what_has_just_been_closed_is_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.fs.open(rig.ino)

    async def drain() -> None:
        rig.fs.release(rig.ino)

    monkeypatch.setattr(rig.session, "drain", drain)
    rig.set(True)
    assert rig.fs.natives.is_native(rig.ino)


def test_what_cannot_be_covered_is_not_native(rig: Rig) -> None:
    rig.session.no_cover = RegionError("a test")
    with pytest.raises(RegionError, match="a test"):
        rig.set(True)
    assert not rig.fs.natives.is_native(rig.ino)
    assert rig.session.asked[-1] == f"uncover {rig.ino}"


def test_what_was_native_stays_so(rig: Rig) -> None:
    rig.set(True)
    rig.session.no_cover = RegionError("a test")
    with pytest.raises(RegionError, match="a test"):
        rig.set(True)
    assert rig.fs.natives.is_native(rig.ino)
    assert f"uncover {rig.ino}" not in rig.session.asked


def test_who_opens_it_meanwhile_is_seen(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they map is the page cache, and their stores would not be in the segment."""
    monkeypatch.setattr("pkernfs.control.native_requests._CLOSING_SECONDS", 0.01)

    async def cover(path: str, ino: Ino) -> None:
        await trio.lowlevel.checkpoint()
        rig.fs.open(ino)

    with monkeypatch.context() as patch:
        patch.setattr(rig.session, "cover", cover)
        with pytest.raises(BusyError, match="it is open"):
            rig.set(True)
    assert not rig.fs.natives.is_native(rig.ino)
    assert rig.session.asked[-1] == f"uncover {rig.ino}"
    rig.fs.release(rig.ino)
    rig.set(True)


@pytest.mark.parametrize("on", [True, False])
def test_who_goes_away_leaves_no_half(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, *, on: bool
) -> None:
    rig.fs.link(rig.ino, ROOT_INO, b"other")
    if not on:
        rig.set(True)
    handler = rig.requests.handlers()[SetNative]
    begun: list[str] = []

    async def run() -> None:
        with trio.CancelScope() as scope:

            async def mount(*what: object) -> None:
                scope.cancel()
                await trio.sleep(0)
                begun.append(str(what))

            monkeypatch.setattr(rig.session, "cover" if on else "uncover", mount)
            answer = handler(SetNative(rig.ino, on))
            assert isinstance(answer, Awaitable)
            await answer

    trio.run(run)
    assert len(begun) == (2 if on else 1)
    assert rig.fs.natives.is_native(rig.ino) == on


def test_a_damaged_directory_hides_its_own_names_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.fs.link(rig.ino, ROOT_INO, b"other")
    readdir = rig.fs.readdir

    def read(ino: Ino, cookie: int) -> Iterator[DirectoryEntry]:
        if ino == rig.directory:
            raise CorruptionError("a test")
        return readdir(ino, cookie)

    monkeypatch.setattr(rig.fs, "readdir", read)
    assert rig.names(rig.ino) == [Name("/other", rig.ino)]


def test_a_file_without_names_has_none(rig: Rig) -> None:
    rig.fs.open(rig.ino)
    rig.fs.unlink(rig.directory, b"f\xff")
    assert rig.names(rig.ino) == []


def test_bad_requests(rig: Rig) -> None:
    with pytest.raises(InvalidError, match="not a regular file"):
        rig.set(True, ROOT_INO)
    assert rig.session.asked == []


def test_names(rig: Rig) -> None:
    assert rig.names() == []
    other = rig.fs.create(ROOT_INO, b"other", stat.S_IFREG | 0o600, 0, 0).ino
    assert set(rig.names(rig.ino, other)) == {Name("/d/f\udcff", rig.ino), Name("/other", other)}
