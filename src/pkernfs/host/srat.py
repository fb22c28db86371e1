"""The ACPI SRAT: the NUMA node of each range of memory (ACPI 6.5, 5.2.16), as Linux numbers nodes.

Linux numbers a domain when it first meets it (drivers/acpi/numa/srat.c: acpi_numa_init(); 6.1 to
7.x): in one pass over processors and generic initiators, in a second one over memory. The table is
the firmware's, and read as if it were anybody's; an entry of an unknown type is passed by.

Not modelled are ``numa=`` on the kernel command line, and x2APIC ids that a kernel in xAPIC mode
ignores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr

_TABLE = "sys/firmware/acpi/tables/SRAT"
_NODES = "sys/devices/system/node"
_HEADER_BYTES = 48
_REVISION_AT = 8
_APIC, _MEMORY, _X2APIC, _INITIATOR = 0, 1, 2, 5
_APIC_BYTES, _MEMORY_BYTES, _X2APIC_BYTES = 16, 40, 24
_ENABLED = 1
_MAX_DOMAINS = 1024  # MAX_PXM_DOMAINS, for the largest CONFIG_NODES_SHIFT of x86
_WIDE_DOMAINS = 2  # the first revision whose domains are not one byte


class NodeMemory(NamedTuple):
    """A range of memory, and the kernel's number of its node; ``end`` is not part of it."""

    start: PhysAddr
    end: PhysAddr
    node: int


class _Entry(NamedTuple):
    """An entry; ``data`` has as many bytes as the kernel reads, whatever ``length`` says."""

    kind: int
    length: int
    data: bytes

    def number(self, at: int, count: int = 4) -> int:
        """A field of ``count`` bytes."""
        return int.from_bytes(self.data[at : at + count], "little")


def nodes_of(span: Span, host: Host) -> list[int]:
    """Return the NUMA nodes that a range lies in; empty if they are not known."""
    memory = read_memory(host)
    if memory:
        return sorted({m.node for m in memory if m.start < span.end and span.start < m.end})
    nodes = [n for n in host.list(_NODES) if re.fullmatch(r"node\d+", n)]
    return [int(nodes[0][4:])] if len(nodes) == 1 else []


def read_memory(host: Host) -> list[NodeMemory]:
    """Return the memory of each node; empty without the table, or without leave to read it."""
    try:
        with open(host.path(_TABLE), "rb") as file:
            return parse(file.read())
    except OSError:
        return []


def parse(table: bytes) -> list[NodeMemory]:
    """Return the ranges of memory that are enabled, in the order of the table.

    Empty if the kernel does not use the table ("SRAT: SRAT not used."): all memory is in node 0.
    """
    wide = table[_REVISION_AT : _REVISION_AT + 1] >= bytes([_WIDE_DOMAINS])
    nodes = _Nodes()
    try:
        _count_processors(table, wide, nodes)
        return list(_memory(table, wide, nodes))
    except _Unusable:
        return []


class _Unusable(Exception):
    """The kernel does without the table."""


class _Nodes:
    """Numbers of nodes, given in the order of the calls (acpi_map_pxm_to_node)."""

    def __init__(self) -> None:
        self._domains: list[int] = []

    def number(self, domain: int) -> int | None:
        """Return the node of a proximity domain; None: there is no such domain."""
        if domain >= _MAX_DOMAINS:
            return None
        if domain not in self._domains:
            self._domains.append(domain)
        return self._domains.index(domain)


def _count_processors(table: bytes, wide: bool, nodes: _Nodes) -> None:
    """Number the domains of processors and generic initiators.

    The pass ends where its handler fails, and at an initiator that is disabled it does
    (acpi_parse_gi_affinity, acpi_parse_entries_array).
    """
    for entry in _entries(table):
        if entry.kind == _INITIATOR:
            if not entry.number(24) & _ENABLED or nodes.number(entry.number(4)) is None:
                return
        elif entry.kind == _APIC:  # acpi_numa_processor_affinity_init
            _need(entry.length == _APIC_BYTES)
            if entry.number(4) & _ENABLED:
                high = entry.number(9, 3) << 8 if wide else 0
                _need(nodes.number(entry.number(2, 1) | high) is not None)
        elif entry.kind == _X2APIC:  # acpi_numa_x2apic_affinity_init
            _need(entry.length >= _X2APIC_BYTES)
            if entry.number(12) & _ENABLED:
                _need(nodes.number(entry.number(4)) is not None)


def _memory(table: bytes, wide: bool, nodes: _Nodes) -> Iterator[NodeMemory]:
    """Yield the ranges of memory (acpi_parse_memory_affinity)."""
    for entry in _entries(table):
        if entry.kind != _MEMORY:
            continue
        _need(entry.length >= _MEMORY_BYTES)
        if not entry.number(28) & _ENABLED:
            continue
        node = nodes.number(entry.number(2) & (0xFFFF_FFFF if wide else 0xFF))
        _need(node is not None)
        start, end = entry.number(8, 8), entry.number(8, 8) + entry.number(16, 8)
        if node is not None and start < end <= 1 << 64:  # others are passed by: numa_add_memblk
            yield NodeMemory(PhysAddr(start), PhysAddr(end), node)


def _need(condition: bool) -> None:
    if not condition:
        raise _Unusable


def _entries(table: bytes) -> Iterator[_Entry]:
    """Yield each entry (acpi_parse_entries_array), the one of no length that ends the table too."""
    at = _HEADER_BYTES
    while at + 2 < len(table):
        kind, length = table[at], table[at + 1]
        yield _Entry(kind, length, table[at : at + _MEMORY_BYTES].ljust(_MEMORY_BYTES, b"\0"))
        if not length:
            return
        at += length
