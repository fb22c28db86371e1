"""Space as it runs out and comes back, and who may change a file system."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import InvalidError, ReadOnlyError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.super import Access
from pkernfs.layout import BLOCK, PAGE, STATE_FLAG_ERROR
from pkernfs.quantities import RegionOff
from support.checking import assert_clean
from support.files import (
    MIB,
    REG,
    ROOT,
    contents,
    held,
    in_a_gib,
    make,
    names,
    noise,
    remount,
    resize,
    until_full,
)

# ------------------------------------------------------------------------------ space


@pytest.mark.slow("10,000 files are made")
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


@pytest.mark.slow("a region is filled twice, page by page")
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


# ------------------------------------------------------------------------------ mounting


def test_read_only_changes_nothing(fs: FileSystem) -> None:
    ino = make(fs, content=b"abc")
    fs.setattr(ino, atime=1, mtime=2)
    before = fs.region.read(RegionOff(0), fs.region.size)
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
    assert fs.region.read(RegionOff(0), fs.region.size) == before


def test_after_a_failure_nothing_is_written(fs: FileSystem) -> None:
    ino = make(fs, content=b"abc")
    fs.fail("a test")
    with pytest.raises(ReadOnlyError):
        fs.write(ino, 0, b"x")
    assert contents(fs, ino) == b"abc"
    fs.unmount()


# ------------------------------------------------------------------------------ access


def test_a_freeze_and_its_end(fs: FileSystem) -> None:
    state = fs.super
    with pytest.raises(InvalidError, match="not frozen"), state.handing_over():
        pass
    fs.freeze()
    assert (state.access, fs.read_only, fs.frozen) == (Access.FROZEN, True, True)
    with state.handing_over():
        assert (state.access, fs.read_only, fs.frozen) == (Access.HANDING_OVER, False, True)
        with pytest.raises(ReadOnlyError, match="frozen"):  # the handover's changes only
            fs.mkdir(ROOT, b"d", 0o755, 0, 0)
    assert state.access is Access.FROZEN
    with pytest.raises(ReadOnlyError, match="frozen"):
        fs.freeze()
    fs.thaw()
    assert (state.access, fs.read_only, fs.frozen) == (Access.WRITABLE, False, False)
    with pytest.raises(InvalidError, match="no handover to undo"):
        fs.thaw()


@pytest.mark.parametrize("handing_over", [False, True])
def test_a_failure_while_frozen(fs: FileSystem, handing_over: bool) -> None:
    """It is noted in the region as soon as something may be stored there."""
    state = fs.super
    fs.freeze()
    if handing_over:
        with state.handing_over():
            fs.fail("first")
            assert fs.read_only
    else:
        fs.fail("first")
    fs.fail("second")
    assert bool(state.state().flags & STATE_FLAG_ERROR) is handing_over
    assert (state.access, state.failure) == (Access.FROZEN_FAILED, "first")
    fs.thaw()
    assert (state.access, state.failure) == (Access.FAILED, "first")
    assert state.state().flags & STATE_FLAG_ERROR
    assert not fs.frozen
    with pytest.raises(ReadOnlyError, match="read-only"):
        fs.freeze()
