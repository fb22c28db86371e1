"""The tasks of a mount, with pyfuse3's loop made up: the beginning, zeroing, waiting, the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, NoSpaceError, ZeroingNeeded
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.super import Super
from pkernfs.fuse import session as session_module
from pkernfs.fuse.session import Session
from pkernfs.host.mappings import Mapping
from pkernfs.layout import ROOT_INO
from pkernfs.quantities import BlockNo, BlockRun, Ino, RegionOff
from pkernfs.region.region import Region
from support.memory_pool import POOL, MemoryPool

import pyfuse3  # isort: skip  # after the shim

MIB = 1 << 20


def is_dirty(fs: FileSystem) -> bool:
    """There is free memory that has to be zeroed."""
    isolated = fs.next_dirty(1)
    if isolated is not None:
        fs.abandon_zeroing(isolated)
    return isolated is not None


class Rig:
    """A session whose loop runs until it is told to end."""

    def __init__(
        self, region: Region, monkeypatch: pytest.MonkeyPatch, pool: MemoryPool | None = None
    ) -> None:
        opener = pool.opener() if pool is not None else None
        self.fs = mount_filesystem(region, open_pool=opener, park=True)
        self.region = region
        self.operations: Any = SimpleNamespace(initialized=True, writers={})
        self.loops = 0
        self.ready = 0
        self.invalidated: list[tuple[Any, ...]] = []
        monkeypatch.setattr(pyfuse3, "main", self._loop)
        monkeypatch.setattr(pyfuse3, "invalidate_inode", self._invalidate)

    async def _loop(self, **_: int) -> None:
        self.loops += 1
        await self.end.wait()

    def _invalidate(self, *what: Any) -> None:
        self.invalidated.append(what)
        raise FileNotFoundError("the kernel does not know it")

    def _count(self) -> None:
        self.ready += 1

    def run(
        self, work: Callable[[Session], Awaitable[None]], clock: MockClock | None = None
    ) -> None:
        """Do ``work`` while the session runs; then its loops end."""

        async def main() -> None:
            self.end = trio.Event()
            session = Session(self.fs, self.region, "/mnt/a", self.operations, None)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.run, self._count)
                await trio.testing.wait_all_tasks_blocked()
                await work(session)
                self.end.set()

        trio.run(main, clock=clock)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    with Region.anonymous(16 * MIB) as region:
        make_filesystem(region)
        yield Rig(region, monkeypatch)


_MAPS = """
import mmap, sys
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), int(sys.argv[3]), offset=int(sys.argv[2]))
print("mapped", flush=True)
sys.stdin.read()
"""


def test_what_others_map_of_a_removed_file_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They map the region itself, as QEMU does; it is neither zeroed nor given to anybody."""
    monkeypatch.setattr(session_module, "_LOOK_SECONDS", 0.001)
    path = str(tmp_path / "region")
    Region.create(path, 16 * MIB)
    with Region.open(path, write=True) as region:
        make_filesystem(region)
        rig = Rig(region, monkeypatch)
        fs = rig.fs
        [place] = fs.extents(large_file(fs))
        free = fs.statfs().free

        async def work(session: Session) -> None:
            command = [sys.executable, "-c", _MAPS, path, str(place.region_offset), str(4 * MIB)]
            with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as program:
                assert program.stdin is not None
                assert program.stdout is not None
                assert program.stdout.readline() == "mapped\n"
                fs.unlink(ROOT_INO, b"f")
                assert fs.statfs().free > free
                session.freed()
                with trio.fail_after(20):
                    while not caplog.messages:
                        await trio.sleep(0.002)
                [line] = caplog.messages
                assert line.startswith(f"process {program.pid} (")
                assert "maps 4 MiB of the region whose file was removed or cut" in line
                assert fs.statfs().free == free
                assert region.read(place.region_offset, 4) == b"xxxx"
                ino = fs.create(ROOT_INO, b"all", 0o100600, 0, 0).ino

                def fill() -> None:
                    fs.fallocate(ino, 0, 0, 10 * MIB)

                with pytest.raises(NoSpaceError):
                    await session.with_zeroing(fill)
                program.stdin.close()
            with trio.fail_after(20):
                while fs.statfs().free <= free:
                    await trio.sleep(0.002)
            await session.with_zeroing(fill)
            assert len(caplog.messages) == 1

        rig.run(work)


