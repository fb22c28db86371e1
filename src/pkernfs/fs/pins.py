"""Pins: memory of files, and files of /iommu, that something else depends on.

The file system knows nothing of IOMMUs: whoever mounts it says who tells it what is held. Before
memory is freed, or a file of /iommu changes, it asks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from pkernfs.errors import BusyError
from pkernfs.fs.extents import LAST_PAGE, ExtentMap
from pkernfs.fs.inodes import Inode, InodeTable
from pkernfs.fs.segment_table import SegmentTable
from pkernfs.host.iomem import Span
from pkernfs.layout import INODE_FLAG_SEGMENT, INODE_FLAG_TABLE, IOMMU_INO, PAGE, Extent
from pkernfs.pool.pieces import part
from pkernfs.quantities import Ino
from pkernfs.ratelimit import RateLimit

log = logging.getLogger(__name__)


class Pins(Protocol):
    """The memory and the files of one file system that devices depend on."""

    @property
    def active(self) -> bool:
        """Something may be held. It is asked before each change, so it must cost nothing."""

    def load(self) -> None:
        """Find out what is held: /iommu has files. A mount calls this before it frees anything.

        :raises PkernfsError: that cannot be told.
        """

    def changed(self) -> None:
        """A file of /iommu has come, gone, grown or got another name."""

    def holder(self, extents: Iterable[Extent]) -> str | None:
        """Name who holds a byte of these; None: nobody."""

    def holder_of_memory(self, pieces: Iterable[Span]) -> str | None:
        """Name who holds a byte of memory outside the region; None: nobody."""

    def held_memory(self, pieces: Iterable[Span]) -> list[Span]:
        """What of memory outside the region is held, in whole 2 MiB blocks, ascending."""

    def check_unused(self, ino: Ino) -> None:
        """:raises BusyError: that file of /iommu must stay as it is, and why."""


class PinGuard:
    """Keeps what is held from being freed.

    :attr:`pins` is set before the first operation.
    """

    pins: Pins

    def __init__(self, inodes: InodeTable, extents: ExtentMap, segments: SegmentTable) -> None:
        self._inodes = inodes
        self._map = extents
        self._segments = segments
        self._refusals = RateLimit(log)

    def check_unpinned(self, inode: Inode, start: int = 0, end: int = LAST_PAGE + 1) -> None:
        """:raises BusyError: a device may reach file pages start..end-1, or a table is in use."""
        if inode.flags & INODE_FLAG_TABLE:
            self._check_unused(inode)
        elif self.pins.active and self.is_held(inode, start, end):
            raise BusyError("mapped for DMA")

    def is_held(self, inode: Inode, start: int, end: int) -> bool:
        """Somebody holds one of file pages start..end-1; it is logged who."""
        holder = self.holder_of(inode, start, end)
        if holder is not None:
            self._refusals.warning(f"inode {inode.ino}: busy: {holder}")
        return holder is not None

    def holder(self, ino: Ino) -> str | None:
        """Name what maps a file's bytes for devices; None: nothing does."""
        return self.holder_of(self._inodes.get(ino), 0, LAST_PAGE + 1)

    def holder_of(self, inode: Inode, start: int, end: int) -> str | None:
        """Name what maps one of file pages start..end-1; None: nothing does."""
        if not self.pins.active or not inode.is_reg or not inode.data_pages:
            return None
        if inode.flags & INODE_FLAG_SEGMENT:
            pieces = self._segments.of(inode).pieces
            return self.pins.holder_of_memory(part(pieces, start * PAGE, end * PAGE))
        return self.pins.holder(self._map.within(inode, start, end))

    def holder_of_memory(self, pieces: Iterable[Span]) -> str | None:
        """Name what maps memory outside the region for devices; None: nothing does."""
        return self.pins.holder_of_memory(pieces) if self.pins.active else None

    def held_memory(self, pieces: Iterable[Span]) -> list[Span]:
        """What of memory outside the region is mapped for devices: 2 MiB blocks, ascending."""
        return self.pins.held_memory(pieces) if self.pins.active else []

    def _check_unused(self, inode: Inode) -> None:
        try:
            self.pins.check_unused(inode.ino)
        except BusyError as e:
            self._refusals.warning(str(e))
            raise

    def directory_changed(self, directory: Inode) -> None:
        """The names in a directory are others now."""
        if directory.ino == IOMMU_INO:
            self.pins.changed()
