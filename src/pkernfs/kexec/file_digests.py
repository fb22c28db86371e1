"""The digests of files that a handover takes: of their bytes in the region, and in segments.

A segment is mapped when its turn comes, and unmapped after it. One that cannot be read keeps nobody
from a kexec, for its owner may have cut it. A line says so, and the next mount does not compare
that file.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import NamedTuple

from pkernfs.errors import PkernfsError
from pkernfs.fs.fsck.survey import SegmentFile, Survey
from pkernfs.fs.manifest import FileDigests, Holes, chunks_of
from pkernfs.kexec.mounted import MountedFileSystem
from pkernfs.kexec.observer import Observer, Progress
from pkernfs.layout import PAGE
from pkernfs.quantities import FileSpan, RegionOff
from pkernfs.region.digest import Part, Source, digest_sources
from pkernfs.region.region import Region

_SHOWN = 8


class Digests(NamedTuple):
    """The digests of files, the bytes that were read for them, and the seconds that it took.

    ``left_out`` counts the files that could not be read.
    """

    files: list[FileDigests]
    bytes: int
    seconds: float
    left_out: int = 0


class _File(NamedTuple):
    """A file, and where its bytes are in the memory that it is in."""

    spans: list[FileSpan]
    digests: FileDigests


class _Memory:
    """The files in one memory, and the chunks of them that are being read."""

    def __init__(self, files: Iterable[_File], look: Callable[[Region], Holes]) -> None:
        self.files = list(files)
        self.total = sum(span.length for file in self.files for span in file.spans)
        self.read = 0
        self._look = look
        self._chunks: list[dict[int, int]] = []
        self._numbers: array[int] = array("Q")

    def chunks(self, memory: Region) -> Iterator[list[Part]]:
        """Yield the parts of each chunk, and note whose it is."""
        holes = self._look(memory)
        for spans, file in self.files:
            for number, parts in chunks_of(holes, spans):
                self.read += sum(length for _, length in parts)
                self._chunks.append(file.chunks)
                self._numbers.append(number)
                yield parts

    def fill(self, found: array[int]) -> list[FileDigests]:
        """Give each file its digests; they are in the order of the chunks."""
        for chunks, number, digest in zip(self._chunks, self._numbers, found, strict=True):
            chunks[number] = digest
        return [file.digests for file in self.files]


def take_digests(
    mounted: MountedFileSystem,
    region: Region,
    found: Survey,
    observer: Observer,
    threads: int | None = None,
) -> Digests:
    """Take digests of all files, and tell of those who can change them afterwards."""
    start = time.monotonic()
    for process in mounted.other_mappers():
        observer.say(
            f"{mounted.name}: {process} maps the region itself: what it changes "
            "from now on differs from the digests"
        )
    files = [_File(spans, FileDigests(ino, {})) for ino, spans in found.files()]
    flat = _Memory(files, Holes)
    segments = list(found.segment_files())
    memories = [flat, *map(_memory_of, segments)]
    with ExitStack() as stack:
        sources = [Source(lambda: nullcontext(region), flat.chunks)]
        if segments:
            sources += _sources(mounted, region, segments, memories[1:], stack, observer)
        with observer.progress(f"{mounted.name}: digests") as progress:
            results = digest_sources(
                sources, threads=threads, tell=_adding(progress, sum(m.total for m in memories))
            )
    taken, errors = _collect(memories, results)
    if errors:
        _tell_of_errors(mounted, segments, errors, observer)
    size = sum(memory.read for memory in memories)
    return Digests(taken, size, time.monotonic() - start, len(errors))


def _memory_of(file: SegmentFile) -> _Memory:
    length = -(-file.size // PAGE) * PAGE
    spans = [FileSpan(0, length, RegionOff(0))] if length else []
    return _Memory([_File(spans, FileDigests(file.ino, {}, in_segment=True))], Holes.of_segment)


def _sources(
    mounted: MountedFileSystem,
    region: Region,
    segments: list[SegmentFile],
    memories: list[_Memory],
    stack: ExitStack,
    observer: Observer,
) -> Iterator[Source]:
    """Yield the memory of each segment; the pool is open as long as ``stack`` has not ended."""
    rows = [file.row for file in segments]
    try:
        pool = stack.enter_context(mounted.open_pool(region))
    except PkernfsError as e:
        opens = [partial(_refuse, e)] * len(rows)
    else:
        for user in mounted.segment_mappers(pool, rows):
            observer.say(
                f"{mounted.name}: {user}: what it changes from now on differs from the digests"
            )
        opens = [partial(pool.open, row, write=False) for row in rows]
    for opener, memory in zip(opens, memories, strict=True):
        yield Source(opener, memory.chunks)


def _refuse(error: PkernfsError) -> Region:
    raise error


def _adding(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def tell(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    return tell


def _collect(
    memories: list[_Memory], results: list[array[int] | PkernfsError]
) -> tuple[list[FileDigests], dict[int, PkernfsError]]:
    """The digests of files, ascending; and the errors of segments, by their place in the list.

    :raises RegionError: the region itself cannot be read.
    """
    taken: list[FileDigests] = []
    errors: dict[int, PkernfsError] = {}
    for place, (memory, result) in enumerate(zip(memories, results, strict=True)):
        if not isinstance(result, PkernfsError):
            taken += memory.fill(result)
        elif place:
            errors[place - 1] = result
        else:
            raise result
    return sorted(taken, key=lambda file: file.ino), errors


def _tell_of_errors(
    mounted: MountedFileSystem,
    segments: list[SegmentFile],
    errors: dict[int, PkernfsError],
    observer: Observer,
) -> None:
    paths = mounted.segment_paths()
    for place in list(errors)[:_SHOWN]:
        ino, row, _ = segments[place]
        path = paths.get(row.number, f"inode {ino}")
        observer.say(f"{mounted.name}: {path}: no digests: {errors[place]}")
    if len(errors) > _SHOWN:
        observer.say(f"{mounted.name}: no digests of {len(errors) - _SHOWN} more files")
