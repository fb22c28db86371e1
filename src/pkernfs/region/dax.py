"""Device-dax: ``/dev/daxX.Y``, its memory and its driver, from sysfs.

A device is made of one or more ranges of one *dax region* (a soft-reserved range of memory, or a
namespace of persistent memory). Making and taking apart devices is in
:mod:`pkernfs.region.dax_devices`, a device as a region's memory in
:mod:`pkernfs.region.dax_backing`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from typing import NamedTuple

from pkernfs.errors import RegionError
from pkernfs.host import cmdline
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host
from pkernfs.layout import BLOCK
from pkernfs.quantities import PhysAddr

BUS = "sys/bus/dax"
DEVICES = f"{BUS}/devices"
DRIVER = f"{BUS}/drivers/device_dax"
_NAME = re.compile(r"dax(\d+)\.(\d+)", re.ASCII)
_SYSTEM_RAM = "kmem"


class DeviceNumber(NamedTuple):
    """The numbers X and Y of ``daxX.Y``: of the dax region, and of the device in it."""

    region: int
    device: int


class Device(NamedTuple):
    """A device as sysfs has it; ``size`` and ``align`` in bytes, ``pieces`` by their offsets.

    ``region`` is the directory of the dax region, below the host's root; ``driver`` is None for a
    device that no driver has.
    """

    name: str
    size: int
    align: int
    pieces: tuple[Span, ...]
    node: int | None
    driver: str | None
    region: str


def device_name(path: str, host: Host) -> str | None:
    """Return the name of the dax device that ``path`` is, or would be; None for anything else."""
    name = os.path.basename(path)
    if os.path.dirname(path) == host.path("dev") and is_name(name):
        return name
    with contextlib.suppress(OSError):
        info = os.stat(path)
        if stat.S_ISCHR(info.st_mode):
            number = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
            name = os.path.basename(os.readlink(host.path(f"sys/dev/char/{number}")))
            return name if is_name(name) else None
    return None


def is_name(name: str) -> bool:
    """Tell whether a name is one of a dax device."""
    return _NAME.fullmatch(name) is not None


def device_number(name: str) -> DeviceNumber:
    """Parse the name of a device.

    :raises ValueError: it is something else.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"not the name of a dax device: {name!r}")
    return DeviceNumber(int(match[1]), int(match[2]))


def device_names(host: Host) -> list[str]:
    """Return the devices that there are, bound or not, by their numbers."""
    return sorted(filter(is_name, host.list(DEVICES)), key=device_number)


def read_device(name: str, host: Host) -> Device:
    """Read what sysfs says of a device.

    :raises RegionError: there is none of that name, or its addresses are for root.
    """
    base = f"{DEVICES}/{name}"
    try:
        target = os.readlink(host.path(base))
    except OSError:
        raise RegionError(f"/dev/{name}: {_why_none(host)}", errno.ENOENT) from None
    node = _number(host, f"{base}/numa_node")
    size = _number(host, f"{base}/size") or 0
    return Device(
        name,
        size,
        _number(host, f"{base}/align") or BLOCK,
        tuple(_read_pieces(name, size, host)),
        node if node is not None and node >= 0 else None,
        driver_of(name, host),
        os.path.relpath(os.path.dirname(os.path.join(host.path(DEVICES), target)), host.root),
    )


def driver_of(name: str, host: Host) -> str | None:
    """Return the driver that has a device; None if none has."""
    try:
        return os.path.basename(os.readlink(host.path(f"{DEVICES}/{name}/driver")))
    except OSError:
        return None


