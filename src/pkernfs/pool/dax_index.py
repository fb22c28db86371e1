"""The devices of one dax region as they were when they were last looked at.

Looking at one takes a dozen system calls, and there may be a thousand. Who changes a device looks
at that one again first; what another program has changed meanwhile shows in the sums.
"""

from __future__ import annotations

import contextlib
import threading

from pkernfs.errors import RegionError
from pkernfs.host.sysroot import Host
from pkernfs.pool.pieces import size_of
from pkernfs.quantities import PhysAddr
from pkernfs.region import dax
from pkernfs.region.dax import Device
from pkernfs.region.dax_devices import region_devices


class DaxIndex:
    """The devices of the dax region whose directory is ``region``.

    Several threads may use it: they wait for one another.
    """

    def __init__(self, region: str, host: Host) -> None:
        self._region = region
        self._host = host
        #: The memory of the dax region, in bytes.
        self.total = int(host.read(f"{region}/dax_region/size"))
        self._lock = threading.RLock()
        self._devices: dict[str, Device] | None = None
        self._by_start: dict[PhysAddr, str] = {}

    def available(self) -> int:
        """Ask how much memory belongs to no device, in bytes."""
        return int(self._host.read(f"{self._region}/dax_region/available_size"))

    def all(self) -> list[Device]:
        """Return every device."""
        with self._lock:
            return list(self._known().values())

    def at(self, start: PhysAddr) -> Device | None:
        """Return the device whose first byte has an address."""
        with self._lock:
            devices = self._known()
            found = devices.get(self._by_start.get(start, ""))
        return found if found and found.pieces and found.pieces[0].start == start else None

    def look(self, name: str) -> Device | None:
        """Look at a device again; None if there is none of that name."""
        self.drop(name)
        with contextlib.suppress(RegionError):
            device = dax.read_device(name, self._host)
            if device.region == self._region:
                self.put(device)
                return device
        return None

    def put(self, device: Device) -> None:
        """Remember a device as it is now."""
        with self._lock:
            self._known()[device.name] = device
            if device.pieces:
                self._by_start[device.pieces[0].start] = device.name

    def drop(self, name: str) -> None:
        """Remember that a device has gone."""
        with self._lock:
            self._known().pop(name, None)

    def forget(self) -> None:
        """Look at all devices again when they are next asked for."""
        with self._lock:
            self._devices = None

    def refresh(self) -> None:
        """Forget all if another program has made, changed or deleted devices.

        Not seen: one that has moved as much memory as it had, which takes it two changes.
        """
        known = self.all()
        names = set(filter(dax.is_name, self._host.list(self._region)))
        used = sum(size_of(device.pieces) for device in known)
        if names != {device.name for device in known} or used + self.available() != self.total:
            self.forget()

    def _known(self) -> dict[str, Device]:
        """The devices by their names; the caller has the lock."""
        devices = self._devices
        if devices is None:
            found = region_devices(self._region, self._host)
            devices = {device.name: device for device in found}
            self._by_start = {d.pieces[0].start: d.name for d in found if d.pieces}
            self._devices = devices
        return devices
