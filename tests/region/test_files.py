"""File regions: opened, made, locked, and their holes."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from pkernfs.native._native import lib

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import LockedError, NoSpaceError, RegionError
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.host.mount_table import MountLine
from pkernfs.layout import BLOCK, PAGE, ROOT_INO
from pkernfs.quantities import RegionOff
from pkernfs.region import files, locks
from pkernfs.region.files import FileBacking, OpenFileBacking
from pkernfs.region.region import Region
from support.checking import MemoryFile

MIB = 1 << 20


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


def test_files_that_end_with_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an overlay the upper directory counts; what is not there does not."""
    with MemoryFile(16 << 20) as memory:
        assert files.is_in_memory(memory.path)
    assert not files.is_in_memory(f"{tmp_path}/none")
    assert not files.is_in_memory("/proc/version")
    assert not files.is_in_memory("/dev/null")  # its node is on a tmpfs, as that of a disk
    with open("/proc/version", "rb") as proc:
        monkeypatch.setattr(files, "_OVERLAYFS", lib.pk_fs_magic(proc.fileno()))
    device = os.stat("/proc").st_dev
    for upper, found in (("/dev/shm", True), ("/sys", False), ("/proc/self", False), (None, False)):
        options = ("rw", "lowerdir=/x", *([f"upperdir={upper}"] if upper else []))
        line = MountLine("overlay", "/proc", "overlay", options)
        monkeypatch.setattr(files, "own_mounts", lambda host, line=line: iter([line]))
        assert os.stat("/proc/version").st_dev == device
        assert files.is_in_memory("/proc/version") == found


def test_sizes_are_cut_to_pages(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(3 * PAGE + 5))
    with Region.open(str(odd), write=False) as region:
        assert region.size == 3 * PAGE


def test_holes_are_known_to_be_zero(path: str) -> None:
    with Region.open(path, write=True) as region:
        assert region.known_zero() == [(0, 4)]
        region.copy_in(RegionOff(BLOCK + 5000), b"x")
        assert region.known_zero() == [(0, 1), (2, 2)]
        region.copy_in(RegionOff(0), b"x")
        region.copy_in(RegionOff(4 * BLOCK - 1), b"x")
        assert region.known_zero() == [(2, 1)]
        covered = sum(end - start for start, end in region.data_ranges())
        assert 3 * PAGE <= covered <= 3 * BLOCK
        assert not region.has_data(RegionOff(2 * BLOCK), RegionOff(3 * BLOCK))
        assert region.has_data(RegionOff(2 * BLOCK), RegionOff(4 * BLOCK))
    with Region.anonymous(BLOCK) as region:
        assert region.known_zero() == []


# ------------------------------------------------------------------------------ locks

_HOLD = """
import sys
from pkernfs.region.files import FileBacking
from pkernfs.region.region import Region
region = Region.open(sys.argv[1], write=sys.argv[2] == "w")
if sys.argv[2] == "w":
    region.serving(True)
print("ready", flush=True)
sys.stdin.read()
"""


def test_memory_files_are_regions_of_the_kernel() -> None:
    with MemoryFile(BLOCK) as memory:
        with memory.open() as region:
            assert not region.needs_sync
            region.copy_in(RegionOff(7), b"kept")
        with memory.open(write=False) as region:
            assert region.read(RegionOff(7), 4) == b"kept"


