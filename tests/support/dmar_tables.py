"""DMAR tables made by hand."""

from __future__ import annotations

import struct
from pathlib import Path

from pkernfs.host.dmar import BRIDGE, ENDPOINT, IOAPIC


def table(*structures: bytes, width: int = 38, flags: int = 1) -> bytes:
    """A DMAR table with a good checksum."""
    body = b"".join(structures)
    head = struct.pack("<4sIBB6s8sIIIBB10x", b"DMAR", 48 + len(body), 1, 0, b"", b"", 0, 0, 0,
                       width, flags)  # fmt: skip
    made = bytearray(head + body)
    made[9] = -sum(made) & 0xFF
    return bytes(made)


def structure(kind: int, body: bytes) -> bytes:
    return struct.pack("<HH", kind, 4 + len(body)) + body


def scope(kind: int, bus: int, *path: tuple[int, int], enumeration: int = 0) -> bytes:
    steps = bytes(x for pair in path for x in pair)
    return struct.pack("<BBBBBB", kind, 6 + len(steps), 0, 0, enumeration, bus) + steps


def drhd(base: int, *scopes: bytes, flags: int = 0, segment: int = 0, size: int = 0) -> bytes:
    return structure(0, struct.pack("<BBHQ", flags, size, segment, base) + b"".join(scopes))


def rmrr(start: int, last: int, *scopes: bytes) -> bytes:
    return structure(1, struct.pack("<HHQQ", 0, 0, start, last) + b"".join(scopes))


def config(
    *,
    command: int = 0,
    kind: int = 0,
    express: int | None = None,
    ats: bool = False,
    pasid: bool = False,
) -> bytes:
    """Configuration space of 4096 bytes; ``express`` is a device and port type."""
    data = bytearray(4096)
    data[4:6] = command.to_bytes(2, "little")
    data[0xB] = kind
    if express is not None:
        data[6] = 0x10
        data[0x34] = 0x40
        data[0x40:0x44] = bytes([0x05, 0x50, 0, 0])  # MSI, then PCI Express
        data[0x50:0x54] = bytes([0x10, 0, express << 4, 0])
        data[0x100:0x108] = struct.pack("<HHHH", 0x1B, 0x110 << 4 | 1, 0, pasid)
        data[0x110:0x118] = struct.pack("<HHHH", 0x0F, 1, 0, ats << 15)
    return bytes(data)


def add_device(root: Path, place: str, data: bytes, driver: str | None = None) -> None:
    there = root / "sys/devices/pci0000:00" / place
    there.mkdir(parents=True)
    (there / "config").write_bytes(data)
    links = root / "sys/bus/pci/devices"
    links.mkdir(parents=True, exist_ok=True)
    (links / there.name).symlink_to(there)
    if driver:
        (root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (there / "driver").symlink_to(root / "sys/bus/pci/drivers" / driver)


#: From the firmware interface of QEMU 7.2, ``-M q35 -device intel-iommu,aw-bits=48,device-iotlb=on
#: -device edu,addr=05.0``; SeaBIOS puts in the checksum.
QEMU_TABLE = bytes.fromhex(
    "444d4152780000000108424f4348532042585043202020200100000042585043"
    "010000002f010000000000000000000000004000000000000000d9fe00000000"
    "0308000000ff0000010800000000000001080000000005000108000000001f00"
    "0108000000001f020108000000001f030200080001000000"
)


TWO_UNITS = table(
    drhd(0xFED9_0000, scope(ENDPOINT, 0, (2, 0)), scope(IOAPIC, 0xF0, (0x1F, 7), enumeration=8)),
    drhd(0xFED9_1000, scope(BRIDGE, 0, (0x1C, 0)), scope(ENDPOINT, 0, (0x1D, 0), (3, 1)), size=1),
    drhd(0xFED9_2000, flags=1),
    drhd(0xFED9_3000, flags=1, segment=1),
    rmrr(0x7B00_0000, 0x7BFF_FFFF, scope(ENDPOINT, 0, (0x14, 0))),
    structure(3, struct.pack("<IQI", 0, 0xFED9_2000, 1)),
    structure(4, b"an ACPI device that nobody asks for\0"),
    structure(77, b"of a revision to come"),
)
