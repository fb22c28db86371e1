"""Several units with one root table: what all of them can do, and what each is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory, store_words
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import PAGE
from pkernfs.quantities import RegionOff, RegionRun, SourceId
from pkernfs.region.region import Region
from pkernfs.units.unit import QueueMemory, Unit
from pkernfs.units.unit_set import ActiveUnits, restore_interrupted_queues, with_queue
from pkernfs.vtd.invalidation import Invalidation, device, domain, everything
from pkernfs.vtd.registers import STATUS, Capability, Command, ExtendedCapability, Step, Version
from support.page_tables import MIB, PHYS_BASE

CAP = 0xD2008C222F0606  # QEMU's
ECAP = 0xF42
EDU = SourceId(0x28)
RWBF, CM, C = 1 << 4, 1 << 7, 1


class Registers:
    """Registers that only say what a unit can do."""

    def __init__(self, cap: int = CAP, ecap: int = ECAP, status: int = 0) -> None:
        self.words = {
            Version.OFFSET: 0x10,
            Capability.OFFSET: cap,
            ExtendedCapability.OFFSET: ecap,
            STATUS: status,
        }
        self.steps: list[Step] = []

    def read32(self, offset: int) -> int:
        return self.words.get(offset, 0)

    read64 = read32

    def run(
        self,
        steps: Sequence[Step],
        last: Sequence[Step] = (),
        *,
        memory: Region | None = None,
        seconds: float = 1.0,
    ) -> bool:
        self.steps += [*steps, *last]
        return True


class Told(Unit):
    """A unit that notes what it is told to forget, and whether it had memory for a queue."""

    def __init__(self, registers: Registers) -> None:
        super().__init__("dmar0", registers)
        self.told: list[Invalidation] = []
        self.queues: list[QueueMemory | None] = []

    def invalidate(self, what: Sequence[Invalidation], queue: QueueMemory | None) -> None:
        self.told += what
        self.queues.append(queue)
        if queue is not None:
            queue.region.copy_in(queue.offset, b"x" * queue.length)


@pytest.fixture
def root() -> Iterator[RootTables]:
    with Region.anonymous(2 * MIB, phys_base=PHYS_BASE) as region:
        yield RootTables(Memory(region, [RegionRun(RegionOff(0), 64 * PAGE)]), store_words(region))


def test_what_all_of_them_can_do() -> None:
    large, small = Registers(), Registers(CAP & ~(3 << 34) & ~7 | 2 | CM, ECAP & ~C)
    both = ActiveUnits([Told(large), Told(small)], Mode.LEGACY)
    assert (both.largest_leaf, both.domain_ids, both.coherent) == (1, 256, False)
    assert both.caches_absent
    assert both.names == "dmar0, dmar0"
    one = ActiveUnits([Told(Registers(ecap=ECAP | C))], Mode.LEGACY)
    assert (one.largest_leaf, one.domain_ids, one.coherent) == (3, 65536, True)
    assert not one.caches_absent
    assert not ActiveUnits([Told(Registers(ecap=ECAP | C))], Mode.SCALABLE).coherent


@pytest.mark.parametrize("mode", list(Mode))
def test_each_is_told_of_each_change(root: RootTables, mode: Mode) -> None:
    units = [Told(Registers()), Told(Registers(CAP | RWBF))]
    both = ActiveUnits(units, mode)
    scalable = mode is Mode.SCALABLE
    both.invalidate_all(root)
    both.invalidate_domains(root, [3, 4])
    both.invalidate_device(root, EDU, 3)
    expected = [
        *everything(scalable=scalable),
        *domain(3),
        *domain(4),
        *device(EDU, 3, scalable=scalable),
    ]
    assert [u.told for u in units] == [expected] * 2
    assert all((queue is not None) == scalable for u in units for queue in u.queues)


def test_a_write_buffer_is_flushed_where_there_is_one(root: RootTables) -> None:
    without, needs = Registers(), Registers(CAP | RWBF)
    both = ActiveUnits([Told(without), Told(needs)], Mode.LEGACY)
    both.flush_write_buffers()
    assert not without.steps
    assert [s.value for s in needs.steps if s.offset == Command.OFFSET] == [Command.WBF.mask]
    both.invalidate_domains(root, [1])
    assert len(needs.steps) == 4


def test_memory_for_a_queue_is_zero_again(root: RootTables) -> None:
    unit = Told(Registers())
    used: list[QueueMemory | None] = []
    with_queue(unit, Mode.LEGACY, root, used.append)
    assert used == [None]
    with_queue(unit, Mode.SCALABLE, root, lambda queue: unit.invalidate([], queue))
    [queue] = unit.queues
    assert queue is not None
    assert queue.length == unit.queue_bytes() == 2 * PAGE
    assert queue.physical == PHYS_BASE + queue.offset
    assert queue.physical % PAGE == 0
    assert root.memory.region.is_zero(queue.offset, queue.length)


def test_stores_are_written_back_for_units_past_the_caches(
    root: RootTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Region, "flush_lines", lambda _region, offset, length: flushed.append((offset, length))
    )
    ActiveUnits([Told(Registers(ecap=ECAP | C))], Mode.LEGACY).write_back([root.memory])
    assert not flushed
    ActiveUnits([Told(Registers(ecap=ECAP & ~C))], Mode.LEGACY).write_back([root.memory])
    assert flushed == [(0, 64 * PAGE)]


def test_every_page_is_looked_at_for_a_note(root: RootTables) -> None:
    class Looking(Told):
        pages: list[int] = []  # noqa: RUF012

        def restore_interrupted_queue(self, page: QueueMemory) -> bool:
            self.pages.append(page.physical)
            return False

    restore_interrupted_queues([Looking(Registers())], root)
    assert Looking.pages == [PHYS_BASE + at for at in range(0, 64 * PAGE, PAGE)]
