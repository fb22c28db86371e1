"""Real mounts: what programs see through the kernel, and when it is in the region."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fuse

from pkernfs.control import client  # noqa: E402
from pkernfs.control.protocol import Ping  # noqa: E402
from pkernfs.errors import LockedError  # noqa: E402
from pkernfs.region.region import Region  # noqa: E402
from support.huge_pages import free_pages, huge_pages  # noqa: E402
from support.mounting import (  # noqa: E402
    MIB,
    Mapper,
    Mounted,
    child,
    is_mounted,
    libc,
    run_as,
    run_pkernfs,
    wait_until,
)

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16
USER = 4711
KERNEL = tuple(int(n) for n in os.uname().release.split(".")[:2])

_tags = itertools.count()


def tag() -> bytes:
    """Bytes that stand nowhere else."""
    return b"pkernfs-test-%08d-%d." % (next(_tags), os.getpid())


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    with Mounted(options="allow_other,suid") as mount:
        yield mount


@pytest.fixture(params=["direct", "page"])
def in_mode(request: pytest.FixtureRequest) -> Iterator[Mounted]:
    with Mounted(options=f"cache={request.param}") as mount:
        yield mount


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    call = libc.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(fd, mode, offset, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def renameat2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def inodes_used(mounted: Mounted) -> int:
    """How many inodes there are; a removed one goes when the kernel has told to forget it."""
    now = os.statvfs(mounted.path)
    return now.f_files - now.f_ffree


def place_of(path: Path) -> int:
    """Region offset of a file's first byte."""
    place: int = struct.unpack_from("<Q", os.getxattr(path, "system.pkernfs.extents"), 16)[0]
    return place


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def fails_with(code: int) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno != code:
            raise
    else:
        pytest.fail(f"did not fail with {errno.errorcode[code]}")


# ---------------------------------------------------------------------- who sees what


def test_a_write_is_in_the_region_when_it_returns(in_mode: Mounted) -> None:
    t = tag()
    with open(in_mode.path / "f", "wb", buffering=0) as f:
        f.write(t)
        assert in_mode.in_region(t)


def test_shared_mappings_of_two_processes(in_mode: Mounted) -> None:
    path = in_mode.path / "f"
    path.write_bytes(bytes(MIB))
    with Mapper(path, MIB) as a, Mapper(path, MIB) as b, open(path, "r+b", buffering=0) as f:
        t = tag()
        a.store(0, t)
        assert b.load(0, len(t)) == t
        assert os.pread(f.fileno(), len(t), 0) == t
        t = tag()
        os.pwrite(f.fileno(), t, 4096)
        assert a.load(4096, len(t)) == t, "a page that was not mapped yet"
        t = tag()
        os.pwrite(f.fileno(), t, 4096)
        assert a.load(4096, len(t)) == t, "a page that was"
        stored, written = tag(), tag()
        b.store(8192 + 2000, stored)
        os.pwrite(f.fileno(), written, 8192)
        assert os.pread(f.fileno(), len(stored), 8192 + 2000) == stored, "a store beside a write"
        assert a.load(8192, len(written)) == written


def test_a_read_brings_stores_into_the_region() -> None:
    with Mounted(options="cache=direct") as mount:
        path = mount.path / "f"
        path.write_bytes(bytes(MIB))
        with Mapper(path, MIB) as a, open(path, "rb", buffering=0) as f:
            t = tag()
            a.store(0, t)
            assert f.read(len(t)) == t
            assert mount.in_region(t)


@pytest.mark.parametrize("how", ["msync", "fsync", "close", "munmap", "exit", "kill", "syncfs"])
def test_flushes_bring_stores_into_the_region(in_mode: Mounted, how: str) -> None:
    path = in_mode.path / "f"
    path.write_bytes(bytes(MIB))
    with Mapper(path, MIB) as a:
        t = tag()
        a.store(12345, t)
        if how in ("exit", "kill"):
            a.end(kill=how == "kill")
        elif how == "syncfs":
            fd = os.open(path, os.O_RDONLY)
            libc.syncfs(fd)
            os.close(fd)
        else:
            a.tell(how)
        assert in_mode.in_region(t)


def test_unmount_and_sigterm_bring_stores_into_the_region(in_mode: Mounted) -> None:
    path = in_mode.path / "f"
    path.write_bytes(bytes(MIB))
    with Mapper(path, MIB) as a:
        t = tag()
        a.store(0, t)
        assert in_mode.daemon
        in_mode.daemon.send_signal(signal.SIGTERM)  # while the mapping is in use
        assert in_mode.wait() == 0
        assert in_mode.in_region(t)
    assert not is_mounted(in_mode.path)


@pytest.mark.parametrize("mode", ["direct", "page"])
def test_a_store_into_the_region_is_seen(mode: str) -> None:
    with Mounted(options=f"cache={mode}") as mount:
        path = mount.path / "f"
        old, new = tag(), tag()
        path.write_bytes(old + bytes(MIB))
        with open(mount.region, "r+b", buffering=0) as region, Mapper(path, MIB) as a:
            f = os.open(path, os.O_RDONLY)
            assert a.load(0, len(old)) == os.pread(f, len(old), 0) == old
            os.pwrite(region.fileno(), new, place_of(path))
            assert os.pread(f, len(old), 0) == (new if mode == "direct" else old)
            assert a.load(0, len(old)) == old, "the page cache is a copy"
            os.close(os.open(path, os.O_RDONLY))
            assert a.load(0, len(old)) == os.pread(f, len(old), 0) == new, "after an open"
            os.close(f)


