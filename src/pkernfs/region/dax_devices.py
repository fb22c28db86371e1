"""Taking apart and making dax devices, so that one is again what it was before a kexec.

Soft-reserved memory comes back as one device over all of it, or as none. Nothing here reads or
stores memory: what a device was is for :mod:`pkernfs.fs.placement` to find.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from pkernfs.errors import BusyError, RegionError
from pkernfs.host.holders import look
from pkernfs.host.iomem import Span, overlap
from pkernfs.host.sysroot import Host
from pkernfs.region import dax_node
from pkernfs.region.dax import (
    DEVICES,
    DRIVER,
    Device,
    bind,
    device_names,
    device_number,
    is_name,
    read_device,
    write_attribute,
)
from pkernfs.region.locks import lock_physical

_MOST_DEVICES = 64


def region_devices(region: str, host: Host) -> list[Device]:
    """Return the devices of a dax region, which is given by its directory."""
    names = (name for name in host.list(region) if is_name(name))
    return [read_device(name, host) for name in sorted(names, key=device_number)]


def regions(host: Host) -> list[str]:
    """Return the directories of dax regions whose devices can be made and taken apart."""
    found = {read_device(name, host).region for name in device_names(host)}
    return sorted(r for r in found if os.path.exists(host.path(f"{r}/dax_region/create")))


@contextlib.contextmanager
def free_memory(region: str, host: Host) -> Iterator[Device | None]:
    """Have a device, while the block runs, over the memory of a dax region that belongs to none.

    It is None where there is no such memory, or no device to spare.

    :raises RegionError: the kernel refuses.
    """
    size = int(host.read(f"{region}/dax_region/available_size"))
    spare = next((d for d in region_devices(region, host) if not d.size and not d.driver), None)
    if not size or spare is None:
        yield None
        return
    _set_size(spare.name, size, host)
    try:
        yield read_device(spare.name, host)
    finally:
        release(spare.name, host)


def release(name: str, host: Host) -> None:
    """Take a device from its driver, and its memory from it.

    :raises RegionError: the kernel refuses.
    """
    if read_device(name, host).driver is not None:
        write_attribute(f"{DRIVER}/unbind", name, f"/dev/{name}", host)
    _set_size(name, 0, host)


def rebuild(name: str, align: int, pieces: tuple[Span, ...], region: str, host: Host) -> str:
    """Make the device that had these ranges, and bind it; return its name.

    That is another name where this one cannot be had. Devices in the way are taken apart if nobody
    uses them. ``align`` is in bytes.

    :raises BusyError: somebody does.
    :raises RegionError: the kernel refuses.
    """
    where = f"/dev/{name}"
    with contextlib.ExitStack() as held:
        for device in region_devices(region, host):
            if any(overlap(one, other) for one in device.pieces for other in pieces):
                held.enter_context(unused(device, "in the way, and ", host))
                release(device.name, host)
        made = _empty_device(name, region, host)
        base = f"{DEVICES}/{made}"
        if read_device(made, host).align != align:
            write_attribute(f"{base}/align", str(align), where, host)
        for piece in pieces:
            text = f"{piece.start:x}-{piece.end - 1:x}"
            write_attribute(f"{base}/mapping", text, where, host)
        device = read_device(made, host)
        if device.pieces != pieces:
            raise RegionError(f"{where}: cannot be put back: the kernel made {device.pieces}")
        bind(device, host)
    return made


def _set_size(name: str, size: int, host: Host) -> None:
    write_attribute(f"{DEVICES}/{name}/size", str(size), f"/dev/{name}", host)


@contextlib.contextmanager
def unused(device: Device, why: str, host: Host) -> Iterator[None]:
    """Have a device, while the block runs, locked against other regions; nobody has it open.

    :param why: words for the message, before "in use"
    :raises BusyError: somebody has it open or mapped.
    :raises LockedError: it is a region that is mounted.
    """
    where = f"/dev/{device.name}"
    lock = lock_physical(where, list(device.pieces), host, exclusive=True)
    try:
        if names := users(device.name, host):
            raise BusyError(f"{where}: {why}in use by {', '.join(names)}")
        yield
    finally:
        os.close(lock.fd)


def users(name: str, host: Host) -> list[str]:
    """Return the other processes that have a device open or mapped, each as ``COMMAND (PID)``."""
    try:
        target = dax_node.target(name, host)
    except RegionError:  # no node, no user
        return []
    return [f"{one.command} ({one.pid})" for one in look([target], host).found]


def _empty_device(name: str, region: str, host: Host) -> str:
    """A device without memory: of that name if the region has or can have it.

    :raises RegionError: it has other memory, or the kernel makes none.
    """
    own = read_device(name, host) if name in device_names(host) else None
    if own is not None and own.region == region:
        if own.size:
            raise RegionError(f"/dev/{name}: it is there with other memory: daxctl destroy-device")
        return name
    made: list[str] = []
    while len(made) < _MOST_DEVICES:
        before = device_names(host)
        write_attribute(f"{region}/dax_region/create", "1", f"/dev/{name}", host)
        new = [n for n in device_names(host) if n not in before]
        made += new
        if not new or new[0] == name or not _same_region(new[0], name):
            break
    if not made:
        raise RegionError(f"/dev/{name}: the kernel makes no device in /{region}")
    chosen = name if name in made else made[0]
    for other in made:
        if other != chosen:
            write_attribute(f"{region}/dax_region/delete", other, f"/dev/{name}", host)
    return chosen


def _same_region(one: str, other: str) -> bool:
    """Tell whether two names are of one dax region: it may come back with another number."""
    return device_number(one).region == device_number(other).region
