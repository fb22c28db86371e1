"""DMAR tables made by hand."""

from __future__ import annotations

import struct
from pathlib import Path


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
