"""Names: made, removed, renamed, listed; directories, links, types."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from unittest import mock

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    IsDirError,
    NameTooLongError,
    NoSpaceError,
    NotDirError,
    NotEmptyError,
    NotFoundError,
    PermissionDeniedError,
    PkernfsError,
)
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.namei import RENAME_WHITEOUT
from pkernfs.layout import BLOCK, PAGE
from pkernfs.quantities import Ino
from support.checking import MemoryFile, assert_clean
from support.files import IOMMU, REG, ROOT, contents, make, names, noise, remount, resize

# ------------------------------------------------------------------------------ names


def test_names_of_any_bytes(fs: FileSystem) -> None:
    rnd = random.Random(4)
    every = [bytes([b]) for b in range(1, 256) if b not in b"/."]
    every += [bytes(rnd.choice(b"\1\n\x7f\x80\xff .") for _ in range(255)) for _ in range(50)]
    every += [b"...", b".x", b"x" * 255, b"-rf", b"\xed\xa0\x80", b"e\xcc\x81", b"\xc3\xa9"]
    directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    made = {name: make(fs, name, parent=directory) for name in set(every)}
    assert {name: ino for name, ino, *_ in fs.readdir(directory, 0)} == made
    assert all(fs.lookup(directory, name).ino == ino for name, ino in made.items())
    fs = remount(fs)
    assert names(fs, directory) == set(made)


def test_names_that_cannot_be(fs: FileSystem) -> None:
    ino = make(fs)
    makers: tuple[Callable[[bytes], object], ...] = (
        lambda name: fs.create(ROOT, name, REG, 0, 0),
        lambda name: fs.mkdir(ROOT, name, 0o755, 0, 0),
        lambda name: fs.symlink(ROOT, name, b"t", 0, 0),
        lambda name: fs.link(ino, ROOT, name),
        lambda name: fs.rename(ROOT, b"f", ROOT, name),
    )
    for make_it in makers:
        for name, error in (
            (b"", InvalidError),
            (b"a/b", InvalidError),
            (b"a\0b", InvalidError),
            (b"x" * 256, NameTooLongError),
            (b".", PkernfsError),
            (b"..", PkernfsError),
        ):
            with pytest.raises(error):
                make_it(name)
    assert names(fs, ROOT) == {b"f", b"iommu"}
    assert fs.lookup(ROOT, b".").ino == ROOT
    ino = make(fs, b"a file")
    assert fs.find(ino, b".") == ino, "the kernel asks so for what a file handle is of"
    with pytest.raises(NotFoundError):
        fs.find(Ino(ino + 1), b".")
    assert fs.lookup(ROOT, b"..").ino == ROOT
    directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    assert fs.lookup(directory, b"..").ino == ROOT
    with pytest.raises(NotDirError):
        fs.lookup(ino, b"x")
    with pytest.raises(NotFoundError):
        fs.lookup(ROOT, b"none")
    with pytest.raises(NotFoundError):
        fs.inode(Ino(12345))
    with pytest.raises(NotFoundError):
        fs.inode(Ino(16))


def _matrix_tree(fs: FileSystem) -> dict[str, bytes]:
    """One of each kind, in two directories."""
    kinds = {}
    for kind in ("file", "link", "fifo", "empty", "full"):
        for side in ("old", "new"):
            parent = fs.lookup(ROOT, side.encode()).ino
            name = kind.encode()
            if kind in ("file", "fifo"):
                type_bits = stat.S_IFIFO if kind == "fifo" else stat.S_IFREG
                fs.create(parent, name, type_bits | 0o600, 0, 0)
            elif kind == "link":
                fs.symlink(parent, name, b"target", 0, 0)
            else:
                made = fs.mkdir(parent, name, 0o755, 0, 0).ino
                if kind == "full":
                    make(fs, b"inside", parent=made)
        kinds[kind] = name
    return kinds


def _rename_error(source: str, target: str, flags: int) -> int:
    """What rename(2) says about these two."""
    if target == "none":
        return errno.ENOENT if flags == 2 else 0
    if flags == 2:
        return 0
    if flags & 1:
        return errno.EEXIST
    source_dir, target_dir = source in ("empty", "full"), target in ("empty", "full")
    if source_dir and not target_dir:
        return errno.ENOTDIR
    if target_dir and not source_dir:
        return errno.EISDIR
    return errno.ENOTEMPTY if target == "full" else 0


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("flags", [0, 1, 2, 4, 5])
def test_rename_matrix(same: bool, flags: int) -> None:
    everything = ("file", "link", "fifo", "empty", "full")
    for source in everything:
        for target in (*everything, "none"):
            if same and source == target:
                continue
            with MemoryFile(8 << 20) as memory, memory.open() as region:
                make_filesystem(region)
                fs = mount_filesystem(region)
                for side in (b"old", b"new"):
                    fs.mkdir(ROOT, side, 0o755, 0, 0)
                _matrix_tree(fs)
                one = fs.lookup(ROOT, b"old").ino
                two = one if same else fs.lookup(ROOT, b"new").ino
                moving = fs.lookup(one, source.encode()).ino
                there = None if target == "none" else fs.lookup(two, target.encode()).ino
                links = fs.inode(one).nlink + fs.inode(two).nlink
                error = 0
                try:
                    fs.rename(one, source.encode(), two, target.encode(), flags)
                except PkernfsError as e:
                    error = e.errno
                assert error == _rename_error(source, target, flags), (source, target)
                if error:
                    assert fs.lookup(one, source.encode()).ino == moving
                    assert fs.inode(one).nlink + fs.inode(two).nlink == links
                else:
                    assert fs.lookup(two, target.encode()).ino == moving
                    if flags == 2:
                        assert fs.lookup(one, source.encode()).ino == there
                    elif flags & 4:
                        left = fs.lookup(one, source.encode())
                        assert (left.mode, left.rdev, left.nlink) == (stat.S_IFCHR, 0, 1)
                    else:
                        with pytest.raises(NotFoundError):
                            fs.lookup(one, source.encode())
                    if fs.inode(moving).is_dir:
                        assert fs.lookup(moving, b"..").ino == two
                assert_clean(region)


def test_rename_into_itself_and_of_the_fixed(fs: FileSystem) -> None:
    a = fs.mkdir(ROOT, b"a", 0o755, 0, 0).ino
    b = fs.mkdir(a, b"b", 0o755, 0, 0).ino
    ino = make(fs)
    fs.link(ino, ROOT, b"same")
    for to in (a, b):
        with pytest.raises(InvalidError):
            fs.rename(ROOT, b"a", to, b"x")
        for flags in (2,):
            make(fs, b"x", parent=to)
            with pytest.raises(InvalidError):
                fs.rename(ROOT, b"a", to, b"x", flags)
            with pytest.raises(InvalidError):
                fs.rename(to, b"x", ROOT, b"a", flags)
            fs.unlink(to, b"x")
    with pytest.raises(NotEmptyError):
        fs.rename(a, b"b", ROOT, b"a")
    for flags in (3, 6, 7, 8, -1):
        with pytest.raises(InvalidError):
            fs.rename(ROOT, b"f", ROOT, b"g", flags)
    fs.rename(ROOT, b"f", ROOT, b"same")  # two names of one file: nothing happens
    assert names(fs, ROOT) == {b"a", b"f", b"same", b"iommu"}
    fs.rename(ROOT, b"f", ROOT, b"f")
    for flags in (0, 2):
        with pytest.raises(BusyError):
            fs.rename(ROOT, b"iommu", ROOT, b"a", flags)
        with pytest.raises(BusyError):
            fs.rename(ROOT, b"a", ROOT, b"iommu", flags)
    with pytest.raises(BusyError):
        fs.rmdir(ROOT, b"iommu")
    with pytest.raises(NotFoundError):
        fs.rename(ROOT, b"none", ROOT, b"x")


def test_a_whiteout_is_its_makers(fs: FileSystem) -> None:
    """As a device node that mknod(2) makes: of the caller, or of a set-gid directory's group."""
    make(fs)
    fs.rename(ROOT, b"f", ROOT, b"g", RENAME_WHITEOUT, 3, 4)
    left = fs.lookup(ROOT, b"f")
    assert (left.uid, left.gid) == (3, 4)
    inside = fs.mkdir(ROOT, b"d", 0o2755, 0, 9).ino
    make(fs, parent=inside)
    fs.rename(inside, b"f", ROOT, b"h", RENAME_WHITEOUT, 3, 4)
    left = fs.lookup(inside, b"f")
    assert (left.uid, left.gid) == (3, 9)
    # It is a file like others: it can be replaced, renamed and removed.
    fs.rename(ROOT, b"h", inside, b"f", RENAME_WHITEOUT)
    fs.unlink(ROOT, b"h")
    assert fs.inode(inside).size == 1


