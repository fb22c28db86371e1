"""A handover's list: what is in it, and what its reader refuses."""

from __future__ import annotations

import pytest

from pkernfs.errors import CorruptionError
from pkernfs.fs import fsck, manifest, state_page
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import LIST, MAGIC_INODES, MAGIC_STATE, STATE_PAGE, ListFields
from support.handed import populated
from support.handover import hand_over


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
