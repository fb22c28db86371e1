"""A file system's side of a handover: frozen, its list, its record, and the mount after it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    CorruptionError,
    InvalidError,
    NoSpaceError,
    ReadOnlyError,
)
from pkernfs.fs import fsck, state_page
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.super import Access
from pkernfs.layout import (
    BLOCK,
    MAGIC_STATE,
    NO_INO,
    PAGE,
    RESULT_UNKNOWN,
    ROOT_INO,
    STATE_PAGE,
    page_offset,
)
from pkernfs.quantities import Ino, PhysAddr, RegionOff
from support.checking import MemoryFile, assert_clean
from support.files import make
from support.handed import MIB, REG, SIZE, Handed, changes_of, file_of, populated, reseal
from support.handover import hand_over, verify


def test_what_fails_while_frozen_is_not_thawed(fs: FileSystem) -> None:
    """A unit that does not obey as a handover detaches a device may still reach what it did."""
    fs.freeze()
    fs.fail("a unit does not obey")
    fs.thaw()
    assert fs.read_only
    assert not fs.frozen
    with pytest.raises(ReadOnlyError, match="read-only file system"):
        make(fs, b"g")
    with pytest.raises(ReadOnlyError):
        fs.freeze()


# ---------------------------------------------------------------------- freezing


CHANGES: dict[str, Callable[[FileSystem, Ino], object]] = {
    "create": lambda fs, ino: fs.create(ROOT_INO, b"new", REG, 0, 0),
    "mkdir": lambda fs, ino: fs.mkdir(ROOT_INO, b"new", 0o755, 0, 0),
    "symlink": lambda fs, ino: fs.symlink(ROOT_INO, b"new", b"to", 0, 0),
    "link": lambda fs, ino: fs.link(ino, ROOT_INO, b"new"),
    "unlink": lambda fs, ino: fs.unlink(ROOT_INO, b"file"),
    "rename": lambda fs, ino: fs.rename(ROOT_INO, b"file", ROOT_INO, b"new", 0),
    "rename, whiteout": lambda fs, ino: fs.rename(ROOT_INO, b"file", ROOT_INO, b"new", 4),
    "tmpfile": lambda fs, ino: fs.tmpfile(ROOT_INO, 0o600, 0, 0),
    "chmod": lambda fs, ino: fs.setattr(ino, mode=0o600),
    "truncate": lambda fs, ino: fs.setattr(ino, size=3),
    "utimens": lambda fs, ino: fs.setattr(ino, mtime=5),
    "write": lambda fs, ino: fs.write(ino, 0, b"x"),
    "fallocate": lambda fs, ino: fs.fallocate(ino, 0, 0, 100_000),
    "setxattr": lambda fs, ino: fs.setxattr(ino, b"user.a", b"b"),
    "removexattr": lambda fs, ino: fs.removexattr(ino, b"user.x"),
    "freeze": lambda fs, ino: fs.freeze(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_frozen_means_no_change(fs: FileSystem, name: str) -> None:
    ino = file_of(fs, "file", b"data")
    fs.setxattr(ino, b"user.x", b"y")
    fs.setattr(ino, atime=1)
    hand_over(fs)
    before = fs.region.read(RegionOff(0), fs.region.size)
    with pytest.raises(ReadOnlyError, match="frozen by pkernfs handover"):
        CHANGES[name](fs, ino)
    assert bytes(fs.read(ino, 0, 10)) == b"data"
    assert fs.next_dirty(BLOCK) is None
    assert fs.region.read(RegionOff(0), fs.region.size) == before
    fs.thaw()
    if name != "freeze":
        CHANGES[name](fs, ino)


def test_what_was_unlinked_while_frozen_in_the_kernel_goes_with_the_thaw(fs: FileSystem) -> None:
    ino = file_of(fs, "file", b"data")
    fs.open(ino)
    fs.unlink(ROOT_INO, b"file")
    free = fs.statfs().free_files
    fs.freeze()
    fs.release(ino)
    assert fs.inode(ino)
    fs.thaw()
    assert fs.statfs().free_files > free - 1
    with pytest.raises(Exception, match="no such inode"):
        fs.inode(ino)


def test_abort_leaves_nothing(fs: FileSystem) -> None:
    populated(fs)
    space = fs.statfs()
    for _ in range(3):
        assert hand_over(fs) == 1
        with pytest.raises(InvalidError, match="handed over already"):
            fs.hand_over(NO_INO, 0, 0, 0)
        assert_clean(fs.region)
        fs.thaw()
        assert fs.statfs() == space
        page = fs.store.read(STATE_PAGE, MAGIC_STATE)
        assert not any(state_page.read_record(page)[:2])
        assert not state_page.read_history(page)
        assert_clean(fs.region)
    with pytest.raises(InvalidError, match="no handover to undo"):
        fs.thaw()
    fs.freeze()  # and a freeze that never came to a handover
    ino, _ = fs.make_manifest(100_000)
    assert ino
    fs.thaw()
    assert fs.statfs() == space


def test_a_list_is_written_only_where_it_is(fs: FileSystem) -> None:
    ino = file_of(fs, "file", b"data")
    with pytest.raises(InvalidError, match="not frozen"):
        fs.make_manifest(100)
    fs.freeze()
    made, touched = fs.make_manifest(5000)
    assert touched
    for wrong, offset, length in ((ino, 0, 1), (made, -1, 1), (made, 4999, 2), (made, 1 << 63, 1)):
        with pytest.raises(InvalidError):
            fs.write_manifest(wrong, offset, bytes(length))
    with pytest.raises(CorruptionError, match="did not arrive"):
        fs.hand_over(made, 5000, 12345, 0)
    with pytest.raises(CorruptionError, match="something else"):
        fs.hand_over(ino, 4, 12345, 0)
    fs.thaw()


def test_without_space_there_is_no_list(fs: FileSystem) -> None:
    ino, size = file_of(fs, "fill", b""), 0
    for step in (BLOCK, PAGE):
        with contextlib.suppress(NoSpaceError):
            while True:
                fs.run(lambda new=size + step: fs.setattr(ino, size=new))  # type: ignore[misc]
                size += step
    space = fs.statfs()
    fs.freeze()
    with pytest.raises(NoSpaceError):
        fs.make_manifest(1 << 20)
    assert fs.statfs() == space
    assert fs.hand_over(NO_INO, 0, 0, 0) == 1
    fs.unmount()
    again = mount_filesystem(fs.region)
    mount_report = verify(again)
    assert "no list" in mount_report.trouble
    assert mount_report.result == RESULT_UNKNOWN
    again.unmount()
    fs.super.access = Access.READ_ONLY  # it is not this one's any more


# ---------------------------------------------------------------------- the first mount


def test_the_list_is_gone_after_the_mount(handed: Handed) -> None:
    page = handed.region.read(page_offset(STATE_PAGE), PAGE)
    ino = state_page.read_record(page).list_ino
    fs = handed.mount()
    with pytest.raises(Exception, match="no such inode"):
        fs.inode(ino)
    fs.unmount()
    report = fsck.check(handed.region, repair=False)
    assert not report.notes


def test_a_read_only_mount_keeps_the_record(handed: Handed) -> None:
    before = handed.region.read(RegionOff(0), SIZE)
    fs = handed.mount(read_only=True)
    mount_report = verify(fs)
    assert mount_report.record is not None
    assert not mount_report.changes.all()
    fs.unmount()
    assert handed.region.read(RegionOff(0), SIZE) == before


@pytest.mark.parametrize("what", ["data", "head", "inode", "another number", "gone", "garbage"])
def test_a_damaged_list_is_no_reason_not_to_mount(handed: Handed, what: str) -> None:
    region = handed.region
    state = bytearray(region.read(page_offset(STATE_PAGE), PAGE))
    record = state_page.read_record(state)
    fs = handed.mount(read_only=True)
    at = fs.extents(record.list_ino)[0].region_offset
    data = bytearray(fs._freezer.read_list(record))
    from pkernfs.region.digest import crc64

    if what == "data":
        data[100] ^= 1
    elif what == "head":
        data[16:24] = b"\xff" * 8
        record = record._replace(list_digest=crc64(data))
    elif what == "another number":
        record = record._replace(number=77)
    elif what == "gone":
        record = record._replace(list_ino=Ino(16 * 4000 + 3))
    elif what == "inode":
        record = record._replace(list_ino=handed.inos["f2"])
    else:
        data[:] = random.Random(3).randbytes(len(data))
        data[: len(data) // 2] = bytes(fs._freezer.read_list(record))[: len(data) // 2]
        record = record._replace(list_digest=crc64(data))
    assert len(fs.extents(state_page.read_record(state).list_ino)) == 1
    region.copy_in(at, bytes(data))
    state_page.write_record(state, record)
    region.copy_in(page_offset(STATE_PAGE), bytes(state))
    reseal(region, page_offset(STATE_PAGE))
    fs = handed.mount()
    mount_report = verify(fs)
    assert mount_report.trouble or mount_report.changes.all()
    if what != "garbage":
        assert mount_report.trouble
        assert mount_report.result == RESULT_UNKNOWN
    file_of(fs, "new", b"works")
    fs.unmount()
    assert_clean(region)


def test_a_second_handover_while_verifying(handed: Handed) -> None:
    fs = handed.mount()
    hand_over(fs)
    verify(fs)
    fs.unmount()
    again = handed.mount()
    assert not changes_of(again)
    assert again.mount_report is not None
    assert again.mount_report.record is not None
    assert again.mount_report.record.number == 2
    again.unmount()


# ---------------------------------------------------------------------- kinds of mounts, history


def changes_after_a_move(before: PhysAddr | None, after: PhysAddr) -> dict[str, str]:
    """What is told of a region that was at another address, or at none, when it was handed over."""
    with MemoryFile(16 * MIB) as memory:
        with memory.open(phys_base=before) as region:
            assert region.phys_base == before
            make_filesystem(region)
            fs = mount_filesystem(region)
            hand_over(fs)
            fs.unmount()
        with memory.open(phys_base=after) as region:
            fs = mount_filesystem(region)
            changes = changes_of(fs)
            fs.unmount()
            return changes


def test_another_physical_address_is_told() -> None:
    text = "physical address: 0x80000000, 0x40000000 at the handover"
    assert changes_after_a_move(PhysAddr(1 << 30), PhysAddr(2 << 30)) == {"": text}


def test_an_address_that_nobody_knew_at_the_handover_has_not_changed() -> None:
    """A user other than root is told no addresses of huge pages; root mounts it again."""
    assert not changes_after_a_move(None, PhysAddr(2 << 30))
