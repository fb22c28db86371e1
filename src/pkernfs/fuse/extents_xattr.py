"""The virtual attribute with the extents of a file: its format, written and read.

An extent is 32 bytes: offset in the file, length, offset in the region and physical address, all in
bytes. A name with a suffix ``.N`` begins with extent number N, so that long lists are read in
pages.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import NoDataError
from pkernfs.quantities import FileSpan, Ino, PhysAddr, RegionOff

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem
    from pkernfs.region.region import Region

NAME = "system.pkernfs.extents"

_EXTENT = struct.Struct("<QQQQ")
_EXTENTS_PER_PAGE = 65536 // _EXTENT.size
_NO_ADDRESS = 2**64 - 1
_PREFIX = NAME.encode()


class Extent(NamedTuple):
    """A piece of a file, all in bytes; ``physical`` is None where there is no address, or not for
    who asks.
    """

    offset: int
    length: int
    region_offset: RegionOff
    physical: PhysAddr | None


def page(fs: FileSystem, ino: Ino, name: bytes, with_addresses: bool) -> Callable[[], bytes]:
    """What makes the value of the attribute ``name``, which begins with :data:`NAME`.

    The call looks up addresses and nothing else; any thread may do it.

    :raises NoDataError: the rest of the name is no page.
    """
    suffix = name[len(_PREFIX) :]
    if suffix and not (suffix[:1] == b"." and suffix[1:].isdigit() and len(suffix) < 20):
        raise NoDataError("no such virtual attribute")
    start = int(suffix[1:] or 0)
    extents, row = fs.extents(ino), fs.segments.find(ino)

    def make() -> bytes:
        if not with_addresses:
            return _packed(_without_addresses(extents), start)
        with fs.segments.own_mapping(row) as memory:
            return _packed(_with_addresses(memory, extents), start)

    return make


def _packed(extents: Iterable[Extent], start: int) -> bytes:
    """One page of extents, from the extent number ``start`` on."""
    return b"".join(map(_pack, itertools.islice(extents, start, start + _EXTENTS_PER_PAGE)))


def _pack(extent: Extent) -> bytes:
    offset, length, region_offset, physical = extent
    return _EXTENT.pack(
        offset, length, region_offset, _NO_ADDRESS if physical is None else physical
    )


def parse(value: bytes) -> Iterator[Extent]:
    """The extents in a page; part of one at its end is left out."""
    whole = value[: len(value) - len(value) % _EXTENT.size]
    for offset, length, region_offset, physical in _EXTENT.iter_unpack(whole):
        yield Extent(offset, length, region_offset, None if physical == _NO_ADDRESS else physical)


def _without_addresses(extents: Iterable[FileSpan]) -> Iterator[Extent]:
    for e in extents:
        yield Extent(e.offset, e.length, e.region_offset, None)


def _with_addresses(region: Region, extents: Iterable[FileSpan]) -> Iterator[Extent]:
    """The extents, cut where addresses jump (huge pages lie anywhere).

    To look at a file gives it no memory: what it has none of yet has no address.
    """
    for e in extents:
        for at, length, address in region.existing_runs(e.region_offset, e.length):
            yield Extent(e.offset + at - e.region_offset, length, at, address)