def test_programs_run_from_the_mount(in_mode: Mounted) -> None:
    program = in_mode.path / "true"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    assert subprocess.run([program]).returncode == 0
    with open(in_mode.path / "x", "wb") as out, open(program, "rb") as f:
        size = program.stat().st_size
        assert os.sendfile(out.fileno(), f.fileno(), 0, size) == size


def test_times_follow_stores_of_a_mapping(in_mode: Mounted) -> None:
    path = in_mode.path / "f"
    path.write_bytes(bytes(4096))
    with Mapper(path, 4096) as a:
        before = path.stat().st_mtime_ns
        a.store(0, b"x")
        a.tell("msync")
        assert path.stat().st_mtime_ns > before


# ---------------------------------------------------------------------- files


def test_fallocate_modes(mounted: Mounted) -> None:
    path = mounted.path / "f"
    with open(path, "w+b", buffering=0) as f:
        fd = f.fileno()
        fallocate(fd, 0, 0, 3 * MIB)
        assert os.fstat(fd).st_size == 3 * MIB
        assert os.fstat(fd).st_blocks * 512 >= 3 * MIB
        fallocate(fd, KEEP_SIZE, 4 * MIB, 2 * MIB)
        assert os.fstat(fd).st_size == 3 * MIB
        f.write(b"x" * 3 * MIB)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 1000, MIB)
        assert os.pread(fd, 3 * MIB, 0) == b"x" * 1000 + bytes(MIB) + b"x" * (2 * MIB - 1000)
        fallocate(fd, ZERO_RANGE, 3 * MIB - 10, 20)
        assert os.fstat(fd).st_size == 3 * MIB + 10
        assert os.pread(fd, 30, 3 * MIB - 20) == b"x" * 10 + bytes(20)
        with fails_with(errno.EOPNOTSUPP):
            fallocate(fd, COLLAPSE_RANGE, 0, MIB)


def test_seek_data_and_hole(mounted: Mounted) -> None:
    with open(mounted.path / "f", "w+b", buffering=0) as f:
        fd = f.fileno()
        os.ftruncate(fd, 16 * MIB)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 16 * MIB, "truncate allocates"
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 16 * MIB)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        with fails_with(errno.ENXIO):
            os.lseek(fd, 0, os.SEEK_DATA)
        os.pwrite(fd, b"x", 8 * MIB + 5)
        start = os.lseek(fd, 0, os.SEEK_DATA)
        end = os.lseek(fd, start, os.SEEK_HOLE)
        assert 0 < start <= 8 * MIB + 5 < end <= 16 * MIB
        with fails_with(errno.ENXIO):
            os.lseek(fd, 16 * MIB, os.SEEK_HOLE)


def test_copy_file_range(mounted: Mounted) -> None:
    data = os.urandom(3 * MIB)
    (mounted.path / "a").write_bytes(data)
    with open(mounted.path / "a", "rb") as a, open(mounted.path / "b", "w+b") as b:
        left = len(data)
        while left:
            left -= os.copy_file_range(a.fileno(), b.fileno(), left)
    assert (mounted.path / "b").read_bytes() == data


def test_append_by_four_processes(mounted: Mounted) -> None:
    path = mounted.path / "log"
    path.touch()

    def append(letter: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        for _ in range(200):
            os.write(fd, letter * 99 + b"\n")

    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(child(lambda c=c: append(c))) for c in (b"a", b"b", b"c", b"d")]  # type: ignore[misc]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    lines = path.read_bytes().splitlines()
    assert len(lines) == 800
    assert all(line == line[:1] * 99 for line in lines)


def test_open_flags(mounted: Mounted) -> None:
    path = mounted.path / "f"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    with fails_with(errno.EEXIST):
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    path.write_bytes(b"x" * 100)
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.stat().st_size == 0
    with fails_with(errno.ENOTDIR):
        os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def test_unlinked_file_lives_while_open(mounted: Mounted) -> None:
    path = mounted.path / "f"
    path.write_bytes(b"x" * MIB)  # so that what a directory needs is there
    path.unlink()
    free = os.statvfs(mounted.path).f_bfree
    with open(path, "w+b", buffering=0) as f:
        f.write(b"still here" * 100_000)
        path.unlink()
        assert not path.exists()
        assert os.pread(f.fileno(), 10, 0) == b"still here"
        assert os.fstat(f.fileno()).st_nlink == 0
        f.write(b"more")
    wait_until(lambda: os.statvfs(mounted.path).f_bfree == free, "its memory back")


def test_what_is_removed_is_free_at_once(mounted: Mounted) -> None:
    """As a script has it that removes a file and looks how much room there is."""
    path = mounted.path / "f"
    free = os.statvfs(mounted.path).f_bfree
    for _ in range(50):
        path.write_bytes(bytes(3 * MIB))
        assert os.statvfs(mounted.path).f_bfree < free - 700
        path.unlink()
        assert os.statvfs(mounted.path).f_bfree >= free - 8, "but for what a directory needs"


def test_times_in_nanoseconds(mounted: Mounted) -> None:
    path = mounted.path / "f"
    path.touch()
    os.utime(path, ns=(1_234_567_890_123_456_789, 987_654_321))
    assert path.stat().st_atime_ns == 1_234_567_890_123_456_789
    assert path.stat().st_mtime_ns == 987_654_321
    before = time.time_ns() - 50_000_000
    os.utime(path)
    assert before < path.stat().st_mtime_ns < time.time_ns() + 50_000_000
    mtime = path.stat().st_mtime_ns
    os.chmod(path, 0o600)
    assert path.stat().st_mtime_ns == mtime
    assert path.stat().st_ctime_ns >= mtime


# ---------------------------------------------------------------------- names


