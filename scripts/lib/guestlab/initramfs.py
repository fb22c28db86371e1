"""An initramfs: members packed into a cpio archive, and the one of a guest whose init is init.c."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import programs
from guestlab import GuestLabError

_INIT_SOURCE = Path(__file__).with_name("init.c")
FILE, EXECUTABLE, DIRECTORY = 0o100644, 0o100755, 0o040755


class Member(NamedTuple):
    """A file or directory of an archive, with its mode as stat(2) gives it."""

    name: str
    mode: int
    content: bytes


def build(scratch: Path) -> Path:
    """Compile init and pack it; return the archive, made in the directory ``scratch``.

    :raises GuestLabError: there is no C compiler, or it failed.
    """
    init = scratch / "init"
    command = ["cc", "-static", "-O2", "-Wall", "-o", str(init), str(_INIT_SOURCE)]
    advice = "the guest's init needs a C compiler"
    programs.output(*command, error=GuestLabError, advice=advice)
    archive = scratch / "initramfs.cpio"
    archive.write_bytes(pack([Member("init", EXECUTABLE, init.read_bytes())]))
    return archive


def pack(members: Iterable[Member]) -> bytes:
    """A cpio archive of ``members``; a directory comes before what is in it."""
    return b"".join(_cpio_member(*member) for member in (*members, Member("TRAILER!!!", 0, b"")))


def _cpio_member(name: str, mode: int, content: bytes) -> bytes:
    """One member in cpio's "newc" format: 13 hexadecimal fields, name, content, in 4-byte units."""
    encoded = name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, file size, 4 device numbers, name size, check (unused)
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return _padded(header) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
