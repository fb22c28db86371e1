"""The ACPI SRAT: which node a range of memory is in."""

from __future__ import annotations

import struct
from pathlib import Path

from pkernfs.host.iomem import Span
from pkernfs.host.srat import NodeMemory, nodes_of, parse, read_memory
from pkernfs.quantities import PhysAddr
from support.made_up_host import make_machine

G = PhysAddr(1 << 30)
M = 1 << 20


def apic(domain: int, enabled: int = 1) -> bytes:
    return struct.pack(
        "<BBBBIB3sI", 0, 16, domain & 0xFF, 0, enabled, 0, (domain >> 8).to_bytes(3, "little"), 0
    )


def memory(domain: int, start: int, size: int, enabled: int = 1) -> bytes:
    return struct.pack("<BBIHQQIIQ", 1, 40, domain, 0, start, size, 0, enabled, 0)


def x2apic(domain: int, enabled: int = 1) -> bytes:
    return struct.pack("<BBHIIIII", 2, 24, 0, domain, 7, enabled, 0, 0)


def test_nodes(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    assert nodes_of(Span(G, G), machine) == []
    (tmp_path / "sys/devices/system/node/node0").mkdir(parents=True)
    assert nodes_of(Span(G, G), machine) == [0]
    (tmp_path / "sys/devices/system/node/node1").mkdir()
    assert nodes_of(Span(G, G), machine) == []
    table = bytes(48) + memory(3, 0, G) + memory(0x102, G, G) + memory(9, 2 * G, G, 0)
    table += apic(0x102) + x2apic(5, 0) + b"\x07\x04zz" + x2apic(3)
    machine.write("sys/firmware/acpi/tables/SRAT", table)
    assert nodes_of(Span(PhysAddr(0), 2 * M), machine) == [1]  # the second domain of a processor
    assert nodes_of(Span(G, 2 * M), machine) == [0]
    assert nodes_of(Span(PhysAddr(G - 2 * M), 4 * M), machine) == [0, 1]
    assert nodes_of(Span(PhysAddr(2 * G), 2 * M), machine) == []
    for end in range(48, len(table)):
        machine.write("sys/firmware/acpi/tables/SRAT", table[:end])
        nodes_of(Span(G, G), machine)


def test_the_ranges_of_the_table() -> None:
    table = bytes(48) + memory(7, 0, G) + memory(3, 4 * G, 2 * G) + memory(8, G, G, 0) + apic(3)
    assert parse(table) == [
        NodeMemory(PhysAddr(0), G, 1),
        NodeMemory(PhysAddr(4 * G), PhysAddr(6 * G), 0),
    ]
    assert parse(b"") == parse(table[:48]) == []


def test_an_entry_that_contradicts_itself_ends_the_table() -> None:
    good = memory(0, 0, G)
    assert len(parse(bytes(48) + good + b"\x01\x00" + good)) == 1  # it would not get any further
    assert len(parse(bytes(48) + good + b"\x01\x50" + good)) == 1  # beyond the end
    short = bytes([1, 8, 0, 0, 0, 0, 0, 0])
    assert len(parse(bytes(48) + good + short + good)) == 2  # a whole entry, but of no use


def test_no_table(tmp_path: Path) -> None:
    assert read_memory(make_machine(tmp_path)) == []
