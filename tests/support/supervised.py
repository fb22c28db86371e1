"""Programs below a real supervisor that believes in segments of ordinary files.

A file ``D/plain/NAME`` has a segment where there is a ``D/native/NAME``, in any directory D.
Run as a program, it is ``pkernfs exec`` with that belief: ``supervised.py D COMMAND ...``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pkernfs.plain.launch import run_command, supervise

PLAIN, NATIVE = b"what the mount has\n", b"what the segment has\n"


class Files(NamedTuple):
    """The two files behind one name, and what a program is started with to see them."""

    directory: Path
    plain: Path
    native: Path

    def command(self, *words: object) -> list[str]:
        """The command line that runs another one below a supervisor."""
        return [sys.executable, __file__, str(self.directory), *map(str, words)]

    def run(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command below a supervisor, to its end."""
        return subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=30, **options
        )


def make_files(directory: Path, name: str = "ram", pages: int = 16) -> Files:
    """Make a file with a segment; the two differ in what they hold."""
    for part, text in (("plain", PLAIN), ("native", NATIVE)):
        (directory / part).mkdir(exist_ok=True)
        file = directory / part / name
        file.write_bytes(text)
        os.truncate(file, pages * 4096)
    return Files(directory, directory / "plain" / name, directory / "native" / name)


class StubMounts:
    """The file system of a directory as a pkernfs mount of root's."""

    def __init__(self, directory: str) -> None:
        self._device = os.stat(directory).st_dev

    def are_there(self) -> bool:
        """As Mounts."""
        return True

    def has(self, device: int) -> bool:
        """As Mounts."""
        return device == self._device

    def is_trusted(self, device: int, uid: int) -> bool:
        """As Mounts."""
        return self.has(device)


def stub_segment_of(fd: int) -> str | None:
    """Return the native file beside a plain one."""
    there = Path(os.readlink(f"/proc/self/fd/{fd}"))
    native = there.parent.parent / "native" / there.name
    return str(native) if there.parent.name == "plain" and native.exists() else None


def main(directory: str, *words: str) -> None:
    """Be ``pkernfs exec``."""
    supervise(stub_segment_of, lambda: StubMounts(directory))
    run_command(list(words))


if __name__ == "__main__":
    main(*sys.argv[1:])