def test_two_names_of_one_file_leave_no_whiteout(fs: FileSystem) -> None:
    fs.link(make(fs), ROOT, b"same")
    fs.rename(ROOT, b"f", ROOT, b"same", RENAME_WHITEOUT)
    assert fs.lookup(ROOT, b"f").is_reg


def test_no_whiteout_among_table_files(fs: FileSystem) -> None:
    fs.create(IOMMU, b"dom-1", stat.S_IFREG | 0o600, 0, 0)
    with pytest.raises(PermissionDeniedError):
        fs.rename(IOMMU, b"dom-1", IOMMU, b"dom-2", RENAME_WHITEOUT)
    assert names(fs, IOMMU) == {b"dom-1"}


def test_a_whiteout_needs_space(fs: FileSystem) -> None:
    """Nothing is moved if there is no room for what is to be left behind."""
    ino = make(fs)
    full = mock.patch.object(fs.super, "leave_reserve", side_effect=NoSpaceError("full"))
    with full, pytest.raises(NoSpaceError):
        fs.rename(ROOT, b"f", ROOT, b"g", RENAME_WHITEOUT)
    assert fs.lookup(ROOT, b"f").ino == ino
    assert names(fs, ROOT) == {b"f", b"iommu"}
    assert_clean(fs.region)


