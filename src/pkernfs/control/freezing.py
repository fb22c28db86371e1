"""A handover's part in the daemon: freezing, the manifest, the record, thawing.

The command does the long work (checks, digests) in its own process, on its own mapping. Its
connection for :class:`pkernfs.control.protocol.Freeze` is the lease of the freeze: when it goes
away before the commit, the file system thaws.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import trio

from pkernfs.control import protocol, verification
from pkernfs.control.protocol import Frozen, Nothing, OpenForWriting
from pkernfs.control.server import Handlers
from pkernfs.control.session import Session
from pkernfs.dma.mount import tables_of
from pkernfs.errors import BusyError, InvalidError
from pkernfs.quantities import Ino
from pkernfs.vtd.entries import bdf_text

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)

_CLOSING_SECONDS = 0.3  # what has just been closed is still being told to the daemon


class HandoverLease:
    """The handlers of ``pkernfs handover``: one client at a time has the file system frozen."""

    def __init__(self, fs: FileSystem, session: Session) -> None:
        self._fs = fs
        self._session = session
        self._committed: trio.Event | None = None  # there is a lease, or there was one
        self._manifest_bytes = 0

    def handlers(self) -> Handlers:
        """The handlers by request."""
        return {
            protocol.Freeze: self.freeze,
            protocol.MakeManifest: self.make_manifest,
            protocol.WriteManifest: self.write_manifest,
            protocol.Commit: self.commit,
            protocol.Abort: self.abort,
            protocol.HandoverStatus: self.status,
        }

    async def freeze(self, request: protocol.Freeze) -> AsyncIterator[OpenForWriting | Frozen]:
        """Freeze as long as the client listens, or until it commits; not with open files."""
        fs, session = self._fs, self._session
        self._refuse_a_second()
        with trio.move_on_after(_CLOSING_SECONDS):
            while self._writers():
                await session.drain()
                await trio.sleep(0.001)
        async with session.hold_zeroing():
            self._refuse_a_second()
            if writers := self._writers():
                yield OpenForWriting(tuple(writers))
                return
            fs.freeze()
            self._committed = committed = trio.Event()
        try:
            yield Frozen(fs.next_handover, fs.superblock.uuid)
            await committed.wait()
        finally:
            if not committed.is_set():
                self._committed = None
                fs.thaw()
                session.freed()

    def _writers(self) -> list[Ino]:
        """The files that are open for writing, or are being given other memory."""
        return [*self._session.writers(), *self._fs.conversions.under_way]

    def _refuse_a_second(self) -> None:
        if self._fs.frozen:
            if self._under_way():
                raise BusyError("another handover is under way")
            raise BusyError("handed over already; pkernfs handover --abort undoes that")

    def _under_way(self) -> bool:
        return self._committed is not None and not self._committed.is_set()

    def _check_lease(self) -> None:
        if not self._under_way():
            raise InvalidError("handover: no freeze is under way")

    async def make_manifest(self, request: protocol.MakeManifest) -> protocol.ManifestFile:
        """Make room for a manifest."""
        self._check_lease()
        self._manifest_bytes = request.size
        async with self._session.hold_zeroing():  # so that all that is free can be had
            ino, pages = self._fs.make_manifest(request.size)
        return protocol.ManifestFile(ino, tuple(sorted(pages)))

    async def write_manifest(self, request: protocol.WriteManifest) -> Nothing:
        """Store a piece of the manifest."""
        self._check_lease()
        self._fs.write_manifest(request.ino, request.offset, request.data)
        return Nothing()

    async def commit(self, request: protocol.Commit) -> protocol.Committed:
        """Record the handover, and let the client go."""
        self._check_lease()
        assert self._committed is not None
        for source_id in tables_of(self._fs).clear_non_persistent():
            log.warning("device %s: detached: it is not to persist", bdf_text(source_id))
        size = self._manifest_bytes if request.ino else 0
        number = self._fs.hand_over(request.ino, size, request.digest, request.flags)
        self._committed.set()
        log.warning(
            "%s: handed over (number %d): every change is refused until the next mount, or "
            "pkernfs handover --abort",
            self._fs.region.name,
            number,
        )
        return protocol.Committed(number)

    async def abort(self, request: protocol.Abort) -> Nothing:
        """Undo a handover."""
        if self._under_way():
            raise BusyError("a handover is under way: interrupt it")
        self._fs.thaw()
        self._committed = None
        self._session.freed()
        log.warning("%s: the handover was undone", self._fs.region.name)
        return Nothing()

    async def status(self, request: protocol.HandoverStatus) -> protocol.Verification:
        """Tell what has become of the handover before this mount."""
        return verification.describe(self._fs)