_HOLD = """
import sys
from pkernfs.region.files import FileBacking
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


@pytest.mark.usefixtures("impatient")
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


def test_zeroing_leaves_holes(tmp_path: Path) -> None:
    """A sparse file on tmpfs or ext4 does not fill up when what was never written is zeroed."""
    path = tmp_path / "region"
    Region.create(str(path), 64 << 20)
    with Region.open(str(path), write=True) as region:
        region.copy_in(RegionOff(9 << 20), b"data")
        before = path.stat().st_blocks
        region.zero(RegionOff(0), 64 << 20)
        assert path.stat().st_blocks <= before
        assert region.read(RegionOff(9 << 20), 4) == bytes(4)


def test_what_is_reserved_has_memory_and_no_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "region"
    Region.create(str(path), 64 << 20)
    with Region.open(str(path), write=True) as region:
        region.copy_in(RegionOff(BLOCK), b"data")
        region.reserve(RegionOff(BLOCK - PAGE), 2 * PAGE)
        region.reserve(RegionOff(8 * BLOCK), BLOCK)
        used = path.stat().st_blocks * 512
        assert BLOCK + 2 * PAGE <= used <= 4 * BLOCK, "pages may be large ones"
        region.reserve(RegionOff(8 * BLOCK), BLOCK)
        assert path.stat().st_blocks * 512 == used
        assert path.stat().st_size == 64 << 20
        assert region.read(RegionOff(BLOCK), 4) == b"data"
        assert region.is_zero(RegionOff(8 * BLOCK), BLOCK)
        with pytest.raises(RegionError):
            region.reserve(RegionOff(64 << 20), PAGE)
    with Region.open(str(path), write=False) as region, pytest.raises(RegionError):
        region.reserve(RegionOff(0), PAGE)
    with Region.anonymous(BLOCK) as region:
        region.reserve(RegionOff(0), BLOCK)


@pytest.mark.parametrize("refused", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_file_system_refuses_to_reserve(
    path: str, refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Region.open(path, write=True, lock=False) as region:
        monkeypatch.setattr(files, "lib", SimpleNamespace(pk_reserve=lambda *_: refused))
        with pytest.raises(NoSpaceError, match="the file system that it is on is full"):
            region.reserve(RegionOff(0), PAGE)


def test_a_file_system_that_cannot_reserve_is_no_reason_to_refuse(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Region.open(path, write=True, lock=False) as region:
        monkeypatch.setattr(files, "lib", SimpleNamespace(pk_reserve=lambda *_: errno.EOPNOTSUPP))
        region.reserve(RegionOff(0), PAGE)


def test_removed_sparse_file_takes_no_memory(tmp_path: Path) -> None:
    """Blocks that a file never wrote to stay holes of the region when they are zeroed again."""
    path = tmp_path / "region"
    Region.create(str(path), 256 << 20)
    with Region.open(str(path), write=True) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        ino = fs.create(ROOT_INO, b"guest-ram", stat.S_IFREG | 0o600, 0, 0).ino
        fs.setattr(ino, size=200 << 20)
        fs.unlink(ROOT_INO, b"guest-ram")
        while claim := fs.next_dirty(64 << 20):
            for offset, length in claim.pieces():
                region.zero(offset, length)
            fs.finish_zeroing(claim)
        fs.unmount()
        assert path.stat().st_blocks * 512 < 16 << 20


def test_a_file_system_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the metadata would fit: said before a file is made."""
    full = os.statvfs_result((4096, 4096, 1000, 10, 10, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(RegionError, match="cannot create: the file system is full") as caught:
        files.create(str(tmp_path / "region"), 8 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    files.create(str(tmp_path / "region"), 8 * PAGE)


def test_huge_pages_do_not_tell_holes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on hugetlbfs: known to be zero while there is no memory, and addresses to look up."""
    with open(path, "rb") as file:
        magic = int(lib.pk_fs_magic(file.fileno()))
    monkeypatch.setattr(files, "_HUGETLBFS", magic)
    backing = FileBacking(path, write=True, phys_base=None, lock=False)
    assert backing.in_pagemap
    assert backing.real_addresses
    assert backing.known_zero() == [(0, backing.size // BLOCK)]
    assert list(backing.data_ranges(RegionOff(PAGE), RegionOff(BLOCK))) == [(PAGE, BLOCK)]
    assert backing.has_data(RegionOff(PAGE), RegionOff(BLOCK))
    backing.close()


def test_where_the_kernel_does_not_look_there_is_no_address(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without userfaultfd for huge pages: here no descriptor is left for it."""
    with open(path, "rb") as file:
        magic = int(lib.pk_fs_magic(file.fileno()))
        free = file.fileno()
    monkeypatch.setattr(files, "_HUGETLBFS", magic)
    with Region.open(path, write=True) as region:
        assert region.asks_for_addresses
        region.copy_in(RegionOff(0), b"touched")
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            found = list(region.existing_runs(RegionOff(5), 10))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert found == [(5, 10, None)]


def test_a_file_system_is_written_back(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    files.sync_file_system(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        files.sync_file_system(fd)
    assert caught.value.errno == errno.EBADF


def test_a_file_that_is_open_already(path: str) -> None:
    """Its first bytes are a region; the descriptor goes with it, but not if that fails."""
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(RegionError, match="a name: region too small: got 8388608 bytes"):
        OpenFileBacking(fd, "a name", size=PAGE - 1)
    backing = OpenFileBacking(fd, "a name", size=BLOCK + 5)
    with Region(backing, writable=True) as region:
        assert (region.name, region.size) == ("a name", BLOCK)
        region.copy_in(RegionOff(0), b"stored")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert Path(path).read_bytes()[:6] == b"stored"


def test_memory_of_the_kernel_and_pages_that_go_back_to_it(tmp_path: Path) -> None:
    with open("/proc/version", "rb") as proc:
        assert files.memory_file(proc.fileno()) is None
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            files.punch(proc.fileno(), 0, PAGE)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        assert files.memory_file(file.fileno()) == (False, PAGE)
        file.write(b"x" * 3 * PAGE)
        file.flush()
        files.punch(file.fileno(), PAGE - 1, 2 * PAGE + 1)
        file.seek(0)
        assert file.read() == b"x" * (PAGE - 1) + bytes(PAGE + 2) + b"x" * (PAGE - 1)
        assert os.fstat(file.fileno()).st_blocks * 512 == 2 * PAGE


def test_bytes_of_a_directory_that_have_no_memory() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        where = Path(name)
        directory = os.open(where, os.O_PATH)
        assert files.untouched(directory) == 0
        (where / "sparse").touch()
        os.truncate(where / "sparse", 1 << 40)
        assert files.untouched(directory) == 1 << 40
        with (where / "sparse").open("r+b") as file:
            file.write(b"x" * 3 * PAGE)
        assert files.untouched(directory) == (1 << 40) - 3 * PAGE
        (where / "full").write_bytes(b"x" * 5)  # it has more memory than bytes
        (where / "directory").mkdir()
        (where / "link").symlink_to("sparse")
        assert files.untouched(directory) == (1 << 40) - 3 * PAGE
        os.close(directory)
    with open("/proc/version", "rb") as proc, pytest.raises(OSError, match="Not a directory"):
        files.untouched(proc.fileno())
