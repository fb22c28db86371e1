"""Files that have data already get a segment, or lose theirs: `pkernfs segment FILE on|off`.

The bytes are copied aside (:class:`~pkernfs.errors.WorkNeeded`), into memory that no file has yet.
Then one transaction lets the file have that memory instead. Before it, a mount undoes what was
made; after it, a mount frees what the file had.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from pkernfs.errors import (
    BusyError,
    InvalidError,
    Needed,
    NoSpaceError,
    NotSupportedError,
    PermissionDeniedError,
    RegionError,
)
from pkernfs.fs.extents import LAST_PAGE, ExtentMap
from pkernfs.fs.file import Files
from pkernfs.fs.inode import InodeLife
from pkernfs.fs.inodes import Inode
from pkernfs.fs.pins import PinGuard
from pkernfs.fs.segment_memory import copy_bytes
from pkernfs.fs.segments import Segments
from pkernfs.fs.super import Super
from pkernfs.journal import TransactionTooLarge
from pkernfs.layout import (
    INODE_FLAG_NATIVE,
    INODE_FLAG_PENDING,
    INODE_FLAG_SEGMENT,
    INODE_FLAG_SEGMENT_OFF,
    INODE_FLAG_SEGMENT_ON,
    INODE_FLAG_TABLE,
    PAGE,
    page_offset,
)
from pkernfs.pool.pool import Segment
from pkernfs.quantities import FileSpan, Ino, RegionOff

T = TypeVar("T")
#: The steps of a conversion: each yields what must be done before it goes on.
_Steps = Generator[Needed, None, None]


class _Stamp(NamedTuple):
    """What changes with every change of a file."""

    ctime: int
    mtime: int
    data_pages: int
    flags: int


@dataclass
class _Job:
    """A conversion under way, and what it has made that no file has yet."""

    ino: Ino
    stamp: _Stamp
    steps: _Steps = field(init=False)
    made: Segment | None = None
    blocks: Ino | None = None  # an inode without a name
    locked_out: bool = False


class Conversions:
    """The conversions of one file system.

    Each operation raises :class:`~pkernfs.errors.Needed` until all is done, and is called again
    after that. Who does not call it again calls :meth:`give_up`.
    """

    def __init__(
        self,
        state: Super,
        extents: ExtentMap,
        files: Files,
        life: InodeLife,
        segments: Segments,
        pins: PinGuard,
    ) -> None:
        self._super = state
        self._store = state.store
        self._inodes = state.inodes
        self._map = extents
        self._files = files
        self._life = life
        self._segments = segments
        self._pins = pins
        self._jobs: dict[Ino, _Job] = {}

    @property
    def under_way(self) -> list[Ino]:
        """The files that are being converted."""
        return list(self._jobs)

    def on(self, ino: Ino) -> None:
        """Give a file a segment with the bytes that it has; it wants one from here on.

        An empty file gets its segment with its memory.

        :raises NoSpaceError: the pool has no room; the file stays as it was.
        :raises BusyError: it is mapped for DMA, or was changed meanwhile.
        :raises InvalidError, PermissionDeniedError: it can have none.
        """
        self._go(ino, self._on)

    def off(self, ino: Ino) -> None:
        """Give a file blocks of the region with the bytes of its segment; it wants none.

        :raises NoSpaceError: the region has no room; the file stays as it was.
        :raises BusyError: somebody holds the segment, or it was changed meanwhile.
        :raises RegionError: the segment is lost.
        :raises InvalidError, PermissionDeniedError: it can have none.
        """
        self._go(ino, self._off)

    def _go(self, ino: Ino, steps: Callable[[_Job], _Steps]) -> None:
        """Begin a conversion, or go on with it."""
        job = self._jobs.get(ino) or self._begin(ino, steps)
        try:
            self._super.check_writable()
            need = next(job.steps, None)
        except BaseException:
            self.give_up(ino)
            raise
        if need is not None:
            raise need
        self._end(ino)

    def _begin(self, ino: Ino, steps: Callable[[_Job], _Steps]) -> _Job:
        self._super.check_writable()
        inode = self._inodes.get(ino)
        self._check(inode)
        job = _Job(ino, _stamp(inode))
        job.steps = steps(job)
        self._jobs[ino] = job
        self._segments.converting.add(ino)
        return job

    def _check(self, inode: Inode) -> None:
        """:raises PkernfsError: the file cannot be converted: why."""
        if self._segments.pool is None:
            raise NotSupportedError("the file system has no pool of segments")
        if not inode.is_reg:
            raise InvalidError(f"inode {inode.ino}: not a regular file: it has no segment")
        if inode.flags & INODE_FLAG_TABLE:
            raise PermissionDeniedError("a table file: it is in the region itself")
        if not inode.nlink:
            raise InvalidError(f"inode {inode.ino}: the file has no name")
        if inode.flags & INODE_FLAG_NATIVE:
            raise BusyError(f"inode {inode.ino}: it is native: pkernfs native FILE off")
        if inode.flags & INODE_FLAG_PENDING:
            raise BusyError(f"inode {inode.ino}: it is being changed")
        self._pins.check_unpinned(inode)

    def _inode(self, job: _Job) -> Inode:
        """The inode of a file that is being converted.

        :raises BusyError: it is not what it was at the beginning.
        """
        inode = self._inodes.get(job.ino)
        if _stamp(inode) != job.stamp or not inode.nlink:
            raise BusyError(f"inode {job.ino}: it was changed meanwhile")
        return inode

    # ------------------------------------------------------------------ both ways

    def _on(self, job: _Job) -> _Steps:
        inode = self._inode(job)
        size = max(inode.size, self._end_of_data(inode))
        if inode.flags & INODE_FLAG_SEGMENT or not size:
            self._choose(inode, INODE_FLAG_SEGMENT_ON)
            return
        made = yield from _until(lambda: self._segments.make(self._inode(job), size))
        job.made = made
        extents = self._map.within(inode, 0, LAST_PAGE + 1)
        spans = [FileSpan(e.file_page * PAGE, e.pages * PAGE, page_offset(e.page)) for e in extents]
        yield from self._copied(job, lambda: self._copy_to(made, spans))
        inode = self._inode(job)
        self._pins.check_unpinned(inode)
        try:
            with self._store:
                self._segments.become(inode, made)
                self._set_choice(inode, INODE_FLAG_SEGMENT_ON)
        except TransactionTooLarge:
            raise NoSpaceError(f"inode {job.ino}: in too many pieces to get a segment") from None
        job.made = None
        self._segments.set_owner(inode)

    def _off(self, job: _Job) -> _Steps:
        inode = self._inode(job)
        if not inode.flags & INODE_FLAG_SEGMENT:
            self._choose(inode, INODE_FLAG_SEGMENT_OFF)
            return
        row, size = self._segments.of(inode), inode.size
        if reason := self._segments.lost.get(row.number):
            raise RegionError(f"inode {job.ino}: {reason}")
        yield from self._unused(job)
        blocks = job.blocks = self._new_inode()
        yield from _until(lambda: self._files.grow(self._inodes.get(blocks), size))
        self._set_size(blocks, size)
        spans = self._files.extents(blocks)
        job.locked_out = True
        self._segments.lock_out(self._inode(job))
        yield from self._unused(job)
        yield from self._copied(job, lambda: self._copy_from(row, spans))
        yield from self._unused(job)  # root opens it all the same
        inode = self._inode(job)
        self._pins.check_unpinned(inode)
        try:
            self._swap(inode, self._inodes.get(blocks))
        except TransactionTooLarge:
            raise NoSpaceError(f"inode {job.ino}: its blocks are in too many pieces") from None
        job.blocks = None
        job.locked_out = False

    def _unused(self, job: _Job) -> Generator[Needed, None, None]:
        def check() -> None:
            inode = self._inode(job)
            self._segments.check_unused(inode, inode.size)

        yield from _until(check)

    def _copied(self, job: _Job, copy: Callable[[], None]) -> Generator[Needed, None, None]:
        yield from _until(lambda: self._segments.aside(job.ino, "copy", copy))

    def _copy_to(self, made: Segment, spans: list[FileSpan]) -> None:
        """Copy what a file has in the region into a segment; in a thread."""
        region = self._super.region
        with self._segments.open(made, write=True) as target:
            for offset, length, at in spans:
                copy_bytes(region, at, target, RegionOff(offset), length)

    def _copy_from(self, row: Segment, spans: list[FileSpan]) -> None:
        """Copy a segment into blocks of the region; in a thread."""
        region = self._super.region
        with self._segments.open(row, write=False) as source:
            for offset, length, at in spans:
                copy_bytes(source, RegionOff(offset), region, at, min(length, source.size - offset))

    def _swap(self, inode: Inode, blocks: Inode) -> None:
        """One transaction: the file has the blocks, and nobody has its segment."""
        with self._store:
            self._inodes.touch(inode)
            self._inodes.touch(blocks)
            self._segments.drop(inode)
            self._map.move(blocks, inode)
            self._set_choice(inode, INODE_FLAG_SEGMENT_OFF)
            self._life.free_unnamed(blocks)

    # ------------------------------------------------------------------ the parts

    def _end_of_data(self, inode: Inode) -> int:
        """The end in bytes of the last page that a file has."""
        last = self._map.at(inode, LAST_PAGE)
        return 0 if last is None else (last.file_page + last.pages) * PAGE

    def _choose(self, inode: Inode, flag: int) -> None:
        with self._store:
            self._inodes.touch(inode)
            self._set_choice(inode, flag)

    def _set_choice(self, inode: Inode, flag: int) -> None:
        inode.flags &= ~(INODE_FLAG_SEGMENT_ON | INODE_FLAG_SEGMENT_OFF)
        inode.flags |= flag
        inode.ctime = self._super.clock()
        self._inodes.save(inode)

    def _new_inode(self) -> Ino:
        """An inode without a name: a mount frees it."""
        with self._store:
            inode = self._life.new(stat.S_IFREG | 0o600, 0, 0)
            self._inodes.save(inode)
        return inode.ino

    def _set_size(self, ino: Ino, size: int) -> None:
        inode = self._inodes.get(ino)
        with self._store:
            self._inodes.touch(inode)
            self._files.set_size(inode, size)
            self._inodes.save(inode)

    # ------------------------------------------------------------------ the end

    def give_up(self, ino: Ino) -> None:
        """Undo what a conversion has made; the file is as it was. It is no error if there is none.

        What a file system that failed meanwhile cannot undo, the next mount does.
        """
        job = self._end(ino)
        if job is None:
            return
        self._segments.give_up(ino)
        if job.made is not None:
            self._segments.kill(job.made)
        if job.locked_out:
            self._segments.set_owner(self._inodes.get(ino))
        if job.blocks is not None:
            self._life.discard(job.blocks)

    def _end(self, ino: Ino) -> _Job | None:
        self._segments.converting.discard(ino)
        return self._jobs.pop(ino, None)


def _until(operation: Callable[[], T]) -> Generator[Needed, None, T]:
    """Yield what ``operation`` needs until it is content; return its value."""
    while True:
        try:
            return operation()
        except Needed as need:
            reason = need
        yield reason


def _stamp(inode: Inode) -> _Stamp:
    return _Stamp(inode.ctime, inode.mtime, inode.data_pages, inode.flags)
