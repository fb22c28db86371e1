"""The ACPI SRAT: which node a range of memory is in."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

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


def initiator(domain: int, enabled: int = 1) -> bytes:
    return struct.pack("<BBBBI16xII", 5, 32, 0, 1, domain, enabled, 0)


def srat(*entries: bytes, revision: int = 3) -> bytes:
    body = b"".join(entries)
    return struct.pack("<4sIB39x", b"SRAT", 48 + len(body), revision) + body


def numbers(*entries: bytes, revision: int = 3) -> list[int]:
    """The node of each range of memory."""
    return [memory.node for memory in parse(srat(*entries, revision=revision))]


def test_nodes(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    assert nodes_of(Span(G, G), machine) == []
    (tmp_path / "sys/devices/system/node/node0").mkdir(parents=True)
    assert nodes_of(Span(G, G), machine) == [0]
    (tmp_path / "sys/devices/system/node/node1").mkdir()
    assert nodes_of(Span(G, G), machine) == []
    table = srat(memory(3, 0, G), memory(0x102, G, G), memory(9, 2 * G, G, 0),
                 apic(0x102), x2apic(5, 0), b"\x07\x04zz", x2apic(3))  # fmt: skip
    machine.write("sys/firmware/acpi/tables/SRAT", table)
    assert nodes_of(Span(PhysAddr(0), 2 * M), machine) == [1]  # the second domain of a processor
    assert nodes_of(Span(G, 2 * M), machine) == [0]
    assert nodes_of(Span(PhysAddr(G - 2 * M), 4 * M), machine) == [0, 1]
    assert nodes_of(Span(PhysAddr(2 * G), 2 * M), machine) == []
    for end in range(len(table)):
        machine.write("sys/firmware/acpi/tables/SRAT", table[:end])
        nodes_of(Span(G, G), machine)


def test_the_ranges_of_the_table() -> None:
    table = srat(memory(7, 0, G), memory(3, 4 * G, 2 * G), memory(8, G, G, 0), apic(3))
    assert parse(table) == [
        NodeMemory(PhysAddr(0), G, 1),
        NodeMemory(PhysAddr(4 * G), PhysAddr(6 * G), 0),
    ]
    assert parse(b"") == parse(table[:48]) == []
    assert parse(srat(memory(0, G, 0), memory(1, G, (1 << 64) - 1))) == []


TWO = (memory(0, 0, G), memory(1, G, G))


def test_a_generic_initiator_is_numbered_with_the_processors() -> None:
    """ACPI 6.3; Linux since 5.11. A generic port (type 6) and an interrupt controller are not."""
    cpus = (apic(0), apic(1))
    assert numbers(*cpus, initiator(3), *TWO, memory(2, 2 * G, G)) == [0, 1, 3]
    assert numbers(*cpus, memory(2, 2 * G, G), initiator(3), *TWO) == [3, 0, 1]
    port, its = b"\x06" + initiator(3)[1:], struct.pack("<BBIHI", 4, 12, 3, 0, 0)
    assert numbers(*cpus, port, its, *TWO, memory(2, 2 * G, G)) == [0, 1, 2]


def test_an_initiator_that_is_disabled_ends_the_pass() -> None:
    """acpi_parse_gi_affinity() fails, and acpi_parse_entries_array() calls no handler after it."""
    assert numbers(apic(5), initiator(9, enabled=0), apic(1), *TWO) == [1, 2]
    assert numbers(apic(5), initiator(1024), apic(1), *TWO) == [1, 2]
    assert numbers(apic(5), apic(1), *TWO) == [2, 1]


def test_domains_of_the_first_revision_are_one_byte() -> None:
    assert numbers(apic(0x102), memory(2, 0, G), memory(0x102, G, G), revision=1) == [0, 0]
    assert numbers(apic(0x102), memory(2, 0, G), memory(0x102, G, G), revision=2) == [1, 0]


def test_entries_of_newer_revisions_are_longer() -> None:
    longer = bytearray(memory(1, 0, G) + bytes(8))
    longer[1] = len(longer)
    assert numbers(bytes(longer), memory(0, G, G)) == [0, 1]
    wide = bytearray(x2apic(4) + bytes(8))
    wide[1] = len(wide)
    assert numbers(bytes(wide), *TWO) == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        bytes([1, 8, 0, 0, 0, 0, 0, 0]),
        bytes([0, 24]) + apic(0)[2:] + bytes(8),
        bytes([2, 16]) + x2apic(0)[2:16],
        memory(1024, 4 * G, G),
        apic(1024),
        x2apic(1 << 31),
        b"\x01\x00" + bytes(38),
    ],
)
def test_a_table_that_the_kernel_does_not_use(bad: bytes) -> None:
    """The kernel says "SRAT: SRAT not used.", and has all memory in node 0."""
    assert numbers(*TWO, bad) == []


def test_where_the_table_ends() -> None:
    good = memory(1, 0, G)
    assert numbers(good, b"\x07\x00" + bytes(38), good) == [0]  # no length: it goes no further
    assert numbers(good, b"\x07\x50", good) == [0]  # beyond the end
    assert numbers(good, b"\x01\x01") == [0]  # no entry has two bytes


def test_no_table(tmp_path: Path) -> None:
    assert read_memory(make_machine(tmp_path)) == []
