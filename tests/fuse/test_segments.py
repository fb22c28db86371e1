"""Real mounts of directories: files whose memory is a segment, as programs meet them.

What a mapping sees is in test_passthrough.py; segments that are damaged or lost are in
test_segment_damage.py; what one user can do to another in test_isolation.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkernfs.cli import mkfs_main
from pkernfs.layout import BLOCK, GIB
from support.huge_pages import free_pages, huge_pages, reserved_pages
from support.mounted_pool import (
    GRANULE,
    MountedPool,
    has_segment,
    huge_pool,
    native_of,
    tmpfs,
)
from support.mounting import MIB, Mapper, child, libc, run_pkernfs, wait_until

pytestmark = pytest.mark.fuse

SIZE = 4 * MIB
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


@pytest.fixture(scope="module")
def shared() -> Iterator[MountedPool]:
    """On a tmpfs of its own, so that nobody else takes or frees space there."""
    with tmpfs("size=256m") as place, MountedPool(place=place) as mount:
        yield mount


@pytest.fixture
def mounted(shared: MountedPool) -> Iterator[MountedPool]:
    """A mount without files, which tests one after the other have."""
    with shared.lent() as mount:
        yield mount


def fallocate(path: Path, mode: int, offset: int, length: int) -> None:
    """fallocate(2) by a path."""
    fd = os.open(path, os.O_RDWR)
    try:
        if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(fd)


def write_at(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
    finally:
        os.close(fd)


def read_at(path: Path, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def free_bytes(mount: MountedPool) -> int:
    now = os.statvfs(mount.path)
    return now.f_bavail * now.f_frsize


# ---------------------------------------------------------------------- while somebody has it


def cut(path: Path) -> None:
    os.truncate(path, GRANULE)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def punch(path: Path) -> None:
    fallocate(path, PUNCH_HOLE | KEEP_SIZE, 0, GRANULE)


@pytest.mark.parametrize("change", [cut, empty, punch])
def test_what_is_held_is_not_taken_away(
    mounted: MountedPool, change: Callable[[Path], None]
) -> None:
    """EBUSY, and the log says by whom: who maps it, here and at its native path, or has it open."""
    path = mounted.file(size=SIZE)
    native = native_of(path)
    with Mapper(path, SIZE) as client:
        client.store(3 * MIB, b"mine")
        client.tell("close")
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            change(path)
        assert client.load(3 * MIB, 4) == b"mine"
    with Mapper(native, SIZE) as client, pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        change(path)
    with child(lambda: open_and_wait(native)) as pid:
        wait_until(lambda: str(native) in links_of(pid), "the child has it open")
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            change(path)
    assert path.stat().st_size == SIZE
    assert native.stat().st_size == SIZE
    assert read_at(path, 3 * MIB, 4) == b"mine"
    change(path)  # nobody has it any more
    assert read_at(path, 0, 4) in (bytes(4), b"")
    said = mounted.ended()
    assert re.search(rf"inode \d+: {native.name}: busy: process \d+ \(\w+\) maps it", said)
    assert f"{native.name}: busy: process {pid} " in said


def open_and_wait(path: Path) -> None:
    os.open(path, os.O_RDONLY)
    signal.pause()


def links_of(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
    return found


def test_it_grows_while_it_is_mapped(mounted: MountedPool) -> None:
    path = mounted.file(size=GRANULE)
    with Mapper(path, GRANULE) as client:
        client.store(0, b"mine")
        os.truncate(path, SIZE)
        fallocate(path, 0, SIZE, MIB)
        fallocate(path, ZERO_RANGE, MIB, MIB)
        client.store(4, b" too")
        with Mapper(path, SIZE) as other:
            other.store(3 * MIB, b"gained")
            assert other.load(0, 8) == b"mine too"
        assert path.stat().st_size == SIZE + MIB
        assert native_of(path).stat().st_size == SIZE + 2 * MIB


def test_a_removed_file_keeps_its_memory_until_the_last_holder_goes(mounted: MountedPool) -> None:
    """One who maps it, one who has it open; then it is free, and the next file gets zeros."""
    free = free_bytes(mounted)
    path = mounted.file(size=SIZE)
    native = native_of(path)
    assert free_bytes(mounted) <= free - SIZE + MIB
    with Mapper(path, SIZE) as client, open(path, "rb", buffering=0) as reader:
        client.store(0, b"secret" * 1000)
        path.unlink()
        other = mounted.file(size=SIZE)
        assert native_of(other) != native
        assert read_at(other, 0, SIZE) == bytes(SIZE)
        write_at(other, 0, b"other")
        client.end()
        assert reader.read(6) == b"secret"
        assert native.exists()
    mounted.wait_until_gone(native)
    assert read_at(other, 0, 5) == b"other"
    other.unlink()
    wait_until(lambda: not mounted.segments(), "an empty directory")
    wait_until(lambda: free_bytes(mounted) >= free - MIB, "the space is free")


def test_it_is_renamed_over_while_it_is_mapped(mounted: MountedPool) -> None:
    old, new = mounted.file("old", SIZE), mounted.file("new", SIZE)
    first, second = native_of(old), native_of(new)
    write_at(new, 0, b"new")
    with Mapper(old, SIZE) as client:
        client.store(0, b"old")
        new.rename(old)
        assert read_at(old, 0, 3) == b"new"
        assert native_of(old) == second
        client.store(3, b"er")
        assert client.load(0, 5) == b"older"
        assert first.exists()
    mounted.wait_until_gone(first)


def test_the_daemon_is_killed_beside_a_mapper(mounted: MountedPool) -> None:
    """The next one finds everything; the mapper's memory is still the file's, and holds it."""
    path, removed = mounted.file("kept", SIZE), mounted.file("removed", SIZE)
    native, gone = native_of(path), native_of(removed)
    with Mapper(path, SIZE) as client, Mapper(removed, SIZE) as last:
        client.store(0, b"before")
        removed.unlink()
        last.store(0, b"removed")
        mounted.kill()
        client.store(MIB, b"meanwhile")
        mounted.start()
        assert not gone.exists(), "nobody can reach it by a name"
        assert last.load(0, 7) == b"removed"
        assert native_of(path) == native
        assert read_at(path, 0, 6) == b"before"
        assert read_at(path, MIB, 9) == b"meanwhile"
        write_at(path, 0, b"after ")
        assert client.load(0, 6) == b"after "
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            os.truncate(path, GRANULE)
        fresh = mounted.file("fresh", SIZE)
        assert read_at(fresh, 0, SIZE) == bytes(SIZE)
    os.truncate(path, GRANULE)


# ---------------------------------------------------------------------- space and tools


def test_space_adds_up() -> None:
    """statfs, du, stat and the pool tell the same."""
    with tmpfs("size=64m") as place, MountedPool(16 * MIB, place=place) as mount:
        before = os.statvfs(mount.path)
        path = mount.file(size=3 * MIB + 1)
        held = 2 * GRANULE
        assert path.stat().st_size == 3 * MIB + 1
        assert path.stat().st_blocks * 512 == native_of(path).stat().st_size == held
        du = subprocess.run(["du", "-B1", path], capture_output=True, text=True, check=True)
        assert int(du.stdout.split()[0]) == held
        after = os.statvfs(mount.path)
        assert after.f_blocks == before.f_blocks
        assert abs(before.f_bfree - after.f_bfree - held // 4096) <= GRANULE // 4096
        write_at(path, 0, b"x" * MIB)  # what is promised is taken: no change
        touched = os.statvfs(mount.path)
        assert abs(touched.f_bfree - after.f_bfree) <= GRANULE // 4096


def test_a_full_pool() -> None:
    """ENOSPC to who asks, one line in the log; nothing else is lost, and there is room again."""
    with tmpfs("size=32m") as place, MountedPool(16 * MIB, place=place) as mount:
        path = mount.file(size=SIZE)
        write_at(path, 0, b"kept")
        large = mount.file("large")
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            os.truncate(large, 20 * MIB)
        assert large.stat().st_size == 0
        assert not has_segment(large)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            os.truncate(path, 20 * MIB)
        assert path.stat().st_size == SIZE
        wait_until(lambda: len(mount.segments()) == 1, "no half of a segment")
        os.truncate(large, GRANULE)
        assert read_at(path, 0, 4) == b"kept"
        said = mount.ended().splitlines()
        assert len(said) == 2
        assert all("no memory: needs 20 MiB" in s or "no memory: needs 16 MiB" in s for s in said)


def test_holes_and_data(mounted: MountedPool) -> None:
    """A segment counts as data, all of it; what is beyond the end is none."""
    path = mounted.file(size=SIZE)
    fd = os.open(path, os.O_RDWR)
    try:
        for at in (0, MIB, SIZE - 1):
            assert os.lseek(fd, at, os.SEEK_DATA) == at
            assert os.lseek(fd, at, os.SEEK_HOLE) == SIZE
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            os.lseek(fd, SIZE, os.SEEK_DATA)
    finally:
        os.close(fd)


def copy_range(source: int, target: int) -> None:
    at = 0
    while at < SIZE:
        at += os.copy_file_range(source, target, SIZE - at, at, at)


def send(source: int, target: int) -> None:
    at = 0
    while at < SIZE:
        at += os.sendfile(target, source, at, SIZE - at)


@pytest.mark.parametrize("copy", [copy_range, send])
@pytest.mark.parametrize("way", ["out", "in", "between"])
def test_copies(mounted: MountedPool, copy: Callable[[int, int], None], way: str) -> None:
    """Between a segment, another one, and a file beside the mount or in the region itself."""
    data = os.urandom(SIZE)
    source, target = mounted.file("source", SIZE), mounted.file("target", SIZE)
    flat = mounted.path / "flat"
    if way == "out":
        target = flat
        target.touch()
    elif way == "in":
        source = flat
    source.write_bytes(data) if way == "in" else write_at(source, 0, data)
    assert (has_segment(source), has_segment(target)) == (way != "in", way != "out")
    a, b = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR)
    try:
        copy(a, b)
    finally:
        os.close(a)
        os.close(b)
    assert target.read_bytes() == data
    if way != "out":
        assert native_of(target).read_bytes() == data


def test_cp_and_dd(mounted: MountedPool, tmp_path: Path) -> None:
    """cp reads a segment whole; what it makes is written, not sized, and so has no segment."""
    data = os.urandom(SIZE)
    path, outside = mounted.file(size=SIZE), tmp_path / "outside"
    write_at(path, 0, data)
    subprocess.run(["cp", path, outside], check=True)
    assert outside.read_bytes() == data
    write_at(path, 0, bytes(SIZE))
    subprocess.run(
        ["dd", f"if={outside}", f"of={path}", "bs=1M", "conv=notrunc", "status=none"], check=True
    )
    assert native_of(path).read_bytes() == data
    shutil.copyfile(path, mounted.path / "copy")
    assert (mounted.path / "copy").read_bytes() == data


def test_a_small_file_becomes_a_segment(mounted: MountedPool) -> None:
    """What it holds goes along; the region gets its blocks back."""
    path = mounted.path / "f"
    path.write_bytes(b"x" * MIB)
    assert not has_segment(path)
    os.truncate(path, SIZE)
    assert has_segment(path)
    assert path.read_bytes() == b"x" * MIB + bytes(SIZE - MIB)
    assert native_of(path).read_bytes() == path.read_bytes()


def test_a_cut_segment_is_zero_again(mounted: MountedPool) -> None:
    path = mounted.file(size=SIZE)
    write_at(path, 0, b"x" * SIZE)
    os.truncate(path, MIB + 5)
    assert native_of(path).stat().st_size == GRANULE
    assert native_of(path).read_bytes() == b"x" * (MIB + 5) + bytes(GRANULE - MIB - 5)
    os.truncate(path, SIZE)
    assert path.read_bytes() == b"x" * (MIB + 5) + bytes(SIZE - MIB - 5)
    os.truncate(path, 0)
    assert not has_segment(path)
    wait_until(lambda: not mounted.segments(), "an empty file has no segment")


# ---------------------------------------------------------------------- huge pages


def test_huge_pages_through_the_mount_and_natively() -> None:
    """Reads and writes are of one memory with whoever maps the native file."""
    with huge_pool(2 * SIZE) as mount:
        path = mount.file(size=SIZE)
        assert path.stat().st_blocks * 512 == SIZE
        with Mapper(native_of(path), SIZE) as program:
            program.store(MIB, b"stored")
            assert read_at(path, MIB, 6) == b"stored"
            write_at(path, MIB, b"written")
            assert program.load(MIB, 7) == b"written"
            with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
                os.truncate(path, GRANULE)
            os.truncate(path, SIZE + GRANULE)
        write_at(path, SIZE, b"grown")
        os.truncate(path, GRANULE)
        assert native_of(path).stat().st_size == GRANULE
        mount.kill()
        mount.start()
        assert read_at(path, MIB, 7) == b"written"
        assert "segment-1: busy: process" not in mount.ended()


def test_huge_pages_go_back_to_the_host() -> None:
    with huge_pool(2 * SIZE) as mount:
        free, reserved = free_pages(), reserved_pages()
        path = mount.file(size=SIZE)
        assert (free_pages(), reserved_pages()) == (free, reserved + SIZE // BLOCK), "promised"
        write_at(path, 0, b"x" * SIZE)
        assert (free_pages(), reserved_pages()) == (free - SIZE // BLOCK, reserved)
        os.truncate(path, GRANULE)
        wait_until(lambda: free_pages() == free - 1, "the page that was cut")
        path.unlink()
        wait_until(lambda: free_pages() == free, "the pages of the file")
        assert reserved_pages() == reserved


def test_huge_pages_of_1_gib(capsys: pytest.CaptureFixture[str]) -> None:
    """A segment is whole pages of them, whatever the file's size; who maps it has its memory."""
    with huge_pages(2 * GIB, GIB) as huge:
        assert mkfs_main(["-s", "64M", f"{huge}/"]) == 1
        assert capsys.readouterr().err == (
            f"mkfs.pkernfs: {huge}/base: cannot size: "
            "got 64 MiB, expected a multiple of its pages of 1 GiB\n"
        )
        with MountedPool(GIB, place=huge) as mount:
            path = mount.file(size=SIZE)
            native = native_of(path)
            assert native.stat().st_size == GIB == path.stat().st_blocks * 512
            with Mapper(native, GIB) as program:
                program.store(MIB, b"stored")
                assert read_at(path, MIB, 6) == b"stored"
                with pytest.raises(OSError, match="No space left"):
                    os.truncate(path, GIB + 1)
            path.unlink()
            mount.wait_until_gone(native)
            again = mount.file(size=SIZE)
            assert read_at(again, MIB, 6) == bytes(6)
            assert "no huge pages for 2 GiB" in mount.ended()


