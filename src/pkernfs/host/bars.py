"""The memory BARs of devices, as sysfs tells them: a peer-to-peer mapping may reach them.

``/sys/bus/pci/devices/DDDD:BB:DD.F/resource`` has a line ``START END FLAGS`` for each resource, the
first six being the BARs (Linux, Documentation/PCI/sysfs-pci.rst; flags: include/linux/ioport.h).
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from pkernfs.errors import InvalidError, NotFoundError
from pkernfs.host.pci import DEVICES, all_devices, parse_device
from pkernfs.host.sysroot import HOST, Host
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, PhysRange, SourceId
from pkernfs.vtd.entries import bdf_text

_BARS = 6
_IORESOURCE_MEM = 0x200
_IORESOURCE_UNSET = 0x2000_0000


class BarName(NamedTuple):
    """A BAR of a device of segment 0; ``number`` is in 0..5."""

    source_id: SourceId
    number: int


class Bar(NamedTuple):
    """A memory BAR of a device that page tables may map: physical address and length in bytes."""

    source_id: SourceId
    number: int
    start: PhysAddr
    length: int

    @property
    def range(self) -> PhysRange:
        """All of it."""
        return PhysRange.of(self.start, self.length)

    @property
    def name(self) -> str:
        """Its name in messages: ``BAR 0 of 0000:00:05.0``."""
        return f"BAR {self.number} of {bdf_text(self.source_id)}"


def parse_bar(text: str) -> BarName:
    """Parse ``BDF:N``, N from 0 to 5.

    :raises InvalidError: something else, or a device of another segment than 0.
    """
    name, _, number = text.rpartition(":")
    if number not in [str(n) for n in range(_BARS)]:
        raise InvalidError(f"BAR {text!r}: expected DDDD:BB:DD.F:N with N from 0 to 5")
    return BarName(parse_device(name), int(number))


def read_bar(source_id: SourceId, number: int, host: Host = HOST) -> Bar:
    """Read where a memory BAR is now.

    :raises NotFoundError: there is no such device, or it has no such BAR.
    :raises InvalidError: the BAR is of ports, or smaller than a page.
    """
    device = bdf_text(source_id)
    try:
        lines = host.read(f"{DEVICES}/{device}/resource").splitlines()
    except OSError as e:
        raise NotFoundError(f"device {device}: no such device: {e.strerror}") from None
    start, end, flags = (int(word, 16) for word in lines[number].split())
    name = f"BAR {number} of {device}"
    if not end:
        raise NotFoundError(f"{name}: there is none")
    if not flags & _IORESOURCE_MEM:
        raise InvalidError(f"{name}: not memory: it is a range of ports")
    if flags & _IORESOURCE_UNSET or not start:
        raise NotFoundError(f"{name}: it has no address")
    if start % PAGE or (end + 1 - start) % PAGE:
        raise InvalidError(f"{name}: not whole pages: got {start:#x}-{end:#x}")
    return Bar(source_id, number, PhysAddr(start), end + 1 - start)


def all_bars(host: Host) -> list[Bar]:
    """Return the memory BARs of all devices of segment 0 that page tables may map."""
    bars = []
    for device in all_devices(host):
        for number in range(_BARS if not device.segment else 0):
            with contextlib.suppress(NotFoundError, InvalidError):
                bars.append(read_bar(device.source_id, number, host))
    return bars
