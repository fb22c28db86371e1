"""A handover's list: how it is made and read (docs/format.md, section 11).

The command makes the list, and the file system keeps it in a file without a name. The first mount
after the handover compares (:mod:`pkernfs.fs.comparison`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
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
    LIST_SLOTS,
    MAGIC_INODES,
    PAGE,
    ListFields,
)
from pkernfs.quantities import FileSpan, Ino, PageNo, RegionOff
from pkernfs.region import digest
from pkernfs.region.region import Region

Buffer = bytes | bytearray | memoryview

# An inode table that grows gets at most 64 pages; the rest are a few nodes and page maps.
_ROOM_BYTES = 64 * (LIST_PAGE.size + LIST_SLOTS.size) + 64 * LIST_PAGE.size


# ------------------------------------------------------------------------------ the list


class FileDigests(NamedTuple):
    """The chunks of a file that have digests, as ``{number: digest}``."""

    ino: Ino
    chunks: dict[int, int]


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
    head = LIST.pack(
        LIST_SIGNATURE,
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
    if (head.signature, head.number, head.uuid) != (LIST_SIGNATURE, number, uuid):
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
    )


# ------------------------------------------------------------------------------ chunks of files


class Chunk(NamedTuple):
    """A chunk of a file: its number, and its parts in the region."""

    number: int
    parts: list[digest.Part]


def chunks_of(
    region: Region, extents: Iterable[FileSpan], wanted: Iterable[int] = ()
) -> Iterator[Chunk]:
    """Find each chunk of a file that has memory which is not a hole of the region.

    The extents ascend; chunks whose numbers are ``wanted`` come if they have any extent at all.
    """
    always = set(wanted)
    current = -1
    parts: list[digest.Part] = []
    has_data = False
    for offset, at, length, is_data in _spans(region, extents):
        while length:
            number, skip = divmod(offset, LIST_CHUNK_BYTES)
            if number != current:
                if has_data or (parts and current in always):
                    yield Chunk(current, parts)
                current, parts, has_data = number, [], False
            piece = min(length, LIST_CHUNK_BYTES - skip)
            parts.append(digest.Part(at if is_data else digest.ZEROS, piece))
            has_data = has_data or is_data
            offset += piece
            at = RegionOff(at + piece)
            length -= piece
    if has_data or (parts and current in always):
        yield Chunk(current, parts)


class _Span(NamedTuple):
    """A part of an extent: file offset, region offset, length in bytes; data, or else a hole."""

    offset: int
    region_offset: RegionOff
    length: int
    is_data: bool


def _spans(region: Region, extents: Iterable[FileSpan]) -> Iterator[_Span]:
    """Cut extents at holes of the region."""
    for offset, length, start in extents:
        at = start
        end = RegionOff(start + length)
        for low, high in region.data_ranges(start, end):
            if low > at:
                yield _Span(offset + at - start, at, low - at, False)
            yield _Span(offset + low - start, low, high - low, True)
            at = high
        if at < end:
            yield _Span(offset + at - start, at, end - at, False)
