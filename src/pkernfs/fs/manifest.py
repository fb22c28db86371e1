"""A handover's list, and the comparison of a region with it (docs/format.md, section 11).

The command makes the list, and the file system keeps it in a file without a name. The first mount
after the handover compares. Nothing here stores into a region; when that happens is
:mod:`pkernfs.fs.freeze`'s business.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import CorruptionError, NotFoundError, PkernfsError
from pkernfs.layout import (
    HANDOVER_FLAG_DIGESTS,
    HEADER,
    LIST,
    LIST_CHUNK,
    LIST_CHUNK_BYTES,
    LIST_FILE,
    LIST_PAGE,
    LIST_SIGNATURE,
    LIST_SLOTS,
    MAGIC_INODES,
    MAGIC_NAMES,
    NO_INO,
    PAGE,
    RESULT_CHANGED,
    RESULT_EVERYTHING,
    RESULT_METADATA,
    RESULT_UNKNOWN,
    ROOT_INO,
    SLOTS_PER_INODE_PAGE,
    HandoverFields,
    ListFields,
    inos_of,
    page_offset,
)
from pkernfs.quantities import FileSpan, Ino, PageNo, RegionOff
from pkernfs.region import digest
from pkernfs.region.checksum import page_checksum
from pkernfs.region.region import Region

if TYPE_CHECKING:
    from pkernfs.fs.names import DirectoryEntry
    from pkernfs.fs.super import Super

    #: The extents of a file, by its inode number.
    ExtentsOf = Callable[[Ino], list[FileSpan]]
    #: The entries of a directory behind a cookie.
    Readdir = Callable[[Ino, int], Iterator[DirectoryEntry]]

Buffer = bytes | bytearray | memoryview

# An inode table that grows gets at most 64 pages; the rest are a few nodes and page maps.
_ROOM_BYTES = 64 * (LIST_PAGE.size + LIST_SLOTS.size) + 64 * LIST_PAGE.size
_VERIFY_BYTES = 256 << 20  # of one batch: what an unmount may have to wait for
_VERIFY_CHUNKS = 4096
_NICE = 10  # of the threads that verify while others work


# ------------------------------------------------------------------------------ the list


class FileDigests(NamedTuple):
    """The chunks of a file that have digests, as ``{number: digest}``."""

    ino: Ino
    chunks: dict[int, int]


@dataclass(frozen=True)
class Manifest:
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


# ------------------------------------------------------------------------------ comparing


@dataclass
class Change:
    """Something that is not as it was handed over; ``ino`` 0: the file system's own."""

    ino: Ino
    what: list[str] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)

    def text(self) -> str:
        """Tell in words what of it has changed."""
        words = list(dict.fromkeys(self.what))
        runs: list[tuple[int, int]] = []
        for number in sorted(self.chunks):
            if runs and runs[-1][1] == number:
                runs[-1] = (runs[-1][0], number + 1)
            else:
                runs.append((number, number + 1))
        words += [
            f"bytes {low * LIST_CHUNK_BYTES:#x}..{high * LIST_CHUNK_BYTES:#x}"
            for low, high in runs[:8]
        ]
        if len(runs) > 8:
            words.append(f"{len(runs) - 8} more places")
        return ", ".join(words)


class Changes:
    """Changes by inode, in the order in which they were found."""

    def __init__(self) -> None:
        self.by_ino: dict[Ino, Change] = {}
        self.elsewhere: list[Change] = []

    def __len__(self) -> int:
        return len(self.by_ino) + len(self.elsewhere)

    def of(self, ino: Ino) -> Change:
        """The change of an inode, to be added to."""
        return self.by_ino.setdefault(ino, Change(ino))

    def add_structure(self, what: str) -> None:
        """Something that belongs to no file."""
        self.elsewhere.append(Change(NO_INO, [what]))

    def all(self) -> list[Change]:
        """All of them."""
        return self.elsewhere + list(self.by_ino.values())


