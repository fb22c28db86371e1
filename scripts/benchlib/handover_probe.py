"""Times handovers and the mounts after them, and prints one JSON object per round.

Run by benchlib.handover with pkernfs's own Python; by hand: ``python handover_probe.py DIRECTORY
[ROUNDS]``. The yardstick for digests is a C loop that reads the very same bytes with as many
threads; what a mount takes beyond Python is the time to the first byte of guest-ram less that of
``python -c "import trio, pyfuse3"``, one after the other. Digests of segments and those of a flat
file with as many bytes are taken in turns; both are mapped anew, as a handover does.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cffi import FFI

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import PkernfsError
from pkernfs.fs.manifest import Holes, chunks_of
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import POOL_DIRECTORY, ROOT_INO
from pkernfs.pool.directory import DirectoryPool
from pkernfs.pool.pool import Segment
from pkernfs.quantities import FileSpan, Ino, RegionOff, SegmentNo
from pkernfs.region.digest import Part, Source, cores, digest_all, digest_sources
from pkernfs.region.region import Region

MIB = 1 << 20
DIGEST_BYTES = 1 << 30
CHUNK = 2 * MIB
STEP = 32 * MIB
SEGMENTS = 16
SEGMENT_BYTES = 64 * MIB
TURNS = 3  # of the best of which a round is made
READ = """
#include <stdint.h>
typedef uint64_t vec __attribute__((vector_size(64)));
uint64_t read_all(const uint8_t *p, uint64_t n)
{
    const vec *v = (const vec *)p;
    vec a = {0}, b = {0}, c = {0}, d = {0};
    for (uint64_t i = 0; i < n / 256; i++, v += 4) {
        a ^= v[0]; b ^= v[1]; c ^= v[2]; d ^= v[3];
    }
    a ^= b ^ c ^ d;
    return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}
"""
PROGRAM = "import sys; from pkernfs.cli import main; sys.exit(main())"


def _plain_reader(directory: Path) -> Callable[[Region], None]:
    """The loop in C, as a function that reads a region with all cores."""
    ffi = FFI()
    ffi.cdef("uint64_t read_all(const uint8_t *p, uint64_t n);")
    ffi.set_source("_plain_reader", READ, extra_compile_args=["-O3", "-march=native"])
    lib: Any = ffi.dlopen(ffi.compile(tmpdir=str(directory)))

    def read(region: Region) -> None:
        lock = threading.Lock()
        todo = iter(range(0, region.size, STEP))

        def work() -> None:
            while True:
                with lock:
                    at = next(todo, None)
                if at is None:
                    return
                view = region.view(RegionOff(at), STEP)
                lib.read_all(ffi.from_buffer("uint8_t[]", view), STEP)

        workers = [threading.Thread(target=work) for _ in range(cores())]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return read


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _make(path: Path, size: int) -> None:
    """A sparse region with 1,000 files in ten directories, and a guest-ram."""
    Region.create(str(path), size)
    with Region.open(str(path), write=True) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        parents = [fs.mkdir(ROOT_INO, b"d%d" % i, 0o755, 0, 0).ino for i in range(10)]
        for i in range(1000):
            ino = fs.create(parents[i % 10], b"f%d" % i, 0o100644, 0, 0).ino
            fs.run(lambda ino=ino, i=i: fs.write(ino, 0, b"x" * (37 * i % 20_000 + 1)))  # type: ignore[misc]
        ino = fs.create(ROOT_INO, b"guest-ram", 0o100644, 0, 0).ino
        fs.run(lambda: fs.write(ino, 0, os.urandom(MIB) * 32))
        fs.unmount()


def _pkernfs(*words: object) -> str:
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _first_byte(region: Path, mount: Path) -> float:
    """Milliseconds from process start to the first byte, beyond those of Python."""

    def mount_and_read() -> None:
        command = [sys.executable, "-c", PROGRAM, str(region), str(mount)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        with open(mount / "guest-ram", "rb") as file:
            assert len(file.read(1)) == 1

    python = [sys.executable, "-c", "import trio, pyfuse3"]
    return (_seconds(mount_and_read) - _seconds(lambda: subprocess.run(python, check=True))) * 1e3


class _Segments:
    """Segments on tmpfs, and a flat file of as many bytes."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o711)
        self._flat = str(directory / "base")
        self._pool = DirectoryPool.at(str(directory))
        Region.create(self._flat, SEGMENTS * SEGMENT_BYTES)
        self._rows = []
        piece = os.urandom(MIB)
        with Region.open(self._flat, write=True) as flat:
            for n in range(SEGMENTS):
                wanted = Segment(SegmentNo(n + 1), Ino(n + 1), POOL_DIRECTORY, SEGMENT_BYTES)
                row = self._pool.create(wanted)
                with self._pool.open(row, write=True) as segment:
                    for at in range(0, SEGMENT_BYTES, MIB):  # so that both get memory of a kind
                        segment.copy_in(RegionOff(at), piece)
                        flat.copy_in(RegionOff(n * SEGMENT_BYTES + at), piece)
                self._rows.append(row)

    def digest_segments(self) -> None:
        """All of them, as a handover does."""
        _digest([Source(partial(self._pool.open, row, write=False), _chunks) for row in self._rows])

    def digest_flat(self) -> None:
        """The flat file."""
        _digest([Source(lambda: Region.open(self._flat, write=False, lock=False), _chunks)])


