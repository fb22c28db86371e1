"""A remapping unit: its state, translation on and off, its root table, invalidation.

Everything is derived from the registers; nothing is recorded of what was done. Stores into GCMD
repeat what GSTS says is on: a kernel that does not translate DMA may well remap interrupts, and
would lose each of them.

Sections are those of the VT-d specification, revision 5.10; docs/dma.md has the reasons.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

from pkernfs.errors import InvalidError, PkernfsError, UnitError
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region.checksum import crc32c
from pkernfs.region.region import Region
from pkernfs.units.window import Window
from pkernfs.vtd.invalidation import (
    DESCRIPTOR_BYTES,
    Cache,
    Invalidation,
    everything,
    queue_image,
    register_steps,
    wait_descriptor,
)
from pkernfs.vtd.invalidation import descriptor as descriptor_of
from pkernfs.vtd.registers import (
    STATUS,
    Capabilities,
    Capability,
    Command,
    ContextCommand,
    ExtendedCapability,
    Fault,
    FaultRecord,
    FaultStatus,
    Iotlb,
    ProtectedMemory,
    QueueAddress,
    QueueHead,
    QueueTail,
    RootTableAddress,
    Step,
    StepKind,
    Version,
    parse_fault,
)

#: From this major version on, the registers for invalidations are gone (6.5).
_QUEUE_ONLY = 6
_DONE = 1
#: How long (seconds) a unit has our queue at most: the kernel may wait with its interrupts off.
_BORROW_SECONDS = 0.1
_TRIES = 3
#: Where the way round the kernel's queue begins, in slots: see _borrow_queue().
_RESTART = 4
#: Magic, IQA, the unit's base, a QueuePlace, the tail, zero, CRC-32C.
_QUEUE_STATE = struct.Struct("<8sQQIIxxxxI")
_QUEUE_STATE_MAGIC = b"pkqueue\0"
_QUEUE_STATE_AT = 64
_MODES = {Mode.LEGACY: 0, Mode.SCALABLE: 1}
_NOWHERE = PhysAddr(0)
_QUEUE_ERRORS = FaultStatus.IQE.mask | FaultStatus.ICE.mask | FaultStatus.ITE.mask

_IDLE = Step(StepKind.WAIT_SAME, QueueHead.OFFSET, QueueTail.OFFSET)


class QueueMemory(NamedTuple):
    """Consecutive memory that nothing else uses for now: region offset, physical address."""

    region: Region
    offset: RegionOff
    physical: PhysAddr
    length: int


class QueuePlace(enum.IntEnum):
    """The kernel's place in its invalidation queue."""

    OFF = 0  # it has none
    ON = 1
    AT_BEGIN = 2  # its tail is so near the begin that nothing of ours would run before it


class QueueState(NamedTuple):
    """The kernel's invalidation queue before a unit borrows another: IQA, place and tail."""

    address: int
    place: QueuePlace
    tail: int


class State(NamedTuple):
    """GSTS, RTADDR and PMEN of a unit, as they are."""

    status: int
    root_register: int
    protected: bool

    @property
    def translating(self) -> bool:
        """True if the unit translates DMA."""
        return bool(Command.TE.get(self.status))

    @property
    def queue_on(self) -> bool:
        """True if the invalidation queue is on."""
        return bool(Command.QIE.get(self.status))

    @property
    def remaps_interrupts(self) -> bool:
        """True if the unit remaps interrupts."""
        return bool(Command.IRE.get(self.status))

    @property
    def root(self) -> PhysAddr:
        """Physical address of the root table, whether DMA is translated or not."""
        return RootTableAddress.RTA.get(self.root_register)


