"""Requests about the data of files that pyfuse3 does not have, or not without a copy.

A :class:`DataRequests` is the :class:`pkernfs.fuse.shim.ExtraOperations` of a mount. What the
daemon changes by itself (set-id bits cleared by a write, times of pages that a mapping wrote) is
invalidated here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from pkernfs.errors import Needed
from pkernfs.fuse import shim
from pkernfs.fuse.shim import LATER
from pkernfs.fuse.waiting import Handlers, errno_of, invalidate_attributes
from pkernfs.quantities import Ino

from pyfuse3 import FUSEError  # isort: skip

CAPABILITY = b"security.capability"

_SETID = stat.S_ISUID | stat.S_ISGID
_COPY_BYTES = 1 << 20  # of one copy_file_range: as much as a write
_END = object()


class DataRequests:
    """Write, copy, seek, preallocate and statx; ``handlers`` are those of the same mount.

    ``timeout`` is how long (seconds) the kernel may keep attributes.

    :attr:`invalidated` has the inodes whose attributes the kernel was told to forget, and has not
    asked for since. :attr:`without_capability` has open files without a file capability.
    """

    def __init__(self, handlers: Handlers, timeout: float = 0) -> None:
        self._handlers = handlers
        self._timeout_seconds = int(timeout)
        self._fs = handlers.fs
        self.invalidated: set[Ino] = set()
        self.without_capability: set[Ino] = set()

    def drop_capability(self, ino: Ino) -> None:
        """Remove the file capability, for the file or its owner changes (KILLPRIV_V2)."""
        if CAPABILITY in self._fs.listxattr(ino):
            self._fs.removexattr(ino, CAPABILITY)

    def write(
        self, ino: Ino, data: bytes | memoryview, offset: int, writeback: bool, kill: bool
    ) -> int:
        """Store into the file; invalidate what the kernel does not know to have changed."""
        fs = self._fs
        inode = fs.inode(ino)
        if writeback:  # the kernel only knows that pages went out, not that the times changed
            done = fs.write(ino, offset, data, True)
            if ino not in self.invalidated:  # since the kernel last asked
                self.invalidated.add(ino)
                invalidate_attributes(ino)
            return done
        if ino not in self.without_capability:
            self.drop_capability(ino)
            self.without_capability.add(ino)
        before = inode.mode
        done = fs.write(ino, offset, data, not kill)
        if before & _SETID and fs.inode(ino).mode != before:
            invalidate_attributes(ino)
        return done

    def _later(self, req: Any, counted: bool, task: Callable[[], Awaitable[int]]) -> int:
        """Have a task answer the request."""

        async def answer() -> None:
            try:
                result = await task()
            except FUSEError as e:
                result = -e.errno
            shim.reply_later(req, result, counted=counted)

        assert self._handlers.waiting is not None
        self._handlers.waiting.start(answer)
        return LATER

    def on_write(self, req: Any, ino: Ino, data: memoryview, offset: int, writeback: bool) -> int:
        try:
            return self.write(ino, data, offset, writeback, shim.request.kill)
        except Exception as e:
            if not self._handlers.must_wait(e):
                return -errno_of(self._fs, e)
            reason = e
        kept = bytes(data)  # the buffer is the next request's, and so is the note
        kill = bool(shim.request.kill)

        def again() -> int:
            return self.write(ino, kept, offset, writeback, kill)

        return self._later(req, True, lambda: self._handlers.after_zeroing(reason, again))

    def on_copy(
        self, req: Any, ino_in: Ino, off_in: int, ino_out: Ino, off_out: int, length: int
    ) -> int:
        kill = bool(shim.request.kill)

        def run() -> int:
            data = self._fs.read(ino_in, off_in, min(length, _COPY_BYTES))
            if ino_in == ino_out:
                data = bytes(data)  # the ranges may share a page
            return self.write(ino_out, data, off_out, False, kill) if len(data) else 0

        try:
            return run()
        except Exception as e:
            if not self._handlers.must_wait(e):
                return -errno_of(self._fs, e)
            reason = e
        return self._later(req, True, lambda: self._handlers.after_zeroing(reason, run))

    def on_lseek(self, ino: Ino, offset: int, whence: int) -> int:
        try:
            return self._fs.seek(ino, offset, whence)
        except Exception as e:
            return -errno_of(self._fs, e)

    def on_statx(self, ino: Ino, to: Any) -> int:
        """The attributes of an inode with its birth time; GETATTR has the others alone."""
        try:
            inode = self._fs.inode(ino)
        except Exception as e:
            return -errno_of(self._fs, e)
        to.mode, to.nlink, to.uid, to.gid = inode.mode, inode.nlink, inode.uid, inode.gid
        to.size, to.pages, to.timeout_seconds = inode.size, inode.data_pages, self._timeout_seconds
        to.atime_ns, to.btime_ns = inode.atime, inode.btime
        to.mtime_ns, to.ctime_ns = inode.mtime, inode.ctime
        to.major, to.minor = os.major(inode.rdev), os.minor(inode.rdev)
        self.invalidated.discard(ino)
        return 0

    def on_fallocate(self, req: Any, ino: Ino, mode: int, offset: int, length: int) -> int:
        """Take the first step at once; the others beside other requests."""
        kill = shim.request.kill

        def start() -> Iterator[None]:
            yield from self._fs.fallocate_steps(ino, mode, offset, length)
            self._handlers.freed()
            if kill:
                self._clear_setid(ino)

        steps = start()
        try:
            if next(steps, _END) is _END:
                return 0
        except Exception as e:
            if not self._handlers.must_wait(e):
                return -errno_of(self._fs, e)
            reason = e
            return self._later(req, False, lambda: self._steps_after_zeroing(start, reason))
        return self._later(req, False, lambda: self._remaining(start, steps))

    async def _remaining(self, start: Callable[[], Iterator[None]], steps: Iterator[None]) -> int:
        """Take the steps one by one; 0 or a negative errno. One that has to wait begins again."""
        assert self._handlers.waiting is not None
        try:
            for _ in steps:
                await self._handlers.waiting.pause()
            return 0
        except Needed as e:
            reason = e
        except Exception as e:
            return -errno_of(self._fs, e)
        return await self._steps_after_zeroing(start, reason)

    async def _steps_after_zeroing(
        self, start: Callable[[], Iterator[None]], reason: BaseException
    ) -> int:
        def first_step() -> Iterator[None] | None:
            steps = start()
            return None if next(steps, _END) is _END else steps

        steps = await self._handlers.after_zeroing(reason, first_step)
        return 0 if steps is None else await self._remaining(start, steps)

    def _clear_setid(self, ino: Ino) -> None:
        """Clear the bits as the kernel does: set-gid without group execution is no privilege."""
        mode = self._fs.inode(ino).mode
        left = mode & ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
        if left != mode:
            self._fs.setattr(ino, mode=left & 0o7777)
            invalidate_attributes(ino)
