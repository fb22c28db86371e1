"""Requests that the shim passes on: answered at once or later, and what else they change."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import Any

import pytest

from pkernfs.errors import WorkNeeded, ZeroingNeeded
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fuse import shim
from pkernfs.fuse.operations import Operations
from pkernfs.quantities import Ino
from support.fuse_handlers import (
    AS_ROOT,
    AS_USER,
    ROOT,
    Waiting,
    do,
    make,
    make_operations,
    run_once,
)

from pkernfs.fuse._shim import ffi  # isort: skip  # after the shim, which loads it for all

MIB = 1 << 20


@pytest.fixture
def ops(fs: FileSystem) -> Operations:
    return make_operations(fs)


def test_added_operations_are_answered_later(
    ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: list[tuple[object, int, bool]] = []

    def reply(req: object, result: int, *, counted: bool) -> None:
        replies.append((req, result, counted))

    monkeypatch.setattr(shim, "reply_later", reply)
    waiting = ops.waiting
    assert isinstance(waiting, Waiting)
    ino = make(ops)
    run_once(ops, ZeroingNeeded([(5, 1)]), monkeypatch, "write")
    data = bytearray(b"written")
    assert ops.data.on_write("w", ino, memoryview(data), 0, False) == shim.LATER
    data[:] = b"another"  # the buffer is used again
    assert ops.data.on_fallocate("f", ino, 0, 0, 4 * MIB) == 0
    run_once(ops, ZeroingNeeded([(6, 1)]), monkeypatch, "fallocate_steps")
    assert ops.data.on_fallocate("f", ino, 16, 4 * MIB, 12 * MIB) == shim.LATER
    assert ops.data.on_fallocate("g", ino, 16, MIB, 12 * MIB) == shim.LATER
    assert ops.data.on_fallocate("h", ino, 99, MIB, 12 * MIB) == -errno.EOPNOTSUPP
    for task in waiting.tasks:
        do(task())  # type: ignore[arg-type]
    assert replies == [("w", 7, True), ("f", 0, False), ("g", 0, False)]
    assert bytes(do(ops.read(ino, 0, 7))) == b"written"


def test_a_step_that_has_to_wait_begins_again(
    ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a range is zeroed, somebody else has a pool change the memory."""
    replies: list[int] = []
    monkeypatch.setattr(shim, "reply_later", lambda req, result, *, counted: replies.append(result))
    ino = make(ops)
    original, needs = ops.fs.read, [WorkNeeded(lambda: replies.append(99))]
    steps = ops.fs.fallocate_steps

    def interrupted(*args: Any) -> Iterator[None]:
        for _ in steps(*args):
            yield
            if needs:
                raise needs.pop()

    monkeypatch.setattr(ops.fs, "fallocate_steps", interrupted)
    assert ops.data.on_fallocate("f", ino, 16, 0, 12 * MIB) == shim.LATER
    waiting = ops.waiting
    assert isinstance(waiting, Waiting)
    do(waiting.tasks.pop()())  # type: ignore[arg-type]
    assert replies == [0]
    assert waiting.asked.count("pool_turn") == 1
    assert len(original(ino, 0, 12 * MIB)) == 12 * MIB
    assert "pause" in waiting.asked


def test_attributes_with_the_birth_time(ops: Operations, fs: FileSystem) -> None:
    ino = fs.create(Ino(ROOT), b"d", stat.S_IFCHR | 0o640, 3, 4, os.makedev(5, 6)).ino
    ops.data.invalidated.add(ino)
    fs.setattr(ino, atime=-5, mtime=7)
    to = ffi.new("struct pk_statx *")
    assert ops.data.on_statx(ino, to) == 0
    inode = fs.inode(ino)
    assert (to.mode, to.nlink, to.uid, to.gid) == (stat.S_IFCHR | 0o640, 1, 3, 4)
    assert (to.atime_ns, to.mtime_ns, to.ctime_ns) == (-5, 7, inode.ctime)
    assert 0 < to.btime_ns == inode.btime < inode.ctime
    assert (to.major, to.minor, to.size, to.pages, to.timeout_seconds) == (5, 6, 0, 0, 5)
    assert not ops.data.invalidated, "the kernel has asked"
    assert ops.data.on_statx(Ino(4711), to) == -errno.ENOENT


def test_a_file_without_a_name_comes_as_a_create(
    ops: Operations, fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim.request, "tmpfile", 1)
    flags = os.O_TMPFILE | os.O_RDWR
    info, entry = do(ops.create(ROOT, b"#3", 0o600, flags, AS_USER))
    assert (entry.st_nlink, entry.st_uid) == (0, 1000)
    assert not fs.find(Ino(ROOT), b"#3")
    do(ops.link(entry.st_ino, ROOT, b"f", AS_USER))
    do(ops.release(info.fh))
    do(ops.forget([(entry.st_ino, 2)]))
    assert fs.lookup(Ino(ROOT), b"f").ino == entry.st_ino


def test_a_write_takes_the_file_capability(ops: Operations) -> None:
    ino = make(ops)
    for _ in range(2):
        do(ops.setxattr(ino, b"security.capability", b"c", AS_ROOT))
        assert ops.data.on_write(None, ino, memoryview(b"x"), 0, False) == 1
        assert do(ops.listxattr(ino, AS_ROOT)) == []
