"""What a region is made of, as its Region sees it: see :class:`Backing`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Span
from pkernfs.layout import PAGE
from pkernfs.region.locks import RegionLock

if TYPE_CHECKING:
    from pkernfs.region.dax import Device


class Backing:
    """An open descriptor that can be mapped, and what is known of the memory behind it.

    This class is memory without a descriptor: anonymous, private, zero. ``pieces`` are its physical
    ranges in the order of the region's offsets, if they are known without the mapping.
    """

    fd: int | None = None
    #: Where in the descriptor the region begins.
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
        """What to add to the message if mmap() fails with this errno."""
        return ""

    # ------------------------------------------------------------------ what the memory holds

    @property
    def untouched(self) -> bool:
        """Whether it is known to be all zero without having any memory yet."""
        return False

    def known_zero(self) -> list[tuple[int, int]]:
        """Runs of ``(first block, blocks)`` that are zero, without reading them."""
        return []

    def data_ranges(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """``(start, end)`` of what is no hole between two offsets."""
        yield first, last


def given_pieces(name: str, size: int, phys_base: int | None) -> list[Span] | None:
    """The physical ranges of memory whose address somebody has given.

    :raises RegionError: unaligned.
    """
    if phys_base is None:
        return None
    if phys_base % PAGE:
        raise RegionError(f"{name}: bad phys_base: got {phys_base:#x}, expected a multiple of 4096")
    return [Span(phys_base, size)]
