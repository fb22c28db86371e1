"""The digests that a handover takes of files in the region and in segments."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.fsck import survey
from pkernfs.kexec.file_digests import Digests, take_digests
from pkernfs.kexec.local import LocalFileSystem
from pkernfs.kexec.observer import SILENT, Observer
from pkernfs.layout import PAGE
from pkernfs.pool.pool import Pool, Segment
from pkernfs.region.digest import crc64
from pkernfs.region.region import Region
from support.handed import file_of
from support.pooled_handover import MIB, PooledFiles, make_guest, pooled_files


class Listening(Observer):
    """Notes what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def pooled() -> Iterator[PooledFiles]:
    with pooled_files() as made:
        yield made


def digests_of(
    fs: FileSystem,
    observer: Observer = SILENT,
    threads: int = 1,
    mounted: LocalFileSystem | None = None,
) -> Digests:
    mounted = mounted or LocalFileSystem(fs)
    with mounted.frozen():
        return take_digests(mounted, fs.region, survey(fs.region), observer, threads)


def test_by_one_thread_and_by_many(pooled: PooledFiles) -> None:
    fs = pooled.mount()
    for number, size in enumerate((10, 1 * MIB, MIB + 5)):
        file_of(fs, f"f{number}", b"x" * size)
    for number in range(5):
        make_guest(fs, f"guest{number}", (3 + number) * MIB + 5)
    one, many = (digests_of(fs, threads=n) for n in (1, 3))
    assert one.files == many.files
    assert [len(file.chunks) for file in one.files] == [1, 1, 1, 2, 3, 3, 4, 4]
    assert [file.in_segment for file in one.files] == [False] * 3 + [True] * 5
    assert one.bytes == many.bytes == PAGE + 2 * MIB + PAGE + 25 * MIB + 5 * PAGE
    fs.unmount()


def test_the_bytes_of_a_segment_and_its_holes(pooled: PooledFiles) -> None:
    """Holes are not read: neither a chunk of them, nor a part of one."""
    fs = pooled.mount()
    ino = make_guest(fs, "sparse", 9 * MIB + 7, {5 * MIB: b"middle", 9 * MIB: b"the end"})
    used = os.stat(pooled.segment(1)).st_blocks
    (file,) = digests_of(fs).files
    assert (file.ino, file.in_segment) == (ino, True)
    middle = bytes(MIB) + b"middle" + bytes(MIB - 6)
    last = bytes(MIB) + b"the end" + bytes(PAGE - 7)
    assert file.chunks == {2: crc64(middle), 4: crc64(last)}
    assert os.stat(pooled.segment(1)).st_blocks == used
    fs.unmount()


def test_few_segments_are_mapped_at_once(
    pooled: PooledFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = pooled.mount()
    for number in range(20):
        make_guest(fs, f"g{number}", 2 * MIB, {0: b"%d" % number})
    fs.unmount()
    fs = pooled.mount()

    pool = fs.segments.need_pool()
    real = pool.open
    most = 0

    def opened(segment: Segment, *, write: bool) -> Region:
        nonlocal most
        found = real(segment, write=write)
        most = max(most, mapped())
        return found

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(f"{pooled.directory}/segment-")

    monkeypatch.setattr(pool, "open", opened)
    assert len(digests_of(fs, threads=2).files) == 20
    assert 0 < most <= 5
    assert not mapped()
    fs.unmount()


def test_what_cannot_be_read_is_left_out_and_told(pooled: PooledFiles) -> None:
    """A tenant who cuts his file keeps nobody from a kexec."""
    fs = pooled.mount()
    for name in ("cut", "removed", "whole"):
        make_guest(fs, name, 4 * MIB, {0: name.encode()})
    os.truncate(pooled.segment(1), 2 * MIB)
    pooled.segment(2).unlink()
    listening = Listening()
    taken = digests_of(fs, listening)
    assert [len(file.chunks) for file in taken.files] == [1]
    assert taken.left_out == 2
    assert listening.said == [
        f"{fs.region.name}: /cut: no digests: segment-1: lost: it was cut: got 2097152 bytes, "
        "expected 4194304 or more",
        f"{fs.region.name}: /removed: no digests: segment-2: lost: there is no file of that name",
    ]
    fs.unmount()


def test_without_the_pool_no_segment_is_read(pooled: PooledFiles) -> None:
    fs = pooled.mount()
    file_of(fs, "flat", b"flat")
    for number in range(10):
        make_guest(fs, f"g{number}", 2 * MIB, {})

    class Elsewhere(LocalFileSystem):
        def open_pool(self, region: Region):  # type: ignore[no-untyped-def]
            raise RegionError("the pool is gone")

    listening = Listening()
    taken = digests_of(fs, listening, mounted=Elsewhere(fs))
    assert (len(taken.files), taken.left_out) == (1, 10)
    assert listening.said[0] == f"{fs.region.name}: /g0: no digests: the pool is gone"
    assert listening.said[8:] == [f"{fs.region.name}: no digests of 2 more files"]
    fs.unmount()


def test_who_maps_a_segment_is_told(pooled: PooledFiles) -> None:
    class Held(LocalFileSystem):
        def segment_mappers(self, pool: Pool, rows: object) -> Iterator[str]:
            yield "process 7 (qemu) maps the memory of /guest"

    fs = pooled.mount()
    make_guest(fs, "guest", 2 * MIB, {})
    listening = Listening()
    digests_of(fs, listening, mounted=Held(fs))
    assert listening.said == [
        f"{fs.region.name}: process 7 (qemu) maps the memory of /guest: what it changes from now "
        "on differs from the digests"
    ]
    fs.unmount()


_CUT = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from pkernfs.fs.fsck import survey
from pkernfs.kexec import file_digests
from pkernfs.kexec.local import LocalFileSystem
from pkernfs.kexec.observer import SILENT
from pkernfs.region.bus_error import exit_on_bus_error
from support.pooled_handover import MIB, PooledFiles, make_guest

exit_on_bus_error("a fault", 9)
pooled = PooledFiles(Path(sys.argv[1]))
fs = pooled.mount()
for name in ("a", "b"):
    make_guest(fs, name, 64 * MIB, {0: b"1", 48 * MIB: b"2"})

def cut_when_read(chunks_of):
    def chunks(holes, spans):
        for chunk in list(chunks_of(holes, spans)):
            if holes._memory.name.endswith("-1"):
                os.truncate(pooled.segment(1), 4096)
            yield chunk
    return chunks

file_digests.chunks_of = cut_when_read(file_digests.chunks_of)
mounted = LocalFileSystem(fs)
with mounted.frozen():
    taken = file_digests.take_digests(mounted, fs.region, survey(fs.region), SILENT, 2)
print([sorted(file.chunks) for file in taken.files], taken.left_out)
"""


def test_a_segment_that_is_cut_while_it_is_read_is_an_error_and_no_fault() -> None:
    """In a process that a bus error would end."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkernfs-pool.") as name:
        Path(name).chmod(0o711)
        command = [sys.executable, "-c", _CUT, name, *sys.path]
        done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[[0, 24]] 1\n"