def compare_metadata(
    region: Region, listed: Manifest, index_of: dict[PageNo, int], changes: Changes
) -> None:
    """Compare every page of a list with the region; ``index_of`` is the inode table by page.

    :raises RegionError: the list has a page outside the region.
    """
    now = digest.page_sums(region, listed.pages)
    if now == listed.sums:
        return
    inode_pages = 0
    for i, (number, owner, magic) in enumerate(
        zip(listed.pages, listed.owners, listed.magics, strict=True)
    ):
        first_slot = inode_pages * SLOTS_PER_INODE_PAGE
        inode_pages += magic == MAGIC_INODES
        if now[i] == listed.sums[i]:
            continue
        page = PageNo(number)
        intact = page_checksum(region.view(page_offset(page), PAGE)) == now[i]
        state = "changed" if intact else "damaged"
        where = f"{MAGIC_NAMES.get(magic, 'page')} at {page * PAGE:#x} {state}"
        inos: list[Ino] = []
        if magic == MAGIC_INODES and page in index_of:
            slots = digest.slot_sums(region, array("Q", [page]))
            inos = [
                ino
                for slot, ino in enumerate(inos_of(index_of[page]))
                if slot and slots[slot] != listed.slots[first_slot + slot]
            ]
            for ino in inos:
                changes.of(ino).what.append(f"inode {state}")
        elif owner:
            changes.of(Ino(owner)).what.append(where)
            continue
        if not inos or not intact:
            changes.add_structure(where)


# ------------------------------------------------------------------------------ arriving


@dataclass
class MountReport:
    """The handover before a mount, and what has changed since.

    ``kind``: see :data:`pkernfs.fs.state_page.MOUNT_KINDS`. ``record`` is None without a handover.
    ``trouble`` says why nothing could be compared.
    """

    kind: int
    mounted_at: int
    record: HandoverFields | None = None
    trouble: str = ""
    files: list[FileDigests] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)
    verifier: Verifier | None = None

    @property
    def gap_ns(self) -> int | None:
        """Nanoseconds from the handover to the mount, as the clock has it."""
        return None if self.record is None else self.mounted_at - self.record.handed_over_at

    @property
    def result(self) -> int:
        """For the history, as far as it is known now."""
        if len(self.changes):
            return RESULT_CHANGED
        if self.record is None or not self.record.list_ino or self.trouble:
            return RESULT_UNKNOWN
        if self.verifier is not None and self.verifier.finished and not self.verifier.skipped:
            return RESULT_EVERYTHING
        return RESULT_METADATA


class ChunkOf(NamedTuple):
    """A chunk of a file, by its number."""

    ino: Ino
    number: int


class Job(NamedTuple):
    """A chunk to be compared with its digest; None: with zeros."""

    ino: Ino
    number: int
    parts: list[digest.Part]
    expected: int | None


class Verifier:
    """Compares the data of files with their digests, a batch at a time.

    :meth:`batches` and :meth:`take` belong to the thread of the file system, :meth:`run` may be
    called in any. Files that are changed through the mount meanwhile are skipped: their numbers are
    put into :attr:`changed_meanwhile`.
    """

    def __init__(self, region: Region, extents: ExtentsOf, mount_report: MountReport) -> None:
        self._region = region
        self._extents = extents
        self._files = mount_report.files
        self._changes = mount_report.changes
        self.changed_meanwhile: set[Ino] = set()
        self.total_bytes = sum(len(file.chunks) for file in self._files) * LIST_CHUNK_BYTES
        self.done_bytes = 0
        self.skipped: set[Ino] = set()
        self.finished = False

    def batches(self) -> Iterator[list[Job]]:
        """Pieces of work, each for one :meth:`run` and one :meth:`take`."""
        batch: list[Job] = []
        size = 0
        for file in self._files:
            for job in self._jobs(file):
                batch.append(job)
                size += sum(length for _, length in job.parts)
                if size >= _VERIFY_BYTES or len(batch) >= _VERIFY_CHUNKS:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch
        self.finished = True

    def _jobs(self, file: FileDigests) -> Iterator[Job]:
        try:
            extents = self._extents(file.ino)
        except NotFoundError:
            self._missing(file.ino, "its inode is gone")
            return
        except PkernfsError as e:
            self._missing(file.ino, str(e))
            return
        seen = set()
        for number, parts in chunks_of(self._region, extents, file.chunks):
            seen.add(number)
            yield Job(file.ino, number, parts, file.chunks.get(number))
        for number in sorted(file.chunks.keys() - seen):
            self._found(file.ino, number)

    def run(self, batch: list[Job], threads: int | None = None) -> list[ChunkOf]:
        """Find the chunks of a batch that differ."""
        region = self._region
        now = digest.digest_all(region, [job.parts for job in batch], threads=threads, nice=_NICE)
        differ = []
        for job, found in zip(batch, now, strict=True):
            expected = job.expected
            if expected is None:
                length = sum(length for _, length in job.parts)
                expected = digest.digests(region, [[digest.Part(digest.ZEROS, length)]])[0]
            if found != expected:
                differ.append(ChunkOf(job.ino, job.number))
        return differ

    def take(self, batch: list[Job], differ: list[ChunkOf]) -> None:
        """Note what :meth:`run` has found."""
        for ino, number in differ:
            self._found(ino, number)
        self.done_bytes += sum(length for job in batch for _, length in job.parts)
        self.skipped |= {job.ino for job in batch} & self.changed_meanwhile

    def _found(self, ino: Ino, number: int) -> None:
        if ino in self.changed_meanwhile:
            self.skipped.add(ino)
        else:
            self._changes.of(ino).chunks.append(number)

    def _missing(self, ino: Ino, reason: str) -> None:
        if ino in self.changed_meanwhile:
            self.skipped.add(ino)
        else:
            self._changes.of(ino).what.append(reason)


