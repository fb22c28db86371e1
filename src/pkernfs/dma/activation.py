"""Enables and disables translation by a mounted file system's tables in the machine's units.

The units are asked each time: no record could be right after a kexec. See docs/dma.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.dma.comparison import Finder, KernelUnits, check_addresses
from pkernfs.dma.kernel_adopted import KernelAdopted
from pkernfs.dma.mount import tables_of
from pkernfs.dma.table_files import TableFiles
from pkernfs.errors import (
    BusyError,
    InvalidError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    PkernfsError,
    UnitError,
)
from pkernfs.host.dmar import Dmar, UnitStructure, read_dmar
from pkernfs.host.pci import PciDevice, all_devices, read_device, unit_of
from pkernfs.host.sysroot import HOST, Host
from pkernfs.iommu.root_tables import RootTables
from pkernfs.quantities import Iova, PhysAddr, SourceId
from pkernfs.units.discovery import FoundUnit, find_units, need_unit, reach_unit
from pkernfs.units.requirements import (
    Requirements,
    cut_off,
    largest_leaf,
    unfit_reason,
    unmet_requirements,
)
from pkernfs.units.unit import Unit
from pkernfs.units.unit_set import ActiveUnits, restore_interrupted_queues, with_queue
from pkernfs.vtd.entries import bdf_text

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)

Reach = Callable[[Host, UnitStructure], Unit]


class _Switched(NamedTuple):
    """A unit of :meth:`Activation.switch_units`, and the address of the root table that it had."""

    unit: Unit
    root: PhysAddr


def _find(host: Host, dmar: Dmar) -> list[FoundUnit]:
    return find_units(host, dmar, write=True)


class Activation:
    """The units of the machine and the tables of one file system.

    :param find: how units are found, and ``reach`` how one that the kernel's driver has is changed;
        tests reach theirs otherwise.
    """

    def __init__(
        self,
        fs: FileSystem,
        host: Host = HOST,
        find: Finder = _find,
        reach: Reach = reach_unit,
    ) -> None:
        self._fs = fs
        self._host = host
        self._find = find
        self._reach = reach
        self._switched: list[_Switched] = []

    @property
    def _tables(self) -> TableFiles:
        return tables_of(self._fs)

    # ------------------------------------------------------------------ at the mount

    def resume_units(self) -> None:
        """Find the units that walk the tables already: have them forget all, and tell them on.

        :raises UnitError: a unit does not obey.
        """
        root = self._tables.root
        if not self._tables.names or self._fs.read_only or not self._fs.region.real_addresses:
            return
        try:
            dmar = read_dmar(self._host)
        except NotFoundError:
            return
        except PkernfsError as e:
            log.warning("%s: cannot see whether units walk its tables: %s", self._fs.region.name, e)
            return
        units = []
        all_units = self._find(self._host, dmar)
        driven = [found for found in all_units if found.driven]
        self._watch(driven)
        if root is None:  # damaged, or gone: the kernel may have a copy of it in force
            return
        for found in all_units:
            if found.unit is None:
                log.debug("%s: %s", found.structure.name, found.why_not)
            elif not found.driven:
                units.append(found.unit)
        restore_interrupted_queues(units, root)
        self._walk(dmar, [u for u in units if u.walks(root.root)])

    def _watch(self, driven: Sequence[FoundUnit]) -> None:
        """Tables that units of the kernel's walk do not change."""
        if driven:
            memory = self._tables.region_memory()
            self._tables.kernel_adopted = KernelAdopted(self._host, memory, lambda: driven)

    def _walk(self, dmar: Dmar, units: Sequence[Unit]) -> None:
        """These units, and no others, walk the tables: start afresh with them."""
        if not units:
            self._tables.set_active_units(None)
            return
        active_units = ActiveUnits(units, self._tables.config.mode, lambda s: self._admit(dmar, s))
        active_units.write_back(self._tables.memories())
        active_units.invalidate_all(self._tables.need_root())
        self._tables.set_active_units(active_units)

    def _admit(self, dmar: Dmar, source_id: SourceId) -> None:
        """:raises InvalidError: a device that must not be attached while units walk the tables."""
        device = read_device(self._host, source_id)
        reason = unfit_reason(dmar, device, source_id)
        if reason is not None:
            raise InvalidError(reason)
        assert device is not None
        above = unit_of(dmar, device)
        active_units = self._tables.active_units
        assert above is not None
        if active_units is not None and above.name not in [u.name for u in active_units.units]:
            raise InvalidError(
                f"device {device.name}: below {above.name}, which does not walk these tables: "
                f"activate it as well: its DMA is not translated"
            )

    # ------------------------------------------------------------------ on

    def activate(self, names: Sequence[str], *, block_others: bool) -> list[str]:
        """Put the tables, which have been checked, in force; the names of the units.

        :param names: ``all``, or units; none: those that attached devices are below.
        :param block_others: devices that are at work and not attached may lose their DMA.
        :raises PkernfsError: why not; nothing was changed then.
        """
        root = self._need_tables()
        dmar = read_dmar(self._host)
        units = self._find(self._host, dmar)
        chosen = self._choose(dmar, units, names)
        self._check_devices(dmar, chosen)
        for found in chosen:
            self._check_unit(found, dmar, root)
        if not block_others:
            self._check_others(dmar, chosen)
        return self._enable(dmar, [need_unit(f) for f in chosen], root)

    def _need_tables(self) -> RootTables:
        if os.geteuid():
            raise PermissionDeniedError("activate: the daemon is not root's")
        if self._fs.read_only:
            raise PermissionDeniedError("activate: the file system is read-only")
        check_addresses(self._fs.region)
        for name, reason in self._tables.damaged.items():
            raise InvalidError(f"iommu/{name.decode()}: damaged: {reason}: run the check")
        return self._tables.need_root()

    def _choose(
        self, dmar: Dmar, units: Sequence[FoundUnit], names: Sequence[str]
    ) -> list[FoundUnit]:
        known = {found.structure.name: found for found in units}
        if "all" in names:
            return list(units)
        for name in names:
            if name not in known:
                raise NotFoundError(f"{name}: no such unit: there is {', '.join(known) or 'none'}")
        if names:
            return [f for name, f in known.items() if name in names]
        above = set()
        for device in self._attached():
            found = None if device is None else unit_of(dmar, device)
            if found is not None:
                above.add(found.name)
        if not above and not self._tables.devices():
            raise InvalidError("no device is attached: attach one, or say --unit")
        return [f for name, f in known.items() if name in above]

    def _attached(self) -> list[PciDevice | None]:
        return [read_device(self._host, d.source_id) for d in self._tables.devices()]

    def _check_devices(self, dmar: Dmar, chosen: Sequence[FoundUnit]) -> None:
        names = [f.structure.name for f in chosen]
        for entry, device in zip(self._tables.devices(), self._attached(), strict=True):
            reason = unfit_reason(dmar, device, entry.source_id)
            if reason is not None:
                raise InvalidError(reason)
            assert device is not None
            above = unit_of(dmar, device)
            assert above is not None
            if above.name not in names:
                raise InvalidError(
                    f"device {device.name}: below {above.name}, not {', '.join(names)}: "
                    "its DMA would not be translated: say --unit all"
                )

    def _check_unit(self, found: FoundUnit, dmar: Dmar, root: RootTables) -> None:
        name = found.structure.name
        if found.driven:
            raise BusyError(
                f"{name}: this kernel's driver has it: boot with intel_iommu=off to have the "
                "region's tables in force"
            )
        unit = need_unit(found)
        reasons = list(unmet_requirements(unit.capabilities, self._requirements(), dmar.host_bits))
        if reasons:
            raise NotSupportedError(f"{name}: {'; '.join(reasons)}")
        state = unit.state()
        if state.translating and state.root != root.root:
            raise BusyError(
                f"{name}: translates already, by the tables at {state.root:#x}: whoever put them "
                "there has to switch it off"
            )

    def _requirements(self) -> Requirements:
        tables = self._tables
        levels = tables.config.levels
        largest, end = 1, 0
        for table in tables.domains.values():
            largest = max(largest, largest_leaf(table.memory, table.root, levels))
            for mapping in table.mappings():
                end = max(end, mapping.iova + mapping.length)
        ranges = [*tables.region_memory().ranges, *(bar.range for bar in tables.bars())]
        ids = sorted({d.domain_id for d in tables.devices()})
        last = max(r.end for r in ranges)
        return Requirements(tables.config, ids, largest, Iova(end), last)

    def _check_others(self, dmar: Dmar, chosen: Sequence[FoundUnit]) -> None:
        attached = {d.source_id for d in self._tables.devices()}
        others = cut_off(dmar, [f.structure for f in chosen], all_devices(self._host), attached)
        if others:
            listed = ", ".join(f"{d.name} ({d.driver})" for d in others)
            raise BusyError(
                f"{', '.join(f.structure.name for f in chosen)}: the kernel has devices at work "
                f"there that are not attached: {listed}: their DMA would fail: attach them, or say "
                "--cut-off"
            )

    def _enable(self, dmar: Dmar, units: Sequence[Unit], root: RootTables) -> list[str]:
        before = self._tables.active_units
        mode = self._tables.config.mode
        self._tables.ready_for_units()
        root = self._tables.need_root()
        restore_interrupted_queues(units, root)
        ActiveUnits(units, mode).write_back(self._tables.memories())
        on: list[Unit] = []
        try:
            for unit in units:
                if unit.walks(root.root):
                    continue
                with_queue(unit, mode, root, partial(unit.enable_translation, root.root, mode))
                on.append(unit)
        except PkernfsError:
            for unit in on:
                with_queue(unit, mode, root, partial(unit.disable_translation, mode))
            raise
        names = [u.name for u in units]
        others = [] if before is None else [u for u in before.units if u.name not in names]
        self._walk(dmar, [*others, *units])
        return names

    # ------------------------------------------------------------------ from the kernel's tables

    def kernel_units(self) -> KernelUnits:
        """Open what units translate for the running kernel now; the caller closes it.

        :raises PkernfsError: see :class:`KernelUnits`.
        """
        return KernelUnits(self._fs, self._host, self._find)

    def check_kernel_tables(self) -> None:
        """Devices that are attached and persist have what the kernel tables have.

        It is so for a unit that walks these tables already, and of no matter for one that the
        running kernel does not drive.

        :raises PkernfsError: of which device something differs, what, and the remedy.
        """
        if self._tables.devices():
            with self.kernel_units() as kernel:
                kernel.check()

    def switch_units(self) -> list[str]:
        """Have the units that the running kernel drives walk these tables: the last step of all.

        What the kernel maps or attaches from then on is not seen by any unit, and its own devices
        have lost their DMA: nothing can be read from a disk that is below one. All that this does
        has been done once before that, so that it is in memory.

        :raises PkernfsError: why not; the kernel's tables are in force everywhere, as far as the
            units obey.
        """
        self._check_switch()
        if not self._tables.devices():
            return []
        with self.kernel_units() as kernel:
            kernel.check()
            chosen = self._to_switch(kernel)
            # It may be that a unit can be switched, but not back.
            self._watch([found for found in kernel.found.values() if found.driven])
        root, mode = self._tables.need_root(), self._tables.config.mode
        units = [self._reach(self._host, f.structure) for f in chosen]
        restore_interrupted_queues(units, root)
        if units:
            rehearsal = ActiveUnits(units, mode)
            rehearsal.write_back(self._tables.memories())
            rehearsal.invalidate_all(root)
        try:
            for unit in units:
                self._switched.append(_Switched(unit, unit.state().root))
                with_queue(unit, mode, root, partial(unit.replace_root, root.root, mode))
        except PkernfsError as e:
            self._switched.pop()  # it has seen to itself
            try:
                self.switch_back()
            except PkernfsError as back:
                raise UnitError(f"{e}; and what was done is not undone: {back}") from None
            raise
        return [u.name for u in units]

    def switch_back(self) -> None:
        """Have units walk the kernel's tables again, if the jump after :meth:`switch_units` failed.

        :raises UnitError: a unit does not do it; the others do.
        """
        if not self._switched:
            return
        root, mode = self._tables.need_root(), self._tables.config.mode
        failure: PkernfsError | None = None
        while self._switched:
            unit, before = self._switched.pop()
            try:
                with_queue(unit, mode, root, partial(unit.replace_root, before, mode))
            except PkernfsError as e:
                failure = failure or e
        if failure is not None:
            raise failure

    def _check_switch(self) -> None:
        if os.geteuid():
            raise PermissionDeniedError("switch: the daemon is not root's")
        if self._fs.read_only and not self._fs.frozen:
            raise PermissionDeniedError("switch: the file system is read-only")
        for name, reason in self._tables.damaged.items():
            raise InvalidError(f"iommu/{name.decode()}: damaged: {reason}: run the check")
        non_persistent = self._tables.non_persistent()
        for d in self._tables.devices():
            if d.source_id in non_persistent:
                raise BusyError(
                    f"device {bdf_text(d.source_id)}: attached, and not to persist: hand over first"
                )

    def _to_switch(self, kernel: KernelUnits) -> list[FoundUnit]:
        """The units above attached devices that do not walk the tables yet."""
        root = self._tables.need_root()
        above = [kernel.above(kernel.device(d.source_id)) for d in self._tables.devices()]
        names = {f.structure.name for f in above if not need_unit(f).walks(root.root)}
        chosen = [f for name, f in kernel.found.items() if name in names]
        for found in chosen:
            name = found.structure.name
            if not found.driven:
                raise BusyError(
                    f"{name}: it does not walk the region's tables: pkernfs iommu activate"
                )
            able = need_unit(found).capabilities
            reasons = list(unmet_requirements(able, self._requirements(), kernel.dmar.host_bits))
            if reasons:
                raise NotSupportedError(f"{name}: {'; '.join(reasons)}")
        return chosen

    # ------------------------------------------------------------------ off

    def deactivate(self, names: Sequence[str], *, forced: bool) -> list[str]:
        """Have units translate no more; their names.

        :param names: as for :meth:`activate`; none: all that walk the tables.
        :param forced: although attached devices could do DMA, which then goes anywhere.
        :raises PkernfsError: why not.
        """
        active_units = self._tables.active_units
        if active_units is None:
            raise NotFoundError("no unit walks the tables of this mount")
        known = [u.name for u in active_units.units]
        for name in names:
            if name not in (*known, "all"):
                raise NotFoundError(f"{name}: does not walk them: {', '.join(known)} does")
        chosen = [u for u in active_units.units if not names or "all" in names or u.name in names]
        dmar = read_dmar(self._host)
        if not forced:
            self._check_idle(dmar, [u.name for u in chosen])
        root = self._tables.need_root()
        for unit in chosen:
            with_queue(
                unit, active_units.mode, root, partial(unit.disable_translation, active_units.mode)
            )
        self._walk(dmar, [u for u in active_units.units if u not in chosen])
        return [u.name for u in chosen]

    def _check_idle(self, dmar: Dmar, names: Sequence[str]) -> None:
        for device in self._attached():
            above = None if device is None else unit_of(dmar, device)
            if device is None or above is None or above.name not in names:
                continue
            if device.bus_master:
                raise BusyError(
                    f"device {device.name}: attached, and a bus master: without translation its "
                    "DMA would go to these addresses as they are: end its bus mastering "
                    f"(setpci -s {device.name} COMMAND=0:4), or say --force"
                )
