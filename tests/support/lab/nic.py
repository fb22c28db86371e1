"""A driver in userspace for Intel's 82574 (QEMU's e1000e): it only receives, without interrupts.

The ring and all its buffers are in one file of a region, so that what the card writes is there
whatever kernel runs, and whether one runs. Sections are those of Intel's data sheet "82574 GbE
Controller Family", revision 3.4.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kexeclab import feed
from pkernfs.quantities import Iova
from support.lab.pci import map_bar
from support.waiting import until

# Registers (10.2), and their bits.
_CTRL, _STATUS, _IMC = 0x0000, 0x0008, 0x00D8
_RCTL, _RDBAL, _RDBAH, _RDLEN, _RDH, _RDT = 0x0100, 0x2800, 0x2804, 0x2808, 0x2810, 0x2818
_CTRL_SLU, _CTRL_RST = 1 << 6, 1 << 26
_STATUS_LU = 1 << 1
_EN, _UPE, _MPE, _BAM, _SECRC = 1 << 1, 1 << 3, 1 << 4, 1 << 15, 1 << 26
_BUFFERS_OF_256 = 3 << 16  # RCTL.BSIZE
# The descriptor (7.1, "legacy"): buffer, length, checksum, status, errors, a VLAN's tag.
_DESCRIPTOR = struct.Struct("<QHHBBH")
_DONE, _END_OF_PACKET = 1 << 0, 1 << 1
BUFFER = 256
_SECONDS = 30.0


class Registers(Protocol):
    """The way by which loads and stores reach the card's first BAR."""

    def load(self, offset: int) -> int:
        """A register of 32 bits."""

    def store(self, offset: int, value: int) -> None:
        """Change one."""


class Mapped:
    """Registers in a mapping: of ``resource0`` in sysfs, or of VFIO's first region."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping

    def _word(self, offset: int) -> Any:
        return ctypes.c_uint32.from_buffer(self._mapping, offset)

    def load(self, offset: int) -> int:
        """A register of 32 bits."""
        return int(self._word(offset).value)

    def store(self, offset: int, value: int) -> None:
        """Change one."""
        self._word(offset).value = value


def registers_of(bdf: str) -> Mapped:
    """The registers of the card at ``bdf``, which no driver has."""
    return Mapped(map_bar(bdf, 128 << 10))


@dataclass(frozen=True)
class Packet:
    """A packet that has arrived; ``number`` is the feed's, -1 in a packet of somebody else's."""

    number: int
    length: int


@dataclass(frozen=True)
class Ring:
    """Descriptors, and behind them their buffers, in a file.

    :ivar start: of the descriptors in the file
    :ivar count: how many there are, a multiple of 8 (7.1.8)
    """

    file: Path
    start: int
    count: int

    @property
    def room(self) -> int:
        """The packets that it can hold: with one more, head and tail would be the same (7.1.8)."""
        return self.count - 1

    @property
    def buffers(self) -> int:
        """The offset of the buffers in the file."""
        return self.start + self.count * _DESCRIPTOR.size

    @property
    def end(self) -> int:
        """The file's size, if nothing is behind."""
        return self.buffers + self.count * BUFFER

    def clear(self, iova: Iova) -> None:
        """All descriptors anew, with nothing received; ``iova`` is that of the file's start."""
        first = iova + self.buffers
        fields = (_DESCRIPTOR.pack(first + BUFFER * n, 0, 0, 0, 0, 0) for n in range(self.count))
        with self.file.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"".join(fields), self.start)
            os.fsync(file.fileno())

    def received(self) -> int:
        """Count the descriptors that the card has written back, from the first one on."""
        return sum(1 for _length in self._lengths(self._read(self.start, self.buffers)))

    def packets(self) -> Iterator[Packet]:
        """Yield the packets that have arrived, in the ring's order. The device is not asked."""
        lengths = list(self._lengths(self._read(self.start, self.buffers)))
        content = self._read(self.buffers, self.buffers + len(lengths) * BUFFER)
        for place, length in enumerate(lengths):
            packet = content[place * BUFFER :][:length]
            yield Packet(feed.number_of(packet), length)

    def _lengths(self, descriptors: bytes) -> Iterator[int]:
        """The length of each packet, up to the first descriptor that is not done."""
        for _buffer, length, _sum, status, errors, _tag in _DESCRIPTOR.iter_unpack(descriptors):
            if not status & _DONE:
                return
            assert status & _END_OF_PACKET, "a packet in two buffers"
            assert errors == 0, f"the card saw errors: {errors:#x}"
            yield length

    def _read(self, start: int, end: int) -> bytes:
        """Bytes of the file. It is opened for that: see docs/coherence.md."""
        data = bytearray(end - start)
        with self.file.open("rb", buffering=0) as file:
            got = os.preadv(file.fileno(), [data], start)
        assert got == len(data), f"{self.file}: got {got} bytes, expected {len(data)}"
        return bytes(data)


class Nic:
    """The card; its bus mastering is its owner's."""

    def __init__(self, registers: Registers) -> None:
        self._registers = registers

    def reset(self) -> None:
        """Everything but the configuration space as after power-on, no interrupts (4.6)."""
        self._registers.store(_IMC, 0xFFFF_FFFF)
        self._registers.store(_CTRL, self._registers.load(_CTRL) | _CTRL_RST)
        until("the end of its reset", lambda: not self._registers.load(_CTRL) & _CTRL_RST, _SECONDS)
        self._registers.store(_IMC, 0xFFFF_FFFF)

    def receive(self, ring: Ring, iova: Iova) -> None:
        """Reset it, and receive all packets into ``ring``; ``iova`` is that of the file's start."""
        self.reset()
        ring.clear(iova)
        self._registers.store(_CTRL, self._registers.load(_CTRL) | _CTRL_SLU)
        until("a link", lambda: bool(self._registers.load(_STATUS) & _STATUS_LU), _SECONDS)
        where = iova + ring.start
        self._registers.store(_RDBAL, where & 0xFFFF_FFFF)
        self._registers.store(_RDBAH, where >> 32)
        self._registers.store(_RDLEN, ring.count * _DESCRIPTOR.size)
        self._registers.store(_RDH, 0)
        self._registers.store(_RDT, ring.room)
        self._registers.store(_RCTL, _EN | _UPE | _MPE | _BAM | _BUFFERS_OF_256 | _SECRC)
