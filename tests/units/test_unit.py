"""A remapping unit, QEMU's: put in force, told to forget, and off.

QEMU runs without a guest, so that a test is the kernel where one is needed: one that remaps
interrupts has a queue of its own in force, and keeps its place in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.errors import InvalidError, UnitError
from pkernfs.iommu import READ, Mode
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff
from pkernfs.region.region import Region
from pkernfs.units.unit import QueueMemory, QueuePlace, QueueState, Unit
from pkernfs.vtd.invalidation import descriptor, device, domain, everything
from pkernfs.vtd.registers import (
    STATUS,
    Command,
    Step,
    StepKind,
)
from support.kernel_queue import (
    Kernel,
)
from support.qtest_machine import FIRST, MIB, SECOND, Lab
from support.qtest_window import UNIT, QtestWindow

QUEUE = 14 * MIB  # of ours, in QEMU's memory
KERNEL_QUEUE = 15 * MIB
AT = Iova(0x10_0000)  # what a device reads


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, request.param)
    yield made
    made.close()


def queue_of(lab: Lab, pages: int = 4, at: int = QUEUE) -> QueueMemory:
    return QueueMemory(lab.region, RegionOff(at), PhysAddr(at), pages * PAGE)


@pytest.fixture
def unit(lab: Lab) -> Unit:
    """The unit, off and with no queue in force, as a kernel without any use for it leaves it."""
    window = QtestWindow(lab.machine)
    bits = Command.TE.mask | Command.QIE.mask
    assert window.run(
        [Step(StepKind.COMMAND, Command.OFFSET, 0, bits), Step(StepKind.WAIT_32, STATUS, 0, bits)]
    )
    return Unit("dmar0", window, UNIT)


def kernel_of(lab: Lab) -> Kernel:
    """A kernel that remaps interrupts, and with them has its queue in force."""
    window = QtestWindow(lab.machine)
    return Kernel(lab.region, window, KERNEL_QUEUE, wide=lab.mode is Mode.SCALABLE)


def test_on_and_off(lab: Lab, unit: Unit) -> None:
    queue = queue_of(lab) if unit.needs_queue(lab.mode) else None
    assert (queue is None) == (lab.mode is Mode.LEGACY)
    assert not unit.walks(lab.root.root)
    lab.first.map(AT, PhysAddr(16 * MIB), PAGE, READ)
    unit.enable_translation(lab.root.root, lab.mode, queue)
    assert unit.walks(lab.root.root)
    assert not unit.walks(PhysAddr(lab.root.root + PAGE))
    assert not unit.state().queue_on
    assert lab.load(FIRST, [AT]) == [lab.word(PhysAddr(16 * MIB))]
    unit.enable_translation(lab.root.root, lab.mode, queue)  # again: nothing but forgetting
    with pytest.raises(UnitError, match="translates already, by the tables at"):
        unit.enable_translation(PhysAddr(lab.root.root + PAGE), lab.mode, queue)
    assert unit.walks(lab.root.root)
    unit.disable_translation(lab.mode, queue)
    assert not unit.state().translating


def test_faults_are_read_and_freed(lab: Lab, unit: Unit) -> None:
    queue = queue_of(lab)
    unit.enable_translation(lab.root.root, lab.mode, queue)
    lab.machine.start(SECOND, 0x7654_3000, 0x40000, 1)
    lab.machine.finish(SECOND)
    [fault] = unit.faults()
    assert (fault.source_id, fault.iova, fault.write) == (SECOND, 0x7654_3000, False)
    unit.clear_faults()
    assert unit.faults() == []


def test_what_a_unit_has_cached_is_forgotten(lab: Lab, unit: Unit) -> None:
    """Each kind of invalidation, by registers or our queue, and by the kernel's."""
    scalable = lab.mode is Mode.SCALABLE
    queue = queue_of(lab)
    unit.enable_translation(lab.root.root, lab.mode, queue)
    kernel: Kernel | None = None
    for turn in range(2):
        for what in (domain(2), everything(scalable=scalable)):
            lab.first.map(AT, PhysAddr(16 * MIB), PAGE, READ)
            lab.put(PhysAddr(16 * MIB), 77)
            assert lab.load(FIRST, [AT]) == [77]
            lab.first.unmap(AT, PAGE)
            assert lab.load(FIRST, [AT]) == [77], "nothing is cached: nothing is shown"
            unit.invalidate(what, queue if turn or scalable else None)
            lab.first.invalidated()
            lab.machine.start(FIRST, AT, 0x40000, 1)
            lab.machine.finish(FIRST)
            [fault] = unit.faults()
            assert fault.iova == AT
            unit.clear_faults()
        lab.first.map(AT, PhysAddr(16 * MIB), PAGE, READ)
        lab.root.detach(FIRST)
        unit.invalidate(device(FIRST, 2, scalable=scalable), queue if turn or scalable else None)
        lab.machine.start(FIRST, AT, 0x40000, 1)
        lab.machine.finish(FIRST)
        assert [f.source_id for f in unit.faults()] == [FIRST]
        unit.clear_faults()
        lab.root.attach(FIRST, lab.first.root, 2)
        lab.first.unmap(AT, PAGE)
        unit.invalidate(domain(2), queue)
        if kernel is None:
            kernel = kernel_of(lab)
            kernel.submit()


