"""Pools in directories on tmpfs and hugetlbfs."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkernfs.errors import BusyError, NoSpaceError, NotSupportedError, RegionError
from pkernfs.layout import BLOCK, PAGE, POOL_DIRECTORY, SEGMENT_DEAD
from pkernfs.pool import directory as module
from pkernfs.pool.directory import DirectoryPool
from pkernfs.pool.pool import Owner, Pool, Segment
from pkernfs.quantities import Ino, RegionOff, SegmentNo
from pkernfs.region.files import MemoryFile, OpenFileBacking
from support.huge_pages import free_pages, huge_pages, reserved_pages

G = 1 << 30
ROW = Segment(SegmentNo(3), Ino(17), POOL_DIRECTORY, 2 * BLOCK)
NAME = "segment-3"


@pytest.fixture
def pool(directory: Path) -> Iterator[DirectoryPool]:
    made = DirectoryPool.at(str(directory))
    yield made
    made.close()


@pytest.fixture
def tmpfs(on_tmpfs: Path) -> Iterator[DirectoryPool]:
    """A pool for what is the same on hugetlbfs, or not on it at all."""
    made = DirectoryPool.at(str(on_tmpfs))
    yield made
    made.close()


@pytest.fixture
def small() -> Iterator[DirectoryPool]:
    """A pool on a tmpfs of its own, of 16 MiB."""
    with tempfile.TemporaryDirectory() as where:
        options = ["mount", "-t", "tmpfs", "-o", "size=16M,mode=0711", "none", where]
        subprocess.run(options, check=True)
        pool = DirectoryPool.at(where)
        try:
            yield pool
        finally:
            pool.close()
            subprocess.run(["umount", where], check=True)


@pytest.fixture
def hugetlbfs(on_hugetlbfs: Path) -> Iterator[DirectoryPool]:
    made = DirectoryPool.at(str(on_hugetlbfs))
    yield made
    made.close()


def path_of(pool: DirectoryPool, row: Segment = ROW) -> Path:
    return Path(pool.native_path(row))


def put(pool: DirectoryPool, row: Segment, text: bytes = b"x") -> None:
    """Fill a segment with ``text``, as the file system does."""
    with pool.open(row, write=True) as region:
        region.copy_in(RegionOff(0), text * (row.length // len(text)))


def get(pool: DirectoryPool, row: Segment) -> bytes:
    with pool.open(row, write=False) as region:
        return region.read(RegionOff(0), region.size)


# ------------------------------------------------------------------------------ the directory


def test_a_directory_is_a_pool(directory: Path) -> None:
    pool: Pool = DirectoryPool.at(str(directory))
    assert (pool.kind, pool.granule, pool.name) == (POOL_DIRECTORY, BLOCK, str(directory))
    pool.close()
    assert DirectoryPool.at(str(directory), 4 * BLOCK).granule == 4 * BLOCK


def test_pages_larger_than_the_granule(on_tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on hugetlbfs with pages of 1 GiB."""
    monkeypatch.setattr(module, "memory_file", lambda fd: MemoryFile(True, G))
    assert DirectoryPool.at(str(on_tmpfs)).granule == G
    with pytest.raises(RegionError, match="too large: got 1 GiB, expected at most 2 MiB"):
        DirectoryPool.at(str(on_tmpfs), BLOCK)


def test_directories_that_are_no_pools(on_tmpfs: Path) -> None:
    with pytest.raises(RegionError, match="cannot open: No such file") as caught:
        DirectoryPool.at(f"{on_tmpfs}/none")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(RegionError, match="/proc/self: no pool of segments: it is on neither"):
        DirectoryPool.at("/proc/self")
    for mode in (0o777, 0o731):
        on_tmpfs.chmod(mode)
        with pytest.raises(RegionError, match=f"others can write to it: .* chmod 0711 {on_tmpfs}"):
            DirectoryPool.at(str(on_tmpfs))
    on_tmpfs.chmod(0o711)
    os.chown(on_tmpfs, 7, -1)
    with pytest.raises(RegionError, match="no pool of segments: it belongs to somebody else"):
        DirectoryPool.at(str(on_tmpfs))


