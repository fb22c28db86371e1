"""Command lines that run in this process: what they print, their exit status, what they change."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from pkernfs import cli, layout
from support.superblocks import damage

MIB = 1 << 20
SIZE = 16 * MIB
NOBODY = 65534
PROGRAMS = {"pkernfs": cli.main, "mkfs.pkernfs": cli.mkfs_main, "fsck.pkernfs": cli.fsck_main}


class Outcome(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


#: Runs a program with its arguments.
Command = Callable[..., Outcome]


def runner(capsys: pytest.CaptureFixture[str]) -> Command:
    """What runs command lines in this process."""

    def run(program: str, *args: object) -> Outcome:
        try:
            status = PROGRAMS[program]([str(arg) for arg in args])
        except SystemExit as end:  # --help and --version, by argparse
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def formatted(directory: Path, command: Command) -> Path:
    """A region of 16 MiB with an empty pkernfs."""
    path = directory / "region"
    assert command("mkfs.pkernfs", "-L", "here", "-s", SIZE, path).status == 0
    return path


def digest(path: Path) -> str:
    """What the bytes of a file are, and how many."""
    return f"{path.stat().st_size} {hashlib.sha256(path.read_bytes()).hexdigest()}"


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """The file has the same bytes at the end, or is as missing as before."""
    before = digest(path) if path.is_file() else path.exists()
    yield
    assert (digest(path) if path.is_file() else path.exists()) == before


def refused(outcome: Outcome, status: int, who: str, *words: str) -> None:
    """One line ``who: ...`` on stderr that has the words, nothing on stdout, and the status."""
    assert outcome.status == status, outcome
    assert outcome.out == ""
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"{who}: ")
    for word in words:
        assert word in outcome.err


def mounting(command: Command, region: object, mount_point: object, options: str = "rw") -> Outcome:
    """A mount that is expected to fail before FUSE comes in, in the foreground."""
    return command("pkernfs", "mount", "-f", "-o", options, region, mount_point)


# ------------------------------------------------------------------------------- what regions hold


def ext4(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1024 + 56)
        file.write(b"\x53\xef")


def xfs(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"XFSB")


def random_bytes(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(random.Random(1).randbytes(64 << 10))


def one_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"x")


def no_superblock(path: Path) -> None:
    damage(path, layout.SUPERBLOCK_PAGE * layout.PAGE)


def no_superblocks(path: Path) -> None:
    damage(path, layout.SUPERBLOCK_PAGE * layout.PAGE)
    damage(path, layout.BACKUP_PAGE * layout.PAGE)


#: Regions of somebody else.
FOREIGN = [ext4, xfs, random_bytes, one_byte]


@contextmanager
def as_nobody() -> Iterator[None]:
    """For root: without its privilege to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        importlib.invalidate_caches()  # directories that NOBODY may not search are there
