"""The tables before an IOMMU that is not ours: QEMU's, driven without a guest.

Its edu devices read and write memory through tables that pkernfs.iommu makes in QEMU's memory while
the unit is at work. What a device gets, and the fault that the unit records, are compared with what
translate() says. :mod:`iommu_machine` is the driver.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from pkernfs.errors import ExistsError, NoSpaceError
from pkernfs.iommu import (
    READ,
    WRITE,
    FaultReason,
    Memory,
    Mode,
    PageTable,
    RootTables,
    check,
    translate_domain,
)
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, PhysRange, RegionOff, RegionRun, SourceId, Word
from pkernfs.vtd.entries import leaf_bytes, width_bits
from support.page_tables import DAMAGE, Damage, damage_name
from support.qtest_machine import DATA, FIRST, GIB, MIB, RAM, ROOT, SCRATCH_PAGE, SECOND, Lab
from support.unit_drivers import BUFFER, Fault

pytestmark = pytest.mark.vm

RW = READ | WRITE


@dataclass(frozen=True)
class Shape:
    """Mode, levels, and how invalidations reach the unit (scalable mode: always by the queue)."""

    mode: Mode
    levels: int
    queue: bool

    def __str__(self) -> str:
        way = "queue" if self.queue else "registers"
        return f"{self.mode.name.lower()}-{self.levels}-{way}"


SHAPES = [
    Shape(Mode.LEGACY, 3, True),
    Shape(Mode.LEGACY, 4, False),
    Shape(Mode.SCALABLE, 3, True),
    Shape(Mode.SCALABLE, 4, True),
]


@pytest.fixture(params=SHAPES, ids=str)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    path = tmp_path_factory.mktemp("lab")
    made = Lab(path, request.param.mode, request.param.levels, queue=request.param.queue)
    yield made
    made.close()
    (path / "memory").unlink()


def nothing(lab: Lab, access: int = READ) -> str:
    """What a request to something that is not mapped comes to."""
    if lab.mode is Mode.SCALABLE:
        return "PAGING_ENTRY_P"
    return "WRITE" if access == WRITE else "READ"


def test_leaves_of_every_size(lab: Lab) -> None:
    lab.first.map(Iova(7 * PAGE), PhysAddr(DATA + 3 * PAGE), 5 * PAGE, RW)
    lab.first.map(Iova(4 * MIB), DATA, 8 * MIB, RW)
    lab.first.map(Iova(5 * GIB), PhysAddr(GIB), GIB, RW)
    assert lab.compare(FIRST, 7 * PAGE, 12 * PAGE - 8) == ["level 1"] * 2
    assert lab.compare(FIRST, 4 * MIB, 4 * MIB + 3 * PAGE + 8, 12 * MIB - 8) == ["level 2"] * 3
    assert lab.compare(FIRST, 5 * GIB, 5 * GIB + 48 * MIB, 6 * GIB - 8) == ["level 3"] * 3
    top = 1 << width_bits(lab.levels)
    unmapped = (0, 6 * PAGE, 7 * PAGE - 8, 12 * PAGE, 12 * MIB, 6 * GIB, top - PAGE, top - 8)
    assert lab.compare(FIRST, *unmapped) == [nothing(lab)] * len(unmapped)
    assert lab.compare_write(FIRST, Iova(5 * GIB + 32 * MIB)) == "level 3"
    assert lab.compare_write(FIRST, Iova(6 * GIB)) == nothing(lab, WRITE)


def test_addresses_beyond_the_tables(lab: Lab) -> None:
    top = Iova(1 << width_bits(lab.levels))
    assert lab.compare(FIRST, top, top | 7 * PAGE) == ["ADDR_BEYOND_MGAW"] * 2
    assert lab.compare_write(FIRST, top) == "ADDR_BEYOND_MGAW"


def test_split_and_merged_leaves(lab: Lab) -> None:
    base, hole = Iova(5 * GIB), Iova(5 * GIB + 20 * MIB + PAGE)
    spots = (base + 20 * MIB, hole - 8, hole, hole + PAGE, base + 24 * MIB)
    lab.first.map(base, PhysAddr(GIB), GIB, RW)
    assert lab.compare(FIRST, *spots) == ["level 3"] * 5
    lab.first.unmap(hole, PAGE)
    lab.told(2, base, base + GIB)
    split = ["level 1", "level 1", nothing(lab), "level 1", "level 2"]
    assert lab.compare(FIRST, *spots) == split
    lab.first.map(hole, PhysAddr(GIB + 20 * MIB + PAGE), PAGE, READ)
    assert lab.compare(FIRST, *spots) == [*split[:2], "level 1", *split[3:]]
    assert lab.compare_write(FIRST, hole) == "WRITE"
    lab.first.protect(hole, PAGE, RW)
    lab.told(2, base, base + GIB)
    assert lab.compare(FIRST, *spots) == ["level 3"] * 5
    assert lab.compare_write(FIRST, hole) == "level 3"


def test_two_devices_in_two_domains(lab: Lab) -> None:
    lab.first.map(Iova(GIB), DATA, PAGE, RW)
    lab.second.map(Iova(GIB), PhysAddr(DATA + MIB), PAGE, RW)
    assert lab.compare(FIRST, GIB) == lab.compare(SECOND, GIB) == ["level 1"]
    assert lab.load(FIRST, [GIB]) != lab.load(SECOND, [GIB])
    assert lab.compare_write(SECOND, Iova(GIB + 8)) == "level 1"
    assert lab.word(PhysAddr(DATA + 8)) == 0
    lab.root.detach(FIRST)
    lab.unit.invalidate_device(FIRST, 2)
    assert lab.compare(SECOND, GIB) == ["level 1"]
    lab.machine.start(FIRST, GIB, BUFFER, 1)
    lab.machine.finish(FIRST)
    lab.same_fault(lab.unit.fault(), FIRST, lab.walk(FIRST, Iova(GIB)), write=False)
    lab.root.detach(SECOND)
    lab.unit.invalidate_all()  # the context table has gone with its last device
    for source_id in (FIRST, SECOND):
        walk = lab.walk(source_id, Iova(GIB))
        assert walk.fault in (FaultReason.ROOT_ENTRY_P, FaultReason.SM_ROOT_ENTRY_P)
        lab.same_fault(lab.write(source_id, Iova(GIB)), source_id, walk, write=True)


@pytest.mark.parametrize("leaf", [PAGE, 2 * MIB, GIB], ids=["4K", "2M", "1G"])
def test_permissions(lab: Lab, leaf: int) -> None:
    physical = PhysAddr(GIB if leaf == GIB else DATA)
    iova = Iova(4 * GIB)
    size = f"level {(PAGE, 2 * MIB, GIB).index(leaf) + 1}"
    lab.first.map(iova, physical, leaf, READ)
    assert lab.compare(FIRST, iova + 8) == [size]
    assert lab.compare_write(FIRST, Iova(iova + 8)) == "WRITE"
    assert lab.word(PhysAddr(physical + 8)) == physical + 8 | 1
    lab.first.protect(iova, leaf, WRITE)
    lab.told(2, iova, iova + leaf)
    assert lab.compare(FIRST, iova + 8) == ["READ"]
    assert lab.compare_write(FIRST, Iova(iova + 8)) == size
    lab.first.protect(iova, leaf, RW)
    lab.told(2, iova, iova + leaf)
    assert lab.compare(FIRST, iova + 8) == [size]
    assert lab.compare_write(FIRST, Iova(iova + 8)) == size


#: What QEMU 7.2 does not look at in scalable mode.
UNCHECKED = ("SM_CONTEXT_ENTRY_INV", "SM_PASID_DIR_ENTRY_RSVD", "SM_PASID_ENTRY_RSVD")


@pytest.mark.parametrize("mode", list(Mode), ids=["legacy", "scalable"])
def test_every_damage_faults_as_foreseen(
    mode: Mode, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is stored into the live tables is right for an IOMMU in just the cases foreseen."""
    path = tmp_path_factory.mktemp("lab")
    lab = Lab(path, mode)
    try:
        lab.first.map(Iova(5 * PAGE), DATA, PAGE, RW)
        for damage in (d for d in DAMAGE if d.mode is mode and d.reason not in UNCHECKED):
            lab.unit.invalidate_all()
            _break_and_read(lab, damage)
            lab.unit.invalidate_all()
            assert lab.compare(FIRST, 5 * PAGE) == ["level 1"]
    finally:
        lab.close()
        (path / "memory").unlink()