def test_rename_flags(mounted: Mounted) -> None:
    a, b = mounted.path / "a", mounted.path / "b"
    a.write_bytes(b"A")
    b.write_bytes(b"B")
    with fails_with(errno.EEXIST):
        renameat2(a, b, RENAME_NOREPLACE)
    renameat2(a, b, RENAME_EXCHANGE)
    assert (a.read_bytes(), b.read_bytes()) == (b"B", b"A")
    renameat2(a, mounted.path / "c", RENAME_NOREPLACE)
    assert sorted(p.name for p in mounted.path.iterdir()) == ["b", "c", "iommu"]
    (mounted.path / "d").mkdir()
    renameat2(b, mounted.path / "d", RENAME_EXCHANGE)
    assert b.is_dir()
    renameat2(b, mounted.path / "x", RENAME_WHITEOUT)
    left = b.lstat()
    assert (stat.S_IFMT(left.st_mode), left.st_rdev) == (stat.S_IFCHR, 0)
    with fails_with(errno.EINVAL):
        renameat2(b, mounted.path / "x", RENAME_EXCHANGE | RENAME_WHITEOUT)


def link_open_file(fd: int, path: Path) -> None:
    """linkat(2) as its manual page has it for a file without a name."""
    if libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, os.fsencode(path), 0x400):
        raise OSError(ctypes.get_errno(), "linkat")


@pytest.mark.skipif(KERNEL < (6, 2), reason="FUSE has O_TMPFILE since Linux 6.2")
def test_a_file_without_a_name(mounted: Mounted) -> None:
    assert inodes_used(mounted) == 2
    fd = os.open(mounted.path, os.O_TMPFILE | os.O_RDWR, 0o640)
    t = tag()
    os.write(fd, t)
    assert os.pread(fd, 100, 0) == t
    assert (os.fstat(fd).st_nlink, stat.S_IMODE(os.fstat(fd).st_mode)) == (0, 0o640)
    assert [p.name for p in mounted.path.iterdir()] == ["iommu"]
    link_open_file(fd, mounted.path / "f")
    assert os.fstat(fd).st_nlink == 1
    os.close(fd)
    assert (mounted.path / "f").read_bytes() == t
    fd = os.open(mounted.path, os.O_TMPFILE | os.O_WRONLY | os.O_EXCL)
    with fails_with(errno.ENOENT):
        link_open_file(fd, mounted.path / "g")
    os.close(fd)
    with fails_with(errno.EPERM):
        os.open(mounted.path / "iommu", os.O_TMPFILE | os.O_WRONLY)
    wait_until(lambda: inodes_used(mounted) == 3, "the file to go")
    fd = os.open(mounted.path, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, bytes(3 * MIB))
    mounted.kill()
    os.close(fd)
    mounted.start()
    assert inodes_used(mounted) == 3
    assert (mounted.path / "f").read_bytes() == t


def test_a_user_makes_a_file_without_a_name(mounted: Mounted) -> None:
    if KERNEL < (6, 2):
        pytest.skip("FUSE has O_TMPFILE since Linux 6.2")
    mounted.path.chmod(0o1777)

    def make() -> None:
        fd = os.open(mounted.path, os.O_TMPFILE | os.O_WRONLY, 0o600)
        os.write(fd, b"mine")
        link_open_file(fd, mounted.path / "f")

    run_as(USER, make)
    assert ((mounted.path / "f").stat().st_uid, mode_of(mounted.path / "f")) == (USER, 0o600)


@pytest.mark.skipif(KERNEL < (6, 6), reason="FUSE has birth times since Linux 6.6")
@pytest.mark.parametrize("ns", [-(1 << 63), -(1 << 63) + 1, -1_000_000_000, -1, (1 << 63) - 1])
def test_times_beside_a_birth_time(mounted: Mounted, ns: int) -> None:
    """Whoever asks for the birth time gets the others by the same request, the first time."""
    path = mounted.path / "f"
    path.touch()
    os.utime(path, ns=(ns, ns))
    found = subprocess.run(["stat", "-c", "%W %.9X %.9Y", path], capture_output=True, text=True)
    sign, (seconds, rest) = "-" if ns < 0 else "", divmod(abs(ns), 10**9)
    assert found.stdout.split()[1:] == [f"{sign}{seconds}.{rest:09d}"] * 2


@pytest.mark.skipif(KERNEL < (6, 6), reason="FUSE has birth times since Linux 6.6")
def test_birth_times(mounted: Mounted) -> None:
    path = mounted.path / "f"
    path.touch()
    made = path.stat().st_ctime_ns

    def times() -> list[str]:
        found = subprocess.run(
            ["stat", "-c", "%.9W %.9X %.9Y %s %h %f %u", path], capture_output=True, check=True
        )
        return found.stdout.decode().split()

    seconds = f"{made // 10**9}.{made % 10**9:09d}"
    assert times() == [seconds, seconds, seconds, "0", "1", "81a4", "0"]
    path.write_bytes(bytes(5000))
    os.utime(path, ns=(-1_500_000_000, 3))
    os.chmod(path, 0o4711)
    assert times() == [seconds, "-1.500000000", "0.000000003", "5000", "1", "89c9", "0"]
    os.link(path, mounted.path / "g")
    assert times()[4] == "2"
    mounted.unmount()
    mounted.start()
    assert times()[0] == seconds
    os.mknod(mounted.path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    device = subprocess.run(["stat", "-c", "%W %t %T", mounted.path / "null"], capture_output=True)
    assert device.stdout.decode().split()[1:] == ["1", "3"]


def test_a_removed_file_is_opened_again_by_its_descriptor(mounted: Mounted) -> None:
    """O_PATH is no open file to the daemon, and the last close must not end what it leads to."""
    path = mounted.path / "f"
    path.write_bytes(b"content")
    handle = os.open(path, os.O_PATH)
    path.unlink()
    for _ in range(2):
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDWR)
        assert os.pread(fd, 100, 0) == b"content"
        os.close(fd)
    os.close(handle)
    wait_until(lambda: inodes_used(mounted) == 2, "the file to go")


