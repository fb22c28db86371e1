"""Every store of the changes that `pkernfs iommu` makes to a file system, cut and walked.

The stores of a change are replayed step by step. At each step the walker translates from the bytes
as they are: what was mapped before and is after leads to the same place all the time, and whatever
an address leads to has what it should by then. Then the region is mounted: the tables are as before
or as after, fsck has nothing to say, what they map is pinned, and the change can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest

from pkernfs.dma import snapshot
from pkernfs.errors import BusyError, ExistsError, NotFoundError, PkernfsError
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.host.bars import Bar
from pkernfs.host.sysroot import Host as Machine
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.page_pool import Mapping
from pkernfs.iommu.translate import translate, translate_domain
from pkernfs.layout import BLOCK, IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Ino, Iova, PhysAddr, RegionOff, SourceId
from pkernfs.region.checksum import crc32c
from pkernfs.region.region import Region
from pkernfs.region.trace import Store
from pkernfs.units.kernel_tables import Shape
from support.checking import assert_clean
from support.crash import JOURNAL, JOURNAL_END, MIB, Piece, Replay, cut, is_fence, recorded
from support.memory_pool import MemoryPool, PiecedPool
from support.table_files import DEVICE, PHYS_BASE, READ, RW, Host, drain

pytestmark = pytest.mark.crash

GIB = 1 << 30
REGION_BYTES = 24 * MIB
NOWHERE = Machine("/nowhere")  # no device is there
BAR = Bar(SourceId(0x30), 0, PhysAddr(1 << 40), 4 * MIB)
DEVICES = [SourceId(d) for d in (DEVICE, 0x29, 0x30, 0x2A80)]
MOUNT_STRIDE = 40  # of the steps that fill a record or a new table: nobody reads them yet
RECOVERIES = 3

Change = Callable[[Host], object]


@dataclass
class Case:
    """A change, which may consist of several that last each for itself.

    ``again``: made after it was cut, or done, it leads to the state that it led to.
    ``with_segment``: it is also swept where ``large`` has one.
    """

    name: str
    change: Change
    setup: Change = lambda h: None
    again: bool = True
    with_segment: bool = False


def small(h: Host) -> Ino:
    """``small``: 6 pages, of which the second to the fifth are a hole."""
    return h.fs.find(ROOT_INO, b"small")


def large(h: Host) -> Ino:
    """``large``: three blocks, of which the second is a hole."""
    return h.fs.find(ROOT_INO, b"large")


def base(h: Host) -> None:
    for name, size, hole in (
        ("small", 6 * PAGE, (PAGE, 4 * PAGE)),
        ("large", 6 * MIB, (BLOCK, BLOCK)),
    ):
        ino = h.file_of(name, size)
        h.run(partial(h.fs.write, ino, 0, b"\xdb" * size))  # what the hole leaves has old bytes
        h.run(partial(h.fs.write, ino, 0, b"first"))
        h.run(partial(h.fs.write, ino, size - 5, b"final"))
        mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
        h.run(partial(h.fs.fallocate, ino, mode, *hole))
    h.dom(0)


def some_mapped(h: Host) -> None:
    """Pieces of both, and a device."""
    h.map(0, Iova(0), small(h), 0, PAGE)
    h.map(0, Iova(4 * PAGE), small(h), 5 * PAGE, PAGE)
    h.map(0, Iova(GIB), large(h), 0, BLOCK)
    h.attach(0)


def used_before(h: Host) -> None:
    """The free pages of dom-0 are full of entries."""
    for iova in (Iova(0), Iova(GIB)):
        h.map(0, iova, large(h), 0, BLOCK - PAGE)
    h.tables.unmap(0, Iova(0), 1 << 48)
    h.run(partial(h.fs.fallocate, large(h), FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, BLOCK))


def second_domain(h: Host) -> None:
    h.dom(1)
    h.map(1, Iova(0), large(h), 4 * MIB, BLOCK)


def make_domain(h: Host) -> None:
    if not h.fs.find(IOMMU_INO, b"dom-5"):
        h.dom(5, 0)
    grow(h, b"dom-5", BLOCK)


def both(*changes: Change) -> Change:
    def run(h: Host) -> None:
        for change in changes:
            change(h)

    return run


def grow(h: Host, name: bytes, size: int) -> None:
    ino = h.fs.find(IOMMU_INO, name)
    h.run(partial(h.fs.setattr, ino, size=size))


def reading(h: Host) -> snapshot.Reading:
    """What a kernel would have mapped for the device: all that both files have."""
    places = [(0, small(h)), (2 * GIB, large(h))]
    mappings = [
        Mapping(Iova(iova + low), physical, length, RW)
        for iova, ino in places
        for low, physical, length in h.tables.file_pieces(ino, 0, 6 * MIB)
    ]
    return snapshot.Reading(
        DEVICE,
        Shape(Mode.LEGACY, 4),
        7,
        PhysAddr(0x123000),
        mappings,
        same=frozenset([DEVICE]),
        taken=frozenset([3]),
        domain_ids=256,
        largest=3,
    )


def take(read: Callable[[Host], snapshot.Reading]) -> Change:
    """Make a snapshot of it in dom-0."""

    def run(h: Host) -> None:
        plan = drain(snapshot.plan(h.fs, NOWHERE, read(h)))
        h.run(lambda: snapshot.apply(h.fs, plan, 0))

    return run


CASES = [
    Case("snapshot, first of all", take(reading)),
    Case("snapshot in scalable mode, first of all",
         take(lambda h: reading(h)._replace(shape=Shape(Mode.SCALABLE, 4)))),
    Case("snapshot in place of what was mapped", take(reading),
         lambda h: h.map(0, Iova(PAGE), large(h), 0, BLOCK)),
    Case("snapshot in place of another", take(reading), both(some_mapped, second_domain),
         with_segment=True),
    Case("snapshot in place of another, of some pages",
         take(lambda h: reading(h)._replace(mappings=reading(h).mappings[:1])),
         take(reading)),
    Case("snapshot of nothing", take(lambda h: reading(h)._replace(mappings=[])),
         take(reading)),
    Case("map a small file with holes, first of all", lambda h: h.map(0, Iova(0), small(h))),
    Case("map blocks with a hole, first of all", lambda h: h.map(0, Iova(0), large(h)),
         with_segment=True),
    Case("map a small file with holes beside others",
         lambda h: h.map(0, Iova(16 * PAGE), small(h)), some_mapped),
    Case("map blocks with a hole over a part of them",
         lambda h: h.map(0, Iova(GIB), large(h)), some_mapped),
    Case("map that merges", lambda h: h.map(0, Iova(2 * GIB), large(h), 0, BLOCK),
         both(some_mapped, lambda h: h.map(0, Iova(2 * GIB), large(h), 0, BLOCK - PAGE))),
    Case("map where other tables were", lambda h: h.map(0, Iova(0), small(h)), used_before),
    Case("map a BAR, first of all", lambda h: h.tables.map_bar(0, Iova(0), BAR, 0, None, RW)),
    Case("map a BAR in pages",
         lambda h: h.tables.map_bar(0, Iova(16 * PAGE), BAR, PAGE, 20 * PAGE, READ), some_mapped),
    Case("unmap a superpage", lambda h: h.tables.unmap(0, Iova(GIB), BLOCK), some_mapped),
    Case("unmap that splits", lambda h: h.tables.unmap(0, Iova(GIB + 7 * PAGE), PAGE), some_mapped,
         with_segment=True),
    Case("unmap all", lambda h: h.tables.unmap(0, Iova(0), 1 << 48), some_mapped),
    Case("unmap a BAR", lambda h: h.tables.unmap(0, Iova(4 * GIB), 4 * MIB),
         both(some_mapped, lambda h: h.tables.map_bar(0, Iova(4 * GIB), BAR, 0, None, RW))),
    Case("attach, first of all", lambda h: h.attach(0)),
    Case("attach to a bus in use", lambda h: h.attach(0, SourceId(0x29)), some_mapped),
    Case("attach to another bus", lambda h: h.attach(0, SourceId(0x2A80)), some_mapped),
    Case("attach another domain", lambda h: h.attach(1, SourceId(0x30)),
         both(some_mapped, second_domain)),
    Case("detach the last", lambda h: h.tables.detach(DEVICE), some_mapped),
    Case("detach one of two", lambda h: h.tables.detach(SourceId(0x29)),
         both(some_mapped, lambda h: h.attach(0, SourceId(0x29)))),
    Case("create", lambda h: h.run(lambda: h.tables.create_root())),
    Case("create for scalable mode",
         lambda h: h.run(lambda: h.tables.create_root(Config(Mode.SCALABLE, 5)))),
    Case("create again, with other levels",
         lambda h: h.run(lambda: h.tables.create_root(Config(Mode.LEGACY, 3))),
         lambda h: h.run(lambda: h.tables.create_root(Config(Mode.SCALABLE, 5)))),
    Case("attach in scalable mode", lambda h: h.attach(0),
         both(lambda h: h.run(lambda: h.tables.create_root(Config(Mode.SCALABLE, 4))),
              lambda h: h.map(0, Iova(0), small(h), 0, PAGE))),
    Case("detach in scalable mode", lambda h: h.tables.detach(DEVICE),
         both(lambda h: h.run(lambda: h.tables.create_root(Config(Mode.SCALABLE, 4))),
              lambda h: h.map(0, Iova(0), small(h), 0, PAGE), lambda h: h.attach(0))),
    Case("unlink a domain", lambda h: h.fs.unlink(IOMMU_INO, b"dom-1"),
         both(some_mapped, second_domain)),
    Case("rename a domain", lambda h: h.fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"dom-7", 0),
         both(some_mapped, second_domain)),
    Case("exchange domains", lambda h: h.fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"dom-2", 2),
         both(some_mapped, second_domain, lambda h: h.dom(2)),
        again=False,
    ),
    Case("grow a domain", lambda h: grow(h, b"dom-0", 4 * MIB), some_mapped),
    Case("grow root-pgtables", lambda h: grow(h, ROOT_PGTABLES, 4 * MIB), some_mapped),
    Case("make and size a domain", make_domain, some_mapped),
]  # fmt: skip


class Seen(NamedTuple):
    """What a mount finds."""

    names: dict[bytes, int]  # files of iommu, with their sizes
    config: Config
    mappings: dict[int, list[tuple[int, int, int, int]]]
    devices: list[tuple[int, int, int]]
    bars: list[Bar]
    contents: list[tuple[int, int]]  # sizes and checksums of the other files


def seen_in(h: Host) -> Seen:
    names = {name: h.fs.inode(ino).size for name, ino, _kind, _cookie in h.fs.readdir(IOMMU_INO, 0)}
    state = h.state()
    contents = [
        (h.fs.inode(ino).size, crc32c(bytes(h.fs.read(ino, 0, 8 * MIB))))
        for ino in (small(h), large(h))
    ]
    return Seen(
        names, state["config"], state["mappings"], state["devices"], state["bars"], contents
    )


@dataclass
class Walks:
    """Where requests lead, by address (from dom-0's top-level table) and by device."""

    domain: list[tuple[PhysAddr | None, int]]
    device: list[tuple[PhysAddr | None, int | None]]


class Sweep:
    """One case: its stores, and what was before and is after.

    :param pool: ``large`` has a segment there.
    """

    def __init__(self, case: Case, pool: MemoryPool | None = None) -> None:
        self.case = case
        self.pool = pool
        host = Host(REGION_BYTES, poison=True, pool=pool)
        base(host)
        case.setup(host)
        self.before, self.first = seen_in(host), self._image(host)
        self.stores = recorded(lambda: case.change(host))
        self.last = self._image(host)
        self.after = seen_in(host)
        self.dom = host.tables.memory(b"dom-0").first_page
        self.root = host.tables.root_memory().first_page if host.tables.root else PhysAddr(0)
        self.had_root = ROOT_PGTABLES in self.before.names
        self.files = {
            host.physical(ino, at): bytes(host.fs.read(ino, at, PAGE))
            for ino in (small(host), large(host))
            for low, length, _at in host.fs.pieces(ino, 0, 6 * MIB)
            for at in range(low, low + length, PAGE)
        }
        self.mode, self.levels = self.after.config.mode, self.after.config.levels
        self.probes = self._probes()
        host.pool = None  # it goes on
        host.close()

    @staticmethod
    def _image(host: Host) -> bytes:
        return host.region.read(RegionOff(0), host.region.size)

    def _probes(self) -> list[Iova]:
        found = {0, (1 << 9 * self.levels + 12) - 1}
        for state in (self.before, self.after):
            for iova, _physical, length, _perm in state.mappings.get(0, []):
                edges = (iova, iova + PAGE, iova + length // 2, iova + length)
                found.update(edge + skip for edge in edges for skip in (0, -1))
        return sorted(Iova(a) for a in found if a >= 0)

    def walks(self, region: Region) -> Walks:
        memory = Memory.whole(region)
        walks = [translate_domain(memory, self.dom, self.levels, a) for a in self.probes]
        devices = []
        for source_id in DEVICES if self.root else ():
            t = translate(memory, self.root, source_id, Iova(GIB + 5), mode=self.mode)
            devices.append((t.physical, t.domain_id))
        return Walks([(t.physical, t.perm) for t in walks], devices)

    def check_walks(self, region: Region, old: Walks, new: Walks) -> None:
        """:raises AssertionError: an address leads to neither of the two, or to stale bytes."""
        now = self.walks(region)
        rows = zip(self.probes, now.domain, old.domain, new.domain, strict=True)
        for iova, got, before, after in rows:
            assert got in (before, after), (hex(iova), got, before, after)
            self.check_bytes(region, got[0])
        if self.had_root:
            for got_device, *allowed in zip(now.device, old.device, new.device, strict=True):
                assert got_device in allowed, (got_device, allowed)

    def check_bytes(self, region: Region, physical: PhysAddr | None) -> None:
        """What a device reads there is what the file has: no old bytes."""
        if physical is None or BAR.start <= physical < BAR.start + BAR.length:
            return
        page = PhysAddr(physical - physical % PAGE)
        assert page in self.files, f"{physical:#x} is no file's"
        if physical >= PiecedPool.start:
            return  # nothing is stored there
        assert region.view(RegionOff(page - PHYS_BASE), PAGE) == self.files[page], (
            f"stale at {page:#x}"
        )

    def steps(self) -> Iterator[tuple[Piece, bool]]:
        """Every store in steps of a word, with whether a mount is to look at what it leaves."""
        number = 0
        for store in self.stores:
            in_journal = JOURNAL < store.offset < JOURNAL_END
            for piece in cut(store, whole=store.length > PAGE, stride=1):
                number += 1
                alone = not in_journal and store.length <= 64
                yield piece, alone or number % MOUNT_STRIDE == 0

    def look(self, region: Region, verdicts: list[Seen]) -> None:
        """Mount, compare, and go on."""
        host = Host.over(region, self.pool)
        seen = seen_in(host)
        verdicts.append(seen)
        self.judge(seen)
        host.assert_check_clean()
        assert_clean(region)
        self.check_pins(host, seen)
        if self.case.again:
            with suppress(ExistsError, NotFoundError, BusyError):  # what was done is done
                self.case.change(host)
            again = seen_in(host)
            # The record of a BAR that nothing maps any more goes with the next unmap.
            assert again == self.after._replace(bars=again.bars)
            host.assert_check_clean()
        host.fs.unmount()
        assert_clean(region)

    def judge(self, seen: Seen) -> None:
        """:raises AssertionError: a part of it is neither as before nor as after."""
        before, after = self.before, self.after
        assert seen.contents == before.contents
        assert seen.devices in (before.devices, after.devices)
        assert seen.bars in (before.bars, after.bars)
        assert seen.config in (before.config, after.config, Config())
        if seen.mappings != before.mappings:
            assert seen.mappings == after.mappings or self._sized_only(seen)
            if seen.mappings == after.mappings and after.mappings != before.mappings:
                assert set(seen.bars) | set(after.bars) == set(seen.bars)  # recorded before
        for name, size in seen.names.items():
            assert size in (0, before.names.get(name), after.names.get(name))

    def _sized_only(self, seen: Seen) -> bool:
        """A domain that is made in two steps has a name first, and no tables."""
        return {n: m for n, m in seen.mappings.items() if m} == {
            n: m for n, m in self.before.mappings.items() if m
        }

    @staticmethod
    def check_pins(host: Host, seen: Seen) -> None:
        """What is mapped cannot go, whatever has just been cut."""
        mapped = [p for found in seen.mappings.values() for _iova, p, _length, _perm in found]
        for name in (b"small", b"large"):
            ino = host.fs.find(ROOT_INO, name)
            found = host.tables.file_pieces(ino, 0, 6 * MIB)
            ranges = [(piece.physical, piece.physical + piece.length) for piece in found]
            if any(low <= p < high for p in mapped for low, high in ranges):
                with pytest.raises(BusyError):
                    host.fs.unlink(ROOT_INO, name)

    def run(self) -> int:
        """All steps; how many of them were mounted."""
        replay = Replay(self.first, PHYS_BASE)
        old = self.walks(replay.region)
        with Region.anonymous(REGION_BYTES, phys_base=PHYS_BASE) as region:
            region.copy_in(RegionOff(0), self.last)
            new = self.walks(region)
        verdicts: list[Seen] = []
        fences = 0
        mounts = 0
        for piece, to_mount in self.steps():
            if not replay.store(piece):
                continue
            self.check_walks(replay.region, old, new)
            fence = is_fence(Store(piece[0], len(piece[1]), piece[1]))
            if not to_mount and not fence:
                continue
            mounts += 1
            stores = replay.look(lambda region: self.look(region, verdicts))
            if fence and piece[1] != bytes(8):
                fences += 1
                if fences <= RECOVERIES:
                    self.cut_recovery(bytes(replay.image), stores, old, new, verdicts[-1])
        assert verdicts[-1] == self.after
        self.check_order(verdicts)
        replay.close()
        return mounts

    def cut_recovery(
        self, image: bytes, stores: list[Store], old: Walks, new: Walks, verdict: Seen
    ) -> None:
        """The mount stores as well, and a unit walks meanwhile; cut, the next one ends it."""
        replay = Replay(image, PHYS_BASE)
        with Region.anonymous(REGION_BYTES, phys_base=PHYS_BASE) as region:
            region.copy_in(RegionOff(0), image)
            mount = recorded(lambda: Host.over(region, self.pool))
        assert stores[: len(mount)] != []
        for number, store in enumerate(mount):
            for piece in cut(store, whole=store.length > PAGE):
                if replay.store(piece):
                    self.check_walks(replay.region, old, new)
            if number % 4 == 0:
                again: list[Seen] = []
                replay.look(partial(self.look, verdicts=again))
                assert again == [verdict]
        replay.close()

    def check_order(self, verdicts: list[Seen]) -> None:
        """What has happened does not unhappen."""
        for part in ("mappings", "devices"):
            before, after = getattr(self.before, part), getattr(self.after, part)
            if before == after:
                continue
            done = [getattr(v, part) == after for v in verdicts]
            assert done == sorted(done), part


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_store(case: Case) -> None:
    sweep = Sweep(case)
    assert sweep.before != sweep.after
    assert sweep.run() > 2


@pytest.mark.parametrize("case", [c for c in CASES if c.with_segment], ids=lambda c: c.name)
def test_every_store_where_a_file_has_a_segment(case: Case) -> None:
    with PiecedPool() as pool:
        sweep = Sweep(case, pool)
        assert pool.memories
        assert sweep.before != sweep.after
        assert sweep.run() > 2
        assert len(pool.memories) == 1


def test_a_snapshot_that_needs_another_domain_id() -> None:
    """The device is detached in between; as long as it is attached, it has all or all of before."""
    taken = take(lambda h: reading(h)._replace(taken=frozenset([2])))
    sweep = Sweep(Case("another domain id", taken, some_mapped))
    replay = Replay(sweep.first, PHYS_BASE)
    verdicts: list[Seen] = []

    def look(region: Region) -> None:
        host = Host.over(region)
        verdicts.append(seen_in(host))
        host.assert_check_clean()
        host.fs.unmount()
        assert_clean(region)

    for piece, to_mount in sweep.steps():
        if replay.store(piece) and to_mount:
            replay.look(look)
    before, after = sweep.before, sweep.after
    assert [d[2] for d in (*before.devices, *after.devices)] == [2, 7]
    assert all(v.devices in (before.devices, [], after.devices) for v in verdicts)
    assert all(v.mappings in (before.mappings, after.mappings) for v in verdicts)
    assert all(v.mappings == after.mappings for v in verdicts if v.devices != before.devices)
    assert [] in [v.devices for v in verdicts]
    assert verdicts[-1].devices == after.devices
    replay.close()


@pytest.mark.parametrize("lost", ["zeros", "tables", "order", "nothing"])
def test_the_sweep_finds_what_it_is_for(lost: str) -> None:
    """Without zeroing, without the new tables, and with entries before what they refer to."""
    sweep = Sweep(next(c for c in CASES if c.name == "map where other tables were"))
    first = sweep.dom - PHYS_BASE
    (entry,) = [s for s in sweep.stores if first <= s.offset < first + PAGE]
    tables = [s for s in sweep.stores if first + PAGE <= s.offset < first + BLOCK]
    zeroed = [s for s in sweep.stores if s.data is None and s.length == 4 * PAGE]
    assert tables
    assert zeroed
    if lost == "zeros":
        sweep.stores = [s for s in sweep.stores if s not in zeroed]
    elif lost == "tables":
        sweep.stores = [s for s in sweep.stores if s not in tables]
    elif lost == "order":
        sweep.stores.remove(entry)
        sweep.stores.insert(sweep.stores.index(tables[0]), entry)
    else:
        sweep.run()
        return
    with pytest.raises((AssertionError, PkernfsError)):
        sweep.run()
