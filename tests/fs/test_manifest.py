"""A handover: what it freezes, what it leaves, and what the first mount after it finds changed."""

from __future__ import annotations

import contextlib
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    CorruptionError,
    InvalidError,
    NoSpaceError,
    PkernfsError,
    ReadOnlyError,
)
from pkernfs.fs import fsck, manifest, state_page, superblock
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.super import Access
from pkernfs.layout import (
    ARRIVAL_FIRST_BOOT,
    ARRIVAL_LIVE_UPDATE,
    ARRIVAL_REMOUNT,
    BLOCK,
    FIRST_MAP_PAGE,
    HISTORY_ENTRIES,
    INODE_BYTES,
    MAGIC_INODES,
    MAGIC_STATE,
    PAGE,
    RESULT_CHANGED,
    RESULT_EVERYTHING,
    RESULT_METADATA,
    RESULT_UNKNOWN,
    ROOT_INO,
    STATE_PAGE,
)
from pkernfs.region.checksum import page_checksum
from pkernfs.region.region import Region
from support.checking import MemoryFile, assert_clean
from support.handover import hand_over, verify

MIB = 1 << 20
SIZE = 64 * MIB
REG = stat.S_IFREG | 0o644
OTHER_BOOT = bytes(range(16))


def boot(number: int) -> mock._patch[mock.Mock]:
    """As if the kernel had been booted anew."""
    return mock.patch("pkernfs.fs.super.Super.boot_id", return_value=bytes([number]) * 16)


def make(fs: FileSystem, name: str, data: bytes, parent: int = ROOT_INO) -> int:
    ino = fs.create(parent, name.encode(), REG, 0, 0).ino
    if data:
        fs.run(lambda: fs.write(ino, 0, data))
    return ino


@dataclass
class Handed:
    """A region that was handed over and unmounted, and what was in it."""

    memory: MemoryFile
    inos: dict[str, int]
    places: dict[str, int]  # region offset of the first byte

    def mount(self, *, read_only: bool = False) -> FileSystem:
        return mount_filesystem(self.region, read_only=read_only)

    region: Region = None  # type: ignore[assignment]


def populated(fs: FileSystem) -> dict[str, int]:
    rng = random.Random(7)
    inos = {}
    for i in range(40):
        inos[f"f{i}"] = make(fs, f"f{i}", rng.randbytes(rng.randrange(1, 40_000)))
    inos["ram"] = make(fs, "ram", rng.randbytes(9 * MIB + 5))
    inos["sparse"] = make(fs, "sparse", b"start")
    fs.run(lambda: fs.write(inos["sparse"], 11 * MIB, b"end"))
    inos["empty"] = make(fs, "empty", b"")
    inos["dir"] = fs.mkdir(ROOT_INO, b"dir", 0o755, 0, 0).ino
    inos["below"] = make(fs, "below", b"below", inos["dir"])
    inos["link"] = fs.symlink(ROOT_INO, b"link", b"t" * 3000, 0, 0).ino
    fs.setxattr(inos["f1"], b"user.large", rng.randbytes(6000))
    return inos


@pytest.fixture(params=[True, False], ids=["digests", "metadata"])
def handed(request: pytest.FixtureRequest) -> Iterator[Handed]:
    with MemoryFile(SIZE) as memory, memory.open() as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        inos = populated(fs)
        places = {
            name: fs.extents(ino)[0].region_offset
            for name, ino in inos.items()
            if fs.inode(ino).is_reg and fs.extents(ino)
        }
        hand_over(fs, digests=request.param)
        assert_clean(region)
        fs.unmount()
        yield Handed(memory, inos, places, region)


def changes_of(fs: FileSystem) -> dict[str, str]:
    arrival = verify(fs)
    assert not arrival.trouble
    return {
        change["path"]: change["what"]
        for change in manifest.tell(arrival.changes, fs.readdir, fs.holder)
    }


def has_digests(handed: Handed) -> bool:
    page = handed.region.read(STATE_PAGE * PAGE, PAGE)
    return bool(state_page.read_record(page).flags)