def _read_pieces(name: str, size: int, host: Host) -> list[Span]:
    base = f"{DEVICES}/{name}"
    found = []
    try:
        for mapping in host.list(base):
            if re.fullmatch(r"mapping\d+", mapping):
                texts = [
                    host.read(f"{base}/{mapping}/{f}") for f in ("page_offset", "start", "end")
                ]
                offset, start, end = (int(text, 0) for text in texts)
                found.append((offset, Span(PhysAddr(start), end + 1 - start)))
        if not found and size:
            start = int(host.read(f"{base}/resource"), 0)
            found.append((0, Span(PhysAddr(start), size)))
    except PermissionError:
        raise RegionError(
            f"/dev/{name}: sysfs hides its addresses: root is needed (CAP_SYS_ADMIN)", errno.EPERM
        ) from None
    return [span for _, span in sorted(found)]


def _number(host: Host, name: str) -> int | None:
    text = host.find(name)
    return None if text is None else int(text, 0)


def _why_none(host: Host) -> str:
    from pkernfs.host import memmap, reserved  # 3 ms, for those only who have no such device

    names = device_names(host)
    if names:
        return f"no such device: there is {', '.join(f'/dev/{name}' for name in names)}"
    line = host.command_line()
    if hidden := cmdline.hides_dax(line):
        return f"no such device: boot without {hidden}"
    made = {word.change.new for word in memmap.e820_words(line) if word.change is not None}
    made.update(entry.kind for entry in reserved.firmware_map(host) or [])
    if memmap.SOFT_RESERVED in made or reserved.fake_mem_spans(line):
        return "no such device: modprobe device_dax; modprobe dax_hmem"
    if memmap.PMEM in made or memmap.PRAM in made:
        return "no such device: ndctl create-namespace -m devdax makes one of persistent memory"
    return (
        "no such device: boot with memmap=SIZE%START-1+0xefffffff to have one, and modprobe "
        "device_dax; modprobe dax_hmem"
    )


# ---------------------------------------------------------------------------- drivers


def bind(device: Device, host: Host) -> Device:
    """Have the driver device_dax take a device that no driver has; return it as it is then.

    :raises RegionError: another driver has it, or this one does not take it.
    """
    if device.driver == os.path.basename(DRIVER):
        return device
    where = f"/dev/{device.name}"
    if device.driver == _SYSTEM_RAM:
        raise RegionError(
            f"{where}: it is in system-ram mode, ordinary memory of the kernel (driver kmem): "
            f"daxctl reconfigure-device --force --mode=devdax {device.name}, and boot with "
            "modprobe.blacklist=kmem to keep it"
        )
    if device.driver is not None:
        raise RegionError(f"{where}: driver {device.driver} has it, expected device_dax")
    if not device.size:
        raise RegionError(f"{where}: it has no memory: daxctl create-device, or write its mapping")
    if not os.path.isdir(host.path(DRIVER)):
        raise RegionError(f"{where}: no driver: modprobe device_dax", errno.ENODEV)
    _attach(device.name, where, host)
    bound = device._replace(driver=driver_of(device.name, host))
    if bound.driver != os.path.basename(DRIVER):
        raise RegionError(f"{where}: the driver device_dax does not take it: see the kernel's log")
    return bound


def _attach(name: str, where: str, host: Host) -> None:
    """Bind a device to device_dax.

    Soft-reserved memory is meant for kmem: device_dax takes it only if told its name. But then it
    tries all devices, and it compares each with all names that it was told: so it forgets this one.
    """
    try:
        write_attribute(f"{DRIVER}/bind", name, where, host)
        return
    except RegionError as e:
        if e.errno != errno.ENODEV:
            raise
    write_attribute(f"{DRIVER}/new_id", name, where, host)
    with contextlib.suppress(RegionError):
        write_attribute(f"{DRIVER}/remove_id", name, where, host)


def write_attribute(name: str, text: str, where: str, host: Host) -> None:
    """Write a sysfs attribute.

    :raises RegionError: the kernel does not take it.
    """
    try:
        fd = os.open(host.path(name), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as e:
        raise RegionError(
            f"{where}: cannot write {text!r} to /{name}: {e.strerror}", e.errno or errno.EIO
        ) from e
