"""The tables that a unit walks, read where they are, whoever has made them.

The unit's root table address is read in its registers through /dev/mem (``iomem=relaxed``), and the
tables in the running kernel's own memory through /proc/kcore. Sections are those of the VT-d
specification, revision 5.10.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

_UNIT = 0xFED9_0000  # where QEMU has the registers
_PAGE = 4096
_PRESENT = 1
_SCALABLE = 1 << 10  # RTADDR.TTM (11.4.5)
# The header of an ELF file, as far as the program headers' place, and a program header.
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_LOAD = 1


class Entries(NamedTuple):
    """A device's entries as words of 8 bytes; without the second in legacy mode."""

    context: list[int]
    pasid: list[int] | None


def entries(bdf: str) -> Entries | None:
    """Find the entries for a device's requests without PASID; None if nothing is present."""
    bus, device, function = int(bdf[5:7], 16), int(bdf[8:10], 16), int(bdf[11], 16)
    source = device << 3 | function
    register = _root_register()
    root = _words(_table(register) + bus * 16, 2)
    if not register & _SCALABLE:  # 9.1, 9.3
        context = _words(_table(root[0]) + source * 16, 2) if root[0] & _PRESENT else [0]
        return Entries(context, None) if context[0] & _PRESENT else None
    half = root[source >> 7]  # 9.2, 9.4: a table for each half of the bus
    context = _words(_table(half) + (source & 127) * 32, 4) if half & _PRESENT else [0]
    if not context[0] & _PRESENT:
        return None
    directory = _words(_table(context[0]), 1)[0]  # 9.5, 9.6
    return Entries(context, _words(_table(directory), 8) if directory & _PRESENT else [0] * 8)


def _root_register() -> int:
    """RTADDR_REG (11.4.5)."""
    with open("/dev/mem", "r+b", buffering=0) as memory:
        page = mmap.mmap(memory.fileno(), _PAGE, offset=_UNIT)
        return int(memoryview(page)[0x20:0x28].cast("Q")[0])


def _table(word: int) -> int:
    """The address in an entry."""
    return word & (1 << 52) - _PAGE


def _words(address: int, count: int) -> list[int]:
    """Physical memory: the kernel's own, or the region's."""
    with Path("/proc/kcore").open("rb", buffering=0) as core:
        offset = _place(core.fileno(), address)
        if offset is not None:
            return list(struct.unpack(f"<{count}Q", os.pread(core.fileno(), 8 * count, offset)))
    with open("/dev/mem", "rb", buffering=0) as memory:
        return list(struct.unpack(f"<{count}Q", os.pread(memory.fileno(), 8 * count, address)))


def _place(core: int, address: int) -> int | None:
    """Find physical memory in /proc/kcore; only what is the kernel's RAM is there."""
    header = _HEADER.unpack(os.pread(core, _HEADER.size, 0))
    start, count = header[5], header[10]
    programs = _PROGRAM.iter_unpack(os.pread(core, count * _PROGRAM.size, start))
    for kind, _flags, offset, _virtual, physical, size, _memory, _align in programs:
        if kind == _LOAD and physical <= address < physical + size:
            return int(offset + address - physical)
    return None