# ------------------------------------------------------------------------------ no name


def test_a_file_without_a_name(fs: FileSystem) -> None:
    free, used = fs.statfs().free, fs.super.inodes.used
    inside = fs.mkdir(ROOT, b"d", 0o2755, 0, 9).ino
    ino = fs.tmpfile(inside, 0o4640, 3, 4).ino
    fs.open(ino)
    inode = fs.inode(ino)
    assert (inode.mode, inode.uid, inode.gid) == (stat.S_IFREG | 0o4640, 3, 9)
    assert (inode.nlink, fs.inode(inside).size) == (0, 0)
    fs.write(ino, 0, noise(300_000))
    assert contents(fs, ino) == noise(300_000)
    fs.release(ino)
    with pytest.raises(NotFoundError):
        fs.inode(ino)
    fs.rmdir(ROOT, b"d")
    assert fs.super.inodes.used == used
    assert fs.statfs().free >= free - 2
    assert_clean(fs.region)


def test_a_file_gets_its_first_name(fs: FileSystem) -> None:
    ino = fs.tmpfile(ROOT, 0o600, 0, 0).ino
    fs.open(ino)
    fs.write(ino, 0, b"kept")
    fs.link(ino, ROOT, b"f")
    fs.release(ino)
    assert (contents(fs, ino), fs.inode(ino).nlink) == (b"kept", 1)
    assert_clean(fs.region)
    # Once it has lost its names again, it is a removed file like others.
    fs.open(ino)
    fs.unlink(ROOT, b"f")
    with pytest.raises(NotFoundError):
        fs.link(ino, ROOT, b"again")
    fs.release(ino)
    with pytest.raises(NotFoundError):
        fs.inode(ino)


