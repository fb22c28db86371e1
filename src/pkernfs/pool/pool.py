"""Segments, and the interface of the pools that they come from.

The file system decides which file has which segment, and records it before the memory is used. A
pool makes the memory, opens it, and takes it apart; it remembers nothing that can be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from pkernfs.errors import BusyError
from pkernfs.host.holders import Holding, Target
from pkernfs.host.iomem import Span
from pkernfs.layout import SEGMENT_NEW
from pkernfs.quantities import Ino, SegmentNo
from pkernfs.region.region import Region


class Segment(NamedTuple):
    """A row of the table of segments (docs/format.md, section 12); ``length`` in bytes."""

    number: SegmentNo
    ino: Ino
    kind: int
    length: int
    state: int = SEGMENT_NEW
    node: int | None = None
    valid: int = 0
    handle: int = 0
    align: int = 0
    name: str = ""
    pieces: tuple[Span, ...] = ()


class Owner(NamedTuple):
    """Who may open a segment: user, group, permission bits of the mode."""

    uid: int
    gid: int
    mode: int


class Space(NamedTuple):
    """The memory of a pool, in bytes: all of it, what no segment has, the longest piece of that."""

    total: int
    free: int
    largest: int


class Holder(NamedTuple):
    """Who has a segment open or mapped: a process (``pid``), or something else (0)."""

    pid: int
    name: str
    how: str

    def __str__(self) -> str:
        who = f"process {self.pid} ({self.name})" if self.pid else self.name
        return f"{who} {self.how} it"

    @classmethod
    def of(cls, process: Holding) -> Holder:
        """A process that the kernel names."""
        return cls(process.pid, process.command, "maps" if process.maps else "has opened")


def refuse_holders(what: str, holders: Sequence[Holder]) -> None:
    """:raises BusyError: there are any: the first of them, and how many more."""
    if holders:
        more = f", and {len(holders) - 1} more" if len(holders) > 1 else ""
        raise BusyError(f"{what}: busy: {holders[0]}{more}")


#: The file of a mount by which the kernel passes mappings through to a segment; None: none now.
Passed = Callable[[Segment], Target | None]


def nothing_is_passed(_segment: Segment) -> Target | None:
    """No mount passes mappings through to a segment."""
    return None


class Pool(Protocol):
    """Where the segments of one file system come from.

    Those marked *quick* take less than a millisecond. The others are called in a worker thread, and
    never two of them at once. The caller has no mapping of a segment that it has a pool change.
    Each that takes a segment raises :class:`~pkernfs.errors.RegionError` if that is lost, and
    :class:`~pkernfs.errors.BusyError` if somebody keeps others from opening it.
    """

    #: A ``POOL_`` constant of :mod:`pkernfs.layout`.
    kind: int
    #: The length of each segment is a multiple of this, in bytes.
    granule: int
    #: The name of the pool, for messages.
    name: str
    #: The kernel itself has a segment open while it passes mappings through: that holds nobody up,
    #: but such a mapping does.
    passed: Passed

    @property
    def passes(self) -> bool:
        """The kernel can pass the mappings of a mount through to the segments."""

    def capacity(self) -> int:
        """Quick. Return how many bytes all segments together can have, if nothing else is there."""

    def space(self) -> Space:
        """Look how much memory there is. Any thread may do that, beside all others."""

    def plan(self, wanted: Segment, others: list[Segment]) -> Segment:
        """Choose the memory of a new segment, or of one that grows to ``wanted.length``.

        :param wanted: pieces that it has already stay the first.
        :param others: every other row of the table: their memory is not to be had.
        :raises NoSpaceError: full, or too fragmented: the message says the largest piece.
        """

    def create(self, segment: Segment) -> Segment:
        """Make what the row says: all zero, for root only. Returns it as it is now.

        :raises NoSpaceError: there is no memory.
        :raises RegionError: the kernel refuses.
        """

    def park(self, rows: list[Segment]) -> list[SegmentNo]:
        """At a mount: keep the memory of segments in use from others, if that is cheaper for now.

        Returns the numbers of those of which it was done, those first that are best restored first.
        Nobody needs to wait for that; but before, they can only be destroyed. The others are to be
        restored at once. What an earlier call has left is forgotten.
        """

    def restore(self, segment: Segment) -> Segment:
        """At a mount: make a segment in use again if it is not there, and check it if it is.

        It is as long as the row says then: what a cut, or growth that was interrupted, has left
        over is cut. All of it is valid.

        :raises RegionError: it is lost, or not what it was: why. Nothing was changed.
        """

    def check_unused(self, segment: Segment) -> None:
        """:raises BusyError: somebody has it open or mapped; the message says who."""

    def resize(self, segment: Segment) -> Segment:
        """Make a segment as long as its row says, longer or shorter than it is.

        All that it has from ``segment.valid`` on is zero then, and returned as valid: it may have
        been longer before than the row said. It keeps its owner and mode.

        :raises BusyError: somebody has it open or mapped, and would lose it.
        :raises NoSpaceError: there is no memory.
        """

    def punch(self, segment: Segment, start: int, end: int) -> None:
        """Zero bytes start..end-1, whole pages of which the memory goes back where it can.

        :raises BusyError: as for :meth:`resize`.
        """

    def destroy(self, segment: Segment) -> None:
        """Give the memory back. It is no error if there is nothing.

        What has come into its place and is not ours stays, and is logged.

        :raises BusyError: somebody has it and would lose it: it is to be tried again later.
        :raises RegionError: the kernel refuses: likewise.
        """

    def strays(self, known: list[Segment]) -> list[str]:
        """Remove what this file system has made and no row knows; name what may not be ours."""

    def set_owner(self, segment: Segment, owner: Owner) -> None:
        """Quick. Let ``owner`` open the segment, and nobody else but root.

        Also if it was cut: it is still what its file had.
        """

    def open(self, segment: Segment, *, write: bool) -> Region:
        """Quick. Map a segment.

        :raises RegionError: it is not there, or not what it was.
        """

    def native_path(self, segment: Segment) -> str:
        """Quick. The path by which other programs open the segment.

        :raises RegionError: it is not there.
        """

    def holders(self, segment: Segment) -> list[Holder]:
        """Ask the kernel who has it open or mapped, but for this process."""

    def close(self) -> None:
        """Let go of the pool; the segments stay."""
