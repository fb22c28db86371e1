"""A region: memory that holds a file system, mapped, locked and bounds-checked.

This is the only module that touches cffi pointers; all stores into a region go through the C
functions of native.c. File regions and anonymous memory are here; what is in the region is not
this module's business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from typing import Any

from pkernfs._native import ffi, lib
from pkernfs.errors import LockedError, RegionError
from pkernfs.layout import BLOCK, PAGE

_TMPFS = 0x01021994
_HUGETLBFS = 0x958458F6
_RAMFS = 0x858458F6
_RAM_FILE_SYSTEMS = (_TMPFS, _HUGETLBFS, _RAMFS)

# OFD locks far beyond any data. The owner's byte is held as long as the region is open; the
# server's from the first request to the last, so that a contender can tell "in use" (refuse) from
# "about to be let go" (wait).
_LOCK_OWNER = 0x7FFF_FFFF_0000_0000
_LOCK_SERVER = _LOCK_OWNER + 1
_CLOSING_WAIT_SECONDS = 10.0
_LEAST_ROOM = 2 * BLOCK
_FLOCK = struct.Struct("hhqqi4x")


class Region:
    """Mapped memory of :attr:`size` bytes (a multiple of 4 KiB).

    Use :meth:`open`, :meth:`create` or :meth:`anonymous`. After :meth:`close` every view of the
    region is dead: using one is a fault.
    """

    def __init__(
        self,
        name: str,
        fd: int | None,
        size: int,
        *,
        writable: bool,
        phys_base: int | None = None,
        page_bytes: int = PAGE,
        fs_magic: int = _TMPFS,
    ) -> None:
        self.name = name
        self.size = size
        self.writable = writable
        self.page_bytes = page_bytes
        self._fd = fd
        self._phys_base = phys_base
        self._fs_magic = fs_magic
        error = ffi.new("int *")
        self._base = lib.pk_map(-1 if fd is None else fd, size, page_bytes, writable, error)
        if self._base == ffi.NULL:
            raise RegionError(f"{name}: cannot map: {os.strerror(error[0])}", error[0])
        self._view = memoryview(ffi.buffer(self._base, size))
        if not writable:
            self._view = self._view.toreadonly()

    # ------------------------------------------------------------------ opening and closing

    @classmethod
    def open(
        cls, spec: str, *, write: bool, phys_base: int | None = None, lock: bool = True
    ) -> Region:
        """Open a file region.

        ``phys_base`` (bytes) is the physical address that offset 0 is said to have. With ``lock``
        the region is locked, exclusively if ``write``; a lock ends with its process.

        :raises RegionError: missing, a directory, not permitted, too small to map.
        :raises LockedError: another process has it open.
        """
        fd = _open_file(spec, write)
        try:
            if lock:
                _lock(fd, spec, _LOCK_OWNER, exclusive=write)
            info = os.fstat(fd)
            magic = int(lib.pk_fs_magic(fd))
            page_bytes = info.st_blksize if magic == _HUGETLBFS else PAGE
            size = info.st_size - info.st_size % page_bytes
            if size < PAGE:
                raise RegionError(f"{spec}: region too small: got {info.st_size} bytes")
            return cls(
                spec,
                fd,
                size,
                writable=write,
                phys_base=phys_base,
                page_bytes=page_bytes,
                fs_magic=magic,
            )
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(cls, path: str, size: int) -> None:
        """Make a file region of ``size`` bytes, all zero and sparse.

        :raises RegionError: the file exists, or cannot be made or sized.
        """
        _check_room(path, size)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise RegionError(f"{path}: cannot create: {e.strerror}", e.errno or errno.EIO) from e
        try:
            os.ftruncate(fd, size)
        except (OSError, OverflowError) as e:
            os.unlink(path)
            number = getattr(e, "errno", None) or errno.EFBIG
            raise RegionError(f"{path}: cannot size: {os.strerror(number)}", number) from e
        finally:
            os.close(fd)

    @classmethod
    def anonymous(cls, size: int, *, phys_base: int | None = None) -> Region:
        """Private zeroed memory: for tests and tools; gone with the process."""
        return cls("anonymous", None, size, writable=True, phys_base=phys_base)

    def close(self) -> None:
        """Unmap, and let the lock go. A second call does nothing."""
        if self._base is not None:
            lib.pk_unmap(self._base, self.size)
            self._base = None
            self._view = memoryview(b"")
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what kind of memory

    @property
    def needs_sync(self) -> bool:
        """Whether the bytes are cached for a disk, so that fsync has something to do."""
        return self._fs_magic not in _RAM_FILE_SYSTEMS

    def sync(self) -> None:
        """Write the region back to its disk, if it has one.

        :raises RegionError: the write failed.
        """
        if self.needs_sync:
            error = lib.pk_msync(self._base, self.size)
            if error:
                raise RegionError(f"{self.name}: cannot sync: {os.strerror(error)}", error)

    def physical(self, offset: int) -> int | None:
        """Physical address of a region offset in bytes; None where there is none.

        ``phys_base`` decides if it was given; else hugetlbfs pages, which do not move, are looked
        up in /proc/self/pagemap (needs CAP_SYS_ADMIN).
        """
        if self._phys_base is not None:
            return self._phys_base + offset
        if self._fs_magic != _HUGETLBFS:
            return None
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            return self._look_up(pagemap.fileno(), offset)

    def _look_up(self, pagemap: int, offset: int) -> int | None:
        page = offset - offset % self.page_bytes
        self._view[page]  # a page that was never touched has no address yet
        virtual = int(ffi.cast("uintptr_t", self._base)) + page
        (entry,) = struct.unpack("<Q", os.pread(pagemap, 8, virtual // PAGE * 8))
        frame = entry & ((1 << 55) - 1)
        if not entry >> 63 or not frame:
            return None
        return int(frame * PAGE + offset - page)

    def physical_runs(self, offset: int, length: int) -> list[tuple[int, int, int | None]]:
        """``(offset, length, physical address)`` of a range, cut where the addresses jump."""
        if self._phys_base is not None or self._fs_magic != _HUGETLBFS:
            return [(offset, length, self.physical(offset))]
        runs: list[tuple[int, int, int | None]] = []
        end = offset + length
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            while offset < end:
                count = min(self.page_bytes - offset % self.page_bytes, end - offset)
                address = self._look_up(pagemap.fileno(), offset)
                last = runs[-1] if runs else None
                if last and address == (None if last[2] is None else last[2] + last[1]):
                    runs[-1] = (last[0], last[1] + count, last[2])
                else:
                    runs.append((offset, count, address))
                offset += count
        return runs

    def assume_physical(self, base: int) -> None:
        """Say which physical address offset 0 has, for a region that has none of its own."""
        if self.physical(0) is None:
            self._phys_base = base

    @property
    def phys_base(self) -> int | None:
        """Physical address of offset 0 if it was given."""
        return self._phys_base

    @property
    def untouched(self) -> bool:
        """Whether the file has no memory yet: all zero; even reading it would give it some."""
        return self._fd is not None and os.fstat(self._fd).st_blocks == 0

    def known_zero(self) -> list[tuple[int, int]]:
        """Runs of ``(first block, blocks)`` that are known to be zero without reading them."""
        blocks = self.size // BLOCK
        if self._fd is None:
            return []
        if self._fs_magic == _HUGETLBFS:  # does not tell holes
            return [(0, blocks)] if self.untouched else []
        runs = []
        end = 0
        for start, stop in self.data_ranges():
            first = -(-end // BLOCK)
            if start // BLOCK > first:
                runs.append((first, start // BLOCK - first))
            end = stop
        first = -(-end // BLOCK)
        if blocks > first:
            runs.append((first, blocks - first))
        return runs

    def data_ranges(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """``(start, end)`` in bytes of what is no hole of the file; all, if it cannot be told.

        Only what lies between the offsets ``first`` and ``last`` (the end of the region).
        """
        limit = self.size if last is None else last
        if self._fd is None or self._fs_magic == _HUGETLBFS:
            yield first, limit
            return
        end = first
        while end < limit:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:
                    return
                yield end, limit
                return
            if start >= limit:
                return
            end = min(os.lseek(self._fd, start, os.SEEK_HOLE), limit)
            yield start, end

    # ------------------------------------------------------------------ reading and storing

    def view(self, offset: int, length: int) -> memoryview:
        """The region's own bytes, writable if the region is.

        :raises RegionError: out of the region.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RegionError(
                f"{self.name} at {offset:#x}: out of the region: got {length} bytes", errno.EIO
            )
        return self._view[offset : offset + length]

    def read(self, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes at ``offset``."""
        return bytes(self.view(offset, length))

    def copy_in(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``offset``."""
        length = len(data)
        self._check_store(offset, length)
        lib.pk_copy(self._base, offset, ffi.from_buffer("uint8_t[]", data), length)

    def zero(self, offset: int, length: int) -> None:
        """Zero ``length`` bytes at ``offset``; other threads run meanwhile.

        Where the region's file has holes, they stay: a sparse file does not fill up with zeros.
        """
        self._check_store(offset, length)
        if length < BLOCK:
            lib.pk_zero(self._base, offset, length)
            return
        for start, end in self.data_ranges(offset, offset + length):
            lib.pk_zero(self._base, start, end - start)

    def store_u64(self, offset: int, value: int) -> None:
        """One aligned 8-byte store, after all stores before it and before all after it."""
        self._check_store(offset, 8)
        if offset % 8:
            raise RegionError(f"{self.name} at {offset:#x}: unaligned store", errno.EIO)
        lib.pk_store_u64(self._base, offset, value)

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether all of the bytes are zero."""
        self.view(offset, length)
        return bool(lib.pk_is_zero(self._base + offset, length))

    def page_checksum(self, page: int) -> int:
        """CRC-32C that a metadata page should carry (docs/format.md, section 2)."""
        self.view(page * PAGE, PAGE)
        return int(lib.pk_page_crc(self._base + page * PAGE))

    @property
    def base(self) -> Any:
        """The mapping as a cffi pointer, for the journal's commit alone."""
        return self._base

    def _check_store(self, offset: int, length: int) -> None:
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
        if self._fd is not None and self.writable:
            kind = fcntl.F_WRLCK if on else fcntl.F_UNLCK
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(kind, _LOCK_SERVER))


