"""A handover's list: how it is made and read (docs/format.md, section 11).

The command makes the list, and the file system keeps it in a file without a name. The first mount
after the handover compares (:mod:`pkernfs.fs.comparison`).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

from pkernfs.errors import CorruptionError
from pkernfs.layout import (
    HEADER,
    LIST,
    LIST_CHUNK,
    LIST_CHUNK_BYTES,
    LIST_FILE,
    LIST_PAGE,
    LIST_SIGNATURE,
    LIST_SIGNATURE_SEGMENTS,
    LIST_SLOTS,
    MAGIC_INODES,
    PAGE,
    ListFields,
)
from pkernfs.quantities import FileSpan, Ino, PageNo, RegionOff, RegionRange
from pkernfs.region import digest
from pkernfs.region.region import Region

Buffer = bytes | bytearray | memoryview

_SECTOR = 512  # of st_blocks
# An inode table that grows gets at most 64 pages; the rest are a few nodes and page maps.
_ROOM_BYTES = 64 * (LIST_PAGE.size + LIST_SLOTS.size) + 64 * LIST_PAGE.size


# ------------------------------------------------------------------------------ the list


class FileDigests(NamedTuple):
    """The chunks of a file that have digests, as ``{number: digest}``.

    ``in_segment``: the bytes are those of its segment.
    """

    ino: Ino
    chunks: dict[int, int]
    in_segment: bool = False


class Manifest(NamedTuple):
    """A list, parsed. Arrays of the same length tell of one metadata page each.

    ``pages`` are page numbers, ``owners`` inode numbers: arrays cannot have items of those types.
    """

    pages: array[int]
    owners: array[int]
    magics: array[int]
    sums: array[int]
    slots: array[int]
    files: list[FileDigests]
    #: Files with segments have digests too: else, what is listed of them says nothing.
    with_segments: bool


def room_for_manifest(length: int) -> int:
    """Bytes to make room for, where a list of ``length`` bytes is what making it will change."""
    return -(-(length + _ROOM_BYTES) // PAGE) * PAGE


def build_manifest(
    region: Region, uuid: bytes, number: int, pages: Iterable[PageNo], files: list[FileDigests]
) -> bytes:
    """The list of a frozen file system; ``pages`` are its intact metadata pages.

    :raises RegionError: a page outside the region.
    """
    numbers = array("Q", sorted(set(pages)))
    sums = digest.page_sums(region, numbers)
    entries = bytearray()
    inode_pages: array[int] = array("Q")
    for page, checksum in zip(numbers, sums, strict=True):
        header = region.view(RegionOff(page * PAGE), PAGE)
        magic, _, _, owner, _ = HEADER.unpack_from(header)
        entries += LIST_PAGE.pack(page, owner, magic, checksum)
        if magic == MAGIC_INODES:
            inode_pages.append(page)
    in_segments = any(file.in_segment for file in files)
    head = LIST.pack(
        LIST_SIGNATURE_SEGMENTS if in_segments else LIST_SIGNATURE,
        number,
        len(numbers),
        len(inode_pages),
        len(files),
        sum(len(file.chunks) for file in files),
        uuid,
    )
    heads = b"".join([LIST_FILE.pack(file.ino, len(file.chunks)) for file in files])
    chunks = array("Q")
    for file in files:
        for item in sorted(file.chunks.items()):
            chunks.extend(item)
    slots = digest.slot_sums(region, inode_pages)
    return b"".join((head, entries, slots.tobytes(), heads, chunks.tobytes()))


def parse_manifest(data: Buffer, uuid: bytes, number: int) -> Manifest:
    """The list whose bytes these are; its digest was checked.

    :raises CorruptionError: it contradicts itself, or belongs to another handover.
    """
    if len(data) < LIST.size:
        raise CorruptionError(f"the handover's list is too short: got {len(data)} bytes")
    head = ListFields(*LIST.unpack_from(data))
    with_segments = head.signature == LIST_SIGNATURE_SEGMENTS
    is_list = with_segments or head.signature == LIST_SIGNATURE
    if not is_list or (head.number, head.uuid) != (number, uuid):
        raise CorruptionError(f"the list is of another handover: got number {head.number}")
    lengths = (
        head.pages * LIST_PAGE.size,
        head.inode_pages * LIST_SLOTS.size,
        head.files * LIST_FILE.size,
        head.chunks * LIST_CHUNK.size,
    )
    end = LIST.size + sum(lengths)
    if end > len(data) or any(memoryview(data)[end:]):
        raise CorruptionError(
            f"the handover's list: bad length: got {len(data)} bytes, expected {end}"
        )
    parts = []
    at = LIST.size
    view = memoryview(data)
    for length in lengths:
        parts.append(view[at : at + length])
        at += length
    words, halves = parts[0].cast("Q"), parts[0].cast("I")
    magics = array("I", halves[4::6].tolist())
    if magics.count(MAGIC_INODES) != head.inode_pages:
        raise CorruptionError(f"the handover's list: bad inode_pages: got {head.inode_pages}")
    chunks = LIST_CHUNK.iter_unpack(parts[3])
    files = []
    left = head.chunks
    for ino, count in LIST_FILE.iter_unpack(parts[2]):
        left -= count
        if left < 0:
            raise CorruptionError(f"the handover's list: too many chunks of inode {ino}")
        files.append(FileDigests(ino, dict(next(chunks) for _ in range(count))))
    return Manifest(
        array("Q", words[0::3].tolist()),
        array("Q", words[1::3].tolist()),
        magics,
        array("I", halves[5::6].tolist()),
        array("I", parts[1].cast("I").tolist()),
        files,
        with_segments,
    )


# ------------------------------------------------------------------------------ chunks of files


class Holes:
    """The holes of memory, as one pass over it finds them; what is data stays so meanwhile.

    The kernel looks for the end of data page by page, far beyond the place that is asked for. So it
    is asked once, and what it has told is kept.
    """

    def __init__(self, memory: Region) -> None:
        self._memory = memory
        self._huge: list[RegionRange] | None = None
        self._seen = RegionRange(RegionOff(0), RegionOff(0))

    @classmethod
    def of_segment(cls, memory: Region) -> Holes:
        """Those of a segment, also on hugetlbfs; there it takes a microsecond for each page."""
        holes = cls(memory)
        if memory.asks_for_addresses:
            holes._huge = _huge_pages(memory)
        return holes

    def data(self, first: RegionOff, last: RegionOff) -> Iterator[RegionRange]:
        """Yield what is no hole between two offsets in bytes, ascending."""
        at = first
        while at < last:
            if not self._seen.start <= at < self._seen.end:
                found = self._data_from(at)
                if found is None:
                    return
                self._seen = found
            start, end = max(self._seen.start, at), min(self._seen.end, last)
            if start >= last:
                return
            yield RegionRange(start, end)
            at = end

    def _data_from(self, at: RegionOff) -> RegionRange | None:
        if self._huge is None:
            return next(self._memory.data_ranges(at), None)
        return next((piece for piece in self._huge if piece.end > at), None)


def _huge_pages(memory: Region) -> list[RegionRange] | None:
    """The pages that a file on hugetlbfs has; None if the kernel does not tell.

    A read of a page that it does not have would give it one.
    """
    assert memory.descriptor is not None
    used = os.fstat(memory.descriptor).st_blocks * _SECTOR
    runs = memory.existing_runs(RegionOff(0), memory.size) if used < memory.size else ()
    found = [
        RegionRange(run.offset, RegionOff(run.offset + run.length))
        for run in runs
        if run.physical is not None
    ]
    return found if sum(end - start for start, end in found) == used else None


class Chunk(NamedTuple):
    """A chunk of a file: its number, and its parts in the memory."""

    number: int
    parts: list[digest.Part]


def chunks_of(
    holes: Holes, extents: Iterable[FileSpan], wanted: Container[int] = ()
) -> Iterator[Chunk]:
    """Find each chunk of a file that has memory which is no hole.

    The extents ascend; chunks whose numbers are ``wanted`` come if they have any extent at all.
    """
    current = -1
    parts: list[digest.Part] = []
    has_data = False
    for offset, at, length, is_data in _spans(holes, extents):
        while length:
            number, skip = divmod(offset, LIST_CHUNK_BYTES)
            if number != current:
                if has_data or (parts and current in wanted):
                    yield Chunk(current, parts)
                current, parts, has_data = number, [], False
            piece = min(length, LIST_CHUNK_BYTES - skip)
            parts.append(digest.Part(at if is_data else digest.ZEROS, piece))
            has_data = has_data or is_data
            offset += piece
            at = RegionOff(at + piece)
            length -= piece
    if has_data or (parts and current in wanted):
        yield Chunk(current, parts)


class _Span(NamedTuple):
    """A part of an extent: file offset, offset in memory, length in bytes; data, or else a hole."""

    offset: int
    at: RegionOff
    length: int
    is_data: bool


def _spans(holes: Holes, extents: Iterable[FileSpan]) -> Iterator[_Span]:
    """Cut extents at holes of the memory."""
    for offset, length, start in extents:
        at = start
        end = RegionOff(start + length)
        for low, high in holes.data(start, end):
            if low > at:
                yield _Span(offset + at - start, at, low - at, False)
            yield _Span(offset + low - start, low, high - low, True)
            at = high
        if at < end:
            yield _Span(offset + at - start, at, end - at, False)
