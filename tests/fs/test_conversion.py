"""Files that have data get a segment or lose theirs, on a pool in memory."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    BusyError,
    InvalidError,
    NoSpaceError,
    NotSupportedError,
    PermissionDeniedError,
    PkernfsError,
    ReadOnlyError,
    RegionError,
    WorkNeeded,
    ZeroingNeeded,
)
from pkernfs.fs import mkfs
from pkernfs.fs.file import FALLOC_KEEP_SIZE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import (
    INODE_FLAG_BODY,
    INODE_FLAG_SEGMENT_OFF,
    INODE_FLAG_SEGMENT_ON,
    IOMMU_INO,
    PAGE,
    ROOT_INO,
)
from pkernfs.pool.pool import Owner
from pkernfs.quantities import Ino, RegionOff, SegmentNo
from pkernfs.region import trace
from pkernfs.region.region import Region
from pkernfs.region.trace import Store
from support.checking import assert_clean
from support.crash import Replay, cut, is_metadata
from support.memory_pool import POOL, MemoryPool

MIB = 1 << 20
REG = stat.S_IFREG | 0o640


@pytest.fixture
def pool() -> Iterator[MemoryPool]:
    with MemoryPool() as pool:
        yield pool


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(32 * MIB) as region:
        mkfs.make_filesystem(region, pool=POOL)
        yield region


@pytest.fixture
def fs(region: Region, pool: MemoryPool) -> Iterator[FileSystem]:
    yield mount(region, pool)
    assert_clean(region)


def mount(region: Region, pool: MemoryPool) -> FileSystem:
    return mount_filesystem(region, open_pool=pool.opener())


def make(fs: FileSystem, data: bytes = b"", size: int = 0, name: bytes = b"f") -> Ino:
    ino = fs.create(ROOT_INO, name, REG, 3, 4).ino
    fs.run(lambda: fs.setattr(ino, size=size))
    fs.run(lambda: fs.write(ino, 0, data))
    return ino


def on(fs: FileSystem, ino: Ino) -> None:
    fs.run(lambda: fs.conversions.on(ino))


def off(fs: FileSystem, ino: Ino) -> None:
    fs.run(lambda: fs.conversions.off(ino))


def works(fs: FileSystem, operation: Callable[[], None]) -> Iterator[None]:
    """Run an operation as a session does, in turns at the pool; stop after each piece of work."""
    while True:
        try:
            operation()
            return
        except ZeroingNeeded as e:
            zero(fs, e)
        except WorkNeeded:
            with fs.segments.turn() as call:
                try:
                    yield from turn(lambda: call(operation))
                    return
                except ZeroingNeeded as e:
                    reason = e
            zero(fs, reason)


def turn(operation: Callable[[], None]) -> Iterator[None]:
    while True:
        try:
            operation()
            return
        except WorkNeeded as e:
            e.work()
            yield


def zero(fs: FileSystem, need: ZeroingNeeded) -> None:
    isolated = fs.isolate_for_zeroing(need.blocks)
    for offset, length in isolated.pieces():
        fs.region.zero(offset, length)
    fs.finish_zeroing(isolated)


DATA = os.urandom(5 * MIB + 123)


def test_on_copies_the_bytes_and_frees_the_blocks(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, DATA)
    before = fs.super.statfs().free
    on(fs, ino)
    row = fs.segments.find(ino)
    assert row is not None
    assert pool.bytes(row.number) == DATA + bytes(6 * MIB - len(DATA))
    assert pool.owners[row.number] == Owner(3, 4, 0o640)
    assert bytes(fs.read(ino, 0, 6 * MIB)) == DATA
    assert fs.stat(ino).data_pages == 6 * MIB // PAGE
    assert fs.super.statfs().free > before + 5 * MIB // PAGE
    assert fs.inode(ino).flags & INODE_FLAG_SEGMENT_ON
    assert not fs.conversions.under_way


def test_off_copies_the_bytes_and_ends_the_segment(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, DATA, 5 * MIB)
    assert fs.segments.find(ino) is not None
    numbers = sorted(fs.numbers())
    off(fs, ino)
    assert fs.segments.find(ino) is None
    fs.segments.reap()
    assert not pool.memories
    assert bytes(fs.read(ino, 0, 6 * MIB)) == DATA
    assert fs.stat(ino).data_pages == 6 * MIB // PAGE
    assert fs.inode(ino).flags & INODE_FLAG_SEGMENT_OFF
    assert sorted(fs.numbers()) == numbers


@pytest.mark.parametrize("size", [1, PAGE, 70_000, 2 * MIB, 5 * MIB + 1])
def test_there_and_back(region: Region, pool: MemoryPool, fs: FileSystem, size: int) -> None:
    ino = make(fs, DATA[:size])
    for _ in range(2):
        on(fs, ino)
        assert bytes(fs.read(ino, 0, size + 1)) == DATA[:size]
        off(fs, ino)
        assert bytes(fs.read(ino, 0, size + 1)) == DATA[:size]
    fs.run(lambda: fs.setattr(ino, size=size + 3 * MIB))
    assert bytes(fs.read(ino, size, 3 * MIB)) == bytes(3 * MIB)
    fs.unmount()
    again = mount(region, pool)
    assert bytes(again.read(ino, 0, size)) == DATA[:size]


def test_holes_stay_zeros(fs: FileSystem) -> None:
    ino = make(fs)
    fs.run(lambda: fs.write(ino, 3 * MIB, b"x"))
    fs.run(lambda: fs.write(ino, 100, b"y"))
    on(fs, ino)
    wanted = bytes(100) + b"y" + bytes(3 * MIB - 101) + b"x"
    assert bytes(fs.read(ino, 0, 4 * MIB)) == wanted
    off(fs, ino)
    assert bytes(fs.read(ino, 0, 4 * MIB)) == wanted


def test_many_extents_are_moved(fs: FileSystem) -> None:
    """More than fit into the inode: every other block is somebody else's."""
    ino = make(fs, DATA, 12 * MIB)
    others = []
    with contextlib.suppress(NoSpaceError):
        for i in range(16):
            make(fs, b"x" * (MIB + 1), name=b"%d" % i)
            others.append(i)
    for i in others[::2]:
        fs.unlink(ROOT_INO, b"%d" % i)
    off(fs, ino)
    assert fs.inode(ino).flags & INODE_FLAG_BODY
    assert bytes(fs.read(ino, 0, len(DATA))) == DATA
    on(fs, ino)
    assert bytes(fs.read(ino, 0, len(DATA))) == DATA


