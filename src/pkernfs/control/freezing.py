"""A handover's part in the daemon: freezing, the list, the record, thawing; and its outcome.

The command does the long work (checks, digests) in its own process, on its own mapping. Its
connection for ``handover_freeze`` is the lease of the freeze: when it goes away before
``handover_commit``, the file system thaws.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import trio

from pkernfs.control.server import Handler
from pkernfs.control.session import Session
from pkernfs.errors import BusyError, InvalidError, PkernfsError
from pkernfs.fs import manifest
from pkernfs.vtd.entries import bdf_text

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)

_CLOSING_SECONDS = 0.3  # what has just been closed is still being told to the daemon


def handlers(fs: FileSystem, session: Session) -> dict[str, Handler]:
    """The operations of ``pkernfs handover`` and ``pkernfs info``."""
    desk = _Desk(fs, session)
    return {
        "handover_freeze": desk.freeze,
        "handover_make_list": desk.make_list,
        "handover_write_list": desk.write_list,
        "handover_commit": desk.commit,
        "handover_abort": desk.abort,
        "handover_status": desk.status,
    }


class _Desk:
    def __init__(self, fs: FileSystem, session: Session) -> None:
        self._fs = fs
        self._session = session
        self._committed: trio.Event | None = None  # there is a lease, or there was one
        self._list_bytes = 0

    async def freeze(self, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Freeze as long as the client listens, or until it commits.

        Yields ``{"writers": {inode: times}}`` and ends if files are open for writing.
        """
        fs, session = self._fs, self._session
        self._refuse_a_second()
        with trio.move_on_after(_CLOSING_SECONDS):
            while session.writers():
                await session.settle()
                await trio.sleep(0.001)
        async with session.hold_zeroing():
            self._refuse_a_second()
            if session.writers():
                yield {"writers": session.writers()}
                return
            fs.freeze()
            self._committed = committed = trio.Event()
        try:
            yield {"number": fs.next_handover, "uuid": fs.superblock.uuid.hex()}
            await committed.wait()
        finally:
            if not committed.is_set():
                self._committed = None
                fs.thaw()
                session.freed()

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

    async def make_list(self, args: dict[str, Any]) -> dict[str, Any]:
        """Room for a list of ``bytes``; its ``ino``, and the metadata ``pages`` that changed."""
        self._check_lease()
        self._list_bytes = _number(args, "bytes")
        ino, pages = self._fs.make_list(self._list_bytes)
        return {"ino": ino, "pages": sorted(pages)}

    async def write_list(self, args: dict[str, Any]) -> None:
        """Store ``data`` (base64) at ``offset`` of the list ``ino``."""
        self._check_lease()
        try:
            data = base64.b64decode(str(args.get("data")), validate=True)
        except binascii.Error:
            raise InvalidError("handover: the data is not base64") from None
        self._fs.write_list(_number(args, "ino"), _number(args, "offset"), data)

    async def commit(self, args: dict[str, Any]) -> int:
        """Record the handover, with a list (``ino``, ``digest``, ``flags``) unless ``ino`` is 0."""
        self._check_lease()
        assert self._committed is not None
        ino = _number(args, "ino")
        for source_id in self._fs.cut_off_transient():
            log.warning("device %s: detached: it is not to persist", bdf_text(source_id))
        number = self._fs.hand_over(
            ino, self._list_bytes if ino else 0, _number(args, "digest"), _number(args, "flags")
        )
        self._committed.set()
        log.warning(
            "%s: handed over (number %d): every change is refused until the next mount, or "
            "pkernfs handover --abort",
            self._fs.region.name,
            number,
        )
        return number

    async def abort(self, args: dict[str, Any]) -> None:
        """Undo a handover."""
        if self._under_way():
            raise BusyError("a handover is under way: interrupt it")
        self._fs.thaw()
        self._committed = None
        self._session.freed()
        log.warning("%s: the handover was undone", self._fs.region.name)

    async def status(self, args: dict[str, Any]) -> dict[str, Any]:
        """What has become of the handover before this mount."""
        return describe(self._fs)


def describe(fs: FileSystem) -> dict[str, Any]:
    """The ``verification`` of ``pkernfs info --json``."""
    arrival = fs.arrival
    if arrival is None or arrival.record is None:
        return {"state": "none", "trouble": "", "changes": []}
    verifier = arrival.verifier
    state = "done" if verifier is None or verifier.finished else "running"
    return {
        "state": state,
        "trouble": arrival.trouble,
        "done_bytes": verifier.done_bytes if verifier else 0,
        "total_bytes": verifier.total_bytes if verifier else 0,
        "not_verified": len(verifier.skipped) if verifier else 0,
        "changes": manifest.tell(fs, arrival.changes),
    }


def _number(args: dict[str, Any], name: str) -> int:
    value = args.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise InvalidError(f"handover: bad {name}: got {value!r}")
    return value


async def verify(fs: FileSystem) -> None:
    """Compare the data of files with their digests, while others are served."""
    arrival = fs.arrival
    if arrival is None or arrival.verifier is None or arrival.verifier.finished:
        return
    verifier = arrival.verifier
    before = len(arrival.changes)
    try:
        for batch in verifier.batches():
            differ = await trio.to_thread.run_sync(verifier.run, batch)
            verifier.take(batch, differ)
    except PkernfsError as e:
        arrival.trouble = str(e)
        log.error("%s: cannot compare with the handover: %s", fs.region.name, e)
    fs.end_verification()
    if len(arrival.changes) > before:
        for line in lines(fs):
            log.error("%s", line)


def verify_now(fs: FileSystem) -> None:
    """The same, before anybody is served."""
    arrival = fs.arrival
    if arrival is None or arrival.verifier is None:
        return
    verifier = arrival.verifier
    for batch in verifier.batches():
        verifier.take(batch, verifier.run(batch))
    fs.end_verification()


def lines(fs: FileSystem) -> list[str]:
    """What a mount after a handover says: its kind and the gap, and what has changed."""
    arrival = fs.arrival
    if arrival is None or arrival.record is None:
        return []
    name = fs.region.name
    gap = (arrival.gap_ns or 0) / 1e9
    said = [
        f"{name}: {manifest.ARRIVALS[arrival.kind]}: mounted {gap:.3f} s after handover "
        f"{arrival.record.number}"
    ]
    if arrival.trouble:
        said.append(f"{name}: cannot compare with the handover: {arrival.trouble}")
    for change in manifest.tell(fs, arrival.changes):
        said.append(
            f"{name}: changed since the handover: {change['path'] or 'file system'}: "
            f"{change['what']}"
        )
    return said
