"""What each operation does, at its edges. The model-based tests go through the combinations."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    ArgumentTooLongError,
    BusyError,
    ExistsError,
    FormatError,
    InvalidError,
    IsDirError,
    NameTooLongError,
    NoDataError,
    NoSpaceError,
    NoSuchAddressError,
    NotDirError,
    NotEmptyError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    PkernfsError,
    RangeTooSmallError,
    ReadOnlyError,
    StaleError,
    TooBigError,
    ZeroingNeeded,
)
from pkernfs.fs import inodes as inodes_module
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.inodes import Inode
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import BLOCK, MAX_FILE_BYTES, PAGE
from support.checking import MemoryFile, assert_clean

ROOT = 1
IOMMU = 2
MIB = 1 << 20
GIB = 1 << 30
REG = stat.S_IFREG | 0o644

KEEP_SIZE = 1
PUNCH = 3
ZERO_RANGE = 16

in_a_gib = pytest.mark.parametrize("fs", [GIB], indirect=True)


def make(fs: FileSystem, name: bytes = b"f", content: bytes = b"", parent: int = ROOT) -> int:
    """A regular file; its number."""
    ino = fs.create(parent, name, REG, 0, 0).ino
    if content:
        fs.run(lambda: fs.write(ino, 0, content))
    return ino


def resize(fs: FileSystem, ino: int, size: int) -> None:
    fs.run(lambda: fs.setattr(ino, size=size))


def contents(fs: FileSystem, ino: int) -> bytes:
    return bytes(fs.read(ino, 0, fs.inode(ino).size))


def until_full(work: Callable[[int], object], most: int = 100_000) -> int:
    """Call ``work`` with 0, 1, 2... until it finds no space; how often it did."""
    for i in range(most):
        try:
            work(i)
        except NoSpaceError:
            return i
    raise AssertionError("never full")


def names(fs: FileSystem, ino: int) -> set[bytes]:
    return {name for name, *_ in fs.readdir(ino, 0)}


def held(fs: FileSystem) -> int:
    """Pages that all files with a name hold."""
    total = 0
    todo = [ROOT]
    seen = set()
    while todo:
        ino = todo.pop()
        if ino in seen:
            continue
        seen.add(ino)
        inode = fs.inode(ino)
        total += inode.data_pages
        if inode.is_dir:
            todo += [child for _, child, *_ in fs.readdir(ino, 0)]
    return total


def noise(length: int, seed: int = 1) -> bytes:
    part = random.Random(seed).randbytes(65521).replace(b"\0", b"\1")
    return (part * (length // len(part) + 1))[:length]


def remount(fs: FileSystem) -> FileSystem:
    """As after a crash: a second instance on the same bytes; the first must not be used."""
    return mount_filesystem(fs.region)


# ------------------------------------------------------------------------------ space


@in_a_gib
def test_ten_thousand_small_files_in_a_gib(fs: FileSystem) -> None:
    directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    for i in range(10_000):
        make(fs, b"f%d" % i, i.to_bytes(4, "little") * 1024, directory)
    for i in random.Random(0).sample(range(10_000), 300):
        ino = fs.lookup(directory, b"f%d" % i).ino
        assert bytes(fs.read(ino, 0, PAGE)) == i.to_bytes(4, "little") * 1024
        assert fs.inode(ino).data_pages == 1
    assert len(names(fs, directory)) == 10_000
    # 40 MB of files and their metadata leave nearly all of it.
    assert fs.statfs().free * PAGE > 950 * MIB


@in_a_gib
def test_one_file_of_99_percent_by_truncate(fs: FileSystem) -> None:
    ino = make(fs)
    size = GIB * 99 // 100
    fs.setattr(ino, size=size)  # a fresh region is zero: nothing is to be zeroed
    assert fs.inode(ino).size == size
    assert len(fs.extents(ino)) == 1
    assert not any(fs.read(ino, size - 4 * MIB, 4 * MIB))
    fs.unlink(ROOT, b"f")
    ino = make(fs)
    resize(fs, ino, size)
    assert len(fs.extents(ino)) == 1


@in_a_gib
def test_one_file_of_99_percent_by_writes(fs: FileSystem) -> None:
    ino = make(fs)
    size = GIB * 99 // 100 // MIB * MIB
    data = noise(MIB)
    for offset in range(0, size, MIB):
        fs.write(ino, offset, data)
    assert fs.inode(ino).size == size
    assert len(fs.extents(ino)) == 1
    for offset in range(0, size, 97 * MIB):
        assert bytes(fs.read(ino, offset, MIB)) == data


@pytest.mark.parametrize("step", [PAGE, 3 * PAGE + 5, 100_000, BLOCK, 5 * MIB])
def test_a_growing_file_stays_one_extent(fs: FileSystem, step: int) -> None:
    ino = make(fs)
    data = noise(step)
    end = min(40 * MIB, 400 * step)
    for offset in range(0, end, step):
        fs.run(lambda offset=offset: fs.write(ino, offset, data))  # type: ignore[misc]
    assert len(fs.extents(ino)) == 1
    assert contents(fs, ino) == data * len(range(0, end, step))


@in_a_gib
def test_files_growing_in_turn_are_in_few_pieces(fs: FileSystem) -> None:
    files = [make(fs, b"%d" % i) for i in range(4)]
    for size in range(BLOCK, 160 * MIB, BLOCK):
        for ino in files:
            resize(fs, ino, size)
    assert max(len(fs.extents(ino)) for ino in files) <= 8  # each piece is twice the last


def test_grown_by_truncate_in_steps_is_one_extent(fs: FileSystem) -> None:
    ino = make(fs)
    for size in range(MIB, 40 * MIB, 3 * MIB):
        resize(fs, ino, size)
    assert len(fs.extents(ino)) == 1


@pytest.mark.parametrize("size", [1, PAGE, MIB - 1, MIB])
def test_growing_from_pages_to_a_block_keeps_the_data(fs: FileSystem, size: int) -> None:
    data = noise(size)
    ino = make(fs, content=data)
    assert fs.inode(ino).data_pages == -(-size // PAGE)
    resize(fs, ino, 5 * MIB)
    assert contents(fs, ino) == data + bytes(5 * MIB - size)
    (extent,) = fs.extents(ino)
    assert extent.region_offset % BLOCK == 0
    again = make(fs, b"g", data)
    fs.write(again, size, b"more" * MIB)
    assert contents(fs, again) == data + b"more" * MIB
    assert len(fs.extents(again)) == 1


def test_a_sparse_small_file_grows_out_of_pages(fs: FileSystem) -> None:
    ino = make(fs)
    for page in range(0, 250, 3):
        fs.write(ino, page * PAGE, bytes([page + 1]) * PAGE)
    resize(fs, ino, 3 * MIB)
    expected = bytearray(3 * MIB)
    for page in range(0, 250, 3):
        expected[page * PAGE : (page + 1) * PAGE] = bytes([page + 1]) * PAGE
    assert contents(fs, ino) == expected
    assert len(fs.extents(ino)) == 1


@pytest.mark.parametrize("size", [PAGE + 1, MIB + 17, 3 * MIB + 5, 4 * MIB, 5 * MIB - 1])
@pytest.mark.parametrize("full", [300_000, 6 * MIB])
def test_cut_bytes_read_as_zeros_later(fs: FileSystem, size: int, full: int) -> None:
    if size >= full:
        size = size % full // 3
    data = noise(full)
    ino = make(fs, content=data)
    resize(fs, ino, size)
    resize(fs, ino, full)
    assert contents(fs, ino) == data[:size] + bytes(full - size)
    fs = remount(fs)
    assert contents(fs, ino) == data[:size] + bytes(full - size)


def test_cut_bytes_are_zero_also_below_a_write_beyond_the_end(fs: FileSystem) -> None:
    ino = make(fs, content=noise(3 * MIB))
    resize(fs, ino, 10)
    fs.write(ino, MIB, b"end")
    assert contents(fs, ino) == noise(10) + bytes(MIB - 10) + b"end"


def test_shrinking_gives_space_back_and_growing_takes_it(fs: FileSystem) -> None:
    ino = make(fs)
    resize(fs, ino, 20 * MIB)
    free = fs.statfs().free
    resize(fs, ino, 10 * MIB)
    assert fs.statfs().free == free + 10 * MIB // PAGE
    resize(fs, ino, 20 * MIB)
    assert fs.statfs().free == free
    resize(fs, ino, 0)
    assert fs.inode(ino).data_pages == 0
    assert fs.extents(ino) == []


def test_no_space_leaves_nothing_half_done(fs: FileSystem) -> None:
    ino = make(fs, content=noise(3 * MIB))
    other = make(fs, b"g", noise(PAGE))
    free = fs.statfs().free
    for ask in (
        lambda: fs.setattr(ino, size=GIB),
        lambda: fs.setattr(ino, size=MAX_FILE_BYTES - BLOCK),
        lambda: fs.setattr(other, size=GIB, mode=0o777),
        lambda: fs.fallocate(ino, 0, 2 * MIB, GIB),
        lambda: fs.fallocate(ino, KEEP_SIZE, GIB, GIB),
    ):
        with pytest.raises(NoSpaceError):
            fs.run(ask)
        assert fs.inode(ino).size == 3 * MIB
        assert fs.statfs().free == free or fs.inode(other).data_pages == 512
        assert contents(fs, ino) == noise(3 * MIB)
        assert contents(fs, other) == noise(PAGE)
        assert fs.inode(other).mode == REG
        assert_clean(fs.region)


def test_zeroing_needed_leaves_nothing_half_done(fs: FileSystem) -> None:
    ino = make(fs)
    resize(fs, ino, 40 * MIB)
    for offset in range(0, 40 * MIB, MIB):
        fs.write(ino, offset, b"\xaa" * MIB)
    fs.unlink(ROOT, b"f")
    ino = make(fs, content=b"abc")
    free = fs.statfs().free
    with pytest.raises(ZeroingNeeded):
        fs.setattr(ino, size=50 * MIB)
    assert fs.inode(ino).size == 3
    assert fs.statfs().free in (free, free - 511)  # it may have moved into a block
    resize(fs, ino, 50 * MIB)
    assert contents(fs, ino) == b"abc" + bytes(50 * MIB - 3)


def test_a_full_region_is_usable_and_empties_again(fs: FileSystem) -> None:
    def fill() -> list[bytes]:
        made = []

        def one(i: int) -> None:
            name = b"%d" % i
            ino = fs.create(ROOT, name, REG, 0, 0).ino
            made.append(name)
            fs.run(lambda: fs.write(ino, 0, noise(1 << 18, i)))

        until_full(one)
        return made

    def empty(made: list[bytes]) -> None:
        for name in made:
            assert fs.lookup(ROOT, name)
            fs.unlink(ROOT, name)

    start = fs.statfs().free
    made = fill()
    assert sum(fs.lookup(ROOT, name).size for name in made) > 55 * MIB
    for name in random.Random(2).sample(made[:-1], 10):
        assert contents(fs, fs.lookup(ROOT, name).ino) == noise(1 << 18, int(name))
    assert_clean(fs.region)
    # A full file system can still be changed, and emptied.
    fs.setattr(ROOT, mode=0o700)
    fs.rename(ROOT, made[0], ROOT, b"other")
    fs.rename(ROOT, b"other", ROOT, made[0])
    empty(made)
    after = fs.statfs().free
    assert start - 40 < after <= start  # inode pages stay, and the maps of their blocks
    for _ in range(3):
        empty(fill())
        assert fs.statfs().free == after
    ino = make(fs)
    resize(fs, ino, 54 * MIB)


def test_the_last_pages_of_a_full_region_are_found(fs: FileSystem) -> None:
    make(fs, b"small", b"x")
    big = make(fs, b"big")
    resize(fs, big, fs.super.blocks.free_blocks * BLOCK)
    free = fs.statfs().free
    assert 0 < free < 1022
    assert until_full(lambda i: make(fs, b"s%d" % i, b"y" * PAGE)) > free - 100
    assert fs.statfs().free <= 16


def test_statfs_adds_up(fs: FileSystem) -> None:
    def overhead() -> int:
        s = fs.statfs()
        return s.blocks - s.free - held(fs)

    assert fs.statfs().blocks == (64 * MIB - 2 * BLOCK) // PAGE
    ino = make(fs)
    before = overhead()
    for size in (0, 100, 10 * MIB, 3 * MIB + 5, 3 * MIB, 20 * MIB, 0):
        resize(fs, ino, size)
        assert overhead() - before in (0, 1)  # at most the map of the first block of data pages
    fs.write(ino, 17 * MIB, b"x")
    assert overhead() - before in (0, 1)
    used = fs.statfs().files - fs.statfs().free_files
    for i in range(40):
        make(fs, b"%d" % i)
    assert fs.statfs().files - fs.statfs().free_files == used + 40
    said = fs.statfs()
    assert remount(fs).statfs() == said


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


def _fragmented(fs: FileSystem, pieces: int) -> int:
    """A file of as many extents, made by filling every second free page of a full region."""
    ino = make(fs, b"victim")
    small = []
    filler = make(fs, b"filler")
    resize(fs, filler, (fs.super.blocks.free_blocks - 2 * pieces // 512 - 3) * BLOCK)
    for i in range(2 * pieces):
        small.append(b"s%d" % i)
        make(fs, small[-1], b"s")
    rest = make(fs, b"rest")
    until_full(lambda i: fs.write(rest, i * PAGE, b"r"))
    for name in small[::2]:
        fs.unlink(ROOT, name)
    return ino


@pytest.mark.parametrize("how", ["unlink", "truncate", "punch", "rename", "close"])
def test_freeing_more_extents_than_a_transaction_holds(fs: FileSystem, how: str) -> None:
    ino = _fragmented(fs, 1_500)
    until_full(lambda i: fs.write(ino, (8 + i) * PAGE, b"v" * PAGE))
    extents = fs.extents(ino)
    assert len(extents) > 500  # more than one transaction frees
    free, pages = fs.statfs().free, fs.inode(ino).data_pages
    if how == "unlink":
        fs.unlink(ROOT, b"victim")
    elif how == "truncate":
        fs.setattr(ino, size=0)
    elif how == "punch":
        fs.fallocate(ino, PUNCH, 0, fs.inode(ino).size)
        assert not any(contents(fs, ino))
    elif how == "rename":
        fs.rename(ROOT, b"rest", ROOT, b"victim")
    else:
        fs.open(ino)
        fs.unlink(ROOT, b"victim")
        assert bytes(fs.read(ino, 100 * PAGE, 4)) == b"vvvv"
        fs.release(ino)
    assert fs.statfs().free >= free + pages


# ------------------------------------------------------------------------------ punch, zero, seek


def seek_map(fs: FileSystem, ino: int) -> list[tuple[int, int]]:
    """``(start, end)`` of the data."""
    found, at, size = [], 0, fs.inode(ino).size
    while at < size:
        try:
            start = fs.seek(ino, at, os.SEEK_DATA)
        except NoSuchAddressError:
            break
        at = fs.seek(ino, start, os.SEEK_HOLE)
        found.append((start, at))
    return found


@pytest.mark.parametrize("size", [40 * PAGE, 9 * MIB])
def test_punch_at_every_edge(fs: FileSystem, size: int) -> None:
    unit = PAGE if size < MIB else BLOCK
    data = noise(size)
    ino = make(fs, content=data)
    expected = bytearray(data)
    for start, end in (
        (1, 2),
        (unit, 2 * unit),
        (2 * unit - 1, 3 * unit + 1),
        (size - 1, size),
        (size - unit, size + 5 * unit),
        (size, size + unit),
        (size + 10 * unit, size + 20 * unit),
        (0, 1),
    ):
        fs.fallocate(ino, PUNCH, start, end - start)
        if start < size:
            expected[start : min(end, size)] = bytes(min(end, size) - start)
        assert contents(fs, ino) == expected, (start, end)
        assert fs.inode(ino).size == size
        assert_clean(fs.region)
    assert seek_map(fs, ino)[0] == (0, unit)  # the second unit is gone
    fs.fallocate(ino, PUNCH, 0, size)
    assert fs.inode(ino).data_pages == 0
    assert seek_map(fs, ino) == []
    assert not any(contents(fs, ino))
    fs.write(ino, size - 5, b"again")
    assert contents(fs, ino) == bytes(size - 5) + b"again"


def test_a_punched_hole_never_shows_old_bytes(fs: FileSystem) -> None:
    ino = make(fs, content=b"\xaa" * (8 * MIB))
    for i in range(4):
        fs.fallocate(ino, PUNCH, i * BLOCK, BLOCK)
    for i in range(4):
        fs.write(ino, i * BLOCK + 7, b"b")
    expected = bytearray(8 * MIB)
    for i in range(4):
        expected[i * BLOCK + 7] = ord("b")
    assert contents(fs, ino) == expected


def test_fallocate_and_its_sizes(fs: FileSystem) -> None:
    ino = make(fs, content=b"abc")
    fs.fallocate(ino, KEEP_SIZE, 0, 5 * MIB)
    assert fs.inode(ino).size == 3
    assert fs.inode(ino).data_pages == 3 * 512
    assert fs.extents(ino)[0].length == PAGE
    fs.fallocate(ino, 0, 0, 4 * MIB)
    assert contents(fs, ino) == b"abc" + bytes(4 * MIB - 3)
    fs.fallocate(ino, ZERO_RANGE | KEEP_SIZE, 1, 20 * MIB)
    assert contents(fs, ino) == b"a" + bytes(4 * MIB - 1)
    fs.fallocate(ino, ZERO_RANGE, 0, 5 * MIB + 1)
    assert fs.inode(ino).size == 5 * MIB + 1
    assert not any(contents(fs, ino))
    resize(fs, ino, 5 * MIB + 1)
    assert fs.inode(ino).data_pages == 3 * 512


def test_fallocate_refuses(fs: FileSystem) -> None:
    ino = make(fs)
    directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    for mode, offset, length, error in (
        (2, 0, 1, NotSupportedError),
        (8, 0, 1, NotSupportedError),
        (32, 0, 1, NotSupportedError),
        (64, 0, 1, NotSupportedError),
        (0, 0, 0, InvalidError),
        (0, -1, 5, InvalidError),
        (0, 0, -5, InvalidError),
        (0, MAX_FILE_BYTES - 5, 5, TooBigError),
        (PUNCH, 1 << 62, 1 << 62, TooBigError),
    ):
        with pytest.raises(error):
            fs.fallocate(ino, mode, offset, length)
    with pytest.raises(PkernfsError):
        fs.fallocate(directory, 0, 0, 1)
    assert fs.inode(ino).size == 0


def test_zero_range_in_steps_leaves_room_for_others(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps the cache may let the inode go, and the file may be changed."""
    ino = make(fs, content=noise(16 * MIB))
    steps = fs.fallocate_steps(ino, ZERO_RANGE | KEEP_SIZE, 0, 16 * MIB)
    next(steps)
    monkeypatch.setattr(inodes_module, "_MAX_CACHED", 1)
    for i in range(5):
        make(fs, b"%d" % i)
        fs.lookup(ROOT, b"%d" % i)
    fs.write(ino, 20 * MIB, b"longer")
    fs.setattr(ino, uid=7)
    for _ in steps:
        pass
    assert fs.inode(ino).size == 20 * MIB + 6
    assert fs.inode(ino).uid == 7
    assert contents(fs, ino) == bytes(20 * MIB) + b"longer"


