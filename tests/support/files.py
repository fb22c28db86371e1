"""Files of a mounted file system, for tests that call it without a mount."""

from __future__ import annotations

import random
import stat
from collections.abc import Callable

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import NoSpaceError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.quantities import Ino

ROOT = Ino(1)
IOMMU = Ino(2)
MIB = 1 << 20
GIB = 1 << 30
REG = stat.S_IFREG | 0o644
KEEP_SIZE = 1
PUNCH = 3
ZERO_RANGE = 16
in_a_gib = pytest.mark.parametrize("fs", [GIB], indirect=True)


def make(fs: FileSystem, name: bytes = b"f", content: bytes = b"", parent: Ino = ROOT) -> Ino:
    """A regular file; its number."""
    ino = fs.create(parent, name, REG, 0, 0).ino
    if content:
        fs.run(lambda: fs.write(ino, 0, content))
    return ino


def resize(fs: FileSystem, ino: Ino, size: int) -> None:
    fs.run(lambda: fs.setattr(ino, size=size))


def contents(fs: FileSystem, ino: Ino) -> bytes:
    return bytes(fs.read(ino, 0, fs.inode(ino).size))


def until_full(work: Callable[[int], object], most: int = 100_000) -> int:
    """Call ``work`` with 0, 1, 2... until it finds no space; how often it did."""
    for i in range(most):
        try:
            work(i)
        except NoSpaceError:
            return i
    raise AssertionError("never full")


def names(fs: FileSystem, ino: Ino) -> set[bytes]:
    return {name for name, *_ in fs.readdir(ino, 0)}


def held(fs: FileSystem) -> int:
    """Pages that all files with a name hold."""
    total = 0
    todo = [ROOT]
    seen = set()
    while todo:
        ino = todo.pop()
        if ino in seen:
            continue
        seen.add(ino)
        inode = fs.inode(ino)
        total += inode.data_pages
        if inode.is_dir:
            todo += [child for _, child, *_ in fs.readdir(ino, 0)]
    return total


def noise(length: int, seed: int = 1) -> bytes:
    part = random.Random(seed).randbytes(65521).replace(b"\0", b"\1")
    return (part * (length // len(part) + 1))[:length]


def remount(fs: FileSystem) -> FileSystem:
    """As after a crash: a second instance on the same bytes; the first must not be used."""
    return mount_filesystem(fs.region)
