"""A tree of a thousand files of all kinds and sizes, and everything there is to say about it.

Runs inside the machine. Contents and attributes follow from a seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 1 << 20
FILES = 1000
_SIZES = [0, 1, 60, 100, 511, 4095, 4096, 4097, 9000, 65536, 65537, 200_000, MIB - 1]
_LARGE = [MIB, MIB + 1, 2 * MIB, 3 * MIB + 5, 4 * MIB]
_XATTRS = [("user.one", b"1"), ("user.empty", b""), ("trusted.long", b"v" * 300)]
_PATTERN_BYTES = 64 << 10


def make(root: Path, seed: int, files: int = FILES) -> None:
    """Make ``root`` a directory and fill it with ``files`` files, directories among them."""
    root.mkdir()
    rng = random.Random(seed)
    directories = [root]
    plain: list[Path] = []
    pattern = rng.randbytes(_PATTERN_BYTES)
    for number in range(files - len(_LARGE)):
        path = rng.choice(directories) / _name(rng, number)
        maker = rng.choices(
            [_regular, _directory, _symlink, _fifo, _socket, _device, _hard_link, _sparse],
            weights=[60, 12, 8, 3, 3, 4, 6, 4],
        )[0]
        maker(path, rng, plain, pattern)
        if maker is _directory:
            directories.append(path)
        elif maker is _regular:
            plain.append(path)
        if maker is not _hard_link:
            _attributes(path, rng)
    for number, size in enumerate(_LARGE):
        (root / f"large-{number}").write_bytes(_content(size, rng, pattern))
    for path in reversed(directories[1:]):
        _times(path, rng)  # after the last name was made in it


def _name(rng: random.Random, number: int) -> str:
    kind = rng.randrange(20)
    if kind == 0:
        return f"{number}-".ljust(255, "x")
    if kind == 1:
        return os.fsdecode(f"{number}-".encode() + bytes([0xFF, 0x80, 0x0A, 0x20]))
    return f"{number}-{rng.randrange(1 << 16):x}"


def _content(size: int, rng: random.Random, pattern: bytes) -> bytes:
    """``size`` bytes that are unlike any other file's, each page with its number."""
    start = rng.randrange(_PATTERN_BYTES)
    data = bytearray((pattern[start:] + pattern * (size // _PATTERN_BYTES + 1))[:size])
    stamp = rng.randbytes(8)
    for offset in range(0, size - 16, 4096):
        data[offset : offset + 16] = stamp + offset.to_bytes(8, "little")
    return bytes(data)


def _regular(path: Path, rng: random.Random, _plain: list[Path], pattern: bytes) -> None:
    path.write_bytes(_content(rng.choice(_SIZES), rng, pattern))


def _sparse(path: Path, rng: random.Random, _plain: list[Path], pattern: bytes) -> None:
    with path.open("wb") as file:
        for _ in range(rng.randrange(1, 4)):
            file.seek(rng.randrange(2 * MIB))
            file.write(_content(rng.randrange(1, 20_000), rng, pattern))


def _directory(path: Path, _rng: random.Random, _plain: list[Path], _pattern: bytes) -> None:
    path.mkdir()


def _symlink(path: Path, rng: random.Random, _plain: list[Path], _pattern: bytes) -> None:
    path.symlink_to("target/" * rng.choice([1, 5, 9, 500]))


def _fifo(path: Path, _rng: random.Random, _plain: list[Path], _pattern: bytes) -> None:
    os.mkfifo(path)


def _socket(path: Path, _rng: random.Random, _plain: list[Path], _pattern: bytes) -> None:
    directory = os.open(path.parent, os.O_PATH)
    try:  # its whole path may be longer than an address
        os.mknod(path, stat.S_IFSOCK | 0o600) if len(path.name) > 60 else _bind(directory, path)
    finally:
        os.close(directory)


def _bind(directory: int, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{directory}/{path.name}")


def _device(path: Path, rng: random.Random, _plain: list[Path], _pattern: bytes) -> None:
    kind = rng.choice([stat.S_IFCHR, stat.S_IFBLK])
    os.mknod(path, kind | 0o600, os.makedev(rng.randrange(4096), rng.randrange(1 << 20)))


def _hard_link(path: Path, rng: random.Random, plain: list[Path], pattern: bytes) -> None:
    if plain:
        path.hardlink_to(rng.choice(plain))
    else:
        _regular(path, rng, plain, pattern)


def _attributes(path: Path, rng: random.Random) -> None:
    os.chown(
        path, rng.choice([0, 1, 1000, 1 << 31]), rng.choice([0, 5, 65534]), follow_symlinks=False
    )
    if not path.is_symlink():
        path.chmod(rng.choice([0o644, 0o600, 0o755, 0o4755, 0o2711, 0o1777, 0]))
        if rng.randrange(5) == 0 and (path.is_file() or path.is_dir()):
            for name, value in rng.sample(_XATTRS, rng.randrange(1, 4)):
                os.setxattr(path, name, value)
    _times(path, rng)


def _times(path: Path, rng: random.Random) -> None:
    times = (rng.randrange(1 << 62), rng.randrange(1 << 62))
    os.utime(path, ns=times, follow_symlinks=False)


# ---------------------------------------------------------------------------- what there is


def describe(root: Path) -> dict[str, list[Any]]:
    """All that there is to know of each file below ``root``: its attributes, and its content.

    What JSON can hold. Reading a file or a listing may set its access time: attributes come last.
    """
    paths = sorted(_walk(root))
    contents = [_content_of(path) for path in paths]
    return {
        str(path.relative_to(root)): [*_attributes_of(path), content]
        for path, content in zip(paths, contents, strict=True)
    }


def difference(root: Path, before: dict[str, list[Any]]) -> str:
    """Tell how ``root`` differs from an earlier description; empty if it does not."""
    after = {}
    lines = []
    for name in before:  # attributes first: see describe()
        path = root / name
        after[name] = _attributes_of(path) if os.path.lexists(path) else ["missing"]
    for path in sorted(_walk(root)):
        name = str(path.relative_to(root))
        after.setdefault(name, ["is new"]).append(_content_of(path))
    for name in sorted(after):
        old, new = before.get(name), json.loads(json.dumps(after[name]))
        if old != new:
            lines.append(f"{name[:60]!r}: was {old}, is {new}")
    return "\n".join([*lines[:20], *([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])])


def _walk(directory: Path) -> Iterator[Path]:
    with os.scandir(directory) as entries:
        for entry in entries:
            yield Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))


def _attributes_of(path: Path) -> list[Any]:
    found = path.lstat()
    names = os.listxattr(path, follow_symlinks=False)
    xattrs = {n: os.getxattr(path, n, follow_symlinks=False).hex() for n in sorted(names)}
    return [
        found.st_ino, found.st_mode, found.st_uid, found.st_gid, found.st_nlink, found.st_size,
        found.st_blocks, found.st_rdev, found.st_mtime_ns, found.st_ctime_ns, found.st_atime_ns,
        xattrs,
    ]  # fmt: skip


def _content_of(path: Path) -> str | None:
    if path.is_symlink():
        return str(path.readlink())
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


# ---------------------------------------------------------------------------- guest memory


def fill_ram(path: Path, size: int, seed: int) -> str:
    """Make ``path`` a file of guest memory of ``size`` bytes, all of it written; its digest."""
    path.touch()
    os.truncate(path, size)
    rng = random.Random(seed)
    pattern = rng.randbytes(_PATTERN_BYTES)
    digest = hashlib.md5()
    with path.open("r+b", buffering=0) as file:
        for _ in range(size // MIB):
            data = _content(MIB, rng, pattern)
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def ram_digest(path: Path) -> str:
    """The digest of such a file as it is now."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "md5").hexdigest()
