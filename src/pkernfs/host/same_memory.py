"""Whether what a process maps is the memory of a certain file: by physical pages, for root alone.

/proc/PID/maps names a file by the number that its file system gave it. That of a mount that is gone
says nothing of whose memory the kernel passed the mapping through to; the pages do.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

_ENTRY = struct.Struct("=Q")
_PRESENT, _FILE_PAGE = 1 << 63, 1 << 61
_FRAME = (1 << 55) - 1
_HOLE = -1
_STEP_ENTRIES = 4096
_MOST_ENTRIES = 1 << 18  # of one mapping: the first GiB
_TRIES = 3


class Area(NamedTuple):
    """A mapping: its addresses, and the offset in its file, in bytes."""

    start: int
    end: int
    offset: int


def may_map(pid: int, areas: Iterable[Area], fd: int) -> bool:
    """Tell if a process may map the file ``fd``; False only if its pages are those of another one.

    :param areas: what it maps: all of one file
    :param fd: open for reading and writing
    """
    try:
        for area in areas:
            answer = _is_same(pid, area, fd)
            if answer is not None:
                return answer
    except (OSError, ValueError):  # it has ended, or lets nobody look; or the file has been cut
        pass
    return True


def _is_same(pid: int, area: Area, fd: int) -> bool | None:
    """Compare the first page that is there; None: there is none, or it moves about."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as theirs:
        for _ in range(_TRIES):
            found = _first_page(theirs.fileno(), area)
            if found is None:
                return None
            address, frame = found
            offset = area.offset + address - area.start
            own = _own_frame(fd, offset) if _has_data(fd, offset) else _HOLE
            if own and frame == _frame(theirs.fileno(), address):  # it was there all the while
                return own == frame
    return None


def _first_page(pagemap: int, area: Area) -> tuple[int, int] | None:
    """Return address and frame of the first page of the file that a mapping has; None: none."""
    start = area.start // mmap.PAGESIZE
    end = min(area.end // mmap.PAGESIZE, start + _MOST_ENTRIES)
    for at in range(start, end, _STEP_ENTRIES):
        count = min(_STEP_ENTRIES, end - at)
        entries = os.pread(pagemap, count * _ENTRY.size, at * _ENTRY.size)
        for number, (entry,) in enumerate(_ENTRY.iter_unpack(entries)):
            if frame := _frame_of(entry):
                return (at + number) * mmap.PAGESIZE, frame
    return None


def _frame(pagemap: int, address: int) -> int:
    entry = os.pread(pagemap, _ENTRY.size, address // mmap.PAGESIZE * _ENTRY.size)
    return _frame_of(_ENTRY.unpack(entry)[0])


def _frame_of(entry: int) -> int:
    """The frame of a page that is a file's own; 0: there is none, or only root may know it."""
    is_files = entry & _PRESENT and entry & _FILE_PAGE
    return entry & _FRAME if is_files else 0


def _has_data(fd: int, offset: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) < offset + mmap.PAGESIZE
    except OSError as e:
        if e.errno == errno.ENXIO:  # behind the last data
            return False
        raise


def _own_frame(fd: int, offset: int) -> int:
    """The frame of a page of a file; 0: only root may know it.

    On hugetlbfs a whole huge page is mapped: the kernel maps no less, and unmaps no part of one.
    """
    found = os.fstat(fd)
    unit = -(-found.st_blksize // mmap.PAGESIZE) * mmap.PAGESIZE
    start = offset // unit * unit
    length = max(min(unit, found.st_size - start), mmap.PAGESIZE)
    with mmap.mmap(fd, length, offset=start) as mapped:
        mapped[offset - start]  # has the kernel map it
        byte = ctypes.c_char.from_buffer(mapped, offset - start)
        address = ctypes.addressof(byte)
        del byte
        with open("/proc/self/pagemap", "rb", buffering=0) as own:
            return _frame(own.fileno(), address)