@pytest.mark.parametrize("place", [2, 4, 100, 254, 0])
def test_the_kernels_queue_is_given_back_wherever_its_tail_is(
    lab: Lab, unit: Unit, place: int
) -> None:
    """Also at its begin, after a whole lap; and the kernel goes on as if nothing had been."""
    kernel = kernel_of(lab)
    kernel.submit()
    while kernel.place != place:
        kernel.submit()
    unit.enable_translation(lab.root.root, lab.mode, queue_of(lab))
    for _turn in range(3):
        unit.invalidate(everything(scalable=lab.mode is Mode.SCALABLE), queue_of(lab))
        assert unit.state().queue_on
        assert kernel.window.read64(0x90) & -PAGE == KERNEL_QUEUE
        assert kernel.window.read64(0x80) == kernel.window.read64(0x88) == kernel.tail
        kernel.submit()
    unit.disable_translation(lab.mode, queue_of(lab))
    kernel.submit()


@pytest.mark.parametrize("place", [6, 254, 0])
def test_what_the_kernel_adds_while_its_queue_is_lent_is_run(
    lab: Lab, unit: Unit, place: int
) -> None:
    """Before each step of the loan another processor may submit, and waits until it is done."""

    class Racing(QtestWindow):
        left = -1
        status = RegionOff(0)

        def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
            if self.left == 0:
                self.status = kernel.begin()
            self.left -= 1
            return super()._do(step, memory, seconds)

    kernel = kernel_of(lab)
    kernel.submit()
    while kernel.place != 0:
        kernel.submit()
    unit.enable_translation(lab.root.root, lab.mode, queue_of(lab))
    window = Racing(lab.machine)
    racing = Unit("dmar0", window, UNIT)
    for at in range(50):
        while kernel.place != place:
            kernel.submit()
        window.left = at
        racing.invalidate(domain(2), queue_of(lab))
        if window.left >= 0:
            break
        assert kernel.done(window.status), at
        kernel.submit()
        kernel.submit()
    assert at > 12


