"""The units that walk a file system's tables now, and what each change of these has them forget.

docs/iommu.md, "What a running unit has to be told", has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, RegionOff, SourceId
from pkernfs.units.unit import QueueMemory, Unit
from pkernfs.vtd.invalidation import Invalidation, device, domain, everything
from pkernfs.vtd.registers import Capability


def _anything(source_id: SourceId) -> None:
    """Every device may be attached."""


class ActiveUnits:
    """Units that walk one root table. Each method returns when all of them have obeyed.

    :param admit: raises a PkernfsError if a device must not be attached.
    :raises UnitError (of the methods): a unit does not; what it does from then on is not known.
    """

    def __init__(
        self, units: Sequence[Unit], mode: Mode, admit: Callable[[SourceId], None] = _anything
    ) -> None:
        self.units = tuple(units)
        self.mode = mode
        self.admit = admit
        #: Whether all of them see what is in the processor's caches.
        self.coherent = all(u.coherent(mode) for u in units)
        #: Whether one may cache what is not present, so that it is told of every change.
        self.caches_absent = any(u.capabilities.has(Capability.CM) for u in units)
        #: Level of the largest leaf that all of them know.
        self.largest_leaf = min(u.capabilities.largest_leaf for u in units)
        #: How many domain ids all of them have.
        self.domain_ids = min(u.capabilities.domain_ids for u in units)

    @property
    def names(self) -> str:
        """The units' names."""
        return ", ".join(u.name for u in self.units)

    def write_back(self, memories: Sequence[Memory]) -> None:
        """Have the units see all that was stored in these files so far."""
        if not self.coherent:
            for memory in memories:
                for piece in memory.pieces:
                    memory.region.flush_lines(piece.offset, piece.length)

    def invalidate_all(self, root: RootTables) -> None:
        """After a change that is not known, or of the root table."""
        self._tell(root, everything(scalable=self.mode is Mode.SCALABLE))

    def invalidate_domains(self, root: RootTables, domain_ids: Sequence[int]) -> None:
        """After a change of page tables that may be cached."""
        self._tell(root, [one for number in domain_ids for one in domain(number)])

    def invalidate_device(self, root: RootTables, source_id: SourceId, domain_id: int) -> None:
        """After a change of a present context entry."""
        self._tell(root, device(source_id, domain_id, scalable=self.mode is Mode.SCALABLE))

    def flush_write_buffers(self) -> None:
        """After a change of what was not present: nothing of it is cached."""
        for unit in self.units:
            unit.flush_write_buffer()

    def _tell(self, root: RootTables, what: Sequence[Invalidation]) -> None:
        for unit in self.units:
            unit.flush_write_buffer()
            with_queue(unit, self.mode, root, partial(unit.invalidate, what))


def with_queue(
    unit: Unit, mode: Mode, root: RootTables, use: Callable[[QueueMemory | None], None]
) -> None:
    """Call ``use`` with memory for a queue, if a unit needs one: free pages of root-pgtables.

    They are zero afterwards, and never kept from becoming tables.
    """
    if not unit.needs_queue(mode):
        use(None)
        return
    length = unit.queue_bytes()
    piece = root.find_free_run(length, length // 2)
    region = root.memory.region
    use(QueueMemory(region, piece.offset, piece.physical, length))
    region.zero(piece.offset, length)


def restore_interrupted_queues(units: Sequence[Unit], root: RootTables) -> None:
    """Give the kernel its queue back where a daemon was killed before that.

    :raises UnitError: a unit does not take it.
    """
    region = root.memory.region
    for piece in root.memory.pieces:
        for at in range(0, piece.length, PAGE):
            offset, physical = RegionOff(piece.offset + at), PhysAddr(piece.physical + at)
            page = QueueMemory(region, offset, physical, PAGE)
            for unit in units:
                unit.restore_interrupted_queue(page)
