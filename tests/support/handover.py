"""A handover and its verification without a mount, in one call each."""

from __future__ import annotations

from pkernfs.fs.comparison import MountReport
from pkernfs.fs.filesystem import FileSystem
from pkernfs.kexec import handover
from pkernfs.kexec.local import LocalFileSystem


def hand_over(fs: FileSystem, *, digests: bool = True) -> int:
    """Hand a file system over; return the handover's number."""
    return handover.hand_over(LocalFileSystem(fs), digests=digests, threads=1).number


def verify(fs: FileSystem) -> MountReport:
    """Run what the daemon runs beside its requests; what the mount has found in the end."""
    mount_report = fs.mount_report
    assert mount_report is not None
    if mount_report.verifier is not None:
        for batch in mount_report.verifier.batches():
            mount_report.verifier.take(batch, mount_report.verifier.run(batch, threads=1))
        if not fs.read_only:
            fs.end_verification()
    return mount_report