def _chunks(memory: Region) -> Iterator[list[Part]]:
    span = FileSpan(0, memory.size, RegionOff(0))
    return (chunk.parts for chunk in chunks_of(Holes.of_segment(memory), [span]))


def _digest(sources: list[Source]) -> None:
    for found in digest_sources(sources):
        assert not isinstance(found, PkernfsError)
        assert len(found)


def _round(
    large: Path,
    small: Path,
    mount: Path,
    data: Region,
    segments: _Segments,
    read: Callable[[Region], None],
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, region in (("1t", large), ("1g", small)):
        found[f"first-byte-{name}"] = _first_byte(region, mount)
        told = ""

        def hand_over() -> None:
            nonlocal told
            told = _pkernfs("handover", "--force", "--json", mount)

        found["command"] = _seconds(hand_over) * 1e3
        if region == large:
            found["handover"] = json.loads(told)["seconds"] * 1e3
            command = found["command"]
        subprocess.run(["umount", mount], check=True)
    found["command"] = command
    chunks = [[Part(RegionOff(at), CHUNK)] for at in range(0, data.size, CHUNK)]
    reads, digests = [], []
    for _ in range(TURNS):
        reads.append(_seconds(lambda: read(data)))
        digests.append(_seconds(lambda: digest_all(data, chunks)))
    found["reader"] = data.size / min(reads) / 1e9
    found["digests"] = data.size / min(digests) / 1e9
    flat, pooled = [], []
    for _ in range(TURNS):
        flat.append(_seconds(segments.digest_flat))
        pooled.append(_seconds(segments.digest_segments))
    found["flat"] = SEGMENTS * SEGMENT_BYTES / min(flat) / 1e9
    found["segments"] = SEGMENTS * SEGMENT_BYTES / min(pooled) / 1e9
    return found


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling is not what is timed
    directory = Path(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    mount = directory / "mnt"
    mount.mkdir(parents=True)
    try:
        read = _plain_reader(directory)
        large, small = directory / "1t", directory / "1g"
        _make(large, 1 << 40)
        _make(small, 1 << 30)
        segments = _Segments(directory / "pool")
        with Region.anonymous(DIGEST_BYTES) as data:
            data.copy_in(RegionOff(0), os.urandom(MIB) * (DIGEST_BYTES // MIB))
            for region in (large, small):  # the first mount after a handover is what is timed
                subprocess.run([sys.executable, "-c", PROGRAM, str(region), str(mount)], check=True)
                _pkernfs("handover", "--force", mount)
                subprocess.run(["umount", mount], check=True)
            for _ in range(rounds):
                print(json.dumps(_round(large, small, mount, data, segments, read)), flush=True)
    finally:
        subprocess.run(["umount", "-l", mount], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