class FileHandle(ctypes.Structure):
    """``struct file_handle`` with room for what FUSE puts into it."""

    _fields_ = (("size", ctypes.c_uint), ("kind", ctypes.c_int), ("data", ctypes.c_ubyte * 128))


def handle_of(path: Path) -> FileHandle:
    """What an NFS server gives a client for a file: name_to_handle_at(2)."""
    handle, mount_id = FileHandle(size=128), ctypes.c_int()
    where = -100, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount_id), 0
    if libc.name_to_handle_at(*where):
        raise OSError(ctypes.get_errno(), "name_to_handle_at")
    return handle


def open_handle(directory: Path, handle: FileHandle) -> int:
    """A descriptor by open_by_handle_at(2); the kernel has forgotten what it knew of the file."""
    Path("/proc/sys/vm/drop_caches").write_text("2")
    fd = os.open(directory, os.O_RDONLY)
    try:
        found: int = libc.open_by_handle_at(fd, ctypes.byref(handle), os.O_RDONLY)
        if found < 0:
            raise OSError(ctypes.get_errno(), "open_by_handle_at")
        return found
    finally:
        os.close(fd)


def test_a_file_handle_leads_to_its_file_and_to_no_later_one(mounted: Mounted) -> None:
    """As an NFS server asks, which keeps nothing open."""
    path, directory = mounted.path / "f", mounted.path / "d"
    path.write_bytes(b"content")
    directory.mkdir()
    handles = [handle_of(path), handle_of(directory)]
    for handle in handles:
        os.close(open_handle(mounted.path, handle))
    fd = open_handle(mounted.path, handles[0])
    assert os.pread(fd, 100, 0) == b"content"
    os.close(fd)
    number = path.stat().st_ino
    path.unlink()
    directory.rmdir()
    for handle in handles:
        with fails_with(errno.ESTALE):
            open_handle(mounted.path, handle)
    for i in range(50):
        (mounted.path / f"later{i}").touch()
    assert number in {p.stat().st_ino for p in mounted.path.iterdir()}, "the number is used again"
    with fails_with(errno.ESTALE):
        open_handle(mounted.path, handles[0])
    assert list((mounted.path / "iommu").iterdir()) == [], "and it has not failed"
    (mounted.path / "again").touch()


def test_the_extents_of_a_file_on_huge_pages_cost_no_memory() -> None:
    with huge_pages(64 * MIB) as directory, Mounted(directory=str(directory)) as mount:
        path = mount.path / "f"
        path.touch()
        os.truncate(path, 20 * MIB)
        with open(path, "r+b", buffering=0) as f:
            f.write(b"x")
        free = free_pages()
        value = os.getxattr(path, "system.pkernfs.extents")
        assert free_pages() == free
        extents = list(struct.iter_unpack("<QQQQ", value))
        assert [(at, length) for at, length, *_ in extents] == [(0, 2 * MIB), (2 * MIB, 18 * MIB)]
        assert extents[0][3] % (2 * MIB) == 0
        assert extents[1][3] == 2**64 - 1, "not there yet"
        with open(path, "r+b", buffering=0) as f:
            f.seek(19 * MIB)
            f.write(b"x")
        assert free_pages() == free - 1
        assert len(os.getxattr(path, "system.pkernfs.extents")) == 3 * 32


def test_a_length_that_no_state_could_hold(mounted: Mounted) -> None:
    path = mounted.path / "f"
    path.write_bytes(b"kept")
    for size in (1 << 40, (1 << 63) - 1):
        with fails_with(errno.EFBIG):
            os.truncate(path, size)
        with open(path, "r+b") as f, fails_with(errno.EFBIG):
            os.ftruncate(f.fileno(), size)
    with fails_with(errno.ENOSPC):
        os.truncate(path, os.statvfs(mounted.path).f_blocks * 4096)
    assert path.read_bytes() == b"kept"


@pytest.mark.parametrize("seconds", [9223372037, 16725225600, -9223372037, -62135596800])
def test_a_time_that_cannot_be_kept_is_refused(mounted: Mounted, seconds: int) -> None:
    path = mounted.path / "f"
    path.touch()
    before = path.stat().st_mtime_ns
    for times in ((seconds, 0), (0, seconds)):
        with fails_with(errno.EOVERFLOW):
            os.utime(path, times)
    assert path.stat().st_mtime_ns == before
    first, last = -(1 << 63), (1 << 63) - 1
    os.utime(path, ns=(first, last))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (first, last)


def test_names_of_any_bytes(mounted: Mounted) -> None:
    root = os.fsencode(mounted.path)
    names = [bytes([c]) for c in range(1, 256) if c not in b"./"]
    names += [b"\xff" * 255, b"...", b"a" * 255, "ü€".encode(), b"\n\\"]
    for name in names:
        os.close(os.open(root + b"/" + name, os.O_CREAT | os.O_WRONLY))
    assert sorted(os.listdir(root)) == sorted([*names, b"iommu"])
    with fails_with(errno.ENAMETOOLONG):
        os.mkdir(root + b"/" + b"a" * 256)
    for name in names:
        os.unlink(root + b"/" + name)
    assert os.listdir(root) == [b"iommu"]


