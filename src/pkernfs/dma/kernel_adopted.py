"""Tables of the region that this kernel has adopted: its own context entries lead to them.

A unit that the kernel's driver has cannot be told of changes: it would go on with what it has
cached, and with memory that is free for everybody else. So what an entry of the kernel tables leads
to stays as it is, until the device has been taken over (docs/dma.md, "After the jump").
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from pkernfs.errors import BusyError, NotFoundError, PkernfsError
from pkernfs.host.boot import by_panic
from pkernfs.host.sysroot import Host
from pkernfs.iommu.memory import Memory
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, SourceId
from pkernfs.units.discovery import FoundUnit, need_unit
from pkernfs.units.kernel_tables import KernelTables, MachineMemory
from pkernfs.vtd.entries import bdf_text

log = logging.getLogger(__name__)


class Adopted(NamedTuple):
    """A device, and the page tables in the region that the kernel has it use."""

    source_id: SourceId
    table: PhysAddr


class KernelEntry(NamedTuple):
    """An entry of a unit that the kernel drives, which leads to page tables in the region."""

    unit: str
    source_id: SourceId
    table: PhysAddr

    def __str__(self) -> str:
        return f"{self.unit} walks it for device {bdf_text(self.source_id)}"


class KernelAdopted:
    """The tables of a region that the running kernel's own entries lead to; asked each time.

    :param units: the units that the kernel drives.
    """

    def __init__(
        self, host: Host, memory: Memory, units: Callable[[], Sequence[FoundUnit]]
    ) -> None:
        self._host = host
        self._memory = memory
        self._units = units

    def entries(self) -> list[KernelEntry]:
        """All of them.

        :raises BusyError: this kernel may have adopted tables, and that cannot be seen.
        """
        found: list[KernelEntry] = []
        with MachineMemory(self._host, self._memory) as memory:
            for unit in self._units():
                found += self._of(unit, memory)
        return found

    def _of(self, found: FoundUnit, memory: MachineMemory) -> list[KernelEntry]:
        name = found.structure.name
        try:
            live = KernelTables(need_unit(found), memory).entries
        except NotFoundError:
            return []  # it does not translate
        except PkernfsError as e:
            if not by_panic(self._host):
                log.debug("%s: %s", name, e)
                return []
            raise BusyError(
                f"this kernel may have adopted these tables, and {name} cannot be looked at: {e}"
            ) from None
        ours = [e for e in live if self._memory.offset(e.table, PAGE) is not None]
        return [KernelEntry(name, e.source_id, e.table) for e in ours]

    def check(
        self, what: str, tables: Collection[PhysAddr], source_id: SourceId | None = None
    ) -> None:
        """Check that page tables may change; ``what`` begins the message.

        :param source_id: only what this device does counts.
        :raises BusyError: an entry leads to one of ``tables``.
        """
        for entry in self.entries():
            if entry.table in tables and source_id in (None, entry.source_id):
                raise BusyError(
                    f"{what}: {entry}, and the kernel has that unit: it cannot be told of changes: "
                    "take the device over first (scripts/take-over)"
                )
