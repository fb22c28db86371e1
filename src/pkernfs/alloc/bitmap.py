"""Runs of bits in a buffer; knows nothing of file systems. Bit b is bit b % 8 of byte b / 8."""

from __future__ import annotations

from typing import NamedTuple

# One byte per bit, for expand(): entry i is the eight bits of i, lowest first.
_EXPANDED = [bytes(value >> bit & 1 for bit in range(8)) for value in range(256)]


class Run(NamedTuple):
    """Bits in a row."""

    first: int
    length: int


def set_run(buffer: memoryview | bytearray, first: int, count: int, value: bool) -> None:
    """Set (or clear) ``count`` bits from ``first`` on."""
    last = first + count
    while first < last and first % 8:
        _set_bit(buffer, first, value)
        first += 1
    whole = (last - first) // 8
    if whole:
        at = first // 8
        buffer[at : at + whole] = (b"\xff" if value else b"\0") * whole
        first += 8 * whole
    while first < last:
        _set_bit(buffer, first, value)
        first += 1


def _set_bit(buffer: memoryview | bytearray, bit: int, value: bool) -> None:
    if value:
        buffer[bit >> 3] |= 1 << (bit & 7)
    else:
        buffer[bit >> 3] &= ~(1 << (bit & 7)) & 0xFF


def expand(buffer: memoryview | bytes, count: int) -> bytearray:
    """Expand the first ``count`` bits to one byte (0 or 1) each."""
    data = bytes(buffer[: -(-count // 8)])
    for byte, bit in ((0, 0), (255, 1)):  # most of a large region is alike
        if data.count(byte) == len(data):
            return bytearray([bit]) * count
    out = bytearray().join([_EXPANDED[b] for b in data])
    del out[count:]
    return out


def find_run(free: int, count: int) -> int:
    """Find the lowest start of ``count`` set bits in a row in an integer bitmap; -1: none."""
    have = 1
    starts = free
    while have < count and starts:
        step = min(have, count - have)
        starts &= starts >> step
        have += step
    return (starts & -starts).bit_length() - 1


def runs(mask: int) -> list[Run]:
    """List the runs of set bits of an integer bitmap, ascending."""
    found = []
    at = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        at += skip
        count = (~mask & (mask + 1)).bit_length() - 1
        found.append(Run(at, count))
        mask >>= count
        at += count
    return found
