"""A handover's list: what is in it, and what its reader refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError
from pkernfs.fs import fsck, manifest, state_page
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import (
    LIST,
    LIST_SIGNATURE,
    LIST_SIGNATURE_SEGMENTS,
    MAGIC_INODES,
    MAGIC_STATE,
    STATE_PAGE,
    ListFields,
)
from pkernfs.quantities import RegionOff, RegionRange
from pkernfs.region.files import OpenFileBacking
from pkernfs.region.region import Region
from support.checking import MemoryFile
from support.handed import MIB, file_of, populated
from support.handover import hand_over
from support.huge_pages import huge_pages
from support.memory_pool import POOL, MemoryPool
from support.pooled_handover import make_guest


def test_pages_of_the_list(fs: FileSystem) -> None:
    """Every metadata page is in the list, and only intact ones of this file system."""
    populated(fs)
    hand_over(fs)
    record = state_page.read_record(fs.store.read(STATE_PAGE, MAGIC_STATE))
    listed = manifest.parse_manifest(fs._freezer.read_list(record), fs.superblock.uuid, 1)
    image = fsck.survey(fs.region)
    assert sorted(listed.pages) == sorted(image.metadata_pages())
    assert listed.magics.count(MAGIC_INODES) * 16 == len(listed.slots)
    fs.thaw()


def counts(data: bytes) -> ListFields:
    return ListFields(*LIST.unpack_from(data))


def with_counts(data: bytes, **changed: int) -> bytes:
    """The list with other numbers in its head."""
    return LIST.pack(*counts(data)._replace(**changed)) + data[LIST.size :]  # type: ignore[arg-type]


def test_a_list_that_contradicts_itself_is_refused(fs: FileSystem) -> None:
    populated(fs)
    hand_over(fs)
    record = state_page.read_record(fs.store.read(STATE_PAGE, MAGIC_STATE))
    data = bytes(fs._freezer.read_list(record))
    fs.thaw()
    uuid = fs.superblock.uuid
    head = counts(data)
    for wrong, message in (
        (data[: LIST.size - 1], "too short: got"),
        (with_counts(data, number=2), "of another handover: got number 2"),
        (with_counts(data, files=head.files + 1000), "bad length"),
        (data + b"\1", "bad length"),
        (with_counts(data, pages=head.pages - 1), "bad "),
    ):
        with pytest.raises(CorruptionError, match=message):
            manifest.parse_manifest(wrong, uuid, 1)
    with pytest.raises(CorruptionError, match="of another handover"):
        manifest.parse_manifest(data, bytes(16), 1)


def test_files_with_segments_make_a_list_of_another_kind() -> None:
    """A version that compares none of them refuses it, and does not take them for changed."""
    with MemoryPool() as pool, Region.anonymous(16 * MIB) as region:
        make_filesystem(region, pool=POOL)
        fs = mount_filesystem(region, open_pool=pool.opener())
        file_of(fs, "flat", b"flat")
        for signature in (LIST_SIGNATURE, LIST_SIGNATURE_SEGMENTS):
            if signature == LIST_SIGNATURE_SEGMENTS:
                make_guest(fs, "guest", 3 * MIB)
            hand_over(fs)
            record = state_page.read_record(fs.store.read(STATE_PAGE, MAGIC_STATE))
            data = fs._freezer.read_list(record)
            assert counts(data).signature == signature
            listed = manifest.parse_manifest(data, fs.superblock.uuid, 1)
            assert listed.with_segments == (signature == LIST_SIGNATURE_SEGMENTS)
            fs.thaw()
        fs.unmount()


def test_what_was_data_is_not_asked_for_again() -> None:
    """The kernel looks for the end of data up to the next hole, be it far away."""
    with MemoryFile(64 * MIB) as memory, memory.open() as region:
        region.copy_in(RegionOff(0), b"x" * 40 * MIB)
        region.copy_in(RegionOff(50 * MIB), b"x")
        holes = manifest.Holes(region)
        asked = 0

        def data_ranges(first: RegionOff, last: RegionOff | None = None) -> Iterator[RegionRange]:
            nonlocal asked
            asked += 1
            return type(region).data_ranges(region, first, last)

        with mock.patch.object(region, "data_ranges", data_ranges):
            for at in range(0, 40 * MIB, MIB):
                assert list(holes.data(RegionOff(at), RegionOff(at + MIB))) == [(at, at + MIB)]
            assert asked == 1
            first, second = holes.data(RegionOff(39 * MIB), RegionOff(64 * MIB))
            assert first == (39 * MIB, 40 * MIB)
            assert second.start == 50 * MIB
            assert list(holes.data(RegionOff(55 * MIB), RegionOff(64 * MIB))) == []


@pytest.mark.fuse  # as root: it mounts
def test_huge_pages_that_are_there() -> None:
    """The kernel tells no holes on hugetlbfs: each page is looked for, and none is made."""
    with huge_pages(16 * MIB) as directory:
        path = directory / "segment"
        path.touch()
        os.truncate(path, 16 * MIB)
        backing = OpenFileBacking(os.open(path, os.O_RDWR), str(path))
        with Region(backing, writable=True) as region:
            region.copy_in(RegionOff(4 * MIB + 5), b"x")
            region.copy_in(RegionOff(6 * MIB), b"x")
            holes = manifest.Holes.of_segment(region)
            everything = RegionOff(0), RegionOff(16 * MIB)
            found = list(holes.data(*everything))
            used = os.stat(path).st_blocks * 512
            assert (used, sum(end - start for start, end in found)) == (4 * MIB, 4 * MIB)
            assert found[0].start == 4 * MIB