def test_zero_range_in_steps_does_not_bring_a_size_back(fs: FileSystem) -> None:
    ino = make(fs, content=noise(16 * MIB))
    steps = fs.fallocate_steps(ino, ZERO_RANGE | KEEP_SIZE, 0, 16 * MIB)
    next(steps)
    resize(fs, ino, 5)
    for _ in steps:
        pass
    assert fs.inode(ino).size == 5


def test_zero_range_of_a_file_without_a_name(fs: FileSystem) -> None:
    ino = make(fs, content=noise(16 * MIB))
    fs.open(ino)
    steps = fs.fallocate_steps(ino, ZERO_RANGE | KEEP_SIZE, 0, 16 * MIB)
    next(steps)
    fs.unlink(ROOT, b"f")
    other = make(fs, b"g", b"new")
    for _ in steps:
        pass
    assert not any(contents(fs, ino))
    fs.release(ino)
    assert contents(fs, other) == b"new"


def test_seek(fs: FileSystem) -> None:
    ino = make(fs)
    with pytest.raises(NoSuchAddressError):
        fs.seek(ino, 0, os.SEEK_DATA)
    with pytest.raises(NoSuchAddressError):
        fs.seek(ino, 0, os.SEEK_HOLE)
    fs.write(ino, 10 * PAGE, b"x")
    assert fs.seek(ino, 0, os.SEEK_HOLE) == 0
    assert fs.seek(ino, 0, os.SEEK_DATA) == 10 * PAGE
    assert fs.seek(ino, 10 * PAGE, os.SEEK_HOLE) == 10 * PAGE + 1  # the end is a hole
    fs.write(ino, 5 * PAGE, b"y" * (2 * PAGE))
    assert seek_map(fs, ino) == [(5 * PAGE, 7 * PAGE), (10 * PAGE, 10 * PAGE + 1)]
    assert fs.seek(ino, 6 * PAGE + 9, os.SEEK_DATA) == 6 * PAGE + 9
    assert fs.seek(ino, 6 * PAGE + 9, os.SEEK_HOLE) == 7 * PAGE
    assert fs.seek(ino, 7 * PAGE, os.SEEK_DATA) == 10 * PAGE
    for offset in (-1, 10 * PAGE + 1, 1 << 62):
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with pytest.raises(NoSuchAddressError):
                fs.seek(ino, offset, whence)
    with pytest.raises(InvalidError):
        fs.seek(ino, 0, os.SEEK_SET)
    resize(fs, ino, 20 * PAGE)
    resize(fs, ino, 3 * PAGE)
    with pytest.raises(NoSuchAddressError):
        fs.seek(ino, 0, os.SEEK_DATA)


