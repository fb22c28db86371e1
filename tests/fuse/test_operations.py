"""The FUSE adapter over a real core in memory, without a mount: handlers are driven by hand."""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, NoSpaceError, NotFoundError, ZeroingNeeded
from pkernfs.fs import mkfs
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fuse import extents_xattr, shim
from pkernfs.fuse.operations import Operations
from pkernfs.region.region import Region

import pyfuse3  # isort: skip  # after the shim

MIB = 1 << 20
EXTENTS_XATTR = extents_xattr.NAME.encode()
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

    async def zero(self, need: ZeroingNeeded) -> None:
        self.asked.append(f"zero {need.blocks}")
        isolated = self.fs.isolate_for_zeroing(need.blocks)
        for offset, length in isolated.pieces():
            self.fs.region.zero(offset, length)
        self.fs.finish_zeroing(isolated)

    async def sync(self) -> None:
        self.asked.append("sync")

    async def pause(self) -> None:
        self.asked.append("pause")

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        self.tasks.append(task)


@pytest.fixture
def ops(fs: FileSystem) -> Operations:
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


def make(ops: Operations, name: bytes = b"f") -> int:
    info, entry = do(ops.create(ROOT, name, stat.S_IFREG | 0o644, os.O_RDWR, AS_ROOT))
    do(ops.release(info.fh))
    return int(entry.st_ino)


def known(fs: FileSystem, ino: int) -> int:
    """How often the kernel is thought to know an inode."""
    return fs._life._lookups.get(ino, 0)


# ---------------------------------------------------------------------- lookup counts


def test_every_reply_with_an_entry_counts(ops: Operations, fs: FileSystem) -> None:
    ino = make(ops)
    assert known(fs, ino) == 1
    do(ops.lookup(ROOT, b"f", AS_ROOT))
    do(ops.link(ino, ROOT, b"g", AS_ROOT))
    assert known(fs, ino) == 3
    do(ops.getattr(ino, AS_ROOT))
    assert known(fs, ino) == 3
    for entry in (
        do(ops.mkdir(ROOT, b"d", 0o755, AS_ROOT)),
        do(ops.mknod(ROOT, b"n", stat.S_IFIFO, 0, AS_ROOT)),
        do(ops.symlink(ROOT, b"s", b"target", AS_ROOT)),
    ):
        assert known(fs, entry.st_ino) == 1
    do(ops.forget([(ino, 3), (ROOT, 1)]))
    assert known(fs, ino) == 0


def test_an_absent_name_is_an_entry_without_inode(ops: Operations) -> None:
    entry = do(ops.lookup(ROOT, b"absent", AS_ROOT))
    assert (entry.st_ino, entry.entry_timeout) == (0, 5)
    assert fails(ops.lookup(make(ops), b"x", AS_ROOT)) == errno.ENOTDIR