def test_what_is_preallocated_goes_along(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, b"abc")
    fs.run(lambda: fs.fallocate(ino, FALLOC_KEEP_SIZE, 0, 100_000))
    on(fs, ino)
    assert bytes(fs.read(ino, 0, 10)) == b"abc"
    off(fs, ino)
    assert bytes(fs.read(ino, 0, 10)) == b"abc"


def test_an_empty_file_only_says_what_it_wants(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs)
    on(fs, ino)
    assert not pool.memories
    fs.run(lambda: fs.setattr(ino, size=10))
    assert fs.segments.find(ino) is not None
    on(fs, ino)  # it has one
    fs.run(lambda: fs.setattr(ino, size=0))
    off(fs, ino)
    fs.run(lambda: fs.setattr(ino, size=4 * MIB))
    assert fs.segments.find(ino) is None


def test_full_pools_change_nothing(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, DATA)
    pool.total = 4 * MIB
    with pytest.raises(NoSpaceError, match="largest piece"):
        on(fs, ino)
    assert not fs.segments.table.rows
    pool.total = 64 * MIB
    big = make(fs, DATA, 40 * MIB, name=b"big")
    row = fs.segments.find(big)
    free = fs.super.statfs().free
    with pytest.raises(NoSpaceError):
        off(fs, big)
    assert fs.segments.find(big) == row
    assert row is not None
    assert pool.owners[row.number] == Owner(3, 4, 0o640)
    assert fs.super.statfs().free == free


def test_a_held_segment_is_not_taken(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, DATA, 5 * MIB)
    row = fs.segments.find(ino)
    assert row is not None
    pool.busy.add(row.number)
    with pytest.raises(BusyError, match="a test holds it"):
        off(fs, ino)
    assert pool.owners[row.number] == Owner(3, 4, 0o640)
    assert fs.segments.find(ino) == row