def test_a_directory_may_be_renamed(tmpfs: DirectoryPool, on_tmpfs: Path) -> None:
    row = tmpfs.create(ROW)
    moved = on_tmpfs.rename(f"{on_tmpfs}.moved")
    assert tmpfs.native_path(row) == f"{moved}/segment-3"
    put(tmpfs, row)
    assert tmpfs.resize(row._replace(length=BLOCK)).length == BLOCK
    tmpfs.destroy(row)
    assert list(moved.iterdir()) == []
    moved.rename(on_tmpfs)


# ------------------------------------------------------------------------------ making


def test_a_segment_is_made(pool: DirectoryPool) -> None:
    """For root only, all zero, and known again by its inode."""
    made = pool.create(ROW)
    info = path_of(pool).stat()
    assert made == ROW._replace(valid=ROW.length, handle=info.st_ino)
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_size) == (0o600, 0, ROW.length)
    assert get(pool, made) == bytes(ROW.length)
    with pool.open(made, write=False) as region:
        is_huge = "huge" in pool.name
        assert region.real_addresses == is_huge
        assert (region.physical(RegionOff(BLOCK)) is not None) == is_huge
    put(pool, made)
    assert get(pool, made) == b"x" * ROW.length
    assert path_of(pool).read_bytes() == b"x" * ROW.length


def test_a_left_over_is_made_again(pool: DirectoryPool) -> None:
    put(pool, pool.create(ROW))
    made = pool.create(ROW)
    assert get(pool, made) == bytes(ROW.length)


