"""The FUSE adapter: each handler converts, calls the synchronous core, converts.

What a file system is lives in :mod:`pkernfs.fs.filesystem`; here are only the protocol, the lookup
counts, what the kernel may cache, and the mapping of errors. Handlers do not wait: the core runs to
completion. The two that must (more zeroing than fits a request, fsync of a region on a disk) go
through :attr:`Operations.waiting`, which keeps other requests served meanwhile.

The kernel is told to cache names and attributes for as long as it likes, because every change goes
through it. What the daemon changes by itself (set-id bits cleared by a write, times of pages that a
shared mapping wrote) is invalidated here.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import stat
import struct
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pkernfs.errors import (
    CorruptionError,
    ExistsError,
    NoDataError,
    NoSpaceError,
    NotFoundError,
    NotSupportedError,
    PkernfsError,
    ReadOnlyError,
    ZeroingNeeded,
)
from pkernfs.fuse import shim  # before pyfuse3: it must be found first by the linker
from pkernfs.fuse.shim import LATER

import pyfuse3  # isort: skip
from pyfuse3 import EntryAttributes, FUSEError

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)

_FOREVER_SECONDS = 365 * 86400.0
_SETID = stat.S_ISUID | stat.S_ISGID
_CAPABILITY = b"security.capability"
_NAMESPACES = (b"user.", b"trusted.", b"security.")

#: Virtual attribute: the extents of a file, 32 bytes each, from index N with a suffix ``.N``.
EXTENTS_XATTR = b"system.pkernfs.extents"
_EXTENT = struct.Struct("<QQQQ")
_EXTENTS_PER_PAGE = 65536 // _EXTENT.size
_NO_ADDRESS = 2**64 - 1

#: Bit of a file handle that was opened for writing, and the rest of it.
WRITER = 1 << 62
_INO = WRITER - 1

_COPY_BYTES = 1 << 20  # of one copy_file_range: as much as a write
_END = object()

_Result = TypeVar("_Result")


class Waiting(Protocol):
    """How a handler waits while other requests are served (the daemon provides it)."""

    def turn(self) -> contextlib.AbstractAsyncContextManager[object]:
        """Others are served meanwhile, but nobody else zeroes: what is free can be allocated."""

    async def settle(self) -> None:
        """Wait until the requests that are there already have been handled."""

    async def zero(self, need: ZeroingNeeded) -> None:
        """Zero what an operation needs, in a thread; inside :meth:`turn`."""

    async def sync(self) -> None:
        """Write the region back to its disk, in a thread, while others are served."""

    async def pause(self) -> None:
        """Let other requests be served before the caller goes on."""

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run ``task`` beside the session loop."""


def _fail(fs: FileSystem, error: BaseException) -> int:
    """The errno for a failed operation; corruption ends writing, a bug leaves a traceback."""
    if isinstance(error, CorruptionError):
        fs.fail(str(error))  # logs it, once
        return error.errno
    if isinstance(error, PkernfsError):
        return error.errno
    log.error("unexpected error", exc_info=error)
    return errno.EIO


def handler(
    function: Callable[..., _Result],
) -> Callable[..., Coroutine[Any, Any, _Result]]:
    """Make a pyfuse3 handler of a synchronous method: errors become errnos, zeroing is waited for.

    The method runs again after the zeroing, so it must change nothing before the core is called.
    """

    @functools.wraps(function)
    async def wrapper(self: Operations, *args: Any) -> _Result:
        try:
            return function(self, *args)
        except FUSEError:
            raise
        except Exception as e:
            if not self.must_wait(e):
                raise FUSEError(_fail(self.fs, e)) from None
            reason = e
        return await self.after_zeroing(reason, functools.partial(function, self, *args))

    return wrapper


