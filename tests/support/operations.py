"""Operations of a file system by path, as scenarios of crash points say them."""

from __future__ import annotations

import random
import stat

import pytest

from pkernfs.errors import NoSpaceError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import ROOT_INO
from pkernfs.quantities import Ino
from support.crash import Operation

REG = stat.S_IFREG | 0o644


def text(length: int, key: int = 0) -> bytes:
    """Bytes without a zero, different for each key and place."""
    return random.Random(key).randbytes(length).replace(b"\0", b"\1").replace(b"\xdb", b"\1")


def at(fs: FileSystem, path: str) -> Ino:
    """Inode number of a path such as ``d/b``."""
    ino = ROOT_INO
    for name in path.split("/"):
        ino = fs.lookup(ino, name.encode()).ino
    return ino


def parent(fs: FileSystem, path: str) -> tuple[Ino, bytes]:
    """Directory and name of a path."""
    directory, _, name = path.rpartition("/")
    return (at(fs, directory) if directory else ROOT_INO), name.encode()


def make(fs: FileSystem, path: str, data: bytes = b"") -> Ino:
    """A file with those bytes."""
    ino = fs.create(*parent(fs, path), REG, 3, 4).ino
    if data:
        fs.run(lambda: fs.write(ino, 0, data))
    return ino


def write(path: str, offset: int, data: bytes) -> Operation:
    return lambda fs: fs.run(lambda: fs.write(at(fs, path), offset, data))


def resize(path: str, size: int) -> Operation:
    return lambda fs: fs.run(lambda: fs.setattr(at(fs, path), size=size))


def allocate(path: str, mode: int, offset: int, length: int) -> Operation:
    return lambda fs: fs.run(lambda: fs.fallocate(at(fs, path), mode, offset, length))


def move(old: str, new: str, flags: int = 0) -> Operation:
    return lambda fs: fs.rename(*parent(fs, old), *parent(fs, new), flags)


def unlink(path: str) -> Operation:
    return lambda fs: fs.unlink(*parent(fs, path))


def each(*operations: Operation) -> Operation:
    def run(fs: FileSystem) -> None:
        for operation in operations:
            operation(fs)

    return run


def opened(path: str) -> Operation:
    return lambda fs: fs.open(at(fs, path))


def without_space(operation: Operation) -> Operation:
    def run(fs: FileSystem) -> None:
        with pytest.raises(NoSpaceError):
            operation(fs)

    return run


def release_all(fs: FileSystem) -> None:
    for ino in list(fs._life._opens):
        fs.release(ino)
