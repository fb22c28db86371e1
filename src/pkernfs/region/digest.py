"""Digests of a region's bytes, at the speed of memory: CRC-64 of chunks, checksums of pages.

CRC-64/NVME finds accidents (a change is missed once in 2^64 times); it proves nothing about who
made one. The loops are in digest.c and run without the interpreter lock. Page numbers for them are
in arrays, whose items cannot be of another type than int.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from itertools import islice
from typing import NamedTuple

from pkernfs.errors import PkernfsError, RegionError
from pkernfs.layout import PAGE
from pkernfs.native._native import ffi, lib
from pkernfs.quantities import RegionOff
from pkernfs.region.region import Region, end_by_bus_error

#: Offset of a part that stands for zeros, which need not be read.
ZEROS = RegionOff((1 << 64) - 1)

_BATCH_BYTES = 32 << 20  # between two looks at what is to be done next
_BATCH_CHUNKS = 4096


class Part(NamedTuple):
    """A part of a chunk: region offset, or :data:`ZEROS`, and length in bytes."""

    offset: RegionOff
    length: int


class Source(NamedTuple):
    """Memory that is opened when its turn comes, and closed after; and the chunks of it.

    Each is called by one of several threads, ``open`` first.
    """

    open: Callable[[], AbstractContextManager[Region]]
    chunks: Callable[[Region], Iterable[list[Part]]]


class _Opened:
    """A source while it is open: what was found in it, and who uses it."""

    def __init__(self) -> None:
        self.region: Region | None = None
        self.found: dict[int, array[int]] = {}
        self.error: PkernfsError | None = None
        self.users = 1  # who cuts it into batches
        self.stack = ExitStack()

    def result(self) -> array[int] | PkernfsError:
        """The digests in the order of the chunks, or why there are none."""
        if self.error is not None:
            return self.error
        all_: array[int] = array("Q")
        for number in sorted(self.found):
            all_.extend(self.found[number])
        return all_


class _Batch(NamedTuple):
    """A piece of work for one thread; ``size`` is what its chunks have in bytes."""

    source: _Opened
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

    :raises RegionError: a part outside the region; or the file of a segment was cut.
    """
    parts: array[int] = array("Q")
    ends: array[int] = array("Q")
    for chunk in chunks:
        for part in chunk:
            parts.extend(part)
        ends.append(len(parts) // 2)
    found = array("Q", bytes(8 * len(chunks)))
    gone = ffi.new("int *")
    done = lib.pk_digest(
        region.base,
        region.size,
        ffi.from_buffer("uint64_t[]", parts),
        ffi.from_buffer("uint64_t[]", ends),
        len(chunks),
        ffi.from_buffer("uint64_t[]", found),
        gone,
    )
    if gone[0]:
        end_by_bus_error(region)
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

    :raises RegionError: as :func:`digests`.
    """
    source = Source(lambda: nullcontext(region), lambda _: chunks)
    (found,) = digest_sources([source], threads=threads, nice=nice, tell=tell)
    if isinstance(found, PkernfsError):
        raise found
    return found


def digest_sources(
    sources: Iterable[Source],
    *,
    threads: int | None = None,
    nice: int = 0,
    tell: Callable[[int], object] = lambda done: None,
) -> list[array[int] | PkernfsError]:
    """As :func:`digest_all`, of several memories; for each its digests, or why there are none.

    Few are open at once: no more than two for each thread, and one.
    """
    work = _Work(sources)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if nice:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
            while not errors and (batch := work.next()) is not None:
                work.do(batch)
                tell(batch.size)
        except BaseException as e:
            errors.append(e)

    workers = [threading.Thread(target=run) for _ in range(threads or cores())]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    work.close()
    if errors:
        raise errors[0]
    return [source.result() for source in work.sources]


class _Work:
    """What the threads of one call have to do, and what they have found."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources: list[_Opened] = []
        self._lock = threading.Lock()
        self._unused: list[_Opened] = []  # to be closed by whoever has let go of the lock
        self._batches = self._all_batches(sources)

    def next(self) -> _Batch | None:
        """The next piece of work; None: there is no more."""
        with self._lock:
            batch = next(self._batches, None)
        self._close_unused()
        return batch

    def do(self, batch: _Batch) -> None:
        """Take the digests of a piece of work."""
        source = batch.source
        try:
            assert source.region is not None
            if source.error is None:
                source.found[batch.number] = digests(source.region, batch.chunks)
        except PkernfsError as e:
            source.error = e
        finally:
            with self._lock:
                self._let_go(source)
            self._close_unused()

    def close(self) -> None:
        """Close what is open still: a thread has failed."""
        self._batches.close()
        for source in self.sources:
            source.stack.close()

    def _let_go(self, source: _Opened) -> None:
        source.users -= 1
        if not source.users:
            self._unused.append(source)

    def _close_unused(self) -> None:
        with suppress(IndexError):  # another thread may take the last one
            while True:
                self._unused.pop().stack.close()

    def _all_batches(self, sources: Iterable[Source]) -> Generator[_Batch, None, None]:
        for source in sources:
            opened = _Opened()
            self.sources.append(opened)
            try:
                region = opened.region = opened.stack.enter_context(source.open())
                for batch in _batches(opened, source.chunks(region)):
                    opened.users += 1
                    yield batch
            except PkernfsError as e:
                opened.error = e
            finally:
                self._let_go(opened)


def _batches(source: _Opened, chunks: Iterable[list[Part]]) -> Iterator[_Batch]:
    """Cut the chunks into pieces of work, in their order."""
    left = iter(chunks)
    number = 0
    while source.error is None:
        batch: list[list[Part]] = []
        size = 0
        for chunk in islice(left, _BATCH_CHUNKS):
            batch.append(chunk)
            size += sum(length for _, length in chunk)
            if size >= _BATCH_BYTES:
                break
        if not batch:
            return
        yield _Batch(source, number, batch, size)
        number += 1
