"""The outcome of the handover before a mount: files are compared with it here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING

import trio

from pkernfs.control.protocol import ChangedFile, LostFile, Verification
from pkernfs.errors import PkernfsError
from pkernfs.fs import comparison, state_page

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)


def describe(fs: FileSystem) -> Verification:
    """Return the state and the findings of the comparison with the handover."""
    mount_report = fs.mount_report
    if mount_report is None or mount_report.record is None:
        return Verification("none", "", 0, 0, 0, ())
    verifier = mount_report.verifier
    return Verification(
        "done" if verifier is None or verifier.finished else "running",
        mount_report.trouble,
        verifier.done_bytes if verifier else 0,
        verifier.total_bytes if verifier else 0,
        len(verifier.skipped) if verifier else 0,
        tuple(ChangedFile(c["path"], c["what"]) for c in _changes(fs, mount_report)),
        tuple(_lost(fs, mount_report)),
    )


async def verify(
    fs: FileSystem,
    pool_turn: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
) -> None:
    """Compare the data of files with their digests, while others are served.

    :param pool_turn: lets nobody change the pool, in whose way a mapping of a segment is.
    """
    mount_report = fs.mount_report
    if mount_report is None or mount_report.verifier is None or mount_report.verifier.finished:
        return
    verifier = mount_report.verifier
    before = len(mount_report.changes), len(mount_report.lost)
    try:
        for batch in verifier.batches():
            async with nullcontext() if batch.part is None else pool_turn():
                outcome = await trio.to_thread.run_sync(verifier.run, batch)
            verifier.take(batch, outcome)
    except PkernfsError as e:
        mount_report.trouble = str(e)
        log.error("%s: cannot compare with the handover: %s", fs.region.name, e)
    fs.end_verification()
    if (len(mount_report.changes), len(mount_report.lost)) != before:
        for line in lines(fs):
            log.error("%s", line)


def verify_now(fs: FileSystem) -> None:
    """Compare before anybody is served."""
    mount_report = fs.mount_report
    if mount_report is None or mount_report.verifier is None:
        return
    verifier = mount_report.verifier
    for batch in verifier.batches():
        verifier.take(batch, verifier.run(batch))
    fs.end_verification()


def lines(fs: FileSystem) -> list[str]:
    """Return the lines that a mount after a handover says: its kind, the gap, the changes."""
    mount_report = fs.mount_report
    if mount_report is None or mount_report.record is None:
        return []
    name = fs.region.name
    gap = (mount_report.gap_ns or 0) / 1e9
    said = [
        f"{name}: {state_page.MOUNT_KINDS[mount_report.kind]}: mounted {gap:.3f} s after handover "
        f"{mount_report.record.number}"
    ]
    if mount_report.trouble:
        said.append(f"{name}: cannot compare with the handover: {mount_report.trouble}")
    for change in _changes(fs, mount_report):
        said.append(
            f"{name}: changed since the handover: {change['path'] or 'file system'}: "
            f"{change['what']}"
        )
    for file in _lost(fs, mount_report):
        said.append(f"{name}: lost: {file.path}: {file.why}")
    return said


def _lost(fs: FileSystem, mount_report: comparison.MountReport) -> Iterator[LostFile]:
    """The files whose segments this mount does not have, or could not read."""
    segments = fs.segments
    rows = segments.table.rows
    found = {rows[n].ino: why for n, why in segments.lost.items() if n in rows}
    found |= mount_report.lost
    paths = comparison.paths_of(set(found), fs.readdir)
    for ino, why in sorted(found.items()):
        path = paths.get(ino, b"inode %d" % ino)
        yield LostFile(path.decode("utf-8", "backslashreplace"), why)


def _changes(fs: FileSystem, mount_report: comparison.MountReport) -> list[dict[str, str]]:
    return comparison.tell(mount_report.changes, fs.readdir, fs.holder)
