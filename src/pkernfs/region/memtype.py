"""The memory type of a mapping of physical memory: write-back, or one that a region cannot have.

The kernel gives a mapping another memory type than write-back without saying so: that of a mapping
which is there already, or what the MTRRs suggest. Its list of types is in debugfs; without that,
speed tells.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Resource, Span, overlap
from pkernfs.host.sysroot import Host
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr

_PAT_LIST = "sys/kernel/debug/x86/pat_memtype_list"
_PAT_LINE = re.compile(r"PAT: \[mem 0x([0-9a-f]+)-0x([0-9a-f]+)\] (\S+)")
_CACHED = "write-back"
#: Reading memory that is not cached takes a hundred times as long as memory that is.
_UNCACHED_RATIO = 10
_ROUNDS = 5


def check_cached(name: str, spans: list[Span], read: Callable[[], object], host: Host) -> None:
    """Refuse a mapping that goes round the caches; ``read()`` reads 16 KiB of it.

    :raises RegionError: with the remedy.
    """
    types = _memory_types(spans, host)
    if types:
        wrong = next((t for t in types if t != _CACHED), None)
    else:  # no debugfs, or PAT is off
        wrong = "uncached, by its speed" if _is_slow(read) else None
    if wrong is not None:
        raise RegionError(
            f"{name}: the kernel maps it {wrong}, not {_CACHED}: end what else has mapped it "
            "through /dev/mem, or boot with nopat",
            errno.EIO,
        )


def _memory_types(spans: list[Span], host: Host) -> set[str]:
    """The types of the ranges' mappings, by the kernel's list; empty if there is none."""
    text = host.find(_PAT_LIST) or ""
    found = [
        Resource(PhysAddr(int(m[1], 16)), PhysAddr(int(m[2], 16)), m[3])
        for m in _PAT_LINE.finditer(text)
    ]
    return {one.name for one in found if any(overlap(span, one) for span in spans)}


def _is_slow(read: Callable[[], object]) -> bool:
    """Tell whether reading the mapping is much slower than reading memory of this process."""
    own = memoryview(bytearray(b"\1") * (4 * PAGE))

    def read_own() -> None:
        bytes(own)

    return _fastest(read) > _UNCACHED_RATIO * _fastest(read_own)


def _fastest(read: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return min(times)
