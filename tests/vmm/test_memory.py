"""pkernfs.vmm.memory: the region's bytes, found where they are mapped."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from pkernfs.vmm.export import parse_export
from pkernfs.vmm.memory import Memory
from pkernfs.vmm.plan import plan
from support.vfio_machine import MIB, VfioMachine, export_of, mapping, two_domains


def test_memory_is_that_of_the_region(machine: VfioMachine) -> None:
    content = os.urandom(8 * MIB)
    machine.region.write_bytes(content)
    export = parse_export(two_domains(machine))
    memory = Memory(export)
    first, _second = plan(export)
    memory.map(first.pieces)
    for piece in first.pieces:
        found = ctypes.string_at(memory.address(piece), piece.length)
        assert found == content[piece.offset :][: piece.length]


def test_memory_of_a_segment(machine: VfioMachine, tmp_path: Path) -> None:
    """Beside the region's, at its own offsets."""
    content = os.urandom(5 * MIB)
    (tmp_path / "segment-1").write_bytes(content)
    segment = {"number": 1, "path": str(tmp_path / "segment-1")}
    there = mapping(0x1000, (0, 3 * MIB), segment=segment, offset=MIB)
    beside = mapping(16 * MIB, (0, 4096), segment=segment, offset=5 * MIB - 4096)
    flat = mapping(32 * MIB, (MIB, 4096))
    export = parse_export(export_of(machine, dom_0=[there, beside, flat]))
    machine.region.write_bytes(bytes([7]) * 8 * MIB)
    [domain] = plan(export)
    memory = Memory(export)
    memory.map(domain.pieces)
    first, second, third = domain.pieces
    assert ctypes.string_at(memory.address(first), first.length) == content[MIB : 4 * MIB]
    assert ctypes.string_at(memory.address(second), 4096) == content[-4096:]
    assert ctypes.string_at(memory.address(third), 4096) == bytes([7]) * 4096