def test_listing_under_change(mounted: Mounted) -> None:
    directory = mounted.path / "d"
    directory.mkdir()
    kept = {f"kept-{i}" for i in range(500)}
    for name in kept:
        (directory / name).touch()
    seen: list[str] = []
    with os.scandir(directory) as entries:
        for i, entry in enumerate(entries):
            seen.append(entry.name)
            (directory / f"new-{i}").touch()
            if entry.name.startswith("new"):
                (directory / entry.name).unlink()
    assert len(seen) == len(set(seen)), "nothing twice"
    assert kept <= set(seen)


def test_special_files(mounted: Mounted) -> None:
    os.mkfifo(mounted.path / "fifo")
    os.mknod(mounted.path / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.symlink(b"\xff" * 4000, os.fsencode(mounted.path / "link"))
    os.link(mounted.path / "fifo", mounted.path / "fifo2")
    assert stat.S_ISFIFO((mounted.path / "fifo").stat().st_mode)
    assert (mounted.path / "fifo").stat().st_nlink == 2
    assert (mounted.path / "null").stat().st_rdev == os.makedev(1, 3)
    assert os.readlink(os.fsencode(mounted.path / "link")) == b"\xff" * 4000


# ---------------------------------------------------------------------- permissions


def setid_file(mount: Mounted) -> Path:
    path = mount.path / "setid"
    path.write_bytes(b"x" * 10_000)
    os.chown(path, USER, USER)
    path.chmod(0o6755)
    return path


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def change_by(how: str, path: Path) -> None:
    """Change a file's contents in one of several ways."""
    if how == "truncate":
        os.truncate(path, 5)
        return
    with opened(path, os.O_RDWR | (os.O_TRUNC if how == "open" else 0)) as fd:
        if how == "write":
            os.pwrite(fd, b"y", 0)
        elif how == "fallocate":
            fallocate(fd, 0, 0, 20_000)
        elif how == "copy":
            os.copy_file_range(fd, fd, 10, 0, 100)


@pytest.mark.parametrize("how", ["write", "truncate", "open", "fallocate", "copy"])
@pytest.mark.parametrize("mode", ["direct", "page"])
def test_setid_bits_go_when_others_change_the_file(how: str, mode: str) -> None:
    with Mounted(options=f"cache={mode},allow_other") as mount:
        check_setid_bits(mount, how)


def check_setid_bits(mount: Mounted, how: str) -> None:
    path = setid_file(mount)
    change_by(how, path)
    assert mode_of(path) == 0o6755, "root may"
    run_as(USER, lambda: change_by(how, path))
    assert mode_of(path) == 0o755


def test_setid_bits_and_owners(mounted: Mounted) -> None:
    path = setid_file(mounted)
    os.chown(path, USER + 1, USER)
    assert mode_of(path) & stat.S_ISUID == 0
    os.chown(path, USER, 1)
    path.chmod(0o755)
    run_as(USER, lambda: path.chmod(0o2755))
    assert mode_of(path) == 0o755, "not a member of the file's group"


def test_file_capabilities_go_with_a_write(mounted: Mounted) -> None:
    path = mounted.path / "f"
    path.write_bytes(b"x")
    value = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
    os.setxattr(path, "security.capability", value)
    assert os.getxattr(path, "security.capability") == value
    with open(path, "r+b", buffering=0) as f:
        f.write(b"y")
        assert os.listxattr(path) == []
        os.setxattr(path, "security.capability", value)
        f.write(b"z")
        assert os.listxattr(path) == []


def test_sticky_and_setgid_directories(mounted: Mounted) -> None:
    mounted.path.chmod(0o755)
    sticky, shared = mounted.path / "sticky", mounted.path / "shared"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "theirs").touch()
    run_as(USER, lambda: (sticky / "mine").touch())
    with pytest.raises(AssertionError):
        run_as(USER, lambda: (sticky / "theirs").unlink())
    run_as(USER, lambda: (sticky / "mine").unlink())
    shared.mkdir()
    os.chown(shared, USER, 99)
    shared.chmod(0o2775)
    run_as(USER, (shared / "d").mkdir)
    run_as(USER, (shared / "f").touch)
    assert (shared / "f").stat().st_gid == 99
    assert (shared / "d").stat().st_gid == 99
    assert mode_of(shared / "d") & stat.S_ISGID
    with pytest.raises(AssertionError):
        run_as(USER, lambda: (mounted.path / "no").touch())


def test_other_users_are_refused_without_allow_other() -> None:
    with Mounted() as mount, pytest.raises(AssertionError):
        run_as(USER, lambda: os.stat(mount.path))


# ---------------------------------------------------------------------- extended attributes


