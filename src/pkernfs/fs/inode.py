"""The life of inodes, from the first look-up to the last handle, and their attributes.

An inode without names is an orphan: it goes, with its data, when the last handle is closed and the
last look-up forgotten. Until then it can be opened: of a descriptor made with O_PATH no more is
known here than the look-up. A file that was made without a name may get one until then.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator

from pkernfs.errors import CorruptionError, RegionError, StaleError, TimeRangeError
from pkernfs.fs.extents import LAST_PAGE, ExtentMap
from pkernfs.fs.file import Files
from pkernfs.fs.inodes import Inode, clear_set_id
from pkernfs.fs.pins import PinGuard
from pkernfs.fs.segments import Segments
from pkernfs.fs.super import Super
from pkernfs.fs.xattrs import Overflow, Xattrs
from pkernfs.layout import (
    INODE_FLAG_BODY,
    INODE_FLAG_PENDING,
    INODE_FLAG_SEGMENT,
    INODE_FLAG_TABLE,
    PAGE,
)
from pkernfs.pool.pool import Owner
from pkernfs.quantities import Ino

log = logging.getLogger(__name__)

_PERMISSIONS = 0o7777
_S64_MAX = (1 << 63) - 1


class InodeLife:
    """Every inode of one file system, whatever names it has."""

    def __init__(
        self,
        state: Super,
        extents: ExtentMap,
        overflow: Overflow,
        files: Files,
        segments: Segments,
        pins: PinGuard,
    ) -> None:
        self._super = state
        self._segments = segments
        self._store = state.store
        self._blocks = state.blocks
        self._inodes = state.inodes
        self._map = extents
        self._overflow = overflow
        self._xattrs = Xattrs(state.store, state.pages, state.superblock.fields.hash_key, overflow)
        self._files = files
        self._pins = pins
        self._opens: dict[Ino, int] = {}
        self._lookups: dict[Ino, int] = {}
        self._orphans: set[Ino] = set()  # in use, to be freed when they no longer are
        self._unnamed: set[Ino] = set()  # those of them that never had a name

    def numbers(self) -> Iterator[Ino]:
        """Every inode number in use, ascending. Others may run in between: what is there all the
        time is returned once, whatever name it has.
        """
        for ino in self._inodes.numbers():
            yield ino
            self._inodes.trim()

    def new(self, mode: int, uid: int, gid: int) -> Inode:
        """Make an inode without a name, in the open transaction; the caller saves it.

        :raises NoSpaceError: the inode table cannot grow.
        """
        inode = self._inodes.new(mode)
        inode.uid = uid
        inode.gid = gid
        inode.atime = inode.mtime = inode.ctime = inode.btime = self._super.clock()
        return inode

    # ------------------------------------------------------------------ files without a name

    def expect_name(self, ino: Ino) -> None:
        """A file was made without a name: until its last user goes, it may be opened and linked."""
        self._orphans.add(ino)
        self._unnamed.add(ino)

    def expects_name(self, ino: Ino) -> bool:
        """Tell if a file was made without a name and has had none since."""
        return ino in self._unnamed

    def has_name(self, ino: Ino) -> None:
        """An inode has a name."""
        if ino in self._unnamed:
            self._unnamed.discard(ino)
            self._orphans.discard(ino)

    def has_orphans(self) -> bool:
        """Tell if something waits for its last user to go; what is removed does so for a moment."""
        return bool(self._orphans)

    # ------------------------------------------------------------------ who uses them

    def remember(self, ino: Ino, n: int = 1) -> None:
        """The kernel knows the inode ``n`` times more."""
        self._lookups[ino] = self._lookups.get(ino, 0) + n

    def forget(self, ino: Ino, n: int) -> None:
        """The kernel knows the inode ``n`` times less; one without names goes with the last."""
        left = self._lookups.get(ino, 0) - n
        if left > 0:
            self._lookups[ino] = left
        else:
            self._lookups.pop(ino, None)
            self._reclaim(ino)

    def open(self, ino: Ino) -> Inode:
        """Count an open handle; the inode lives at least as long.

        :raises StaleError: a file without a name that nobody uses: an earlier daemon left it.
        """
        inode = self._inodes.get(ino)
        if inode.is_reg and not inode.nlink and ino not in self._orphans:
            raise StaleError(f"inode {ino}: was removed")
        self._opens[ino] = self._opens.get(ino, 0) + 1
        return inode

    def is_open(self, ino: Ino) -> bool:
        """Tell if there are open handles of an inode."""
        return ino in self._opens

    def release(self, ino: Ino) -> None:
        """An open handle less."""
        left = self._opens.get(ino, 0) - 1
        if left > 0:
            self._opens[ino] = left
        else:
            self._opens.pop(ino, None)
            self._reclaim(ino)

    def _in_use(self, ino: Ino) -> bool:
        return ino in self._opens or ino in self._lookups

    def _reclaim(self, ino: Ino) -> None:
        if ino not in self._orphans or self._in_use(ino) or self._super.read_only:
            return
        self._orphans.discard(ino)
        self._unnamed.discard(ino)
        inode = self._inodes.get(ino)
        if not inode.nlink:
            self.evict(inode)

    def reclaim_all(self) -> None:
        """Free what lost its last user while nothing could be freed."""
        self._segments.settle()
        for ino in list(self._orphans):
            self._reclaim(ino)

    def forget_all(self) -> None:
        """Nobody uses any inode any more."""
        self._opens.clear()
        self._lookups.clear()

    # ------------------------------------------------------------------ the end of one

    def drop_link(self, inode: Inode) -> bool:
        """Take a name away, in the open transaction; False: :meth:`evict` the inode after it."""
        self._inodes.touch(inode)
        if not inode.nlink:
            raise CorruptionError(f"inode {inode.ino}: a name, but a link count of 0")
        inode.nlink -= 1
        inode.ctime = self._super.clock()
        if inode.nlink:
            self._inodes.save(inode)
            return True
        self._blocks.drop_preallocation(inode.ino)
        if self._in_use(inode.ino):
            self._orphans.add(inode.ino)
            self._inodes.save(inode)
            return True
        return self._free_some(inode)

    def drop_directory(self, inode: Inode) -> None:
        """Take an empty directory's only name away, in the open transaction."""
        self._inodes.touch(inode)
        inode.nlink = 0
        inode.ctime = self._super.clock()
        if self._in_use(inode.ino):
            self._orphans.add(inode.ino)
            self._inodes.save(inode)
        else:
            self._free(inode)

    def evict(self, inode: Inode) -> None:
        """Free an inode that has no name and all it holds."""
        self._blocks.drop_preallocation(inode.ino)
        whole = False
        while not whole:
            with self._store:
                self._inodes.touch(inode)
                whole = self._free_some(inode)

    def _free_some(self, inode: Inode) -> bool:
        """Free as much as fits the transaction; True if that was all, and the inode with it."""
        if inode.is_reg and inode.data_pages and self._map.remove(inode, 0, LAST_PAGE + 1):
            self._inodes.save(inode)
            return False
        self._free(inode)
        return True

    def _free(self, inode: Inode) -> None:
        if inode.flags & INODE_FLAG_SEGMENT:
            self._segments.drop(inode)
        self._xattrs.destroy(inode)
        if stat.S_ISLNK(inode.mode) and inode.flags & INODE_FLAG_BODY:
            self._overflow.free(inode.ino, inode.body, inode.size)
        self._inodes.free(inode)

    def finish(self, inode: Inode) -> None:
        """Complete what an interrupted operation left of an inode."""
        start = inode.pending_start // PAGE if inode.nlink else 0
        if (not inode.nlink or inode.flags & INODE_FLAG_PENDING) and self._pins.is_held(
            inode, start, LAST_PAGE + 1
        ):
            log.error("inode %d: to be freed, but mapped for DMA: run fsck.pkernfs", inode.ino)
            return
        if not inode.nlink:
            self.evict(inode)
        elif inode.flags & INODE_FLAG_PENDING and not self._segments.is_lost(inode):
            self._finish_pending(inode)

    def _finish_pending(self, inode: Inode) -> None:
        try:
            self._files.finish_pending(inode)
        except RegionError as e:  # its segment can go at any time; the file is all that suffers
            log.error("inode %d: %s", inode.ino, e)

    def free_unnamed(self, inode: Inode) -> None:
        """Inside a transaction: free an inode that has neither a name nor data."""
        self._blocks.drop_preallocation(inode.ino)
        self._free(inode)

    def discard(self, ino: Ino) -> None:
        """Free a file that never had a name, and its data; later if nothing may be changed now."""
        self._orphans.add(ino)
        self._reclaim(ino)

    # ------------------------------------------------------------------ attributes

    def setattr(
        self,
        ino: Ino,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
        privileged: bool = True,
        group_member: bool = True,
    ) -> Inode:
        """Change attributes. Times are ns since 1970.

        A new owner or group clears the set-id bits of a file, and so does a new size unless
        ``privileged``; a mode set by someone who is neither ``privileged`` nor in the group loses
        set-gid. Growing allocates, shrinking frees.

        :raises IsDirError, InvalidError, TooBigError, PermissionDeniedError: a bad size.
        :raises BusyError: another size of a native file.
        :raises TimeRangeError: a time that the format has not.
        :raises NoSpaceError: nothing was changed.
        :raises RegionError: the segment is lost, or cannot be given to the new owner.
        """
        self._super.check_writable()
        inode = self._inodes.get(ino)
        _check_time(atime)
        _check_time(mtime)
        if size is not None:
            was_cut = self._files.is_being_cut(inode, size)
            self._prepare_size(inode, size)
            if was_cut and (mode, uid, gid, atime, mtime) == (None,) * 5:
                return inode  # this is a second call
        if inode.flags & INODE_FLAG_SEGMENT and (mode, uid, gid) != (None, None, None):
            self._set_segment_owner(inode, mode, uid, gid)
        with self._store:
            self._inodes.touch(inode)
            now = self._super.clock()
            inode.ctime = now
            if mode is not None:
                self._set_mode(inode, mode, privileged or group_member)
            if uid is not None or gid is not None:
                self._set_owner(inode, uid, gid)
            if size is not None:
                inode.mtime = now
                if not privileged:
                    clear_set_id(inode)
                self._files.set_size(inode, size)
            if atime is not None:
                inode.atime = atime
            if mtime is not None:
                inode.mtime = mtime
            self._inodes.save(inode)
        if inode.flags & INODE_FLAG_PENDING:
            self._files.finish_pending(inode)
        if size is not None and inode.flags & INODE_FLAG_TABLE:
            self._pins.pins.changed()
        return inode

    def _set_segment_owner(
        self, inode: Inode, mode: int | None, uid: int | None, gid: int | None
    ) -> None:
        """Before the transaction: if it is refused, the file stays as it was.

        If the daemon stops in between, the mount gives the segment the owner of the file again.
        """
        self._segments.set_owner(
            inode,
            Owner(
                inode.uid if uid is None else uid,
                inode.gid if gid is None else gid,
                (inode.mode if mode is None else mode) & 0o777,
            ),
        )

    def _prepare_size(self, inode: Inode, size: int) -> None:
        """Do what another size needs before the transaction with it."""
        self._files.check_resize(inode, size)
        if inode.flags & INODE_FLAG_SEGMENT:
            self._files.finish_earlier(inode)
        if size > inode.size:
            self._files.grow(inode, size)
        elif size < inode.size:
            self._pins.check_unpinned(inode, size // PAGE)
            if inode.flags & INODE_FLAG_SEGMENT:
                self._segments.check_unused(inode, size)

    def _set_mode(self, inode: Inode, mode: int, may_set_gid: bool) -> None:
        mode &= _PERMISSIONS
        if not may_set_gid and not inode.is_dir:
            mode &= ~stat.S_ISGID
        inode.mode = stat.S_IFMT(inode.mode) | mode

    def _set_owner(self, inode: Inode, uid: int | None, gid: int | None) -> None:
        if uid is not None:
            inode.uid = uid
        if gid is not None:
            inode.gid = gid
        if not inode.is_dir:
            clear_set_id(inode)

    # ------------------------------------------------------------------ extended attributes

    def getxattr(self, ino: Ino, name: bytes) -> bytes:
        """:raises NoDataError: there is no such attribute."""
        return self._xattrs.get(self._inodes.get(ino), name)

    def listxattr(self, ino: Ino) -> list[bytes]:
        """Names of the attributes, with their namespaces."""
        return self._xattrs.list(self._inodes.get(ino))

    def setxattr(self, ino: Ino, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute; ``flags`` are XATTR_CREATE and XATTR_REPLACE.

        :raises ExistsError, NoDataError, NotSupportedError, ArgumentTooLongError: as setxattr(2).
        """
        self._super.check_writable()
        inode = self._inodes.get(ino)
        with self._store:
            self._inodes.touch(inode)
            self._xattrs.set(inode, name, bytes(value), flags)
            inode.ctime = self._super.clock()
            self._inodes.save(inode)
            self._super.leave_reserve()

    def removexattr(self, ino: Ino, name: bytes) -> None:
        """:raises NoDataError: there is no such attribute."""
        self._super.check_writable()
        inode = self._inodes.get(ino)
        with self._store:
            self._inodes.touch(inode)
            self._xattrs.remove(inode, name)
            inode.ctime = self._super.clock()
            self._inodes.save(inode)


def _check_time(ns: int | None) -> None:
    """:raises TimeRangeError: it cannot be stored. Another time than the given one would be."""
    if ns is not None and not -_S64_MAX - 1 <= ns <= _S64_MAX:
        raise TimeRangeError(f"time {ns}: expected nanoseconds since 1970 in 64 bits")