# ---------------------------------------------------------------------- freezing


CHANGES: dict[str, Callable[[FileSystem, int], object]] = {
    "create": lambda fs, ino: fs.create(ROOT_INO, b"new", REG, 0, 0),
    "mkdir": lambda fs, ino: fs.mkdir(ROOT_INO, b"new", 0o755, 0, 0),
    "symlink": lambda fs, ino: fs.symlink(ROOT_INO, b"new", b"to", 0, 0),
    "link": lambda fs, ino: fs.link(ino, ROOT_INO, b"new"),
    "unlink": lambda fs, ino: fs.unlink(ROOT_INO, b"file"),
    "rename": lambda fs, ino: fs.rename(ROOT_INO, b"file", ROOT_INO, b"new", 0),
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
    ino = make(fs, "file", b"data")
    fs.setxattr(ino, b"user.x", b"y")
    fs.setattr(ino, atime=1)
    hand_over(fs)
    before = fs.region.read(0, fs.region.size)
    with pytest.raises(ReadOnlyError, match="frozen by pkernfs handover"):
        CHANGES[name](fs, ino)
    assert bytes(fs.read(ino, 0, 10)) == b"data"
    assert fs.next_dirty(BLOCK) is None
    assert fs.region.read(0, fs.region.size) == before
    fs.thaw()
    if name != "freeze":
        CHANGES[name](fs, ino)


def test_what_was_unlinked_while_frozen_in_the_kernel_goes_with_the_thaw(fs: FileSystem) -> None:
    ino = make(fs, "file", b"data")
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
            fs.hand_over(0, 0, 0, 0)
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
    ino, _ = fs.make_list(100_000)
    assert ino
    fs.thaw()
    assert fs.statfs() == space


def test_a_list_is_written_only_where_it_is(fs: FileSystem) -> None:
    ino = make(fs, "file", b"data")
    with pytest.raises(InvalidError, match="not frozen"):
        fs.make_list(100)
    fs.freeze()
    made, touched = fs.make_list(5000)
    assert touched
    for wrong, offset, length in ((ino, 0, 1), (made, -1, 1), (made, 4999, 2), (made, 1 << 63, 1)):
        with pytest.raises(InvalidError):
            fs.write_list(wrong, offset, bytes(length))
    with pytest.raises(CorruptionError, match="did not arrive"):
        fs.hand_over(made, 5000, 12345, 0)
    with pytest.raises(CorruptionError, match="something else"):
        fs.hand_over(ino, 4, 12345, 0)
    fs.thaw()


def test_without_space_there_is_no_list(fs: FileSystem) -> None:
    ino, size = make(fs, "fill", b""), 0
    for step in (BLOCK, PAGE):
        with contextlib.suppress(NoSpaceError):
            while True:
                fs.run(lambda new=size + step: fs.setattr(ino, size=new))  # type: ignore[misc]
                size += step
    space = fs.statfs()
    fs.freeze()
    with pytest.raises(NoSpaceError):
        fs.make_list(1 << 20)
    assert fs.statfs() == space
    assert fs.hand_over(0, 0, 0, 0) == 1
    fs.unmount()
    again = mount_filesystem(fs.region)
    arrival = verify(again)
    assert "no list" in arrival.trouble
    assert arrival.result == RESULT_UNKNOWN
    again.unmount()
    fs.super.access = Access.READ_ONLY  # it is not this one's any more


# ---------------------------------------------------------------------- the first mount


def test_nothing_has_changed(handed: Handed) -> None:
    with boot(9):
        fs = handed.mount()
        arrival = verify(fs)
    assert arrival.kind == ARRIVAL_LIVE_UPDATE
    assert arrival.gap_ns is not None
    assert 0 < arrival.gap_ns < 60e9
    assert not arrival.trouble
    assert not arrival.changes.all()
    digests = arrival.verifier is not None
    entry = state_page.read_history(fs.store.read(STATE_PAGE, MAGIC_STATE))[0]
    assert entry.result == (RESULT_EVERYTHING if digests else RESULT_METADATA)
    assert entry.number == 1
    assert entry.boot_id_after == bytes([9]) * 16
    assert entry.boot_id_before != entry.boot_id_after
    assert_clean(handed.region)
    assert fs.next_handover == 2
    fs.unmount()
    assert_clean(handed.region)
    facts = superblock.describe(handed.region)
    assert facts["state"] == "clean"
    assert facts["handover"] is None
    assert facts["arrival"] == "live update"
    assert facts["history"][0]["gap_ns"] == arrival.gap_ns
    assert facts["history"][0]["result"] == ("unchanged" if digests else "metadata unchanged")


def test_the_list_is_gone_after_the_mount(handed: Handed) -> None:
    page = handed.region.read(STATE_PAGE * PAGE, PAGE)
    ino = state_page.read_record(page).list_ino
    fs = handed.mount()
    with pytest.raises(Exception, match="no such inode"):
        fs.inode(ino)
    fs.unmount()
    report = fsck.check(handed.region, repair=False)
    assert not report.notes


def test_a_read_only_mount_keeps_the_record(handed: Handed) -> None:
    before = handed.region.read(0, SIZE)
    fs = handed.mount(read_only=True)
    arrival = verify(fs)
    assert arrival.record is not None
    assert not arrival.changes.all()
    fs.unmount()
    assert handed.region.read(0, SIZE) == before


def test_changed_data_is_named(handed: Handed) -> None:
    digests = has_digests(handed)
    place = handed.places
    for name, at in (("ram", 3 * MIB + 17), ("f7", 0), ("below", 4)):
        byte = handed.region.read(place[name] + at, 1)
        handed.region.copy_in(place[name] + at, bytes([byte[0] ^ 4]))
    fs = handed.mount()
    changes = changes_of(fs)
    assert changes == (
        {
            "/ram": "bytes 0x200000..0x400000",
            "/f7": "bytes 0x0..0x200000",
            "/dir/below": "bytes 0x0..0x200000",
        }
        if digests
        else {}
    )
    entry = state_page.read_history(fs.store.read(STATE_PAGE, MAGIC_STATE))[0]
    assert (entry.result, entry.changed) == (
        (RESULT_CHANGED, 3) if digests else (RESULT_METADATA, 0)
    )
    # And all the others can be used.
    assert len(bytes(fs.read(handed.inos["f8"], 0, 1 << 20))) == fs.inode(handed.inos["f8"]).size
    make(fs, "new", b"works")
    fs.unmount()


def test_a_hole_that_got_bytes_is_found(handed: Handed) -> None:
    """The region's file has holes where a chunk was all zero: no digest, but it must stay zero."""
    if not has_digests(handed):
        return
    fs = handed.mount(read_only=True)
    extents = fs.extents(handed.inos["sparse"])
    middle = next((e for e in extents if e.offset <= 6 * MIB < e.offset + e.length), None)
    last = extents[-1]
    at = last.region_offset + 12 * MIB - PAGE - last.offset - MIB
    del fs
    if middle is not None:
        at = middle.region_offset + 6 * MIB - middle.offset
    assert handed.region.is_zero(at, PAGE)
    handed.region.copy_in(at + 9, b"!")
    assert set(changes_of(handed.mount())) == {"/sparse"}


def page_of(handed: Handed, ino: int) -> int:
    """Region offset of the inode page of an inode."""
    fs = handed.mount(read_only=True)
    return fs.super.inodes.where[ino >> 4] * PAGE


def reseal(region: Region, at: int) -> None:
    region.copy_in(at + 4, page_checksum(region.read(at, PAGE)).to_bytes(4, "little"))


def test_a_changed_inode_is_named(handed: Handed) -> None:
    """Its page has a good checksum: who did it knew how."""
    ino = handed.inos["f9"]
    at = page_of(handed, ino)
    handed.region.copy_in(at + (ino & 15) * INODE_BYTES + 16, (4711).to_bytes(4, "little"))
    reseal(handed.region, at)
    fs = handed.mount()
    assert changes_of(fs) == {"/f9": "inode changed"}
    assert fs.inode(ino).uid == 4711
    fs.unmount()


def test_a_damaged_inode_page_keeps_nobody_else_from_being_used(handed: Handed) -> None:
    ino = handed.inos["f30"]
    at = page_of(handed, ino)
    # What the mount needs lies elsewhere.
    assert at != page_of(handed, ROOT_INO)
    page = handed.region.read(STATE_PAGE * PAGE, PAGE)
    assert at != page_of(handed, state_page.read_record(page).list_ino)
    handed.region.copy_in(at + (ino & 15) * INODE_BYTES + 40, b"\xff" * 8)
    fs = handed.mount()
    changes = changes_of(fs)
    assert "inode damaged" in changes["/f30"]
    assert changes[""] == f"inode page at {at:#x} damaged"
    assert bytes(fs.read(handed.inos["below"], 0, 10)) == b"below"
    make(fs, "new", b"works")
    with pytest.raises(CorruptionError):
        fs.inode(ino)
    fs.unmount()
    assert superblock.describe(handed.region)["errors"]
    report = fsck.check(handed.region, repair=True)
    assert report.counts[fsck.Code.INODE_PAGE_DAMAGED]
    assert not report.left
    assert_clean(handed.region)


@pytest.mark.parametrize("sealed", [True, False], ids=["resealed", "torn"])
def test_a_changed_directory_is_named(handed: Handed, sealed: bool) -> None:
    fs = handed.mount(read_only=True)
    at = fs.inode(handed.inos["dir"]).body * PAGE
    data = handed.region.read(at, PAGE)
    where = data.index(b"below")
    handed.region.copy_in(at + where, b"BELOW")
    if sealed:
        reseal(handed.region, at)
    changes = changes_of(handed.mount(read_only=True))
    state = "changed" if sealed else "damaged"
    assert changes == {"/dir": f"tree node at {at:#x} {state}"}


def test_changed_structures_are_named(handed: Handed) -> None:
    at = FIRST_MAP_PAGE * PAGE
    handed.region.copy_in(at + 2752 + 3, b"\0")  # some blocks are no longer known to be zero
    reseal(handed.region, at)
    fs = handed.mount()
    assert changes_of(fs) == {"": f"block map at {at:#x} changed"}
    fs.unmount()


def test_a_removed_file_is_named(handed: Handed) -> None:
    """Somebody who knows nothing of handovers has had the region."""
    before = handed.region.read(STATE_PAGE * PAGE, PAGE)
    with mock.patch("pkernfs.fs.manifest.load"):
        fs = handed.mount()
        list_ino = state_page.read_record(before).list_ino
        assert list_ino
    fs.unlink(ROOT_INO, b"f3")
    fs.unmount()
    assert_clean(handed.region)


@pytest.mark.parametrize("what", ["data", "head", "inode", "another number", "gone", "garbage"])
def test_a_damaged_list_is_no_reason_not_to_mount(handed: Handed, what: str) -> None:
    region = handed.region
    state = bytearray(region.read(STATE_PAGE * PAGE, PAGE))
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
        record = record._replace(list_ino=16 * 4000 + 3)
    elif what == "inode":
        record = record._replace(list_ino=handed.inos["f2"])
    else:
        data[:] = random.Random(3).randbytes(len(data))
        data[: len(data) // 2] = bytes(fs._freezer.read_list(record))[: len(data) // 2]
        record = record._replace(list_digest=crc64(data))
    assert len(fs.extents(state_page.read_record(state).list_ino)) == 1
    region.copy_in(at, bytes(data))
    state_page.write_record(state, record)
    region.copy_in(STATE_PAGE * PAGE, bytes(state))
    reseal(region, STATE_PAGE * PAGE)
    fs = handed.mount()
    arrival = verify(fs)
    assert arrival.trouble or arrival.changes.all()
    if what != "garbage":
        assert arrival.trouble
        assert arrival.result == RESULT_UNKNOWN
    make(fs, "new", b"works")
    fs.unmount()
    assert_clean(region)


def test_files_that_change_meanwhile_are_not_accused(handed: Handed) -> None:
    fs = handed.mount()
    if fs.arrival is None or fs.arrival.verifier is None:
        fs.unmount()
        return
    inos = handed.inos
    bytes(fs.read(inos["f4"], 0, 100))  # an access time is no change
    fs.write(inos["f5"], 0, b"written after the mount")
    fs.setattr(inos["ram"], size=MIB)
    fs.unlink(ROOT_INO, b"f6")
    handed.region.copy_in(handed.places["f4"], b"!!")
    arrival = verify(fs)
    assert [change.ino for change in arrival.changes.all()] == [inos["f4"]]
    assert arrival.verifier is not None
    assert arrival.verifier.skipped == {inos["f5"], inos["ram"], inos["f6"]}
    fs.write(inos["f5"], 0, b"later")
    assert arrival.verifier.changed_meanwhile == {inos["f5"], inos["ram"], inos["f6"]} | (
        arrival.verifier.changed_meanwhile - {inos["f5"]}
    )
    fs.unmount()


def test_a_second_handover_while_verifying(handed: Handed) -> None:
    fs = handed.mount()
    hand_over(fs)
    verify(fs)
    fs.unmount()
    again = handed.mount()
    assert not changes_of(again)
    assert again.arrival is not None
    assert again.arrival.record is not None
    assert again.arrival.record.number == 2
    again.unmount()


# ---------------------------------------------------------------------- kinds of mounts, history


def test_kinds_of_mounts() -> None:
    with Region.anonymous(16 * MIB) as region:
        make_filesystem(region)
        assert superblock.describe(region)["arrival"] is None
        expected: list[tuple[int, bool]] = []
        for number, kind, handing in (
            (1, ARRIVAL_FIRST_BOOT, False),
            (1, ARRIVAL_REMOUNT, False),
            (2, ARRIVAL_LIVE_UPDATE, True),
            (3, ARRIVAL_LIVE_UPDATE, True),
            (3, ARRIVAL_REMOUNT, False),
            (4, ARRIVAL_LIVE_UPDATE, False),
        ):
            with boot(number):
                fs = mount_filesystem(region)
                assert fs.arrival is not None
                assert fs.arrival.kind == kind
                if kind == ARRIVAL_LIVE_UPDATE or fs.arrival.record:
                    expected.insert(0, (kind, fs.arrival.record is not None))
                verify(fs)
                if handing:
                    hand_over(fs, digests=False)
                fs.unmount()
            assert_clean(region)
        facts = superblock.describe(region)
        assert facts["arrival"] == "live update"
        found = [(e["arrival"], e["handover"] is not None) for e in facts["history"]]
        assert found == [(state_page.ARRIVALS[kind], had) for kind, had in expected]
        assert facts["history"][0]["gap_ns"] is None


def test_the_history_keeps_the_last_ones() -> None:
    with Region.anonymous(16 * MIB) as region:
        make_filesystem(region)
        for number in range(HISTORY_ENTRIES + 5):
            with boot(number + 1):
                fs = mount_filesystem(region)
                verify(fs)
                assert hand_over(fs, digests=False) == number + 1
                fs.unmount()
        history = superblock.describe(region)["history"]
        assert len(history) == HISTORY_ENTRIES
        numbers = [entry["handover"] for entry in history]
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] == HISTORY_ENTRIES + 4
        assert_clean(region)


def test_another_physical_address_is_told() -> None:
    with MemoryFile(16 * MIB) as memory:
        with memory.open(phys_base=1 << 30) as region:
            make_filesystem(region)
            fs = mount_filesystem(region)
            hand_over(fs)
            fs.unmount()
        with memory.open(phys_base=2 << 30) as region:
            fs = mount_filesystem(region)
            text = "physical address: 0x80000000, 0x40000000 at the handover"
            assert changes_of(fs) == {"": text}
            fs.unmount()


# ---------------------------------------------------------------------- at any size


def test_holes_cost_nothing() -> None:
    """A sparse file of 1 TiB in a region of 2 TiB: its list has what there is memory for."""
    with MemoryFile(2 << 40) as memory, memory.open() as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        ino = make(fs, "ram", b"first")
        fs.run(lambda: fs.setattr(ino, size=1 << 40))
        fs.run(lambda: fs.write(ino, 1 << 39, b"middle"))
        hand_over(fs)
        record = state_page.read_record(fs.store.read(STATE_PAGE, MAGIC_STATE))
        assert record.list_bytes < 64 << 10
        fs.unmount()
        again = mount_filesystem(region)
        arrival = verify(again)
        assert arrival.result == RESULT_EVERYTHING
        again.unmount()
        assert_clean(region)


def test_a_large_list() -> None:
    """More files than one inode page, leaf or piece of work has room for."""
    with Region.anonymous(256 * MIB) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        inos = [make(fs, f"file{i}", b"%d" % i) for i in range(5000)]
        hand_over(fs)
        victim = fs.extents(inos[4321])[0].region_offset
        fs.unmount()
        region.copy_in(victim, b"x")
        fs = mount_filesystem(region)
        assert changes_of(fs) == {"/file4321": "bytes 0x0..0x200000"}
        fs.unmount()
        assert_clean(region)


def test_pages_of_the_list(fs: FileSystem) -> None:
    """Every metadata page is in the list, and only intact ones of this file system."""
    populated(fs)
    hand_over(fs)
    record = state_page.read_record(fs.store.read(STATE_PAGE, MAGIC_STATE))
    listed = manifest.parse_list(fs._freezer.read_list(record), fs.superblock.uuid, 1)
    image = fsck.survey(fs.region)
    assert sorted(listed.pages) == sorted(image.metadata_pages())
    assert listed.magics.count(MAGIC_INODES) * 16 == len(listed.slots)
    fs.thaw()


# ---------------------------------------------------------------------- anything at all


def test_no_changed_byte_goes_unnoticed(request: pytest.FixtureRequest) -> None:
    """Bits flipped anywhere in metadata or data: the mount is refused, or tells of it."""
    rng = random.Random(request.config.getoption("hypothesis_seed"))
    with Region.anonymous(32 * MIB) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        for i in range(30):
            make(fs, f"f{i}", rng.randbytes(rng.randrange(1, 30_000)))
        directory = fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
        for i in range(30):
            make(fs, f"g{i}", rng.randbytes(100), directory)
        make(fs, "large", rng.randbytes(3 * MIB))
        hand_over(fs)
        places = [page * PAGE for page in fsck.survey(region).metadata_pages()]
        places.append(STATE_PAGE * PAGE)
        metadata = len(places)
        for _, extents in fsck.survey(region).files():
            places += [start for _, _, start in extents]
        fs.unmount()
        image = region.read(0, region.size)
        seen = {"refused": 0, "trouble": 0, "told": 0}
        for number in range(400):
            at = rng.choice(places[:metadata] if number % 2 else places[metadata:])
            offset = at + rng.randrange(PAGE if number % 2 else 100) // 8 * 8
            flipped = rng.randrange(1, 1 << 64)
            word = int.from_bytes(image[offset : offset + 8], "little") ^ flipped
            region.store_u64(offset, word)
            try:
                mounted = mount_filesystem(region)
                arrival = verify(mounted)
                manifest.tell(arrival.changes, mounted.readdir, mounted.holder)
                if arrival.trouble:
                    seen["trouble"] += 1
                else:
                    assert arrival.changes.all(), f"{offset:#x}: {flipped:#x} went unnoticed"
                    seen["told"] += 1
            except PkernfsError:
                seen["refused"] += 1
            region.copy_in(0, image)
        assert seen["told"] > 200, seen
