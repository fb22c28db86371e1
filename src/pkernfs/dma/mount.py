"""Mounting a file system whose files devices may depend on: the only way that a daemon mounts one.

The table files take time to load, and most file systems have none: they are opened when they are
first asked for, or by the mount if there are any.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pkernfs.fs.filesystem import FileSystem
from pkernfs.host.iomem import Span
from pkernfs.layout import POOL_DAX, Extent
from pkernfs.quantities import Ino

if TYPE_CHECKING:
    from pkernfs.dma.table_files import TableFiles
    from pkernfs.fs.superblock import Superblock
    from pkernfs.pool.pool import Pool
    from pkernfs.region.region import Region


class TablePins:
    """The pins of one file system (:class:`pkernfs.fs.pins.Pins`): what its table files hold."""

    def __init__(self, fs: FileSystem) -> None:
        # Not a strong one: without tables, a file system that nobody has any more goes at once.
        self._fs = weakref.ref(fs)
        self._tables: TableFiles | None = None
        self.active = False

    @property
    def tables(self) -> TableFiles:
        """The table files, opened now if they are not yet."""
        if self._tables is None:
            from pkernfs.dma.table_files import TableFiles

            fs = self._fs()
            assert fs is not None
            self._tables = TableFiles(fs)
            self.active = True
        return self._tables

    def load(self) -> None:
        """Open the table files: from here on, what they map is known."""
        _ = self.tables

    def changed(self) -> None:
        """A file of /iommu has come, gone, grown or got another name."""
        if self._tables is not None:
            self._tables.refresh()

    def holder(self, extents: Iterable[Extent]) -> str | None:
        """Name what maps a byte of these; None: nothing does."""
        return None if self._tables is None else self._tables.holder(extents)

    def holder_of_memory(self, pieces: Iterable[Span]) -> str | None:
        """Name what maps a byte of memory outside the region; None: nothing does."""
        return None if self._tables is None else self._tables.holder_of_memory(pieces)

    def held_memory(self, pieces: Iterable[Span]) -> list[Span]:
        """What of memory outside the region is mapped, in whole 2 MiB blocks, ascending."""
        return [] if self._tables is None else self._tables.held_memory(pieces)

    def check_unused(self, ino: Ino) -> None:
        """:raises BusyError: that table file is in use, and by what."""
        self.tables.check_unused(ino)


def mount_filesystem(
    region: Region,
    *,
    read_only: bool = False,
    segments: bool = True,
    park: bool = False,
    open_pool: Callable[[Superblock], Pool | None] | None = None,
    clock: Callable[[], int] = time.time_ns,
) -> FileSystem:
    """Open the file system in a region, with the pins of its tables and the pool of its segments.

    :param segments: files get segments by themselves.
    :param park: some segments are restored later: the caller sees to those that are absent.
    :param open_pool: opens another pool than that in the region's directory, or beside its device.
    :param clock: the time now, ns since 1970.
    :raises FormatError, CorruptionError: see :meth:`FileSystem.mount`.
    :raises RegionError: the pool cannot be opened.
    """

    def open_own_pool(sb: Superblock) -> Pool | None:
        from pkernfs.pool.opening import open_pool

        pool = open_pool(sb.pool.pool, sb.pool.granule, region.place, write=region.writable)
        if sb.pool.pool == POOL_DAX:
            _tell_reach(pool, region)
        return pool

    return FileSystem.mount(
        region,
        pins=TablePins,
        open_pool=open_pool or open_own_pool,
        segments=segments,
        park=park,
        read_only=read_only,
        clock=clock,
    )


def _tell_reach(pool: Pool, region: Region) -> None:
    """Have a pool on device-dax know what the kernel has devices reach: it tells of no process."""
    from pkernfs.pool.dax import DaxPool

    def reached(pieces: Iterable[Span]) -> str | None:
        from pkernfs.dma.kernel_reach import KernelReach  # for those only who change a device
        from pkernfs.iommu.memory import Memory

        return KernelReach(Memory.whole(region)).holder(pieces)

    if isinstance(pool, DaxPool):
        pool.reached = reached


def tables_of(fs: FileSystem) -> TableFiles:
    """The table files of a file system that :func:`mount_filesystem` has opened.

    :raises PkernfsError: they cannot be opened.
    """
    pins = fs.pins
    assert isinstance(pins, TablePins), "mounted without its tables"
    return pins.tables