def test_nobody_but_root_opens_it_meanwhile(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, DATA, 5 * MIB)
    steps = works(fs, lambda: fs.conversions.off(ino))
    for _ in range(2):
        next(steps)
    row = fs.segments.find(ino)
    assert row is not None
    assert pool.owners[row.number] == Owner(0, 0, 0o600)
    fs.conversions.give_up(ino)
    steps.close()  # type: ignore[attr-defined]
    assert pool.owners[row.number] == Owner(3, 4, 0o640)


def change_owner(fs: FileSystem, ino: Ino) -> None:
    fs.setattr(ino, uid=9)


def write(fs: FileSystem, ino: Ino, data: bytes = b"new", offset: int = 0) -> None:
    fs.run(lambda: fs.write(ino, offset, data))


def remove(fs: FileSystem, ino: Ino) -> None:
    fs.remember(ino)
    fs.unlink(ROOT_INO, b"f")


@pytest.mark.parametrize("change", [change_owner, write, remove])
@pytest.mark.parametrize("way", [on, off])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_what_is_changed_meanwhile_is_refused(
    fs: FileSystem,
    pool: MemoryPool,
    change: Callable[[FileSystem, Ino], None],
    way: Callable[[FileSystem, Ino], None],
    steps: int,
) -> None:
    ino = make(fs, DATA, 5 * MIB if way is off else 0)
    number = len(pool.memories)
    conversion = fs.conversions.on if way is on else fs.conversions.off
    done = works(fs, lambda: conversion(ino))
    for _ in range(steps):
        next(done)
    change(fs, ino)
    with pytest.raises(BusyError, match="changed meanwhile"):
        for _ in done:
            pass
    fs.segments.reap()
    assert len(pool.memories) == number
    assert not fs.conversions.under_way
    if change is write:
        assert bytes(fs.read(ino, 0, len(DATA))) == b"new" + DATA[3:]
    if change is not remove:
        way(fs, ino)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_who_gives_up_leaves_nothing(fs: FileSystem, pool: MemoryPool, steps: int) -> None:
    for size in (0, 6 * MIB):
        ino = make(fs, DATA, size, name=b"%d" % size)
        free, numbers, held = fs.super.statfs().free, sorted(fs.numbers()), len(pool.memories)
        conversion = fs.conversions.off if size else fs.conversions.on
        done = works(fs, lambda ino=ino, c=conversion: c(ino))  # type: ignore[misc]
        for _ in range(steps):
            next(done)
        fs.conversions.give_up(ino)
        fs.segments.reap()
        assert (sorted(fs.numbers()), len(pool.memories)) == (numbers, held)
        assert free - fs.super.statfs().free < 8
        fs.run(lambda ino=ino, c=conversion: c(ino))  # type: ignore[misc]
        assert bytes(fs.read(ino, 0, len(DATA))) == DATA


def test_a_truncate_meanwhile_makes_no_second_segment(fs: FileSystem, pool: MemoryPool) -> None:
    ino = make(fs, b"abc")
    done = works(fs, lambda: fs.conversions.on(ino))
    next(done)
    fs.run(lambda: fs.setattr(ino, size=4 * MIB))
    assert fs.segments.find(ino) is None
    with pytest.raises(BusyError, match="meanwhile"):
        list(done)
    fs.segments.reap()
    assert not pool.memories


def test_files_that_cannot_have_one(fs: FileSystem) -> None:
    table = fs.create(IOMMU_INO, b"dom-0", REG, 0, 0).ino
    nameless = fs.tmpfile(ROOT_INO, REG, 0, 0).ino
    fs.symlink(ROOT_INO, b"link", b"f", 0, 0)
    link = fs.lookup(ROOT_INO, b"link").ino
    refusals: list[tuple[Ino, type[PkernfsError], str]] = [
        (ROOT_INO, InvalidError, "not a regular file"),
        (link, InvalidError, "not a regular file"),
        (table, PermissionDeniedError, "a table file"),
        (nameless, InvalidError, "no name"),
    ]
    for ino, kind, why in refusals:
        for way in (on, off):
            with pytest.raises(kind, match=why):
                way(fs, ino)