def test_reads_at_every_edge(fs: FileSystem) -> None:
    data = noise(2 * PAGE + 100)
    ino = make(fs, content=data)
    for offset in (0, 1, PAGE - 1, PAGE, 2 * PAGE + 99, 2 * PAGE + 100, 1 << 40):
        for length in (0, 1, PAGE, 10 * PAGE):
            assert bytes(fs.read(ino, offset, length)) == data[offset : offset + length]
    with pytest.raises(IsDirError):
        fs.read(ROOT, 0, 1)


def test_writes_that_cannot_be(fs: FileSystem) -> None:
    ino = make(fs)
    for offset in (-1, MAX_FILE_BYTES, MAX_FILE_BYTES - BLOCK):
        with pytest.raises(TooBigError):
            fs.write(ino, offset, b"x")
    with pytest.raises(NoSpaceError):
        fs.run(lambda: fs.write(ino, 0, bytes(63 * MIB)))
    assert fs.inode(ino).size == 0
    assert fs.write(ino, 5, b"") == 0
    assert fs.inode(ino).size == 0
    with pytest.raises(IsDirError):
        fs.write(ROOT, 0, b"x")


@pytest.mark.parametrize("end", [1 << 40, MAX_FILE_BYTES - BLOCK])
def test_far_offsets(fs: FileSystem, end: int) -> None:
    ino = make(fs)
    fs.write(ino, end - 9, b"far away")
    assert fs.inode(ino).size == end - 1
    assert fs.inode(ino).data_pages == 512
    assert bytes(fs.read(ino, end - 10, 100)) == b"\0far away"
    assert fs.seek(ino, 0, os.SEEK_DATA) == (end - 9) // BLOCK * BLOCK
    fs.fallocate(ino, PUNCH, 0, end)
    assert fs.inode(ino).data_pages == 0
    resize(fs, ino, 0)


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
    assert fs.lookup(ROOT, b"..").ino == ROOT
    directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    assert fs.lookup(directory, b"..").ino == ROOT
    with pytest.raises(NotDirError):
        fs.lookup(ino, b"x")
    with pytest.raises(NotFoundError):
        fs.lookup(ROOT, b"none")
    with pytest.raises(NotFoundError):
        fs.inode(12345)
    with pytest.raises(NotFoundError):
        fs.inode(16)


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
    if flags == 1:
        return errno.EEXIST
    source_dir, target_dir = source in ("empty", "full"), target in ("empty", "full")
    if source_dir and not target_dir:
        return errno.ENOTDIR
    if target_dir and not source_dir:
        return errno.EISDIR
    return errno.ENOTEMPTY if target == "full" else 0


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("flags", [0, 1, 2])
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
    for flags in (3, 4, 8, -1):
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


