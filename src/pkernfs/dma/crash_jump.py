"""The last step before a kernel that is started by a panic: what devices need, and the jump itself.

Once a unit that the kernel drives walks the region's tables, that kernel's own devices have lost
their DMA: nothing can be read from a disk any more. So all that the jump needs is in memory before,
and nothing but the panic comes after. See docs/dma.md.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.dma.activation import Activation
from pkernfs.dma.mount import tables_of
from pkernfs.errors import InvalidError, NotFoundError, PermissionDeniedError, PkernfsError
from pkernfs.host.dmar import read_dmar
from pkernfs.host.pci import read_device, unit_of
from pkernfs.host.sysroot import HOST, Host
from pkernfs.iommu.context_walk import Mode
from pkernfs.quantities import PhysAddr, SourceId
from pkernfs.units.discovery import FoundUnit, find_units, need_unit
from pkernfs.vtd.entries import bdf_text

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

_MCL_CURRENT, _MCL_ONFAULT = 1, 4  # asm-generic/mman.h
#: Linux's processor 0 is the one that the firmware started. Any other one that panics would have
#: the next kernel start that one anew, which resets the machine.
_BOOT_PROCESSOR = 0


class Needs(NamedTuple):
    """The needs of the devices of a file system in a kexec, by their names.

    ``devices`` must go on, ``units`` are above them, ``cut`` are cut off. ``scalable`` is the mode
    of the tables.
    """

    devices: list[str]
    units: list[str]
    cut: list[str]
    scalable: bool


class CrashJump:
    """A kexec by a panic: what a file system's devices need of it, and the panic itself."""

    def __init__(self, fs: FileSystem, host: Host = HOST) -> None:
        self._fs = fs
        self._host = host
        self._activation = Activation(fs, host)

    def needs(self) -> Needs:
        """Find out what the devices that are attached need.

        A device must go on if it is attached, and persistent, and its unit walks these tables or is
        driven by the kernel.

        :raises PkernfsError: it cannot be seen what the units do.
        """
        tables = tables_of(self._fs)
        non_persistent = tables.non_persistent()
        attached = [d.source_id for d in tables.devices()]
        cut = [bdf_text(s) for s in attached if s in non_persistent]
        kept = [s for s in attached if s not in non_persistent]
        devices = self._dependent_devices(kept) if self._fs.region.real_addresses else {}
        if devices:
            self._activation.check_kernel_tables()
        return Needs(
            [bdf_text(s) for s in devices],
            sorted(set(devices.values())),
            cut,
            tables.config.mode is Mode.SCALABLE,
        )

    def _dependent_devices(self, source_ids: list[SourceId]) -> dict[SourceId, str]:
        """The devices that must go on, and the unit above each."""
        root = tables_of(self._fs).root
        if not source_ids or root is None:
            return {}
        try:
            dmar = read_dmar(self._host)
        except NotFoundError:
            return {}
        units = {u.structure.name: u for u in find_units(self._host, dmar, write=False)}
        found = {}
        for source_id in source_ids:
            device = read_device(self._host, source_id)
            above = None if device is None else unit_of(dmar, device)
            if above is not None and _holds(units[above.name], root.root):
                found[source_id] = above.name
        return found

    def start(self, *, panic: bool) -> None:
        """Give units that the kernel drives the region's root table; then panic, if this is last.

        :raises PkernfsError: why not; the machine goes on, and units are as they were.
        """
        if not self._fs.frozen:
            raise InvalidError("kexec: the file system is not handed over")
        if not panic:
            self._activation.switch_units()
            return
        if self._host.find("sys/kernel/kexec_crash_loaded") != "1":
            raise InvalidError("kexec: no kernel is loaded for a panic (kexec -p)")
        trigger = self._open_trigger()
        before = os.sched_getaffinity(0)
        try:
            _move_to_boot_processor()
            _keep_in_memory()
            self._activation.switch_units()
            self._panic(trigger)
        finally:
            ctypes.CDLL(None).munlockall()
            os.sched_setaffinity(0, before)
            os.close(trigger)

    def undo(self) -> None:
        """Have units that were switched walk the kernel's tables again, for the jump has failed.

        :raises UnitError: a unit does not do it.
        """
        self._activation.switch_back()

    def _panic(self, trigger: int) -> None:
        """:raises PkernfsError: there was no panic; units are as they were."""
        why = "it did not"
        try:
            os.write(trigger, b"c")
        except OSError as e:
            why = str(e.strerror)
        self.undo()
        raise PkernfsError(f"kexec: the kernel was asked to panic: {why}")

    def _open_trigger(self) -> int:
        try:
            return os.open(self._host.path("proc/sysrq-trigger"), os.O_WRONLY | os.O_CLOEXEC)
        except OSError as e:
            raise PermissionDeniedError(f"/proc/sysrq-trigger: {e.strerror}") from None


def _holds(found: FoundUnit, root: PhysAddr) -> bool:
    """True if requests below a unit depend on the tables below ``root``, or on the kernel's."""
    return found.driven or need_unit(found).walks(root)


def _move_to_boot_processor() -> None:
    try:
        os.sched_setaffinity(0, {_BOOT_PROCESSOR})
    except OSError as e:
        raise PkernfsError(f"kexec: processor {_BOOT_PROCESSOR}: {e.strerror}") from None


def _keep_in_memory() -> None:
    """Nothing that is in memory leaves it any more; what is not is not fetched either."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_ONFAULT):
        raise PkernfsError(f"kexec: mlockall: {os.strerror(ctypes.get_errno())}")
