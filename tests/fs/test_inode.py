"""Lives of inodes, their attributes and times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    NotFoundError,
    StaleError,
    TimeRangeError,
)
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import PAGE
from pkernfs.quantities import Ino, RegionOff
from support.checking import assert_clean
from support.files import (
    KEEP_SIZE,
    MIB,
    PUNCH,
    ROOT,
    contents,
    make,
    noise,
    remount,
    resize,
)

# ------------------------------------------------------------------------------ space


def test_unlinking_a_large_fragmented_file(fs: FileSystem) -> None:
    """More extents than one transaction can free."""
    free = fs.statfs().free
    ino, spread = make(fs, b"big"), make(fs, b"spread")
    for i in range(2_400):
        # in turn, so that neither has two pages in a row; the sizes keep both in pages
        fs.fallocate(ino, KEEP_SIZE, (i % 250) * PAGE, PAGE)
        fs.write(spread, (i * 7 % 250) * PAGE, b"x")
    assert len(list(fs._files._map.after(fs.inode(ino), 0))) > 1
    fs.unlink(ROOT, b"big")
    fs.unlink(ROOT, b"spread")
    assert fs.statfs().free >= free - 3


# ------------------------------------------------------------------------------ names


def test_a_removed_directory_that_is_open(fs: FileSystem) -> None:
    a = fs.mkdir(ROOT, b"a", 0o755, 0, 0).ino
    fs.open(a)
    fs.rmdir(ROOT, b"a")
    assert list(fs.readdir(a, 0)) == []
    with pytest.raises(NotFoundError):
        make(fs, parent=a)
    make(fs)
    with pytest.raises(NotFoundError):
        fs.rename(ROOT, b"f", a, b"f")
    fs.release(a)
    with pytest.raises(NotFoundError):
        fs.inode(a)


# ------------------------------------------------------------------------------ types and modes


def test_times(fs: FileSystem) -> None:
    ino = make(fs)
    lowest, highest = -(1 << 63), (1 << 63) - 1
    for asked in (0, -1, -(10**18), lowest, highest):
        fs.setattr(ino, atime=asked, mtime=asked)
        assert (fs.inode(ino).atime, fs.inode(ino).mtime) == (asked, asked)
        again = remount(fs).inode(ino)
        assert (again.atime, again.mtime) == (asked, asked)
        fs.region.read(RegionOff(0), 1)


@pytest.mark.parametrize(
    "asked", [1 << 63, -(1 << 63) - 1, 16725225600 * 10**9, -62135596800 * 10**9]
)
@pytest.mark.parametrize("which", ["atime", "mtime"])
def test_a_time_that_cannot_be_kept_is_refused(fs: FileSystem, asked: int, which: str) -> None:
    """Another time instead would be a change that nobody made, for ever: for make, for rsync."""
    ino = make(fs, content=b"abc")
    before = fs.inode(ino)
    kept = before.atime, before.mtime, before.ctime, before.size
    atime, mtime = (asked, None) if which == "atime" else (None, asked)
    with pytest.raises(TimeRangeError):
        fs.setattr(ino, atime=atime, mtime=mtime, size=1)
    after = fs.inode(ino)
    assert (after.atime, after.mtime, after.ctime, after.size) == kept


@pytest.mark.parametrize("mtime", [(1 << 63) - 1, -(1 << 63), 0])
def test_reading_a_file_of_any_time(fs: FileSystem, mtime: int) -> None:
    ino = make(fs, content=b"abc")
    fs.setattr(ino, mtime=mtime)
    assert bytes(fs.read(ino, 0, 3)) == b"abc"
    assert fs.inode(ino).mtime == mtime


def test_which_times_an_operation_changes(fs: FileSystem) -> None:
    ticks = iter(range(10**18, 10**19))
    fs.super.clock = lambda: next(ticks)
    ino = make(fs, content=b"abc")

    def changes(work: Callable[[], object]) -> str:
        before = fs.inode(ino)
        old = (before.atime, before.mtime, before.ctime, before.btime)
        work()
        after = fs.inode(ino)
        new = (after.atime, after.mtime, after.ctime, after.btime)
        return "".join(c for c, a, b in zip("amcb", old, new, strict=True) if a != b)

    assert changes(lambda: fs.read(ino, 0, 1)) == "a"
    assert changes(lambda: fs.read(ino, 0, 1)) == ""  # relatime
    assert changes(lambda: fs.write(ino, 0, b"x")) == "mc"
    assert changes(lambda: fs.setattr(ino, mode=0o600)) == "c"
    assert changes(lambda: fs.setattr(ino, size=10)) == "mc"
    assert changes(lambda: fs.setattr(ino, atime=5)) == "ac"
    assert changes(lambda: fs.setxattr(ino, b"user.a", b"")) == "c"
    assert changes(lambda: fs.removexattr(ino, b"user.a")) == "c"
    assert changes(lambda: fs.link(ino, ROOT, b"g")) == "c"
    assert changes(lambda: fs.rename(ROOT, b"g", ROOT, b"h")) == "c"
    assert changes(lambda: fs.unlink(ROOT, b"h")) == "c"
    assert changes(lambda: fs.fallocate(ino, 0, 0, 5 * MIB)) == "mc"
    assert changes(lambda: fs.fallocate(ino, KEEP_SIZE, 0, 6 * MIB)) == "c"
    assert changes(lambda: fs.fallocate(ino, PUNCH, 0, 5)) == "mc"


def test_set_id_bits(fs: FileSystem) -> None:
    def mode(after: Callable[[Ino], object], before: int) -> int:
        ino = make(fs)
        fs.setattr(ino, mode=before)
        after(ino)
        result = fs.inode(ino).mode & 0o7777
        fs.unlink(ROOT, b"f")
        return result

    assert mode(lambda i: fs.setattr(i, uid=1), 0o6755) == 0o755
    assert mode(lambda i: fs.setattr(i, gid=1), 0o6755) == 0o755
    assert mode(lambda i: fs.setattr(i, gid=1), 0o2644) == 0o2644  # mandatory locking, once
    assert mode(lambda i: fs.write(i, 0, b"x", True), 0o6755) == 0o6755
    assert mode(lambda i: fs.write(i, 0, b"x", False), 0o6755) == 0o755
    assert mode(lambda i: fs.setattr(i, size=1), 0o6755) == 0o6755
    assert mode(lambda i: fs.setattr(i, size=1, privileged=False), 0o6755) == 0o755
    assert mode(lambda i: fs.setattr(i, mode=0o2755, privileged=False), 0) == 0o2755
    assert (
        mode(lambda i: fs.setattr(i, mode=0o6755, privileged=False, group_member=False), 0)
        == 0o4755
    )


# ------------------------------------------------------------------------------ lives of inodes


def test_unlinked_but_open(fs: FileSystem) -> None:
    ino = make(fs, content=noise(3 * MIB))
    free = fs.statfs().free
    fs.open(ino)
    fs.open(ino)
    fs.unlink(ROOT, b"f")
    assert fs.inode(ino).nlink == 0
    assert contents(fs, ino) == noise(3 * MIB)
    fs.write(ino, 0, b"still")
    resize(fs, ino, 5 * MIB)
    assert bytes(fs.read(ino, 0, 5)) == b"still"
    with pytest.raises(NotFoundError):
        fs.link(ino, ROOT, b"back")
    fs.release(ino)
    assert bytes(fs.read(ino, 0, 5)) == b"still"
    fs.release(ino)
    with pytest.raises(NotFoundError):
        fs.inode(ino)
    assert fs.statfs().free > free


def test_looked_up_but_not_open_yet(fs: FileSystem) -> None:
    """open(2) looks up first, and a descriptor made with O_PATH may be opened at any time."""
    ino = make(fs, content=noise(3 * MIB))
    fs.remember(ino)
    free = fs.statfs().free
    fs.unlink(ROOT, b"f")
    for _ in range(2):
        fs.open(ino)
        assert contents(fs, ino) == noise(3 * MIB)
        fs.release(ino)
    fs.forget(ino, 1)
    with pytest.raises(NotFoundError):
        fs.inode(ino)
    assert fs.statfs().free > free


def test_what_an_earlier_daemon_left_is_not_opened(fs: FileSystem) -> None:
    """Its users have gone, and its data may be on its way out."""
    ino = make(fs)
    fs.open(ino)
    fs.unlink(ROOT, b"f")
    fs = mount_filesystem(fs.region, read_only=True)
    with pytest.raises(StaleError):
        fs.open(ino)


@pytest.mark.parametrize("opened", [False, True])
def test_looked_up_and_replaced(fs: FileSystem, opened: bool) -> None:
    """The kernel looks again only once, so a file that is replaced often has to be the old one."""
    free = fs.statfs().free
    ino = make(fs, content=noise(3 * MIB))
    fs.remember(ino)
    make(fs, b"new", b"new content")
    if opened:
        fs.open(ino)
    fs.rename(ROOT, b"new", ROOT, b"f")
    for _ in range(2):
        fs.open(ino)
        assert contents(fs, ino) == noise(3 * MIB)
        fs.release(ino)
    if opened:
        fs.release(ino)
    fs.open(ino)
    fs.forget(ino, 1)
    assert contents(fs, ino) == noise(3 * MIB)
    fs.release(ino)
    with pytest.raises(NotFoundError):
        fs.inode(ino)
    fs.unlink(ROOT, b"f")
    assert fs.statfs().free >= free - 2


def test_replaced_and_known_to_nobody(fs: FileSystem) -> None:
    ino = make(fs, content=noise(3 * MIB))
    make(fs, b"new", b"new content")
    fs.rename(ROOT, b"new", ROOT, b"f")
    with pytest.raises(NotFoundError):
        fs.inode(ino)


def test_what_was_replaced_goes_after_a_crash(fs: FileSystem) -> None:
    free = fs.statfs().free
    ino = make(fs, content=noise(3 * MIB))
    fs.remember(ino)
    make(fs, b"new", b"new content")
    fs.rename(ROOT, b"new", ROOT, b"f")
    fs = remount(fs)
    fs.unlink(ROOT, b"f")
    assert fs.statfs().free >= free - 2
    assert_clean(fs.region)


def test_orphans_are_reclaimed_after_a_crash(fs: FileSystem) -> None:
    kept = make(fs, b"kept", b"kept")
    free = fs.statfs().free
    for i in range(40):
        ino = make(fs, b"%d" % i, noise(300_000))
        fs.setxattr(ino, b"user.x", noise(5_000))
        fs.open(ino)
        fs.unlink(ROOT, b"%d" % i)
    directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    fs.remember(directory)
    fs.rmdir(ROOT, b"d")
    assert fs.statfs().free < free - 2_000
    fs = remount(fs)
    assert fs.statfs().free >= free - 6
    assert fs.statfs().files - fs.statfs().free_files == 3
    assert contents(fs, kept) == b"kept"
    assert_clean(fs.region)


def test_forgetting_is_counted(fs: FileSystem) -> None:
    ino = make(fs)
    fs.remember(ino, 3)
    fs.unlink(ROOT, b"f")
    fs.forget(ino, 2)
    assert fs.inode(ino).nlink == 0
    fs.forget(ino, 1)
    with pytest.raises(NotFoundError):
        fs.inode(ino)
