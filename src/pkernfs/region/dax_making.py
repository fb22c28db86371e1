"""Steps of making, changing and deleting one dax device of a dax region, each a write to sysfs.

The kernel lets its ranges change under a driver, and keeps silent about some that it does not take:
so a device is changed only without a driver, and looked at afterwards.
"""

from __future__ import annotations

import os

from pkernfs.errors import BusyError, RegionError
from pkernfs.host.cmdline import format_number
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host
from pkernfs.layout import BLOCK
from pkernfs.quantities import PhysAddr
from pkernfs.region import dax_node
from pkernfs.region.dax import (
    DEVICES,
    DRIVER,
    Device,
    bind,
    driver_of,
    read_device,
    write_attribute,
)
from pkernfs.region.dax_devices import region_devices, unused


def is_divisible(region: str, host: Host) -> bool:
    """Tell whether devices of a dax region, given by its directory, can be made and deleted."""
    return os.path.exists(host.path(f"{region}/dax_region/create"))


def create(region: str, where: str, host: Host) -> str:
    """Make a device without memory, and return its name: the kernel takes the lowest free number.

    :param where: for what; messages begin with it.
    :raises RegionError: the kernel makes none, or somebody else makes one at the same time.
    """
    write_attribute(f"{region}/dax_region/create", "1", where, host)
    name = host.find(f"{region}/dax_region/create")  # the youngest
    if not name:
        raise RegionError(f"{where}: the kernel makes no device in /{region}")
    if size_of(name, host) or dax_node.read_label(name, host) is not None:
        raise BusyError(f"{where}: another program makes devices in /{region}")
    return name


def size_of(name: str, host: Host) -> int:
    """Return the bytes that a device has; 0 if there is no such device."""
    return int(host.find(f"{DEVICES}/{name}/size") or 0)


def delete(name: str, region: str, host: Host) -> None:
    """Delete a device that has neither memory nor driver; the kernel keeps that of number 0.

    :raises RegionError: the kernel refuses.
    """
    if not name.endswith(".0"):
        write_attribute(f"{region}/dax_region/delete", name, f"/dev/{name}", host)


def unbind(name: str, host: Host) -> None:
    """Take a device from device_dax: all mappings of it end, what touches them gets SIGBUS.

    :raises RegionError: the kernel refuses.
    """
    if driver_of(name, host) is not None:
        write_attribute(f"{DRIVER}/unbind", name, f"/dev/{name}", host)


def add_piece(name: str, piece: Span, where: str, host: Host) -> None:
    """Give a device without driver a range behind those it has.

    :raises RegionError: somebody has a part of it, or it is not in the dax region.
    """
    text = f"{piece.start:x}-{piece.end - 1:x}"
    write_attribute(f"{DEVICES}/{name}/mapping", text, where, host)


def set_size(name: str, size: int, where: str, host: Host) -> None:
    """Cut a device without driver to its first ``size`` bytes.

    :raises RegionError: the kernel refuses.
    """
    write_attribute(f"{DEVICES}/{name}/size", str(size), where, host)


def set_align(name: str, align: int, where: str, host: Host) -> None:
    """Set the page size, in bytes, of a device without driver; its ranges are multiples of it.

    :raises RegionError: the kernel refuses.
    """
    if host.find(f"{DEVICES}/{name}/align") != str(align):
        write_attribute(f"{DEVICES}/{name}/align", str(align), where, host)


def first_address(region: str, where: str, host: Host) -> PhysAddr:
    """Return where the memory of a dax region begins, by a device that has none of it.

    :raises RegionError: the kernel makes none, as where all memory belongs to some device.
    """
    name = create(region, where, host)
    try:
        return resource(name, host)
    finally:
        delete(name, region, host)


def resource(name: str, host: Host) -> PhysAddr:
    """Return the address of a device's first byte; of one without memory, of its dax region's."""
    return PhysAddr(int(host.read(f"{DEVICES}/{name}/resource"), 0))


# ---------------------------------------------------------------------------- mkfs


def keep_base(name: str, size: int, host: Host) -> Device:
    """Leave a device its first ``size`` bytes, and its dax region's other memory to segments.

    :raises BusyError: somebody uses the device.
    :raises LockedError: it is mounted.
    :raises RegionError: another device or driver has memory there, or it cannot be so large.
    """
    device = read_device(name, host)
    where = f"/dev/{name}"
    if not is_divisible(device.region, host):
        raise RegionError(f"{where}: its dax region cannot be divided: it is no soft-reserved one")
    unit = max(device.align, BLOCK)
    if size % unit or not size:
        wanted = format_number(unit)
        raise RegionError(f"{where}: bad size: got {size}, expected a multiple of {wanted}")
    if device.size and size > device.size:
        has, asked = format_number(device.size), format_number(size)
        raise RegionError(f"{where}: it is too small: got {has}, expected {asked}")
    if device.size != size:
        _check_alone(device, host)
        _resize_base(device, size, host)
    return bind(read_device(name, host), host)


def _check_alone(device: Device, host: Host) -> None:
    """Refuse a device that is not alone in its dax region, or has another driver."""
    for other in region_devices(device.region, host):
        if other.name != device.name and other.size:
            raise RegionError(
                f"/dev/{device.name}: /dev/{other.name} has {format_number(other.size)} of its "
                f"dax region: daxctl destroy-device {other.name}"
            )
    if device.driver is not None:
        bind(device, host)  # refuses another driver


def _resize_base(device: Device, size: int, host: Host) -> None:
    where = f"/dev/{device.name}"
    with unused(device, "", host):
        unbind(device.name, host)
        set_size(device.name, size, where, host)
        made = read_device(device.name, host)
        if made.size != size:
            raise RegionError(f"{where}: the kernel gives it {made.size} bytes, not {size}")
