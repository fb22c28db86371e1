"""A trace of all stores into regions, in order: tests make every crash image from it."""

from __future__ import annotations

import struct
from typing import NamedTuple

from pkernfs.native._native import ffi, lib
from pkernfs.quantities import RegionOff

_RECORD = struct.Struct("<QQQ")  # offset, length, 1 for zeros


class Store(NamedTuple):
    """A store of ``length`` bytes at a region offset; ``data`` is None for zeros."""

    offset: RegionOff
    length: int
    data: bytes | None

    @property
    def bytes(self) -> bytes:
        """The bytes that are stored."""
        return bytes(self.length) if self.data is None else self.data


def trace_start() -> None:
    """Record every store into any region from now on (tests; one at a time)."""
    lib.pk_trace_start()


def trace_stop() -> list[Store]:
    """End the trace, and return the stores since :func:`trace_start`."""
    length = int(lib.pk_trace_stop())
    log = memoryview(ffi.buffer(lib.pk_trace_data(), length)) if length else memoryview(b"")
    stores: list[Store] = []
    at = 0
    while at < length:
        offset, count, is_zeros = _RECORD.unpack_from(log, at)
        at += _RECORD.size
        if is_zeros:
            stores.append(Store(offset, count, None))
        else:
            stores.append(Store(offset, count, bytes(log[at : at + count])))
            at += count + 7 & ~7
    return stores
