"""Memory that a test maps: a dax device, a native file, or a range of /dev/mem."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Self


class Mapped:
    """A shared mapping of ``length`` bytes at ``offset`` of a file, as a context manager."""

    def __init__(self, path: Path, length: int, offset: int = 0) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(fd, length, offset=offset)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._memory.close()

    def read(self, at: int, length: int) -> bytes:
        """So many bytes."""
        return self._memory[at : at + length]

    def write(self, at: int, content: bytes) -> None:
        """Store bytes."""
        self._memory[at : at + len(content)] = content

    def word(self, at: int) -> int:
        """Four bytes as a number, as a guest has them."""
        return int.from_bytes(self.read(at, 4), "little")
