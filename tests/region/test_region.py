"""Regions: mapping, bounds, locks, physical addresses, checksums and the record of stores."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pkernfs.native._native import ffi

from pkernfs.errors import LockedError, RegionError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import BLOCK, PAGE
from pkernfs.region import locks
from pkernfs.region.checksum import crc32c, page_checksum
from pkernfs.region.region import Region
from pkernfs.region.trace import Store, trace_start, trace_stop
from support.checking import MemoryFile

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    name = str(tmp_path / "region")
    Region.create(name, 8 * MIB)
    return name


# ------------------------------------------------------------------------------ mapping and bounds


@pytest.mark.parametrize("size", [PAGE, BLOCK - PAGE, BLOCK, 5 * BLOCK + PAGE, 1 << 40])
def test_mappings_are_aligned_for_huge_pages(size: int) -> None:
    with Region.anonymous(size) as region:
        assert int(ffi.cast("uintptr_t", region.base)) % BLOCK == 0
        assert region.size == size
        region.store_u64(size - 8, 0x0102030405060708)
        assert region.read(size - 8, 8) == bytes(range(8, 0, -1))


def test_a_file_keeps_what_was_stored(path: str) -> None:
    with Region.open(path, write=True) as region:
        assert int(ffi.cast("uintptr_t", region.base)) % BLOCK == 0
        region.copy_in(5, b"hello")
        region.view(BLOCK, 3)[:] = b"abc"
        region.sync()
    with Region.open(path, write=False) as region:
        assert region.read(5, 5) == b"hello"
        assert region.read(BLOCK, 3) == b"abc"
        assert not region.writable
        with pytest.raises(TypeError):
            region.view(0, 1)[:] = b"x"


def test_every_access_is_inside() -> None:
    with Region.anonymous(8 * PAGE) as region:
        for offset, length in (
            (-1, 1),
            (0, -1),
            (8 * PAGE, 1),
            (8 * PAGE - 1, 2),
            (1 << 64, 1),
            (0, 8 * PAGE + 1),
        ):
            with pytest.raises(RegionError):
                region.view(offset, length)
            with pytest.raises(RegionError):
                region.read(offset, length)
            with pytest.raises(RegionError):
                region.zero(offset, length)
            with pytest.raises(RegionError):
                region.is_zero(offset, length)
            if length > 0:
                with pytest.raises(RegionError):
                    region.copy_in(offset, bytes(min(length, 1 << 20)) + b"x" * (offset == 0))
        for offset in (-8, 8 * PAGE, 8 * PAGE - 4, 4, 1):
            with pytest.raises(RegionError):
                region.store_u64(offset, 1)
        for page in (-1, 8):
            with pytest.raises(RegionError):
                region.page_checksum(page)
        assert region.is_zero(0, 8 * PAGE)
        region.copy_in(8 * PAGE, b"")
        assert len(region.view(8 * PAGE, 0)) == 0


def test_nothing_is_stored_read_only(path: str) -> None:
    with Region.open(path, write=False) as region:
        stores: tuple[Callable[[], None], ...] = (
            lambda: region.copy_in(0, b"x"),
            lambda: region.zero(0, 8),
            lambda: region.store_u64(0, 1),
        )
        for store in stores:
            with pytest.raises(RegionError) as caught:
                store()
            assert caught.value.errno == errno.EROFS
        assert region.is_zero(0, region.size)


def test_is_zero() -> None:
    with Region.anonymous(BLOCK) as region:
        assert region.is_zero(0, BLOCK)
        for at in (0, 1, 4095, 4096, BLOCK - 1):
            region.copy_in(at, b"\1")
            assert not region.is_zero(0, BLOCK)
            assert region.is_zero(at + 1, BLOCK - at - 1)
            region.zero(at, 1)
        assert region.is_zero(0, BLOCK)
        assert region.is_zero(7, 0)


def test_closing_twice(path: str) -> None:
    region = Region.open(path, write=True)
    region.close()
    region.close()
    assert len(region.view(0, 8)) == 0
    Region.open(path, write=True).close()


def test_what_cannot_be_opened(tmp_path: Path, path: str) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x" * 100)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for name, number in (
        (tmp_path / "none", errno.ENOENT),
        (tmp_path, errno.EISDIR),
        (small, errno.EINVAL),
        (fifo, errno.EINVAL),
        (Path("/dev/null"), errno.EINVAL),
    ):
        with pytest.raises(RegionError) as caught:
            Region.open(str(name), write=True)
        assert caught.value.errno == number
        assert str(name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(RegionError, match="exists"):
        Region.create(path, PAGE)
    with pytest.raises(RegionError):
        Region.create(str(tmp_path / "none" / "x"), PAGE)
    with pytest.raises(RegionError):
        Region.create(str(tmp_path / "huge"), 1 << 63)
    assert not (tmp_path / "huge").exists()


def test_sizes_are_cut_to_pages(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(3 * PAGE + 5))
    with Region.open(str(odd), write=False) as region:
        assert region.size == 3 * PAGE


# ------------------------------------------------------------------------------ known zeros


def test_holes_are_known_to_be_zero(path: str) -> None:
    with Region.open(path, write=True) as region:
        assert region.known_zero() == [(0, 4)]
        region.copy_in(BLOCK + 5000, b"x")
        assert region.known_zero() == [(0, 1), (2, 2)]
        region.copy_in(0, b"x")
        region.copy_in(4 * BLOCK - 1, b"x")
        assert region.known_zero() == [(2, 1)]
        covered = sum(end - start for start, end in region.data_ranges())
        assert 3 * PAGE <= covered <= 3 * BLOCK
    with Region.anonymous(BLOCK) as region:
        assert region.known_zero() == []


# ------------------------------------------------------------------------------ locks

_HOLD = """
import sys
from pkernfs.region.region import Region
region = Region.open(sys.argv[1], write=sys.argv[2] == "w")
if sys.argv[2] == "w":
    region.serving(True)
