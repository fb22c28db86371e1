"""Times page-table work in a region of its own and prints one JSON object per round.

Run by benchlib.iommu with pkernfs's own Python; by hand: ``python iommu_probe.py [ROUNDS]``. The
yardstick is a C loop that fills the very same bytes with consecutive 8-byte entries.
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cffi import FFI

from pkernfs.dma.mount import mount_filesystem, tables_of
from pkernfs.errors import BusyError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.iommu.check import check
from pkernfs.iommu.config import Config
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.page_table import PageTable
from pkernfs.journal import PageStore
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Ino, Iova, PageNo, PhysAddr, PhysRange, RegionOff, RegionRun
from pkernfs.region.region import Region

MIB = 1 << 20
GIB = 1 << 30
REGION_BYTES = 64 * MIB
FILES_BYTES = 68 * GIB
UNLINKS = 51
PHYS_BASE = PhysAddr(1 << 40)
POOL = RegionRun(RegionOff(16 * MIB), 40 * MIB)
DATA = PhysAddr(1 << 45)
FILL = """
#include <stdint.h>
void fill(uint64_t *p, uint64_t first, uint64_t step, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        p[i] = first + i * step;
}
"""


def _plain_fill(directory: str) -> Callable[[Region, int], None]:
    """The loop in C, as a function of a region and a number of entries."""
    ffi = FFI()
    ffi.cdef("void fill(uint64_t *p, uint64_t first, uint64_t step, uint64_t n);")
    ffi.set_source("_plain_fill", FILL, extra_compile_args=["-O3"])
    lib: Any = ffi.dlopen(ffi.compile(tmpdir=directory))

    def fill(region: Region, entries: int) -> None:
        words = ffi.from_buffer("uint64_t[]", region.view(POOL.offset, 8 * entries))
        lib.fill(words, 3, PAGE, entries)

    return fill


def _milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def _round(
    region: Region, store: PageStore, fill: Callable[[Region, int], None]
) -> dict[str, float]:
    found = {}
    memory = Memory(region, [POOL])
    entries = 16 * GIB // PAGE
    large = PageTable(memory, store.commit_words, largest=2)
    found["map-2m"] = _milliseconds(lambda: large.map(Iova(0), DATA, 64 * GIB, 3))
    found["unmap-2m"] = _milliseconds(lambda: large.unmap(Iova(0), 64 * GIB))
    region.zero(*POOL)
    found["fill-c"] = _milliseconds(lambda: fill(region, entries))
    region.zero(*POOL)
    small = PageTable(memory, store.commit_words, largest=1)
    found["map-4k"] = _milliseconds(lambda: small.map(Iova(0), DATA, 16 * GIB, 3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    allowed = [PhysRange.of(DATA, 16 * GIB)]
    found["open"] = _milliseconds(lambda: PageTable(memory, store.commit_words, largest=1))
    found["check"] = _milliseconds(
        lambda: check(None, {"dom-0": memory}, allowed, config=Config()).clean or sys.exit("check")
    )
    found["scan"] = _milliseconds(lambda: sum(1 for _m in small.mappings()))
    found["growth"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found["unmap-4k"] = _milliseconds(lambda: small.unmap(Iova(0), 16 * GIB))
    return found


def _files_round() -> dict[str, float]:
    """The same through the files of a file system, in a sparse region: no data page is touched."""
    found = {}
    fd = os.memfd_create("pkernfs-bench", os.MFD_CLOEXEC)
    os.ftruncate(fd, FILES_BYTES)
    region = Region.open(f"/proc/self/fd/{fd}", write=True, phys_base=PHYS_BASE)
    make_filesystem(region)
    fs = mount_filesystem(region)
    guest = _file(fs, ROOT_INO, b"guest", 64 * GIB)
    for name, size in ((b"dom-0", 2 * MIB), (b"dom-1", 64 * MIB)):
        _file(fs, IOMMU_INO, name, size)
    tables_of(fs).create_root()
    for number in range(UNLINKS):
        _file(fs, ROOT_INO, b"%d" % number, 4 * MIB)
    (_low, _length, at), *_ = fs.pieces(guest, 0, PAGE)
    start = (PHYS_BASE + at) % GIB  # as aligned as memory is: 1 GiB leaves
    found["file-map-2m"] = _milliseconds(
        lambda: tables_of(fs).map_file(0, Iova(4 * GIB + start + 2 * MIB), guest, 0, 64 * GIB, 3)
    )
    found["file-map-4k"] = _milliseconds(
        lambda: tables_of(fs).map_file(1, Iova(4 * GIB + start + PAGE), guest, 0, 16 * GIB, 3)
    )
    fs.unmount()
    found["mount"] = _milliseconds(lambda: mount_filesystem(region))
    fs = mount_filesystem(region)
    found["unlink-first"] = _milliseconds(lambda: fs.unlink(ROOT_INO, b"0"))
    rest = [
        _milliseconds(partial(fs.unlink, ROOT_INO, b"%d" % number)) for number in range(1, UNLINKS)
    ]
    found["unlink"] = sorted(rest)[len(rest) // 2]
    with contextlib.suppress(BusyError):
        fs.unlink(ROOT_INO, b"guest")
        sys.exit("unlink of a mapped file")
    leaves = {n: table.used_pages for n, table in tables_of(fs).domains.items()}
    if leaves[0] < 64 or leaves[1] < 16 * 512:
        sys.exit(f"other leaves than wanted: {leaves}")
    region.close()
    os.close(fd)
    return found


def _file(fs: FileSystem, directory: Ino, name: bytes, size: int) -> Ino:
    ino = fs.create(directory, name, 0o100600, 0, 0).ino
    fs.run(lambda: fs.setattr(ino, size=size))
    return ino


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as directory:
        fill = _plain_fill(directory)
    region = Region.anonymous(REGION_BYTES, phys_base=PHYS_BASE)
    for at in range(0, REGION_BYTES, MIB):  # touched before anything is timed
        region.copy_in(RegionOff(at), b"\xff" * MIB)
    region.zero(RegionOff(0), REGION_BYTES)
    store = PageStore(region, bytes(16), PageNo(512), 511, REGION_BYTES // PAGE)
    for _ in range(rounds):
        print(json.dumps(_round(region, store, fill) | _files_round()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
