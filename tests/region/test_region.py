"""Regions: mapping, bounds, and physical addresses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from pkernfs.native._native import ffi, lib

from pkernfs.errors import RegionError
from pkernfs.layout import BLOCK, PAGE
from pkernfs.quantities import PageNo, PhysAddr, RegionOff
from pkernfs.region import files
from pkernfs.region import region as region_module
from pkernfs.region.files import OpenFileBacking
from pkernfs.region.region import Region
from support.checking import MemoryFile
from support.huge_pages import free_pages, huge_pages

MIB = 1 << 20


@pytest.mark.parametrize("size", [PAGE, BLOCK - PAGE, BLOCK, 5 * BLOCK + PAGE, 1 << 40])
def test_mappings_are_aligned_for_huge_pages(size: int) -> None:
    with Region.anonymous(size) as region:
        assert int(ffi.cast("uintptr_t", region.base)) % BLOCK == 0
        assert region.size == size
        region.store_u64(RegionOff(size - 8), 0x0102030405060708)
        assert region.read(RegionOff(size - 8), 8) == bytes(range(8, 0, -1))


def test_a_file_keeps_what_was_stored(path: str) -> None:
    with Region.open(path, write=True) as region:
        assert int(ffi.cast("uintptr_t", region.base)) % BLOCK == 0
        region.copy_in(RegionOff(5), b"hello")
        region.view(RegionOff(BLOCK), 3)[:] = b"abc"
        region.sync()
    with Region.open(path, write=False) as region:
        assert region.read(RegionOff(5), 5) == b"hello"
        assert region.read(RegionOff(BLOCK), 3) == b"abc"
        assert not region.writable
        with pytest.raises(TypeError):
            region.view(RegionOff(0), 1)[:] = b"x"


def test_every_access_is_inside() -> None:
    with Region.anonymous(8 * PAGE) as region:
        for at, length in (
            (-1, 1),
            (0, -1),
            (8 * PAGE, 1),
            (8 * PAGE - 1, 2),
            (1 << 64, 1),
            (0, 8 * PAGE + 1),
        ):
            offset = RegionOff(at)
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
        for at in (-8, 8 * PAGE, 8 * PAGE - 4, 4, 1):
            with pytest.raises(RegionError):
                region.store_u64(RegionOff(at), 1)
        for page in (-1, 8):
            with pytest.raises(RegionError):
                region.page_checksum(PageNo(page))
        assert region.is_zero(RegionOff(0), 8 * PAGE)
        region.copy_in(RegionOff(8 * PAGE), b"")
        assert len(region.view(RegionOff(8 * PAGE), 0)) == 0


def test_nothing_is_stored_read_only(path: str) -> None:
    with Region.open(path, write=False) as region:
        stores: tuple[Callable[[], None], ...] = (
            lambda: region.copy_in(RegionOff(0), b"x"),
            lambda: region.zero(RegionOff(0), 8),
            lambda: region.store_u64(RegionOff(0), 1),
        )
        for store in stores:
            with pytest.raises(RegionError) as caught:
                store()
            assert caught.value.errno == errno.EROFS
        assert region.is_zero(RegionOff(0), region.size)


def test_is_zero() -> None:
    with Region.anonymous(BLOCK) as region:
        assert region.is_zero(RegionOff(0), BLOCK)
        for at in map(RegionOff, (0, 1, 4095, 4096, BLOCK - 1)):
            region.copy_in(at, b"\1")
            assert not region.is_zero(RegionOff(0), BLOCK)
            assert region.is_zero(RegionOff(at + 1), BLOCK - at - 1)
            region.zero(at, 1)
        assert region.is_zero(RegionOff(0), BLOCK)
        assert region.is_zero(RegionOff(7), 0)


def test_closing_twice(path: str) -> None:
    region = Region.open(path, write=True)
    region.close()
    region.close()
    assert len(region.view(RegionOff(0), 8)) == 0
    Region.open(path, write=True).close()


def test_physical_addresses(path: str) -> None:
    with Region.open(path, write=True) as region:
        assert region.physical(RegionOff(0)) is None
        assert region.phys_base is None
    with Region.open(path, write=True, phys_base=PhysAddr(5 << 30)) as region:
        assert region.phys_base == 5 << 30
        assert region.physical(RegionOff(0)) == 5 << 30
        assert region.physical(RegionOff(3 * BLOCK + 17)) == (5 << 30) + 3 * BLOCK + 17
    with Region.anonymous(BLOCK, phys_base=PhysAddr(1 << 40)) as region:
        assert region.physical(RegionOff(8)) == (1 << 40) + 8


def test_addresses_that_are_given_or_that_nobody_knows(path: str) -> None:
    with Region.open(path, write=True) as region:
        assert list(region.existing_runs(RegionOff(5), 10)) == [(5, 10, None)]
        assert not region.asks_for_addresses
    with Region.open(path, write=True, phys_base=PhysAddr(5 << 30)) as region:
        assert list(region.existing_runs(RegionOff(5), 10)) == [(5, 10, (5 << 30) + 5)]
        assert not region.asks_for_addresses


_TOUCH = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
    for page in sys.argv[2:]:
        memory[int(page) << 21]
"""


