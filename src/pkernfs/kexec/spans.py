"""The physical memory of regions, which a kexec can keep, and the error of a region that it loses.

A file in the kernel's own memory (tmpfs, hugetlbfs) ends with this kernel, whatever the next one is
told. Whoever asks only that must not wait for what reads the next kernel's command line and the
memory of this one (:mod:`pkernfs.kexec.loaded`).
"""

from __future__ import annotations

import os

from pkernfs.errors import PkernfsError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import HOST, Host
from pkernfs.pool.pieces import gaps
from pkernfs.region import dax, dax_devices, files
from pkernfs.region.spec import looks_physical, parse_span

_KMEM = "kmem"


class KexecError(PkernfsError):
    """The next kernel would take the region, or it cannot be seen that it would not."""


def physical_spans(spec: str, host: Host = HOST) -> list[Span]:
    """Return the physical memory that a region spec names; none for a file."""
    if looks_physical(spec):
        return [parse_span(spec)]
    name = dax.device_name(os.path.realpath(spec), host)
    return [] if name is None else list(dax.read_device(name, host).pieces)


def kept_spans(spec: str, host: Host = HOST) -> list[Span]:
    """Return the memory that a kexec has to keep for a region spec, the region itself first.

    With a dax device that is its whole dax region: segments are other devices there. Without what
    the kernel has for its own memory there.
    """
    spans = physical_spans(spec, host)
    name = None if looks_physical(spec) else dax.device_name(os.path.realpath(spec), host)
    if name is None or not spans:
        return spans
    region = dax.read_device(name, host).region
    devices = dax_devices.region_devices(region, host)
    taken = [p for d in devices if d.driver == _KMEM for p in d.pieces]
    others = [p for d in devices for p in d.pieces if p not in spans and p not in taken]
    start, size = spans[0].start, int(host.find(f"{region}/dax_region/size") or 0)
    if all(start <= p.start and p.end <= start + size for d in devices for p in d.pieces):
        others = gaps(Span(start, size), [*spans, *taken])  # the device begins its dax region
    return [*spans, *others]


def spans_of(spec: str, host: Host) -> list[Span]:
    """Return the physical memory of a spec on a command line; none if it has none here."""
    try:
        return physical_spans(spec, host)
    except RegionError:
        return []


def ends_with_kernel(spec: str, host: Host = HOST) -> bool:
    """Tell whether a region is memory of the running kernel itself: a file on tmpfs, hugetlbfs."""
    if looks_physical(spec) or dax.device_name(os.path.realpath(spec), host) is not None:
        return False
    return files.is_in_memory(spec)


def ends_message(spec: str) -> str:
    """Say it of such a region."""
    return f"{spec}: it ends with this kernel; nothing here survives a kexec"


def refuse_if_it_ends(spec: str, host: Host = HOST) -> None:
    """Refuse a region that ends with the running kernel.

    :raises KexecError: it does.
    """
    if ends_with_kernel(spec, host):
        raise KexecError(ends_message(spec))