def test_readdir_counts_what_was_taken(
    ops: Operations, fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    inodes = {b"%d" % i: make(ops, b"%d" % i) for i in range(5)}
    taken: list[tuple[bytes, int]] = []

    def reply(token: object, name: bytes, attributes: Any, cookie: int) -> bool:
        if len(taken) == 3:
            return False
        assert attributes.st_ino == inodes.get(name, 2)
        taken.append((name, cookie))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    do(ops.readdir(do(ops.opendir(ROOT, AS_ROOT)), 0, None))
    names = [name for name, _ in taken]
    assert {n for n, i in inodes.items() if known(fs, i) == 2} == set(names) - {b"iommu"}
    last = taken[-1][1]
    taken.clear()
    do(ops.readdir(ROOT, last, None))
    assert sorted(names + [name for name, _ in taken]) == sorted([*inodes, b"iommu"])
    do(ops.releasedir(ROOT))


def test_an_error_inside_a_directory_comes_after_its_entries(
    ops: Operations, fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = make(ops)
    taken: list[bytes] = []

    def reply(token: object, name: bytes, attributes: Any, cookie: int) -> bool:
        taken.append(name)
        return True

    def entries(_: int, start: int) -> Any:
        if not start:
            yield b"f", ino, 0, 1
        raise NotFoundError("the inode of a name")

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    monkeypatch.setattr(fs, "readdir", entries)
    do(ops.readdir(ROOT, 0, None))
    assert taken == [b"f"]
    assert known(fs, ino) == 2
    assert fails(ops.readdir(ROOT, 1, None)) == errno.ENOENT


def test_an_unlinked_file_goes_with_the_last_reference(ops: Operations, fs: FileSystem) -> None:
    info, entry = do(ops.create(ROOT, b"f", stat.S_IFREG | 0o644, os.O_RDWR, AS_ROOT))
    do(ops.write(info.fh, 0, b"kept"))
    do(ops.unlink(ROOT, b"f", AS_ROOT))
    do(ops.forget([(entry.st_ino, 1)]))
    assert do(ops.read(info.fh, 0, 10)) == b"kept"
    do(ops.release(info.fh))
    with pytest.raises(NotFoundError):
        fs.inode(entry.st_ino)


# ---------------------------------------------------------------------- attributes


def test_attributes_are_made_once_for_each_change(ops: Operations) -> None:
    ino = make(ops)
    entry = do(ops.getattr(ino, AS_ROOT))
    assert do(ops.lookup(ROOT, b"f", AS_ROOT)) is entry
    do(ops.write(ino, 0, b"12345"))
    after = do(ops.getattr(ino, AS_ROOT))
    assert (entry.st_size, after.st_size) == (0, 5)
    assert (after.attr_timeout, after.entry_timeout, after.generation) == (5, 5, entry.generation)


def set_fields(**values: int) -> tuple[pyfuse3.EntryAttributes, SimpleNamespace]:
    attributes = pyfuse3.EntryAttributes()
    fields = SimpleNamespace(
        **{f"update_{n}": False for n in "atime mtime ctime mode uid gid size".split()}
    )
    for name, value in values.items():
        setattr(attributes, f"st_{name}", value)
        setattr(fields, f"update_{name.removesuffix('_ns')}", True)
    return attributes, fields


def test_setattr_changes_what_is_asked_for(ops: Operations) -> None:
    ino = make(ops)
    before = do(ops.getattr(ino, AS_ROOT)).st_mtime_ns
    entry = do(ops.setattr(ino, *set_fields(mode=stat.S_IFREG | 0o4711), None, AS_ROOT))
    assert (entry.st_mode, entry.st_mtime_ns) == (stat.S_IFREG | 0o4711, before)
    entry = do(ops.setattr(ino, *set_fields(atime_ns=1, mtime_ns=2), None, AS_ROOT))
    assert (entry.st_atime_ns, entry.st_mtime_ns) == (1, 2)
    entry = do(ops.setattr(ino, *set_fields(size=10_000), None, AS_ROOT))
    assert entry.st_size == 10_000
    entry = do(ops.setattr(ino, *set_fields(uid=7, gid=8), None, AS_ROOT))
    assert (entry.st_uid, entry.st_gid, entry.st_mode) == (7, 8, stat.S_IFREG | 0o711)


def test_statfs(ops: Operations, fs: FileSystem) -> None:
    answer = do(ops.statfs(AS_ROOT))
    assert answer.f_bavail == fs.statfs().available < answer.f_bfree == fs.statfs().free
    assert answer.f_bfree < answer.f_blocks
    assert answer.f_namemax == 255


# ---------------------------------------------------------------------- errors


def test_expected_errors_are_errnos(ops: Operations) -> None:
    make(ops)
    assert fails(ops.mkdir(ROOT, b"f", 0o755, AS_ROOT)) == errno.EEXIST
    assert fails(ops.rmdir(ROOT, b"f", AS_ROOT)) == errno.ENOTDIR
    assert fails(ops.unlink(ROOT, b"absent", AS_ROOT)) == errno.ENOENT
    assert fails(ops.mkdir(ROOT, b"x" * 256, 0o755, AS_ROOT)) == errno.ENAMETOOLONG
    assert fails(ops.getattr(4711, AS_ROOT)) == errno.ENOENT
    assert fails(ops.flush(1)) == errno.ENOSYS


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
        assert ops.data.on_lseek(1, 0, os.SEEK_DATA) == -errno.EIO
    assert caplog.text.count("KeyError: 'oops'") == 2
    assert not fs.read_only


# ---------------------------------------------------------------------- waiting


def run_once(ops: Operations, error: Exception, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The first call of a core method fails with ``error``."""
    original = getattr(ops.fs, name)

    def fail_first(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(ops.fs, name, original)
        raise error

    monkeypatch.setattr(ops.fs, name, fail_first)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (ZeroingNeeded([(5, 20)]), ["turn", "zero [(5, 20)]"]),
        (NoSpaceError("no free block"), ["turn", "drain"]),
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


def test_no_space_that_stays_is_an_error(ops: Operations) -> None:
    ino = make(ops)
    attributes, fields = set_fields(size=1 << 40)
    assert fails(ops.setattr(ino, attributes, fields, None, AS_ROOT)) == errno.ENOSPC
    assert do(ops.getattr(ino, AS_ROOT)).st_size == 0


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


def test_fsync(ops: Operations, fs: FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(ops.waiting, Waiting)
    if not fs.region.needs_sync:
        do(ops.fsync(1, False))
        assert fails(ops.fsyncdir(1, False)) == errno.ENOSYS
    monkeypatch.setattr(type(fs.region), "needs_sync", True)
    do(ops.fsync(1, False))
    do(ops.fsyncdir(1, True))
    assert ops.waiting.asked == ["sync", "sync"]


# ---------------------------------------------------------------------- extended attributes


def test_namespaces(ops: Operations) -> None:
    ino = make(ops)
    for name in (b"user.a", b"trusted.a", b"security.a"):
        do(ops.setxattr(ino, name, b"v", AS_ROOT))
        assert do(ops.getxattr(ino, name, AS_ROOT)) == b"v"
    assert sorted(do(ops.listxattr(ino, AS_USER))) == [b"security.a", b"user.a"]
    for name in (b"system.posix_acl_access", b"system.x", b"os2.x", EXTENTS_XATTR):
        assert fails(ops.setxattr(ino, name, b"v", AS_ROOT)) == errno.EOPNOTSUPP
    assert fails(ops.removexattr(ino, EXTENTS_XATTR, AS_ROOT)) == errno.EOPNOTSUPP
    assert fails(ops.getxattr(ino, b"system.x", AS_ROOT)) == errno.EOPNOTSUPP
    do(ops.removexattr(ino, b"user.a", AS_ROOT))
    assert fails(ops.getxattr(ino, b"user.a", AS_ROOT)) == errno.ENODATA


def test_extents_come_in_pages(
    ops: Operations, fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = make(ops)
    many = [SimpleNamespace(offset=i, length=1, region_offset=2 * i) for i in range(5000)]
    monkeypatch.setattr(fs, "extents", lambda _: many)
    monkeypatch.setattr(fs.region, "physical_runs", lambda at, length: [(at, length, 1 << 40 | at)])
    found: list[tuple[int, ...]] = []
    while page := do(ops.getxattr(ino, EXTENTS_XATTR + b".%d" % len(found), AS_ROOT)):
        assert len(page) <= 65536
        found += struct.iter_unpack("<QQQQ", page)
    assert found == [(i, 1, 2 * i, 1 << 40 | 2 * i) for i in range(5000)]
    page = do(ops.getxattr(ino, EXTENTS_XATTR, AS_USER))
    assert {record[3] for record in struct.iter_unpack("<QQQQ", page)} == {2**64 - 1}
    for suffix in (b".", b".x", b".-1", b"x", b".99999999999999999999999", b".1.2"):
        assert fails(ops.getxattr(ino, EXTENTS_XATTR + suffix, AS_ROOT)) == errno.ENODATA


def test_a_write_takes_the_file_capability(ops: Operations) -> None:
    ino = make(ops)
    for _ in range(2):
        do(ops.setxattr(ino, b"security.capability", b"c", AS_ROOT))
        assert ops.data.on_write(None, ino, memoryview(b"x"), 0, False) == 1
        assert do(ops.listxattr(ino, AS_ROOT)) == []
