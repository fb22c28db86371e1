"""A remapping unit: its registers bit by bit, and QEMU's put in force, told to forget, and off.

QEMU runs without a guest, so that a test is the kernel where one is needed: one that remaps
interrupts has a queue of its own in force, and keeps its place in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.errors import InvalidError, UnitError
from pkernfs.iommu import READ, Mode
from pkernfs.layout import PAGE
from pkernfs.region.region import Region
from pkernfs.units.mmio import MemoryWindow
from pkernfs.units.unit import QueueMemory, Unit
from pkernfs.vtd.invalidation import descriptor, device, domain, everything
from pkernfs.vtd.registers import (
    KEPT,
    REGISTERS,
    STATUS,
    Capabilities,
    Command,
    Kind,
    Step,
    parse_fault,
)
from support.kernel_queue import (
    Kernel,
)
from support.qtest_machine import MIB, Lab
from support.qtest_window import UNIT, QtestWindow

QUEUE = 14 * MIB  # of ours, in QEMU's memory
KERNEL_QUEUE = 15 * MIB

#: Typed out by hand from chapter 11 (and compared with Linux, drivers/iommu/intel/iommu.h).
FIELDS = """
Version 0x00 MIN 3:0 MAX 7:4
Capability 0x08 ND 2:0 AFL 3:3 RWBF 4:4 PLMR 5:5 PHMR 6:6 CM 7:7 SAGAW 12:8 MGAW 21:16 ZLR 22:22
 FRO 33:24 SSLPS 37:34 PSI 39:39 NFR 47:40 MAMV 53:48 DWD 54:54 DRD 55:55 FS1GP 56:56 PI 59:59
 FS5LP 60:60 ECMDS 61:61 ESIRTPS 62:62 ESRTPS 63:63
ExtendedCapability 0x10 C 0:0 QI 1:1 DT 2:2 IR 3:3 EIM 4:4 PT 6:6 SC 7:7 IRO 17:8 MHMV 23:20
 NEST 26:26 PRS 29:29 SRS 31:31 PSS 39:35 PASID 40:40 SMTS 43:43 SSADS 45:45 SSTS 46:46 FSTS 47:47
 SMPWCS 48:48 ADMS 52:52
Command 0x18 CFI 23:23 SIRTP 24:24 IRE 25:25 QIE 26:26 WBF 27:27 EAFL 28:28 SFL 29:29 SRTP 30:30
 TE 31:31
