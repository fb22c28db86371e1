"""PCI devices as sysfs has them: their groups, their drivers, their configuration space.

A device is named by its BDF, as in ``0000:00:05.0``. The files are those of Linux's
Documentation/ABI/testing/sysfs-bus-pci and sysfs-kernel-iommu_groups. What an open descriptor of
VFIO can do is in :mod:`pkernfs.vmm.vfio`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pkernfs.errors import VfioError
from pkernfs.quantities import Iova

#: The driver of devices that VFIO has.
DRIVER = "vfio-pci"
PCI = Path("/sys/bus/pci")
GROUPS = Path("/sys/kernel/iommu_groups")


class ReservedRange(NamedTuple):
    """IOVAs that a group's devices cannot be given, from ``first`` to ``last``, both included.

    ``kind`` is the kernel's word: direct, direct-relaxable, reserved or msi.
    """

    first: Iova
    last: Iova
    kind: str


def device_path(bdf: str) -> Path:
    """Return the device's directory.

    :raises VfioError: there is no such device.
    """
    path = PCI / "devices" / bdf
    if not path.is_dir():
        raise VfioError(f"{bdf}: no such device")
    return path


def driver_of(bdf: str) -> str | None:
    """Return the name of the driver that has the device; None if none has.

    :raises VfioError: there is no such device.
    """
    link = device_path(bdf) / "driver"
    return link.resolve().name if link.is_symlink() else None


def group_of(bdf: str) -> int:
    """Return the number of the device's IOMMU group.

    :raises VfioError: no IOMMU is above it, or the kernel does not use it.
    """
    link = device_path(bdf) / "iommu_group"
    if not link.is_symlink():
        raise VfioError(f"{bdf}: in no IOMMU group: boot with intel_iommu=on")
    return int(link.resolve().name)


def group_members(group: int) -> list[str]:
    """Return the devices of a group, sorted: they change their address space together."""
    return sorted(path.name for path in (GROUPS / str(group) / "devices").iterdir())


def reserved_ranges(group: int) -> list[ReservedRange]:
    """Return the IOVAs that the devices of a group cannot be given."""
    return parse_reserved((GROUPS / str(group) / "reserved_regions").read_text())


def parse_reserved(text: str) -> list[ReservedRange]:
    """Parse the lines of ``reserved_regions``: the first address, the last one, the kind."""
    lines = (line.split() for line in text.splitlines())
    return [ReservedRange(_iova(words[0]), _iova(words[1]), words[2]) for words in lines]


def _iova(text: str) -> Iova:
    return Iova(int(text, 16))


# ------------------------------------------------------------------------------ drivers


def bind(bdf: str) -> None:
    """Bind a device that has no driver to vfio-pci; do nothing if vfio-pci has it.

    Binding alone leaves the device as it is, if the module has been loaded with disable_idle_d3=1.

    :raises VfioError: another driver has it, or vfio-pci does not take it.
    """
    path = device_path(bdf)
    driver = driver_of(bdf)
    if driver == DRIVER:
        return
    if driver is not None:
        raise VfioError(f"{bdf}: {driver} has it")
    try:
        (path / "driver_override").write_text(DRIVER)
        (PCI / "drivers_probe").write_text(bdf)
    except OSError as error:
        raise VfioError(f"{bdf}: cannot bind it to {DRIVER}: {error.strerror}") from error
    if driver_of(bdf) != DRIVER:
        raise VfioError(f"{bdf}: {DRIVER} does not take it: see the kernel's log")


def unbind(bdf: str) -> None:
    """Take a device from vfio-pci again, for any driver.

    :raises VfioError: there is no such device.
    """
    if driver_of(bdf) == DRIVER:
        (PCI / "drivers" / DRIVER / "unbind").write_text(bdf)
    (device_path(bdf) / "driver_override").write_text("\n")


# ------------------------------------------------------------------------------ configuration


def read_config(bdf: str, at: int) -> int:
    """Load the 16-bit word at the offset ``at`` (bytes) of the configuration space.

    :raises VfioError: there is no such device.
    """
    with (device_path(bdf) / "config").open("rb", buffering=0) as config:
        return int.from_bytes(os.pread(config.fileno(), 2, at), "little")


def write_config(bdf: str, at: int, word: int) -> None:
    """Store a 16-bit word at the offset ``at`` (bytes) of the configuration space.

    :raises VfioError: there is no such device.
    """
    with (device_path(bdf) / "config").open("r+b", buffering=0) as config:
        os.pwrite(config.fileno(), word.to_bytes(2, "little"), at)