def test_xattr_flags_and_namespaces(mounted: Mounted) -> None:
    path = mounted.path / "f"
    path.touch()
    with fails_with(errno.ENODATA):
        os.setxattr(path, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with fails_with(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    os.setxattr(path, "user.a", b"", os.XATTR_REPLACE)
    for name in ("user.a", "user.new"):
        with fails_with(errno.EINVAL):
            os.setxattr(path, name, b"2", os.XATTR_CREATE | os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b""
    os.setxattr(path, "trusted.t", b"t" * 60_000)
    assert os.getxattr(path, "trusted.t") == b"t" * 60_000
    assert sorted(os.listxattr(path)) == ["trusted.t", "user.a"]
    path.chmod(0o644)
    run_as(USER, lambda: _expect(os.listxattr(path), ["user.a"]))
    with fails_with(errno.EOPNOTSUPP):
        os.setxattr(
            path,
            "system.posix_acl_access",
            struct.pack("<I2HI2HI2HI", 2, 1, 6, 2**32 - 1, 4, 4, 2**32 - 1, 32, 4, 2**32 - 1),
        )
    with fails_with(errno.EOPNOTSUPP):
        os.setxattr(path, "system.other", b"")
    os.removexattr(path, "user.a")
    with fails_with(errno.ENODATA):
        os.getxattr(path, "user.a")


def _expect(got: object, expected: object) -> None:
    assert got == expected, f"got {got!r}, expected {expected!r}"


def test_extents_attribute() -> None:
    base = 0x40000000
    with Mounted(options=f"phys_base={base:#x},allow_other") as mount:
        path = mount.path / "f"
        t = tag()
        path.write_bytes(t + bytes(4 * MIB))
        raw = os.getxattr(path, "system.pkernfs.extents")
        extents = list(struct.iter_unpack("<QQQQ", raw))
        assert sum(length for _, length, _, _ in extents) >= 4 * MIB
        assert mount.region.read_bytes()[extents[0][2] :].startswith(t)
        assert all(physical == base + offset for _, _, offset, physical in extents)
        assert os.getxattr(path, "system.pkernfs.extents.0") == raw
        assert os.getxattr(path, f"system.pkernfs.extents.{len(extents)}") == b""
        assert os.listxattr(path) == []
        with fails_with(errno.ENODATA):
            os.getxattr(path, "system.pkernfs.extents.x")
        with fails_with(errno.EOPNOTSUPP):
            os.setxattr(path, "system.pkernfs.extents", raw)
        mount.path.chmod(0o755)

        def as_another() -> None:
            got = list(struct.iter_unpack("<QQQQ", os.getxattr(path, "system.pkernfs.extents")))
            _expect({physical for _, _, _, physical in got}, {2**64 - 1})

        run_as(USER, as_another)


# ---------------------------------------------------------------------- the mount as a whole


def test_everything_is_there_after_a_remount(mounted: Mounted) -> None:
    (mounted.path / "d").mkdir()
    (mounted.path / "d" / "f").write_bytes(b"kept")
    mounted.unmount()
    mounted.start()
    assert (mounted.path / "d" / "f").read_bytes() == b"kept"


def test_sigkill_and_mount_again(mounted: Mounted) -> None:
    (mounted.path / "f").write_bytes(b"kept")
    mounted.kill()
    mounted.start()
    assert (mounted.path / "f").read_bytes() == b"kept"


def test_unmount_while_busy(mounted: Mounted) -> None:
    with open(mounted.path / "f", "wb"):
        done = subprocess.run(["umount", mounted.path], capture_output=True, text=True)
        assert done.returncode == 32
        assert "busy" in done.stderr
        (mounted.path / "g").touch()
    mounted.unmount()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unmount(mounted: Mounted, number: signal.Signals) -> None:
    (mounted.path / "f").write_bytes(b"kept")
    assert mounted.daemon
    mounted.daemon.send_signal(number)
    assert mounted.wait() == 0
    assert mounted.words() == ""
    assert not is_mounted(mounted.path)
    mounted.start()
    assert (mounted.path / "f").read_bytes() == b"kept"


def test_sigterm_while_busy(mounted: Mounted) -> None:
    assert mounted.daemon
    fd = os.open(mounted.path / "f", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"kept")
    mounted.daemon.send_signal(signal.SIGTERM)
    assert mounted.wait() == 0
    assert "still in use" in mounted.words()
    with fails_with(errno.ENOTCONN):
        os.write(fd, b"lost")
    with fails_with(errno.ENOTCONN):
        os.close(fd)
    assert not is_mounted(mounted.path)
    mounted.start()
    assert (mounted.path / "f").read_bytes() == b"kept"


def test_read_only_mount(mounted: Mounted) -> None:
    (mounted.path / "f").write_bytes(b"kept")
    mounted.unmount()
    before = mounted.region.read_bytes()
    mounted.options = "ro"
    mounted.start()
    assert (mounted.path / "f").read_bytes() == b"kept"
    with fails_with(errno.EROFS):
        (mounted.path / "g").touch()
    mounted.unmount()
    assert mounted.region.read_bytes() == before


def test_a_full_region(mounted: Mounted) -> None:
    path = mounted.path / "big"
    with open(path, "wb", buffering=0) as f, fails_with(errno.ENOSPC):
        while True:
            f.write(b"x" * MIB)
    size = path.stat().st_size
    assert size > 50 * MIB
    with open(path, "rb") as f:
        f.seek(size - 10)
        assert f.read() == b"x" * 10
    path.unlink()
    (mounted.path / "small").write_bytes(b"y" * MIB)
    assert (mounted.path / "small").read_bytes() == b"y" * MIB


def test_a_full_region_and_a_mapping(mounted: Mounted) -> None:
    """A store that has no memory behind it is an error of msync, not a hang."""
    sparse, filler = mounted.path / "sparse", mounted.path / "filler"
    with open(sparse, "wb") as f:
        os.ftruncate(f.fileno(), 32 * MIB)
        fallocate(f.fileno(), PUNCH_HOLE | KEEP_SIZE, 0, 32 * MIB)
    with open(filler, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(b"x" * MIB)
    program = (
        "import mmap, os, sys\n"
        "m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 32 << 20)\n"
        "for i in range(0, 32 << 20, 4096): m[i] = 1\n"
        "try: m.flush()\n"
        "except OSError as e: sys.exit(e.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, sparse])
    assert done.returncode in (errno.ENOSPC, errno.EIO)
    filler.unlink()


@contextlib.contextmanager
def small_tmpfs(size: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pkernfs-test.") as directory:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory]
        subprocess.run(command, check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "-l", directory], check=True)


def test_a_full_file_system_below_the_region() -> None:
    """Whoever needs memory is told ENOSPC; all others go on, and so does the daemon."""
    with small_tmpfs(24 * MIB) as room, Mounted(size=256 * MIB, directory=str(room)) as mount:
        holes, f, domain = mount.path / "holes", mount.path / "f", mount.path / "iommu" / "dom-0"
        holes.touch()
        domain.touch()
        os.truncate(holes, 64 * MIB)
        done = 0
        with open(f, "wb", buffering=0) as file, fails_with(errno.ENOSPC):
            while True:
                done += file.write(b"x" * MIB)
        assert done >= 12 * MIB
        assert os.statvfs(room).f_bavail < 256
        with fails_with(errno.ENOSPC):
            os.truncate(domain, 4 * MIB)
        with open(holes, "r+b", buffering=0) as file, fails_with(errno.ENOSPC):
            file.write(b"x" * MIB)
        with fails_with(errno.EIO):
            holes.read_bytes()
        assert f.read_bytes() == b"x" * done
        for i in range(300):
            (mount.path / f"empty{i}").touch()
        small = mount.path / "small"
        small.write_bytes(b"in pages that have memory")
        assert small.read_bytes() == b"in pages that have memory"
        mount.kill()
        mount.start()
        assert f.stat().st_size == done
        f.unlink()
        small.unlink()
        wait_until(lambda: inodes_used(mount) == 304, "the files to go")
        (mount.path / "again").write_bytes(b"y" * 4 * MIB)
        mount.unmount()


def test_no_mount_where_metadata_has_no_room() -> None:
    """A commit cannot be refused half way."""
    with small_tmpfs(24 * MIB) as room:
        mount = Mounted(size=64 * MIB, directory=str(room))
        filler = room / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        done = run_pkernfs("mount", str(mount.region), str(mount.path))
        assert done.returncode == 32
        assert done.stderr.count("\n") == 1
        assert "the file system that it is on is full" in done.stderr
        assert not is_mounted(mount.path)
        filler.unlink()
        with mount:
            (mount.path / "f").write_bytes(b"now")


def test_four_clients_at_once(mounted: Mounted) -> None:
    def work(number: int) -> None:
        base = mounted.path / f"client-{number}"
        base.mkdir()
        for i in range(150):
            f = base / f"{i}"
            f.write_bytes(b"%d" % i * 1000)
            f.rename(base / f"r{i}")
            assert (base / f"r{i}").read_bytes() == b"%d" % i * 1000
            if i % 3 == 0:
                (base / f"r{i}").unlink()
        assert len(list(base.iterdir())) == 100

    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(child(lambda n=n: work(n))) for n in range(4)]  # type: ignore[misc]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4


def test_fsync_of_a_region_on_a_disk(tmp_path: Path) -> None:
    if os.statvfs(tmp_path).f_fsid == os.statvfs("/dev/shm").f_fsid:
        pytest.skip("temporary files are on tmpfs")
    with Mounted(directory=str(tmp_path)) as mount:
        with open(mount.path / "f", "wb", buffering=0) as f:
            for _ in range(20):
                f.write(b"x" * 100)
                os.fsync(f.fileno())
                os.stat(mount.path / "f")
        fd = os.open(mount.path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        mount.unmount()


def test_zeroing_does_not_hold_up_others() -> None:
    """A stat during the zeroing of freed memory answers in under 5 ms at the median."""
    with Mounted(size=1024 * MIB) as mount:
        with open(mount.path / "big", "wb", buffering=0) as f:
            block = b"x" * MIB
            for _ in range(900):
                f.write(block)
        (mount.path / "big").unlink()
        times = []
        for i in range(200):
            start = time.perf_counter()
            with contextlib.suppress(FileNotFoundError):
                os.stat(mount.path / f"absent-{i}")
            times.append(time.perf_counter() - start)
        assert sorted(times)[100] < 0.005
        with open(mount.path / "next", "wb", buffering=0) as f:
            fallocate(f.fileno(), 0, 0, 900 * MIB)
            assert os.lseek(f.fileno(), 0, os.SEEK_SET) == 0
        with open(mount.path / "next", "rb", buffering=0) as f:
            for _ in range(900):
                assert f.read(MIB).count(0) == MIB


def test_locks_are_the_kernels(mounted: Mounted) -> None:
    """flock and fcntl locks work on one machine without the daemon's help."""
    path = mounted.path / "f"
    with open(path, "w") as a, open(path, "w") as b:
        fcntl.flock(a, fcntl.LOCK_EX)
        with fails_with(errno.EAGAIN):
            fcntl.flock(b, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_mount_right_after_umount(mounted: Mounted) -> None:
    """The region is still being cleaned up when umount(8) returns: the next mount waits for it."""
    for i in range(5):
        (mounted.path / f"f{i}").write_bytes(b"x")
        former = mounted.daemon
        subprocess.run(["umount", mounted.path], check=True)
        mounted.start()
        assert former
        assert former.wait(5) == 0
    assert len(list(mounted.path.iterdir())) == 6


def test_a_second_mount_of_a_region_is_refused(mounted: Mounted) -> None:
    other = mounted.directory / "other"
    other.mkdir()
    done = run_pkernfs("mount", str(mounted.region), str(other))
    assert done.returncode == 32
    assert done.stderr.count("\n") == 1
    assert "in use" in done.stderr
    assert not is_mounted(other)


def test_a_refused_mount_is_one_line(mounted: Mounted) -> None:
    """What libfuse and the kernel refuse is said by us, once."""
    mounted.unmount()
    done = run_pkernfs("mount", "-o", "context=nonsense", str(mounted.region), str(mounted.path))
    assert done.returncode == 32
    assert done.stderr.count("\n") == 1, done.stderr
    assert "cannot mount" in done.stderr


def test_the_background_begins_when_the_mount_answers(mounted: Mounted) -> None:
    mounted.unmount()
    done = run_pkernfs("mount", str(mounted.region), str(mounted.path))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert sorted(os.listdir(mounted.path)) == ["iommu"]
    subprocess.run(["umount", mounted.path], check=True)


def test_a_mount_lets_go_of_what_its_caller_had(mounted: Mounted, tmp_path: Path) -> None:
    """Below flock(1), in a pipeline, from a supervisor with a pipe that tells it of the end."""
    mounted.unmount()
    lock, supervisor = tmp_path / "lock", os.pipe()
    program = [sys.executable, "-c", "import sys; from pkernfs.cli import main; sys.exit(main())"]
    command = ["flock", str(lock), *program, str(mounted.region), str(mounted.path)]
    done = subprocess.run(command, pass_fds=supervisor[1:], capture_output=True, timeout=20)
    os.close(supervisor[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    try:
        assert is_mounted(mounted.path)
        assert select.select([supervisor[0]], [], [], 0)[0], "the daemon has the supervisor's pipe"
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (mounted.path / "f").write_bytes(b"served")
        with pytest.raises(LockedError, match=r"by process \d+ \(python"):
            Region.open(str(mounted.region), write=True)
    finally:
        os.close(supervisor[0])
        subprocess.run(["umount", mounted.path], check=True)


#: The command, and a line on stderr for each look of the process at what is mounted on the last
#: argument.
_WATCHED = """
import os, sys
from pkernfs.cli import main
from pkernfs.control.mounts import read_mounts
def watch(name):
    real = getattr(os, name)
    def watched(path, *rest, **more):
        if path == sys.argv[-1] and any(m.mount_point == path for m in read_mounts()):
            print(f"os.{name} of its own mount", file=sys.stderr)
        return real(path, *rest, **more)
    setattr(os, name, watched)
for name in ("stat", "lstat", "statvfs", "open", "listdir", "scandir", "getxattr"):
    watch(name)
sys.exit(main())
"""


def test_a_daemon_does_not_hold_its_own_mount(mounted: Mounted) -> None:
    """Whatever it asked of the mount would make it busy for an umount(8) at that moment."""
    mounted.unmount()
    command = [sys.executable, "-c", _WATCHED, "mount", "-f"]
    command += [str(mounted.region), str(mounted.path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            wait_until(lambda: is_mounted(mounted.path), "the mount")
            os.statvfs(mounted.path)  # answered, so it listens
            assert client.call(str(mounted.path), Ping()).pid == daemon.pid
            device = os.stat(mounted.path).st_dev
            settings = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
            assert (settings / "read_ahead_kb").read_text() == "1024\n"
            assert (settings / "max_ratio").read_text() == "100\n"
            subprocess.run(["umount", mounted.path], check=True)
            assert daemon.communicate(timeout=20)[1] == ""
        finally:
            daemon.kill()


def test_umount_right_after_mount(mounted: Mounted) -> None:
    """Nothing that comes after the mount makes it busy, at whatever moment it is unmounted."""
    for i in range(10):
        mounted.unmount()
        mounted.start()
        time.sleep(i * 4e-4)  # the moment


def test_truncate_waits_for_zeroing_beside_others() -> None:
    """A file that needs more zeroed memory than there is: others are served while it waits."""
    with Mounted(size=1024 * MIB) as mount:
        with open(mount.path / "big", "wb", buffering=0) as f, contextlib.suppress(OSError):
            while True:
                f.write(b"x" * MIB)
        (mount.path / "big").unlink()
        grown = mount.path / "grown"
        grown.touch()
        size = (os.statvfs(mount.path).f_bfree // 512 - 2) * 2 * MIB  # all but every block
        times: list[float] = []
        with child(lambda: os.truncate(grown, size)) as pid:
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                start = time.perf_counter()
                assert not (mount.path / f"absent-{len(times)}").exists()
                times.append(time.perf_counter() - start)
        assert grown.stat().st_size == size
        assert sorted(times)[len(times) // 2] < 0.005
        with open(grown, "rb", buffering=0) as f:
            while chunk := f.read(MIB):
                assert chunk.count(0) == len(chunk)


def test_a_warm_stat_is_the_kernels(mounted: Mounted) -> None:
    """It is answered even while the daemon is stopped."""
    path = mounted.path / "f"
    path.write_bytes(b"x")
    path.stat()
    assert not (mounted.path / "absent").exists()
    assert mounted.daemon
    mounted.daemon.send_signal(signal.SIGSTOP)
    try:
        with child(lambda: (path.stat(), (mounted.path / "absent").exists())) as pid:
            wait_until(lambda: os.waitpid(pid, os.WNOHANG) != (0, 0), "a stat from the cache")
    finally:
        mounted.daemon.send_signal(signal.SIGCONT)


def test_a_severed_connection_ends_the_daemon(mounted: Mounted) -> None:
    (mounted.path / "f").write_bytes(b"kept")
    number = os.minor(os.stat(mounted.path).st_dev)
    client = mounted.directory / "control"
    client.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", client], check=True)
    try:
        (client / str(number) / "abort").write_text("1")
    finally:
        subprocess.run(["umount", client], check=True)
    assert mounted.wait() == 0
    assert not is_mounted(mounted.path)
    mounted.start()
    assert (mounted.path / "f").read_bytes() == b"kept"


def test_read_only_after_a_crash(mounted: Mounted) -> None:
    (mounted.path / "f").write_bytes(b"kept")
    mounted.kill()
    before = mounted.region.read_bytes()
    mounted.options = "ro"
    mounted.start()
    assert (mounted.path / "f").read_bytes() == b"kept"
    mounted.unmount()
    assert mounted.region.read_bytes() == before