RootTableAddress 0x20 TTM 11:10 RTA 63:12
ContextCommand 0x28 DID 15:0 SID 31:16 FM 33:32 CAIG 60:59 CIRG 62:61 ICC 63:63
FaultStatus 0x34 PFO 0:0 PPF 1:1 IQE 4:4 ICE 5:5 ITE 6:6 FRI 15:8
ProtectedMemory 0x64 PRS 0:0 EPM 31:31
QueueHead 0x80 QH 18:4
QueueTail 0x88 QT 18:4
QueueAddress 0x90 QS 2:0 DW 11:11 IQA 63:12
InvalidateAddress 0x00 AM 5:0 IH 6:6 ADDR 63:12
Iotlb 0x08 DID 47:32 DW 48:48 DR 49:49 IAIG 58:57 IIRG 61:60 IVT 63:63
FaultRecord 0x00 FI 63:12 SID 79:64 T2 92:92 FR 103:96 PV 123:104 T1 126:126 F 127:127
"""


def test_every_field_is_where_the_specification_has_it() -> None:
    expected: dict[str, list[str]] = {}
    for line in FIELDS.replace("\n ", " ").strip().splitlines():
        name, offset, *fields = line.split()
        expected[name] = [offset, *fields]
    found = {}
    for register in REGISTERS:
        fields = [
            word
            for name, field in vars(register).items()
            if hasattr(field, "msb")
            for word in (name, f"{field.msb}:{field.lsb}")
        ]
        found[register.__name__] = [f"0x{register.OFFSET:02x}", *fields]
    assert found == expected


def test_capabilities_in_words() -> None:
    qemu = Capabilities(0x10, 0xD2008C222F0606, 0xF42)
    assert (qemu.major, qemu.domain_ids, qemu.levels) == (1, 65536, (3, 4))
    assert (qemu.address_bits, qemu.largest_leaf) == (48, 3)
    assert (qemu.fault_records, qemu.iotlb_offset, qemu.register_bytes) == ((0x220, 1), 0xF0, PAGE)
    assert "queued invalidation" in qemu.words()
    small = Capabilities(0x60, 1 << 7 | 1 << 8 + 3 | 38 << 16 | 0x3FF << 24 | 7 << 40, 1)
    assert (small.major, small.domain_ids, small.levels) == (6, 16, (5,))
    assert (small.address_bits, small.largest_leaf) == (39, 1)
    assert (small.fault_records, small.register_bytes) == ((0x3FF0, 8), 5 * PAGE)
    assert small.words()[-2:] == ["coherent walks", "caching mode"]


def test_a_fault_record() -> None:
    assert parse_fault(0x1234_5000, 0x28 | 6 << 32) is None
    fault = parse_fault(0x1234_5678, 1 << 63 | 1 << 62 | 0x28 | 6 << 32)
    assert fault is not None
    assert fault[:5] == (0x28, 0x1234_5000, 6, False, None)
    assert str(fault) == "0000:00:05.0: read of 0x12345000: no read permission (0x06)"
    fault = parse_fault(0, 1 << 63 | 1 << 31 | 5 << 40 | 0xFF << 32)
    assert fault is not None
    assert (fault.write, fault.pasid) == (True, 5)
    assert str(fault).endswith("write of 0x0: fault reason 0xff")


# ---------------------------------------------------------------------- mmio.c's steps


def test_steps_on_memory() -> None:
    registers = bytearray(PAGE)
    window = MemoryWindow(registers)
    registers[STATUS : STATUS + 4] = 0xFF00_0003.to_bytes(4, "little")
    assert window.run(
        [
            Step(Kind.WRITE_32, 0x100, 0x1_1234_5678),
            Step(Kind.WRITE_64, 0x108, 0x1122_3344_5566_7788),
            Step(Kind.COMMAND, Command.OFFSET, Command.SRTP.mask, Command.TE.mask),
            Step(Kind.WAIT_32, 0x100, 0x5678, 0xFFFF),
            Step(Kind.WAIT_64, 0x108, 0x1122 << 48, 0xFFFF << 48),
            Step(Kind.WAIT_SAME, 0x108, 0x108),
        ]
    )
    assert window.read32(0x100) == 0x1234_5678
    assert window.read64(0x108) == 0x1122_3344_5566_7788
    # The one-shot bits are not repeated, TE is off, and all else is kept.
    assert window.read32(Command.OFFSET) == (0xFF00_0003 & KEPT | 1 << 30) & ~(1 << 31)


def test_a_wait_in_vain_ends_the_steps_but_not_the_last_ones() -> None:
    window = MemoryWindow(bytearray(PAGE))
    steps = [Step(Kind.WAIT_32, 8, 1, 1), Step(Kind.WRITE_32, 0, 1)]
    assert not window.run(steps, [Step(Kind.WRITE_32, 4, 2)], seconds=0.01)
    assert (window.read32(0), window.read32(4)) == (0, 2)


def test_a_wait_for_memory_that_another_stores() -> None:
    region = Region.anonymous(2 * MIB)
    window = MemoryWindow(bytearray(PAGE))
    other = threading.Timer(0.05, region.store_u64, (64, 7))
    other.start()
    assert window.run([Step(Kind.WAIT_MEMORY, 64, 7)], memory=region, seconds=10)
    other.join()
    region.close()


@pytest.mark.parametrize("offset", [-8, 2, PAGE, PAGE - 4])
def test_registers_that_are_not_there(offset: int) -> None:
    with pytest.raises(UnitError):
        MemoryWindow(bytearray(PAGE)).read64(offset)


# ---------------------------------------------------------------------- QEMU's unit


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, request.param)
    yield made
    made.close()


def queue_of(lab: Lab, pages: int = 4) -> QueueMemory:
    return QueueMemory(lab.region, QUEUE, QUEUE, pages * PAGE)


@pytest.fixture
def unit(lab: Lab) -> Unit:
    """The unit, off and with no queue in force, as a kernel without any use for it leaves it."""
    window = QtestWindow(lab.machine)
    bits = Command.TE.mask | Command.QIE.mask
    assert window.run(
        [Step(Kind.COMMAND, Command.OFFSET, 0, bits), Step(Kind.WAIT_32, STATUS, 0, bits)]
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
    lab.first.map(0x10_0000, 16 * MIB, PAGE, READ)
    unit.put_in_force(lab.root.root, lab.mode, queue)
    assert unit.walks(lab.root.root)
    assert not unit.walks(lab.root.root + PAGE)
    assert not unit.state().queue_on
    assert lab.load(0x28, [0x10_0000]) == [lab.word(16 * MIB)]
    unit.put_in_force(lab.root.root, lab.mode, queue)  # again: nothing but forgetting
    with pytest.raises(UnitError, match="translates already, by the tables at"):
        unit.put_in_force(lab.root.root + PAGE, lab.mode, queue)
    assert unit.walks(lab.root.root)
    unit.take_out_of_force(lab.mode, queue)
    assert not unit.state().translating


def test_faults_are_read_and_freed(lab: Lab, unit: Unit) -> None:
    queue = queue_of(lab)
    unit.put_in_force(lab.root.root, lab.mode, queue)
    lab.machine.start(0x30, 0x7654_3000, 0x40000, 1)
    lab.machine.finish(0x30)
    [fault] = unit.faults()
    assert (fault.source_id, fault.iova, fault.write) == (0x30, 0x7654_3000, False)
    unit.clear_faults()
    assert unit.faults() == []


def test_what_a_unit_has_cached_is_forgotten(lab: Lab, unit: Unit) -> None:
    """Each kind of invalidation, by registers or our queue, and by the kernel's."""
    scalable = lab.mode is Mode.SCALABLE
    queue = queue_of(lab)
    unit.put_in_force(lab.root.root, lab.mode, queue)
    kernel: Kernel | None = None
    for turn in range(2):
        for what in (domain(2), everything(scalable=scalable)):
            lab.first.map(0x10_0000, 16 * MIB, PAGE, READ)
            lab.put(16 * MIB, 77)
            assert lab.load(0x28, [0x10_0000]) == [77]
            lab.first.unmap(0x10_0000, PAGE)
            assert lab.load(0x28, [0x10_0000]) == [77], "nothing is cached: nothing is shown"
            unit.invalidate(what, queue if turn or scalable else None)
            lab.first.invalidated()
            lab.machine.start(0x28, 0x10_0000, 0x40000, 1)
            lab.machine.finish(0x28)
            [fault] = unit.faults()
            assert fault.iova == 0x10_0000
            unit.clear_faults()
        lab.first.map(0x10_0000, 16 * MIB, PAGE, READ)
        lab.root.detach(0x28)
        unit.invalidate(device(0x28, 2, scalable=scalable), queue if turn or scalable else None)
        lab.machine.start(0x28, 0x10_0000, 0x40000, 1)
        lab.machine.finish(0x28)
        assert [f.source_id for f in unit.faults()] == [0x28]
        unit.clear_faults()
        lab.root.attach(0x28, lab.first.root, 2)
        lab.first.unmap(0x10_0000, PAGE)
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
    unit.put_in_force(lab.root.root, lab.mode, queue_of(lab))
    for _turn in range(3):
        unit.invalidate(everything(scalable=lab.mode is Mode.SCALABLE), queue_of(lab))
        assert unit.state().queue_on
        assert kernel.window.read64(0x90) & -PAGE == KERNEL_QUEUE
        assert kernel.window.read64(0x80) == kernel.window.read64(0x88) == kernel.tail
        kernel.submit()
    unit.take_out_of_force(lab.mode, queue_of(lab))
    kernel.submit()


