"""Requests that the shim passes on: answered at once or later, and what else they change."""

from __future__ import annotations

import errno

import pytest

from pkernfs.errors import ZeroingNeeded
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fuse import shim
from pkernfs.fuse.operations import Operations
from support.fuse_handlers import AS_ROOT, Waiting, do, make, make_operations, run_once

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
    assert "pause" in waiting.asked


def test_a_write_takes_the_file_capability(ops: Operations) -> None:
    ino = make(ops)
    for _ in range(2):
        do(ops.setxattr(ino, b"security.capability", b"c", AS_ROOT))
        assert ops.data.on_write(None, ino, memoryview(b"x"), 0, False) == 1
        assert do(ops.listxattr(ino, AS_ROOT)) == []