def test_a_name_that_is_refused_may_come_later(fs: FileSystem) -> None:
    make(fs)
    ino = fs.tmpfile(ROOT, 0o600, 0, 0).ino
    fs.open(ino)
    with pytest.raises(ExistsError):
        fs.link(ino, ROOT, b"f")
    full = mock.patch.object(fs.super, "leave_reserve", side_effect=NoSpaceError("full"))
    with full, pytest.raises(NoSpaceError):
        fs.link(ino, ROOT, b"g")
    assert fs.inode(ino).nlink == 0
    fs.link(ino, ROOT, b"g")
    fs.release(ino)
    assert fs.inode(ino).nlink == 1


def test_where_no_file_is_made_without_a_name(fs: FileSystem) -> None:
    with pytest.raises(PermissionDeniedError):
        fs.tmpfile(IOMMU, 0o600, 0, 0)
    with pytest.raises(NotDirError):
        fs.tmpfile(make(fs), 0o600, 0, 0)
    ino = fs.tmpfile(ROOT, 0o600, 0, 0).ino
    with pytest.raises(PermissionDeniedError):
        fs.link(ino, IOMMU, b"dom-1")


def test_a_file_without_a_name_goes_with_the_daemon(fs: FileSystem) -> None:
    used = fs.super.inodes.used
    fs.open(fs.tmpfile(ROOT, 0o600, 0, 0).ino)
    fs = remount(fs)
    assert fs.super.inodes.used == used
    assert_clean(fs.region)


def test_directories_count_links_and_entries(fs: FileSystem) -> None:
    a = fs.mkdir(ROOT, b"a", 0o755, 0, 0).ino
    b = fs.mkdir(a, b"b", 0o755, 0, 0).ino
    make(fs, parent=a)
    assert (fs.inode(ROOT).nlink, fs.inode(a).nlink, fs.inode(b).nlink) == (4, 3, 2)
    assert (fs.inode(ROOT).size, fs.inode(a).size) == (2, 2)
    with pytest.raises(NotEmptyError):
        fs.rmdir(ROOT, b"a")
    with pytest.raises(IsDirError):
        fs.unlink(ROOT, b"a")
    with pytest.raises(NotDirError):
        fs.rmdir(a, b"f")
    fs.rename(a, b"b", ROOT, b"b")
    assert (fs.inode(ROOT).nlink, fs.inode(a).nlink) == (5, 2)
    with pytest.raises(PermissionDeniedError):
        fs.link(a, ROOT, b"again")


def test_readdir_is_stable_under_change(fs: FileSystem) -> None:
    directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    stays = {b"stay%d" % i for i in range(500)}
    for name in stays:
        make(fs, name, parent=directory)
    for i in range(500):
        make(fs, b"go%d" % i, parent=directory)
    rnd = random.Random(8)
    seen: list[bytes] = []
    cookie, step = 0, 0
    while True:
        batch = []
        for name, _ino, _kind, following in fs.readdir(directory, cookie):
            batch.append(name)
            cookie = following
            if len(batch) == 7:
                break
        if not batch:
            break
        seen += batch
        for _ in range(6):
            number = rnd.randrange(500)
            try:
                fs.unlink(directory, b"go%d" % number)
            except NotFoundError:
                make(fs, b"go%d" % number, parent=directory)
        make(fs, b"new%d" % step, parent=directory)
        step += 1
    assert stays <= set(seen)
    assert all(seen.count(name) == 1 for name in stays)


def test_many_files_in_one_directory_by_turns(fs: FileSystem) -> None:
    rnd = random.Random(3)
    there: set[bytes] = set()
    for _ in range(6_000):
        name = b"%d" % rnd.randrange(3_000)
        if name in there:
            fs.unlink(ROOT, name)
            there.discard(name)
        else:
            make(fs, name)
            there.add(name)
    assert names(fs, ROOT) - {b"iommu"} == there
    fs = remount(fs)
    assert names(fs, ROOT) - {b"iommu"} == there
    assert fs.statfs().files - fs.statfs().free_files == len(there) + 2


# ------------------------------------------------------------------------------ types and modes


