"""Times page-table work in a region of its own and prints one JSON object per round.

Run by benchlib.iommu with pkernfs's own Python; by hand: ``python iommu_probe.py [ROUNDS]``. The
yardstick is a C loop that fills the very same bytes with consecutive 8-byte entries.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from cffi import FFI

from pkernfs.iommu.check import check
from pkernfs.iommu.config import Config
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.pgtable import PageTable
from pkernfs.journal import PageStore
from pkernfs.layout import PAGE
from pkernfs.region import Region

MIB = 1 << 20
GIB = 1 << 30
REGION_BYTES = 64 * MIB
PHYS_BASE = 1 << 40
POOL = (16 * MIB, 40 * MIB)
DATA = 1 << 45
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
        lib.fill(ffi.from_buffer("uint64_t[]", region.view(POOL[0], 8 * entries)), 3, PAGE, entries)

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
    found["map-2m"] = _milliseconds(lambda: large.map(0, DATA, 64 * GIB, 3))
    found["unmap-2m"] = _milliseconds(lambda: large.unmap(0, 64 * GIB))
    region.zero(*POOL)
    found["fill-c"] = _milliseconds(lambda: fill(region, entries))
    region.zero(*POOL)
    small = PageTable(memory, store.commit_words, largest=1)
    found["map-4k"] = _milliseconds(lambda: small.map(0, DATA, 16 * GIB, 3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    allowed = [(DATA, DATA + 16 * GIB)]
    found["open"] = _milliseconds(lambda: PageTable(memory, store.commit_words, largest=1))
    found["check"] = _milliseconds(
        lambda: check(None, {"dom-0": memory}, allowed, config=Config()).clean or sys.exit("check")
    )
    found["scan"] = _milliseconds(lambda: sum(1 for _m in small.mappings()))
    found["growth"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found["unmap-4k"] = _milliseconds(lambda: small.unmap(0, 16 * GIB))
    return found


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as directory:
        fill = _plain_fill(directory)
    region = Region.anonymous(REGION_BYTES, phys_base=PHYS_BASE)
    for at in range(0, REGION_BYTES, MIB):  # touched before anything is timed
        region.copy_in(at, b"\xff" * MIB)
    region.zero(0, REGION_BYTES)
    store = PageStore(region, bytes(16), 512, 511, REGION_BYTES // PAGE)
    for _ in range(rounds):
        print(json.dumps(_round(region, store, fill)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
