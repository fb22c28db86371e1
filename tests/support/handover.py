"""A handover without a mount: what the command and the daemon do, one after the other."""

from __future__ import annotations

from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.fsck import survey
from pkernfs.fs.manifest import Arrival, FileDigests, build_list, chunks_of, room_for_list
from pkernfs.layout import HANDOVER_FLAG_DIGESTS, STATE_PAGE
from pkernfs.region import digest


def hand_over(fs: FileSystem, *, digests: bool = True) -> int:
    """Freeze, check, make the list and the record; the handover's number."""
    fs.freeze()
    region = fs.region
    found = survey(region)
    assert found.report.clean, [p.message for p in found.report.problems]
    files = []
    if digests:
        for ino, extents in found.files():
            chunks = list(chunks_of(region, extents))
            sums = digest.digest_all(region, [parts for _, parts in chunks], threads=1)
            numbers = [number for number, _ in chunks]
            files.append(FileDigests(ino, dict(zip(numbers, sums, strict=True))))
    pages = set(found.metadata_pages())
    number = fs.next_handover
    room = room_for_list(len(build_list(region, found.uuid, number, pages, files)))
    ino, touched = fs.make_list(room)
    data = build_list(region, found.uuid, number, (pages | touched) - {STATE_PAGE}, files)
    data += bytes(room - len(data))
    fs.write_list(ino, 0, data)
    flags = HANDOVER_FLAG_DIGESTS if digests else 0
    return fs.hand_over(ino, room, digest.crc64(data), flags)


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