def test_a_lost_segment_has_nothing_to_copy(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool)
    ino = make(fs, DATA, 6 * MIB)
    fs.unmount()
    os.close(pool.memories.popitem()[1])
    again = mount(region, pool)
    with pytest.raises(RegionError, match="lost"):
        off(again, ino)


def test_none_without_a_pool_or_the_right_to_change(region: Region, pool: MemoryPool) -> None:
    fs = mount(region, pool)
    ino = make(fs, b"abc")
    fs.freeze()
    with pytest.raises(ReadOnlyError):
        on(fs, ino)
    fs.thaw()
    fs.unmount()
    without = mount_filesystem(region, open_pool=lambda sb: None)
    for way in (on, off):
        with pytest.raises(NotSupportedError, match="no pool"):
            way(without, ino)


def test_a_failure_meanwhile_is_left_to_the_next_mount(
    region: Region, pool: MemoryPool, fs: FileSystem
) -> None:
    ino = make(fs, DATA)
    done = works(fs, lambda: fs.conversions.on(ino))
    next(done)
    next(done)
    fs.fail("a test")
    with pytest.raises(ReadOnlyError):
        list(done)
    again = mount(region, pool)
    assert not pool.memories
    assert bytes(again.read(ino, 0, len(DATA))) == DATA


# ---------------------------------------------------------------------- every crash point


class Phase(NamedTuple):
    """Stores into the region while the pool had these memories."""

    stores: list[Store]
    memories: dict[SegmentNo, int]


def phases(pool: MemoryPool, operation: Callable[[], None]) -> list[Phase]:
    """The stores of an operation, in the order of its steps: a change of the pool ends a phase."""
    found: list[Phase] = []
    memories = {number: os.dup(fd) for number, fd in pool.memories.items()}

    def changed() -> None:
        nonlocal memories
        found.append(Phase(trace.trace_stop(), memories))
        memories = {number: os.dup(fd) for number, fd in pool.memories.items()}
        trace.trace_start()

    pool.changed = changed
    trace.trace_start()
    try:
        operation()
        changed()
    finally:
        trace.trace_stop()
        pool.changed = lambda: None
    return found


@pytest.mark.crash
@pytest.mark.parametrize("pieces", [1, 9])
@pytest.mark.parametrize("way", [on, off])
def test_every_crash_point_is_before_or_after(
    way: Callable[[FileSystem, Ino], None], pieces: int, pool: MemoryPool
) -> None:
    data = (DATA[: 70_000 // pieces] + bytes(2 * PAGE)) * pieces
    with Region.anonymous(16 * MIB) as region:
        mkfs.make_filesystem(region, pool=POOL)
        fs = mount(region, pool)
        ino = make(fs, b"", 2 * MIB if way is off else 0)
        for start in range(0, len(data), len(data) // pieces):
            write(fs, ino, data[start : start + 70_000 // pieces], start)
        fs.run(lambda: fs.setattr(ino, size=len(data)))
        numbers = sorted(fs.numbers())
        before = region.read(RegionOff(0), region.size)
        done = phases(pool, lambda: way(fs, ino))
        after = region.read(RegionOff(0), region.size)
    seen: list[bool] = []

    def look(region: Region, memories: dict[SegmentNo, int]) -> None:
        with MemoryPool() as found:
            found.memories = {number: os.dup(fd) for number, fd in memories.items()}
            fs = mount(region, found)
            assert bytes(fs.read(ino, 0, 2 * MIB)) == data
            assert sorted(fs.numbers()) == numbers
            row = fs.segments.find(ino)
            assert set(found.memories) == set(fs.segments.table.rows)
            assert set(found.memories) == (set() if row is None else {row.number})
            seen.append((row is not None) is (way is on))
            if row is not None:
                assert found.owners[row.number] == Owner(3, 4, 0o640)
            fs.unmount()
            assert_clean(region)

    replay = Replay(before)
    for phase in done:
        for store in phase.stores:
            for piece in cut(store, whole=not is_metadata(store, before, after)):
                if replay.store(piece):
                    replay.look(lambda region, phase=phase: look(region, phase.memories))  # type: ignore[misc]
        for fd in phase.memories.values():
            os.close(fd)
    replay.close()
    assert seen == sorted(seen)
    assert seen[-1]
    assert len(seen) > 50
