"""Leases, and what stands for them where the kernel has none."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkernfs.errors import BusyError
from pkernfs.host.holders import Look, Target
from pkernfs.host.left_mappings import LeftMapping
from pkernfs.layout import PAGE
from pkernfs.pool import lease
from pkernfs.pool.lease import holders_of, nobody_else
from pkernfs.quantities import Ino

_HOLD = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
if sys.argv[2] == "map":
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="pkernfs-segment.") as file:
        os.ftruncate(file.fileno(), PAGE)
        name = file.name
        file.close()
        Path(name).write_bytes(bytes(PAGE))
        try:
            yield name
        finally:
            Path(name).unlink()


@pytest.fixture
def fd(path: str) -> Iterator[int]:
    number = os.open(path, os.O_RDWR)
    yield number
    os.close(number)


@pytest.fixture
def no_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """As hugetlbfs since Linux 7.0."""
    call = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


@contextmanager
def holder(path: str, how: str) -> Iterator[int]:
    """Another process that maps a file, or has it open."""
    arguments = [sys.executable, "-c", _HOLD, path, how]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.communicate()


def busy(fd: int) -> str:
    with pytest.raises(BusyError) as caught, nobody_else(fd, "segment-3"):
        pass
    return str(caught.value)


def test_a_file_of_ones_own(path: str, fd: int) -> None:
    """Others wait for the end, or are refused; and no signal ends this process."""
    with nobody_else(fd, "segment-3"):
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.close(os.open(path, os.O_PATH))
    os.close(os.open(path, os.O_RDONLY))
    assert holders_of(fd, "segment-3") == []
    with nobody_else(fd, "segment-3"):
        pass


@pytest.mark.parametrize(("how", "says"), [("map", "maps"), ("open", "has opened")])
def test_another_process_is_named(path: str, fd: int, how: str, says: str) -> None:
    with holder(path, how) as pid:
        assert busy(fd).startswith(f"segment-3: busy: process {pid} (python")
        assert busy(fd).endswith(f") {says} it")
        [found] = holders_of(fd, "segment-3")
        assert (found.pid, found.how) == (pid, says)
    with nobody_else(fd, "segment-3"):
        pass


@pytest.mark.usefixtures("no_leases")
@pytest.mark.parametrize("how", ["map", "open"])
def test_without_leases_processes_are_found_too(path: str, fd: int, how: str) -> None:
    with holder(path, how) as pid:
        assert f"busy: process {pid} (python" in busy(fd)


def test_several_holders_are_counted(path: str, fd: int) -> None:
    with holder(path, "map"), holder(path, "open"):
        assert busy(fd).endswith(" it, and 1 more")


def test_this_process_counts_as_well(path: str, fd: int) -> None:
    other = os.open(path, os.O_RDONLY)
    with mmap.mmap(other, PAGE, prot=mmap.PROT_READ):
        os.close(other)
        assert f"busy: process {os.getpid()} (" in busy(fd)
        assert holders_of(fd, "segment-3") == [], "it is asked for others"


@pytest.mark.usefixtures("no_leases")
def test_this_process_counts_without_leases(
    path: str, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "look", lambda targets: Look([], 0))
    with mmap.mmap(fd, PAGE):
        assert f"busy: process {os.getpid()} (" in busy(fd)
    with nobody_else(fd, "segment-3"):
        pass


def test_a_descriptor_on_its_way(path: str, fd: int) -> None:
    """Nobody has it, and the kernel counts it."""
    left, right = socket.socketpair()
    other = os.open(path, os.O_RDONLY)
    with left, right:
        socket.send_fds(left, [b"x"], [other])
        os.close(other)
        assert busy(fd) == "segment-3: busy: somebody whom /proc does not show has opened it"
        assert [h.pid for h in holders_of(fd, "segment-3")] == [0]


@pytest.mark.usefixtures("no_leases")
def test_what_cannot_be_seen_is_a_doubt(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "look", lambda targets: Look([], 2))
    says = "one of the processes that let nobody look (2) may have it"
    assert busy(fd) == f"segment-3: busy: {says}"
    assert [str(h) for h in holders_of(fd, "segment-3")] == [says]
    monkeypatch.setattr(lease, "look", lambda targets: Look([], 0))
    assert holders_of(fd, "segment-3") == []
    with nobody_else(fd, "segment-3"):
        pass


def test_a_look_without_opening(path: str) -> None:
    fd = os.open(path, os.O_PATH)
    with holder(path, "map") as pid:
        assert [h.pid for h in holders_of(fd, "segment-3")] == [pid]
    os.close(fd)


@pytest.mark.parametrize("is_open", [True, False])
def test_who_maps_it_through_a_mount_that_is_gone(
    path: str, fd: int, monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    """Also while the next mount has it open, for which the kernel gives no lease either."""
    passed = Target(os.makedev(0, 99), 7) if is_open else None
    left = [LeftMapping(Ino(7), 12, "qemu")]
    monkeypatch.setattr(lease, "left_mappings", lambda inos: left if inos == [7] else [])
    other = os.open(path, os.O_RDONLY)
    monkeypatch.setattr(lease, "look", lambda targets: Look([], 0))
    with pytest.raises(BusyError) as caught, nobody_else(fd, "segment-3", passed, Ino(7)):
        pass
    said = "process 12 (qemu) by a mount that is gone maps it"
    assert str(caught.value) == f"segment-3: busy: {said}"
    assert [h.pid for h in holders_of(fd, "segment-3", passed, Ino(7))] == [12]
    left.clear()
    assert len(holders_of(fd, "segment-3", passed, Ino(7))) == (0 if is_open else 1)
    os.close(other)


def test_who_maps_another_memory_of_that_number_is_not_meant(
    path: str, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [LeftMapping(Ino(7), 12, "qemu")]
    monkeypatch.setattr(lease, "left_mappings", lambda inos: left)
    monkeypatch.setattr(lease, "may_map", lambda pid, areas, of: (pid, of) != (12, fd))
    monkeypatch.setattr(lease, "look", lambda targets: Look([], 0))
    other = os.open(path, os.O_RDONLY)
    passed = Target(os.makedev(0, 99), 7)
    assert holders_of(fd, "segment-3", passed, Ino(7)) == []
    os.close(other)


def test_a_child_that_has_not_yet_closed_its_copies(
    path: str, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has them between fork() and exec(); the search takes longer than that."""
    other = os.open(path, os.O_RDONLY)

    def search(targets: object) -> Look:
        os.close(other)
        return Look([], 0)

    monkeypatch.setattr(lease, "look", search)
    with nobody_else(fd, "segment-3"):
        pass