print("ready", flush=True)
sys.stdin.read()
"""


def holder(path: str, mode: str) -> subprocess.Popen[str]:
    """Another process that has the region open, to write or to read."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, path, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=20)


def test_a_region_is_locked_against_this_process_too(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_CLOSING_WAIT_SECONDS", 0.05)
    with Region.open(path, write=True):
        for write in (True, False):
            with pytest.raises(LockedError) as caught:
                Region.open(path, write=write)
            assert caught.value.errno == errno.EBUSY
        Region.open(path, write=False, lock=False).close()
    with (
        Region.open(path, write=False),
        Region.open(path, write=False),
        pytest.raises(LockedError),
    ):
        Region.open(path, write=True)
    Region.open(path, write=True).close()


@pytest.mark.parametrize(("theirs", "ours"), [("w", True), ("w", False), ("r", True)])
def test_a_region_is_locked_against_other_processes(
    path: str, theirs: str, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_CLOSING_WAIT_SECONDS", 0.2)
    process = holder(path, theirs)
    try:
        with pytest.raises(LockedError):
            Region.open(path, write=ours)
    finally:
        end(process)
    Region.open(path, write=True).close()


def test_readers_share(path: str) -> None:
    process = holder(path, "r")
    Region.open(path, write=False).close()
    end(process)


def test_a_dead_process_leaves_no_lock(path: str) -> None:
    process = holder(path, "w")
    process.send_signal(signal.SIGKILL)
    process.wait()
    end(process)
    Region.open(path, write=True).close()


def test_a_contender_waits_for_one_that_is_closing(path: str) -> None:
    process = holder(path, "r")  # not serving: about to let go
    assert process.stdin
    process.stdin.close()
    Region.open(path, write=True).close()
    process.wait()
    assert process.stdout
    process.stdout.close()


# ------------------------------------------------------------------------------ addresses


def test_physical_addresses(path: str) -> None:
    with Region.open(path, write=True) as region:
        assert region.physical(0) is None
        assert region.phys_base is None
    with Region.open(path, write=True, phys_base=5 << 30) as region:
        assert region.phys_base == 5 << 30
        assert region.physical(0) == 5 << 30
        assert region.physical(3 * BLOCK + 17) == (5 << 30) + 3 * BLOCK + 17
    with Region.anonymous(BLOCK, phys_base=1 << 40) as region:
        assert region.physical(8) == (1 << 40) + 8


# ------------------------------------------------------------------------------ checksums


def test_crc32c_known_answers() -> None:
    # RFC 3720, B.4, and the usual check value
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(memoryview(bytearray(b"123456789"))) == 0xE3069283


def _slow_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@given(data=st.binary(max_size=200), cut=st.integers(0, 200))
def test_crc32c_is_what_it_is_and_can_be_continued(data: bytes, cut: int) -> None:
    assert crc32c(data) == _slow_crc32c(data)
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


def test_page_checksums_leave_their_own_field_out() -> None:
    page = bytearray(random.Random(1).randbytes(PAGE))
    expected = crc32c(bytes(page[:4]) + bytes(4) + bytes(page[8:]))
    assert page_checksum(page) == expected
    page[4:8] = b"abcd"
    assert page_checksum(page) == expected
    page[8] ^= 1
    assert page_checksum(page) != expected
    with Region.anonymous(2 * PAGE) as region:
        region.copy_in(PAGE, page)
        assert region.page_checksum(1) == page_checksum(page)


# ------------------------------------------------------------------------------ the trace


def replay(image: bytearray, stores: list[Store]) -> None:
    for offset, length, data in stores:
        assert data is None or len(data) == length
        image[offset : offset + length] = bytes(length) if data is None else data


@given(seed=st.integers(0, 1 << 32))
def test_a_trace_rebuilds_the_region(seed: int) -> None:
    rnd = random.Random(seed)
    with Region.anonymous(4 * PAGE) as region:
        region.copy_in(0, rnd.randbytes(4 * PAGE))
        image = bytearray(region.read(0, region.size))
        trace_start()
        count = rnd.randrange(30)
        for _ in range(count):
            length = rnd.randrange(1, 600)
            offset = rnd.randrange(region.size - length)
            kind = rnd.randrange(3)
            if kind == 0:
                region.copy_in(offset, rnd.randbytes(length))
            elif kind == 1:
                region.zero(offset, length)
            else:
                region.store_u64(offset // 8 * 8, rnd.getrandbits(64))
        stores = trace_stop()
        assert len(stores) == count
        replay(image, stores)
        assert image == region.read(0, region.size)
        region.copy_in(0, b"after the end")
        assert trace_stop() == stores


def test_a_traced_store_that_is_refused_is_not_there() -> None:
    with Region.anonymous(PAGE) as region:
        trace_start()
        with pytest.raises(RegionError):
            region.zero(PAGE, 1)
        assert trace_stop() == []


def test_memory_files_are_regions_of_the_kernel() -> None:
    with MemoryFile(BLOCK) as memory:
        with memory.open() as region:
            assert not region.needs_sync
            region.copy_in(7, b"kept")
        with memory.open(write=False) as region:
            assert region.read(7, 4) == b"kept"


def test_zeroing_leaves_holes(tmp_path: Path) -> None:
    """A sparse file on tmpfs or ext4 does not fill up when what was never written is zeroed."""
    path = tmp_path / "region"
    Region.create(str(path), 64 << 20)
    with Region.open(str(path), write=True) as region:
        region.copy_in(9 << 20, b"data")
        before = path.stat().st_blocks
        region.zero(0, 64 << 20)
        assert path.stat().st_blocks <= before
        assert region.read(9 << 20, 4) == bytes(4)


def test_removed_sparse_file_takes_no_memory(tmp_path: Path) -> None:
    """Blocks that a file never wrote to stay holes of the region when they are zeroed again."""
    path = tmp_path / "region"
    Region.create(str(path), 256 << 20)
    with Region.open(str(path), write=True) as region:
        make_filesystem(region)
        fs = FileSystem.mount(region)
        ino = fs.create(1, b"guest-ram", stat.S_IFREG | 0o600, 0, 0).ino
        fs.setattr(ino, size=200 << 20)
        fs.unlink(1, b"guest-ram")
        while claim := fs.next_dirty(64 << 20):
            for offset, length in claim.pieces():
                region.zero(offset, length)
            fs.finish_zeroing(claim)
        fs.unmount()
        assert path.stat().st_blocks * 512 < 16 << 20


def test_bus_error_is_one_line(tmp_path: Path) -> None:
    """A region that is cut short while it is mapped ends the process with a message."""
    path = tmp_path / "region"
    Region.create(str(path), 8 << 20)
    program = (
        "import os, sys\n"
        "from pkernfs.region.bus_error import exit_on_bus_error\n"
        "from pkernfs.region.region import Region\n"
        "region = Region.open(sys.argv[1], write=True)\n"
        "exit_on_bus_error('pkernfs', 32)\n"
        "os.truncate(sys.argv[1], 0)\n"
        "region.copy_in(4 << 20, b'x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 32
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("pkernfs: bus error")