def test_times(fs: FileSystem) -> None:
    ino = make(fs)
    lowest, highest = -(1 << 63), (1 << 63) - 1
    for asked, kept in (
        (0, 0),
        (-1, -1),
        (-(10**18), -(10**18)),
        (lowest, lowest),
        (highest, highest),
        (highest + 1, highest),  # 2262
        (10**20, highest),
        (-(10**20), lowest),
    ):
        fs.setattr(ino, atime=asked, mtime=asked)
        assert (fs.inode(ino).atime, fs.inode(ino).mtime) == (kept, kept)
        again = remount(fs).inode(ino)
        assert (again.atime, again.mtime) == (kept, kept)
        fs.region.read(0, 1)


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
    def mode(after: Callable[[int], object], before: int) -> int:
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


# ------------------------------------------------------------------------------ attributes


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 4032, 4033, 65535, 65536])
def test_attribute_values(fs: FileSystem, length: int) -> None:
    ino = make(fs)
    free = fs.statfs().free
    value = noise(length)
    fs.setxattr(ino, b"user.x", value)
    fs.setxattr(ino, b"trusted." + b"n" * 247, value)
    assert fs.getxattr(ino, b"user.x") == value
    again = remount(fs)
    assert again.getxattr(ino, b"trusted." + b"n" * 247) == value
    again.setxattr(ino, b"user.x", b"short")
    assert again.getxattr(ino, b"user.x") == b"short"
    for name in again.listxattr(ino):
        again.removexattr(ino, name)
    assert again.listxattr(ino) == []
    assert again.statfs().free >= free
    again.setxattr(ino, b"security.y", value)
    again.unlink(ROOT, b"f")
    assert again.statfs().free >= free