class Operations(pyfuse3.Operations):
    """pyfuse3's handlers, and the added ones of :class:`pkernfs.fuse.shim.Server`.

    File handles are inode numbers, with a bit more for those that may write. ``cache`` says how
    files are opened: ``direct`` I/O, through the ``page`` cache, or ``auto``: direct if the kernel
    has shared mappings of such files. ``timeout`` is how long (seconds) the kernel may keep names
    and attributes. :attr:`freed` is called when memory may have become free.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self, fs: FileSystem, *, cache: str = "auto", timeout: float = _FOREVER_SECONDS
    ) -> None:
        super().__init__()
        self.fs = fs
        self.initialized = False
        self._cache = cache
        self.waiting: Waiting | None = None
        self.freed: Callable[[], None] = lambda: None
        self.writers: dict[int, int] = {}  # how often each inode is open for writing
        self._timeout = timeout
        self._opened = pyfuse3.FileInfo(direct_io=cache == "direct", keep_cache=False)
        self._cookies = fs.cookies
        self._invalidated: set[int] = set()  # the kernel knows that it does not know them
        self._without_capability: set[int] = set()  # open files known to have no such xattr
        self._absent = EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = timeout

    def init(self) -> None:
        """Called by pyfuse3 while FUSE_INIT is being answered: the kernel's offer is known."""
        if self._cache == "auto":
            self._opened.direct_io = shim.may_map_direct()
        self.initialized = True

    def must_wait(self, error: BaseException) -> bool:
        """Whether an operation that failed is to be tried again by :meth:`after_zeroing`.

        So it is if there is no space: blocks that are being zeroed cannot be allocated, and those
        of a file that was unlinked just before come with a FORGET that has not been read yet.
        """
        return self.waiting is not None and isinstance(error, (ZeroingNeeded, NoSpaceError))

    async def after_zeroing(self, reason: BaseException, again: Callable[[], _Result]) -> _Result:
        """Zero what ``reason`` asks for and call ``again``, until it is content.

        :raises FUSEError: what ``again`` failed with.
        """
        assert self.waiting is not None
        try:
            async with self.waiting.turn():
                if not isinstance(reason, ZeroingNeeded):
                    await self.waiting.settle()
                while True:
                    if isinstance(reason, ZeroingNeeded):
                        await self.waiting.zero(reason)
                    try:
                        return again()
                    except ZeroingNeeded as more:
                        reason = more
        except FUSEError:
            raise
        except Exception as e:
            raise FUSEError(_fail(self.fs, e)) from None

    # ------------------------------------------------------------------ attributes

    def _attributes(self, ino: int) -> EntryAttributes:
        """The inode's attributes as pyfuse3 wants them, made once for each change."""
        entry: EntryAttributes | None = self._cookies.get(ino)
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
            self._cookies[ino] = entry
            self._invalidated.discard(ino)
        return entry

    def _remembered(self, inode: Any) -> EntryAttributes:
        """The same, for a reply that gives the kernel one more reference to the inode."""
        self.fs.remember(inode.ino)
        return self._attributes(inode.ino)

    @handler
    def lookup(self, parent: int, name: bytes, ctx: Any) -> EntryAttributes:
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
    def getattr(self, ino: int, ctx: Any) -> EntryAttributes:
        return self._attributes(ino)

    @handler
    def setattr(self, ino: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
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
            self._drop_capability(ino)
        return self._attributes(ino)

    @handler
    def forget(self, inodes: Sequence[tuple[int, int]]) -> None:
        for ino, count in inodes:
            if ino != pyfuse3.ROOT_INODE:
                self.fs.forget(ino, count)
                self._invalidated.discard(ino)
        self.freed()

    @handler
    def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        now = self.fs.statfs()
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
    def access(self, ino: int, mode: int, ctx: Any) -> bool:
        raise FUSEError(errno.ENOSYS)  # default_permissions: the kernel knows

    # ------------------------------------------------------------------ names

    @handler
    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        return self._remembered(self.fs.create(parent, name, mode, ctx.uid, ctx.gid, rdev))

    @handler
    def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> EntryAttributes:
        return self._remembered(self.fs.mkdir(parent, name, mode, ctx.uid, ctx.gid))

    @handler
    def symlink(self, parent: int, name: bytes, target: bytes, ctx: Any) -> EntryAttributes:
        return self._remembered(self.fs.symlink(parent, name, target, ctx.uid, ctx.gid))

    @handler
    def readlink(self, ino: int, ctx: Any) -> bytes:
        return self.fs.readlink(ino)

    @handler
    def link(self, ino: int, parent: int, name: bytes, ctx: Any) -> EntryAttributes:
        return self._remembered(self.fs.link(ino, parent, name))

    @handler
    def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        self.fs.unlink(parent, name)

    @handler
    def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        self.fs.rmdir(parent, name)

    @handler
    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Any
    ) -> None:
        self.fs.rename(parent, name, new_parent, new_name, flags)

    @handler
    def opendir(self, ino: int, ctx: Any) -> int:
        self.fs.open(ino)
        return ino

    @handler
    def readdir(self, fh: int, start: int, token: Any) -> None:
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
    def releasedir(self, fh: int) -> None:
        self.fs.release(fh)

    # ------------------------------------------------------------------ files

    @handler
    def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        fs = self.fs
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
    def open(self, ino: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            self._truncate(ino)
        self._open(ino, flags)
        return self._opened

    def _open(self, ino: int, flags: int) -> None:
        """Count a handle and put it into the answer."""
        if not flags & os.O_ACCMODE:
            self.fs.open(ino)
            self._opened.fh = ino
            return
        if self.fs.read_only:  # what a mapping wrote could not be stored: refuse it in time
            raise ReadOnlyError("read-only file system")
        self.fs.open(ino)
        self.writers[ino] = self.writers.get(ino, 0) + 1
        self._opened.fh = ino | WRITER

    def _truncate(self, ino: int) -> Any:
        """What O_TRUNC does; the kernel invalidates its own size, but not the mode."""
        before = self.fs.inode(ino).mode
        inode = self.fs.setattr(ino, size=0, privileged=not shim.request.kill)
        self.freed()
        self._drop_capability(ino)
        if inode.mode != before:
            _invalidate(ino)
        return inode

    @handler
    def read(self, fh: int, offset: int, length: int) -> Any:  # bytes, or the region's own memory
        data = self.fs.read(fh & _INO, offset, length)
        return data if self.fs.region.has_pages else bytes(data)

    @handler
    def write(self, fh: int, offset: int, data: bytes) -> int:
        """Only called where the shim does not serve writes."""
        return self._write(fh & _INO, data, offset, False, shim.request.kill)

    @handler
    def flush(self, fh: int) -> None:
        raise FUSEError(errno.ENOSYS)  # said once; nothing is ever held back

    @handler
    def release(self, fh: int) -> None:
        ino = fh & _INO
        if fh & WRITER:
            left = self.writers.get(ino, 0) - 1
            if left > 0:
                self.writers[ino] = left
            else:
                self.writers.pop(ino, None)
        self._without_capability.discard(ino)
        self.fs.release(ino)
        self.freed()

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Nothing to do for memory; else msync in a thread.

        Never ENOSYS: the kernel would stop asking, and since it does not notice that a daemon has
        gone when it writes mapped pages back, an msync would succeed with nobody there.
        """
        if not self.fs.region.needs_sync:
            return
        if self.waiting is None:
            raise FUSEError(errno.ENOSYS)
        try:
            await self.waiting.sync()
            return
        except Exception as e:
            raise FUSEError(_fail(self.fs, e)) from None

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """As :meth:`fsync`; but names are never held back by the kernel, so ENOSYS is safe."""
        if not self.fs.region.needs_sync:
            raise FUSEError(errno.ENOSYS)
        await self.fsync(fh, datasync)

    # ------------------------------------------------------------------ extended attributes

    @handler
    def getxattr(self, ino: int, name: bytes, ctx: Any) -> bytes:
        if name.startswith(EXTENTS_XATTR):
            return self._extents(ino, name, ctx.uid == 0)
        _check_namespace(name)
        return self.fs.getxattr(ino, name)

    @handler
    def setxattr(self, ino: int, name: bytes, value: bytes, ctx: Any) -> None:
        """XATTR_CREATE and XATTR_REPLACE: pyfuse3 has looked already, and nothing runs between."""
        _check_namespace(name)
        if name == _CAPABILITY:
            self._without_capability.discard(ino)
        self.fs.setxattr(ino, name, value, 0)

    @handler
    def removexattr(self, ino: int, name: bytes, ctx: Any) -> None:
        _check_namespace(name)
        self.fs.removexattr(ino, name)

    @handler
    def listxattr(self, ino: int, ctx: Any) -> list[bytes]:
        names = self.fs.listxattr(ino)
        if ctx.uid:
            names = [name for name in names if not name.startswith(b"trusted.")]
        return names

    def _extents(self, ino: int, name: bytes, with_addresses: bool) -> bytes:
        suffix = name[len(EXTENTS_XATTR) :]
        if suffix and not (suffix[:1] == b"." and suffix[1:].isdigit() and len(suffix) < 20):
            raise NoDataError("no such virtual attribute")
        start = int(suffix[1:] or 0)
        answer = bytearray()
        for piece in itertools.islice(self._pieces(ino, with_addresses), start, None):
            answer += _EXTENT.pack(*piece)
            if len(answer) == _EXTENTS_PER_PAGE * _EXTENT.size:
                break
        return bytes(answer)

    def _pieces(self, ino: int, with_addresses: bool) -> Iterator[tuple[int, int, int, int]]:
        """The extents, with addresses cut where those jump (huge pages lie anywhere)."""
        for e in self.fs.extents(ino):
            if not with_addresses:
                yield e.offset, e.length, e.region_offset, _NO_ADDRESS
                continue
            for at, length, address in self.fs.region.physical_runs(e.region_offset, e.length):
                offset = e.offset + at - e.region_offset
                yield offset, length, at, _NO_ADDRESS if address is None else address

    def _drop_capability(self, ino: int) -> None:
        """File capabilities do not survive a change of the file or its owner (KILLPRIV_V2)."""
        if _CAPABILITY in self.fs.listxattr(ino):
            self.fs.removexattr(ino, _CAPABILITY)

    # ------------------------------------------------------------------ what the shim adds

    def _write(
        self, ino: int, data: bytes | memoryview, offset: int, writeback: bool, kill: bool
    ) -> int:
        """Store into the file; invalidate what the kernel does not know to have changed."""
        fs = self.fs
        inode = fs.inode(ino)
        if writeback:  # the kernel only knows that pages went out, not that the times changed
            done = fs.write(ino, offset, data, True)
            if ino not in self._invalidated:  # since the kernel last asked
                self._invalidated.add(ino)
                _invalidate(ino)
            return done
        if ino not in self._without_capability:
            self._drop_capability(ino)
            self._without_capability.add(ino)
        before = inode.mode
        done = fs.write(ino, offset, data, not kill)
        if before & _SETID and fs.inode(ino).mode != before:
            _invalidate(ino)
        return done

    def _later(self, req: Any, counted: bool, task: Callable[[], Awaitable[int]]) -> int:
        """Have a task answer the request."""

        async def answer() -> None:
            try:
                result = await task()
            except FUSEError as e:
                result = -e.errno
            shim.reply_later(req, result, counted=counted)

        assert self.waiting is not None
        self.waiting.start(answer)
        return LATER

    def on_write(self, req: Any, ino: int, data: memoryview, offset: int, writeback: bool) -> int:
        try:
            return self._write(ino, data, offset, writeback, shim.request.kill)
        except Exception as e:
            if not self.must_wait(e):
                return -_fail(self.fs, e)
            reason = e
        kept = bytes(data)  # the buffer is the next request's, and so is the note
        kill = bool(shim.request.kill)

        def again() -> int:
            return self._write(ino, kept, offset, writeback, kill)

        return self._later(req, True, lambda: self.after_zeroing(reason, again))

    def on_copy(
        self, req: Any, ino_in: int, off_in: int, ino_out: int, off_out: int, length: int
    ) -> int:
        kill = bool(shim.request.kill)

        def run() -> int:
            data = self.fs.read(ino_in, off_in, min(length, _COPY_BYTES))
            if ino_in == ino_out:
                data = bytes(data)  # the ranges may share a page
            return self._write(ino_out, data, off_out, False, kill) if len(data) else 0

        try:
            return run()
        except Exception as e:
            if not self.must_wait(e):
                return -_fail(self.fs, e)
            reason = e
        return self._later(req, True, lambda: self.after_zeroing(reason, run))

    def on_lseek(self, ino: int, offset: int, whence: int) -> int:
        try:
            return self.fs.seek(ino, offset, whence)
        except Exception as e:
            return -_fail(self.fs, e)

    def on_fallocate(self, req: Any, ino: int, mode: int, offset: int, length: int) -> int:
        """The first step at once; what zeroes much of a file goes on beside other requests."""
        kill = shim.request.kill

        def start() -> Iterator[None]:
            yield from self.fs.fallocate_steps(ino, mode, offset, length)
            self.freed()
            if kill:
                self._clear_setid(ino)

        steps = start()
        try:
            if next(steps, _END) is _END:
                return 0
        except Exception as e:
            if not self.must_wait(e):
                return -_fail(self.fs, e)
            reason = e
            return self._later(req, False, lambda: self._steps_after_zeroing(start, reason))
        return self._later(req, False, lambda: self._remaining(steps))

    async def _remaining(self, steps: Iterator[None]) -> int:
        """Take the steps one by one; 0 or a negative errno."""
        assert self.waiting is not None
        try:
            for _ in steps:
                await self.waiting.pause()
            return 0
        except Exception as e:
            return -_fail(self.fs, e)

    async def _steps_after_zeroing(
        self, start: Callable[[], Iterator[None]], reason: BaseException
    ) -> int:
        def first_step() -> Iterator[None] | None:
            steps = start()
            return None if next(steps, _END) is _END else steps

        steps = await self.after_zeroing(reason, first_step)
        return 0 if steps is None else await self._remaining(steps)

    def _clear_setid(self, ino: int) -> None:
        """As the kernel does it: set-gid without group execution is not about privileges."""
        mode = self.fs.inode(ino).mode
        left = mode & ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
        if left != mode:
            self.fs.setattr(ino, mode=left & 0o7777)
            _invalidate(ino)


def _invalidate(ino: int) -> None:
    """Have the kernel ask for an inode's attributes again; that does not wait for anything."""
    with contextlib.suppress(OSError):  # the kernel has just forgotten it
        pyfuse3.invalidate_inode(ino, attr_only=True)


def _check_namespace(name: bytes) -> None:
    if not name.startswith(_NAMESPACES):
        raise NotSupportedError("extended attributes: no such namespace")