def exit_on_bus_error(who: str, status: int) -> None:
    """End the process with one line if memory of a region turns out not to be there.

    That is what the kernel does when a file region is shortened while it is mapped, or when the
    file system that it is on has no room for a hole that is written (or, on tmpfs, read).
    """
    line = (
        f"{who}: bus error: the region's file was cut short, or the file system it is on is full\n"
    )
    lib.pk_exit_on_bus_error(line.encode(), status)


def page_checksum(page: bytes | bytearray | memoryview) -> int:
    """CRC-32C of a metadata page's image, its own field as zero (docs/format.md, section 2)."""
    return int(lib.pk_page_crc(ffi.from_buffer("uint8_t[]", page)))


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """RFC 3720's CRC-32C; ``crc`` is a former result to go on from."""
    return int(lib.pk_crc32c(crc, ffi.from_buffer("uint8_t[]", data), len(data)))


def trace_start() -> None:
    """Record every store into any region from now on (tests; one at a time)."""
    lib.pk_trace_start()


def trace_stop() -> list[tuple[int, int, bytes | None]]:
    """The stores since :func:`trace_start`: ``(offset, length, data or None for zeros)``."""
    length = int(lib.pk_trace_stop())
    log = memoryview(ffi.buffer(lib.pk_trace_data(), length)) if length else memoryview(b"")
    stores: list[tuple[int, int, bytes | None]] = []
    at = 0
    while at < length:
        offset, count, kind = struct.unpack_from("<QQQ", log, at)
        at += 24
        if kind:
            stores.append((offset, count, None))
        else:
            stores.append((offset, count, bytes(log[at : at + count])))
            at += count + 7 & ~7
    return stores


