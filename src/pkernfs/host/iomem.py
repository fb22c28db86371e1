"""Physical memory, as the kernel and the firmware tell of it: /proc/iomem, /sys/firmware/memmap."""

from __future__ import annotations

import errno
import re
from typing import NamedTuple

from pkernfs.errors import RegionError
from pkernfs.host.cmdline import format_number
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr

_LINE = re.compile(r"( *)([0-9a-f]+)-([0-9a-f]+) : (.*)")
_FIRMWARE = "sys/firmware/memmap"


class Span(NamedTuple):
    """A range of physical addresses, in bytes."""

    start: PhysAddr
    size: int

    @property
    def end(self) -> PhysAddr:
        """The first address behind it."""
        return PhysAddr(self.start + self.size)

    def __str__(self) -> str:
        return f"{format_number(self.size)}!{format_number(self.start)}"


class Resource(NamedTuple):
    """A range of physical addresses, and what is there; ``end`` is not part of it."""

    start: PhysAddr
    end: PhysAddr
    name: str


def parse_iomem(text: str) -> list[Resource]:
    """Return every line of /proc/iomem, parents before children."""
    lines = (_LINE.fullmatch(line) for line in text.splitlines())
    return [_resource(m[2], m[3], m[4]) for m in lines if m]


def _resource(first: str, last: str, name: str) -> Resource:
    return Resource(PhysAddr(int(first, 16)), PhysAddr(int(last, 16) + 1), name)


def read_iomem(subject: str, host: Host) -> list[Resource]:
    """Return every line of /proc/iomem, parents before children.

    :param subject: for whom; messages begin with it.
    :raises RegionError: it cannot be read, or shows no addresses to this process.
    """
    try:
        found = parse_iomem(host.read("proc/iomem"))
    except OSError as e:
        message = f"{subject}: cannot read /proc/iomem: {e.strerror}"
        raise RegionError(message, e.errno or 0) from e
    if not any(resource.start for resource in found):
        raise RegionError(
            f"{subject}: /proc/iomem shows no addresses: root is needed (CAP_SYS_ADMIN)",
            errno.EPERM,
        )
    return found


def read_firmware_map(host: Host) -> list[Resource]:
    """Return the firmware's own map, which memmap= does not change; empty if it is not shown."""
    found = []
    for number in host.list(_FIRMWARE):
        texts = [host.find(f"{_FIRMWARE}/{number}/{name}") for name in ("start", "end", "type")]
        if texts[0] and texts[1] and texts[2]:
            found.append(_resource(texts[0], texts[1], texts[2]))
    return found


def overlap(one: Span, other: Span | Resource) -> bool:
    """Tell whether two ranges have a byte in common."""
    return other.start < one.end and one.start < other.end