def load(state: Super, extents: ExtentsOf, data: Buffer, mount_report: MountReport) -> None:
    """Compare the metadata with a list whose bytes are ``data``; note what is to be verified.

    :param mount_report: its record is that of the list.
    :raises PkernfsError: the list cannot be used.
    """
    record = mount_report.record
    assert record is not None
    found = digest.crc64(data)
    if found != record.list_digest:
        raise CorruptionError(
            f"the handover's list: bad digest: got {found:#018x}, expected "
            f"{record.list_digest:#018x}"
        )
    listed = parse_manifest(data, state.superblock.uuid, record.number)
    index_of = {page: index for index, page in enumerate(state.inodes.where)}
    compare_metadata(state.region, listed, index_of, mount_report.changes)
    if record.flags & HANDOVER_FLAG_DIGESTS:
        mount_report.files = listed.files
        mount_report.verifier = Verifier(state.region, extents, mount_report)


def paths_of(inos: set[Ino], readdir: Readdir) -> dict[Ino, bytes]:
    """A path of each inode, as far as the directories can be read."""
    found: dict[Ino, bytes] = {}
    todo = [(ROOT_INO, b"")]
    seen = {ROOT_INO}
    if ROOT_INO in inos:
        found[ROOT_INO] = b"/"
    while todo and len(found) < len(inos):
        directory, path = todo.pop()
        try:
            for name, ino, kind, _ in readdir(directory, 0):
                if ino in inos:
                    found.setdefault(ino, path + b"/" + name)
                if kind == 4 and ino not in seen:
                    seen.add(ino)
                    todo.append((ino, path + b"/" + name))
        except PkernfsError:
            continue
    return found


def tell(
    changes: Changes, readdir: Readdir, holder: Callable[[Ino], str | None]
) -> list[dict[str, str]]:
    """Tell changes by path: ``{"path", "what"}``; the path "" is the file system itself.

    :param readdir: lists a directory of the file system.
    :param holder: names what maps a file's bytes for devices; None: nothing does.
    """
    paths = paths_of(set(changes.by_ino), readdir)
    told = []
    for change in changes.all():
        path = ""
        if change.ino:
            path = paths.get(change.ino, b"inode %d" % change.ino).decode(
                "utf-8", "backslashreplace"
            )
        what = change.text()
        device = _device_access(change, holder)
        told.append(
            {
                "path": path,
                "what": f"{what} ({device}: a device may write there)" if device else what,
            }
        )
    return told


def _device_access(change: Change, holder: Callable[[Ino], str | None]) -> str | None:
    """Name what lets a device write to a file whose data has changed; None: nothing does."""
    try:
        return holder(change.ino) if change.chunks else None
    except PkernfsError:
        return None