@pytest.mark.fuse  # as root, with pages to spare
@pytest.mark.parametrize("at_once", [4096, 3])
@pytest.mark.parametrize("write", [True, False])
def test_to_look_for_huge_pages_takes_none(
    write: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has touched them: this process or another one. The next look finds the same."""
    monkeypatch.setattr(region_module, "_PAGES_AT_ONCE", at_once)
    with huge_pages(32 * MIB) as directory:
        path = str(directory / "region")
        Region.create(path, 32 * MIB)
        with Region.open(path, write=True) as region:
            region.copy_in(RegionOff(9 * BLOCK), b"x")
        subprocess.run([sys.executable, "-c", _TOUCH, path, "3", "4", "14"], check=True)
        free = free_pages()
        with Region.open(path, write=write) as region:
            assert region.asks_for_addresses
            for _ in range(2):
                runs = list(region.existing_runs(RegionOff(5), 32 * MIB - 10))
                assert free_pages() == free
            known = {
                page
                for at, length, address in runs
                if address is not None
                for page in range(at // BLOCK, (at + length) // BLOCK)
            }
            assert known == {3, 4, 9, 14}
            assert (runs[0].offset, sum(run.length for run in runs)) == (5, 32 * MIB - 10)
            assert all(a.offset + a.length == b.offset for a, b in pairwise(runs))
            for run in runs:
                if run.physical is not None:
                    assert region.physical_runs(run.offset, run.length) == [run]
            [part] = region.existing_runs(RegionOff(9 * BLOCK + 4096), 8192)
            assert part == region.physical_runs(RegionOff(9 * BLOCK + 4096), 8192)[0]
            assert free_pages() == free


@pytest.mark.parametrize(
    ("size", "align"), [(2 << 20, 3 << 20), (2 << 20, (1 << 64) - 1), ((1 << 64) - 4096, 4096)]
)
def test_a_mapping_that_would_not_be_where_there_is_room(size: int, align: int) -> None:
    error = ffi.new("int *")
    assert lib.pk_map(-1, 0, size, align, 1, error) == ffi.NULL
    assert error[0] == errno.EINVAL


def test_the_addresses_of_a_segment_come_back(tmp_path: Path) -> None:
    """A guest's memory is mapped a thousand times in the life of a daemon."""

    def reserved() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4096

    path = tmp_path / "segment"
    path.write_bytes(b"")
    os.truncate(path, 1 << 30)
    before = reserved()
    for _ in range(4):
        backing = OpenFileBacking(os.open(path, os.O_RDWR), str(path))
        backing.may_vanish = True
        Region(backing, writable=True).close()
    assert reserved() - before < 1 << 30


def test_a_hole_is_not_looked_for_beyond_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each step over a full file on tmpfs would take as long as all that is left of it."""
    asked: list[int] = []
    real = os.lseek

    def seek(fd: int, at: int, whence: int) -> int:
        asked.append(whence)
        return real(fd, at, whence)

    with MemoryFile(16 << 20) as memory, memory.open() as region:
        region.copy_in(RegionOff(0), b"x" * (12 << 20))
        monkeypatch.setattr(os, "lseek", seek)
        for at in range(0, 12 << 20, 1 << 20):
            run = RegionOff(at), RegionOff(at + (1 << 20))
            assert list(region.data_ranges(*run)) == [run]
        odd = RegionOff(5), RegionOff((1 << 20) + 7)
        assert list(region.data_ranges(*odd)) == [odd]
        region.zero(RegionOff(0), 12 << 20)
        assert asked == []
        assert region.descriptor is not None
        files.punch(region.descriptor, 4 << 20, 5 << 20)
        assert list(region.data_ranges(RegionOff(3 << 20), RegionOff(6 << 20))) == [
            (3 << 20, 4 << 20),
            (5 << 20, 6 << 20),
        ]
        assert list(region.data_ranges(RegionOff(10 << 20))) == [(10 << 20, 12 << 20)]
        assert list(region.data_ranges(RegionOff(7), RegionOff(7))) == []
        used = os.fstat(region.descriptor).st_blocks
        region.zero(RegionOff(0), 16 << 20)
        assert os.fstat(region.descriptor).st_blocks == used


CUT = """
import os, sys
from pkernfs.errors import RegionError
from pkernfs.region.bus_error import exit_on_bus_error
from pkernfs.region.files import OpenFileBacking
from pkernfs.region.region import Region
exit_on_bus_error("a fault", 9)
path = sys.argv[1]
backing = OpenFileBacking(os.open(path, os.O_RDWR), "segment")
backing.may_vanish = True
with Region(backing, writable=True) as region:
    os.truncate(path, 4096)
    for access in (
        lambda: region.copy_out(4096, bytearray(4096)),
        lambda: region.copy_in(4096, b"new"),
        lambda: region.zero(4096, 4096),
    ):
        try:
            access()
        except RegionError as e:
            print(e)
"""


def test_a_segment_that_was_cut_is_an_error_and_no_fault(tmp_path: Path) -> None:
    """Zeros are there without memory; in a process that a bus error would end."""
    path = tmp_path / "segment"
    path.write_bytes(b"x" * 3 * PAGE)
    done = subprocess.run([sys.executable, "-c", CUT, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == 2 * "segment: cut behind pkernfs's back\n"