def _break_and_read(lab: Lab, damage: Damage) -> None:
    step = next(s for s in lab.walk(FIRST, Iova(5 * PAGE)).steps if s.name == damage.step)
    at = PhysAddr(step.address + 8 * damage.word)
    good = lab.word(at)
    lab.put(at, good & ~damage.clear | damage.set)
    walk = lab.walk(FIRST, Iova(5 * PAGE))
    assert walk.fault is not None
    assert walk.fault.name == damage.reason
    lab.machine.start(FIRST, 5 * PAGE, BUFFER, 1)
    lab.machine.finish(FIRST)
    fault = lab.unit.fault()
    lab.put(at, good)
    assert fault is not None, damage_name(damage)
    lab.same_fault(fault, FIRST, walk, write=False)


def test_the_tables_below_a_fifth_level(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No QEMU walks five levels of second-stage tables: it refuses them, and walks those below."""
    path = tmp_path_factory.mktemp("lab")
    lab = Lab(path)
    try:
        table = PageTable(
            Memory(lab.region, [RegionRun(RegionOff(10 * MIB), MIB)]), lab.commit, levels=5
        )
        windows = (0, 1, 255, 511)
        for window in windows:
            low = window << 48
            table.map(Iova(low | lab.scratch), SCRATCH_PAGE, PAGE, RW)
            table.map(Iova(low | 3 * GIB), PhysAddr(GIB), GIB, RW)
            data = PhysAddr(DATA + 2 * MIB * (window + 1))
            table.map(Iova(low | 2 * MIB), data, 2 * MIB - PAGE, READ)
            table.map(Iova(low + (1 << 48) - PAGE), PhysAddr(DATA + window * PAGE), PAGE, RW)
        spots = (3 * GIB + 8, 2 * MIB, 4 * MIB - PAGE, (1 << 48) - 8, 4 * GIB)
        levels = ["level 3", "level 1", "READ", "level 1", "READ"]
        for window in windows:
            lab.root.detach(FIRST)
            entry = lab.word(PhysAddr(table.root + 8 * window))
            lab.root.attach(FIRST, PhysAddr(entry & -PAGE & (1 << 52) - 1), 2)
            lab.unit.invalidate_device(FIRST, 2)
            assert lab.compare(FIRST, *spots) == levels
            for spot in spots:
                above = translate_domain(
                    table.memory, table.root, 5, Iova(window << 48 | spot), access=READ
                )
                below = lab.walk(FIRST, Iova(spot))
                assert (above.physical, above.perm) == (below.physical, below.perm)
                assert above.fault == below.fault
        at = lab.walk(FIRST, Iova(0)).steps[1].address
        lab.put(at, table.root | 1)
        high = PhysAddr(at + 8)
        lab.put(high, lab.word(high) & ~7 | 3)
        lab.unit.invalidate_device(FIRST, 2)
        lab.machine.start(FIRST, 3 * GIB, BUFFER, 1)
        lab.machine.finish(FIRST)
        fault = lab.unit.fault()
        assert fault is not None
        assert fault.reason == FaultReason.CONTEXT_ENTRY_INV
    finally:
        lab.close()
        (path / "memory").unlink()


# ---------------------------------------------------------------------- while the device works


def test_what_the_unit_has_not_been_told(lab: Lab) -> None:
    """It does cache: without an invalidation the other tests would not see what they see."""
    lab.first.map(Iova(GIB), DATA, PAGE, RW)
    assert lab.compare(FIRST, GIB) == ["level 1"]
    lab.first.unmap(Iova(GIB), PAGE)
    assert lab.load(FIRST, [GIB]) == [DATA | 1]
    lab.unit.invalidate_pages(3, GIB, GIB + PAGE)  # another domain
    lab.unit.invalidate_pages(2, GIB + PAGE, GIB + 2 * PAGE)  # another page
    assert lab.load(FIRST, [GIB]) == [DATA | 1]
    lab.told(2, GIB, GIB + PAGE)
    assert lab.compare(FIRST, GIB) == [nothing(lab)]
    # What was not mapped is not cached: a map needs no invalidation (CAP.CM is clear).
    lab.first.map(Iova(GIB), PhysAddr(DATA + MIB), PAGE, RW)
    assert lab.compare(FIRST, GIB) == ["level 1"]


AT, ALSO_AT = Iova(4 * GIB), Iova(8 * GIB)  # where the first device transfers


def _unmap(lab: Lab) -> None:
    lab.first.unmap(AT, PAGE)
    lab.told(2, AT, AT + GIB)


def _replace(lab: Lab) -> None:
    lab.first.unmap(AT, 2 * MIB)
    lab.told(2, AT, AT + GIB)
    lab.first.map(AT, DATA, 2 * MIB, RW)


def _split(lab: Lab) -> None:
    lab.first.unmap(Iova(AT + PAGE), GIB - PAGE)
    lab.told(2, AT, AT + GIB)


def _protect(lab: Lab) -> None:
    lab.first.protect(AT, PAGE, READ)
    lab.told(2, AT, AT + GIB)


def _move(lab: Lab) -> None:
    _detach(lab)
    lab.root.attach(FIRST, lab.second.root, 3)


def _detach(lab: Lab) -> None:
    lab.root.detach(FIRST)
    lab.unit.invalidate_device(FIRST, 2)
    lab.root.invalidated()


def _map(lab: Lab) -> None:
    lab.first.map(ALSO_AT, PhysAddr(DATA + MIB), MIB, RW)


#: What is done while the first device transfers at an address, and where in memory that ends up
#: (None: nowhere).
CHANGES = [
    (AT, _unmap, None),
    (AT, _replace, DATA),
    (AT, _split, GIB),
    (AT, _protect, GIB),
    (AT, _detach, None),
    (AT, _move, DATA + 2 * MIB),
    (ALSO_AT, _map, DATA + MIB),
]
MARKED = (PhysAddr(GIB), DATA, PhysAddr(DATA + MIB), PhysAddr(DATA + 2 * MIB))


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_changes_while_transfers_are_under_way(lab: Lab, write: bool) -> None:
    """A transfer begins, the tables change and the unit is told, and the transfer ends."""
    lab.second.map(AT, PhysAddr(DATA + 2 * MIB), PAGE, RW)
    for iova, change, end in CHANGES:
        for mark in MARKED:
            lab.put(mark, mark | 1)
        lab.first.map(AT, PhysAddr(GIB), GIB, RW)
        lab.unit.invalidate_all()
        lab.fill(FIRST, 0x1234_5678)
        # The unit has both devices' addresses cached.
        lab.machine.start(FIRST, AT, BUFFER + 64, 1)
        lab.machine.finish(FIRST)
        assert lab.load(SECOND, [AT]) == [DATA + 2 * MIB | 1]
        with lab.machine.frozen():
            lab.machine.start(FIRST, *((BUFFER, iova, 3) if write else (iova, BUFFER, 1)))
            lab.machine.start(SECOND, AT, BUFFER, 1)
            change(lab)
            assert lab.machine.busy(FIRST)
            assert lab.machine.busy(SECOND)
        lab.machine.finish(FIRST)
        lab.machine.finish(SECOND)
        _ended(lab, iova, end if change is not _protect or not write else None, write)
        # The other device has not noticed.
        lab.machine.start(SECOND, BUFFER, lab.scratch, 3)
        lab.machine.finish(SECOND)
        assert lab.word(SCRATCH_PAGE) == lab.word(PhysAddr(DATA + 2 * MIB))
        if change in (_detach, _move):
            if change is _move:
                lab.root.detach(FIRST)
            lab.root.attach(FIRST, lab.first.root, 2)
        lab.first.unmap(Iova(0), lab.scratch)
        lab.unit.invalidate_all()
        lab.first.invalidated()


def _ended(lab: Lab, iova: Iova, end: int | None, write: bool) -> None:
    """The first device's transfer has ended at that physical address, or in the right fault."""
    fault = lab.unit.fault()
    walk = lab.walk(FIRST, iova, WRITE if write else READ)
    assert walk.physical == end
    if end is None:
        lab.same_fault(fault, FIRST, walk, write=write)
    else:
        assert fault is None
    changed = [mark for mark in MARKED if lab.word(mark) != mark | 1]
    assert changed == ([end] if write and end is not None else [])
    if changed:
        assert lab.word(changed[0]) == 0x1234_5678
    elif end is not None:
        lab.machine.start(FIRST, BUFFER, lab.scratch, 3)
        lab.machine.finish(FIRST)
        assert lab.word(SCRATCH_PAGE) == end | 1


class Watched:
    """Stores words one by one, and has a device read some addresses after each of them."""

    def __init__(self, lab: Lab, source_id: SourceId, spots: Sequence[int]) -> None:
        self.lab = lab
        self.source_id = source_id
        self.spots = spots
        self.seen: list[list[int]] | None = None
        self.stores = 0

    def __call__(self, words: Sequence[Word]) -> None:
        for offset, word in words:
            self.lab.region.store_u64(offset, word)
            self.stores += 1
            if self.seen is not None:
                self.seen.append(self.look())

    def look(self) -> list[int]:
        """Words, or the negative reason of the fault, from tables that the unit has not cached."""
        self.lab.unit.invalidate_all()
        found = self.lab.load(self.source_id, self.spots)
        return [-got.reason if isinstance(got, Fault) else got for got in found]

    def during(self, change: Callable[[], object]) -> None:
        """At each store, each spot is as before or as after."""
        before = self.look()
        seen: list[list[int]] = []
        self.seen = seen
        change()
        self.seen = None
        after = self.look()
        assert before != after or len(seen) == 1  # a split or merge alone is one store
        for now in seen:
            assert all(found in pair for found, *pair in zip(now, before, after, strict=True))


def test_the_unit_walks_between_any_two_stores_to_page_tables(lab: Lab) -> None:
    base = Iova(4 * GIB)
    spots = [base, base + 3 * PAGE, base + 600 * PAGE, base + 6 * MIB + 8, base + GIB - 8]
    watched = Watched(lab, FIRST, spots)
    for spot in spots:
        lab.put(PhysAddr(GIB + spot - base), spot | 1)
        lab.put(PhysAddr(DATA + spot % GIB % MIB), spot | 2)
    table = PageTable(lab.memories["dom-0"], watched, levels=lab.first.levels, walked=True)
    for change in (
        lambda: table.map(base, PhysAddr(GIB), GIB, RW),
        lambda: table.unmap(Iova(base + 3 * PAGE), PAGE),
        lambda: table.map(Iova(base + 3 * PAGE), PhysAddr(GIB + 3 * PAGE), PAGE, RW),
        lambda: table.protect(Iova(base + 600 * PAGE), 16 * PAGE, WRITE),
        lambda: table.protect(Iova(base + 5 * MIB), 3 * MIB, WRITE),
        lambda: table.unmap(base, 30 * PAGE),
        lambda: table.map(base, DATA, 20 * PAGE, READ),
        lambda: table.protect(base, GIB, READ),
        lambda: table.unmap(Iova(base + 2 * PAGE), 20 * MIB),
        lambda: table.unmap(Iova(0), lab.scratch),
    ):
        watched.during(change)
        table.invalidated()
    assert watched.stores > 60
    assert table.used_pages == (3 if lab.first.levels == 3 else 4)


def test_the_unit_walks_between_any_two_stores_to_context_tables(lab: Lab) -> None:
    lab.first.map(Iova(GIB), DATA, PAGE, RW)
    lab.put(DATA, 0x1111)
    lab.root.detach(SECOND)
    watched = Watched(lab, FIRST, [GIB])
    tables = RootTables(Memory(lab.region, [ROOT]), watched, walked=True)
    for _turn in range(2):
        watched.during(lambda: tables.detach(FIRST))
        watched.during(lambda: tables.attach(FIRST, lab.first.root, 2))
        # Now with a context table that stays, for the other device is in it.
        if not _turn:
            tables.attach(SECOND, lab.second.root, 3)
            tables.invalidated()
    assert watched.stores > 6


# ---------------------------------------------------------------------- at random


def _covered(lab: Lab, start: Iova, end: int) -> tuple[int, int]:
    """The range, widened to the leaves that its ends are in."""
    low, high = lab.walk(FIRST, start, 0).level, lab.walk(FIRST, Iova(end - PAGE), 0).level
    first, last = leaf_bytes(max(low, 1)), leaf_bytes(max(high, 1))
    return start // first * first, -(-end // last) * last


def test_thousands_of_changes_at_random(lab: Lab, pytestconfig: pytest.Config) -> None:
    """Any sequence of changes, each told to the unit as docs/iommu.md says, and no more than that.

    Now and then devices read and write at the edges of what has changed. The seed is the run's.
    """
    seed = int(pytestconfig.option.hypothesis_seed)
    rng = random.Random(f"{seed} {lab.mode} {lab.levels}")
    outcomes: dict[str, int] = {}
    top = 1 << width_bits(lab.levels)
    edges = [0, 2 * MIB, GIB, 2 * GIB, 3 * GIB, 5 * GIB, 200 * GIB, top]
    lengths = [1, 1, 2, 3, 100, 511, 512, 513, 1024, 2048, 5 * 512, 1 << 18, (1 << 18) - 1]
    spots: list[int] = []
    changes = 0
    for turn in range(2000):
        length = rng.choice(lengths) * PAGE
        at = rng.choice(edges) + rng.choice((0, -length, rng.randrange(-600, 600) * PAGE))
        if length >= GIB - PAGE and rng.randrange(4):
            at = rng.choice(edges[2:6])
        iova = Iova(max(0, min(at, top - length)))
        physical = GIB + iova % GIB + rng.choice((0, 0, 0, 0, 0, 0, PAGE, 2 * MIB))
        if physical + length > RAM:
            physical = max(DATA, physical - GIB)
        if iova <= lab.scratch < iova + length:
            continue
        old = _covered(lab, iova, iova + length)
        try:
            match rng.choice(("map", "map", "map", "map", "unmap", "protect")):
                case "map":
                    perm = rng.choice((RW, RW, RW, READ, WRITE))
                    lab.first.map(iova, PhysAddr(physical), length, perm)
                case "unmap":
                    lab.first.unmap(iova, length)
                case _:
                    lab.first.protect(iova, length, rng.choice((READ, WRITE, RW, RW)))
        except (ExistsError, NoSpaceError):
            pass
        else:
            changes += 1
            new = _covered(lab, iova, iova + length)
            lab.told(2, min(old[0], new[0]), max(old[1], new[1]))
        spots = [*spots[-16:], iova, iova + length, rng.randrange(iova, iova + length, 8)]
        if turn % 8 == 0:
            for outcome in _look(lab, rng, [*spots, *(s - 8 for s in spots)]):
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(f"seed {seed}: {changes} changes; {outcomes}")
    assert changes > 500
    assert outcomes.keys() >= {"level 1", "level 2", "level 3", "READ", "WRITE"}, outcomes
    domains = {"dom-0": lab.memories["dom-0"]}
    lab.first.unmap(lab.scratch, PAGE)
    lab.first.unmap(Iova(3 * GIB), GIB)  # addresses of interrupts, which the check reports
    report = check(None, domains, [PhysRange(DATA, PhysAddr(RAM))], config=lab.root.config)
    assert report.clean, report.findings
    lab.first.unmap(Iova(0), 1 << width_bits(lab.levels))
    assert lab.first.used_pages == 1


def _look(lab: Lab, rng: random.Random, spots: Sequence[int]) -> list[str]:
    """Reads at some addresses and a write at one, where memory is no table."""
    spots = [s for s in spots if s >= 0 and not lab.walk(FIRST, Iova(s), 0).interrupt]
    outcomes = lab.compare(FIRST, *rng.sample(spots, 5))
    spot = Iova(rng.choice(spots))
    physical = lab.walk(FIRST, spot, 0).physical
    if physical is None or physical >= DATA:
        outcomes.append(lab.compare_write(FIRST, spot))
    return outcomes
