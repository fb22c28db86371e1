"""A POSIX tree in memory: what a file system has to agree with, written as plainly as can be.

Errors are :class:`OSError` with the errno that Linux gives. The methods take nodes, not numbers or
paths: whoever drives a file system next to the model keeps the two apart. Times are not modelled
but for whether an operation has to change them (:attr:`Model.changed`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
KEEP_SIZE = 1
PUNCH_HOLE = 2
ZERO_RANGE = 16
MAX_BYTES = (1 << 63) - 1 - (2 << 20)


@dataclass(eq=False)
class Node:
    """A file of any type."""

    mode: int
    uid: int
    gid: int
    nlink: int = 1
    rdev: int = 0
    data: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    entries: dict[bytes, Node] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    parent: Node | None = None
    handles: int = 0
    unnamed: bool = False  # made by O_TMPFILE, and not linked yet
    fixed: bool = False  # /iommu: stays where it is

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_reg(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def size(self) -> int:
        """As the format has it: entries of a directory, bytes of all else."""
        if self.is_dir:
            return len(self.entries)
        return len(self.target) if stat.S_ISLNK(self.mode) else len(self.data)


def _fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Model:
    """A root directory with ``iommu`` in it, and the operations."""

    def __init__(self) -> None:
        self.root = Node(stat.S_IFDIR | 0o755, 0, 0, nlink=3)
        self.root.parent = self.root
        iommu = Node(stat.S_IFDIR | 0o755, 0, 0, nlink=2, parent=self.root, fixed=True)
        self.root.entries[b"iommu"] = iommu
        self.changed: set[Node] = set()

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Every path (no leading slash; the root's is empty) and its node, parents first."""
        todo = [(b"", self.root)]
        while todo:
            path, node = todo.pop()
            yield path, node
            for name, entry in node.entries.items():
                todo.append((path + b"/" + name if path else name, entry))

    def path(self, directory: Node, name: bytes = b"") -> bytes:
        """The path of a live directory (and a name in it)."""
        parts = [name] if name else []
        while directory is not self.root:
            assert directory.parent is not None
            parts.append(next(n for n, e in directory.parent.entries.items() if e is directory))
            directory = directory.parent
        return b"/".join(reversed(parts))

    def crash(self) -> None:
        """Every handle is gone, and what had no name with them."""
        for _path, node in self.walk():
            node.handles = 0

    # ------------------------------------------------------------------ names

    def lookup(self, directory: Node, name: bytes) -> Node:
        if not directory.is_dir:
            raise _fail(errno.ENOTDIR)
        if len(name) > 255:
            raise _fail(errno.ENAMETOOLONG)
        if name not in directory.entries:
            raise _fail(errno.ENOENT)
        return directory.entries[name]

    def _check_new(self, directory: Node, name: bytes) -> None:
        if not directory.is_dir:
            raise _fail(errno.ENOTDIR)
        if not directory.nlink:
            raise _fail(errno.ENOENT)
        if len(name) > 255:
            raise _fail(errno.ENAMETOOLONG)
        if name in directory.entries:
            raise _fail(errno.EEXIST)

    def _enter(self, directory: Node, name: bytes, node: Node) -> Node:
        directory.entries[name] = node
        self.changed |= {directory, node}
        return node

    def create(
        self, directory: Node, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0
    ) -> Node:
        self._check_new(directory, name)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        device = stat.S_IFMT(mode) in (stat.S_IFCHR, stat.S_IFBLK)
        return self._enter(directory, name, Node(mode, uid, gid, rdev=rdev if device else 0))

    def tmpfile(self, directory: Node, mode: int, uid: int, gid: int) -> Node:
        if not directory.nlink:
            raise _fail(errno.ENOENT)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        node = Node(stat.S_IFREG | mode, uid, gid, nlink=0, unnamed=True)
        self.changed.add(node)
        return node

    def mkdir(self, directory: Node, name: bytes, mode: int, uid: int, gid: int) -> Node:
        self._check_new(directory, name)
        mode |= stat.S_IFDIR
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            mode |= stat.S_ISGID
        directory.nlink += 1
        return self._enter(directory, name, Node(mode, uid, gid, nlink=2, parent=directory))

    def symlink(self, directory: Node, name: bytes, target: bytes, uid: int, gid: int) -> Node:
        self._check_new(directory, name)
        if len(target) > 4095:
            raise _fail(errno.ENAMETOOLONG)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        return self._enter(directory, name, Node(stat.S_IFLNK | 0o777, uid, gid, target=target))

    def link(self, node: Node, directory: Node, name: bytes) -> Node:
        if node.is_dir:
            raise _fail(errno.EPERM)
        self._check_new(directory, name)
        if not node.nlink and not node.unnamed:
            raise _fail(errno.ENOENT)
        node.unnamed = False
        node.nlink += 1
        return self._enter(directory, name, node)

    def unlink(self, directory: Node, name: bytes) -> None:
        if not directory.nlink:
            raise _fail(errno.ENOENT)
        node = self.lookup(directory, name)
        if node.is_dir:
            raise _fail(errno.EISDIR)
        del directory.entries[name]
        node.nlink -= 1
        self.changed |= {directory, node}

    def _check_removable(self, node: Node) -> None:
        if not node.is_dir:
            raise _fail(errno.ENOTDIR)
        if node.fixed:
            raise _fail(errno.EBUSY)
        if node.entries:
            raise _fail(errno.ENOTEMPTY)

    def rmdir(self, directory: Node, name: bytes) -> None:
        if not directory.nlink:
            raise _fail(errno.ENOENT)
        node = self.lookup(directory, name)
        self._check_removable(node)
        del directory.entries[name]
        directory.nlink -= 1
        node.nlink = 0
        self.changed |= {directory, node}

    def _is_below(self, node: Node, directory: Node) -> bool:
        while directory is not node:
            if directory is self.root:
                return False
            assert directory.parent is not None
            directory = directory.parent
        return True

    def rename(
        self, source: Node, name: bytes, target: Node, new_name: bytes, flags: int = 0
    ) -> None:
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT, 5):
            raise _fail(errno.EINVAL)
        if not source.nlink or not target.nlink:
            raise _fail(errno.ENOENT)
        node = self.lookup(source, name)
        if len(new_name) > 255:
            raise _fail(errno.ENAMETOOLONG)
        old = target.entries.get(new_name)
        if flags == RENAME_EXCHANGE:
            self._exchange(source, name, target, new_name)
            return
        if old is not None and flags & RENAME_NOREPLACE:
            raise _fail(errno.EEXIST)
        if old is node:
            return
        if node.fixed:
            raise _fail(errno.EBUSY)
        if node.is_dir and self._is_below(node, target):
            raise _fail(errno.EINVAL)
        if old is not None:
            if node.is_dir:
                self._check_removable(old)
                old.nlink = 0
                target.nlink -= 1
            elif old.is_dir:
                raise _fail(errno.EISDIR)
            else:
                old.nlink -= 1
            self.changed.add(old)
        del source.entries[name]
        if flags & RENAME_WHITEOUT:
            gid = source.gid if source.mode & stat.S_ISGID else 0
            self._enter(source, name, Node(stat.S_IFCHR, 0, gid))
        target.entries[new_name] = node
        self._moved(node, source, target)
        self.changed |= {source, target, node}

    @staticmethod
    def _moved(node: Node, source: Node, target: Node) -> None:
        if node.is_dir:
            source.nlink -= 1
            target.nlink += 1
            node.parent = target

    def _exchange(self, source: Node, name: bytes, target: Node, new_name: bytes) -> None:
        node = source.entries[name]
        other = target.entries.get(new_name)
        if other is None:
            raise _fail(errno.ENOENT)
        if node is other:
            return
        if node.fixed or other.fixed:
            raise _fail(errno.EBUSY)
        if source is not target and (
            (node.is_dir and self._is_below(node, target))
            or (other.is_dir and self._is_below(other, source))
        ):
            raise _fail(errno.EINVAL)
        source.entries[name], target.entries[new_name] = other, node
        self._moved(node, source, target)
        self._moved(other, target, source)
        self.changed |= {source, target, node, other}

    # ------------------------------------------------------------------ attributes

    def chmod(self, node: Node, mode: int, *, may_set_gid: bool = True) -> None:
        if not may_set_gid and not node.is_dir:
            mode &= ~stat.S_ISGID
        node.mode = stat.S_IFMT(node.mode) | mode
        self.changed.add(node)

    def chown(self, node: Node, uid: int | None, gid: int | None) -> None:
        node.uid = node.uid if uid is None else uid
        node.gid = node.gid if gid is None else gid
        if not node.is_dir:
            self._clear_set_id(node)
        self.changed.add(node)

    @staticmethod
    def _clear_set_id(node: Node) -> None:
        node.mode &= ~stat.S_ISUID
        if node.mode & stat.S_IXGRP:
            node.mode &= ~stat.S_ISGID

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int = 0) -> None:
        if not name.startswith((b"user.", b"trusted.", b"security.")):
            raise _fail(errno.EOPNOTSUPP)
        if len(name) > 255:
            raise _fail(errno.ERANGE)
        if len(value) > 65536:
            raise _fail(errno.E2BIG)
        if flags & os.XATTR_CREATE and flags & os.XATTR_REPLACE:
            raise _fail(errno.EINVAL)
        if flags & os.XATTR_CREATE and name in node.xattrs:
            raise _fail(errno.EEXIST)
        if flags & os.XATTR_REPLACE and name not in node.xattrs:
            raise _fail(errno.ENODATA)
        node.xattrs[name] = value
        self.changed.add(node)

    def getxattr(self, node: Node, name: bytes) -> bytes:
        if name not in node.xattrs:
            raise _fail(errno.ENODATA)
        return node.xattrs[name]

    def removexattr(self, node: Node, name: bytes) -> None:
        self.getxattr(node, name)
        del node.xattrs[name]
        self.changed.add(node)

    # ------------------------------------------------------------------ data

    @staticmethod
    def _check_data(node: Node) -> None:
        if not node.is_reg:
            raise _fail(errno.EISDIR if node.is_dir else errno.EINVAL)

    def truncate(self, node: Node, size: int, *, privileged: bool = True) -> None:
        self._check_data(node)
        if not privileged:
            self._clear_set_id(node)
        self._resize(node, size)
        self.changed.add(node)

    @staticmethod
    def _resize(node: Node, size: int) -> None:
        del node.data[size:]
        node.data.extend(bytes(size - len(node.data)))

    def write(self, node: Node, offset: int, data: bytes, *, privileged: bool = True) -> int:
        if data:
            self._resize(node, max(len(node.data), offset + len(data)))
            node.data[offset : offset + len(data)] = data
            if not privileged:
                self._clear_set_id(node)
            self.changed.add(node)
        return len(data)

    def read(self, node: Node, offset: int, length: int) -> bytes:
        return bytes(node.data[offset : offset + length])

    def fallocate(self, node: Node, mode: int, offset: int, length: int) -> None:
        if mode not in (
            0, KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE,
        ):  # fmt: skip
            raise _fail(errno.EOPNOTSUPP)
        end = offset + length
        if not mode & KEEP_SIZE:
            self._resize(node, max(len(node.data), end))
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            stop = min(end, len(node.data))
            if offset < stop:
                node.data[offset:stop] = bytes(stop - offset)
        self.changed.add(node)
