"""pkernfs.vmm.memory: the region's bytes, found where they are mapped."""

from __future__ import annotations

import ctypes
import os

from pkernfs.vmm.export import parse_export
from pkernfs.vmm.memory import Memory
from pkernfs.vmm.plan import plan
from support.vfio_machine import MIB, VfioMachine, two_domains


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
