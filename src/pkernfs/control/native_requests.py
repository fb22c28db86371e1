"""Requests about native files: the names of a file lead to its segment, or to the file again.

That changes while nobody has the file open: whoever has would go on with what he has opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import trio

from pkernfs.control import segment_protocol
from pkernfs.control.protocol import Nothing
from pkernfs.control.session import Session
from pkernfs.dma.output import Pause
from pkernfs.dma.reports import walk_files
from pkernfs.errors import BusyError, PkernfsError, RegionError
from pkernfs.pool.pool import Holder, refuse_holders
from pkernfs.quantities import Ino

if TYPE_CHECKING:
    from pkernfs.control.server import Handlers
    from pkernfs.fs.filesystem import FileSystem

_CLOSING_SECONDS = 0.3  # what has just been closed is still being told to the daemon


class Name(NamedTuple):
    """A path from the root of a mount, and the file that has it."""

    path: str
    ino: Ino


async def names_of(
    fs: FileSystem, inos: Iterable[Ino], pause: Callable[[], Awaitable[None]]
) -> list[Name]:
    """Find all names of some files; one that is renamed meanwhile may be missing."""
    names: list[Name] = []
    left = {ino: links for ino in inos if (links := fs.inode(ino).nlink)}
    for found in walk_files(fs) if left else ():
        if isinstance(found, Pause):
            await pause()
        elif found.ino in left:
            names.append(Name(found.path, found.ino))
            left[found.ino] -= 1
            if not left[found.ino]:
                del left[found.ino]
            if not left:
                break
    return names


class NativeRequests:
    """The handlers of one mount. What the requests mean is said with their classes."""

    def __init__(self, fs: FileSystem, session: Session) -> None:
        self._fs = fs
        self._session = session
        self._lock = trio.Lock()

    def handlers(self) -> Handlers:
        """The handlers by request."""
        return {segment_protocol.SetNative: self.set_native}

    async def set_native(self, request: segment_protocol.SetNative) -> Nothing:
        """Change what the names of a file lead to, where it is not that already.

        Who goes away before it has begun has changed nothing. From then on it goes on to its end.
        """
        ino = request.ino
        async with self._lock:
            if request.on:
                await self._session.with_zeroing(lambda: self._fs.natives.check(ino))
                await self._let_close(ino)
                await self._refuse_users(ino, segment=False)
                with trio.CancelScope(shield=True):
                    await self._on(ino)
            elif self._fs.natives.is_native(ino):
                await self._refuse_users(ino, segment=True)
                with trio.CancelScope(shield=True):
                    await self._off(ino)
        return Nothing()

    async def _on(self, ino: Ino) -> None:
        """The file is native first: if the daemon ends, the next mount covers its names."""
        natives = self._fs.natives
        before = natives.is_native(ino)
        await self._session.with_zeroing(lambda: natives.on(ino))
        try:
            for name in await names_of(self._fs, [ino], self._session.pause):
                await self._session.cover(name.path, ino)
            await self._let_close(ino)
            self._check_closed(ino)  # who has opened it meanwhile has the file, not the segment
        except PkernfsError:
            if not before:
                await self._session.uncover(ino)
                natives.off(ino)
            raise

    async def _off(self, ino: Ino) -> None:
        """The file is native until its names lead to it: as above."""
        await self._session.uncover(ino)
        self._fs.natives.off(ino)
        with contextlib.suppress(RegionError):  # it is lost: who reads the file is told
            self._fs.segments.set_owner(self._fs.inode(ino))  # chmod of a name was for it alone

    async def _refuse_users(self, ino: Ino, *, segment: bool) -> None:
        """:raises BusyError: somebody has the file, or else its segment, open or mapped: who."""
        users = await self._session.users(ino, segment=segment)
        refuse_holders(f"inode {ino}", [Holder.of(process) for process in users])
        self._check_closed(ino)

    def _check_closed(self, ino: Ino) -> None:
        if self._fs.is_open(ino):
            raise BusyError(f"inode {ino}: it is open")

    async def _let_close(self, ino: Ino) -> None:
        """Wait a moment for what the kernel has not told yet."""
        with trio.move_on_after(_CLOSING_SECONDS):
            while self._fs.is_open(ino):
                await self._session.drain()
                await trio.sleep(0.001)
