"""pyfuse3's handlers over a real core in memory, without a mount: they are driven by hand."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import NotFoundError, RegionError
from pkernfs.fs import mkfs
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fuse import extents_xattr, shim
from pkernfs.fuse.operations import COUNTED, WRITER, Operations
from pkernfs.layout import PAGE
from pkernfs.pool.pool import Space
from pkernfs.quantities import Ino
from pkernfs.region.region import Region
from support.fuse_handlers import (
    AS_ROOT,
    AS_USER,
    ROOT,
    Waiting,
    do,
    fails,
    make,
    make_operations,
    set_fields,
)
from support.memory_pool import POOL, MemoryPool

import pyfuse3  # isort: skip  # after the shim

EXTENTS_XATTR = extents_xattr.NAME.encode()


@pytest.fixture
def ops(fs: FileSystem) -> Operations:
    return make_operations(fs)


def known(fs: FileSystem, ino: Ino) -> int:
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
    assert isinstance(ops.waiting, Waiting)
    assert ops.waiting.asked == []
    info, entry = do(ops.create(ROOT, b"f", stat.S_IFREG | 0o644, os.O_RDWR, AS_ROOT))
    do(ops.unlink(ROOT, b"f", AS_ROOT))
    do(ops.statfs(AS_ROOT))
    assert ops.waiting.asked == ["settle"], "it may be gone already"
    do(ops.release(info.fh))
    do(ops.forget([(entry.st_ino, 1)]))
    do(ops.statfs(AS_ROOT))
    assert ops.waiting.asked == ["settle"]


def test_statfs_looks_at_the_pool_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other requests are served while it counts what thousands of segments take."""
    with Region.anonymous(8 << 20) as region, MemoryPool() as pool:
        mkfs.make_filesystem(region, pool=POOL)
        ops = make_operations(mount_filesystem(region, open_pool=pool.opener()))
        assert isinstance(ops.waiting, Waiting)
        answer = do(ops.statfs(AS_ROOT))
        assert answer.f_bfree == ops.fs.statfs().free > pool.total // PAGE
        assert ops.waiting.asked == ["aside"]

        def fail() -> Space:
            raise RegionError("the pool is gone", errno.ENOENT)

        monkeypatch.setattr(pool, "space", fail)
        assert fails(ops.statfs(AS_ROOT)) == errno.EIO


# ---------------------------------------------------------------------- errors


def test_expected_errors_are_errnos(ops: Operations) -> None:
    make(ops)
    assert fails(ops.mkdir(ROOT, b"f", 0o755, AS_ROOT)) == errno.EEXIST
    assert fails(ops.rmdir(ROOT, b"f", AS_ROOT)) == errno.ENOTDIR
    assert fails(ops.unlink(ROOT, b"absent", AS_ROOT)) == errno.ENOENT
    assert fails(ops.mkdir(ROOT, b"x" * 256, 0o755, AS_ROOT)) == errno.ENAMETOOLONG
    assert fails(ops.getattr(4711, AS_ROOT)) == errno.ENOENT
    assert fails(ops.flush(1)) == errno.ENOSYS


# ---------------------------------------------------------------------- fsync


def test_fsync(ops: Operations, fs: FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(ops.waiting, Waiting)
    if not fs.region.needs_sync:
        do(ops.fsync(1, False))
        assert fails(ops.fsyncdir(1, False)) == errno.ENOSYS
    monkeypatch.setattr(fs.region, "needs_sync", True)
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
    assert fails(ops.getxattr(4711, EXTENTS_XATTR, AS_ROOT)) == errno.ENOENT
    do(ops.removexattr(ino, b"user.a", AS_ROOT))
    assert fails(ops.getxattr(ino, b"user.a", AS_ROOT)) == errno.ENODATA


# ---------------------------------------------------------------------- memory of their own


class Backing:
    """Stands for :class:`pkernfs.fuse.passthrough.Passthrough`: one backing file for all."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Ino]] = []

    def opened(self, ino: Ino) -> int:
        self.calls.append(("opened", ino))
        return 9

    def released(self, ino: Ino) -> None:
        self.calls.append(("released", ino))


def test_handles_are_opened_with_their_backing_file(
    ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[tuple[int, int]] = []
    monkeypatch.setattr(shim, "pass_through", lambda *words: passed.append(words))
    backing: Any = Backing()
    ops.passthrough = backing
    _, entry = do(ops.create(ROOT, b"f", stat.S_IFREG | 0o644, os.O_RDWR, AS_ROOT))
    ino = Ino(entry.st_ino)
    reader = do(ops.open(ino, os.O_RDONLY, AS_ROOT)).fh
    assert passed == [(ino | WRITER | COUNTED, 9), (ino | COUNTED, 9)]
    do(ops.release(ino | WRITER | COUNTED))
    do(ops.release(reader))
    assert backing.calls == [("opened", ino)] * 2 + [("released", ino)] * 2


@pytest.mark.parametrize("passes", [False, True])
def test_a_handle_that_only_writes_decides_nothing(
    ops: Operations, monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    """truncate(1) has one: if the kernel had the segment open for it, nothing could be cut."""
    monkeypatch.setattr(shim, "pass_through", lambda *words: None)
    backing: Any = Backing()
    backing.passes = lambda ino: passes
    ops.passthrough = backing
    ops._opened.direct_io = True
    ino = make(ops)
    backing.calls.clear()
    fh = do(ops.open(ino, os.O_WRONLY, AS_ROOT)).fh
    do(ops.release(fh))
    assert backing.calls == ([("opened", ino), ("released", ino)] if passes else [])


def test_a_handle_that_is_refused_is_not_counted(ops: Operations) -> None:
    backing: Any = Backing()
    ops.passthrough = backing
    ino = make(ops)
    backing.calls.clear()
    ops.fs.fail("for the test")
    assert fails(ops.open(ino, os.O_RDWR, AS_ROOT)) == errno.EROFS
    assert backing.calls == []


def test_mappings_are_passed_through_where_there_are_segments(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim, "why_no_passthrough", lambda: None)
    without, with_native = make_operations(fs), make_operations(fs)
    with_native.native = lambda ino: None
    without.init()
    with_native.init()
    assert without.passthrough is None
    assert with_native.passthrough is not None


def test_a_mount_says_why_segments_are_not_mapped_directly(
    ops: Operations, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shim, "why_no_passthrough", lambda: "the kernel is old")
    ops.native = lambda ino: None
    ops.init()
    assert ops.passthrough is None
    [record] = caplog.records
    assert record.getMessage().endswith("through the page cache, not directly: the kernel is old")
    caplog.clear()