def test_every_type(fs: FileSystem) -> None:
    device = os.makedev(4095, (1 << 20) - 1)
    kinds = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
    for i, kind in enumerate(kinds):
        inode = fs.create(ROOT, b"%d" % i, kind | 0o640, 5, 6, device)
        assert inode.mode == kind | 0o640
        assert (inode.uid, inode.gid, inode.nlink, inode.size) == (5, 6, 1, 0)
        assert inode.rdev == (device if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)
    fs = remount(fs)
    assert fs.lookup(ROOT, b"3").rdev == device
    for kind in (stat.S_IFDIR, stat.S_IFLNK, 0):
        with pytest.raises(InvalidError):
            fs.create(ROOT, b"x", kind | 0o600, 0, 0)
    for name in (b"1", b"3"):
        ino = fs.lookup(ROOT, name).ino
        with pytest.raises(InvalidError):
            fs.setattr(ino, size=0)
    with pytest.raises(IsDirError):
        fs.setattr(ROOT, size=0)
    with pytest.raises(InvalidError):
        fs.readlink(ROOT)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 4031, 4032, 4033, 4095])
def test_symlinks(fs: FileSystem, length: int) -> None:
    target = noise(length)
    inode = fs.symlink(ROOT, b"s", target, 1, 2)
    assert (inode.mode, inode.size, inode.nlink) == (stat.S_IFLNK | 0o777, length, 1)
    assert fs.readlink(inode.ino) == target
    fs = remount(fs)
    assert fs.readlink(inode.ino) == target
    free = fs.statfs().free
    fs.unlink(ROOT, b"s")
    assert fs.statfs().free >= free


def test_symlinks_that_cannot_be(fs: FileSystem) -> None:
    with pytest.raises(NameTooLongError):
        fs.symlink(ROOT, b"s", b"x" * 4096, 0, 0)
    with pytest.raises(PkernfsError):
        fs.symlink(ROOT, b"s", b"", 0, 0)
    assert names(fs, ROOT) == {b"iommu"}


def test_set_gid_directories(fs: FileSystem) -> None:
    d = fs.mkdir(ROOT, b"d", 0o2775, 1, 7).ino
    assert fs.inode(d).mode == stat.S_IFDIR | 0o2775
    assert fs.create(d, b"f", REG, 1, 2).gid == 7
    assert fs.symlink(d, b"s", b"t", 1, 2).gid == 7
    sub = fs.mkdir(d, b"sub", 0o755, 1, 2)
    assert (sub.gid, sub.mode) == (7, stat.S_IFDIR | 0o2755)
    fs.setattr(d, uid=9)
    assert fs.inode(d).mode == stat.S_IFDIR | 0o2775


def test_iommu_keeps_to_its_names(fs: FileSystem) -> None:
    for name in (b"x", b"dom-", b"dom-01", b"dom-65536", b"dom--1", b"root-pgtable", b"dom-1x"):
        with pytest.raises(PermissionDeniedError):
            make(fs, name, parent=IOMMU)
    for name in (b"root-pgtables", b"dom-0", b"dom-65535"):
        ino = make(fs, name, parent=IOMMU)
        with pytest.raises(PermissionDeniedError):
            fs.write(ino, 0, b"x")
        with pytest.raises(PermissionDeniedError):
            fs.link(ino, ROOT, b"out")
        with pytest.raises(PermissionDeniedError):
            fs.rename(IOMMU, name, ROOT, b"out")
        with pytest.raises(PermissionDeniedError):
            fs.setattr(ino, size=PAGE)
        resize(fs, ino, BLOCK)
        with pytest.raises(PermissionDeniedError):
            resize(fs, ino, 0)
        assert fs.extents(ino)[0].region_offset % BLOCK == 0
    with pytest.raises(PermissionDeniedError):
        fs.mkdir(IOMMU, b"dom-1", 0o755, 0, 0)
    with pytest.raises(PermissionDeniedError):
        fs.symlink(IOMMU, b"dom-1", b"t", 0, 0)
