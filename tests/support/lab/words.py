"""Words of files, as the tests of devices compare them with what a transfer has done."""

import os
from pathlib import Path


def read_word(path: Path, offset: int) -> int:
    """A word of a file, through the mount. It is opened for that: see docs/coherence.md."""
    with path.open("rb", buffering=0) as file:
        return int.from_bytes(os.pread(file.fileno(), 8, offset), "little")


def write_word(path: Path, offset: int, word: int) -> None:
    """Write a word to a file through the mount, for all to see."""
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), word.to_bytes(8, "little"), offset)
        os.fsync(file.fileno())
