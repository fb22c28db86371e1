"""System calls on a real mount against the model, with unmounts, kills, and fsck at the end."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pkernfs.fs import fsck
from pkernfs.region.region import Region
from support.mounting import Mounted, child, libc
from support.posix_model import RENAME_WHITEOUT, Model, Node
from support.strategies import LENGTHS, OFFSETS, PICK, noise

pytestmark = pytest.mark.fuse

AT_FDCWD = -100
MIB = 1 << 20
NAMES = st.sampled_from([b"a", b"b", b"c", b"d", b"\xff\xfe\n ", b"x" * 255, b"iommu"])
RENAMES = st.sampled_from([0, 0, 0, 1, 2, 2, 3, 4, 5])
MODES = st.sampled_from([0o644, 0o755, 0o4755, 0o2755, 0o2644, 0o1777, 0])
XATTRS = st.sampled_from([b"user.a", b"user.b", b"security.c", b"trusted.d", b"system.no"])
KINDS = st.sampled_from([stat.S_IFREG] * 4 + [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR])


class MountedModel(Model):
    """What the kernel checks before it asks the file system."""

    def rename(
        self, source: Node, name: bytes, target: Node, new_name: bytes, flags: int = 0
    ) -> None:
        old = target.entries.get(new_name)
        if flags in (0, RENAME_WHITEOUT) and old is not None and name in source.entries:
            above = old is not source.entries[name] and old.is_dir and self._is_below(old, source)
            if above:
                raise OSError(errno.ENOTEMPTY, "the target is above the source")
        super().rename(source, name, target, new_name, flags)


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    if libc.renameat2(AT_FDCWD, old, AT_FDCWD, new, flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


class MountMachine(RuleBasedStateMachine):
    """One mount and one model."""

    def __init__(self) -> None:
        super().__init__()
        self.umask = os.umask(0)
        self.mounted = Mounted(64 * MIB)
        self.mounted.start()
        self.model = MountedModel()
        self.fds: list[tuple[int, Node]] = []
        self.dirty: set[Node] = set()

    def teardown(self) -> None:
        os.umask(self.umask)
        try:
            self.close_all()
            self.mounted.unmount()
            with Region.open(str(self.mounted.region), write=False) as region:
                report = fsck.check(region, repair=False)
            assert report.clean, [p.message for p in report.problems]
        finally:
            self.mounted.close()

    def close_all(self) -> None:
        while self.fds:
            fd, node = self.fds.pop()
            os.close(fd)
            node.handles -= 1

    # ------------------------------------------------------------------ picking and running

    def path(self, directory: Node, name: bytes = b"") -> bytes:
        return os.path.join(os.fsencode(self.mounted.path), self.model.path(directory, name))

    def pick(self, number: int, wanted: Callable[[Node], bool]) -> tuple[bytes, Node]:
        found = [(p, n) for p, n in self.model.walk() if wanted(n) and not n.fixed]
        path, node = found[number % len(found)]
        return os.path.join(os.fsencode(self.mounted.path), path), node

    def directory(self, number: int) -> Node:
        return self.pick(number, lambda node: node.is_dir)[1]

    def has_file(self) -> bool:
        nodes = [node for _, node in (*self.fds, *self.model.walk())]
        return any(node.is_reg for node in nodes)

    @contextlib.contextmanager
    def file(self, number: int) -> Iterator[tuple[int, Node]]:
        """A descriptor: one that is open already, maybe without a name, or a new one."""
        opened = [(fd, node) for fd, node in self.fds if node.is_reg]
        named = [(p, n) for p, n in self.model.walk() if n.is_reg]
        number %= len(opened) + len(named)
        if number < len(opened):
            yield opened[number]
            return
        path, node = named[number - len(opened)]
        fd = os.open(os.path.join(os.fsencode(self.mounted.path), path), os.O_RDWR)
        try:
            yield fd, node
        finally:
            os.close(fd)

    def both(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
        self.model.changed.clear()
        got, wanted = 0, 0
        try:
            ours()
        except OSError as e:
            got = e.errno or -1
        if got == errno.ENOSPC:
            self.dirty |= {node for _, node in self.model.walk()}
            return
        try:
            theirs()
        except OSError as e:
            wanted = e.errno or -1
        assert got == wanted, f"got {errno.errorcode.get(got)}, not {errno.errorcode.get(wanted)}"
        self.dirty |= self.model.changed

    # ------------------------------------------------------------------ names

    @rule(d=PICK, name=NAMES, mode=MODES, kind=KINDS)
    def mknod(self, d: int, name: bytes, mode: int, kind: int) -> None:
        at, rdev = self.directory(d), os.makedev(1, 3)
        path = self.path(at, name)
        self.both(
            lambda: os.mknod(path, kind | mode, rdev),
            lambda: self.model.create(at, name, kind | mode, 0, 0, rdev),
        )

    @rule(d=PICK, name=NAMES)
    def create(self, d: int, name: bytes) -> None:
        at = self.directory(d)
        path = self.path(at, name)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        self.both(
            lambda: os.close(os.open(path, flags, 0o640)),
            lambda: self.model.create(at, name, stat.S_IFREG | 0o640, 0, 0),
        )

    @rule(d=PICK, name=NAMES, mode=st.sampled_from([0o755, 0o700, 0o1777]))
    def mkdir(self, d: int, name: bytes, mode: int) -> None:
        at = self.directory(d)
        path = self.path(at, name)
        self.both(lambda: os.mkdir(path, mode), lambda: self.model.mkdir(at, name, mode, 0, 0))

    @rule(d=PICK, name=NAMES, length=st.sampled_from([1, 128, 129, 4095]))
    def symlink(self, d: int, name: bytes, length: int) -> None:
        at, target = self.directory(d), noise(length, length)[:length]
        path = self.path(at, name)
        self.both(
            lambda: os.symlink(target, path), lambda: self.model.symlink(at, name, target, 0, 0)
        )

    @rule(n=PICK, d=PICK, name=NAMES)
    def link(self, n: int, d: int, name: bytes) -> None:
        (old, node), at = self.pick(n, lambda _: True), self.directory(d)
        path = self.path(at, name)
        expected = self.model.link
        if node.is_dir and name in at.entries:
            return  # EEXIST or EPERM: the kernel looks at the new name first
        self.both(
            lambda: os.link(old, path, follow_symlinks=False), lambda: expected(node, at, name)
        )

    @rule(d=PICK, name=NAMES)
    def unlink(self, d: int, name: bytes) -> None:
        at = self.directory(d)
        path = self.path(at, name)
        self.both(lambda: os.unlink(path), lambda: self.model.unlink(at, name))

    @rule(d=PICK, name=NAMES)
    def rmdir(self, d: int, name: bytes) -> None:
        at = self.directory(d)
        path = self.path(at, name)
        self.both(lambda: os.rmdir(path), lambda: self.model.rmdir(at, name))

    @rule(d=PICK, name=NAMES, to=PICK, new=NAMES, flags=RENAMES)
    def rename(self, d: int, name: bytes, to: int, new: bytes, flags: int) -> None:
        source, target = self.directory(d), self.directory(to)
        old_path, new_path = self.path(source, name), self.path(target, new)
        self.both(
            lambda: renameat2(old_path, new_path, flags),
            lambda: self.model.rename(source, name, target, new, flags),
        )

    # ------------------------------------------------------------------ attributes

    @rule(n=PICK, mode=MODES)
    def chmod(self, n: int, mode: int) -> None:
        path, node = self.pick(n, lambda node: not stat.S_ISLNK(node.mode))
        self.both(lambda: os.chmod(path, mode), lambda: self.model.chmod(node, mode))

    @rule(n=PICK, uid=st.sampled_from([0, 7]), gid=st.sampled_from([0, 8]))
    def chown(self, n: int, uid: int, gid: int) -> None:
        path, node = self.pick(n, lambda _: True)
        self.both(lambda: os.lchown(path, uid, gid), lambda: self.model.chown(node, uid, gid))

    @rule(
        n=PICK,
        name=XATTRS,
        length=st.sampled_from([0, 1, 513, 9000, 65536, 65537]),
        flags=st.sampled_from([0, 0, 1, 2]),
    )
    def setxattr(self, n: int, name: bytes, length: int, flags: int) -> None:
        path, node = self.pick(n, lambda node: node.is_reg or node.is_dir)
        value = noise(length, length)[:length]
        if length > 65536 and name.startswith(b"system."):
            return  # either error
        self.both(
            lambda: os.setxattr(path, name, value, flags),
            lambda: self.model.setxattr(node, name, value, flags),
        )

    @rule(n=PICK, name=st.sampled_from([b"user.a", b"user.b", b"security.c"]))
    def removexattr(self, n: int, name: bytes) -> None:
        path, node = self.pick(n, lambda node: node.is_reg or node.is_dir)
        self.both(lambda: os.removexattr(path, name), lambda: self.model.removexattr(node, name))

    @rule(n=PICK, atime=st.integers(-(1 << 62), 1 << 62), mtime=st.integers(-(1 << 62), 1 << 62))
    def utime(self, n: int, atime: int, mtime: int) -> None:
        path, _node = self.pick(n, lambda _: True)
        os.utime(path, ns=(atime, mtime), follow_symlinks=False)
        found = os.lstat(path)
        assert (found.st_atime_ns, found.st_mtime_ns) == (atime, mtime)

    # ------------------------------------------------------------------ data

    @precondition(has_file)
    @rule(n=PICK, offset=OFFSETS, length=LENGTHS, seed=PICK)
    def write(self, n: int, offset: int, length: int, seed: int) -> None:
        data = noise(seed, length)[:length]
        with self.file(n) as (fd, node):
            written = 0

            def ours() -> None:
                nonlocal written
                written = os.pwrite(fd, data, offset)

            def theirs() -> None:
                self.model.write(node, offset, data[:written])

            self.both(ours, theirs)

    @precondition(has_file)
    @rule(n=PICK, size=OFFSETS)
    def truncate(self, n: int, size: int) -> None:
        with self.file(n) as (fd, node):
            self.both(lambda: os.ftruncate(fd, size), lambda: self.model.truncate(node, size))

    @precondition(has_file)
    @rule(n=PICK, mode=st.sampled_from([0, 1, 3, 3, 16, 17, 8]), offset=OFFSETS, length=LENGTHS)
    def fallocate(self, n: int, mode: int, offset: int, length: int) -> None:
        with self.file(n) as (fd, node):
            self.both(
                lambda: fallocate(fd, mode, offset, length),
                lambda: self.model.fallocate(node, mode, offset, length),
            )

    @precondition(has_file)
    @rule(n=PICK, offset=OFFSETS, length=LENGTHS)
    def read(self, n: int, offset: int, length: int) -> None:
        with self.file(n) as (fd, node):
            assert os.pread(fd, length, offset) == self.model.read(node, offset, length)

    @precondition(has_file)
    @rule(n=PICK, at=PICK, seed=PICK, flush=st.booleans())
    def store_through_a_mapping(self, n: int, at: int, seed: int, flush: bool) -> None:
        with self.file(n) as (fd, node):
            if not node.size:
                return
            data = noise(seed, 5000)[:5000]
            at %= node.size
            data = data[: node.size - at]
            with mmap.mmap(fd, node.size) as memory:
                assert memory[at : at + 100] == node.data[at : at + 100]
                memory[at : at + len(data)] = data
                if flush:
                    memory.flush()
                assert os.pread(fd, len(data), at) == data
            node.data[at : at + len(data)] = data
            self.dirty.add(node)

    @precondition(has_file)
    @rule(n=PICK)
    def seek_through(self, n: int) -> None:
        with self.file(n) as (fd, node):
            at = 0
            while at < node.size:
                try:
                    start = os.lseek(fd, at, os.SEEK_DATA)
                except OSError as e:
                    assert e.errno == errno.ENXIO  # noqa: PT017 - the end of the loop
                    start = node.size
                assert not any(node.data[at:start])
                at = start if start == node.size else os.lseek(fd, start, os.SEEK_HOLE)

    # ------------------------------------------------------------------ handles and remounts

    @precondition(lambda self: len(self.fds) < 10)
    @rule(n=PICK)
    def open(self, n: int) -> None:
        path, node = self.pick(n, lambda node: node.is_reg or node.is_dir)
        self.fds.append((os.open(path, os.O_RDONLY if node.is_dir else os.O_RDWR), node))
        node.handles += 1

    @precondition(lambda self: bool(self.fds))
    @rule(n=PICK)
    def close(self, n: int) -> None:
        fd, node = self.fds.pop(n % len(self.fds))
        os.close(fd)
        node.handles -= 1

    @rule(kill=st.booleans())
    def remount(self, kill: bool) -> None:
        if kill:
            fd = os.open(self.mounted.path, os.O_RDONLY)
            assert not libc.syncfs(fd)
            os.close(fd)
            self.mounted.kill()
            self.close_all()
        else:
            self.close_all()
            self.mounted.unmount()
        self.mounted.start()
        self.dirty = {node for _, node in self.model.walk()}

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def same(self) -> None:
        base = os.fsencode(self.mounted.path)
        for path, node in self.model.walk():
            self.compare(os.path.join(base, path), node)
        for fd, node in self.fds:
            self.compare_stat(os.fstat(fd), node)
            if node in self.dirty and node.is_reg:
                assert os.pread(fd, node.size + 1, 0) == node.data
        self.dirty.clear()

    @staticmethod
    def compare_stat(found: os.stat_result, node: Node) -> None:
        assert (found.st_mode, found.st_uid, found.st_gid) == (node.mode, node.uid, node.gid)
        assert (found.st_nlink, found.st_size) == (node.nlink, node.size)
        assert found.st_rdev == node.rdev

    def compare(self, path: bytes, node: Node) -> None:
        self.compare_stat(os.lstat(path), node)
        if node not in self.dirty:
            return
        if node.is_dir:
            assert set(os.listdir(path)) == node.entries.keys()
        elif stat.S_ISLNK(node.mode):
            assert os.readlink(path) == node.target
        elif node.is_reg:
            with open(path, "rb") as f:
                assert f.read() == node.data
        if node.is_reg or node.is_dir:
            names = [os.fsencode(name) for name in os.listxattr(path)]
            assert {name: os.getxattr(path, name) for name in names} == node.xattrs


TestMount = MountMachine.TestCase
_thorough = settings.get_current_profile_name() == "thorough"
TestMount.settings = settings(
    max_examples=60 if _thorough else 5,
    stateful_step_count=100 if _thorough else 40,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a mount a try is slow to shrink with
)


def test_a_reader_never_sees_a_file_that_is_being_replaced() -> None:
    """open(2) between look-up and rename: the old contents or the new, and nothing else."""
    with Mounted() as mounted:
        path, new = mounted.path / "f", mounted.path / "new"
        path.write_bytes(b"0" * 5000)

        def replace() -> None:
            for i in range(3_000):
                new.write_bytes(b"%d" % (i % 10) * 5000)
                new.rename(path)

        with child(replace) as pid:
            reads = 0
            while not os.waitpid(pid, os.WNOHANG)[0]:
                content = path.read_bytes()
                assert len(content) == 5000
                assert content == content[:1] * 5000
                assert content[:1].isdigit()
                reads += 1
        assert reads > 100
        mounted.unmount()
