"""The comparison of a region with the list of the last handover (docs/format.md, section 11).

Nothing here stores into a region; when that happens is :mod:`pkernfs.fs.freeze`'s business.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import CorruptionError, NotFoundError, PkernfsError
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
from pkernfs.quantities import FileSpan, Ino, PageNo
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

from pkernfs.fs.manifest import Buffer, FileDigests, Manifest, chunks_of, parse_manifest

_VERIFY_BYTES = 256 << 20  # of one batch: what an unmount may have to wait for
_VERIFY_CHUNKS = 4096
_NICE = 10  # of the threads that verify while others work


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
