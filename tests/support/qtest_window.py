"""Registers of QEMU's intel-iommu through qtest: a Window for pkernfs.units.unit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region.region import Region
from pkernfs.vtd.registers import KEPT, STATUS, Command, Step, StepKind

UNIT = PhysAddr(0xFED9_0000)  # where QEMU has the registers


class Bus(Protocol):
    """What carries loads and stores."""

    def say_all(self, commands: Sequence[Sequence[object]]) -> list[int]:
        """Do each of ``("readl", address)``, ``("writeq", address, value)``, ...; what was read."""


class QtestWindow:
    """As mmio.c does the steps, one load or store at a time."""

    def __init__(self, bus: Bus, base: PhysAddr = UNIT) -> None:
        self._bus = bus
        self._base = base

    def read32(self, offset: int) -> int:
        return self._bus.say_all([("readl", self._base + offset)])[0]

    def read64(self, offset: int) -> int:
        return self._bus.say_all([("readq", self._base + offset)])[0]

    def write32(self, offset: int, value: int) -> None:
        self._bus.say_all([("writel", self._base + offset, value)])

    def write64(self, offset: int, value: int) -> None:
        self._bus.say_all([("writeq", self._base + offset, value)])

    def run(
        self,
        steps: Sequence[Step],
        last: Sequence[Step] = (),
        *,
        memory: Region | None = None,
        seconds: float = 1.0,
    ) -> bool:
        done = True
        for step in steps:
            done = done and self._do(step, memory, seconds)
        for step in last:
            done &= self._do(step, memory, seconds)
        return done

    def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
        kind, offset, value, mask = step
        if kind is StepKind.WRITE_32:
            self.write32(offset, value)
        elif kind is StepKind.WRITE_64:
            self.write64(offset, value)
        elif kind is StepKind.COMMAND:
            self.write32(Command.OFFSET, self.read32(STATUS) & KEPT & ~mask | value)
        else:
            # QEMU does what it is told before it answers: the time is for what never comes.
            deadline = time.monotonic() + min(seconds, 0.2)
            while not self._is_so(step, memory):
                if time.monotonic() > deadline:
                    return False
        return True

    def _is_so(self, step: Step, memory: Region | None) -> bool:
        kind, offset, value, mask = step
        if kind is StepKind.WAIT_32:
            return self.read32(offset) & mask == value
        if kind is StepKind.WAIT_64:
            return self.read64(offset) & mask == value
        if kind is StepKind.WAIT_SAME:
            return self.read64(offset) == self.read64(value)
        assert memory is not None
        return memory.view(RegionOff(offset), 4).cast("I")[0] == value
