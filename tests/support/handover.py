"""A handover and its verification without a mount, in one call each."""

from __future__ import annotations

from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.manifest import Arrival
from pkernfs.kexec import handover
from pkernfs.kexec.local import LocalFileSystem


def hand_over(fs: FileSystem, *, digests: bool = True) -> int:
    """Hand a file system over; return the handover's number."""
    return handover.hand_over(LocalFileSystem(fs), digests=digests, threads=1).number


def verify(fs: FileSystem) -> Arrival:
    """Run what the daemon runs beside its requests; what the mount has found in the end."""
    arrival = fs.arrival
    assert arrival is not None
    if arrival.verifier is not None:
        for batch in arrival.verifier.batches():
            arrival.verifier.take(batch, arrival.verifier.run(batch, threads=1))
        if not fs.read_only:
            fs.end_verification()
    return arrival
