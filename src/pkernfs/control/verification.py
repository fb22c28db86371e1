"""The outcome of the handover before a mount: files are compared with it here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from pkernfs.control.protocol import ChangedFile, Verification
from pkernfs.errors import PkernfsError
from pkernfs.fs import manifest, state_page

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)


def describe(fs: FileSystem) -> Verification:
    """Return the state and the findings of the comparison with the handover."""
    arrival = fs.arrival
    if arrival is None or arrival.record is None:
        return Verification("none", "", 0, 0, 0, ())
    verifier = arrival.verifier
    return Verification(
        "done" if verifier is None or verifier.finished else "running",
        arrival.trouble,
        verifier.done_bytes if verifier else 0,
        verifier.total_bytes if verifier else 0,
        len(verifier.skipped) if verifier else 0,
        tuple(
            ChangedFile(c["path"], c["what"])
            for c in manifest.tell(arrival.changes, fs.readdir, fs.holder)
        ),
    )


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
    """Compare before anybody is served."""
    arrival = fs.arrival
    if arrival is None or arrival.verifier is None:
        return
    verifier = arrival.verifier
    for batch in verifier.batches():
        verifier.take(batch, verifier.run(batch))
    fs.end_verification()


def lines(fs: FileSystem) -> list[str]:
    """Return the lines that a mount after a handover says: its kind, the gap, the changes."""
    arrival = fs.arrival
    if arrival is None or arrival.record is None:
        return []
    name = fs.region.name
    gap = (arrival.gap_ns or 0) / 1e9
    said = [
        f"{name}: {state_page.ARRIVALS[arrival.kind]}: mounted {gap:.3f} s after handover "
        f"{arrival.record.number}"
    ]
    if arrival.trouble:
        said.append(f"{name}: cannot compare with the handover: {arrival.trouble}")
    for change in _changes(fs, arrival):
        said.append(
            f"{name}: changed since the handover: {change['path'] or 'file system'}: "
            f"{change['what']}"
        )
    return said


def _changes(fs: FileSystem, arrival: manifest.Arrival) -> list[dict[str, str]]:
    return manifest.tell(arrival.changes, fs.readdir, fs.holder)