def test_who_maps_the_whole_region_or_only_reads_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "region")
    Region.create(path, 16 * MIB)
    with Region.open(path, write=True) as region:
        place = region.place
        assert place is not None
        found = [
            Mapping(7, "all", 0, 16 * MIB),
            Mapping(8, "reader", 0, 8 * MIB, writable=False),
            Mapping(9, "writer", 6 * MIB, 8 * MIB),
        ]
        monkeypatch.setattr(session_module, "mappings_of", lambda path: found)
        users = session_module._writers(place, region.size)
        assert [user.pid for user in users] == [9]
        assert list(session_module._parts([BlockRun(BlockNo(0), 6)], users)) == [
            ((0, 3), None),
            ((3, 1), "process 9 (writer)"),
            ((4, 2), None),
        ]
        assert session_module._writers(None, 1) == []


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[Mapping]:
    """What others map of a region from now on, as the kernel has it."""
    found: list[Mapping] = []
    monkeypatch.setattr(session_module, "mappings_of", lambda path: list(found))
    return found


@pytest.fixture
def file_rig(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: list[Mapping]
) -> Iterator[Rig]:
    """A rig whose region others may map; who maps what is looked at when it matters only."""
    monkeypatch.setattr(session_module, "_LOOK_SECONDS", 1000)
    path = str(tmp_path / "region")
    Region.create(path, 16 * MIB)
    with Region.open(path, write=True) as region:
        make_filesystem(region)
        yield Rig(region, monkeypatch)


def fill(fs: FileSystem, ino: Ino, blocks: int) -> Callable[[], None]:
    return lambda: fs.fallocate(ino, 0, 0, blocks * 2 * MIB)


def all_free(fs: FileSystem) -> int:
    return fs.statfs().free * 4096 // (2 * MIB)


def test_only_what_is_mapped_is_held(file_rig: Rig, mapped: list[Mapping]) -> None:
    fs = file_rig.fs
    [place] = fs.extents(large_file(fs))
    at = place.region_offset
    mapped.append(Mapping(9, "vmm", at + 2 * MIB, at + 3 * MIB))

    async def work(session: Session) -> None:
        fs.unlink(ROOT_INO, b"f")
        free = all_free(fs)
        async with session.hold_zeroing():
            assert all_free(fs) == free - 1
        ino = fs.create(ROOT_INO, b"g", 0o100600, 0, 0).ino
        await session.with_zeroing(fill(fs, ino, free - 1))
        assert file_rig.region.read(RegionOff(at + 2 * MIB), 4) == b"xxxx"
        assert file_rig.region.read(RegionOff(at), 4) == bytes(4)

    file_rig.run(work)


def test_who_needs_what_was_held_looks_again(file_rig: Rig, mapped: list[Mapping]) -> None:
    """A guest's memory is removed, its VMM ends, and the next guest starts at once."""
    fs = file_rig.fs
    [place] = fs.extents(large_file(fs))
    mapped.append(Mapping(9, "vmm", place.region_offset, place.region_offset + 4 * MIB))

    async def work(session: Session) -> None:
        fs.unlink(ROOT_INO, b"f")
        free = all_free(fs)
        ino = fs.create(ROOT_INO, b"g", 0o100600, 0, 0).ino
        with pytest.raises(NoSpaceError):
            await session.with_zeroing(fill(fs, ino, free))
        mapped.clear()
        await session.with_zeroing(fill(fs, ino, free))

    file_rig.run(work)


