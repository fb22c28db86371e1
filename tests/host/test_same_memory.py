"""Whose memory a process maps, for real: this kernel's pages of files on tmpfs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkernfs.host.same_memory import Area, may_map
from support.huge_pages import huge_pages
from support.mounting import MIB, Mapper

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root sees physical pages")


@contextmanager
def memory() -> Iterator[tuple[Path, int]]:
    """A file of 2 MiB, and a descriptor of it."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="pkernfs-memory.") as file:
        os.ftruncate(file.fileno(), 2 * MIB)
        yield Path(file.name), file.fileno()


def areas(pid: int, path: Path) -> list[Area]:
    """What a process maps of a file."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split()
        if fields[-1] == str(path):
            start, end = (int(word, 16) for word in fields[0].split("-"))
            found.append(Area(start, end, int(fields[2], 16)))
    return found


def test_another_file_is_told_apart() -> None:
    """Also if it has data at the same place, or a hole there."""
    with memory() as (one, fd), memory() as (_, other), Mapper(one, 2 * MIB) as client:
        client.store(MIB, b"stored")
        mapped = areas(client.pid, one)
        assert may_map(client.pid, mapped, fd)
        assert not may_map(client.pid, mapped, other)
        os.pwrite(other, b"stored", MIB)
        assert not may_map(client.pid, mapped, other)


def test_huge_pages_are_told_apart_and_let_go() -> None:
    """A mapping that stays would make this process a holder of the file for ever."""
    with huge_pages(4 * 2 * MIB) as directory:
        paths = [directory / "one", directory / "other"]
        fds = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
        try:
            for fd in fds:
                os.ftruncate(fd, 4 * MIB)
            with Mapper(paths[0], 4 * MIB) as client:
                client.store(3 * MIB, b"stored")
                mapped = areas(client.pid, paths[0])
                shifted = [Area(a.start + 5 * 4096, a.end, a.offset + 5 * 4096) for a in mapped]
                for looked_at in (mapped, shifted):
                    assert may_map(client.pid, looked_at, fds[0])
                    assert not may_map(client.pid, looked_at, fds[1])
            assert [areas(os.getpid(), path) for path in paths] == [[], []]
        finally:
            for fd in fds:
                os.close(fd)


def test_what_cannot_be_told_may_be() -> None:
    with memory() as (one, fd), Mapper(one, 2 * MIB) as client:
        mapped = areas(client.pid, one)
        assert may_map(client.pid, mapped, fd), "no page is there yet"
        assert may_map(client.pid, [], fd)
        client.store(0, b"x")
        looked_at = os.open(one, os.O_PATH)
        assert may_map(client.pid, mapped, looked_at)
        os.close(looked_at)
        client.end()
        assert may_map(client.pid, mapped, fd), "it has ended"
