"""The lease of a handover: who has it, what may be done in it, and how it ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pkernfs.control.freezing import HandoverLease
from pkernfs.control.protocol import (
    Abort,
    Commit,
    Freeze,
    Frozen,
    HandoverStatus,
    MakeManifest,
    OpenForWriting,
    Verification,
    WriteManifest,
)
from pkernfs.errors import BusyError, InvalidError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.quantities import Ino
from support.made_up_session import MadeUpSession, items_of, reply_of


class Lease:
    """The handlers, and a client that listens."""

    def __init__(self, fs: FileSystem) -> None:
        self.session = MadeUpSession(fs)
        self.handlers = HandoverLease(fs, self.session).handlers()
        self.first: Any = None

    def held(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Do ``work`` while a client has the lease; True if the daemon ended it meanwhile."""
        return trio.run(self._held, work, clock=MockClock(autojump_threshold=0))

    async def _held(self, work: Callable[[], Awaitable[None]]) -> bool:
        items: Any = self.handlers[Freeze](Freeze())
        self.first = await anext(items)
        try:
            await work()
            with trio.move_on_after(1):
                async for _ in items:
                    raise AssertionError("there is one item")
                return True
            return False
        finally:
            await items.aclose()


@pytest.fixture
def lease(fs: FileSystem) -> Lease:
    return Lease(fs)


async def _nothing() -> None:
    pass


def test_a_client_that_goes_away_thaws(fs: FileSystem, lease: Lease) -> None:
    async def work() -> None:
        assert fs.frozen
        with pytest.raises(BusyError, match="another handover is under way"):
            await items_of(lease.handlers, Freeze())
        with pytest.raises(BusyError, match="under way: interrupt it"):
            await reply_of(lease.handlers, Abort())

    assert not lease.held(work)
    assert lease.first == Frozen(1, fs.superblock.uuid)
    assert not fs.frozen
    assert lease.session.asked == ["hold zeroing", "freed"]


def test_the_commit_ends_the_lease_and_not_the_freeze(fs: FileSystem, lease: Lease) -> None:
    async def work() -> None:
        made = await reply_of(lease.handlers, MakeManifest(4096))
        assert list(made.pages) == sorted(made.pages)
        await reply_of(lease.handlers, WriteManifest(made.ino, 0, b"x" * 4096))
        done = await reply_of(lease.handlers, Commit(Ino(0), 0, 0))
        assert done.number == 1

    assert lease.held(work)
    assert fs.frozen
    with pytest.raises(BusyError, match="handed over already; pkernfs handover --abort"):
        trio.run(items_of, lease.handlers, Freeze())
    trio.run(reply_of, lease.handlers, Abort())
    assert not fs.frozen


@pytest.mark.parametrize(
    "request_", [MakeManifest(4096), WriteManifest(Ino(3), 0, b""), Commit(Ino(0), 0, 0)]
)
def test_nothing_without_a_lease(fs: FileSystem, lease: Lease, request_: Any) -> None:
    for _ in range(2):
        with pytest.raises(InvalidError, match="no freeze is under way"):
            trio.run(reply_of, lease.handlers, request_)
        lease.held(_nothing)


def test_files_that_are_open_are_named(fs: FileSystem, lease: Lease) -> None:
    lease.session.open_for_writing = {Ino(7): 1, Ino(5): 2}
    clock = MockClock(autojump_threshold=0)
    found = trio.run(items_of, lease.handlers, Freeze(), clock=clock)
    assert found == [OpenForWriting((Ino(7), Ino(5)))]
    assert not fs.frozen
    assert "drain" in lease.session.asked, "what was just closed may still be told"


def test_a_file_that_is_being_converted_counts_as_one(
    fs: FileSystem, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(fs.conversions), "under_way", [Ino(9)])
    clock = MockClock(autojump_threshold=0)
    found = trio.run(items_of, lease.handlers, Freeze(), clock=clock)
    assert found == [OpenForWriting((Ino(9),))]
    assert not fs.frozen


def test_without_a_handover_there_is_no_outcome(lease: Lease) -> None:
    found = trio.run(reply_of, lease.handlers, HandoverStatus())
    assert found == Verification("none", "", 0, 0, 0, ())