def test_what_is_freed_during_a_look_is_looked_at_and_zeroed(
    file_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = file_rig.fs
    [held] = fs.extents(large_file(fs))
    [place] = fs.extents(large_file(fs, b"g"))
    looking, go_on = threading.Event(), threading.Event()

    def look(path: str) -> list[Mapping]:
        looking.set()
        assert go_on.wait(20)
        return [Mapping(9, "vmm", held.region_offset, held.region_offset + 4 * MIB)]

    monkeypatch.setattr(session_module, "mappings_of", look)

    async def work(session: Session) -> None:
        fs.unlink(ROOT_INO, b"f")
        session.freed()
        with trio.fail_after(20):
            while not looking.is_set():
                await trio.sleep(0.002)
            fs.unlink(ROOT_INO, b"g")
            session.freed()
            go_on.set()
            while not file_rig.region.is_zero(place.region_offset, 4 * MIB):
                await trio.sleep(0.002)

    file_rig.run(work)


def test_what_nobody_has_looked_at_is_not_given_away(
    file_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = file_rig.fs
    large_file(fs)

    def fails(path: str) -> list[Mapping]:
        raise MemoryError

    async def work(session: Session) -> None:
        async with session.hold_zeroing():
            monkeypatch.setattr(session_module, "mappings_of", fails)
            fs.unlink(ROOT_INO, b"f")
            with pytest.raises(MemoryError):
                await session.zero(ZeroingNeeded([]))
            assert fs.next_dirty(1 << 30) is None
            monkeypatch.setattr(session_module, "mappings_of", lambda path: [])
            await session.zero(ZeroingNeeded([]))
            assert is_dirty(fs)

    file_rig.run(work)


@pytest.mark.parametrize("same_boot", [True, False])
def test_what_an_earlier_daemon_held_is_looked_at(
    file_rig: Rig, mapped: list[Mapping], monkeypatch: pytest.MonkeyPatch, same_boot: bool
) -> None:
    """It may have been killed; the program that maps what was removed goes on. Not over a boot."""
    region = file_rig.region
    [place] = file_rig.fs.extents(large_file(file_rig.fs))
    file_rig.fs.unlink(ROOT_INO, b"f")
    mapped.append(Mapping(9, "vmm", place.region_offset, place.region_offset + 4 * MIB))
    if not same_boot:
        monkeypatch.setattr(Super, "boot_id", staticmethod(lambda: bytes(range(16))))
    rig = Rig(region, monkeypatch)
    free = all_free(rig.fs)

    async def work(session: Session) -> None:
        async with session.hold_zeroing():
            assert all_free(rig.fs) == free - (2 if same_boot else 0)

    rig.run(work)
    assert not same_boot or region.read(place.region_offset, 4) == b"xxxx"


def test_a_handover_of_a_full_file_system_after_a_removal(file_rig: Rig) -> None:
    """Its list needs memory that was freed just before."""
    fs = file_rig.fs
    ino = fs.create(ROOT_INO, b"all", 0o100600, 0, 0).ino
    fs.run(fill(fs, ino, all_free(fs)))

    async def work(session: Session) -> None:
        fs.unlink(ROOT_INO, b"all")
        fs.freeze()
        with pytest.raises(NoSpaceError, match="cannot be had yet"):
            fs.make_manifest(4 * MIB)
        async with session.hold_zeroing():
            fs.make_manifest(4 * MIB)
        fs.thaw()

    file_rig.run(work)


def large_file(fs: FileSystem, name: bytes = b"f") -> Ino:
    """A file of 4 MiB; made before the session runs, which zeroes beside it."""
    ino = fs.create(ROOT_INO, name, 0o100600, 0, 0).ino
    fs.run(lambda: fs.write(ino, 0, b"x" * (4 * MIB)))
    return ino


def test_ready_is_said_once_it_is_initialized(rig: Rig) -> None:
    rig.operations.initialized = False

    async def work(session: Session) -> None:
        assert (rig.loops, rig.ready) == (1, 0)
        rig.operations.initialized = True
        while not rig.ready:
            await trio.sleep(0.001)

    rig.run(work)
    assert rig.ready == 1


def test_freed_memory_is_zeroed_ahead(rig: Rig) -> None:
    ino = large_file(rig.fs)

    async def all_zeroed(session: Session) -> None:
        while True:
            async with session.hold_zeroing():  # nothing is being zeroed
                if not is_dirty(rig.fs):
                    break
            await trio.sleep(0.001)
        await trio.testing.wait_all_tasks_blocked()

    async def work(session: Session) -> None:
        await all_zeroed(session)
        rig.fs.setattr(ino, size=0)
        await trio.testing.wait_all_tasks_blocked()
        assert is_dirty(rig.fs), "nobody was told"
        session.freed()
        with trio.fail_after(20):
            await all_zeroed(session)

    rig.run(work)


def test_an_operation_is_run_again_with_zeroed_memory(rig: Rig) -> None:
    ino = large_file(rig.fs)

    async def work(session: Session) -> None:
        asked = 0

        def operation() -> int:
            nonlocal asked
            asked += 1
            if asked == 1:
                raise ZeroingNeeded([(5, 1)])
            return rig.fs.write(ino, 0, b"x")

        assert await session.with_zeroing(operation) == 1
        assert asked >= 2

    rig.run(work)


def test_one_zeroes_at_a_time_and_others_are_served(rig: Rig) -> None:
    order: list[str] = []

    async def work(session: Session) -> None:
        async def second() -> None:
            async with session.hold_zeroing():
                order.append("second")

        before = rig.loops
        async with session.turn():
            await trio.testing.wait_all_tasks_blocked()
            assert rig.loops == before + 1, "another loop reads"
            session.start(second)
            await trio.testing.wait_all_tasks_blocked()
            order.append("first")
        await trio.testing.wait_all_tasks_blocked()

    rig.run(work)
    assert order == ["first", "second"]


def test_draining_ends_when_the_loop_is_idle_or_soon(rig: Rig) -> None:
    async def work(session: Session) -> None:
        async def idle() -> None:
            session.idle.notify_all()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.drain)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(idle)
        assert trio.current_time() == began
        await session.drain()
        assert trio.current_time() > began

    rig.run(work, MockClock(autojump_threshold=0.01))


def test_what_the_kernel_does_not_know_is_no_error(rig: Rig) -> None:
    async def work(session: Session) -> None:
        await session.invalidate(Ino(5))
        await session.invalidate(Ino(6), data=True)

    rig.run(work)
    assert rig.invalidated == [(5, True), (6, False)]


def test_corruption_while_zeroing_ends_writing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(_: int) -> None:
        raise CorruptionError("bitmap: says the test")

    async def work(session: Session) -> None:
        monkeypatch.setattr(rig.fs, "next_dirty", corrupt)
        session.freed()
        while not rig.fs.read_only:
            await trio.sleep(0.001)

    rig.run(work)


def test_writers_are_those_of_the_handlers(rig: Rig) -> None:
    rig.operations.writers[5] = 2

    async def work(session: Session) -> None:
        found = session.writers()
        assert found == {5: 2}
        found.clear()
        assert session.writers() == {5: 2}

    rig.run(work)


# ---------------------------------------------------------------------- segments restored later


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A mount that has left two segments to be restored."""
    with MemoryPool(parks=True) as pool, Region.anonymous(16 * MIB) as region:
        make_filesystem(region, pool=POOL)
        fs = mount_filesystem(region, open_pool=pool.opener())
        for name in (b"a", b"b"):
            ino = fs.create(ROOT_INO, name, 0o100600, 0, 0).ino
            fs.run(lambda ino=ino: fs.setattr(ino, size=2 * MIB))  # type: ignore[misc]
        fs.unmount()
        yield Rig(region, monkeypatch, pool)


def test_segments_are_restored_while_others_are_served(parked: Rig) -> None:
    segments = parked.fs.segments
    assert len(segments.absent) == 2

    async def work(session: Session) -> None:
        with trio.fail_after(20):
            while segments.absent:
                await trio.sleep(0.002)
        assert parked.ready == 1
        assert segments.lost == {}

    parked.run(work)


def test_a_handover_waits_until_all_segments_are_there(
    parked: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "_bring_segments", lambda session: trio.sleep(0))

    async def work(session: Session) -> None:
        assert len(parked.fs.segments.absent) == 2
        async with session.hold_zeroing():
            assert not parked.fs.segments.absent

    parked.run(work)


def test_an_operation_does_not_wait_for_all_segments(
    parked: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "_bring_segments", lambda session: trio.sleep(0))
    fs = parked.fs

    async def work(session: Session) -> None:
        ino = fs.lookup(ROOT_INO, b"b").ino
        assert bytes(await session.with_zeroing(lambda: fs.read(ino, 0, 1))) == bytes(1)
        assert len(fs.segments.absent) == 1

    parked.run(work)
