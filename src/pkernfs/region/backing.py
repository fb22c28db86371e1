"""The backing of a region: the open descriptor behind it, and what is known of its memory.

:class:`Backing` itself is memory without a descriptor. The kinds with one are in
:mod:`~pkernfs.region.files`, :mod:`~pkernfs.region.devmem` and :mod:`~pkernfs.region.dax_backing`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Span
from pkernfs.layout import PAGE
from pkernfs.quantities import BlockRun, PhysAddr, RegionOff, RegionRange
from pkernfs.region.dax import Device
from pkernfs.region.locks import RegionLock
from pkernfs.region.spec import did_you_mean


class Backing:
    """An open descriptor that can be mapped, and what is known of the memory behind it.

    This class is memory without a descriptor: anonymous, private, zero. ``pieces`` are its physical
    ranges in the order of the region's offsets, if they are known without the mapping.
    """

    fd: int | None = None
    #: Where in the descriptor the region begins, in bytes.
    map_offset = 0
    page_bytes = PAGE
    #: Whether /proc/self/pagemap tells the addresses of its pages for good: they do not move.
    in_pagemap = False
    #: Whether addresses are those of the machine, and not what somebody says for tests and images.
    real_addresses = False
    #: Whether the kernel can take the bytes from where they are (O_DIRECT, an answer to FUSE).
    has_pages = True
    #: Whether the bytes are cached for a disk, so that a sync has something to do.
    needs_sync = False
    #: Whether somebody else may cut the file: what is not there is an error then, and no fault.
    may_vanish = False
    #: What has happened to it then.
    gone = "cut behind pkernfs's back"
    #: Whether the kernel looks at each page up to the end of data to tell a hole, however far.
    looks_far = False
    #: The dax device that it is.
    dax: Device | None = None
    #: NUMA node, if all of it is in one that is known.
    node: int | None = None

    def __init__(self, name: str, size: int, pieces: list[Span] | None = None) -> None:
        self.name = name
        self.size = size
        self.pieces = pieces
        self._lock: RegionLock | None = None
        self._fds: list[int] = []

    def close(self) -> None:
        """Close what is open; locks end with it."""
        while self._fds:
            os.close(self._fds.pop())
        self.fd = None

    def serving(self, on: bool) -> None:
        """Tell contenders for the lock whether requests are being served."""
        if self._lock is not None and self.fd is not None:
            self._lock.serving(on)

    def verify_mapping(self, read: Callable[[], object]) -> None:
        """Refuse a mapping of a kind that a file system cannot be in.

        ``read()`` reads 16 KiB of it, no more.

        :raises RegionError: why.
        """

    def refused(self, number: int) -> str:
        """Return the words to add to the message if mmap() fails with this errno."""
        return ""

    # ------------------------------------------------------------------ what the memory holds

    @property
    def untouched(self) -> bool:
        """The memory is known to be all zero, for there is none yet."""
        return False

    def known_zero(self) -> list[BlockRun]:
        """Return the blocks that are zero, as far as that is known without reading them."""
        return []

    def data_ranges(self, first: RegionOff, last: RegionOff) -> Iterator[RegionRange]:
        """Yield what is no hole between two offsets in bytes."""
        yield RegionRange(first, last)

    def has_data(self, first: RegionOff, last: RegionOff) -> bool:
        """Tell if there is anything but a hole between two offsets in bytes."""
        return True

    def reserve(self, offset: RegionOff, length: int) -> None:
        """Give memory to what has none, ``length`` bytes from ``offset`` on.

        :raises NoSpaceError: there is none to be had.
        """


def given_pieces(name: str, size: int, phys_base: PhysAddr | None) -> list[Span] | None:
    """Return the physical range of ``size`` bytes whose address somebody has given.

    :raises RegionError: unaligned.
    """
    if phys_base is None:
        return None
    if phys_base % PAGE:
        raise RegionError(f"{name}: bad phys_base: got {phys_base:#x}, expected a multiple of 4096")
    return [Span(phys_base, size)]


def open_path(path: str, *, write: bool, flags: int = 0) -> int:
    """Open a file, or a device, for a mapping; return the descriptor.

    :raises RegionError: it is missing, or not permitted.
    """
    try:
        return os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | flags)
    except OSError as e:
        number = e.errno or errno.EIO
        if number == errno.EISDIR:
            raise RegionError(f"{path}: not a region: it is a directory", number) from e
        why = dangling_link(path) or str(e.strerror)
        if number == errno.ENOENT:
            why += did_you_mean(path)
        raise RegionError(f"{path}: cannot open: {why}", number) from e


def dangling_link(path: str) -> str | None:
    """Return what to say of a link to nothing; None: it is none."""
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return f"it is a link to {os.path.realpath(path)}, which is not there"
