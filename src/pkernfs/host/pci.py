"""PCI devices as sysfs has them: the bridges above each, its driver, the unit that it is below.

Documentation/ABI/testing/sysfs-bus-pci. Nothing is changed here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from pkernfs.errors import InvalidError
from pkernfs.host import pci_config
from pkernfs.host.dmar import BRIDGE, ENDPOINT, Dmar, ReservedMemory, Scope, UnitStructure
from pkernfs.host.sysroot import Host
from pkernfs.quantities import SourceId
from pkernfs.vtd.entries import bdf_text, parse_bdf

DEVICES = "sys/bus/pci/devices"
_BDF = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_LAST_SEGMENT = 0xFFFF  # of DMAR; those above are below an Intel VMD
_BRIDGE_CLASS = 0x06
_TO_CONVENTIONAL, _FROM_CONVENTIONAL = 7, 8
_FOR_EVERYBODY = 64  # so many bytes of a space are shown without CAP_SYS_ADMIN
_EXTENDED_CAPABILITIES = 0x100
_ATS, _PASID = 0x000F, 0x001B
_MOST_CAPABILITIES = 256


class PciDevice(NamedTuple):
    """A device: ``chain`` are the source ids from the root bus down to it, bridges first.

    ``aliased``: what is above it sends its requests on under a name of its own. Below an Intel VMD
    the chain ends with the VMD, whose name requests have (Linux: pci_real_dma_dev());
    ``unit_segment`` is then the VMD's segment. It is None where it is that of the device.
    ``known``: its configuration space could be read, more than the first 64 bytes of it.
    """

    segment: int
    source_id: SourceId
    chain: tuple[SourceId, ...]
    driver: str | None
    bridge: bool
    bus_master: bool
    aliased: bool
    ats: bool
    pasid: bool
    unit_segment: int | None = None
    known: bool = True

    @property
    def name(self) -> str:
        """Its name as ``lspci -D`` has it."""
        return bdf_text(self.source_id, self.segment)


def parse_device(text: str) -> SourceId:
    """Return the source id of a device of segment 0, which is the one that a root table is for.

    :raises InvalidError: no device's address, or of another segment.
    """
    segment, source_id = parse_bdf(text)
    if segment > _LAST_SEGMENT:
        raise InvalidError(
            f"device {text!r}: it is below a VMD, whose address its requests have: name that one"
        )
    if segment:
        raise InvalidError(f"device {text!r}: only PCI segment 0000 is supported")
    return source_id


def read_device(host: Host, source_id: SourceId, segment: int = 0) -> PciDevice | None:
    """Read a device as it is now; None: there is none."""
    name = bdf_text(source_id, segment)
    path = host.path(f"{DEVICES}/{name}")
    if not os.path.exists(path):
        return None
    config = _config(path)
    # A virtual function's requests go where those of its physical one do (8.3.1).
    place = os.path.realpath(os.path.join(path, "physfn"))
    if not os.path.isdir(place):
        place = os.path.realpath(path)
    names = [part for part in place.split("/") if _BDF.fullmatch(part)]
    above = [parse_bdf(part) for part in names]
    chain = tuple(a.source_id for a in above if a.segment == above[0].segment)
    driver = os.path.join(path, "driver")
    bridges = [_config(host.path(f"{DEVICES}/{bridge}")) for bridge in names[:-1]]
    below_vmd = bool(above) and above[0].segment != segment
    return PciDevice(
        segment,
        source_id,
        chain,
        os.path.basename(os.readlink(driver)) if os.path.islink(driver) else None,
        config[pci_config.CLASS : pci_config.CLASS + 1] == bytes([_BRIDGE_CLASS]),
        bool(_word(config, pci_config.COMMAND) & pci_config.COMMAND_MASTER),
        below_vmd or any(_is_conventional(c) for c in bridges),
        _enabled(config, _ATS, 1 << 15),
        _enabled(config, _PASID, 1),
        above[0].segment if below_vmd else None,
        all(len(one) > _FOR_EVERYBODY for one in (config, *bridges)),
    )


def all_devices(host: Host) -> list[PciDevice]:
    """Read every device of the machine, by segment and source id."""
    places = sorted(parse_bdf(n) for n in host.list(DEVICES) if _BDF.fullmatch(n))
    found = (read_device(host, source_id, segment) for segment, source_id in places)
    return [device for device in found if device is not None]


def group_of(host: Host, device: PciDevice) -> list[PciDevice]:
    """Read the other devices of its IOMMU group, without bridges (Linux, driver-api/vfio).

    The kernel keeps no two of them from each other: they share a domain. None where the kernel does
    not drive the units.
    """
    names = host.list(f"{DEVICES}/{device.name}/iommu_group/devices")
    places = sorted(parse_bdf(name) for name in names if _BDF.fullmatch(name))
    found = (read_device(host, source_id, segment) for segment, source_id in places)
    return [d for d in found if d is not None and not d.bridge and d.name != device.name]


def modalias_of(host: Host, name: str) -> str | None:
    """Return the text by which drivers are found for a device; None: there is no such device."""
    return host.find(f"{DEVICES}/{name}/modalias")


def driver_module_of(host: Host, name: str) -> str | None:
    """Return the module of the driver that has a device; None: no driver, or one without it."""
    module = host.path(f"{DEVICES}/{name}/driver/module")
    return os.path.basename(os.path.realpath(module)) if os.path.exists(module) else None


# ---------------------------------------------------------------------- which unit


def unit_of(dmar: Dmar, device: PciDevice) -> UnitStructure | None:
    """Return the unit that a device's requests reach (8.3); None: there is none.

    Of several units with the device in their scopes, Linux takes the last in the table, and one
    for all other devices after those (dmar_register_drhd_unit()).
    """
    segment = device.segment if device.unit_segment is None else device.unit_segment
    mine = [u for u in dmar.units if u.segment == segment]
    for unit in reversed([u for u in mine if not u.include_all]):
        if covers(unit.scopes, device):
            return unit
    return next((u for u in mine if u.include_all), None)


def reserved_memory_of(dmar: Dmar, device: PciDevice) -> list[ReservedMemory]:
    """Return the memory that the firmware lets a device use, whoever runs (8.4)."""
    return [r for r in dmar.reserved if r.segment == device.segment and covers(r.scopes, device)]


def covers(scopes: Sequence[Scope], device: PciDevice) -> bool:
    """Tell whether one of these scopes is the device, or a bridge above it."""
    return any(_is_in(scope, device.chain) for scope in scopes)


def _is_in(scope: Scope, chain: tuple[SourceId, ...]) -> bool:
    """Tell whether a scope is a device, or a bridge above it (dmar_match_pci_path()).

    The path is that from the root bus. Linux also takes a single step on the device's own bus.
    """
    if scope.kind not in (ENDPOINT, BRIDGE):
        return False
    steps = [(s >> 3 & 0x1F, s & 7) for s in chain]
    for length in range(1, len(chain) + 1):
        if scope.kind == ENDPOINT and length < len(chain):
            continue
        last = length - 1
        from_root = chain[0] >> 8 == scope.bus and tuple(steps[:length]) == scope.path
        on_its_bus = chain[last] >> 8 == scope.bus and (steps[last],) == scope.path
        if from_root or on_its_bus:
            return True
    return False


# ---------------------------------------------------------------------- configuration space


def _config(path: str) -> bytes:
    """Read configuration space: 4096 or 256 bytes for root, the first 64 for others."""
    try:
        with open(os.path.join(path, "config"), "rb") as file:
            return file.read(4096)
    except OSError as e:
        raise InvalidError(f"device {os.path.basename(path)}: {e.strerror}") from None


def _word(config: bytes, at: int) -> int:
    return int.from_bytes(config[at : at + 2], "little")


def _capability(config: bytes, wanted: int) -> int:
    """Return the offset of a capability; 0: there is none."""
    if not _word(config, pci_config.STATUS) & pci_config.STATUS_CAPABILITIES:
        return 0
    return pci_config.find_capability(lambda at: _word(config, at), wanted)


def _is_conventional(bridge: bytes) -> bool:
    """Tell whether a bridge is not PCI Express from end to end."""
    express = _capability(bridge, pci_config.EXPRESS)
    if not express:
        return True
    return _word(bridge, express + 2) >> 4 & 0xF in (_TO_CONVENTIONAL, _FROM_CONVENTIONAL)


def _enabled(config: bytes, wanted: int, bit: int) -> bool:
    """Tell whether a bit of an extended capability's control register (offset 6) is set."""
    at = _EXTENDED_CAPABILITIES
    for _ in range(_MOST_CAPABILITIES):
        if at + 8 > len(config):
            return False
        if _word(config, at) == wanted:
            return bool(_word(config, at + 6) & bit)
        at = _word(config, at + 2) >> 4
        if at < _EXTENDED_CAPABILITIES:
            return False
    return False