def _check_room(path: str, size: int) -> None:
    """:raises RegionError: not even the metadata of a new region would fit the file system."""
    try:
        room = os.statvfs(os.path.dirname(path) or ".")
    except OSError:
        return  # open() says it better
    if room.f_blocks and room.f_bavail * room.f_frsize < min(size, _LEAST_ROOM):
        raise RegionError(f"{path}: cannot create: the file system is full", errno.ENOSPC)


def _open_file(spec: str, write: bool) -> int:
    try:
        fd = os.open(spec, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise RegionError(f"{spec}: cannot open: {e.strerror}", e.errno or errno.EIO) from e
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a known device"
        raise RegionError(f"{spec}: not a region: it is {kind}")
    return fd


def _flock(kind: int, start: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0)


def _is_held(fd: int, start: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start))
    assert isinstance(answer, bytes)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _lock(fd: int, spec: str, start: int, *, exclusive: bool) -> None:
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    deadline = time.monotonic() + _CLOSING_WAIT_SECONDS
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(kind, start))
            return
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                raise RegionError(f"{spec}: cannot lock: {e.strerror}", e.errno or 0) from e
        if _is_held(fd, _LOCK_SERVER) or time.monotonic() > deadline:
            raise LockedError(f"{spec}: in use: it is mounted or being checked")
        time.sleep(0.01)
