"""A daemon in which some files have memory of their own, before anything makes such files.

Inode N has it while there is a file of the name N in a directory; with a file ``born`` in it, every
inode gets one of :data:`BORN_BYTES` when it is first opened. Reads and writes of the daemon go
there, too, so that there is one memory. Run it as a program with that directory and the words for
pkernfs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pkernfs.cli import main
from pkernfs.fs.file import Files
from pkernfs.fuse import operations
from pkernfs.quantities import Ino

BORN_BYTES = 4 << 20


class NativeFiles:
    """The files of a directory, by inode number."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[Ino, int] = {}

    def __call__(self, ino: Ino) -> int | None:
        """The descriptor of an inode's own memory; None: it has none."""
        path = self._directory / str(ino)
        if not path.exists():
            if not (self._directory / "born").exists():
                return None
            path.touch()
            os.truncate(path, BORN_BYTES)
        if ino not in self._descriptors:
            self._descriptors[ino] = os.open(path, os.O_RDWR)
        return self._descriptors[ino]


def serve_data_from(native: NativeFiles) -> None:
    """Have the core read and write such files where they are; it goes on to know their sizes."""
    read, write = Files.read, Files.write

    def read_there(self: Files, ino: Ino, offset: int, length: int) -> bytes | memoryview:
        fd = native(ino)
        if fd is None:
            return read(self, ino, offset, length)
        left = max(0, self._inodes.get(ino).size - offset)
        return os.pread(fd, min(length, left), offset)

    def write_there(self: Files, ino: Ino, offset: int, data: Any, privileged: bool = True) -> int:
        fd = native(ino)
        if fd is None:
            return write(self, ino, offset, data, privileged)
        return os.pwrite(fd, data, offset)

    Files.read, Files.write = read_there, write_there  # type: ignore[method-assign]


if __name__ == "__main__":
    files = NativeFiles(Path(sys.argv.pop(1)))
    serve_data_from(files)
    operations.Operations.native = staticmethod(files)
    sys.exit(main())
