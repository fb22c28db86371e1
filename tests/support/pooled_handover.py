"""A file system with segments that is handed over, with its segments as files of a directory."""

from __future__ import annotations

import os
import random
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import BLOCK, POOL_DIRECTORY, ROOT_INO, PoolFields
from pkernfs.pool.directory import DirectoryPool
from pkernfs.quantities import Ino
from pkernfs.region.region import Region
from pkernfs.region.spec import BASE
from support.checking import assert_clean

MIB = 1 << 20


class PooledFiles:
    """A region and its segments in a directory, unmounted at first."""

    def __init__(self, directory: Path, size: int = 16 * MIB) -> None:
        self.directory = directory
        path = str(directory / BASE)
        Region.create(path, size)
        self.region = Region.open(path, write=True)
        make_filesystem(self.region, pool=PoolFields(POOL_DIRECTORY, BLOCK))

    def mount(self, *, read_only: bool = False) -> FileSystem:
        return mount_filesystem(
            self.region,
            read_only=read_only,
            open_pool=lambda sb: DirectoryPool.at(str(self.directory), sb.pool.granule),
        )

    def segment(self, number: int) -> Path:
        """The file of a segment."""
        return self.directory / f"segment-{number}"

    def flip(self, number: int, offset: int) -> None:
        """Change a bit of a segment behind everybody's back."""
        with self.segment(number).open("r+b") as file:
            (byte,) = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([byte ^ 16]), offset)

    def close(self) -> None:
        assert_clean(self.region)
        self.region.close()


@contextmanager
def pooled_files() -> Iterator[PooledFiles]:
    """In a directory on tmpfs, which is removed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkernfs-pool.") as name:
        Path(name).chmod(0o711)
        made = PooledFiles(Path(name))
        yield made
        made.close()


def make_guest(fs: FileSystem, name: str, size: int, data: dict[int, bytes] | None = None) -> Ino:
    """A file with a segment; ``data`` by offset, None: all of it is random."""
    ino = fs.create(ROOT_INO, name.encode(), stat.S_IFREG | 0o600, 0, 0).ino
    fs.run(lambda: fs.setattr(ino, size=size))
    assert fs.segments.find(ino) is not None
    for offset, piece in (
        {0: random.Random(size).randbytes(size)} if data is None else data
    ).items():
        fs.run(lambda offset=offset, piece=piece: fs.write(ino, offset, piece))  # type: ignore[misc]
    return ino