def test_many_attributes(fs: FileSystem) -> None:
    ino = make(fs)
    model = {b"user.%d" % i: noise(i % 700, i) for i in range(1_000)}
    for name, value in model.items():
        fs.setxattr(ino, name, value)
    assert sorted(fs.listxattr(ino)) == sorted(model)
    fs = remount(fs)
    assert {name: fs.getxattr(ino, name) for name in fs.listxattr(ino)} == model


def test_attributes_that_cannot_be(fs: FileSystem) -> None:
    ino = make(fs)
    with pytest.raises(NoDataError):
        fs.getxattr(ino, b"user.x")
    with pytest.raises(NoDataError):
        fs.removexattr(ino, b"user.x")
    with pytest.raises(NoDataError):
        fs.setxattr(ino, b"user.x", b"", os.XATTR_REPLACE)
    fs.setxattr(ino, b"user.x", b"1", os.XATTR_CREATE)
    with pytest.raises(ExistsError):
        fs.setxattr(ino, b"user.x", b"2", os.XATTR_CREATE)
    fs.setxattr(ino, b"user.x", b"3", os.XATTR_REPLACE)
    with pytest.raises(NotSupportedError):
        fs.setxattr(ino, b"system.posix_acl_access", b"")
    with pytest.raises(InvalidError):
        fs.setxattr(ino, b"user.", b"")
    with pytest.raises(RangeTooSmallError):
        fs.setxattr(ino, b"user." + b"n" * 251, b"")
    with pytest.raises(ArgumentTooLongError):
        fs.setxattr(ino, b"user.x", bytes(65537))
    assert fs.listxattr(ino) == [b"user.x"]
    assert fs.getxattr(ino, b"user.x") == b"3"


