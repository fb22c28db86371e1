"""The ACPI DMAR table: which remapping units there are, and which devices are below each.

Chapter 8 of the VT-d specification, revision 5.10. The table is the firmware's, and read as if it
were anybody's: lengths are checked, what is unknown is passed by. Nothing here touches the machine.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.errors import InvalidError, NotFoundError, PermissionDeniedError
from pkernfs.host.sysroot import Host
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr

#: The kernel's copy of the table (Documentation/ABI/testing/sysfs-firmware-acpi).
_TABLE = "sys/firmware/acpi/tables/DMAR"

_HEADER = struct.Struct("<4sIBB6s8sIIIBB10x")  # 8.1, after ACPI's own header (36 bytes)
_STRUCTURE = struct.Struct("<HH")
_SCOPE = struct.Struct("<BBBBBB")
_DRHD, _RMRR, _ATSR, _RHSA, _ANDD, _SATC, _SIDP = range(7)  # 8.2, table 64
_INCLUDE_PCI_ALL = 1
_ALL_PORTS = 1

ENDPOINT, BRIDGE, IOAPIC, HPET, NAMESPACE = range(1, 6)
_SCOPES = {
    ENDPOINT: "endpoint",
    BRIDGE: "bridge",
    IOAPIC: "ioapic",
    HPET: "hpet",
    NAMESPACE: "namespace",
}


class PathStep(NamedTuple):
    """A device on a bus, 0..0x1f, and its function, 0..7."""

    device: int
    function: int


class Scope(NamedTuple):
    """A device scope entry (8.3.1): a device, found by going down from ``bus``.

    ``path`` has a step for each bridge on the way, and one for the device.
    ``enumeration`` is the id of an I/O APIC or HPET, or the number of an ACPI namespace device.
    """

    kind: int
    enumeration: int
    bus: int
    path: tuple[PathStep, ...]

    def __str__(self) -> str:
        steps = ".".join(f"{device:02x}.{function:x}" for device, function in self.path)
        return f"{_SCOPES.get(self.kind, f'type {self.kind}')} {self.bus:02x}:{steps}"


class UnitStructure(NamedTuple):
    """A remapping unit (DRHD, 8.3): the segment it serves, and where its registers are.

    ``number`` is N of the kernel's dmarN. ``include_all``: all devices of the segment that no other
    unit's scope has. ``node`` is the proximity domain that RHSA gives it, if there is one.
    """

    number: int
    segment: int
    base: PhysAddr
    register_bytes: int
    include_all: bool
    scopes: tuple[Scope, ...]
    node: int | None = None

    @property
    def name(self) -> str:
        """Its name in /sys/class/iommu."""
        return f"dmar{self.number}"


class ReservedMemory(NamedTuple):
    """Memory that devices use whatever the operating system does (RMRR, 8.4); ``last`` included."""

    segment: int
    start: PhysAddr
    last: PhysAddr
    scopes: tuple[Scope, ...]


class RootPorts(NamedTuple):
    """Root ports that pass ATS on (ATSR, 8.5)."""

    segment: int
    all_ports: bool
    scopes: tuple[Scope, ...]


class Dmar(NamedTuple):
    """The table. ``host_bits`` is the width of physical addresses that units can reach."""

    host_bits: int
    interrupt_remapping: bool
    units: tuple[UnitStructure, ...]
    reserved: tuple[ReservedMemory, ...]
    root_ports: tuple[RootPorts, ...]


def read_dmar(host: Host) -> Dmar:
    """Read the machine's DMAR table.

    :raises NotFoundError: there is none.
    :raises PermissionDeniedError, InvalidError: it cannot be read, or makes no sense.
    """
    try:
        with open(host.path(_TABLE), "rb") as file:
            table = file.read(1 << 20)
    except FileNotFoundError:
        raise NotFoundError(
            "no DMAR table: the firmware describes no VT-d unit: switch VT-d on in its set-up"
        ) from None
    except OSError as e:
        raise PermissionDeniedError(f"{host.path(_TABLE)}: {e.strerror}: root is needed") from None
    return parse(table)


def parse(table: bytes) -> Dmar:
    """Parse a DMAR table as the firmware has made it.

    The kernel numbers units in the order of the table (drivers/iommu/intel/dmar.c, alloc_iommu).

    :raises InvalidError: no such table, or one that contradicts itself.
    """
    if len(table) < _HEADER.size:
        raise InvalidError(f"DMAR table: cut short: got {len(table)} bytes")
    signature, length, *_rest, width, flags = _HEADER.unpack_from(table)
    if signature != b"DMAR" or not _HEADER.size <= length <= len(table):
        raise InvalidError(f"DMAR table: no such table: got {signature!r}, {length} bytes")
    if sum(table[:length]) & 0xFF:
        raise InvalidError(f"DMAR table: bad checksum: got {sum(table[:length]) & 0xFF:#x}")
    units: list[UnitStructure] = []
    reserved: list[ReservedMemory] = []
    root_ports: list[RootPorts] = []
    nodes: dict[PhysAddr, int] = {}
    for kind, at, body in _structures(table[:length]):
        if kind == _DRHD:
            units.append(_unit(len(units), at, body))
        elif kind == _RMRR:
            _reserved, segment, start, last = _unpack("<HHQQ", at, body)
            scopes = tuple(_scopes(at, body[20:]))
            reserved.append(ReservedMemory(segment, PhysAddr(start), PhysAddr(last), scopes))
        elif kind == _ATSR:
            port_flags, _reserved, segment = _unpack("<BBH", at, body)
            scopes = tuple(_scopes(at, body[4:]))
            root_ports.append(RootPorts(segment, bool(port_flags & _ALL_PORTS), scopes))
        elif kind == _RHSA:
            _reserved, base, node = _unpack("<IQI", at, body)
            nodes[PhysAddr(base)] = node
    found = tuple(u._replace(node=nodes.get(u.base)) for u in units)
    return Dmar(width + 1, bool(flags & 1), found, tuple(reserved), tuple(root_ports))


class _Structure(NamedTuple):
    """A remapping structure: type, offset in the table, the bytes after type and length."""

    kind: int
    at: int
    body: bytes


def _structures(table: bytes) -> Iterator[_Structure]:
    """Yield each structure of the table."""
    at = _HEADER.size
    while at < len(table):
        if at + _STRUCTURE.size > len(table):
            raise InvalidError(f"DMAR table at {at:#x}: cut short: got {len(table) - at} bytes")
        kind, length = _STRUCTURE.unpack_from(table, at)
        if length < _STRUCTURE.size or at + length > len(table):
            raise InvalidError(
                f"DMAR table at {at:#x}: bad length: got {length}, "
                f"expected {_STRUCTURE.size}..{len(table) - at}"
            )
        yield _Structure(kind, at, table[at + _STRUCTURE.size : at + length])
        at += length


def _unpack(form: str, at: int, body: bytes) -> tuple[int, ...]:
    if len(body) < struct.calcsize(form):
        raise InvalidError(f"DMAR table at {at:#x}: cut short: got {len(body)} bytes")
    return struct.unpack_from(form, body)


def _unit(number: int, at: int, body: bytes) -> UnitStructure:
    flags, size, segment, base = _unpack("<BBHQ", at, body)
    if not base or base % PAGE:
        raise InvalidError(f"DMAR table at {at:#x}: bad register base: got {base:#x}")
    return UnitStructure(
        number,
        segment,
        PhysAddr(base),
        PAGE << (size & 0xF),
        bool(flags & _INCLUDE_PCI_ALL),
        tuple(_scopes(at, body[12:])),
    )


def _scopes(at: int, data: bytes) -> Iterator[Scope]:
    while data:
        if len(data) < _SCOPE.size:
            raise InvalidError(f"DMAR table at {at:#x}: device scope: cut short: got {len(data)}")
        kind, length, _flags, _reserved, enumeration, bus = _SCOPE.unpack_from(data)
        if length < _SCOPE.size + 2 or length % 2 or length > len(data):
            raise InvalidError(
                f"DMAR table at {at:#x}: device scope: bad length: "
                f"got {length}, expected an even number in 8..{len(data)}"
            )
        steps = data[_SCOPE.size : length]
        path = tuple(PathStep(steps[i], steps[i + 1]) for i in range(0, len(steps), 2))
        if any(device > 0x1F or function > 7 for device, function in path):
            raise InvalidError(f"DMAR table at {at:#x}: device scope: bad path: got {steps.hex()}")
        yield Scope(kind, enumeration, bus, path)
        data = data[length:]