def too_many_pages() -> int:
    """Bytes of more huge pages than there are."""
    return (free_pages() - reserved_pages() + 2) * BLOCK


def test_too_few_huge_pages() -> None:
    with huge_pool(SIZE) as mount:
        path, kept = mount.file("large"), mount.file("kept", GRANULE)
        write_at(kept, 0, b"kept")
        before = free_pages(), reserved_pages()
        # The file system itself knows nothing of pages that others have.
        size = min(too_many_pages(), free_bytes(mount) + 2 * BLOCK)
        with pytest.raises(OSError, match=r"No space left|File too large"):
            os.truncate(path, size)
        assert (path.stat().st_size, has_segment(path)) == (0, False)
        wait_until(lambda: len(mount.segments()) == 1, "no half of a segment")
        assert (free_pages(), reserved_pages()) == before
        assert read_at(kept, 0, 4) == b"kept"
        [said] = mount.ended().splitlines()
        assert re.search(r"segment-\d+: no huge pages for .*: .* are free in /", said)


def test_a_hugetlbfs_with_a_quota() -> None:
    """``mount -o size=``: ENOSPC at truncate, and df knows it."""
    with huge_pages(24 * MIB) as huge:
        place = huge / "quota"
        place.mkdir()
        subprocess.run(["mount", "-t", "hugetlbfs", "-o", "size=14m", "none", place], check=True)
        try:
            with MountedPool(8 * MIB, place=place) as mount:
                assert free_bytes(mount) < 16 * MIB
                path = mount.file(size=SIZE)
                with pytest.raises(OSError, match="No space left"):
                    os.truncate(path, 8 * MIB)
                write_at(path, 0, b"x" * SIZE)
                assert path.stat().st_size == SIZE
                [said] = mount.ended().splitlines()
                assert "no huge pages for 8 MiB" in said
        finally:
            subprocess.run(["umount", "-l", place], check=True)


# ---------------------------------------------------------------------- commands


def test_info_and_df(mounted: MountedPool) -> None:
    mounted.file(size=SIZE)
    done = run_pkernfs("info", str(mounted.path))
    assert done.returncode == 0, done.stderr
    assert "segments" in done.stdout
    df = subprocess.run(["df", mounted.path], capture_output=True, text=True, check=True)
    assert mounted.path.name in df.stdout
