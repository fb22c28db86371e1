"""What the first mount after a handover finds changed."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    CorruptionError,
    PkernfsError,
)
from pkernfs.fs import comparison, fsck, manifest, state_page, superblock
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import (
    ARRIVAL_LIVE_UPDATE,
    FIRST_MAP_PAGE,
    INODE_BYTES,
    MAGIC_STATE,
    PAGE,
    RESULT_CHANGED,
    RESULT_EVERYTHING,
    RESULT_METADATA,
    ROOT_INO,
    STATE_PAGE,
    page_offset,
)
from pkernfs.quantities import Ino, RegionOff, SegmentNo
from pkernfs.region import files
from pkernfs.region.region import Region
from support.checking import MemoryFile, assert_clean
from support.handed import MIB, Handed, boot, changes_of, file_of, has_digests, reseal
from support.handover import hand_over, verify
from support.memory_pool import POOL, MemoryPool
from support.pooled_handover import PooledFiles, make_guest, pooled_files

# ---------------------------------------------------------------------- the first mount


def test_nothing_has_changed(handed: Handed) -> None:
    with boot(9):
        fs = handed.mount()
        mount_report = verify(fs)
    assert mount_report.kind == ARRIVAL_LIVE_UPDATE
    assert mount_report.gap_ns is not None
    assert 0 < mount_report.gap_ns < 60e9
    assert not mount_report.trouble
    assert not mount_report.changes.all()
    digests = mount_report.verifier is not None
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
    assert facts["history"][0]["gap_ns"] == mount_report.gap_ns
    assert facts["history"][0]["result"] == ("unchanged" if digests else "metadata unchanged")


def test_changed_data_is_named(handed: Handed) -> None:
    digests = has_digests(handed)
    place = handed.places
    for name, at in (("ram", 3 * MIB + 17), ("f7", 0), ("below", 4)):
        byte = handed.region.read(RegionOff(place[name] + at), 1)
        handed.region.copy_in(RegionOff(place[name] + at), bytes([byte[0] ^ 4]))
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
    file_of(fs, "new", b"works")
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
    assert handed.region.is_zero(RegionOff(at), PAGE)
    handed.region.copy_in(RegionOff(at + 9), b"!")
    assert set(changes_of(handed.mount())) == {"/sparse"}


def page_of(handed: Handed, ino: Ino) -> RegionOff:
    """Region offset of the inode page of an inode."""
    fs = handed.mount(read_only=True)
    return page_offset(fs.super.inodes.where[ino >> 4])


def test_a_changed_inode_is_named(handed: Handed) -> None:
    """Its page has a good checksum: who did it knew how."""
    ino = handed.inos["f9"]
    at = page_of(handed, ino)
    uid = RegionOff(at + (ino & 15) * INODE_BYTES + 16)
    handed.region.copy_in(uid, (4711).to_bytes(4, "little"))
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
    page = handed.region.read(page_offset(STATE_PAGE), PAGE)
    assert at != page_of(handed, state_page.read_record(page).list_ino)
    handed.region.copy_in(RegionOff(at + (ino & 15) * INODE_BYTES + 40), b"\xff" * 8)
    fs = handed.mount()
    changes = changes_of(fs)
    assert "inode damaged" in changes["/f30"]
    assert changes[""] == f"inode page at {at:#x} damaged"
    assert bytes(fs.read(handed.inos["below"], 0, 10)) == b"below"
    file_of(fs, "new", b"works")
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
    at = page_offset(fs.inode(handed.inos["dir"]).body)
    data = handed.region.read(at, PAGE)
    where = data.index(b"below")
    handed.region.copy_in(RegionOff(at + where), b"BELOW")
    if sealed:
        reseal(handed.region, at)
    changes = changes_of(handed.mount(read_only=True))
    state = "changed" if sealed else "damaged"
    assert changes == {"/dir": f"tree node at {at:#x} {state}"}


def test_changed_structures_are_named(handed: Handed) -> None:
    at = page_offset(FIRST_MAP_PAGE)
    # Some blocks are no longer known to be zero.
    handed.region.copy_in(RegionOff(at + 2752 + 3), b"\0")
    reseal(handed.region, at)
    fs = handed.mount()
    assert changes_of(fs) == {"": f"block map at {at:#x} changed"}
    fs.unmount()


def test_a_removed_file_is_named(handed: Handed) -> None:
    """Somebody who knows nothing of handovers has had the region."""
    before = handed.region.read(page_offset(STATE_PAGE), PAGE)
    with mock.patch("pkernfs.fs.comparison.load"):
        fs = handed.mount()
        list_ino = state_page.read_record(before).list_ino
        assert list_ino
    fs.unlink(ROOT_INO, b"f3")
    fs.unmount()
    assert_clean(handed.region)


def test_files_that_change_meanwhile_are_not_accused(handed: Handed) -> None:
    fs = handed.mount()
    if fs.mount_report is None or fs.mount_report.verifier is None:
        fs.unmount()
        return
    inos = handed.inos
    bytes(fs.read(inos["f4"], 0, 100))  # an access time is no change
    fs.write(inos["f5"], 0, b"written after the mount")
    fs.setattr(inos["ram"], size=MIB)
    fs.unlink(ROOT_INO, b"f6")
    handed.region.copy_in(handed.places["f4"], b"!!")
    mount_report = verify(fs)
    assert [change.ino for change in mount_report.changes.all()] == [inos["f4"]]
    assert mount_report.verifier is not None
    assert mount_report.verifier.skipped == {inos["f5"], inos["ram"], inos["f6"]}
    fs.write(inos["f5"], 0, b"later")
    assert mount_report.verifier.changed_meanwhile == {inos["f5"], inos["ram"], inos["f6"]} | (
        mount_report.verifier.changed_meanwhile - {inos["f5"]}
    )
    fs.unmount()


# ---------------------------------------------------------------------- at any size


@pytest.mark.slow("a region of 2 TiB is mounted twice")
def test_holes_cost_nothing() -> None:
    """A sparse file of 1 TiB in a region of 2 TiB: its list has what there is memory for."""
    with MemoryFile(2 << 40) as memory, memory.open() as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        ino = file_of(fs, "ram", b"first")
        fs.run(lambda: fs.setattr(ino, size=1 << 40))
        fs.run(lambda: fs.write(ino, 1 << 39, b"middle"))
        hand_over(fs)
        record = state_page.read_record(fs.store.read(STATE_PAGE, MAGIC_STATE))
        assert record.list_bytes < 64 << 10
        fs.unmount()
        again = mount_filesystem(region)
        mount_report = verify(again)
        assert mount_report.result == RESULT_EVERYTHING
        again.unmount()
        assert_clean(region)


@pytest.mark.slow("5,000 files are listed, and compared twice")
def test_a_large_list() -> None:
    """More files than one inode page, leaf or piece of work has room for."""
    with Region.anonymous(256 * MIB) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        inos = [file_of(fs, f"file{i}", b"%d" % i) for i in range(5000)]
        hand_over(fs)
        victim = fs.extents(inos[4321])[0].region_offset
        fs.unmount()
        region.copy_in(victim, b"x")
        fs = mount_filesystem(region)
        assert changes_of(fs) == {"/file4321": "bytes 0x0..0x200000"}
        fs.unmount()
        assert_clean(region)


# ---------------------------------------------------------------------- anything at all


@pytest.mark.slow("400 mounts, each of a region with a byte changed")
def test_no_changed_byte_goes_unnoticed(request: pytest.FixtureRequest) -> None:
    """Bits flipped anywhere in metadata or data: the mount is refused, or tells of it."""
    rng = random.Random(request.config.getoption("hypothesis_seed"))
    with Region.anonymous(16 * MIB) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        for i in range(30):
            file_of(fs, f"f{i}", rng.randbytes(rng.randrange(1, 30_000)))
        directory = fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
        for i in range(30):
            file_of(fs, f"g{i}", rng.randbytes(100), directory)
        file_of(fs, "large", rng.randbytes(3 * MIB))
        hand_over(fs)
        places = [page * PAGE for page in fsck.survey(region).metadata_pages()]
        places.append(STATE_PAGE * PAGE)
        metadata = len(places)
        for _, extents in fsck.survey(region).files():
            places += [start for _, _, start in extents]
        fs.unmount()
        image = region.read(RegionOff(0), region.size)
        seen = {"refused": 0, "trouble": 0, "told": 0}
        for number in range(400):
            at = rng.choice(places[:metadata] if number % 2 else places[metadata:])
            offset = RegionOff(at + rng.randrange(PAGE if number % 2 else 100) // 8 * 8)
            flipped = rng.randrange(1, 1 << 64)
            word = int.from_bytes(image[offset : offset + 8], "little") ^ flipped
            region.store_u64(offset, word)
            try:
                mounted = mount_filesystem(region)
                mount_report = verify(mounted)
                comparison.tell(mount_report.changes, mounted.readdir, mounted.holder)
                if mount_report.trouble:
                    seen["trouble"] += 1
                else:
                    assert mount_report.changes.all(), f"{offset:#x}: {flipped:#x} went unnoticed"
                    seen["told"] += 1
            except PkernfsError:
                seen["refused"] += 1
            region.copy_in(RegionOff(0), image)
        assert seen["told"] > 200, seen


# ---------------------------------------------------------------------- segments


@pytest.fixture
def pooled() -> Iterator[PooledFiles]:
    with pooled_files() as made:
        yield made


def handed_guests(pooled: PooledFiles) -> None:
    """A guest whose memory is random, a larger and a sparse one, and a file in the region."""
    fs = pooled.mount()
    make_guest(fs, "one", 5 * MIB + 77)
    make_guest(fs, "two", 70 * MIB, {0: b"t" * 70 * MIB})
    make_guest(fs, "sparse", 200 * MIB, {9 * MIB: b"here", 150 * MIB: b"and there"})
    file_of(fs, "flat", b"flat")
    hand_over(fs)
    fs.unmount()


def test_segments_that_are_as_they_were(pooled: PooledFiles) -> None:
    handed_guests(pooled)
    with boot(9):
        fs = pooled.mount()
        mount_report = verify(fs)
    assert not mount_report.changes.all()
    assert not mount_report.trouble
    assert mount_report.result == RESULT_EVERYTHING
    assert mount_report.verifier is not None
    assert mount_report.verifier.done_bytes > 75 * MIB
    fs.unmount()


def test_changes_of_segments_are_named(pooled: PooledFiles) -> None:
    handed_guests(pooled)
    pooled.flip(1, 5 * MIB + 76)  # the last byte
    pooled.flip(2, 0)
    pooled.flip(2, 69 * MIB)  # in another batch
    pooled.flip(3, 100 * MIB + 5)  # in a hole
    pooled.flip(3, 150 * MIB)
    fs = pooled.mount()
    assert changes_of(fs) == {
        "/one": "bytes 0x400000..0x600000",
        "/two": "bytes 0x0..0x200000, bytes 0x4400000..0x4600000",
        "/sparse": "bytes 0x6400000..0x6600000, bytes 0x9600000..0x9800000",
    }
    fs.unmount()
    pooled.flip(1, 5 * MIB)
    fs = pooled.mount()
    assert changes_of(fs) == {}  # that handover is over
    fs.unmount()


def test_memory_that_has_become_a_hole_is_named(pooled: PooledFiles) -> None:
    handed_guests(pooled)
    with pooled.segment(1).open("r+b") as file:
        files.punch(file.fileno(), 2 * MIB, 4 * MIB)
    fs = pooled.mount()
    assert changes_of(fs) == {"/one": "bytes 0x200000..0x400000"}
    fs.unmount()


def test_what_is_behind_the_end_of_the_file_is_not_compared(pooled: PooledFiles) -> None:
    """A program that maps the segment may use all of it."""
    handed_guests(pooled)
    pooled.flip(1, 5 * MIB + PAGE + 1)
    fs = pooled.mount()
    assert changes_of(fs) == {}
    fs.unmount()
    with pooled.segment(1).open("r+b") as file:
        os.pwrite(file.fileno(), bytes(1), 5 * MIB + PAGE + 1)


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_lost_segment_is_no_change(pooled: PooledFiles, how: str) -> None:
    handed_guests(pooled)
    if how == "cut":
        os.truncate(pooled.segment(1), 2 * MIB)
    else:
        pooled.segment(1).unlink()
    pooled.flip(2, 0)
    fs = pooled.mount()
    assert changes_of(fs) == {"/two": "bytes 0x0..0x200000"}
    report = fs.mount_report
    assert report is not None
    (reason,) = report.lost.values()
    assert "segment-1: lost: " in reason
    fs.unmount()


def test_what_is_lost_alone_is_not_everything(pooled: PooledFiles) -> None:
    handed_guests(pooled)
    pooled.segment(1).unlink()
    fs = pooled.mount()
    assert verify(fs).result == RESULT_METADATA
    fs.unmount()


def test_a_segment_that_is_cut_amid_the_comparison(pooled: PooledFiles) -> None:
    handed_guests(pooled)
    fs = pooled.mount()
    report = fs.mount_report
    assert report is not None
    assert report.verifier is not None
    seen = []
    for batch in report.verifier.batches():
        if batch.part is not None:
            seen.append((batch.part.row.number, batch.part.start))
            if seen[-1][0] == 2:
                os.truncate(pooled.segment(2), 2 * MIB)
        report.verifier.take(batch, report.verifier.run(batch, threads=1))
    assert seen == [(1, 0), (2, 0), (3, 0)]
    assert not report.changes.all()
    (reason,) = report.lost.values()
    assert "segment-2: lost: it was cut" in reason
    fs.unmount()


def test_a_segment_that_somebody_leases_is_not_verified(pooled: PooledFiles) -> None:
    handed_guests(pooled)
    fs = pooled.mount()
    report = fs.mount_report
    assert report is not None
    assert report.verifier is not None
    file = pooled.segment(1).open("r+b")
    fs.segments.unmap(SegmentNo(1))
    fcntl.fcntl(file.fileno(), fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)
    assert not verify(fs).changes.all()
    file.close()
    assert report.verifier.skipped == {fs.lookup(ROOT_INO, b"one").ino}
    assert not report.lost
    fs.unmount()


def test_segments_that_change_meanwhile_are_not_accused(pooled: PooledFiles) -> None:
    handed_guests(pooled)
    fs = pooled.mount()
    report = fs.mount_report
    assert report is not None
    assert report.verifier is not None
    inos = {name: fs.lookup(ROOT_INO, name).ino for name in (b"one", b"two", b"sparse")}
    fs.run(lambda: fs.write(inos[b"one"], 0, b"written after the mount"))
    for batch in report.verifier.batches():
        outcome = report.verifier.run(batch, threads=1)
        if batch.part is not None and batch.part.row.number == 2:
            fs.run(lambda: fs.setattr(inos[b"two"], size=2 * MIB))
        if batch.part is not None and batch.part.row.number == 3:
            fs.unlink(ROOT_INO, b"sparse")
        report.verifier.take(batch, outcome)
    assert report.verifier.finished
    assert not report.changes.all()
    assert report.verifier.skipped == set(inos.values())
    fs.unmount()


def test_who_holds_a_changed_segment_is_named(pooled: PooledFiles) -> None:
    handed_guests(pooled)
    fs = pooled.mount()
    program = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0)\n"
    program += "m[3 << 20] ^= 1; print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(pooled.segment(1))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdout is not None
        assert guest.stdout.readline() == b"ready\n"
        (what,) = changes_of(fs).values()
        assert guest.stdin is not None
        guest.stdin.close()
    assert what.startswith(f"bytes 0x200000..0x400000 (process {guest.pid} (")
    assert what.endswith(") maps it: it may have written there)")
    fs.unmount()


def test_a_list_that_knows_no_segments_says_nothing_of_them(pooled: PooledFiles) -> None:
    """As one of a version that listed them without digests."""
    handed_guests(pooled)
    pooled.flip(1, 0)
    with mock.patch.object(comparison, "parse_manifest", _without_segments):
        fs = pooled.mount()
    assert changes_of(fs) == {}
    fs.unmount()


def _without_segments(data: bytes, uuid: bytes, number: int) -> manifest.Manifest:
    return manifest.parse_manifest(data, uuid, number)._replace(with_segments=False)


@pytest.mark.slow("200 comparisons of 20 MiB")
def test_no_flipped_bit_of_a_segment_goes_unnoticed(request: pytest.FixtureRequest) -> None:
    """One bit at a time, anywhere in a segment: the file and the 2 MiB are named, and no others."""
    rng = random.Random(request.config.getoption("hypothesis_seed"))
    with MemoryPool() as pool, Region.anonymous(16 * MIB) as region:
        make_filesystem(region, pool=POOL)
        fs = mount_filesystem(region, open_pool=pool.opener())
        sizes = {"a": 7 * MIB + 3000, "b": 10 * MIB, "c": 2 * MIB + 1}
        for name, size in sizes.items():
            make_guest(fs, name, size)
        hand_over(fs)
        fs.unmount()
        for _ in range(200):
            number, (name, size) = rng.choice(list(enumerate(sizes.items(), 1)))
            at = rng.randrange(size)
            fd = pool.memories[SegmentNo(number)]
            (byte,) = os.pread(fd, 1, at)
            os.pwrite(fd, bytes([byte ^ 1 << rng.randrange(8)]), at)
            fs = mount_filesystem(region, read_only=True, open_pool=pool.opener())
            low = at // (2 * MIB) * 2 * MIB
            assert changes_of(fs) == {f"/{name}": f"bytes {low:#x}..{low + 2 * MIB:#x}"}
            fs.unmount()
            os.pwrite(fd, bytes([byte]), at)
