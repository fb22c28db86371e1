"""A region: memory that holds a file system, mapped and bounds-checked.

Python code reads a region by views and stores into it by C functions, which tests trace; C code of
other modules takes the mapping itself (:attr:`Region.base`). A spec names a region
(:mod:`pkernfs.region.spec`), a backing is its memory (:mod:`pkernfs.region.backing`), a lock keeps
others from it (:mod:`pkernfs.region.locks`). Nothing here knows what is stored in one.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import HOST, Host
from pkernfs.layout import BLOCK, PAGE
from pkernfs.native._native import ffi, lib
from pkernfs.quantities import BlockRun, PageNo, PhysAddr, RegionOff, RegionRange
from pkernfs.region import files
from pkernfs.region.backing import Backing, given_pieces
from pkernfs.region.dax import Device
from pkernfs.region.opening import open_backing

_START = RegionOff(0)
_SHORT_BYTES = 64 << 20
_PAGES_AT_ONCE = 4096  # huge ones that are looked for in one call


class Place(NamedTuple):
    """The file that another program maps to have a region, and the region's offset in it; bytes."""

    path: str
    offset: int


class PhysicalRun(NamedTuple):
    """A range of a region, consecutive in physical memory; ``physical`` is None where unknown."""

    offset: RegionOff
    length: int
    physical: PhysAddr | None


