"""The memory of a region, of segments and of BARs, in the process of a VMM. All in bytes."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pkernfs.errors import TakeOverError
from pkernfs.vmm import sysfs
from pkernfs.vmm.export import Bar, Export, Place
from pkernfs.vmm.plan import Piece

_BLOCK = 2 << 20
_DEV_MEM = Path("/dev/mem")


class _Range(NamedTuple):
    """Offsets in the region or in a segment."""

    start: int
    end: int


class _Mapped(NamedTuple):
    """A range of the region or of a segment, mapped."""

    start: int
    end: int
    mapping: mmap.mmap


class Memory:
    """Maps the memory of the region and of segments, and BARs, where pieces need them.

    It maps the region and not the files of the mount: VFIO cannot pin pages of a FUSE mount.

    :raises TakeOverError: no program can map the region.
    """

    def __init__(self, export: Export) -> None:
        if export.place is None:
            raise TakeOverError(f"{export.region}: nothing that a program could map")
        self._place = export.place
        self._mapped: dict[Path | None, list[_Mapped]] = {}  # None: the region
        self._bars: dict[Bar, mmap.mmap] = {}

    @property
    def is_physical(self) -> bool:
        """The region is mapped through /dev/mem, whose memory may have no pages."""
        return self._place.path == _DEV_MEM

    def map(self, pieces: Sequence[Piece]) -> None:
        """Map what pieces need, in as few mappings as possible.

        :raises TakeOverError: the kernel refuses to map the region, or a segment.
        :raises OSError: it cannot be opened.
        """
        for bar in {piece.bar for piece in pieces if piece.bar is not None} - set(self._bars):
            self._bars[bar] = _map_bar(bar)
        memory = [piece for piece in pieces if piece.bar is None]
        for segment in dict.fromkeys(piece.segment for piece in memory):
            self._map_pieces([piece for piece in memory if piece.segment == segment], segment)

    def _map_pieces(self, pieces: Sequence[Piece], segment: Path | None) -> None:
        """Map what pieces need of one segment, or of the region."""
        place = self._place if segment is None else Place(segment, 0, _size_of(segment))
        mapped = self._mapped.setdefault(segment, [])
        with place.path.open("r+b", buffering=0) as file:
            for start, end in _ranges(pieces, _alignment(place.path)):
                end = min(end, place.length)
                mapping = _map_range(file.fileno(), place, start, end)
                mapped.append(_Mapped(start, end, mapping))

    def address(self, piece: Piece) -> int:
        """Return the address of a piece in this process.

        :raises TakeOverError: it has not been mapped.
        """
        if piece.bar is not None:
            return _address(self._bars[piece.bar]) + piece.offset
        for one in self._mapped.get(piece.segment, ()):
            if one.start <= piece.offset < one.end:
                return _address(one.mapping) + piece.offset - one.start
        raise TakeOverError(f"{piece.iova:#x}: not mapped")


def _map_range(fd: int, place: Place, start: int, end: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # not in the hold: faults take their time
    try:
        return mmap.mmap(fd, end - start, flags, offset=place.offset + start)
    except OSError as error:
        raise TakeOverError(f"{place.path}: cannot map it: {error.strerror}") from error


def _size_of(path: Path) -> int:
    """Bytes of a segment: a dax device's node tells no size."""
    size = Path(f"{_device_of(path)}/size")
    return int(size.read_text()) if size.exists() else path.stat().st_size


def _device_of(path: Path) -> str:
    """The directory of a character device in sysfs."""
    number = path.stat().st_rdev
    return f"/sys/dev/char/{os.major(number)}:{os.minor(number)}"


def _map_bar(bar: Bar) -> mmap.mmap:
    path = sysfs.device_path(bar.device) / f"resource{bar.number}"
    with path.open("r+b", buffering=0) as file:
        return mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size)


def _alignment(path: Path) -> int:
    """Bytes of which a mapping of it has to begin and end at a multiple."""
    align = Path(f"{_device_of(path)}/align")  # device-dax's
    return int(align.read_text()) if align.exists() else max(_BLOCK, path.stat().st_blksize)


def _ranges(pieces: Sequence[Piece], align: int) -> list[_Range]:
    """Aligned ranges that have all pieces in them; neighbours are one."""
    found: list[_Range] = []
    for piece in sorted(pieces, key=lambda p: p.offset):
        start = piece.offset - piece.offset % align
        end = -(-(piece.offset + piece.length) // align) * align
        if found and start <= found[-1].end:
            found[-1] = _Range(found[-1].start, max(end, found[-1].end))
        else:
            found.append(_Range(start, end))
    return found


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