@pytest.mark.parametrize("place", [6, 254, 0])
def test_what_the_kernel_adds_while_its_queue_is_lent_is_run(
    lab: Lab, unit: Unit, place: int
) -> None:
    """Before each step of the loan another processor may submit, and waits until it is done."""

    class Racing(QtestWindow):
        left = -1
        status = 0

        def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
            if self.left == 0:
                self.status = kernel.begin()
            self.left -= 1
            return super()._do(step, memory, seconds)

    kernel = kernel_of(lab)
    kernel.submit()
    while kernel.place != 0:
        kernel.submit()
    unit.put_in_force(lab.root.root, lab.mode, queue_of(lab))
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
    unit.put_in_force(lab.root.root, lab.mode, queue_of(lab))
    half = unit.queue_bytes() // 2
    queue = QueueMemory(lab.region, QUEUE, QUEUE, 2 * half)
    note = QueueMemory(lab.region, QUEUE + half, QUEUE + half, PAGE)
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
            found += next_one.end_interrupted_loan(note)
            assert not next_one.end_interrupted_loan(note)
            assert kernel.window.read64(0x90) & -PAGE == KERNEL_QUEUE
            kernel.submit()
            kernel.submit()
        else:
            break
    assert left > 12
    assert left - found < 8  # before it had begun, and when it had ended but for the note
    assert not unit.end_interrupted_loan(note)


def test_a_note_is_not_believed_where_no_queue_is_missing(lab: Lab, unit: Unit) -> None:
    """A region that was made to do harm cannot have the unit read a queue of its own."""
    kernel = kernel_of(lab)
    kernel.submit()
    note = QueueMemory(lab.region, QUEUE + 2 * PAGE, QUEUE + 2 * PAGE, PAGE)
    unit._lend(domain(2)[0], queue_of(lab), 30 * MIB, 1)
    assert not unit.end_interrupted_loan(note)
    assert kernel.window.read64(0x90) & -PAGE == KERNEL_QUEUE
    kernel.submit()


def test_a_queue_that_is_too_small_or_unaligned(lab: Lab, unit: Unit) -> None:
    assert unit.queue_bytes() == 2 * PAGE
    kernel_of(lab).submit()
    assert unit.queue_bytes() == (4 if lab.mode is Mode.SCALABLE else 2) * PAGE
    for queue in (
        QueueMemory(lab.region, QUEUE, QUEUE, PAGE),
        QueueMemory(lab.region, QUEUE, QUEUE + 2048, 8 * PAGE),
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
            if step.kind is Kind.COMMAND and step.value & Command.TE.mask:
                return True
            return super()._do(step, memory, seconds)

    deaf = Unit("dmar0", Deaf(lab.machine), UNIT)
    with pytest.raises(UnitError, match="dmar0: translation on: the unit does not do it"):
        deaf.put_in_force(lab.root.root, lab.mode, queue_of(lab))
    assert not unit.state().translating
