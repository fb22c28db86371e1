"""Times handovers and the mounts after them, and prints one JSON object per round.

Run by benchlib.handover with pkernfs's own Python; by hand: ``python handover_probe.py DIRECTORY
[ROUNDS]``. The yardstick for digests is a C loop that reads the very same bytes with as many
threads; what a mount takes beyond Python is the time to the first byte of guest-ram less that of
``python -c "import trio, pyfuse3"``, one after the other.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cffi import FFI

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import ROOT_INO
from pkernfs.quantities import RegionOff
from pkernfs.region.digest import Part, cores, digest_all
from pkernfs.region.region import Region

MIB = 1 << 20
DIGEST_BYTES = 1 << 30
CHUNK = 2 * MIB
STEP = 32 * MIB
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


def _round(
    large: Path, small: Path, mount: Path, data: Region, read: Callable[[Region], None]
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
        with Region.anonymous(DIGEST_BYTES) as data:
            data.copy_in(RegionOff(0), os.urandom(MIB) * (DIGEST_BYTES // MIB))
            for region in (large, small):  # the first mount after a handover is what is timed
                subprocess.run([sys.executable, "-c", PROGRAM, str(region), str(mount)], check=True)
                _pkernfs("handover", "--force", mount)
                subprocess.run(["umount", mount], check=True)
            for _ in range(rounds):
                print(json.dumps(_round(large, small, mount, data, read)), flush=True)
    finally:
        subprocess.run(["umount", "-l", mount], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