class Unit:
    """One unit, through a window to its registers. Not for two threads at a time."""

    def __init__(self, name: str, window: Window, base: PhysAddr = _NOWHERE) -> None:
        self.name = name
        self.base = base
        self._window = window
        self.capabilities = Capabilities(
            window.read32(Version.OFFSET),
            window.read64(Capability.OFFSET),
            window.read64(ExtendedCapability.OFFSET),
        )

    # ------------------------------------------------------------------ state

    def state(self) -> State:
        """Read GSTS, RTADDR and PMEN."""
        has_regions = self.capabilities.has(Capability.PLMR) or self.capabilities.has(
            Capability.PHMR
        )
        protected = has_regions and bool(
            ProtectedMemory.PRS.get(self._window.read32(ProtectedMemory.OFFSET))
        )
        return State(
            self._window.read32(STATUS), self._window.read64(RootTableAddress.OFFSET), protected
        )

    def walks(self, root: PhysAddr) -> bool:
        """Tell if the unit translates DMA by the tables below a root table."""
        state = self.state()
        return state.translating and state.root == root

    def faults(self) -> list[Fault]:
        """The faults that are recorded; a kernel that handles their interrupt takes them first."""
        first, count = self.capabilities.fault_records
        found = []
        for at in range(first, first + 16 * count, 16):
            fault = parse_fault(self._window.read64(at), self._window.read64(at + 8))
            if fault is not None:
                found.append(fault)
        return found

    def clear_faults(self) -> None:
        """Free the fault records, and clear their overflow."""
        first, count = self.capabilities.fault_records
        last_word = FaultRecord.F.mask >> 96
        steps = [Step(StepKind.WRITE_32, first + 16 * i + 12, last_word) for i in range(count)]
        self._window.run(
            [*steps, Step(StepKind.WRITE_32, FaultStatus.OFFSET, FaultStatus.PFO.mask)]
        )

    def coherent(self, mode: Mode) -> bool:
        """Tell if walks see what is in the processor's caches.

        In scalable mode that is a bit of each PASID table entry, which pkernfs leaves clear.
        """
        return mode is Mode.LEGACY and self.capabilities.extended(ExtendedCapability.C)

    # ------------------------------------------------------------------ commands

    def _command(self, what: str, *, on: int = 0, off: int = 0, waits: int | None = None) -> None:
        """Set and clear bits of GCMD, and wait until GSTS agrees on ``waits`` (default: these)."""
        wait = (on | off) if waits is None else waits
        steps = [
            Step(StepKind.COMMAND, Command.OFFSET, on, off),
            Step(StepKind.WAIT_32, STATUS, on & wait, wait),
        ]
        if not self._window.run(steps):
            raise UnitError(
                f"{self.name}: {what}: the unit does not do it: "
                f"got GSTS {self._window.read32(STATUS):#010x}"
            )

    def flush_write_buffer(self) -> None:
        """Have what was stored to tables reach memory, on units that want to be told (6.8)."""
        if self.capabilities.has(Capability.RWBF):
            steps = [
                Step(StepKind.COMMAND, Command.OFFSET, Command.WBF.mask),
                Step(StepKind.WAIT_32, STATUS, 0, Command.WBF.mask),
            ]
            if not self._window.run(steps):
                raise UnitError(f"{self.name}: write-buffer flush: the unit does not end it")

    def enable_translation(self, root: PhysAddr, mode: Mode, queue: QueueMemory | None) -> None:
        """Translate DMA by the tables below ``root``, which are complete and written back.

        On failure all is as it was before, as far as the unit obeys.

        :raises UnitError: the unit does not do it, or then says otherwise.
        """
        before = self.state()
        if before.translating and before.root != root:
            raise UnitError(f"{self.name}: translates already, by the tables at {before.root:#x}")
        wanted = root | RootTableAddress.TTM.put("TTM", _MODES[mode])
        try:
            self.flush_write_buffer()
            if not before.translating:
                self._set_root(wanted)
            if before.translating or not self.capabilities.has(Capability.ESRTPS):
                self.invalidate(everything(scalable=mode is Mode.SCALABLE), queue)
            if not before.translating:
                self._command("translation on", on=Command.TE.mask)
            self._end_protection(before)
            self._verify(wanted, before)
        except UnitError:
            if not before.translating:
                self._undo(before)
            raise

    def replace_root(self, root: PhysAddr, mode: Mode, queue: QueueMemory | None) -> None:
        """Translate DMA by the tables below ``root`` from now on; translation stays on.

        Until this returns a request may meet either root. Both have to translate it to the same,
        by entries that share no domain id unless they share what it maps (11.4.4.1).

        On failure the unit has the old root again, as far as the unit obeys.

        :raises UnitError: the unit does not do it, does not translate, or in another mode.
        """
        before = self.state()
        wanted = root | RootTableAddress.TTM.put("TTM", _MODES[mode])
        if not before.translating:
            raise UnitError(f"{self.name}: does not translate: there is no root to replace")
        if RootTableAddress.TTM.get(before.root_register) != _MODES[mode]:
            raise UnitError(f"{self.name}: translates in another mode than {mode.name.lower()}")
        try:
            self.flush_write_buffer()
            self._set_root(wanted)
            self._invalidate_roots(mode, queue)
            self._verify(wanted, before)
        except PkernfsError as e:
            try:
                self._set_root(before.root_register)
                self._invalidate_roots(mode, queue)
            except PkernfsError as back:
                raise UnitError(f"{e}; and the root table before is not in force: {back}") from None
            raise

    def _invalidate_roots(self, mode: Mode, queue: QueueMemory | None) -> None:
        """Nothing of an older root is used (6.6)."""
        if not self.capabilities.has(Capability.ESRTPS):
            self.invalidate(everything(scalable=mode is Mode.SCALABLE), queue)

    def _set_root(self, register: int) -> None:
        self._window.run([Step(StepKind.WRITE_64, RootTableAddress.OFFSET, register)])
        self._command("new root table", on=Command.SRTP.mask)

    def _end_protection(self, before: State) -> None:
        """Protected memory is closed to all DMA: translation protects from now on (11.4.8)."""
        if before.protected:
            steps = [
                Step(StepKind.WRITE_32, ProtectedMemory.OFFSET, 0),
                Step(StepKind.WAIT_32, ProtectedMemory.OFFSET, 0, ProtectedMemory.PRS.mask),
            ]
            if not self._window.run(steps):
                raise UnitError(f"{self.name}: protected memory: the unit does not open it")

    def _verify(self, root_register: int, before: State) -> None:
        now = self.state()
        kept = Command.IRE.mask | Command.QIE.mask | Command.CFI.mask
        expected = before.status & kept | Command.TE.mask | Command.SRTP.mask
        got = now.status & (kept | Command.TE.mask | Command.SRTP.mask)
        if got != expected or now.root_register != root_register:
            raise UnitError(
                f"{self.name}: not in force: got GSTS {now.status:#010x} and RTADDR "
                f"{now.root_register:#x}, expected {expected:#010x} and {root_register:#x}"
            )

    def _undo(self, before: State) -> None:
        steps = [
            Step(StepKind.COMMAND, Command.OFFSET, 0, Command.TE.mask),
            Step(StepKind.WAIT_32, STATUS, 0, Command.TE.mask),
            Step(StepKind.WRITE_64, RootTableAddress.OFFSET, before.root_register),
            Step(StepKind.COMMAND, Command.OFFSET, Command.SRTP.mask),
            Step(StepKind.WAIT_32, STATUS, Command.SRTP.mask, Command.SRTP.mask),
        ]
        self._window.run([], steps)

    def disable_translation(self, mode: Mode, queue: QueueMemory | None) -> None:
        """Translate no more. The root table stays set, which without translation means nothing.

        A unit drains DMA under way before it says that translation is off (11.4.4.1).

        :raises UnitError: the unit does not do it.
        """
        self._command("translation off", off=Command.TE.mask)
        self.invalidate(everything(scalable=mode is Mode.SCALABLE), queue)

    # ------------------------------------------------------------------ invalidations

    def needs_queue(self, mode: Mode) -> bool:
        """Tell if invalidations have to go through a queue: see :meth:`queue_bytes`."""
        return (
            self.state().queue_on or mode is Mode.SCALABLE or self.capabilities.major >= _QUEUE_ONLY
        )

    def queue_bytes(self) -> int:
        """Bytes of the memory that :meth:`invalidate` wants, aligned to their half."""
        iqa = self._window.read64(QueueAddress.OFFSET) if self.state().queue_on else 0
        return 2 * PAGE << QueueAddress.QS.get(iqa)

    def invalidate(self, what: Sequence[Invalidation], queue: QueueMemory | None) -> None:
        """Have the unit forget, one after the other; it has when this returns.

        :param queue: :meth:`queue_bytes` of memory; None on units that do without.
        :raises UnitError: the unit does not say that it has.
        """
        for one in what:
            if queue is not None:
                self._by_queue(one, queue)
            elif one.cache is Cache.PASID or self.state().queue_on:
                raise InvalidError(f"{self.name}: {one}: a queue is needed")
            else:
                self._by_register(one)

    def _by_register(self, what: Invalidation) -> None:
        iotlb = self.capabilities.iotlb_offset
        steps = register_steps(what, iotlb)
        if not self._window.run(steps):
            raise UnitError(f"{self.name}: invalidation ({what}): the unit does not end it")
        context = what.cache is Cache.CONTEXT
        done = self._window.read64(steps[0].offset)
        actual = ContextCommand.CAIG.get(done) if context else Iotlb.IAIG.get(done)
        if not actual:
            raise UnitError(f"{self.name}: invalidation ({what}): refused by the unit")

    def _by_queue(self, what: Invalidation, memory: QueueMemory) -> None:
        """Invalidate through a queue in memory of ours, which the unit borrows meanwhile.

        The queue that it has otherwise, if any, belongs to the kernel, which remaps interrupts.
        The kernel keeps its place in the queue where nobody else can reach it. So the unit borrows
        ours, and then gets the kernel's again. Both times it runs what is before the tail, which
        stays the kernel's. In our queue that is the invalidation and waits; in the kernel's what
        has been done before. Whatever the kernel may add meanwhile is run too.
        """
        for _try in range(_TRIES):
            kernel = self._kernel_queue_state()
            ours = self._prepare_queue(what, memory, kernel)
            last = self._restore_queue(kernel)
            done = self._window.run(
                self._borrow_queue(memory, ours, kernel.place),
                last,
                memory=memory.region,
                seconds=_BORROW_SECONDS,
            )
            refused = self._queue_errors()
            if refused:
                self._replace_refused(memory, ours, last)
            if self._has_wrapped(kernel):
                self._window.run(self._drain_wrapped(kernel))
            if self.state().queue_on != (kernel.place is not QueuePlace.OFF):
                raise UnitError(f"{self.name}: invalidation queue: the unit does not switch it")
            self._clear_queue_state(memory)
            if refused:
                raise UnitError(f"{self.name}: invalidation ({what}): got FSTS {refused:#x}")
            if done:
                return
        raise UnitError(f"{self.name}: invalidation ({what}): the unit does not end it")

    def _tail(self) -> int:
        return self._window.read64(QueueTail.OFFSET) & QueueTail.QT.mask

    def _kernel_queue_state(self) -> QueueState:
        """Read the state of the kernel's queue.

        :raises UnitError: it is at its begin, on a unit where that may mean anything.
        """
        # QEMU (7.2 to 10.0) does not give DW back. Linux sets it if a unit has scalable mode.
        dw = QueueAddress.DW.put("DW", self._wide)
        address = self._window.read64(QueueAddress.OFFSET) | dw
        return QueueState(address, self._kernel_place(), self._tail())

    def _kernel_place(self) -> QueuePlace:
        if not self.state().queue_on:
            return QueuePlace.OFF
        if self._tail() >= 2 * DESCRIPTOR_BYTES[self._wide]:
            return QueuePlace.ON
        if self.capabilities.has(Capability.ESIRTPS):
            # Perhaps the kernel's queue was never used, and what is in its slots means nothing.
            raise UnitError(f"{self.name}: the kernel's queue is at its begin: try again")
        return QueuePlace.AT_BEGIN

    def _has_wrapped(self, kernel: QueueState) -> bool:
        """Tell if the kernel's tail came round while the unit had our queue."""
        return kernel.place is QueuePlace.ON and self._tail() < kernel.tail

    def _borrow_queue(self, memory: QueueMemory, ours: int, place: QueuePlace) -> list[Step]:
        """Steps that have the unit use our queue, and wait until it is done."""
        use_ours = [Step(StepKind.WRITE_64, QueueAddress.OFFSET, ours), *self._switch(on=True)]
        if place is not QueuePlace.ON:
            tail = 2 * DESCRIPTOR_BYTES[self._wide]
            use_ours.insert(0, Step(StepKind.WRITE_64, QueueTail.OFFSET, 0))
            use_ours.append(Step(StepKind.WRITE_64, QueueTail.OFFSET, tail))
        before = [] if place is QueuePlace.OFF else [_IDLE, *self._switch(on=False)]
        wait = Step(StepKind.WAIT_MEMORY, self._status_offset(memory), _DONE)
        return [*before, *use_ours, wait, _IDLE]

    def _restore_queue(self, kernel: QueueState) -> list[Step]:
        """Steps that have the unit use the kernel's queue again, if it had one."""
        off, on = self._switch(on=False), self._switch(on=True)
        steps = [*off, Step(StepKind.WRITE_64, QueueAddress.OFFSET, kernel.address)]
        if kernel.place is QueuePlace.OFF:
            return off
        if kernel.place is QueuePlace.ON:
            return [*steps, *on, _IDLE]
        # Back to the begin, from where the kernel goes on, it is once round the queue.
        first = Step(StepKind.WRITE_64, QueueTail.OFFSET, _RESTART * DESCRIPTOR_BYTES[self._wide])
        return [*steps, first, *on, _IDLE, Step(StepKind.WRITE_64, QueueTail.OFFSET, 0), _IDLE]

    def _drain_wrapped(self, kernel: QueueState) -> list[Step]:
        """Steps once round the kernel's queue: its tail came round while the unit had ours.

        The unit runs so what the kernel had added before the end of the queue. The kernel may add
        more meanwhile. Wherever it stores its tail in between, the unit has run what is in the
        queue in the end, and is not ahead of the kernel.
        """
        length = PAGE << QueueAddress.QS.get(kernel.address)
        tail = self._tail()
        behind = (tail - 2 * DESCRIPTOR_BYTES[self._wide]) % length
        return [
            step
            for at in (behind, tail)
            for step in (Step(StepKind.WRITE_64, QueueTail.OFFSET, at), _IDLE)
        ]

    def _replace_refused(self, memory: QueueMemory, ours: int, last: Sequence[Step]) -> None:
        """A wait instead of what the unit has stopped at, so that our queue ends (6.5.2.10)."""
        wait = wait_descriptor(self._status_address(memory), _DONE)
        image = queue_image(wait, wait, ours)
        memory.region.copy_in(memory.offset, image)
        memory.region.flush_lines(memory.offset, len(image))
        tail = self._tail()
        self._clear_queue_errors()
        self._window.run([Step(StepKind.WRITE_64, QueueTail.OFFSET, tail)], last)

    @property
    def _wide(self) -> bool:
        """True if the descriptors of our queues have 256 bits, as scalable mode wants them."""
        return self.capabilities.extended(ExtendedCapability.SMTS)

    def _switch(self, *, on: bool) -> list[Step]:
        bit = Command.QIE.mask
        return [
            Step(StepKind.COMMAND, Command.OFFSET, bit if on else 0, 0 if on else bit),
            Step(StepKind.WAIT_32, STATUS, bit if on else 0, bit),
        ]

    def _prepare_queue(self, what: Invalidation, memory: QueueMemory, kernel: QueueState) -> int:
        """Prepare our queue, and a note on whose it replaces; our IQA."""
        shape = kernel.address & QueueAddress.DW.mask
        if kernel.place is not QueuePlace.OFF:  # as large as the kernel's, for the tail stays
            shape |= kernel.address & QueueAddress.QS.mask
        length = PAGE << QueueAddress.QS.get(shape)
        if memory.length < 2 * length or memory.physical % length:
            raise InvalidError(f"{self.name}: queue at {memory.physical:#x}: too small, unaligned")
        wait = wait_descriptor(self._status_address(memory), _DONE)
        image = queue_image(descriptor_of(what), wait, shape)
        memory.region.copy_in(memory.offset, image)
        note = bytearray(
            _QUEUE_STATE.pack(
                _QUEUE_STATE_MAGIC, kernel.address, self.base, kernel.place, kernel.tail, 0
            )
        )
        note[-4:] = crc32c(note).to_bytes(4, "little")
        page = bytearray(PAGE)
        page[_QUEUE_STATE_AT : _QUEUE_STATE_AT + _QUEUE_STATE.size] = note
        memory.region.copy_in(self._status_offset(memory), page)
        memory.region.flush_lines(memory.offset, memory.length // 2 + PAGE)
        return memory.physical | shape

    @staticmethod
    def _status_address(memory: QueueMemory) -> PhysAddr:
        return PhysAddr(memory.physical + memory.length // 2)

    @staticmethod
    def _status_offset(memory: QueueMemory) -> RegionOff:
        return RegionOff(memory.offset + memory.length // 2)

    def _clear_queue_state(self, memory: QueueMemory) -> None:
        at = RegionOff(self._status_offset(memory) + _QUEUE_STATE_AT)
        memory.region.store_u64(at, 0)

    def restore_interrupted_queue(self, page: QueueMemory) -> bool:
        """Give the kernel its queue back if we were killed before that; False: nothing to do.

        What a note says is believed only where the unit shows that a queue is missing, or is the
        one before the note: a region could hold anything.

        :param page: one that may have the note that :meth:`_prepare_queue` left.
        :raises UnitError: the unit does not take it.
        """
        at = RegionOff(page.offset + _QUEUE_STATE_AT)
        kernel = self._noted_state(page.region.read(at, _QUEUE_STATE.size))
        if kernel is None:
            return False
        missing = self._queue_is_missing(page.physical)
        if missing:
            steps = self._restore_queue(kernel)
            if self._has_wrapped(kernel):
                steps += self._drain_wrapped(kernel)
            if not self._window.run(steps):
                raise UnitError(f"{self.name}: the kernel's queue: the unit does not take it back")
        page.region.store_u64(at, 0)
        return missing

    def _noted_state(self, data: bytes) -> QueueState | None:
        """Decode a note about this unit; None: it is none."""
        magic, address, base, place, tail, crc = _QUEUE_STATE.unpack(data)
        if magic != _QUEUE_STATE_MAGIC or base != self.base or crc != crc32c(data[:-4] + bytes(4)):
            return None
        return QueueState(address, QueuePlace(place), tail) if place in list(QueuePlace) else None

    def _queue_is_missing(self, note: PhysAddr) -> bool:
        """Tell if the unit remaps interrupts without a queue, or has the queue before that page."""
        state = self.state()
        if not state.queue_on:
            return state.remaps_interrupts
        iqa = self._window.read64(QueueAddress.OFFSET)
        return QueueAddress.IQA.get(iqa) + (PAGE << QueueAddress.QS.get(iqa)) == note

    def _queue_errors(self) -> int:
        """FSTS if the unit has refused a descriptor, or waits for a device in vain; else 0."""
        status = self._window.read32(FaultStatus.OFFSET)
        return status if status & _QUEUE_ERRORS else 0

    def _clear_queue_errors(self) -> None:
        self._window.run([Step(StepKind.WRITE_32, FaultStatus.OFFSET, _QUEUE_ERRORS)])
