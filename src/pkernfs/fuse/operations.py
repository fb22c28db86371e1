"""pyfuse3's handlers: each converts, calls the synchronous core, converts.

What a file system is lives in :mod:`pkernfs.fs`; here are only the protocol, the lookup counts and
what the kernel may cache. Writes and what pyfuse3 leaves out are in :mod:`pkernfs.fuse.data`, how a
handler fails or waits in :mod:`pkernfs.fuse.waiting`.

The kernel is told to cache names and attributes for as long as it likes, because every change goes
through it.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pkernfs.errors import (
    CorruptionError,
    ExistsError,
    NotFoundError,
    PkernfsError,
    ReadOnlyError,
)
from pkernfs.fuse import shim
from pkernfs.fuse.data import DataRequests
from pkernfs.fuse.passthrough import Native, Passthrough
from pkernfs.fuse.waiting import errno_of, handler, invalidate_attributes
from pkernfs.fuse.xattr_handlers import XattrHandlers
from pkernfs.quantities import Ino

import pyfuse3  # isort: skip  # after the shim, which must be found first by the linker
from pyfuse3 import EntryAttributes, FUSEError

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem
    from pkernfs.pool.pool import Space

log = logging.getLogger(__name__)

_FOREVER_SECONDS = 365 * 86400.0

#: Bit of a file handle that was opened for writing.
WRITER = 1 << 62
#: Bit of one that counts for passthrough. The rest of it is the inode number.
COUNTED = 1 << 61
#: Any, not int: so ``fh & _INO`` is an Ino without a call, which every read would pay for.
_INO: Any = COUNTED - 1


class Operations(XattrHandlers, pyfuse3.Operations):
    """The handlers of one mount; :attr:`data` has those that the shim adds.

    File handles are inode numbers, with a bit more for those that may write. ``cache`` says how
    files are opened: ``direct`` I/O, through the ``page`` cache, or ``auto``: direct if the kernel
    has shared mappings of such files. ``timeout`` is how long (seconds) the kernel may keep names
    and attributes.

    :attr:`native`, set before FUSE_INIT, has the kernel map files that have memory of their own
    directly; :attr:`passthrough` is None where it does not.
    """

    native: Native | None = None
    passthrough: Passthrough | None = None

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self, fs: FileSystem, *, cache: str = "auto", timeout: float = _FOREVER_SECONDS
    ) -> None:
        super().__init__(fs)
        self.data = DataRequests(self, timeout)
        self.initialized = False
        self._cache = cache
        self.writers: dict[Ino, int] = {}  # how often each inode is open for writing
        self._timeout = timeout
        self._opened = pyfuse3.FileInfo(direct_io=cache == "direct", keep_cache=False)
        self._attribute_cache = fs.attribute_cache
        self._invalidated = self.data.invalidated
        self._without_capability = self.data.without_capability
        self._absent = EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = timeout

    def init(self) -> None:
        """Called by pyfuse3 while FUSE_INIT is being answered: the kernel's offer is known."""
        if self._cache == "auto":
            self._opened.direct_io = shim.may_map_direct()
        if self.native is not None:
            self._pass_through(self.native)
        self.initialized = True

    def _pass_through(self, native: Native) -> None:
        reason = shim.why_no_passthrough()
        if reason is None:
            self.passthrough = Passthrough(native, shim.device())
        else:
            log.warning("segments are mapped through the page cache, not directly: %s", reason)

    # ------------------------------------------------------------------ attributes

    def _attributes(self, ino: Ino) -> EntryAttributes:
        """Return the inode's attributes as pyfuse3 wants them, made once for each change."""
        entry: EntryAttributes | None = self._attribute_cache.get(ino)
        if entry is None:
            now = self.fs.stat(ino)
            entry = EntryAttributes()
            entry.st_ino = ino
            entry.generation = now.generation
            entry.entry_timeout = entry.attr_timeout = self._timeout
            entry.st_mode = now.mode
            entry.st_nlink = now.nlink
            entry.st_uid = now.uid
            entry.st_gid = now.gid
            entry.st_rdev = now.rdev
            entry.st_size = now.size
            entry.st_blocks = now.data_pages * 8
            entry.st_blksize = 4096
            entry.st_atime_ns = now.atime
            entry.st_mtime_ns = now.mtime
            entry.st_ctime_ns = now.ctime
            self._attribute_cache[ino] = entry
            self._invalidated.discard(ino)
        return entry

    def _remembered(self, inode: Any) -> EntryAttributes:
        """Return the same, for a reply that gives the kernel one more reference to the inode."""
        self.fs.remember(inode.ino)
        return self._attributes(inode.ino)

    @handler
    def lookup(self, parent: Ino, name: bytes, ctx: Any) -> EntryAttributes:
        ino = self.fs.find(parent, name)
        if not ino:
            return self._absent
        try:
            entry = self._attributes(ino)
        except NotFoundError:
            raise CorruptionError(
                f"directory {parent}: a name for inode {ino}, which is free"
            ) from None
        self.fs.remember(ino)
        return entry

    @handler
    def getattr(self, ino: Ino, ctx: Any) -> EntryAttributes:
        return self._attributes(ino)

    @handler
    def setattr(self, ino: Ino, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        changes: dict[str, Any] = {}
        if fields.update_mode:
            changes["mode"] = attr.st_mode & 0o7777
        if fields.update_uid:
            changes["uid"] = attr.st_uid
        if fields.update_gid:
            changes["gid"] = attr.st_gid
        if fields.update_atime:
            changes["atime"] = attr.st_atime_ns
        if fields.update_mtime:
            changes["mtime"] = attr.st_mtime_ns
        if fields.update_size:
            changes["size"] = attr.st_size
            changes["privileged"] = not shim.request.kill
        self.fs.setattr(ino, **changes)
        if fields.update_size:
            self.freed()
        if fields.update_size or fields.update_uid or fields.update_gid:
            self.data.drop_capability(ino)
        return self._attributes(ino)

    @handler
    def forget(self, inodes: Sequence[tuple[Ino, int]]) -> None:
        for ino, count in inodes:
            if ino != pyfuse3.ROOT_INODE:
                self.fs.forget(ino, count)
                self._invalidated.discard(ino)
        self.freed()

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """What was just removed is free: a FORGET follows, and may not have been read yet."""
        if self.waiting is not None and self.fs.has_orphans():
            await self.waiting.settle()
        return await self._statfs(await self._pool_space())

    async def _pool_space(self) -> Space | None:
        """Ask the pool in a thread: that takes long if it has many segments. None: there is none.

        :raises FUSEError: it cannot tell.
        """
        pool = self.fs.segments.pool
        if pool is None or self.waiting is None:
            return None
        try:
            return await self.waiting.aside(pool.space)
        except Exception as e:
            raise FUSEError(errno_of(self.fs, e)) from None

    @handler
    def _statfs(self, space: Space | None) -> pyfuse3.StatvfsData:
        now = self.fs.statfs(space)
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = now.block_size
        answer.f_blocks = now.blocks
        answer.f_bfree = now.free
        answer.f_bavail = now.available
        answer.f_files = now.files
        answer.f_ffree = answer.f_favail = now.free_files
        answer.f_namemax = 255
        return answer

    @handler
    def access(self, ino: Ino, mode: int, ctx: Any) -> bool:
        raise FUSEError(errno.ENOSYS)  # default_permissions: the kernel knows

    # ------------------------------------------------------------------ names

    @handler
    def mknod(self, parent: Ino, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        return self._remembered(self.fs.create(parent, name, mode, ctx.uid, ctx.gid, rdev))

    @handler
    def mkdir(self, parent: Ino, name: bytes, mode: int, ctx: Any) -> EntryAttributes:
        return self._remembered(self.fs.mkdir(parent, name, mode, ctx.uid, ctx.gid))

    @handler
    def symlink(self, parent: Ino, name: bytes, target: bytes, ctx: Any) -> EntryAttributes:
        return self._remembered(self.fs.symlink(parent, name, target, ctx.uid, ctx.gid))

    @handler
    def readlink(self, ino: Ino, ctx: Any) -> bytes:
        return self.fs.readlink(ino)

    @handler
    def link(self, ino: Ino, parent: Ino, name: bytes, ctx: Any) -> EntryAttributes:
        return self._remembered(self.fs.link(ino, parent, name))

    @handler
    def unlink(self, parent: Ino, name: bytes, ctx: Any) -> None:
        self.fs.unlink(parent, name)

    @handler
    def rmdir(self, parent: Ino, name: bytes, ctx: Any) -> None:
        self.fs.rmdir(parent, name)

    @handler
    def rename(
        self, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, flags: int, ctx: Any
    ) -> None:
        self.fs.rename(parent, name, new_parent, new_name, flags, ctx.uid, ctx.gid)

    @handler
    def opendir(self, ino: Ino, ctx: Any) -> Ino:
        self.fs.open(ino)
        return ino

    @handler
    def readdir(self, fh: Ino, start: int, token: Any) -> None:
        fs, attributes, reply = self.fs, self._attributes, pyfuse3.readdir_reply
        taken = False
        try:
            for name, ino, _, cookie in fs.readdir(fh, start):
                if not reply(token, name, attributes(ino), cookie):
                    return
                fs.remember(ino)
                taken = True
        except PkernfsError:
            if not taken:
                raise  # else the entries that count are sent, and the next call fails

    @handler
    def releasedir(self, fh: Ino) -> None:
        self.fs.release(fh)

    # ------------------------------------------------------------------ files

    @handler
    def create(self, parent: Ino, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        """Also O_TMPFILE: it comes as CREATE does, with a name that means nothing."""
        fs = self.fs
        if shim.request.tmpfile:
            ino = fs.tmpfile(parent, mode, ctx.uid, ctx.gid).ino
            self._open(ino, flags)
            fs.remember(ino)
            return self._opened, self._attributes(ino)
        if not stat.S_IFMT(mode):
            mode |= stat.S_IFREG
        try:
            inode = fs.create(parent, name, mode, ctx.uid, ctx.gid)
        except ExistsError:
            if flags & os.O_EXCL:
                raise
            inode = fs.lookup(parent, name)
            if flags & os.O_TRUNC:
                inode = self._truncate(inode.ino)
        ino = inode.ino
        self._open(ino, flags)
        fs.remember(ino)
        return self._opened, self._attributes(ino)

    @handler
    def open(self, ino: Ino, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            self._truncate(ino)
        self._open(ino, flags)
        return self._opened

    def _open(self, ino: Ino, flags: int) -> None:
        """Count a handle and put it into the answer."""
        if self.passthrough is not None:  # which has to know the segment
            self.fs.segments.check_unchanging(ino)
        fh = self._opened.fh = self._count_handle(ino, flags)
        if self.passthrough is None:
            return
        # Nobody maps a file by a handle that only writes: truncate(1) leaves the choice to others.
        only_writes = flags & os.O_ACCMODE == os.O_WRONLY and self._opened.direct_io
        if not only_writes or self.passthrough.passes(ino):
            fh = self._opened.fh = fh | COUNTED
            shim.pass_through(fh, self.passthrough.opened(ino))

    def _count_handle(self, ino: Ino, flags: int) -> int:
        if not flags & os.O_ACCMODE:
            self.fs.open(ino)
            return ino
        if self.fs.read_only:  # what a mapping wrote could not be stored: refuse it in time
            raise ReadOnlyError("read-only file system")
        self.fs.open(ino)
        self.writers[ino] = self.writers.get(ino, 0) + 1
        return ino | WRITER

    def _truncate(self, ino: Ino) -> Any:
        """Truncate for O_TRUNC; the kernel invalidates its own size, but not the mode."""
        before = self.fs.inode(ino).mode
        inode = self.fs.setattr(ino, size=0, privileged=not shim.request.kill)
        self.freed()
        self.data.drop_capability(ino)
        if inode.mode != before:
            invalidate_attributes(ino)
        return inode

    @handler
    def read(self, fh: int, offset: int, length: int) -> Any:  # bytes, or the region's own memory
        data = self.fs.read(fh & _INO, offset, length)
        return data if self.fs.region.has_pages else bytes(data)

    @handler
    def write(self, fh: int, offset: int, data: bytes) -> int:
        """Only called where the shim does not serve writes."""
        return self.data.write(fh & _INO, data, offset, False, shim.request.kill)

    @handler
    def flush(self, fh: int) -> None:
        raise FUSEError(errno.ENOSYS)  # said once; nothing is ever held back

    @handler
    def release(self, fh: int) -> None:
        ino: Ino = fh & _INO
        if fh & WRITER:
            left = self.writers.get(ino, 0) - 1
            if left > 0:
                self.writers[ino] = left
            else:
                self.writers.pop(ino, None)
        if self.passthrough is not None and fh & COUNTED:
            self.passthrough.released(ino)
        self._without_capability.discard(ino)
        self.fs.release(ino)
        self.freed()

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Nothing to do for memory; else msync in a thread.

        Never ENOSYS: the kernel would stop asking. It does not notice that a daemon has gone when
        it writes mapped pages back, and so an msync would succeed with nobody there.
        """
        if not self.fs.region.needs_sync:
            return
        if self.waiting is None:
            raise FUSEError(errno.ENOSYS)
        try:
            await self.waiting.sync()
            return
        except Exception as e:
            raise FUSEError(errno_of(self.fs, e)) from None

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """As :meth:`fsync`; but names are never held back by the kernel, so ENOSYS is safe."""
        if not self.fs.region.needs_sync:
            raise FUSEError(errno.ENOSYS)
        await self.fsync(fh, datasync)
