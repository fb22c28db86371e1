"""Failing and waiting of FUSE handlers: errnos, and zeroed memory.

Handlers do not wait: the core runs to completion. Those that must (more zeroing than fits a
request, fsync of a region on a disk) go through :attr:`Handlers.waiting`, which keeps other
requests served meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pkernfs.errors import (
    CorruptionError,
    Needed,
    NoSpaceError,
    PkernfsError,
    RegionError,
    WorkNeeded,
    ZeroingNeeded,
)
from pkernfs.fuse import shim  # before pyfuse3: it must be found first by the linker
from pkernfs.quantities import Ino
from pkernfs.ratelimit import RateLimit

import pyfuse3  # isort: skip
from pyfuse3 import FUSEError

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)
_losses = RateLimit(log)

_Result = TypeVar("_Result")


class Work(Protocol):
    """What takes long for an operation; others are served meanwhile."""

    async def zero(self, need: ZeroingNeeded) -> None:
        """Zero what an operation needs, in a thread; inside :meth:`Waiting.turn`."""

    async def work(self, need: WorkNeeded) -> None:
        """Do the work that an operation needs, in a thread; inside :meth:`Waiting.pool_turn`."""


class Waiting(Work, Protocol):
    """The session's ways to wait in a handler while other requests are served."""

    def turn(self) -> contextlib.AbstractAsyncContextManager[object]:
        """Serve others meanwhile, but let nobody else zero: what is free can be allocated."""

    def pool_turn(self) -> contextlib.AbstractAsyncContextManager[object]:
        """Serve others meanwhile, but let nobody else change the pool of segments."""

    async def drain(self) -> None:
        """Wait until the requests that are there already have been handled."""

    async def settle(self) -> None:
        """As :meth:`drain`, outside :meth:`turn`: others are served meanwhile."""

    async def sync(self) -> None:
        """Write the region back to its disk, in a thread, while others are served."""

    async def aside(self, work: Callable[[], _Result]) -> _Result:
        """Run ``work`` in a thread, while others are served."""

    async def pause(self) -> None:
        """Let other requests be served before the caller goes on."""

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run ``task`` beside the session loop."""


def errno_of(fs: FileSystem, error: BaseException) -> int:
    """Return the errno of a failed operation.

    Corruption ends writing, a bug leaves a traceback, a segment that is lost one line.
    """
    if isinstance(error, CorruptionError):
        fs.fail(str(error))  # logs it, once
        return error.errno
    if isinstance(error, RegionError):  # its errno says why, which is none of the caller's business
        _losses.once(str(error))
        return errno.EIO
    if isinstance(error, PkernfsError):
        return error.errno
    log.error("unexpected error", exc_info=error)
    return errno.EIO


class Handlers:
    """The common part of a mount's handlers: the core, and the way to wait.

    :attr:`waiting` is None where no session runs; :attr:`freed` is called when memory may have
    become free.
    """

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.waiting: Waiting | None = None
        self.freed: Callable[[], None] = lambda: None

    def must_wait(self, error: BaseException) -> bool:
        """Tell whether :meth:`after_zeroing` shall try a failed operation again.

        So it is if there is no space: blocks that are being zeroed cannot be allocated. Those of a
        file that was unlinked just before come with a FORGET that has not been read yet.
        """
        return self.waiting is not None and isinstance(error, (Needed, NoSpaceError))

    async def after_zeroing(self, reason: BaseException, again: Callable[[], _Result]) -> _Result:
        """Do what ``reason`` asks for and call ``again``, until it is content.

        :raises FUSEError: what ``again`` failed with.
        """
        try:
            while True:
                wait = self._after_work if isinstance(reason, WorkNeeded) else self._after_zeroing
                try:
                    return await wait(reason, again)
                except Needed as other:  # of the other kind: no two turns are held at once
                    reason = other
        except FUSEError:
            raise
        except Exception as e:
            raise FUSEError(errno_of(self.fs, e)) from None

    async def _after_work(self, reason: BaseException, again: Callable[[], _Result]) -> _Result:
        assert self.waiting is not None
        async with self.waiting.pool_turn():  # so that what is planned is what is made
            return await until_worked(self.fs, self.waiting, again)

    async def _after_zeroing(self, reason: BaseException, again: Callable[[], _Result]) -> _Result:
        assert self.waiting is not None
        async with self.waiting.turn():
            if isinstance(reason, ZeroingNeeded):
                need = reason
            else:
                await self.waiting.drain()
                need = ZeroingNeeded([])  # what was held may be nobody's by now
            return await until_zeroed(self.waiting, need, again)


async def until_worked(fs: FileSystem, waiting: Work, operation: Callable[[], _Result]) -> _Result:
    """Give an operation its turn at the pool, and do what it needs; nobody else has one."""
    with fs.segments.turn() as call:
        while True:
            try:
                result: _Result = call(operation)
            except WorkNeeded as need:
                await waiting.work(need)
            else:
                return result


async def until_zeroed(
    waiting: Work, need: ZeroingNeeded, operation: Callable[[], _Result]
) -> _Result:
    """Zero what an operation needs, and call it, until it is content; nobody else zeroes."""
    while True:
        await waiting.zero(need)
        try:
            return operation()
        except ZeroingNeeded as more:
            need = more


def handler(
    function: Callable[..., _Result],
) -> Callable[..., Coroutine[Any, Any, _Result]]:
    """Make a pyfuse3 handler of a synchronous method: errors become errnos, zeroing is waited for.

    The method runs again after the zeroing, so it must change nothing before the core is called.
    It then finds the note on its own request again, though others were read meanwhile.
    """

    @functools.wraps(function)
    async def wrapper(self: Handlers, *args: Any) -> _Result:
        try:
            return function(self, *args)
        except FUSEError:
            raise
        except Exception as e:
            if not self.must_wait(e):
                raise FUSEError(errno_of(self.fs, e)) from None
            reason = e
        note = shim.Note.take()

        def again() -> _Result:
            with note.in_force():
                return function(self, *args)

        return await self.after_zeroing(reason, again)

    return wrapper


def invalidate_attributes(ino: Ino) -> None:
    """Have the kernel ask for an inode's attributes again; that does not wait for anything."""
    with contextlib.suppress(OSError):  # the kernel has just forgotten it
        pyfuse3.invalidate_inode(ino, attr_only=True)
