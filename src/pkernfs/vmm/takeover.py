"""Take devices over from the tables that survived, in the kernel that has adopted them.

For a VMM that restores itself after the jump:

    export = read_export("/mnt/pkernfs")
    domains = plan(export)              # refuses what cannot work; nothing has been changed then
    with TakeOver(export) as taking:
        for domain in domains:
            try:
                taken = taking.take(domain)  # taken.devices["0000:00:05.0"] is at work
            except (VmmError, OSError):
                ...                          # what is in taking.taken goes on all the same
        ...                                  # to close it all stops the devices

The device's requests would fault from when the kernel takes its copy of the context entry down
until the new domain is filled. So the device's bus mastering is off for that time, the hold: the
device keeps what it wants to write until then, and its registers stay as they are. docs/dma.md,
"After the jump", has each step with its reason.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType

from pkernfs.errors import TakeOverError, VfioError
from pkernfs.host import pci_config
from pkernfs.vmm import program, sysfs, vfio
from pkernfs.vmm.export import Export
from pkernfs.vmm.hold import hold_all
from pkernfs.vmm.memory import Memory
from pkernfs.vmm.plan import Domain


@dataclass
class Taken:
    """A domain as it is now: keep it, for closing it stops its devices.

    :ivar name: the domain's, as in ``dom-0``
    :ivar space: the addresses that its devices use
    :ivar devices: its open devices, and the spare one, by their BDF
    :ivar hold_ms: for how many milliseconds each device had its bus mastering off
    :ivar mapping_ms: the milliseconds in which memory was mapped, in the hold or before it
    """

    name: str
    space: vfio.AddressSpace
    devices: dict[str, vfio.Device] = field(default_factory=dict)
    hold_ms: dict[str, float] = field(default_factory=dict)
    mapping_ms: float = 0.0


class TakeOver:
    """Takes domains over, and keeps what it has taken until it is closed.

    :ivar taken: the domains that have been taken over, in order
    :raises TakeOverError: no program can map the region.
    """

    def __init__(self, export: Export) -> None:
        self.taken: list[Taken] = []
        self._memory = Memory(export)

    def __enter__(self) -> TakeOver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Stop the devices, as VFIO does when they are closed, and end their address spaces."""
        while self.taken:
            self._close(self.taken.pop())

    @staticmethod
    def _close(taken: Taken) -> None:
        for device in taken.devices.values():
            device.close()
        taken.space.close()

    def take(self, domain: Domain, spare: str | None = None) -> Taken:
        """Take one domain over, with a hold of its devices.

        If it fails, what has been taken before stays at work. So do devices of this domain that had
        been taken already: it is in :attr:`taken` with those. Else nothing of it stays open.

        :param spare: a device that does nothing, in a group of its own. It is put into the address
            space first, and has the memory pinned and mapped before the hold. The hold does not
            depend on the memory's size then.
        :raises TakeOverError: a step in the hold fails; the message says so. The device has its bus
            mastering off then.
        :raises VfioError: a step before the hold fails; the devices are at work.
        :raises OSError: likewise.
        """
        for bdf in domain.devices:
            prepare(bdf)
        if spare is not None:
            sysfs.bind(spare)
        taken = Taken(domain.name, self._address_space(domain))
        try:
            self._fill(taken, domain, spare)
        except BaseException:
            if taken.hold_ms:
                self.taken.append(taken)
            else:
                self._close(taken)
            raise
        self.taken.append(taken)
        return taken

    def _fill(self, taken: Taken, domain: Domain, spare: str | None) -> None:
        """Have a new address space reach the memory, and the devices use it."""
        space = taken.space
        self._memory.map(domain.pieces)
        for bdf in domain.devices:
            space.prepare(bdf)
        if spare is not None:
            space.add(spare)
            taken.devices[spare] = space.open(spare)
        mapped = space.ready
        if mapped:
            self._map(taken, domain)
        for group in domain.groups():
            self._switch(taken, domain, group, mapped=mapped)
            mapped = True

    def _address_space(self, domain: Domain) -> vfio.AddressSpace:
        # iommufd pins pages, and neither a BAR nor memory that the kernel never had has any.
        pages = not self._memory.is_physical and all(piece.bar is None for piece in domain.pieces)
        return vfio.Ioas() if pages and vfio.has_iommufd(domain.devices[0]) else vfio.Container()

    def _switch(self, taken: Taken, domain: Domain, group: list[str], *, mapped: bool) -> None:
        """Hold the devices of a group while they change from the old tables to the new ones."""
        masters = {bdf: sysfs.read_config(bdf, pci_config.COMMAND) for bdf in group}
        began = time.perf_counter()
        hold_all(masters)
        try:
            for bdf in group:
                taken.space.add(bdf)
            if not mapped:
                self._map(taken, domain)
            for bdf in group:
                taken.devices[bdf] = taken.space.open(bdf)
            for bdf in group:
                if masters[bdf] & pci_config.COMMAND_MASTER:
                    taken.devices[bdf].set_master(True)
        except (OSError, VfioError) as error:
            raise TakeOverError(
                f"{', '.join(group)}: stopped, bus mastering is off: {error}"
            ) from error
        held = (time.perf_counter() - began) * 1e3
        taken.hold_ms.update(dict.fromkeys(group, held))

    def _map(self, taken: Taken, domain: Domain) -> None:
        began = time.perf_counter()
        for piece in domain.pieces:
            taken.space.map(piece.iova, self._memory.address(piece), piece.length, piece.perm)
        taken.mapping_ms = (time.perf_counter() - began) * 1e3


def release(mnt: str, bdf: str) -> None:
    """Detach a device from the tables that it no longer uses; its files can be unmapped then.

    :param mnt: where the file system is mounted
    :raises VmmError: the daemon refuses it.
    """
    program.output("pkernfs", "iommu", "detach", bdf, mnt)


def prepare(bdf: str) -> None:
    """Bind the device to vfio-pci in a way that leaves it as it is, also when it is opened.

    :raises TakeOverError: opening the device would reset it, or vfio-pci has put it to sleep.
    :raises VfioError: another driver has it, or vfio-pci does not take it.
    """
    reset = sysfs.device_path(bdf) / "reset_method"
    if reset.exists():  # not there if the device cannot be reset, or before Linux 5.15
        reset.write_text("\n")
        if reset.read_text().strip():
            raise TakeOverError(f"{bdf}: opening it would reset it: see reset_method")
    sysfs.bind(bdf)
    status = sysfs.device_path(bdf) / "power/runtime_status"
    if status.exists() and status.read_text().strip() == "suspended":
        raise TakeOverError(f"{bdf}: vfio-pci has put it to sleep: load it with disable_idle_d3=1")