def test_an_attribute_without_space_leaves_the_old_one(fs: FileSystem) -> None:
    ino = make(fs)
    fs.setxattr(ino, b"user.x", b"old")
    resize(fs, make(fs, b"big"), fs.super.blocks.free_blocks * BLOCK)
    count = until_full(lambda i: fs.setxattr(ino, b"user.%d" % i, noise(65536)))
    kept = [b"user.%d" % i for i in range(count)]
    with pytest.raises(NoSpaceError):
        fs.setxattr(ino, b"user.x", noise(65536))
    assert fs.getxattr(ino, b"user.x") == b"old"
    assert sorted(fs.listxattr(ino)) == sorted([*kept, b"user.x"])
    for name in kept:
        fs.removexattr(ino, name)
    fs.setxattr(ino, b"user.x", noise(65536))


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
    """open(2) looks up first. If the name goes in between, ESTALE makes the kernel look again."""
    ino = make(fs, content=noise(3 * MIB))
    fs.remember(ino)
    free = fs.statfs().free
    fs.unlink(ROOT, b"f")
    assert fs.statfs().free > free
    with pytest.raises(StaleError):
        fs.open(ino)
    fs.forget(ino, 1)
    with pytest.raises(NotFoundError):
        fs.inode(ino)


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


def test_numbers_are_used_again_with_another_generation(fs: FileSystem) -> None:
    seen: dict[int, set[int]] = {}
    for i in range(100):
        inode = fs.create(ROOT, b"f%d" % i, REG, 0, 0)
        assert inode.generation not in seen.setdefault(inode.ino, set())
        seen[inode.ino].add(inode.generation)
        fs.unlink(ROOT, b"f%d" % i)
    assert len(seen) < 16
    assert not any(ino % 16 == 0 for ino in seen)


