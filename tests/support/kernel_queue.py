"""The kernel's side of an invalidation queue, made up."""

from __future__ import annotations

from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region.region import Region
from pkernfs.vtd.invalidation import wait_descriptor
from pkernfs.vtd.registers import (
    STATUS,
    Command,
    Step,
    StepKind,
)
from support.qtest_window import QtestWindow


class Kernel:
    """As Linux does: two descriptors at a time, its place in the queue known to it alone.

    A descriptor to wait for stores a word of its own, which the kernel has cleared before.
    """

    def __init__(self, region: Region, window: QtestWindow, queue: int, *, wide: bool) -> None:
        self.region = region
        self.window = window
        self.queue = queue
        self.size = 32 if wide else 16
        self.slots = 256
        self.place = 0
        self.window.write64(0x88, 0)
        self.window.write64(0x90, queue | (wide << 11) | wide)
        assert self.window.run(
            [
                Step(StepKind.COMMAND, Command.OFFSET, Command.QIE.mask),
                Step(StepKind.WAIT_32, STATUS, Command.QIE.mask, Command.QIE.mask),
            ]
        )

    @property
    def tail(self) -> int:
        return self.place * self.size

    def submit(self) -> None:
        """Invalidate all interrupt entries, and see it done."""
        status = self.begin()
        assert self.done(status)

    def begin(self) -> RegionOff:
        """The same, but do not wait; where the word is that says when it is done."""
        status = RegionOff(self.queue + 2 * PAGE + 8 * self.place)
        self.region.store_u64(status, 0)
        for words in ((4, 0), wait_descriptor(PhysAddr(status), 2)):
            for at, word in enumerate((*words, 0, 0)[: self.size // 8]):
                self.region.store_u64(RegionOff(self.queue + self.tail + 8 * at), word)
            self.place = (self.place + 1) % self.slots
        self.window.write64(0x88, self.tail)
        return status

    def done(self, status: RegionOff) -> bool:
        return bool(self.region.view(status, 8).cast("Q")[0] == 2)
