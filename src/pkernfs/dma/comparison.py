"""The running kernel's tables beside a file system's: what units translate by each.

Read anew each time: a kernel changes its tables whenever a VMM maps something, and says so nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pkernfs.dma.mount import tables_of
from pkernfs.errors import InvalidError, NotFoundError, NotSupportedError
from pkernfs.host.dmar import Dmar, read_dmar
from pkernfs.host.pci import PciDevice, group_of, read_device, unit_of
from pkernfs.host.sysroot import Host
from pkernfs.iommu.context_walk import Device
from pkernfs.iommu.page_pool import Mapping
from pkernfs.iommu.page_walk import without
from pkernfs.quantities import PhysAddr, SourceId
from pkernfs.units.discovery import FoundUnit, need_unit
from pkernfs.units.kernel_tables import KernelTables, MachineMemory, Shape, check_shape
from pkernfs.units.requirements import unfit_reason
from pkernfs.vtd.entries import bdf_text, perm_text

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem
    from pkernfs.region.region import Region

Finder = Callable[[Host, Dmar], list[FoundUnit]]


def check_addresses(region: Region) -> None:
    """:raises NotSupportedError: no unit can walk tables that are in a region."""
    if not region.real_addresses:
        raise NotSupportedError(
            f"{region.name}: its addresses are not those of memory that devices can "
            "reach: a region is needed that is SIZE!START, device-dax or on hugetlbfs"
        )


class KernelUnits:
    """The units of the machine as the running kernel has them now.

    :raises NotFoundError, InvalidError, PermissionDeniedError: see :func:`read_dmar`.
    :raises NotSupportedError: the region has no addresses that devices can reach.
    """

    def __init__(self, fs: FileSystem, host: Host, find: Finder) -> None:
        check_addresses(fs.region)
        self._fs = fs
        self._host = host
        self.dmar = read_dmar(host)
        self.found = {f.structure.name: f for f in find(host, self.dmar)}
        self._memory = MachineMemory(host, tables_of(fs).region_memory())
        self._units: dict[str, KernelTables] = {}
        self._mapped: dict[tuple[PhysAddr, int], list[Mapping]] = {}

    def __enter__(self) -> KernelUnits:
        return self

    def __exit__(self, *exc: object) -> None:
        self._memory.__exit__()

    # ------------------------------------------------------------------ devices and units

    def device(self, source_id: SourceId) -> PciDevice:
        """A device that may depend on tables of a region.

        :raises NotFoundError: there is none.
        :raises InvalidError: it may not; the reason.
        """
        device = read_device(self._host, source_id)
        if device is None:
            raise NotFoundError(f"device {bdf_text(source_id)}: no such device")
        reason = unfit_reason(self.dmar, device, source_id)
        if reason is not None:
            raise InvalidError(reason)
        return device

    def above(self, device: PciDevice) -> FoundUnit:
        """The unit that a device of :meth:`device` is below."""
        structure = unit_of(self.dmar, device)
        assert structure is not None
        return self.found[structure.name]

    def unit(self, found: FoundUnit) -> KernelTables:
        """Find the tables that a unit walks now.

        :raises PkernfsError: it cannot be seen; the reason.
        """
        name = found.structure.name
        if name not in self._units:
            self._memory.begin()
            self._units[name] = KernelTables(need_unit(found), self._memory)
        return self._units[name]

    def driven(self) -> list[KernelTables]:
        """The units of segment 0, whose devices these tables are for, that the kernel drives.

        Without those that do not translate.

        :raises PkernfsError: one of them cannot be seen.
        """
        driven = [f for f in self.found.values() if f.driven and not f.structure.segment]
        return [self.unit(f) for f in driven if need_unit(f).state().translating]

    def mappings(self, kernel: KernelTables, entry: Device) -> list[Mapping]:
        """List what an entry of :meth:`KernelTables.entry` maps.

        :raises TableDamageError, PermissionDeniedError: it cannot be read.
        """
        place = entry.table, entry.levels
        if place not in self._mapped:
            self._memory.begin()
            self._mapped[place] = kernel.mappings(entry)
        return self._mapped[place]

    def check_group(self, device: PciDevice, kept: set[SourceId]) -> None:
        """Nothing may be in a device's IOMMU group that does not outlive the kernel with it.

        :param kept: source ids of the devices that do.
        :raises InvalidError: something is.
        """
        for other in group_of(self._host, device):
            if other.segment or other.source_id not in kept:
                raise InvalidError(
                    f"device {device.name}: {other.name} is in the same IOMMU group, and is not "
                    "attached, or does not persist: pkernfs iommu attach it to the same domain "
                    "first, persist it, or use a slot with a group of its own"
                )

    def check_names(self, device: PciDevice, kernel: KernelTables, table: PhysAddr) -> None:
        """A device must have no other name in its requests than its own.

        The kernel has an entry with the same page tables for each that it knows of, as some
        devices have by a quirk (Linux, pci_for_each_dma_alias()); below the region's root there
        would be none.

        :raises InvalidError: it has.
        """
        for entry in kernel.entries:
            other = entry.source_id
            if entry.table == table and read_device(self._host, other) is None:
                raise InvalidError(
                    f"device {device.name}: the kernel has an entry like its own for "
                    f"{bdf_text(other)}, which is no device: an alias in requests, which cannot be "
                    "attached: another device is needed"
                )

    # ------------------------------------------------------------------ the comparison

    def check(self) -> None:
        """Check that both translate alike what is attached and persists.

        :raises PkernfsError: something differs, or cannot be read; what, and the remedy.
        """
        tables = tables_of(self._fs)
        root = tables.need_root()
        non_persistent = tables.non_persistent()
        attached = [d for d in tables.devices() if d.source_id not in non_persistent]
        kept = {d.source_id for d in attached}
        for entry in attached:
            device = self.device(entry.source_id)
            found = self.above(device)
            if not found.driven or need_unit(found).walks(root.root):
                continue
            self.check_group(device, kept)
            self._check_device(entry, device, self.unit(found))

    def _check_device(self, ours: Device, device: PciDevice, kernel: KernelTables) -> None:
        entry = kernel.entry(ours.source_id)
        self.check_names(device, kernel, entry.table)
        config = tables_of(self._fs).config
        check_shape(
            entry.source_id, Shape(kernel.mode, entry.levels), Shape(config.mode, config.levels)
        )
        if entry.table != ours.table:
            self._compare(ours, self.mappings(kernel, entry))
        users = kernel.users_of_id(ours.domain_id, entry.table)
        if users:
            raise InvalidError(
                f"device {bdf_text(ours.source_id)}: its entry in the region has domain id "
                f"{ours.domain_id}, which the kernel has given to {bdf_text(users[0].source_id)}: "
                f"{self._again(ours)}"
            )

    def _compare(self, ours: Device, theirs: list[Mapping]) -> None:
        number = self._number(ours)
        table = tables_of(self._fs).domain(number)
        mapped = list(table.mappings())
        name = bdf_text(ours.source_id)
        for m in without(theirs, mapped):
            raise InvalidError(
                f"device {name}: its live domain maps {_text(m)}, and dom-{number} does not: "
                f"{self._again(ours)}"
            )
        for m in without(mapped, theirs):
            raise InvalidError(
                f"device {name}: dom-{number} maps {_text(m)}, and its live domain does not: "
                f"{self._again(ours)}"
            )

    def _number(self, ours: Device) -> int:
        for number, table in tables_of(self._fs).domains.items():
            if table.root == ours.table:
                return number
        raise InvalidError(
            f"device {bdf_text(ours.source_id)}: attached to no sound domain: run the check"
        )

    def _again(self, ours: Device) -> str:
        name = bdf_text(ours.source_id)
        return f"pkernfs iommu snapshot {name} MNT/iommu/dom-{self._number(ours)} again"


def _text(m: Mapping) -> str:
    return f"iova {m.iova:#x} ({m.length:#x} bytes, {perm_text(m.perm)}) to {m.physical:#x}"
