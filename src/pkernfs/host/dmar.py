"""The ACPI DMAR table: which remapping units there are, and which devices are below each.

Chapter 8 of the VT-d specification, revision 5.10. The table is the firmware's, and read as if it
were anybody's: lengths are checked, what is unknown is passed by. Nothing here touches the machine.

A table with faults is read as Linux reads it (drivers/iommu/intel/dmar.c, 6.1 to 7.x): Linux passes
some by (:attr:`Dmar.remarks`), and for others it drives no unit at all (:attr:`Dmar.refused`).
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
_LEAST_HOST_BITS = 12  # PAGE_SHIFT

ENDPOINT, BRIDGE, IOAPIC, HPET, NAMESPACE = range(1, 6)
_SCOPES = {
    ENDPOINT: "endpoint",
    BRIDGE: "bridge",
    IOAPIC: "ioapic",
    HPET: "hpet",
    NAMESPACE: "namespace",
}


class PathStep(NamedTuple):
    """A device on a bus, 0..0x1f, and its function, 0..7; bytes of the table, not checked."""

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
    """The table. ``host_bits`` is the width of physical addresses that units can reach.

    ``refused`` says for which fault Linux drives no unit of this table; it is empty if there is no
    such fault. ``remarks`` are faults that Linux passes by.
    """

    host_bits: int
    interrupt_remapping: bool
    units: tuple[UnitStructure, ...]
    reserved: tuple[ReservedMemory, ...]
    root_ports: tuple[RootPorts, ...]
    refused: str = ""
    remarks: tuple[str, ...] = ()


def read_dmar(host: Host) -> Dmar:
    """Read the machine's DMAR table, to use it.

    :raises NotFoundError: there is none.
    :raises PermissionDeniedError: it cannot be read.
    :raises InvalidError: it makes no sense, or Linux refuses it.
    """
    dmar = read_table(host)
    if dmar.refused:
        raise InvalidError(f"DMAR table: {dmar.refused}: Linux drives no unit of such a table")
    return dmar


def read_table(host: Host) -> Dmar:
    """Read the machine's DMAR table, to describe it: also one that Linux refuses.

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

    :raises InvalidError: no such table, a part of one, or one of which nobody can tell what Linux
        reads: a structure is too short for its fields, and Linux reads on behind it.
    """
    if len(table) < _HEADER.size:
        raise InvalidError(f"DMAR table: cut short: got {len(table)} bytes")
    signature, length, *_rest, width, flags = _HEADER.unpack_from(table)
    if signature != b"DMAR" or length < _HEADER.size:
        raise InvalidError(f"DMAR table: no such table: got {signature!r}, {length} bytes")
    if length > len(table):
        raise InvalidError(f"DMAR table: cut short: got {len(table)} bytes, expected {length}")
    reader = _Reader()
    if sum(table[:length]) & 0xFF:  # ACPICA warns (acpi_ut_verify_checksum)
        reader.remarks.append("its checksum is wrong")
    if width + 1 < _LEAST_HOST_BITS:  # parse_dmar_table: "Invalid DMAR haw"
        reader.refuse(f"bad host address width: got {width + 1} bits")
    reader.read(table[:length])
    return Dmar(
        width + 1,
        bool(flags & 1),
        tuple(reader.units),
        tuple(reader.reserved),
        tuple(reader.root_ports),
        reader.refused,
        tuple(reader.remarks),
    )


class _Reader:
    """What the structures of a table say, and what Linux makes of their faults."""

    def __init__(self) -> None:
        self.units: list[UnitStructure] = []
        self.reserved: list[ReservedMemory] = []
        self.root_ports: list[RootPorts] = []
        self.refused = ""
        self.remarks: list[str] = []

    def refuse(self, why: str) -> None:
        """Note why Linux drives no unit; the first reason is the one that Linux logs."""
        self.refused = self.refused or why

    def read(self, table: bytes) -> None:
        """Read all structures (dmar_walk_remapping_entries)."""
        at = _HEADER.size
        while at < len(table):
            head = table[at : at + _STRUCTURE.size].ljust(_STRUCTURE.size, b"\0")
            kind, length = _STRUCTURE.unpack(head)
            if not length:
                left = len(table) - at
                self.remarks.append(f"{left} byte{'s'[: left - 1]} behind the last structure")
                return
            if at + length > len(table):
                self.refuse(
                    f"the structure at {at:#x} passes the end: "
                    f"got {length} bytes, expected up to {len(table) - at}"
                )
                return
            if length < _STRUCTURE.size:
                raise InvalidError(f"DMAR table at {at:#x}: cut short: got {length} bytes")
            self._structure(kind, at, table[at + _STRUCTURE.size : at + length])
            at += length

    def _structure(self, kind: int, at: int, body: bytes) -> None:
        if kind == _DRHD:
            self._unit(at, body)
        elif kind == _RMRR:
            _reserved, segment, start, last = _unpack("<HHQQ", at, body)
            scopes = tuple(_scopes(at, body[20:]))
            self.reserved.append(ReservedMemory(segment, PhysAddr(start), PhysAddr(last), scopes))
        elif kind == _ATSR:
            port_flags, _reserved, segment = _unpack("<BBH", at, body)
            scopes = tuple(_scopes(at, body[4:]))
            self.root_ports.append(RootPorts(segment, bool(port_flags & _ALL_PORTS), scopes))
        elif kind == _RHSA:
            _reserved, base, node = _unpack("<IQI", at, body)
            # Units before it only: dmar_parse_one_rhsa looks at those that are registered.
            self.units = [u._replace(node=node) if u.base == base else u for u in self.units]
        elif kind == _ANDD and b"\0" not in body[4:]:  # dmar_parse_one_andd
            self.refuse(f"the name at {at:#x} (ANDD) has no end")

    def _unit(self, at: int, body: bytes) -> None:
        """Read a DRHD. Units are numbered in the order of the table (alloc_iommu)."""
        flags, size, segment, base = _unpack("<BBHQ", at, body)
        if not base:  # dmar_validate_one_drhd; the kernel's log calls it a broken BIOS
            self.refuse(f"the unit at {at:#x} has register base 0")
            return
        if any((u.segment, u.base) == (segment, base) for u in self.units):  # dmar_find_dmaru
            self.remarks.append(f"the unit at {base:#x} is there twice")
            return
        unit = UnitStructure(
            len(self.units),
            segment,
            PhysAddr(base),
            PAGE << (size & 0xF),
            bool(flags & _INCLUDE_PCI_ALL),
            tuple(_scopes(at, body[12:])),
        )
        self.units.append(unit)


def _unpack(form: str, at: int, body: bytes) -> tuple[int, ...]:
    if len(body) < struct.calcsize(form):
        raise InvalidError(f"DMAR table at {at:#x}: cut short: got {len(body)} bytes")
    return struct.unpack_from(form, body)


def _scopes(at: int, data: bytes) -> Iterator[Scope]:
    while data:
        if len(data) < _SCOPE.size:
            raise InvalidError(f"DMAR table at {at:#x}: device scope: cut short: got {len(data)}")
        kind, length, _flags, _reserved, enumeration, bus = _SCOPE.unpack_from(data)
        if not _SCOPE.size <= length <= len(data):
            raise InvalidError(
                f"DMAR table at {at:#x}: device scope: bad length: "
                f"got {length}, expected {_SCOPE.size}..{len(data)}"
            )
        # A path without a step, or with one that no device has, matches nothing.
        steps = data[_SCOPE.size : length]
        path = tuple(PathStep(steps[i], steps[i + 1]) for i in range(0, len(steps) - 1, 2))
        yield Scope(kind, enumeration, bus, path)
        data = data[length:]
