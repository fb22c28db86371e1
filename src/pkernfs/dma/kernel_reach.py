"""What devices under VFIO reach by the running kernel's own tables.

A process may have VFIO map memory for a device, and then unmap and close it. /proc shows nothing of
that: VFIO does not count memory of device-dax as locked, and the kernel gives it away all the same
(Linux, vfio_iommu_type1.c: is_invalid_reserved_pfn()). So the kernel tables are asked, each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from pkernfs.errors import NotFoundError, PkernfsError
from pkernfs.host import pci
from pkernfs.host.dmar import Dmar, read_dmar
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import HOST, Host
from pkernfs.iommu.memory import Memory, merge_ranges, overlaps
from pkernfs.quantities import PhysRange
from pkernfs.units.discovery import FoundUnit, find_units, need_unit
from pkernfs.units.kernel_tables import KernelTables, MachineMemory
from pkernfs.vtd.entries import bdf_text

log = logging.getLogger(__name__)

_DRIVERS = "sys/bus/pci/drivers"


def _find(host: Host, dmar: Dmar) -> list[FoundUnit]:
    return find_units(host, dmar, write=False)


class KernelReach:
    """The devices under VFIO, and the memory that they reach; any one thread at a time may ask.

    :param region: memory that is a region's, and not in /proc/kcore: the kernel may have adopted
        tables there.
    """

    def __init__(
        self,
        region: Memory,
        host: Host = HOST,
        find: Callable[[Host, Dmar], list[FoundUnit]] = _find,
    ) -> None:
        self._region = region
        self._host = host
        self._find = find

    def holder(self, pieces: Iterable[Span]) -> str | None:
        """Name a device under VFIO that reaches a byte of memory; None: none is seen to."""
        names = set(under_vfio(self._host))
        if not names:
            return None
        wanted = merge_ranges(PhysRange(p.start, p.end) for p in pieces)
        try:
            for found in self._find(self._host, read_dmar(self._host)):
                if found.driven and (name := self._reaching(found, names, wanted)):
                    return f"device {name}"
        except PkernfsError as e:  # no registers, no /proc/kcore: docs/security.md says so
            log.debug("what devices under VFIO reach cannot be seen: %s", e)
        return None

    def _reaching(
        self, found: FoundUnit, names: set[str], wanted: Sequence[PhysRange]
    ) -> str | None:
        """Name a device below one unit that reaches some of ``wanted``."""
        with MachineMemory(self._host, self._region) as memory:
            try:
                kernel = KernelTables(need_unit(found), memory)
            except NotFoundError:
                return None  # it does not translate
            for entry in kernel.entries:
                name = bdf_text(entry.source_id, found.structure.segment)
                if name not in names:
                    continue
                memory.begin()
                try:
                    mapped = [PhysRange.of(m.physical, m.length) for m in kernel.mappings(entry)]
                except PkernfsError as e:  # that may be seen of others
                    log.debug("device %s: what it reaches cannot be seen: %s", name, e)
                    continue
                if any(overlaps(wanted, one) for one in mapped):
                    return name
        return None


def under_vfio(host: Host) -> Iterator[str]:
    """Yield the devices that a driver of VFIO has, as lspci -D names them."""
    for driver in host.list(_DRIVERS):
        if "vfio" in driver:
            devices = set(host.list(f"{_DRIVERS}/{driver}"))
            yield from (name for name in host.list(pci.DEVICES) if name in devices)
