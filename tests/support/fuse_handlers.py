"""The handlers of FUSE requests, driven by hand over a file system in memory."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pkernfs.errors import WorkNeeded, ZeroingNeeded
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fuse.operations import Operations
from pkernfs.quantities import Ino

import pyfuse3  # isort: skip  # after the shim

ROOT = pyfuse3.ROOT_INODE
AS_ROOT = SimpleNamespace(uid=0, gid=0, pid=1, umask=0o022)
AS_USER = SimpleNamespace(uid=1000, gid=1000, pid=1, umask=0o022)


class Waiting:
    """Notes what it is asked for, and does it at once."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.asked: list[str] = []
        self.tasks: list[Callable[[], Awaitable[None]]] = []

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        self.asked.append("turn")
        yield

    async def drain(self) -> None:
        self.asked.append("drain")

    async def settle(self) -> None:
        self.asked.append("settle")

    async def zero(self, need: ZeroingNeeded) -> None:
        self.asked.append(f"zero {need.blocks}")
        isolated = self.fs.isolate_for_zeroing(need.blocks)
        for offset, length in isolated.pieces():
            self.fs.region.zero(offset, length)
        self.fs.finish_zeroing(isolated)

    @asynccontextmanager
    async def pool_turn(self) -> AsyncIterator[None]:
        self.asked.append("pool_turn")
        yield

    async def work(self, need: WorkNeeded) -> None:
        self.asked.append("work")
        need.work()

    async def sync(self) -> None:
        self.asked.append("sync")

    async def aside(self, work: Callable[[], Any]) -> Any:
        self.asked.append("aside")
        return work()

    async def pause(self) -> None:
        self.asked.append("pause")

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        self.tasks.append(task)


def make_operations(fs: FileSystem) -> Operations:
    """Handlers that wait as :class:`Waiting` does; the kernel may keep things for 5 seconds."""
    operations = Operations(fs, timeout=5)
    operations.waiting = Waiting(fs)
    return operations


def do(handler: Coroutine[Any, Any, Any]) -> Any:
    """The result of a handler, which does not wait for anything."""
    try:
        handler.send(None)
    except StopIteration as e:
        return e.value
    handler.close()
    raise AssertionError("the handler waits")


def fails(handler: Coroutine[Any, Any, Any]) -> int:
    """The errno that a handler fails with."""
    with pytest.raises(pyfuse3.FUSEError) as caught:
        do(handler)
    return caught.value.errno


def make(ops: Operations, name: bytes = b"f") -> Ino:
    """Make an empty file in the root directory, and close it; its inode."""
    info, entry = do(ops.create(ROOT, name, stat.S_IFREG | 0o644, os.O_RDWR, AS_ROOT))
    do(ops.release(info.fh))
    return Ino(entry.st_ino)


def set_fields(**values: int) -> tuple[pyfuse3.EntryAttributes, SimpleNamespace]:
    """The arguments with which setattr is to change some attributes."""
    attributes = pyfuse3.EntryAttributes()
    fields = SimpleNamespace(
        **{f"update_{n}": False for n in "atime mtime ctime mode uid gid size".split()}
    )
    for name, value in values.items():
        setattr(attributes, f"st_{name}", value)
        setattr(fields, f"update_{name.removesuffix('_ns')}", True)
    return attributes, fields


def run_once(ops: Operations, error: Exception, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have the first call of the core method ``name`` fail with ``error``."""
    original = getattr(ops.fs, name)

    def fail_first(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(ops.fs, name, original)
        raise error

    monkeypatch.setattr(ops.fs, name, fail_first)
