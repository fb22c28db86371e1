"""Requests about segments: a file gets or loses one; which there are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Literal

import trio

from pkernfs.control import segment_protocol
from pkernfs.control.protocol import Nothing
from pkernfs.control.segment_protocol import SegmentRow
from pkernfs.control.session import Session
from pkernfs.dma.output import Pause
from pkernfs.dma.reports import walk_files
from pkernfs.errors import BusyError
from pkernfs.layout import SEGMENT_DEAD, SEGMENT_IN_USE, SEGMENT_NEW
from pkernfs.pool.pool import Segment
from pkernfs.quantities import Ino

if TYPE_CHECKING:
    from pkernfs.control.server import Handlers
    from pkernfs.fs.filesystem import FileSystem

_CLOSING_SECONDS = 0.3  # what has just been closed is still being told to the daemon
_STATES: dict[int, Literal["new", "in use", "dead"]] = {
    SEGMENT_NEW: "new",
    SEGMENT_IN_USE: "in use",
    SEGMENT_DEAD: "dead",
}


class SegmentRequests:
    """The handlers of one mount. What the requests mean is said with their classes."""

    def __init__(self, fs: FileSystem, session: Session) -> None:
        self._fs = fs
        self._session = session
        self._lock = trio.Lock()  # one conversion at a time: they copy as fast as memory is

    def handlers(self) -> Handlers:
        """The handlers by request."""
        return {
            segment_protocol.SetSegment: self.set_segment,
            segment_protocol.ListSegments: self.list_segments,
        }

    async def set_segment(self, request: segment_protocol.SetSegment) -> Nothing:
        """Convert a file that is not in use."""
        ino, conversions = request.ino, self._fs.conversions
        convert = conversions.on if request.on else conversions.off

        def step() -> None:
            self._check_closed(ino, on=request.on)
            convert(ino)

        async with self._lock:
            await self._let_close(ino)
            try:
                await self._session.with_zeroing(step)
            finally:
                conversions.give_up(ino)  # unless it has ended
        self._session.freed()
        await self._session.invalidate(ino, data=True)
        return Nothing()

    async def _let_close(self, ino: Ino) -> None:
        """Wait a moment for what the kernel has not told yet."""
        with trio.move_on_after(_CLOSING_SECONDS):
            while self._fs.is_open(ino):
                await self._session.drain()
                await trio.sleep(0.001)

    def _check_closed(self, ino: Ino, *, on: bool) -> None:
        """:raises BusyError: somebody may change the file, or may read the segment that it loses.

        The kernel reads and maps a segment without the daemon if the file is open (passthrough).
        """
        if ino in self._session.writers():
            raise BusyError(f"inode {ino}: it is open for writing")
        if not on and self._fs.is_open(ino):
            raise BusyError(f"inode {ino}: it is open")

    async def list_segments(
        self, request: segment_protocol.ListSegments
    ) -> AsyncIterator[SegmentRow]:
        """Tell each row of the table."""
        rows = sorted(self._fs.segments.table.rows.values())
        paths = await self._paths({row.ino for row in rows if row.state == SEGMENT_IN_USE})
        for row in rows:
            yield self._row(row, paths.get(row.ino, ""))

    def _row(self, row: Segment, path: str) -> SegmentRow:
        segments = self._fs.segments
        return SegmentRow(
            row.number,
            row.ino,
            path if row.state == SEGMENT_IN_USE else "",
            _STATES[row.state],
            row.length,
            segments.native_path(row) or "",
            segments.lost.get(row.number, ""),
            row.state == SEGMENT_IN_USE and self._fs.natives.is_known(row.ino),
        )

    async def _paths(self, wanted: set[Ino]) -> dict[Ino, str]:
        """A path of each of these files; one that is renamed meanwhile may be missing."""
        paths: dict[Ino, str] = {}
        for found in walk_files(self._fs) if wanted else ():
            if isinstance(found, Pause):
                await self._session.pause()
            elif found.ino in wanted:
                paths.setdefault(found.ino, found.path)
                if len(paths) == len(wanted):
                    break
        return paths
