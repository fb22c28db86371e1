"""Handlers that fail or wait: errnos, and zeroed memory."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from typing import Any

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, NoSpaceError, RegionError, ZeroingNeeded
from pkernfs.fs import mkfs
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fuse import shim
from pkernfs.fuse.operations import Operations
from pkernfs.quantities import Ino
from pkernfs.region.region import Region
from support.fuse_handlers import (
    AS_ROOT,
    ROOT,
    Waiting,
    do,
    fails,
    make,
    make_operations,
    run_once,
    set_fields,
)
from support.memory_pool import POOL, MemoryPool

MIB = 1 << 20


@pytest.fixture
def ops(fs: FileSystem) -> Operations:
    return make_operations(fs)


def test_a_segment_that_is_lost_is_said_once(
    ops: Operations, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Why it is lost is the operator's business: the caller gets EIO."""

    def lost(*_: object) -> None:
        raise RegionError("segment-1: lost: there is no file of that name", errno.ENOENT)

    monkeypatch.setattr(ops.fs, "read", lost)
    for _ in range(3):
        assert fails(ops.read(1, 0, 1)) == errno.EIO
    assert caplog.text.count("segment-1: lost") == 1
    assert not ops.fs.read_only
    caplog.clear()


def test_corruption_ends_writing(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    region = Region.anonymous(8 * MIB)
    mkfs.make_filesystem(region)
    fs = mount_filesystem(region)
    ops = Operations(fs)

    def corrupt(*_: object) -> None:
        raise CorruptionError("inode 17 at 0x202000: bad checksum")

    ino = make(ops)
    monkeypatch.setattr(fs, "readlink", corrupt)
    with caplog.at_level(logging.ERROR):
        assert fails(ops.readlink(ino, AS_ROOT)) == errno.EUCLEAN
        assert fails(ops.readlink(ino, AS_ROOT)) == errno.EUCLEAN
    assert caplog.text.count("inode 17 at 0x202000") == 1, "said once"
    assert fs.read_only
    assert fails(ops.unlink(ROOT, b"f", AS_ROOT)) == errno.EROFS
    assert ops.data.on_write(None, ino, memoryview(b"x"), 0, False) == -errno.EROFS


def test_a_bug_is_logged_and_an_io_error(
    ops: Operations, fs: FileSystem, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def bug(*_: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(fs, "seek", bug)
    monkeypatch.setattr(fs, "readlink", bug)
    with caplog.at_level(logging.ERROR):
        assert fails(ops.readlink(1, AS_ROOT)) == errno.EIO
        assert ops.data.on_lseek(Ino(1), 0, os.SEEK_DATA) == -errno.EIO
    assert caplog.text.count("KeyError: 'oops'") == 2
    assert not fs.read_only


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (ZeroingNeeded([(5, 20)]), ["turn", "zero [(5, 20)]"]),
        (NoSpaceError("no free block"), ["turn", "drain", "zero []"]),
    ],
)
def test_handlers_wait_for_memory(
    ops: Operations, monkeypatch: pytest.MonkeyPatch, error: Exception, asked: list[str]
) -> None:
    ino = make(ops)
    run_once(ops, error, monkeypatch, "setattr")
    entry = do(ops.setattr(ino, *set_fields(size=4 * MIB), None, AS_ROOT))
    assert entry.st_size == 4 * MIB
    assert isinstance(ops.waiting, Waiting)
    assert ops.waiting.asked == asked


@pytest.fixture
def with_pool() -> Iterator[Operations]:
    with MemoryPool() as pool, Region.anonymous(16 * MIB) as region:
        mkfs.make_filesystem(region, pool=POOL)
        yield make_operations(mount_filesystem(region, open_pool=pool.opener()))


def test_handlers_get_their_turn_at_the_pool(with_pool: Operations) -> None:
    """They ask again in it for what they need: the pool may have changed since they asked first."""
    ops = with_pool
    ino = make(ops)
    entry = do(ops.setattr(ino, *set_fields(size=4 * MIB), None, AS_ROOT))
    assert entry.st_size == 4 * MIB
    assert ops.fs.segments.find(ino) is not None
    assert isinstance(ops.waiting, Waiting)
    assert ops.waiting.asked == ["pool_turn", "work", "work"]


def test_a_full_pool_is_an_error(with_pool: Operations) -> None:
    ops = with_pool
    ino = make(ops)
    assert fails(ops.setattr(ino, *set_fields(size=130 * MIB), None, AS_ROOT)) == errno.ENOSPC
    assert not ops.fs.segments.table.rows


def test_what_waits_keeps_the_note_on_its_request(
    ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel wanted set-id bits gone with this request, and says nothing of the kind of others.

    Others are read while it waits.
    """
    ino = make(ops)
    do(ops.setattr(ino, *set_fields(mode=stat.S_IFREG | 0o4711), None, AS_ROOT))
    run_once(ops, ZeroingNeeded([(5, 20)]), monkeypatch, "setattr")
    monkeypatch.setattr(shim.request, "kill", 1)
    waiting = ops.waiting
    assert isinstance(waiting, Waiting)

    async def another_request(need: ZeroingNeeded) -> None:
        shim.request.kill = 0

    monkeypatch.setattr(waiting, "zero", another_request)
    entry = do(ops.setattr(ino, *set_fields(size=4 * MIB), None, AS_ROOT))
    assert entry.st_mode == stat.S_IFREG | 0o711
    assert shim.request.kill == 0, "the note is the other request's again"


def test_no_space_that_stays_is_an_error(ops: Operations) -> None:
    ino = make(ops)
    attributes, fields = set_fields(size=ops.fs.statfs().blocks * 4096)
    assert fails(ops.setattr(ino, attributes, fields, None, AS_ROOT)) == errno.ENOSPC
    assert do(ops.getattr(ino, AS_ROOT)).st_size == 0
