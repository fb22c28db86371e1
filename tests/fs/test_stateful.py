"""Every operation of the file system against a model, with remounts, and fsck after each."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import NoSpaceError, PkernfsError
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import IOMMU_INO, ROOT_INO
from pkernfs.quantities import Ino
from support.checking import MemoryFile, assert_clean
from support.posix_model import Model, Node
from support.strategies import (
    BLOCK,
    LENGTHS,
    MIB,
    OFFSETS,
    PICK,
    noise,
)

REGION_BYTES = 26 << 20  # ten blocks beside the metadata: it does get full

KINDS = st.sampled_from(
    [stat.S_IFREG] * 4 + [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK]
)
TIMES = st.integers(-(1 << 63), (1 << 63) - 1)
NAMES = st.sampled_from(
    [b"a", b"b", b"c", b"d", b"\xff\xfe\n ", b"x" * 255, b"x" * 254 + b"y", b"iommu", b"x" * 256]
)
RENAMES = st.sampled_from([0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 8])
MODES = st.sampled_from([0o644, 0o755, 0o4755, 0o2755, 0o2644, 0o6777, 0o1777, 0])
IDS = st.sampled_from([0, 1, 1000, (1 << 32) - 2])
XATTRS = st.sampled_from(
    [
        b"user.a",
        b"user.b",
        b"security.c",
        b"trusted." + b"n" * 247,
        b"system.no",
        b"user." + b"n" * 251,
    ]
)
VALUES = st.sampled_from([0, 1, 512, 513, 4032, 4033, 9000, 65536, 65537])


class FileSystemMachine(RuleBasedStateMachine):
    """One file system, one model, and what of the former belongs to what of the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryFile(REGION_BYTES)
        self.region = self.memory.open()
        make_filesystem(self.region)
        self.now = 10**18
        self.fs = mount_filesystem(self.region, clock=self.clock)
        self.model = Model()
        root = self.model.root
        self.inos: dict[Node, Ino] = {root: ROOT_INO, root.entries[b"iommu"]: IOMMU_INO}
        self.ctimes: dict[Node, int] = {}
        self.open_nodes: list[Node] = []
        self.dirty: set[Node] = set()  # to be compared byte by byte

    def clock(self) -> int:
        self.now += 1
        return self.now

    # ------------------------------------------------------------------ picking

    def nodes(self) -> list[Node]:
        seen = {id(node): node for _path, node in self.model.walk()}
        seen |= {id(node): node for node in self.open_nodes}
        return list(seen.values())

    def pick(self, number: int, wanted: Callable[[Node], bool]) -> Node:
        found = [node for node in self.nodes() if wanted(node)]
        return found[number % len(found)]

    def directory(self, number: int) -> Node:
        return self.pick(number, lambda node: node.is_dir and not node.fixed)

    def anything(self, number: int) -> Node:
        return self.pick(number, lambda node: not node.fixed)

    def has_file(self) -> bool:
        return any(node.is_reg for node in self.nodes())

    def file(self, number: int) -> Node:
        return self.pick(number, lambda node: node.is_reg)

    # ------------------------------------------------------------------ running

    def both(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        """Run an operation on both sides; they fail alike or succeed alike. None if it failed."""
        self.model.changed.clear()
        before = self.now
        error = None
        result = None
        try:
            result = self.fs.run(ours)
        except NoSpaceError:
            assert sum(n.size for n in self.nodes()) + 8 * MIB > REGION_BYTES - 6 * BLOCK
            self.check_times(before)
            return None
        except PkernfsError as e:
            error = e
        expected, number = None, 0
        try:
            expected = theirs()
        except OSError as e:
            number = e.errno or -1
        if number:
            assert error is not None, f"succeeded, but should have failed: {os.strerror(number)}"
            assert error.errno == number, f"got {error!r}, expected {os.strerror(number)}"
            self.check_times(before)
            return None
        if error is not None:
            raise AssertionError("failed, but should have succeeded") from error
        if isinstance(expected, Node):
            assert result is not None
            known = self.inos.get(expected)
            assert known in (None, result.ino)
            self.inos[expected] = result.ino
        else:
            assert result == expected
        self.dirty |= self.model.changed
        self.check_times(before)
        return result

    def check_times(self, before: int) -> None:
        for node in self.nodes():
            ctime = self.fs.inode(self.inos[node]).ctime
            if node in self.model.changed:
                assert ctime > before, "ctime did not change"
            elif node in self.ctimes:
                assert ctime == self.ctimes[node], "ctime changed"
            self.ctimes[node] = ctime

    # ------------------------------------------------------------------ names

    @rule(
        d=PICK, name=NAMES, mode=MODES, uid=IDS, gid=IDS,
        kind=KINDS,
        rdev=st.sampled_from([0, os.makedev(1, 3), os.makedev(4095, 1048575)]),
    )  # fmt: skip
    def create(
        self, d: int, name: bytes, mode: int, uid: int, gid: int, kind: int, rdev: int
    ) -> None:
        at = self.directory(d)
        self.both(
            lambda: self.fs.create(self.inos[at], name, kind | mode, uid, gid, rdev),
            lambda: self.model.create(at, name, kind | mode, uid, gid, rdev),
        )

    @rule(d=PICK, mode=MODES, uid=IDS, gid=IDS)
    def tmpfile(self, d: int, mode: int, uid: int, gid: int) -> None:
        at = self.directory(d)
        made: list[Node] = []

        def ours() -> Any:
            inode = self.fs.tmpfile(self.inos[at], mode, uid, gid)
            self.fs.open(inode.ino)
            return inode

        def theirs() -> Node:
            made.append(self.model.tmpfile(at, mode, uid, gid))
            return made[0]

        if self.both(ours, theirs):
            made[0].handles += 1
            self.open_nodes.append(made[0])

    @rule(d=PICK, name=NAMES, mode=MODES, uid=IDS, gid=IDS)
    def mkdir(self, d: int, name: bytes, mode: int, uid: int, gid: int) -> None:
        at = self.directory(d)
        self.both(
            lambda: self.fs.mkdir(self.inos[at], name, mode, uid, gid),
            lambda: self.model.mkdir(at, name, mode, uid, gid),
        )

    @rule(d=PICK, name=NAMES, length=st.sampled_from([1, 128, 129, 4032, 4033, 4095, 4096]))
    def symlink(self, d: int, name: bytes, length: int) -> None:
        at = self.directory(d)
        target = noise(length, length)[:length]
        self.both(
            lambda: self.fs.symlink(self.inos[at], name, target, 3, 4),
            lambda: self.model.symlink(at, name, target, 3, 4),
        )

    @rule(n=PICK, d=PICK, name=NAMES)
    def link(self, n: int, d: int, name: bytes) -> None:
        node, at = self.anything(n), self.directory(d)
        self.both(
            lambda: self.fs.link(self.inos[node], self.inos[at], name),
            lambda: self.model.link(node, at, name),
        )

    @rule(d=PICK, name=NAMES)
    def lookup(self, d: int, name: bytes) -> None:
        at = self.directory(d)
        self.both(lambda: self.fs.lookup(self.inos[at], name), lambda: self.model.lookup(at, name))

    @rule(d=PICK, name=NAMES)
    def unlink(self, d: int, name: bytes) -> None:
        at = self.directory(d)
        self.both(lambda: self.fs.unlink(self.inos[at], name), lambda: self.model.unlink(at, name))

    @rule(d=PICK, name=NAMES)
    def rmdir(self, d: int, name: bytes) -> None:
        at = self.directory(d)
        self.both(lambda: self.fs.rmdir(self.inos[at], name), lambda: self.model.rmdir(at, name))

    @rule(d=PICK, name=NAMES, to=PICK, new=NAMES, flags=RENAMES)
    def rename(self, d: int, name: bytes, to: int, new: bytes, flags: int) -> None:
        source, target = self.directory(d), self.directory(to)

        def theirs() -> None:
            self.model.rename(source, name, target, new, flags)
            for node in self.model.changed - self.inos.keys():  # a whiteout
                self.inos[node] = self.fs.lookup(self.inos[source], name).ino

        self.both(
            lambda: self.fs.rename(self.inos[source], name, self.inos[target], new, flags), theirs
        )

    # ------------------------------------------------------------------ attributes

    @rule(n=PICK, mode=MODES, privileged=st.booleans(), member=st.booleans())
    def chmod(self, n: int, mode: int, privileged: bool, member: bool) -> None:
        node = self.anything(n)

        def ours() -> None:
            self.fs.setattr(self.inos[node], mode=mode, privileged=privileged, group_member=member)

        self.both(ours, lambda: self.model.chmod(node, mode, may_set_gid=privileged or member))

    @rule(n=PICK, uid=st.none() | IDS, gid=IDS)
    def chown(self, n: int, uid: int | None, gid: int) -> None:
        node = self.anything(n)

        def ours() -> None:
            self.fs.setattr(self.inos[node], uid=uid, gid=gid)

        self.both(ours, lambda: self.model.chown(node, uid, gid))

    @rule(n=PICK, atime=st.integers(-(1 << 65), 1 << 65), mtime=TIMES)
    def utimens(self, n: int, atime: int, mtime: int) -> None:
        node = self.anything(n)

        def ours() -> None:
            self.fs.setattr(self.inos[node], atime=atime, mtime=mtime)

        def theirs() -> None:
            if not -(1 << 63) <= atime < 1 << 63:
                raise OSError(errno.EOVERFLOW, "a time that cannot be kept")
            self.model.changed.add(node)

        before = self.fs.inode(self.inos[node])
        kept = before.atime, before.mtime
        refused = not -(1 << 63) <= atime < 1 << 63
        self.both(ours, theirs)
        inode = self.fs.inode(self.inos[node])
        assert (inode.atime, inode.mtime) == (kept if refused else (atime, mtime))

    @rule(n=PICK, name=XATTRS, length=VALUES, flags=st.sampled_from([0, 0, 1, 2, 3]))
    def setxattr(self, n: int, name: bytes, length: int, flags: int) -> None:
        node = self.anything(n)
        value = noise(length, length)[:length]
        self.both(
            lambda: self.fs.setxattr(self.inos[node], name, value, flags),
            lambda: self.model.setxattr(node, name, value, flags),
        )

    @rule(n=PICK, name=XATTRS)
    def removexattr(self, n: int, name: bytes) -> None:
        node = self.anything(n)
        self.both(
            lambda: self.fs.removexattr(self.inos[node], name),
            lambda: self.model.removexattr(node, name),
        )

    # ------------------------------------------------------------------ data

    @precondition(has_file)
    @rule(n=PICK, offset=OFFSETS, length=LENGTHS, seed=PICK, privileged=st.booleans())
    def write(self, n: int, offset: int, length: int, seed: int, privileged: bool) -> None:
        node = self.file(n)
        data = noise(seed, length)[:length]
        self.both(
            lambda: self.fs.write(self.inos[node], offset, memoryview(data), privileged),
            lambda: self.model.write(node, offset, data, privileged=privileged),
        )

    @precondition(has_file)
    @rule(n=PICK, length=st.integers(1, 9000), seed=PICK)
    def append(self, n: int, length: int, seed: int) -> None:
        node = self.file(n)
        data = noise(seed, length)[:length]
        end = node.size
        self.both(
            lambda: self.fs.write(self.inos[node], end, data),
            lambda: self.model.write(node, end, data),
        )

    @precondition(has_file)
    @rule(n=PICK, size=OFFSETS, privileged=st.booleans())
    def truncate(self, n: int, size: int, privileged: bool) -> None:
        node = self.file(n)

        def ours() -> None:
            self.fs.setattr(self.inos[node], size=size, privileged=privileged)

        self.both(ours, lambda: self.model.truncate(node, size, privileged=privileged))

    @precondition(has_file)
    @rule(
        n=PICK,
        mode=st.sampled_from([0, 1, 3, 3, 3, 16, 17, 2, 8, 32]),
        offset=OFFSETS,
        length=LENGTHS,
    )
    def fallocate(self, n: int, mode: int, offset: int, length: int) -> None:
        node = self.file(n)
        self.both(
            lambda: self.fs.fallocate(self.inos[node], mode, offset, length),
            lambda: self.model.fallocate(node, mode, offset, length),
        )

    @precondition(has_file)
    @rule(n=PICK, offset=OFFSETS, length=LENGTHS)
    def read(self, n: int, offset: int, length: int) -> None:
        node = self.file(n)
        found = bytes(self.fs.read(self.inos[node], offset, length))
        assert found == self.model.read(node, offset, length)

    @precondition(has_file)
    @rule(n=PICK)
    def seek_through(self, n: int) -> None:
        node = self.file(n)
        ino, at = self.inos[node], 0
        pieces = []
        while at < node.size:
            hole = self.fs.seek(ino, at, os.SEEK_HOLE)
            try:
                data = self.fs.seek(ino, at, os.SEEK_DATA)
            except PkernfsError:
                data = node.size
            assert (hole == at) != (data == at) or at == node.size
            if data > at:
                assert not any(node.data[at:data]), "a hole where there is data"
            else:
                pieces.append((at, hole))
            at = max(hole, data)
        assert all(start < end <= node.size for start, end in pieces)

    # ------------------------------------------------------------------ handles and remounts

    @rule(n=PICK)
    def open(self, n: int) -> None:
        node = self.anything(n)
        self.fs.open(self.inos[node])
        node.handles += 1
        self.open_nodes.append(node)

    @precondition(lambda self: bool(self.open_nodes))
    @rule(n=PICK)
    def release(self, n: int) -> None:
        node = self.open_nodes.pop(n % len(self.open_nodes))
        node.handles -= 1
        self.fs.release(self.inos[node])

    @rule(clean=st.booleans())
    def remount(self, clean: bool) -> None:
        if clean:
            self.fs.unmount()
        self.region.close()
        self.region = self.memory.open()
        self.fs = mount_filesystem(self.region, clock=self.clock)
        self.open_nodes = []
        self.model.crash()
        self.dirty = set(self.nodes())

    @rule()
    def read_only(self) -> None:
        """After a crash, too: what had no name any more stays, and nobody sees it."""
        self.region.close()
        self.region = self.memory.open(write=False)
        self.fs = mount_filesystem(self.region)
        self.open_nodes = []
        self.model.crash()
        self.dirty = set(self.nodes())
        for node in self.nodes():
            self.compare(node)
        self.region.close()
        self.region = self.memory.open()
        self.fs = mount_filesystem(self.region, clock=self.clock)

    @rule(most=st.integers(1, 8))
    def zero_ahead(self, most: int) -> None:
        isolated = self.fs.next_dirty(most * BLOCK)
        if isolated:
            for offset, length in isolated.pieces():
                self.region.zero(offset, length)
            self.fs.finish_zeroing(isolated)

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def same(self) -> None:
        assert self.fs.statfs().files - self.fs.statfs().free_files == len(self.nodes())
        for node in self.nodes():
            self.compare(node)
        self.dirty.clear()

    def compare(self, node: Node) -> None:
        ino = self.inos[node]
        inode = self.fs.inode(ino)
        assert (inode.mode, inode.uid, inode.gid) == (node.mode, node.uid, node.gid)
        assert (inode.nlink, inode.size, inode.rdev) == (node.nlink, node.size, node.rdev)
        if node not in self.dirty:
            return
        assert {name: self.fs.getxattr(ino, name) for name in self.fs.listxattr(ino)} == node.xattrs
        if node.is_dir:
            found = {name: (i, kind) for name, i, kind, _ in self.fs.readdir(ino, 0)}
            assert found == {
                name: (self.inos[entry], entry.mode >> 12) for name, entry in node.entries.items()
            }
            if node.nlink:
                assert node.parent is not None
                assert self.fs.lookup(ino, b"..").ino == self.inos[node.parent]
        elif node.is_reg:
            assert bytes(self.fs.read(ino, 0, node.size + 1)) == node.data
        elif stat.S_ISLNK(node.mode):
            assert self.fs.readlink(ino) == node.target

    @invariant()
    def clean(self) -> None:
        assert_clean(self.region)

    def teardown(self) -> None:
        self.region.close()
        self.memory.close()


TestFileSystem = pytest.mark.slow("a model of all of it")(FileSystemMachine.TestCase)
