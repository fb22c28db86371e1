"""The comparison of a region with the list of the last handover (docs/format.md, section 11).

Nothing here stores into a region; when that happens is :mod:`pkernfs.fs.freeze`'s business.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import BusyError, CorruptionError, NotFoundError, PkernfsError, RegionError
from pkernfs.layout import (
    HANDOVER_FLAG_DIGESTS,
    LIST_CHUNK_BYTES,
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
    inos_of,
    page_offset,
)
from pkernfs.quantities import FileSpan, Ino, PageNo, RegionOff
from pkernfs.region import digest
from pkernfs.region.checksum import page_checksum
from pkernfs.region.region import Region

if TYPE_CHECKING:
    from pkernfs.fs.names import DirectoryEntry
    from pkernfs.fs.segment_memory import SegmentMemory
    from pkernfs.fs.super import Super
    from pkernfs.pool.pool import Segment

    #: The extents of a file, by its inode number.
    ExtentsOf = Callable[[Ino], list[FileSpan]]
    #: The entries of a directory behind a cookie.
    Readdir = Callable[[Ino, int], Iterator[DirectoryEntry]]

from pkernfs.fs.manifest import (
    Buffer,
    FileDigests,
    Holes,
    Manifest,
    chunks_of,
    parse_manifest,
)

_VERIFY_BYTES = 256 << 20  # of one batch: what an unmount may have to wait for
_SEGMENT_BYTES = 64 << 20  # likewise: what a change of the pool may have to wait for
_VERIFY_CHUNKS = 4096
_NICE = 10  # of the threads that verify while others work


@dataclass
class Change:
    """Something that is not as it was handed over; ``ino`` 0: the file system's own.

    ``holder`` is who may have stored into a segment since the mount; "": nobody is seen.
    """

    ino: Ino
    what: list[str] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    holder: str = ""

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


@dataclass
class MountReport:
    """The handover before a mount, and what has changed since.

    ``kind``: see :data:`pkernfs.fs.state_page.MOUNT_KINDS`. ``record`` is None without a handover.
    ``trouble`` says why nothing could be compared. ``lost`` says why the segments of files could
    not.
    """

    kind: int
    mounted_at: int
    record: HandoverFields | None = None
    trouble: str = ""
    files: list[FileDigests] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)
    lost: dict[Ino, str] = field(default_factory=dict)
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
        verifier = self.verifier
        if verifier is not None and verifier.finished and not verifier.skipped and not self.lost:
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


class SegmentPart(NamedTuple):
    """A file whose segment is to be compared, from the file offset ``start`` on, as far as it goes.

    ``length`` is where the file's last page ends.
    """

    file: FileDigests
    row: Segment
    start: int
    length: int


class Batch(NamedTuple):
    """A piece of work: chunks in the region, or a part of a file that has a segment."""

    jobs: list[Job]
    part: SegmentPart | None = None


class Outcome(NamedTuple):
    """What :meth:`Verifier.run` has found.

    Of a part: ``end`` is the file offset that was reached, ``holder`` who has the segment; ``lost``
    says why it cannot be read, ``busy`` why just now it cannot.
    """

    differ: list[ChunkOf]
    bytes: int
    end: int = 0
    holder: str = ""
    lost: str = ""
    busy: str = ""


class Verifier:
    """Compares the data of files with their digests, a batch at a time.

    :meth:`batches` and :meth:`take` belong to the thread of the file system, :meth:`run` may be
    called in any. Files that are changed through the mount meanwhile are skipped: their numbers are
    put into :attr:`changed_meanwhile`.
    """

    def __init__(
        self,
        region: Region,
        extents: ExtentsOf,
        segments: SegmentMemory,
        mount_report: MountReport,
        *,
        with_segments: bool,
    ) -> None:
        self._region = region
        self._holes = Holes(region)
        self._extents = extents
        self._segments = segments
        self._with_segments = with_segments
        self._reached = 0
        self._files = mount_report.files
        self._changes = mount_report.changes
        self._lost = mount_report.lost
        self.changed_meanwhile: set[Ino] = set()
        self.total_bytes = sum(len(file.chunks) for file in self._files) * LIST_CHUNK_BYTES
        self.done_bytes = 0
        self.skipped: set[Ino] = set()
        self.finished = False

    def batches(self) -> Iterator[Batch]:
        """Pieces of work, each for one :meth:`run` and one :meth:`take` before the next."""
        jobs: list[Job] = []
        in_segments: list[FileDigests] = []
        size = 0
        for file in self._files:
            if self._has_segment(file.ino):
                in_segments.append(file)
                continue
            for job in self._jobs(file):
                jobs.append(job)
                size += sum(length for _, length in job.parts)
                if size >= _VERIFY_BYTES or len(jobs) >= _VERIFY_CHUNKS:
                    yield Batch(jobs)
                    jobs, size = [], 0
        if jobs:
            yield Batch(jobs)
        for file in in_segments if self._with_segments else ():
            yield from self._parts(file)
        self.finished = True

    def _has_segment(self, ino: Ino) -> bool:
        try:
            return self._segments.has_one(ino)
        except PkernfsError:
            return False  # which its extents say as well

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
        for number, parts in chunks_of(self._holes, extents, file.chunks):
            seen.add(number)
            yield Job(file.ino, number, parts, file.chunks.get(number))
        for number in sorted(file.chunks.keys() - seen):
            self._found(file.ino, number)

    def _parts(self, file: FileDigests) -> Iterator[Batch]:
        """The parts of a file with a segment, one after the other."""
        self._reached = 0
        while file.ino not in self.changed_meanwhile:
            try:
                (span,) = self._extents(file.ino) or [FileSpan(0, 0, RegionOff(0))]
                row = self._segments.find(file.ino)
            except PkernfsError as e:
                self._missing(file.ino, str(e))
                return
            if row is None:
                break  # it has lost it meanwhile
            if reason := self._segments.lost.get(row.number):
                self._lost[file.ino] = reason
                return
            if self._reached >= span.length:
                self._check_end(file, span.length)
                return
            yield Batch([], SegmentPart(file, row, self._reached, span.length))
        self.skipped.add(file.ino)

    def _check_end(self, file: FileDigests, length: int) -> None:
        for number in sorted(file.chunks):
            if number * LIST_CHUNK_BYTES >= length:
                self._found(file.ino, number)

    def run(self, batch: Batch, threads: int | None = None) -> Outcome:
        """Find the chunks of a batch that differ.

        That of a part maps the segment: the pool is not to be changed meanwhile.
        """
        if batch.part is None:
            size = sum(length for job in batch.jobs for _, length in job.parts)
            return Outcome(_differing(self._region, batch.jobs, threads), size)
        part = batch.part
        try:
            with self._segments.open(part.row, write=False) as memory:
                outcome = _compare_part(memory, part, threads)
            return outcome._replace(holder=self._holder(part.row)) if outcome.differ else outcome
        except BusyError as e:
            return Outcome([], 0, part.length, busy=str(e))
        except RegionError as e:
            return Outcome([], 0, part.length, lost=str(e))

    def _holder(self, row: Segment) -> str:
        holders = self._segments.need_pool().holders(row)
        return str(holders[0]) if holders else ""

    def take(self, batch: Batch, outcome: Outcome) -> None:
        """Note what :meth:`run` has found."""
        for ino, number in outcome.differ:
            self._found(ino, number, outcome.holder)
        self.done_bytes += outcome.bytes
        self.skipped |= {job.ino for job in batch.jobs} & self.changed_meanwhile
        if batch.part is not None:
            self._reached = outcome.end
            self._take_end(batch.part.file.ino, outcome)

    def _take_end(self, ino: Ino, outcome: Outcome) -> None:
        """Note why a segment could not be compared."""
        if outcome.busy or ino in self.changed_meanwhile:
            self.skipped.add(ino)
        elif outcome.lost:
            self._lost[ino] = outcome.lost

    def _found(self, ino: Ino, number: int, holder: str = "") -> None:
        if ino in self.changed_meanwhile:
            self.skipped.add(ino)
        else:
            change = self._changes.of(ino)
            change.chunks.append(number)
            change.holder = change.holder or holder

    def _missing(self, ino: Ino, reason: str) -> None:
        if ino in self.changed_meanwhile:
            self.skipped.add(ino)
        else:
            self._changes.of(ino).what.append(reason)


def _differing(memory: Region, jobs: list[Job], threads: int | None) -> list[ChunkOf]:
    """Read chunks, and compare them."""
    now = digest.digest_all(memory, [job.parts for job in jobs], threads=threads, nice=_NICE)
    differ = []
    for job, found in zip(jobs, now, strict=True):
        expected = job.expected
        if expected is None:
            length = sum(length for _, length in job.parts)
            expected = digest.digests(memory, [[digest.Part(digest.ZEROS, length)]])[0]
        if found != expected:
            differ.append(ChunkOf(job.ino, job.number))
    return differ


def _compare_part(memory: Region, part: SegmentPart, threads: int | None) -> Outcome:
    """Compare a part of a segment: as much as is read in a moment.

    :raises RegionError: its owner has cut it.
    """
    ino, expected, _ = part.file
    span = FileSpan(part.start, part.length - part.start, RegionOff(part.start))
    jobs: list[Job] = []
    size, end = 0, part.length
    for number, parts in chunks_of(Holes.of_segment(memory), [span], expected):
        jobs.append(Job(ino, number, parts, expected.get(number)))
        size += sum(length for _, length in parts)
        if size >= _SEGMENT_BYTES:
            end = (number + 1) * LIST_CHUNK_BYTES
            break
    return Outcome(_differing(memory, jobs, threads), size, end)


def load(
    state: Super,
    extents: ExtentsOf,
    segments: SegmentMemory,
    data: Buffer,
    mount_report: MountReport,
) -> None:
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
        mount_report.verifier = Verifier(
            state.region, extents, segments, mount_report, with_segments=listed.with_segments
        )


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
        if device := _device_access(change, holder):
            what += f" ({device}: a device may write there)"
        elif change.holder:
            what += f" ({change.holder}: it may have written there)"
        told.append({"path": path, "what": what})
    return told


def _device_access(change: Change, holder: Callable[[Ino], str | None]) -> str | None:
    """Name what lets a device write to a file whose data has changed; None: nothing does."""
    try:
        return holder(change.ino) if change.chunks else None
    except PkernfsError:
        return None
