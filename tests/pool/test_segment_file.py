"""The file of a segment, on tmpfs and on hugetlbfs."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.errors import BusyError, NoSpaceError, RegionError
from pkernfs.layout import PAGE
from pkernfs.pool.segment_file import SegmentFile, find
from pkernfs.region import files
from support.huge_pages import free_pages, reserved_pages

MIB = 1 << 20
HUGE = 2 * MIB
NAME = "segment-3"


@pytest.fixture
def place(directory: Path) -> Iterator[int]:
    """A directory of each kind, as a descriptor."""
    fd = os.open(directory, os.O_PATH)
    yield fd
    os.close(fd)


@pytest.fixture
def huge(on_hugetlbfs: Path) -> Iterator[int]:
    fd = os.open(on_hugetlbfs, os.O_PATH)
    yield fd
    os.close(fd)


def fill(file: SegmentFile, text: bytes = b"x") -> None:
    with mmap.mmap(file.fd, file.size) as mapped:
        mapped[:] = text * file.size


def content(file: SegmentFile) -> bytes:
    return os.pread(file.fd, file.size, 0)


def test_a_file_is_made_for_its_maker_only(place: int) -> None:
    before = os.umask(0o777)
    try:
        with SegmentFile.create(place, NAME) as file:
            info = os.fstat(file.fd)
            assert (info.st_mode & 0o7777, info.st_uid, file.size) == (0o600, os.geteuid(), 0)
            assert info.st_gid == os.getegid()
            handle = file.handle
    finally:
        os.umask(before)
    with pytest.raises(RegionError, match="segment-3: cannot be made: File exists"):
        SegmentFile.create(place, NAME)
    with SegmentFile.open(place, NAME) as file:
        assert (file.handle, file.name) == (handle, NAME)


def test_what_has_the_name_but_is_no_file(on_tmpfs: Path) -> None:
    place = os.open(on_tmpfs, os.O_PATH)
    with pytest.raises(RegionError, match="lost: there is no file of that name") as caught:
        SegmentFile.open(place, NAME)
    assert caught.value.errno == errno.ENOENT
    assert find(place, NAME) is None
    for make in (os.mkdir, os.mkfifo, lambda name: os.symlink("/etc/passwd", name)):
        make(on_tmpfs / "thing")
        with pytest.raises(RegionError, match="thing: lost: what has that name is no regular file"):
            SegmentFile.open(place, "thing")
        (on_tmpfs / "thing").rename(on_tmpfs / f"old-{len(os.listdir(on_tmpfs))}")
    os.close(place)


def test_longer_and_shorter(place: int) -> None:
    with SegmentFile.create(place, NAME) as file:
        file.resize(2 * HUGE)
        fill(file)
        file.resize(HUGE)
        file.resize(2 * HUGE)
        assert os.fstat(file.fd).st_size == file.size == 2 * HUGE
        assert content(file) == b"x" * HUGE + bytes(HUGE)


def test_ranges_are_zeroed(place: int) -> None:
    """Whole pages, parts of pages, and no others."""
    with SegmentFile.create(place, NAME) as file:
        file.resize(3 * HUGE)
        for start, end in ((0, 3 * HUGE), (5, 9), (HUGE - 1, HUGE + 1), (100, 2 * HUGE + 100)):
            fill(file)
            file.zero(start, end)
            expected = b"x" * start + bytes(end - start) + b"x" * (3 * HUGE - end)
            assert content(file) == expected, (start, end)
        file.zero(7, 7)


def test_zeroed_pages_of_tmpfs_go_back(on_tmpfs: Path) -> None:
    fd = os.open(on_tmpfs, os.O_PATH)
    with SegmentFile.create(fd, NAME) as file:
        file.resize(HUGE)
        fill(file)
        file.zero(10, HUGE - 10)
        assert os.fstat(file.fd).st_blocks * 512 == 2 * PAGE
    os.close(fd)


def test_huge_pages_are_reserved_until_the_file_is_gone(huge: int) -> None:
    """Untouched, touched, zeroed: nobody else gets them."""
    free, reserved = free_pages(), reserved_pages()
    with SegmentFile.create(huge, NAME) as file:
        file.resize(4 * HUGE)
        assert (free_pages(), reserved_pages()) == (free, reserved + 4), "none is touched"
        file.resize(4 * HUGE)
        assert reserved_pages() == reserved + 4, "once"
        with mmap.mmap(file.fd, HUGE) as mapped:
            mapped[0] = 1
        assert (free_pages(), reserved_pages()) == (free - 1, reserved + 3)
        file.zero(0, 2 * HUGE)
        assert (free_pages(), reserved_pages()) == (free - 1, reserved + 3)
        file.resize(2 * HUGE)
        assert (free_pages(), reserved_pages()) == (free - 1, reserved + 1)
    os.unlink(NAME, dir_fd=huge)
    assert (free_pages(), reserved_pages()) == (free, reserved)


def test_too_few_huge_pages(huge: int) -> None:
    reserved = reserved_pages()
    with SegmentFile.create(huge, NAME) as file:
        file.resize(HUGE)
        fill(file)
        with pytest.raises(NoSpaceError, match="no huge pages for 1 TiB: Cannot allocate memory"):
            file.resize(1 << 40)
        assert os.fstat(file.fd).st_size == file.size == HUGE
        assert content(file) == b"x" * HUGE
        assert reserved_pages() == reserved


def test_a_file_that_is_cut_before_its_pages_are_reserved(huge: int) -> None:
    file = SegmentFile.create(huge, NAME)
    with file, pytest.raises(RegionError, match="segment-3: cut meanwhile"):
        file.reserve(HUGE)


def test_a_length_that_no_file_has(place: int) -> None:
    with SegmentFile.create(place, NAME) as file, pytest.raises(RegionError, match="cannot be"):
        file.resize(-1)


def test_a_lease_of_its_owner_does_not_hold_anybody_up(on_tmpfs: Path) -> None:
    place = os.open(on_tmpfs, os.O_PATH)
    SegmentFile.create(place, NAME).__exit__(None, None, None)
    owner = os.open(on_tmpfs / NAME, os.O_RDWR)
    fcntl.fcntl(owner, fcntl.F_SETSIG, 23)
    fcntl.fcntl(owner, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    with pytest.raises(BusyError, match="somebody has a lease on it, or executes it"):
        SegmentFile.open(place, NAME)
    os.close(owner)
    SegmentFile.open(place, NAME).__exit__(None, None, None)
    os.close(place)


def test_the_kernel_refuses(on_tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = os.open(on_tmpfs, os.O_PATH)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    with SegmentFile.create(place, NAME) as file:
        monkeypatch.setattr(files, "punch", refuse)
        with pytest.raises(RegionError, match="segment-3: cannot be zeroed: Operation not perm"):
            file.zero(0, PAGE)
    os.close(place)