class Region:
    """Mapped memory of :attr:`size` bytes (a multiple of 4 KiB).

    Use :meth:`open`, :meth:`create` or :meth:`anonymous`. After :meth:`close` every view of the
    region is dead: using one is a fault.
    """

    def __init__(self, backing: Backing, *, writable: bool) -> None:
        self.name = backing.name
        self.size = backing.size
        self.writable = writable
        self.page_bytes = backing.page_bytes
        #: The open file or device, until :meth:`close`; None for anonymous memory.
        self.descriptor = backing.fd
        #: The bytes are cached for a disk, so that fsync has something to do.
        self.needs_sync = backing.needs_sync
        #: Views may be handed to the kernel; else only copies (EFAULT).
        self.has_pages = backing.has_pages
        self._backing = backing
        error = ffi.new("int *")
        self._base = lib.pk_map(
            -1 if backing.fd is None else backing.fd,
            backing.map_offset,
            self.size,
            self.page_bytes,
            writable,
            error,
        )
        if self._base == ffi.NULL:
            why = f"{os.strerror(error[0])}{backing.refused(error[0])}"
            raise RegionError(f"{self.name}: cannot map: {why}", error[0])
        self._view = memoryview(ffi.buffer(self._base, self.size))
        if not writable:
            self._view = self._view.toreadonly()

    # ------------------------------------------------------------------ opening and closing

    @classmethod
    def open(
        cls,
        spec: str,
        *,
        write: bool,
        phys_base: PhysAddr | None = None,
        lock: bool = True,
        host: Host = HOST,
    ) -> Region:
        """Open the region that ``spec`` names.

        ``phys_base`` (bytes) is the physical address that offset 0 of a file is said to have. With
        ``lock`` the region is locked, exclusively if ``write``; a lock ends with its process.

        :raises RegionError: missing, not permitted, not free for a region, too small to map.
        :raises LockedError: another process has it open.
        """
        backing = open_backing(spec, write=write, phys_base=phys_base, lock=lock, host=host)
        try:
            region = cls(backing, writable=write)
        except BaseException:
            backing.close()
            raise
        try:
            backing.verify_mapping(lambda: region.read(_START, 4 * PAGE))
        except BaseException:
            region.close()
            raise
        return region

    @classmethod
    def create(cls, path: str, size: int) -> None:
        """Make a file region of ``size`` bytes, all zero and sparse.

        :raises RegionError: the file exists, or cannot be made or sized.
        """
        files.create(path, size)

    @classmethod
    def anonymous(cls, size: int, *, phys_base: PhysAddr | None = None) -> Region:
        """Private zeroed memory: for tests and tools; gone with the process."""
        pieces = given_pieces("anonymous", size, phys_base)
        return cls(Backing("anonymous", size, pieces), writable=True)

    def close(self) -> None:
        """Unmap, and let the lock go. A second call does nothing."""
        if self._base is not None:
            # Of segments, which come and go, nobody keeps a view; so their addresses come back.
            end = lib.pk_release if self._backing.may_vanish else lib.pk_unmap
            end(self._base, self.size)
            self._base = None
            self._view = memoryview(b"")
            self._backing.close()

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what kind of memory

    def sync(self) -> None:
        """Write the region back to its disk, if it has one.

        :raises RegionError: the write failed.
        """
        if self.needs_sync:
            error = lib.pk_msync(self._base, self.size)
            if error:
                raise RegionError(f"{self.name}: cannot sync: {os.strerror(error)}", error)

    @property
    def real_addresses(self) -> bool:
        """Addresses are those of this machine, as its devices use them, and not assumed ones."""
        return self._backing.real_addresses

    @property
    def asks_for_addresses(self) -> bool:
        """The kernel is asked for the address of each huge page, which takes time."""
        return self._backing.pieces is None and self._backing.in_pagemap

    @property
    def dax(self) -> Device | None:
        """The dax device that the region is, if it is one."""
        return self._backing.dax

    @property
    def place(self) -> Place | None:
        """The place of the same memory for other programs; None for anonymous memory."""
        if self._backing.fd is None:
            return None
        path = os.readlink(f"/proc/self/fd/{self._backing.fd}")
        return Place(path, self._backing.map_offset)

    @property
    def node(self) -> int | None:
        """The NUMA node that all of the region is in, if that is known."""
        return self._backing.node

    def physical(self, offset: RegionOff) -> PhysAddr | None:
        """Return the physical address of a region offset in bytes; None where there is none.

        That of hugetlbfs pages, which do not move, is looked up in /proc/self/pagemap (needs
        CAP_SYS_ADMIN).
        """
        base = self.phys_base
        if base is not None and offset < self.size:
            return PhysAddr(base + offset)
        return self.physical_runs(offset, 1)[0].physical

    def physical_runs(self, offset: RegionOff, length: int) -> list[PhysicalRun]:
        """Return the physical addresses of a range in bytes, cut where they jump."""
        if self._backing.pieces is not None:
            return list(self._runs_of_pieces(offset, length))
        if not self._backing.in_pagemap:
            return [PhysicalRun(offset, length, None)]
        runs: list[PhysicalRun] = []
        at, end = offset, offset + length
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            while at < end:
                count = min(self.page_bytes - at % self.page_bytes, end - at)
                address = self._look_up(pagemap.fileno(), at)
                last = runs[-1] if runs else None
                if last and address == (
                    None if last.physical is None else last.physical + last.length
                ):
                    runs[-1] = last._replace(length=last.length + count)
                else:
                    runs.append(PhysicalRun(at, count, address))
                at = RegionOff(at + count)
        return runs

    def existing_runs(self, offset: RegionOff, length: int) -> Iterator[PhysicalRun]:
        """As :meth:`physical_runs`, but memory that a file does not have yet gets none by this.

        That has no address. Nor has any of a file on hugetlbfs if the kernel cannot tell (no
        userfaultfd), or tells nobody but root. Any thread may call it.
        """
        backing = self._backing
        if backing.pieces is not None or not backing.in_pagemap:
            yield from self.physical_runs(offset, length)
            return
        end = offset + length
        at = RegionOff(offset - offset % self.page_bytes)
        last: PhysicalRun | None = None
        while at < end:
            stop = min(
                at + _PAGES_AT_ONCE * self.page_bytes, -(-end // self.page_bytes) * self.page_bytes
            )
            for run in self._existing(at, RegionOff(stop)):
                if last is None:
                    last = run
                elif run.physical == (
                    None if last.physical is None else last.physical + last.length
                ):
                    last = last._replace(length=last.length + run.length)
                else:
                    yield _cut(last, offset, end)
                    last = run
            at = RegionOff(stop)
        if last is not None:
            yield _cut(last, offset, end)

    def _existing(self, start: RegionOff, end: RegionOff) -> Iterator[PhysicalRun]:
        """The runs of whole huge pages, up to :data:`_PAGES_AT_ONCE` of them."""
        runs = ffi.new("struct pk_existing[]", _PAGES_AT_ONCE)
        count = lib.pk_existing_runs(
            self._backing.fd, start, end, self.page_bytes, runs, _PAGES_AT_ONCE
        )
        if count < 0:
            yield PhysicalRun(start, end - start, None)
        for run in runs[0 : max(count, 0)]:
            address = None if run.physical == lib.NO_ADDRESS else PhysAddr(run.physical)
            yield PhysicalRun(RegionOff(run.offset), run.length, address)

    def assume_physical(self, base: PhysAddr) -> None:
        """Say which physical address offset 0 has, for a region that has none of its own."""
        if self.physical(_START) is None:
            self._backing.pieces = [Span(base, self.size)]

    def _runs_of_pieces(self, offset: RegionOff, length: int) -> Iterator[PhysicalRun]:
        first = _START
        end = offset + length
        for piece in self._backing.pieces or ():
            low, high = max(offset, first), min(end, first + piece.size)
            if low < high:
                yield PhysicalRun(low, high - low, PhysAddr(piece.start + low - first))
            first = RegionOff(first + piece.size)
        if end > first:  # nothing is known of what is behind them
            start = max(offset, first)
            yield PhysicalRun(start, end - start, None)

    def _look_up(self, pagemap: int, offset: RegionOff) -> PhysAddr | None:
        page = offset - offset % self.page_bytes
        self._view[page]  # a page that was never touched has no address yet
        virtual = int(ffi.cast("uintptr_t", self._base)) + page
        (entry,) = struct.unpack("<Q", os.pread(pagemap, 8, virtual // PAGE * 8))
        frame = entry & ((1 << 55) - 1)
        if not entry >> 63 or not frame:
            return None
        return PhysAddr(frame * PAGE + offset - page)

    @property
    def phys_base(self) -> PhysAddr | None:
        """Physical address of offset 0, if all of the region is in one piece from there on."""
        pieces = self._backing.pieces
        return pieces[0].start if pieces is not None and len(pieces) == 1 else None

    @property
    def untouched(self) -> bool:
        """The file has no memory yet: it is all zero, and even reading it would give it some."""
        return self._backing.untouched

    def known_zero(self) -> list[BlockRun]:
        """Return the blocks that are known to be zero without reading them."""
        return self._backing.known_zero()

    def data_ranges(
        self, first: RegionOff = _START, last: RegionOff | None = None
    ) -> Iterator[RegionRange]:
        """Yield what is no hole of the file; all, if it cannot be told.

        Only what lies between the offsets ``first`` and ``last`` (the end of the region). Of a
        short range all of whose pages are there, the kernel is not asked where its data ends.
        """
        end = RegionOff(self.size) if last is None else min(last, RegionOff(self.size))
        is_short = 0 < end - first <= _SHORT_BYTES
        if is_short and self._backing.looks_far and _is_all_there(self, first, end):
            return iter([RegionRange(first, end)])
        return self._backing.data_ranges(first, end)

    def has_data(self, first: RegionOff, last: RegionOff) -> bool:
        """Tell if there is anything but a hole of the file; True, if it cannot be told."""
        return self._backing.has_data(first, last)

    # ------------------------------------------------------------------ reading and storing

    def view(self, offset: RegionOff, length: int) -> memoryview:
        """Return the region's own bytes, writable if the region is.

        :raises RegionError: out of the region.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RegionError(
                f"{self.name} at {offset:#x}: out of the region: got {length} bytes", errno.EIO
            )
        return self._view[offset : offset + length]

    def read(self, offset: RegionOff, length: int) -> bytes:
        """Return a copy of ``length`` bytes at ``offset``."""
        return bytes(self.view(offset, length))

    def copy_in(self, offset: RegionOff, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``offset``.

        :raises NoSpaceError: the file system below a sparse region is full; part may be stored.
        :raises RegionError: the file of a segment was cut.
        """
        length = len(data)
        self._check_store(offset, length)
        source = ffi.from_buffer("uint8_t[]", data)
        if lib.pk_copy(self._base, offset, source, length):
            self._make_room(offset, length)
            if lib.pk_copy(self._base, offset, source, length):
                _is_gone(self._backing)

    def copy_out(self, offset: RegionOff, into: bytearray | memoryview) -> None:
        """Fill ``into`` from ``offset`` on.

        :raises NoSpaceError: as for a store: on tmpfs a hole of the file needs memory to be read.
        :raises RegionError: the file of a segment was cut.
        """
        self.view(offset, len(into))
        to = ffi.from_buffer("uint8_t[]", into, require_writable=True)
        if lib.pk_copy_out(self._base, offset, to, len(into)):
            self._make_room(offset, len(into))
            if lib.pk_copy_out(self._base, offset, to, len(into)):
                _is_gone(self._backing)

    def zero(self, offset: RegionOff, length: int) -> None:
        """Zero ``length`` bytes at ``offset``; other threads run meanwhile.

        Where the region's file has holes, they stay: a sparse file does not fill up with zeros.
        """
        self._check_store(offset, length)
        # Where there is no memory, and none to be had, there is nothing to be zeroed.
        if length < BLOCK and not lib.pk_zero(self._base, offset, length):
            return
        for start, end in self.data_ranges(offset, RegionOff(offset + length)):
            if lib.pk_zero(self._base, start, end - start):
                _is_gone(self._backing)

    def reserve(self, offset: RegionOff, length: int) -> None:
        """Give memory to holes of a region's file, for what must be stored without fail later.

        :raises NoSpaceError: the file system that the region is on is full.
        """
        self._check_store(offset, length)
        self._backing.reserve(offset, length)

    def check_there(self, end: RegionOff) -> None:
        """:raises RegionError: the file of a segment was cut before offset ``end``."""
        if _is_cut(self._backing, end):
            _is_gone(self._backing)

    def _make_room(self, offset: RegionOff, length: int) -> None:
        """After a bus error: give the range memory, or say why there is none.

        :raises NoSpaceError: the file system that the region is on is full.
        """
        first = offset - offset % PAGE
        self._backing.reserve(RegionOff(first), -(-(offset + length) // PAGE) * PAGE - first)

    def store_u64(self, offset: RegionOff, value: int) -> None:
        """Store 8 aligned bytes at once, after all stores before it and before all after it."""
        self._check_store(offset, 8)
        if offset % 8:
            raise RegionError(f"{self.name} at {offset:#x}: unaligned store", errno.EIO)
        lib.pk_store_u64(self._base, offset, value)

    def flush_lines(self, offset: RegionOff, length: int) -> None:
        """Write the processor's cache lines back, for hardware that reads past the caches."""
        self.view(offset, length)
        lib.pk_flush_lines(self._base + offset, length)

    def is_zero(self, offset: RegionOff, length: int) -> bool:
        """Tell whether all of the bytes are zero."""
        self.view(offset, length)
        return bool(lib.pk_is_zero(self._base + offset, length))

    def page_checksum(self, page: PageNo) -> int:
        """Return the CRC-32C that a metadata page should carry (docs/format.md, section 2)."""
        self.view(RegionOff(page * PAGE), PAGE)
        return int(lib.pk_page_crc(self._base + page * PAGE))

    @property
    def base(self) -> Any:
        """The mapping as a cffi pointer, for modules that hand it to C functions of their own."""
        return self._base

    def _check_store(self, offset: RegionOff, length: int) -> None:
        if not self.writable:
            raise RegionError(f"{self.name}: store into a read-only region", errno.EROFS)
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RegionError(
                f"{self.name} at {offset:#x}: store out of the region: got {length} bytes",
                errno.EIO,
            )

    # ------------------------------------------------------------------ locks

    def serving(self, on: bool) -> None:
        """Tell contenders whether requests are being served, or the region is about to be free."""
        if self._base is not None:
            self._backing.serving(on)


def end_by_bus_error(region: Region) -> None:
    """A loop in C met memory that is not there: the end of this process, if nobody may cut it.

    :raises RegionError: somebody may: it is a segment's.
    """
    _is_gone(region._backing)


def _is_all_there(region: Region, first: RegionOff, end: RegionOff) -> bool:
    """Tell if each page is in memory, and none is what is left of a huge page behind a cut."""
    in_memory = lib.pk_is_resident(region.base, first, end - first)
    return bool(in_memory) and not _is_cut(region._backing, end)


def _is_cut(backing: Backing, end: RegionOff) -> bool:
    return backing.may_vanish and backing.fd is not None and os.fstat(backing.fd).st_size < end


def _is_gone(backing: Backing) -> None:
    """After a bus error that no memory mends: the end, or the caller's if others may cut the file.

    :raises RegionError: they have.
    """
    if backing.may_vanish:
        raise RegionError(f"{backing.name}: {backing.gone}", errno.EIO)
    lib.pk_bus_error()


def _cut(run: PhysicalRun, start: int, end: int) -> PhysicalRun:
    """What of a run lies between two region offsets in bytes."""
    low, high = max(run.offset, start), min(run.offset + run.length, end)
    address = None if run.physical is None else PhysAddr(run.physical + low - run.offset)
    return PhysicalRun(RegionOff(low), high - low, address)
