"""Digests of a region's bytes, at the speed of memory: CRC-64 of chunks, checksums of pages.

CRC-64/NVME finds accidents (a change is missed once in 2^64 times); it proves nothing about who
made one. The loops are in digest.c and run without the interpreter lock. Page numbers for them are
in arrays, whose items cannot be of another type than int.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from pkernfs.errors import RegionError
from pkernfs.layout import PAGE
from pkernfs.native._native import ffi, lib
from pkernfs.quantities import RegionOff
from pkernfs.region.region import Region

#: Offset of a part that stands for zeros, which need not be read.
ZEROS = RegionOff((1 << 64) - 1)

_BATCH_BYTES = 32 << 20  # between two looks at what is to be done next
_BATCH_CHUNKS = 4096


class Part(NamedTuple):
    """A part of a chunk: region offset, or :data:`ZEROS`, and length in bytes."""

    offset: RegionOff
    length: int


class _Batch(NamedTuple):
    """A piece of work for one thread; ``size`` is what its chunks have in bytes."""

    number: int
    chunks: list[list[Part]]
    size: int


def crc64(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-64/NVME of ``data``; ``crc`` is a former result to go on from."""
    return int(lib.pk_crc64(crc, ffi.from_buffer("uint8_t[]", data), len(data)))


def page_sums(region: Region, pages: array[int]) -> array[int]:
    """CRC-32C of each metadata page (docs/format.md, section 2).

    The complement stands for a page whose header says another one.

    :raises RegionError: a page outside the region.
    """
    return _sums(region, pages, 0)


def slot_sums(region: Region, pages: array[int]) -> array[int]:
    """CRC-32C of each of the sixteen 256-byte slots of the pages.

    :raises RegionError: a page outside the region.
    """
    return _sums(region, pages, 1)


def _sums(region: Region, pages: array[int], slots: int) -> array[int]:
    if pages.typecode not in ("Q", "L") or pages.itemsize != 8:
        raise TypeError(f"page numbers: got items {pages.typecode!r}, expected 'Q'")
    if pages and max(pages) >= region.size // PAGE:
        raise RegionError(f"{region.name}: page {max(pages):#x}: out of the region")
    sums = array("I", bytes(4 * len(pages) * (16 if slots else 1)))
    lib.pk_page_sums(
        region.base,
        ffi.from_buffer("uint64_t[]", pages),
        len(pages),
        slots,
        ffi.from_buffer("uint32_t[]", sums),
    )
    return sums


def digests(region: Region, chunks: list[list[Part]]) -> array[int]:
    """CRC-64 of each chunk: of the bytes of its parts, one after the other.

    :raises RegionError: a part outside the region.
    """
    parts: array[int] = array("Q")
    ends: array[int] = array("Q")
    for chunk in chunks:
        for part in chunk:
            parts.extend(part)
        ends.append(len(parts) // 2)
    found = array("Q", bytes(8 * len(chunks)))
    done = lib.pk_digest(
        region.base,
        region.size,
        ffi.from_buffer("uint64_t[]", parts),
        ffi.from_buffer("uint64_t[]", ends),
        len(chunks),
        ffi.from_buffer("uint64_t[]", found),
    )
    if done != len(chunks):
        raise RegionError(f"{region.name}: a chunk reaches out of the region")
    return found


def cores() -> int:
    """Count the processors that threads of this process may use."""
    return len(os.sched_getaffinity(0))


def digest_all(
    region: Region,
    chunks: Iterable[list[Part]],
    *,
    threads: int | None = None,
    nice: int = 0,
    tell: Callable[[int], object] = lambda done: None,
) -> array[int]:
    """CRC-64 of each chunk, by so many threads (as many as there are cores).

    ``tell`` is called with the bytes of each batch that is done, by any of the threads; ``nice``
    is added to the threads' niceness.

    :raises RegionError: a part outside the region.
    """
    batches = _batches(chunks)
    lock = threading.Lock()
    results: dict[int, array[int]] = {}
    errors: list[BaseException] = []

    def work() -> None:
        try:
            if nice:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
            while not errors:
                with lock:
                    batch = next(batches, None)
                if batch is None:
                    return
                results[batch.number] = digests(region, batch.chunks)
                tell(batch.size)
        except BaseException as e:
            errors.append(e)

    workers = [threading.Thread(target=work) for _ in range(threads or cores())]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    found: array[int] = array("Q")
    for number in sorted(results):
        found.extend(results[number])
    return found


def _batches(chunks: Iterable[list[Part]]) -> Iterator[_Batch]:
    """Cut the chunks into pieces of work, in their order."""
    source = iter(chunks)
    number = 0
    while True:
        batch: list[list[Part]] = []
        size = 0
        for chunk in islice(source, _BATCH_CHUNKS):
            batch.append(chunk)
            size += sum(length for _, length in chunk)
            if size >= _BATCH_BYTES:
                break
        if not batch:
            return
        yield _Batch(number, batch, size)
        number += 1
