"""The ACPI SRAT: the NUMA node of each range of memory (ACPI 6.5, 5.2.16).

The table is the firmware's, and read as if it were anybody's: lengths are checked, and an entry of
an unknown type is passed by.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr

_TABLE = "sys/firmware/acpi/tables/SRAT"
_NODES = "sys/devices/system/node"
_HEADER_BYTES = 48
_APIC, _MEMORY, _X2APIC = 0, 1, 2
_LEAST_BYTES = {_APIC: 16, _MEMORY: 40, _X2APIC: 24}
_FLAGS_AT = {_APIC: 4, _MEMORY: 28, _X2APIC: 12}


class NodeMemory(NamedTuple):
    """A range of memory, and the kernel's number of its node; ``end`` is not part of it."""

    start: PhysAddr
    end: PhysAddr
    node: int


class _Entry(NamedTuple):
    kind: int
    data: bytes


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
    """Return the ranges of memory that are enabled, in the order of the table."""
    entries = list(_entries(table))
    # The kernel numbers nodes as it meets their domains: processors first, then memory.
    domains: list[int] = []
    for entry in sorted(entries, key=lambda e: e.kind == _MEMORY):
        domain = _enabled_domain(entry)
        if domain is not None and domain not in domains:
            domains.append(domain)
    found = []
    for entry in entries:
        domain = _enabled_domain(entry)
        if entry.kind == _MEMORY and domain is not None:
            start, size = struct.unpack_from("<QQ", entry.data, 8)
            found.append(NodeMemory(start, start + size, domains.index(domain)))
    return found


def _entries(table: bytes) -> Iterator[_Entry]:
    at = _HEADER_BYTES
    while at + 2 <= len(table):
        kind, length = table[at], table[at + 1]
        data = table[at : at + length]
        if length < 2 or len(data) < length:
            return
        if kind in _LEAST_BYTES and length >= _LEAST_BYTES[kind]:
            yield _Entry(kind, data)
        at += length


def _enabled_domain(entry: _Entry) -> int | None:
    """Return the proximity domain of an entry; None if the firmware has disabled it."""
    kind, data = entry
    if not data[_FLAGS_AT[kind]] & 1:
        return None
    if kind == _APIC:
        return data[2] | int.from_bytes(data[9:12], "little") << 8
    return int.from_bytes(data[2:6] if kind == _MEMORY else data[4:8], "little")
