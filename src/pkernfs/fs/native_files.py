"""Native files: the names of each lead to its segment, by `pkernfs native FILE on|off`.

What the names lead to is for the daemon to see to; here is which files are native.
"""

from __future__ import annotations

from pkernfs.errors import (
    BusyError,
    InvalidError,
    NotSupportedError,
    PermissionDeniedError,
    PkernfsError,
)
from pkernfs.fs.inodes import Inode
from pkernfs.fs.segments import Segments
from pkernfs.fs.super import Super
from pkernfs.layout import (
    INODE_FLAG_NATIVE,
    INODE_FLAG_PENDING,
    INODE_FLAG_SEGMENT,
    INODE_FLAG_TABLE,
    SEGMENT_IN_USE,
)
from pkernfs.quantities import Ino


class NativeFiles:
    """The native files of one file system."""

    def __init__(self, state: Super, segments: Segments) -> None:
        self._super = state
        self._store = state.store
        self._inodes = state.inodes
        self._segments = segments

    def all(self) -> list[Ino]:
        """Every native file. A damaged inode is none: who opens it is told."""
        rows = [row for row in self._segments.table.rows.values() if row.state == SEGMENT_IN_USE]
        return [row.ino for row in rows if self.is_known(row.ino)]

    def is_known(self, ino: Ino) -> bool:
        """As :meth:`is_native`; a file whose inode is damaged is not native."""
        try:
            return self.is_native(ino)
        except PkernfsError:
            return False

    def is_native(self, ino: Ino) -> bool:
        """Tell if a file is native."""
        return bool(self._inodes.get(ino).flags & INODE_FLAG_NATIVE)

    def path(self, ino: Ino) -> str | None:
        """Where the names of a native file lead; None: it has no segment, or there is no pool.

        :raises RegionError: its segment is lost: why.
        :raises WorkNeeded: its segment is not there yet.
        """
        segments = self._segments
        row = segments.find(ino)
        if row is None or segments.pool is None:
            return None
        segments.check_there(row)
        return segments.pool.native_path(segments.find(ino) or row)

    def on(self, ino: Ino) -> None:
        """Have a file be native, at this mount and those to come. It is no error if it is already.

        :raises InvalidError, PermissionDeniedError: it has no segment: why.
        :raises RegionError: its segment is lost.
        :raises BusyError: a change of its size has not ended.
        :raises WorkNeeded: the pool is changing its segment.
        """
        self._super.check_writable()
        self.check(ino)
        self._segments.check_unchanging(ino)
        self._set(ino, native=True)

    def off(self, ino: Ino) -> None:
        """Have a file be none that is native. It is no error if it is not."""
        self._super.check_writable()
        self._set(ino, native=False)

    def check(self, ino: Ino) -> None:
        """:raises PkernfsError: a file cannot be native: why, as of :meth:`on`."""
        inode = self._inodes.get(ino)
        if self._segments.pool is None:
            raise NotSupportedError("the file system has no pool of segments")
        if not inode.is_reg:
            raise InvalidError(f"inode {ino}: not a regular file: it has no segment")
        if inode.flags & INODE_FLAG_TABLE:
            raise PermissionDeniedError("a table file: it is in the region itself")
        if not inode.flags & INODE_FLAG_SEGMENT:
            raise InvalidError(f"inode {ino}: no memory of its own: {_remedy(inode)}")
        if inode.flags & INODE_FLAG_PENDING:  # what is left of a cut would go below the names
            raise BusyError(f"inode {ino}: it is being changed")
        self._segments.check_there(self._segments.of(inode))

    def _set(self, ino: Ino, *, native: bool) -> None:
        inode = self._inodes.get(ino)
        if bool(inode.flags & INODE_FLAG_NATIVE) == native:
            return
        with self._store:
            self._inodes.touch(inode)
            inode.flags ^= INODE_FLAG_NATIVE
            inode.ctime = self._super.clock()
            self._inodes.save(inode)


def _remedy(inode: Inode) -> str:
    return "pkernfs segment FILE on" if inode.size else "truncate -s SIZE FILE"