@pytest.mark.parametrize("place", [6, 0])
def test_a_loan_that_was_cut_short_is_ended(lab: Lab, unit: Unit, place: int) -> None:
    """Killed at any step, the next daemon finds the note in the queue's memory."""

    class Killed(BaseException):
        pass

    class Remapping(QtestWindow):
        """QEMU sets IRE only with an interrupt table, which a kernel would have."""

        def read32(self, offset: int) -> int:
            return super().read32(offset) | (Command.IRE.mask if offset == STATUS else 0)

    class Dying(QtestWindow):
        left = 0

        def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
            if not self.left:
                raise Killed
            self.left -= 1
            return super()._do(step, memory, seconds)

    kernel = kernel_of(lab)
    kernel.submit()
    while kernel.place != 0:
        kernel.submit()
    unit.enable_translation(lab.root.root, lab.mode, queue_of(lab))
    half = unit.queue_bytes() // 2
    queue = queue_of(lab, 2 * half // PAGE)
    note = queue_of(lab, 1, QUEUE + half)
    found = 0
    window = Dying(lab.machine)
    dying = Unit("dmar0", window, UNIT)
    next_one = Unit("dmar0", Remapping(lab.machine), UNIT)
    for left in range(50):
        while kernel.place != place:
            kernel.submit()
        window.left = left
        try:
            dying.invalidate(domain(2), queue)
        except Killed:
            found += next_one.restore_interrupted_queue(note)
            assert not next_one.restore_interrupted_queue(note)
            assert kernel.window.read64(0x90) & -PAGE == KERNEL_QUEUE
            kernel.submit()
            kernel.submit()
        else:
            break
    assert left > 12
    assert left - found < 8  # before it had begun, and when it had ended but for the note
    assert not unit.restore_interrupted_queue(note)


def test_a_note_is_not_believed_where_no_queue_is_missing(lab: Lab, unit: Unit) -> None:
    """A region that was made to do harm cannot have the unit read a queue of its own."""
    kernel = kernel_of(lab)
    kernel.submit()
    note = queue_of(lab, 1, QUEUE + 2 * PAGE)
    state = QueueState(30 * MIB, QueuePlace.ON, unit._tail())
    unit._prepare_queue(domain(2)[0], queue_of(lab), state)
    assert not unit.restore_interrupted_queue(note)
    assert kernel.window.read64(0x90) & -PAGE == KERNEL_QUEUE
    kernel.submit()


def test_a_queue_that_is_too_small_or_unaligned(lab: Lab, unit: Unit) -> None:
    assert unit.queue_bytes() == 2 * PAGE
    kernel_of(lab).submit()
    assert unit.queue_bytes() == (4 if lab.mode is Mode.SCALABLE else 2) * PAGE
    for queue in (
        queue_of(lab, 1),
        QueueMemory(lab.region, RegionOff(QUEUE), PhysAddr(QUEUE + 2048), 8 * PAGE),
    ):
        with pytest.raises(InvalidError, match="too small, unaligned"):
            unit.invalidate(domain(2), queue)
    with pytest.raises(InvalidError, match="a queue is needed"):
        unit.invalidate(domain(2), None)


def test_a_descriptor_that_the_unit_refuses(
    lab: Lab, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is told and cleared, and the kernel's queue works on."""
    kernel = kernel_of(lab)
    kernel.submit()
    monkeypatch.setattr("pkernfs.units.unit.descriptor_of", lambda what: (0xF, 0))
    with pytest.raises(UnitError, match=r"invalidation .IOTLB, domain.: got FSTS 0x"):
        unit.invalidate(domain(2), queue_of(lab))
    monkeypatch.undo()
    assert descriptor(domain(2)[0])
    kernel.submit()
    unit.invalidate(domain(2), queue_of(lab))


def test_a_unit_that_does_not_obey(lab: Lab, unit: Unit) -> None:
    """Nothing is left in force."""

    class Deaf(QtestWindow):
        def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
            if step.kind is StepKind.COMMAND and step.value & Command.TE.mask:
                return True
            return super()._do(step, memory, seconds)

    deaf = Unit("dmar0", Deaf(lab.machine), UNIT)
    with pytest.raises(UnitError, match="dmar0: translation on: the unit does not do it"):
        deaf.enable_translation(lab.root.root, lab.mode, queue_of(lab))
    assert not unit.state().translating
