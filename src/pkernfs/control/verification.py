"""The outcome of the handover before a mount: files are compared with it here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from pkernfs.control.protocol import ChangedFile, Verification
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
    )


async def verify(fs: FileSystem) -> None:
    """Compare the data of files with their digests, while others are served."""
    mount_report = fs.mount_report
    if mount_report is None or mount_report.verifier is None or mount_report.verifier.finished:
        return
    verifier = mount_report.verifier
    before = len(mount_report.changes)
    try:
        for batch in verifier.batches():
            differ = await trio.to_thread.run_sync(verifier.run, batch)
            verifier.take(batch, differ)
    except PkernfsError as e:
        mount_report.trouble = str(e)
        log.error("%s: cannot compare with the handover: %s", fs.region.name, e)
    fs.end_verification()
    if len(mount_report.changes) > before:
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
    return said


def _changes(fs: FileSystem, mount_report: comparison.MountReport) -> list[dict[str, str]]:
    return comparison.tell(mount_report.changes, fs.readdir, fs.holder)
