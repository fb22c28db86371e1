"""Drivers for a VT-d unit's registers and for QEMU's edu device, on whatever reaches them.

Sections are those of the VT-d specification, revision 5.10.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pkernfs.iommu import FaultReason
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, SourceId

UNIT = 0xFED9_0000  # where QEMU has the registers
BUFFER = 0x40000  # of an edu device, 4 KiB
ONE_SHOT = 0x96FF_FFFF  # bits of GSTS that a write of GCMD has to keep (11.4.4.1)


class Bus(Protocol):
    """What carries loads and stores."""

    def say_all(self, commands: Sequence[Sequence[object]]) -> list[int]:
        """Do each of ``("readl", address)``, ``("writeq", address, value)``, ...; what was read."""


class Edu:
    """QEMU's edu device, whose transfers take 100 ms of the machine's time."""

    def __init__(self, bus: Bus, bar: int) -> None:
        self._bus = bus
        self._bar = bar

    def start(self, source: int, target: int, command: int, count: int = 8) -> None:
        """Begin a transfer: command 1 reads memory, 3 writes it."""
        values = zip((0x80, 0x88, 0x90, 0x98), (source, target, count, command), strict=True)
        self._bus.say_all([("writeq", self._bar + at, value) for at, value in values])

    def busy(self) -> bool:
        """Whether a transfer is under way."""
        return bool(self._bus.say_all([("readq", self._bar + 0x98)])[0] & 1)

    def finish(self) -> None:
        """Wait for the end of a transfer."""
        deadline = time.monotonic() + 10
        while self.busy():
            assert time.monotonic() < deadline, "the device does not end its transfer"


class Fault(NamedTuple):
    """What a fault recording register holds (11.4.7.6); ``iova`` is that of the page."""

    reason: int
    source_id: SourceId
    iova: Iova
    write: bool


class Unit:
    """The registers of the remapping unit. Invalidations go through its queue, if it has one."""

    def __init__(self, bus: Bus, base: int = UNIT) -> None:
        self._bus = bus
        self._base = base
        capabilities = self.read(0x08)
        self._iotlb = (self.read(0x10) >> 8 & 0x3FF) * 16
        self._records = (capabilities >> 24 & 0x3FF) * 16
        self._record_count = (capabilities >> 40 & 0xFF) + 1
        self._largest_mask = capabilities >> 48 & 0x3F
        self._queue = 0
        self._wide = False
        self._tail = 0

    def read(self, register: int, width: str = "q") -> int:
        """The value of a register."""
        return self._bus.say_all([(f"read{width}", self._base + register)])[0]

    def write(self, register: int, value: int, width: str = "q") -> None:
        """Store into a register."""
        self._bus.say_all([(f"write{width}", self._base + register, value)])

    def command(self, bit: int) -> None:
        """Set a bit of GCMD and wait for it in GSTS."""
        self.write(0x18, self.read(0x1C, "l") & ONE_SHOT | 1 << bit, "l")
        assert self.read(0x1C, "l") >> bit & 1

    def use_queue(self, page: int, *, wide: bool) -> None:
        """From now on, invalidate through a queue in that page and the next one (6.5.2).

        :param wide: descriptors of 256 bits, as scalable mode wants them.
        """
        self._queue, self._wide = page, wide
        self.write(0x88, 0)
        self.write(0x90, page | wide << 11)
        self.command(26)

    def enable(self, root: int, *, scalable: bool) -> None:
        """Put a root table in force (6.6) and translate."""
        self.write(0x20, root | (1 << 10 if scalable else 0))
        self.command(30)
        self.invalidate_all()
        self.command(31)

    # ------------------------------------------------------------------ invalidations

    def invalidate_all(self) -> None:
        """Context cache, PASID cache and IOTLB, globally."""
        if self._queue:
            self._submit(
                (1 | 1 << 4, 0), *([(7 | 3 << 4, 0)] if self._wide else []), (2 | 1 << 4, 0)
            )
        else:
            self._context_command(1 << 61)
            self._iotlb_command(1 << 60)

    def invalidate_device(self, source_id: SourceId, domain_id: int) -> None:
        """What a change of a device's context entry asks for (table 28)."""
        if self._queue:
            pasids = [(7 | domain_id << 16, 0)] if self._wide else []
            context = (1 | 3 << 4 | domain_id << 16 | source_id << 32, 0)
            self._submit(context, *pasids, (2 | 2 << 4 | domain_id << 16, 0))
        else:
            self._context_command(3 << 61 | source_id << 16 | domain_id)
            self._iotlb_command(2 << 60 | domain_id << 32)

    def invalidate_pages(self, domain_id: int, start: int, end: int) -> None:
        """IOTLB, page-selective over a range, with IH = 0."""
        ranges = []
        while start < end:
            mask = min(self._largest_mask, (start & -start).bit_length() - 13 if start else 64)
            while start + (PAGE << mask) > end:
                mask -= 1
            ranges.append(start | mask)
            start += PAGE << mask
        if self._queue:
            self._submit(*((2 | 3 << 4 | domain_id << 16, address) for address in ranges))
        else:
            for address in ranges:
                self._iotlb_command(3 << 60 | domain_id << 32, address)

    def _context_command(self, command: int) -> None:
        self.write(0x28, 1 << 63 | command)
        assert not self.read(0x28) >> 63

    def _iotlb_command(self, command: int, address: int = 0) -> None:
        at = self._base + self._iotlb
        done = self._bus.say_all(
            [("writeq", at, address), ("writeq", at + 8, 1 << 63 | command), ("readq", at + 8)]
        )[-1]
        assert not done >> 63
        assert done >> 57 & 3  # the granularity that it was done at

    def _submit(self, *descriptors: tuple[int, int]) -> None:
        """Queue descriptors, and one to wait for, which writes a word to the next page."""
        status = self._queue + PAGE
        wait = (5 | 1 << 5 | 1 << 6 | 1 << 32, status)  # SW, FN, and 1 as the data
        commands: list[tuple[str, int] | tuple[str, int, int]] = [("writeq", status, 0)]
        size = 32 if self._wide else 16
        for descriptor in (*descriptors, wait):
            for i, word in enumerate((*descriptor, 0, 0)[: size // 8]):
                commands.append(("writeq", self._queue + self._tail + 8 * i, word))
            self._tail = (self._tail + size) % PAGE
        commands += [
            ("writeq", self._base + 0x88, self._tail),
            ("readq", self._base + 0x80),
            ("readq", status),
        ]
        assert self._bus.say_all(commands)[-2:] == [self._tail, 1]

    # ------------------------------------------------------------------ faults

    def fault(self) -> Fault | None:
        """The oldest fault that is recorded, which is then cleared, and its status with it."""
        status = self.read(0x34, "l")
        assert not status & 1 << 4, "invalidation queue error"
        if not status & 2:  # PPF
            return None
        record = self._records + 16 * (status >> 8 & 0xFF)
        low, high = self.read(record), self.read(record + 8)
        assert high >> 63
        self.write(record + 12, 1 << 31, "l")
        self.write(0x34, 1, "l")
        return Fault(
            high >> 32 & 0xFF, SourceId(high & 0xFFFF), Iova(low & -PAGE), not high >> 62 & 1
        )


def reasons_in_qemu(reason: FaultReason, *, write: bool) -> set[int]:
    """The numbers that QEMU may report for a fault reason.

    Version 7.2 has legacy mode's numbers for scalable mode's faults, and one for all that is wrong
    with PASID tables; later versions have more of their own. Legacy mode's must be exact.
    """
    name = reason.name
    if not name.startswith("SM_"):
        return {reason}
    if name.startswith("SM_PASID"):
        return {reason, FaultReason.SM_PASID_TABLE_ACCESS}
    name = {
        "SM_PAGING_ENTRY_P": "WRITE" if write else "READ",
        "SM_PAGING_ROOT_INV": "CONTEXT_ENTRY_INV",
    }.get(name, name.removeprefix("SM_"))
    return {reason, FaultReason[name]}
