"""The memory of a region, and of BARs, in the process of a VMM. Addresses are in bytes."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pkernfs.errors import TakeOverError
from pkernfs.quantities import RegionOff, RegionRange
from pkernfs.vmm import sysfs
from pkernfs.vmm.export import Bar, Export
from pkernfs.vmm.plan import Piece

_BLOCK = 2 << 20
_DEV_MEM = Path("/dev/mem")


class _Mapped(NamedTuple):
    """A range of the region, mapped."""

    range: RegionRange
    mapping: mmap.mmap


class Memory:
    """Maps the region's memory, and BARs, where pieces need them.

    It maps the region and not the files of the mount: VFIO cannot pin pages of a FUSE mount.

    :raises TakeOverError: no program can map the region.
    """

    def __init__(self, export: Export) -> None:
        if export.place is None:
            raise TakeOverError(f"{export.region}: nothing that a program could map")
        self._place = export.place
        self._region: list[_Mapped] = []
        self._bars: dict[Bar, mmap.mmap] = {}

    @property
    def is_physical(self) -> bool:
        """The region is mapped through /dev/mem, whose memory may have no pages."""
        return self._place.path == _DEV_MEM

    def map(self, pieces: Sequence[Piece]) -> None:
        """Map what pieces need, in as few mappings as possible.

        :raises TakeOverError: the kernel refuses to map the region.
        :raises OSError: it cannot be opened.
        """
        for bar in {piece.bar for piece in pieces if piece.bar is not None} - set(self._bars):
            self._bars[bar] = _map_bar(bar)
        align = _alignment(self._place.path)
        with self._place.path.open("r+b", buffering=0) as file:
            for wanted in _ranges(pieces, align):
                there = RegionRange(wanted.start, min(wanted.end, RegionOff(self._place.length)))
                self._region.append(_Mapped(there, self._map_region(file.fileno(), there)))

    def _map_region(self, fd: int, part: RegionRange) -> mmap.mmap:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # not in the hold: faults take their time
        offset = self._place.offset + part.start
        try:
            return mmap.mmap(fd, part.end - part.start, flags, offset=offset)
        except OSError as error:
            raise TakeOverError(f"{self._place.path}: cannot map it: {error.strerror}") from error

    def address(self, piece: Piece) -> int:
        """Return the address of a piece in this process.

        :raises TakeOverError: it has not been mapped.
        """
        if piece.bar is not None:
            return _address(self._bars[piece.bar]) + piece.offset
        for one in self._region:
            if one.range.start <= piece.offset < one.range.end:
                return _address(one.mapping) + piece.offset - one.range.start
        raise TakeOverError(f"{piece.iova:#x}: not mapped")


def _map_bar(bar: Bar) -> mmap.mmap:
    path = sysfs.device_path(bar.device) / f"resource{bar.number}"
    with path.open("r+b", buffering=0) as file:
        return mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size)


def _alignment(path: Path) -> int:
    """Bytes of which a mapping of the region has to begin and end at a multiple."""
    info = path.stat()
    device = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    align = Path(f"/sys/dev/char/{device}/align")  # device-dax's
    return int(align.read_text()) if align.exists() else max(_BLOCK, info.st_blksize)


def _ranges(pieces: Sequence[Piece], align: int) -> list[RegionRange]:
    """Aligned ranges of the region that have all pieces in them; neighbours are one."""
    found: list[RegionRange] = []
    for piece in sorted((p for p in pieces if p.bar is None), key=lambda p: p.offset):
        start = RegionOff(piece.offset - piece.offset % align)
        end = RegionOff(-(-(piece.offset + piece.length) // align) * align)
        if found and start <= found[-1].end:
            found[-1] = RegionRange(found[-1].start, max(end, found[-1].end))
        else:
            found.append(RegionRange(start, end))
    return found


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