def test_forgetting_is_counted(fs: FileSystem) -> None:
    ino = make(fs)
    fs.remember(ino, 3)
    fs.unlink(ROOT, b"f")
    fs.forget(ino, 2)
    assert fs.inode(ino).nlink == 0
    fs.forget(ino, 1)
    with pytest.raises(NotFoundError):
        fs.inode(ino)


def test_the_inode_cache_may_forget_anything(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inodes_module, "_MAX_CACHED", 10)
    for i in range(200):
        ino = make(fs, b"%d" % i, b"%d" % i)
        fs.setattr(ino, mode=0o600, uid=i)
        fs.lookup(ROOT, b"%d" % (i // 2))
    for i in range(200):
        inode: Inode = fs.lookup(ROOT, b"%d" % i)
        assert (inode.uid, contents(fs, inode.ino)) == (i, b"%d" % i)


# ------------------------------------------------------------------------------ mounting


def test_read_only_changes_nothing(fs: FileSystem) -> None:
    ino = make(fs, content=b"abc")
    fs.setattr(ino, atime=1, mtime=2)
    before = fs.region.read(0, fs.region.size)
    frozen = mount_filesystem(fs.region, read_only=True)
    assert contents(frozen, ino) == b"abc"
    attempts: tuple[Callable[[], object], ...] = (
        lambda: make(frozen, b"g"),
        lambda: frozen.mkdir(ROOT, b"d", 0o755, 0, 0),
        lambda: frozen.symlink(ROOT, b"s", b"t", 0, 0),
        lambda: frozen.link(ino, ROOT, b"l"),
        lambda: frozen.unlink(ROOT, b"f"),
        lambda: frozen.rmdir(ROOT, b"iommu"),
        lambda: frozen.rename(ROOT, b"f", ROOT, b"g"),
        lambda: frozen.write(ino, 0, b"x"),
        lambda: frozen.setattr(ino, mode=0),
        lambda: frozen.fallocate(ino, 0, 0, 1),
        lambda: frozen.setxattr(ino, b"user.x", b""),
        lambda: frozen.removexattr(ino, b"user.x"),
    )
    for attempt in attempts:
        with pytest.raises(ReadOnlyError):
            attempt()
    assert frozen.next_dirty(BLOCK) is None
    frozen.open(ino)
    frozen.release(ino)
    frozen.unmount()
    assert fs.region.read(0, fs.region.size) == before


def test_what_fails_while_frozen_is_not_thawed(fs: FileSystem) -> None:
    """A unit that does not obey as a handover detaches a device may still reach what it did."""
    fs.freeze()
    fs.fail("a unit does not obey")
    fs.thaw()
    assert fs.read_only
    assert not fs.frozen
    with pytest.raises(ReadOnlyError, match="read-only file system"):
        make(fs, b"g")
    with pytest.raises(ReadOnlyError):
        fs.freeze()


def test_after_a_failure_nothing_is_written(fs: FileSystem) -> None:
    ino = make(fs, content=b"abc")
    fs.fail("a test")
    with pytest.raises(ReadOnlyError):
        fs.write(ino, 0, b"x")
    assert contents(fs, ino) == b"abc"
    fs.unmount()


@pytest.mark.parametrize("size", [8 * MIB, 8 * MIB + PAGE, 10 * MIB - PAGE, 22 * GIB, 11 << 40])
def test_regions_of_any_size(size: int) -> None:
    with MemoryFile(size) as memory:
        with memory.open() as region:
            make_filesystem(region)
            fs = mount_filesystem(region)
            ino = make(fs, content=b"abc")
            if size > GIB:
                fs.setattr(ino, size=size // GIB * GIB - GIB)
                assert len(fs.extents(ino)) == 1
                assert bytes(fs.read(ino, 0, 4)) == b"abc\0"
            fs.unmount()
        with memory.open() as region:
            fs = mount_filesystem(region)
            assert bytes(fs.read(ino, 0, 3)) == b"abc"
            if size < 23 * GIB:
                assert_clean(region)


def test_what_is_no_file_system_is_refused() -> None:
    with MemoryFile(16 * MIB) as memory, memory.open() as region:
        with pytest.raises(FormatError):
            mount_filesystem(region)
        region.copy_in(0, random.Random(1).randbytes(16 * MIB))
        with pytest.raises(FormatError):
            mount_filesystem(region)