def test_what_is_not_ours_stays(
    tmpfs: DirectoryPool, on_tmpfs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = on_tmpfs / NAME

    def put_directory() -> None:
        path.mkdir()

    def put_file_for_others() -> None:
        path.rmdir()
        path.touch(0o640)

    def give_it_away() -> None:
        path.chmod(0o600)
        os.chown(path, 7, 7)

    for change in (put_directory, put_file_for_others, give_it_away):
        change()
        with pytest.raises(
            RegionError, match="segment-3: something that is not ours has that name"
        ):
            tmpfs.create(ROW)
        tmpfs.destroy(ROW)
        assert path.exists()
        assert "not removed: another file has its name" in caplog.text
        caplog.clear()


def test_pages_are_reserved(hugetlbfs: DirectoryPool) -> None:
    """So nobody gets SIGBUS; and what is not to be had is said at once."""
    free, reserved = free_pages(), reserved_pages()
    row = hugetlbfs.create(ROW)
    assert (free_pages(), reserved_pages()) == (free, reserved + 2)
    with pytest.raises(NoSpaceError) as caught:
        hugetlbfs.create(Segment(SegmentNo(4), Ino(9), POOL_DIRECTORY, G * 1024))
    there = hugetlbfs.space().free // BLOCK * 2
    assert str(caught.value) == (
        "segment-4: no huge pages for 1 TiB: Cannot allocate memory: "
        f"{there} MiB are free in {hugetlbfs.name}"
    )
    assert not path_of(hugetlbfs, ROW._replace(number=SegmentNo(4))).exists()
    with pytest.raises(NoSpaceError, match="segment-3: no huge pages for 1 TiB"):
        hugetlbfs.resize(row._replace(length=G * 1024))
    assert path_of(hugetlbfs).stat().st_size == ROW.length
    hugetlbfs.destroy(row)
    assert (free_pages(), reserved_pages()) == (free, reserved)


def test_a_mount_with_too_small_a_size(on_hugetlbfs: Path) -> None:
    with tempfile.TemporaryDirectory() as where:
        options = ["mount", "-t", "hugetlbfs", "-o", "size=4M,mode=0711", "none", where]
        subprocess.run(options, check=True)
        pool = DirectoryPool.at(where)
        try:
            assert pool.space() == (2 * BLOCK, 2 * BLOCK, 2 * BLOCK)
            row = pool.create(ROW._replace(length=BLOCK))
            assert pool.space() == (2 * BLOCK, BLOCK, BLOCK)
            with pytest.raises(NoSpaceError, match=f"memory: 2 MiB are free in {where}"):
                pool.resize(row._replace(length=3 * BLOCK))
        finally:
            pool.close()
            subprocess.run(["umount", where], check=True)


# ------------------------------------------------------------------------------ longer, shorter


def test_a_segment_grows_while_it_is_mapped(pool: DirectoryPool) -> None:
    row = pool.create(ROW)
    put(pool, row)
    with pool.open(row, write=True) as held:
        grown = pool.resize(row._replace(length=3 * BLOCK))
        assert grown == row._replace(length=3 * BLOCK, valid=3 * BLOCK)
        assert held.is_zero(RegionOff(0), held.size) is False
    assert get(pool, grown) == b"x" * 2 * BLOCK + bytes(BLOCK)


def test_a_segment_is_cut_if_nobody_has_it(pool: DirectoryPool) -> None:
    row = pool.create(ROW)
    put(pool, row)
    shorter = row._replace(length=BLOCK, valid=BLOCK)
    with pool.open(row, write=False):
        for refused in (
            lambda: pool.resize(shorter),
            lambda: pool.punch(row, 0, PAGE),
            lambda: pool.check_unused(row),
        ):
            with pytest.raises(
                BusyError, match=rf"segment-3: busy: process {os.getpid()} \(.* maps it"
            ):
                refused()
        assert pool.holders(row) == []
    assert path_of(pool).stat().st_size == ROW.length
    pool.check_unused(row)
    assert pool.resize(shorter) == shorter
    grown = pool.resize(row._replace(valid=BLOCK))
    assert get(pool, grown) == b"x" * BLOCK + bytes(BLOCK)


def test_an_owner_lengthens_the_file(pool: DirectoryPool) -> None:
    """What the segment gains later is zero for all that."""
    row = pool.create(ROW)
    os.truncate(path_of(pool), 4 * BLOCK)
    with pool.open(row._replace(length=4 * BLOCK), write=True) as region:
        region.copy_in(RegionOff(0), b"y" * 4 * BLOCK)
    grown = pool.resize(row._replace(length=3 * BLOCK))
    assert get(pool, grown) == b"y" * 2 * BLOCK + bytes(BLOCK)
    assert path_of(pool).stat().st_size == 3 * BLOCK


def test_a_range_is_punched(pool: DirectoryPool) -> None:
    row = pool.create(ROW)
    put(pool, row)
    pool.punch(row, 5, BLOCK + 5)
    assert get(pool, row) == b"x" * 5 + bytes(BLOCK) + b"x" * (BLOCK - 5)


# ------------------------------------------------------------------------------ at a mount


def test_what_is_there_is_restored(pool: DirectoryPool) -> None:
    row = pool.create(ROW)
    put(pool, row)
    assert pool.restore(row) == row
    assert pool.restore(row._replace(handle=0)) == row
    assert get(pool, row) == b"x" * ROW.length


@pytest.mark.parametrize("there", [2, 3, 4])
def test_an_interrupted_growth_is_completed(pool: DirectoryPool, there: int) -> None:
    row = pool.create(ROW)
    put(pool, row)
    os.truncate(path_of(pool), there * BLOCK)
    grown = pool.restore(row._replace(length=3 * BLOCK))
    assert grown == row._replace(length=3 * BLOCK, valid=3 * BLOCK)
    assert path_of(pool).stat().st_size == 3 * BLOCK
    assert get(pool, grown) == b"x" * 2 * BLOCK + bytes(BLOCK)


def test_an_interrupted_cut_is_completed_once_nobody_has_it(
    pool: DirectoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    row = pool.create(ROW)
    shorter = row._replace(length=BLOCK, valid=BLOCK)
    with pool.open(row, write=False), caplog.at_level(logging.WARNING):
        assert pool.restore(shorter) == shorter
    assert "maps it: stays longer than it should be" in caplog.text
    assert path_of(pool).stat().st_size == ROW.length
    assert pool.restore(shorter) == shorter
    assert path_of(pool).stat().st_size == BLOCK


def test_a_growth_for_which_there_are_no_pages_left(hugetlbfs: DirectoryPool) -> None:
    row = hugetlbfs.create(ROW)
    with pytest.raises(RegionError, match="segment-3: no huge pages for 1 TiB") as caught:
        hugetlbfs.restore(row._replace(length=1024 * G))
    assert caught.value.errno == errno.ENOSPC
    assert hugetlbfs.restore(row) == row


def test_pages_that_an_owner_has_punched(
    hugetlbfs: DirectoryPool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are reserved again, if there are any."""
    reserved = reserved_pages()
    row = hugetlbfs.create(ROW)
    put(hugetlbfs, row)
    assert reserved_pages() == reserved
    with path_of(hugetlbfs).open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped.madvise(mmap.MADV_REMOVE, 0, BLOCK)
    assert hugetlbfs.restore(row) == row
    assert reserved_pages() == reserved + 1

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with caplog.at_level(logging.WARNING):
        assert hugetlbfs.restore(row) == row
    assert "Cannot allocate memory: it may lack memory when it is touched" in caplog.text


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, BLOCK)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.touch(0o600)
    os.truncate(other, ROW.length)
    other.rename(path)


def block(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lose, "segment-3: lost: there is no file of that name"),
        (cut, f"segment-3: lost: it was cut: got {BLOCK} bytes, expected {2 * BLOCK} or more"),
        (replace, r"segment-3: lost: another file has its name: got inode \d+, expected \d+"),
        (block, "segment-3: lost: what has that name is no regular file"),
    ],
)
def test_what_is_lost(tmpfs: DirectoryPool, change: object, says: str) -> None:
    """Behind the daemon's back; one clear line, and nothing else changes."""
    assert callable(change)
    row = tmpfs.create(ROW)
    change(path_of(tmpfs))
    before = path_of(tmpfs).stat() if path_of(tmpfs).exists() else None
    uses: list[Callable[[], object]] = [
        lambda: tmpfs.restore(row),
        lambda: tmpfs.resize(row._replace(length=3 * BLOCK)),
        lambda: tmpfs.punch(row, 0, PAGE),
        lambda: tmpfs.check_unused(row),
        lambda: tmpfs.open(row, write=False),
        lambda: tmpfs.holders(row),
    ]
    if change is not cut:  # else it is still the file of the segment, and its owner counts
        uses.append(lambda: tmpfs.set_owner(row, Owner(7, 7, 0o640)))
    for use in uses:
        with pytest.raises(RegionError, match=f"^{says}$"):
            use()
    assert before is None or path_of(tmpfs).stat() == before


def test_a_mapping_is_as_long_as_the_row(tmpfs: DirectoryPool) -> None:
    row = tmpfs.create(ROW)
    with pytest.raises(RegionError, match="lost: it was cut: got 4194304 bytes, expected 6291456"):
        tmpfs.open(row._replace(length=3 * BLOCK), write=False)
    with tmpfs.open(row._replace(length=BLOCK), write=False) as region:
        assert (region.size, region.name) == (BLOCK, f"{tmpfs.name}/segment-3")


def test_a_file_that_is_cut_while_it_is_opened(
    tmpfs: DirectoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tmpfs.create(ROW)
    path = tmpfs.native_path(row)

    def cut_first(fd: int, name: str, *, size: int) -> OpenFileBacking:
        os.truncate(path, BLOCK)
        return OpenFileBacking(fd, name, size=size)

    monkeypatch.setattr(module, "OpenFileBacking", cut_first)
    with pytest.raises(RegionError, match="lost: it was cut: got 2097152 bytes"):
        tmpfs.open(row, write=False)


def test_an_owner_with_a_lease_holds_nobody_up(tmpfs: DirectoryPool) -> None:
    row = tmpfs.create(ROW)
    owner = os.open(path_of(tmpfs), os.O_RDWR)
    fcntl.fcntl(owner, fcntl.F_SETSIG, 23)
    fcntl.fcntl(owner, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    assert tmpfs.restore(row) == row
    assert tmpfs.restore(row._replace(handle=0)) == row
    assert {h.pid for h in tmpfs.holders(row)} <= {0}, "it is this process"
    with pytest.raises(RegionError, match="somebody has a lease on it"):
        tmpfs.restore(row._replace(length=3 * BLOCK))
    with pytest.raises(BusyError, match="somebody has a lease on it"):
        tmpfs.open(row, write=True)
    tmpfs.set_owner(row, Owner(7, 8, 0o640))
    os.close(owner)


# ------------------------------------------------------------------------------ taking apart


def test_a_segment_is_destroyed(pool: DirectoryPool) -> None:
    """Whoever has it keeps it."""
    row = pool.create(ROW)
    put(pool, row)
    with pool.open(row, write=False) as held:
        pool.destroy(row._replace(state=SEGMENT_DEAD))
        assert held.read(RegionOff(BLOCK), 3) == b"xxx"
    assert not os.listdir(pool.name)
    pool.destroy(row)
    with pytest.raises(RegionError, match="lost: there is no file of that name"):
        pool.restore(row)


def test_destroyed_memory_goes_back_at_once(tmpfs: DirectoryPool) -> None:
    """Whatever the kernel still has the file as; but not if somebody could use it."""
    for kept_open, is_kept in ((os.O_ACCMODE, False), (os.O_RDONLY, True), (os.O_RDWR, True)):
        row = tmpfs.create(ROW)
        put(tmpfs, row)
        fd = os.open(f"{tmpfs.name}/segment-{row.number}", kept_open)
        tmpfs.destroy(row._replace(state=SEGMENT_DEAD))
        assert (os.fstat(fd).st_blocks > 0) == is_kept
        os.close(fd)
        assert not os.listdir(tmpfs.name)


def test_destroying_is_taken_up_again(tmpfs: DirectoryPool) -> None:
    """It was killed when the memory had gone, and the file not yet."""
    row = tmpfs.create(ROW)
    os.truncate(f"{tmpfs.name}/segment-{row.number}", 0)
    tmpfs.destroy(row._replace(state=SEGMENT_DEAD))
    assert not os.listdir(tmpfs.name)


def test_only_what_was_made_is_destroyed(
    tmpfs: DirectoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    row = tmpfs.create(ROW)
    tmpfs.set_owner(row, Owner(7, 7, 0o640))
    tmpfs.destroy(row._replace(handle=row.handle + 1))
    tmpfs.destroy(row._replace(handle=0))  # not as it was made: somebody has got it
    said = f"segment-3: not removed: another file has its name in {tmpfs.name}"
    assert [r.getMessage() for r in caplog.records] == [said, said]
    caplog.clear()
    assert os.listdir(tmpfs.name) == ["segment-3"]
    tmpfs.destroy(row)
    tmpfs.destroy(tmpfs.create(ROW)._replace(handle=0))
    assert os.listdir(tmpfs.name) == []


def test_what_the_kernel_does_not_remove(
    tmpfs: DirectoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tmpfs.create(ROW)

    def refuse(path: str, *, dir_fd: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(RegionError, match=r"segment-3: cannot be removed from .*: Read-only"):
            tmpfs.destroy(row)
        with pytest.raises(RegionError, match=r"segment-3: cannot be removed from .*: Read-only"):
            tmpfs.remove("segment-3")
    tmpfs.destroy(row)


def test_the_owner_changes_of_a_segment_that_was_cut(tmpfs: DirectoryPool) -> None:
    row = tmpfs.create(ROW)
    path = tmpfs.native_path(row)
    os.truncate(path, 0)
    tmpfs.set_owner(row, Owner(7, 8, 0o640))
    info = os.stat(path)
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (7, 8, 0o640)


def test_an_access_control_list_goes(tmpfs: DirectoryPool) -> None:
    """The owner may have set it; the next one is not to be surprised by it."""
    name = "system.posix_acl_access"
    entries = [(1, 6, -1), (2, 6, 7), (4, 0, -1), (16, 6, -1), (32, 0, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    row = tmpfs.create(ROW)
    path = tmpfs.native_path(row)
    for owner in (Owner(8, 8, 0o660), Owner(8, 8, 0o640), Owner(9, 8, 0o640)):
        os.setxattr(path, name, acl)
        tmpfs.set_owner(row, owner)
        info = os.stat(path)
        assert Owner(info.st_uid, info.st_gid, info.st_mode & 0o7777) == owner
        assert os.listxattr(path) == []


def test_strays(pool: DirectoryPool) -> None:
    """Removed is what a crash may have left; named is what has bytes, or a number of nobody."""
    rows = [pool.create(ROW._replace(number=SegmentNo(n))) for n in (1, 2, 4, 5)]
    put(pool, rows[1])
    for name in ("base", "segment-0", "segment-04", "segment-6x", "other"):
        Path(pool.name, name).touch(0o600)
    Path(pool.name, "segment-7").mkdir()
    assert pool.strays([rows[2]]) == [
        f"{pool.name}/segment-2: no file has this segment, and it takes 4 MiB",
        f"{pool.name}/segment-5: no file has this segment, and it takes 0 bytes",
    ]
    left = {"base", "other", "segment-0", "segment-04", "segment-2", "segment-4", "segment-5"}
    assert set(os.listdir(pool.name)) == left | {"segment-6x", "segment-7"}
    assert len(pool.strays([])) == 3, "no number has ever been given"


# ------------------------------------------------------------------------------ who has it


def test_holders_are_named(pool: DirectoryPool) -> None:
    row = pool.create(ROW)
    with path_of(pool).open("rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as process:
        assert [(h.pid, h.name, h.how) for h in pool.holders(row)] == [
            (process.pid, "sleep", "has opened")
        ]
        process.kill()
    assert pool.holders(row) == []


def test_an_owner_and_nobody_else(pool: DirectoryPool) -> None:
    row = pool.create(ROW)
    for owner in (Owner(7, 8, 0o640), Owner(7, 8, 0o4666), Owner(0, 0, 0), Owner(7, 8, 0o100600)):
        pool.set_owner(row, owner)
        info = path_of(pool).stat()
        assert (info.st_uid, info.st_gid) == (owner.uid, owner.gid)
        assert stat.S_IMODE(info.st_mode) == owner.mode & 0o777
    assert pool.resize(row._replace(length=BLOCK, valid=BLOCK)).length == BLOCK
    info = path_of(pool).stat()
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (7, 0o600), "as before"


def test_access_is_never_wider_than_before_or_after(
    tmpfs: DirectoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tmpfs.create(ROW)
    tmpfs.set_owner(row, Owner(7, 7, 0o664))
    seen = []
    change = os.chown

    def look(path: str, uid: int, gid: int) -> None:
        seen.append(stat.S_IMODE(path_of(tmpfs).stat().st_mode))
        change(path, uid, gid)
        seen.append(stat.S_IMODE(path_of(tmpfs).stat().st_mode))

    monkeypatch.setattr(os, "chown", look)
    tmpfs.set_owner(row, Owner(8, 8, 0o600))
    assert seen == [0, 0]

    def refuse(path: str, uid: int, gid: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(RegionError, match="segment-3: cannot be given to its owner: Operation not"):
        tmpfs.set_owner(row, Owner(9, 9, 0o600))


# ------------------------------------------------------------------------------ space


def test_what_is_promised_is_not_free(pool: DirectoryPool) -> None:
    before = pool.space()
    row = pool.create(ROW)
    assert (before.total, before.largest) == (pool.space().total, before.free)
    assert before.free - pool.space().free in range(2 * BLOCK, 4 * BLOCK), "others use it as well"
    put(pool, row)
    assert before.free - pool.space().free in range(2 * BLOCK, 4 * BLOCK)
    assert pool.space().free % pool.granule == 0
    pool.destroy(row)
    assert pool.space().free <= pool.space().total == pool.capacity()


def test_what_an_owner_does_counts_at_once(small: DirectoryPool) -> None:
    """Nothing that was seen before is believed: `df` and the next plan are exact."""
    free = small.space().free
    row = small.create(ROW)
    assert small.space().free == free - ROW.length
    put(small, row)
    assert small.space().free == free - ROW.length
    with path_of(small).open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped.madvise(mmap.MADV_REMOVE, 0, BLOCK)
    assert small.space().free == free - ROW.length
    os.truncate(path_of(small), 3 * BLOCK)
    assert small.space().free == free - 3 * BLOCK
    Path(small.name, "other").write_bytes(bytes(BLOCK))
    assert small.space().free == free - 4 * BLOCK
    with pytest.raises(NoSpaceError, match="segment-4: no memory: needs 14 MiB, 8 MiB are free"):
        small.plan(Segment(SegmentNo(4), Ino(9), POOL_DIRECTORY, 7 * BLOCK), [])


def test_a_look_at_files_that_go_meanwhile(
    tmpfs: DirectoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread destroys segments."""
    row = tmpfs.create(ROW)
    tmpfs.create(ROW._replace(number=SegmentNo(4)))
    scan = os.scandir

    @contextmanager
    def destroy_one(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scan(path) as entries:
            found = list(entries)
        tmpfs.destroy(row)
        yield iter(found)

    monkeypatch.setattr(os, "scandir", destroy_one)
    assert tmpfs.segment_names() == ["segment-4"]


def test_a_plan_is_refused_for_lack_of_memory(tmpfs: DirectoryPool) -> None:
    row = tmpfs.plan(ROW, [])
    assert row == ROW
    made = tmpfs.create(row)
    free = tmpfs.space().free
    assert tmpfs.plan(made._replace(length=made.length + free - 8 * BLOCK), []).handle
    with pytest.raises(NoSpaceError, match=f"segment-3: no memory: needs .*free in {tmpfs.name}"):
        tmpfs.plan(made._replace(length=made.length + free + 64 * BLOCK), [])
    with pytest.raises(NotSupportedError, match="this pool does not choose the NUMA node"):
        tmpfs.plan(ROW._replace(node=0), [])


def test_a_plan_on_huge_pages_is_for_the_kernel_to_refuse(hugetlbfs: DirectoryPool) -> None:
    """It may have more than are free: nr_overcommit_hugepages."""
    row = ROW._replace(length=1024 * G)
    assert hugetlbfs.plan(row, []) == row


def test_a_tmpfs_without_a_limit(tmpfs: DirectoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounted with size=0: the machine's memory is the limit."""
    none = os.statvfs_result((PAGE, PAGE, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "fstatvfs", lambda fd: none)
    space = tmpfs.space()
    assert 0 < space.free <= space.total
    told = Path("/proc/meminfo").read_text().split()
    assert space.total == int(told[told.index("MemTotal:") + 1]) << 10


def test_huge_pages_that_are_promised_to_others(hugetlbfs: DirectoryPool) -> None:
    with huge_pages(4 * BLOCK) as other:
        before = hugetlbfs.space()
        neighbour = DirectoryPool.at(str(other))
        other.chmod(0o711)
        neighbour.create(ROW)
        assert hugetlbfs.space().free == before.free - ROW.length
        neighbour.destroy(ROW)
        neighbour.close()
