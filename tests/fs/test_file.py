"""Data and sizes of files, at their edges. The model-based tests go through the combinations."""

from __future__ import annotations

import os

import pytest

from pkernfs.errors import (
    InvalidError,
    IsDirError,
    NoSpaceError,
    NoSuchAddressError,
    NotSupportedError,
    PkernfsError,
    TooBigError,
    ZeroingNeeded,
)
from pkernfs.fs import inodes as inodes_module
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import BLOCK, MAX_FILE_BYTES, PAGE
from pkernfs.quantities import Ino
from support.checking import assert_clean
from support.files import (
    GIB,
    KEEP_SIZE,
    MIB,
    PUNCH,
    REG,
    ROOT,
    ZERO_RANGE,
    contents,
    in_a_gib,
    make,
    noise,
    remount,
    resize,
)

# ------------------------------------------------------------------------------ space


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


@pytest.mark.slow("a gigabyte is written")
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
    free, capacity = fs.statfs().free, fs.statfs().blocks * PAGE
    for ask in (
        lambda: fs.setattr(ino, size=capacity),
        lambda: fs.setattr(other, size=capacity, mode=0o777),
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


# ------------------------------------------------------------------------------ punch, zero, seek


def seek_map(fs: FileSystem, ino: Ino) -> list[tuple[int, int]]:
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


def test_a_length_that_no_state_could_hold_is_too_big(fs: FileSystem) -> None:
    """pjdfstest, truncate/12: EFBIG, for to free something would not help. Else it is ENOSPC."""
    ino = make(fs, content=b"abc")
    capacity = fs.statfs().blocks * PAGE
    for size in (capacity + 4, GIB, 999_999_999_999_999, MAX_FILE_BYTES - BLOCK):
        with pytest.raises(
            TooBigError, match=f"size {size}: the file system holds {capacity} bytes"
        ):
            fs.setattr(ino, size=size)
    with pytest.raises(NoSpaceError):
        fs.run(lambda: fs.setattr(ino, size=capacity + 3))
    fs.write(ino, GIB, b"sparse")
    resize(fs, ino, GIB + PAGE)
    assert fs.inode(ino).size == GIB + PAGE


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
