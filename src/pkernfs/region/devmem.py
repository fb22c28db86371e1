"""Physical memory through /dev/mem: ``SIZE!START``.

The range is checked against what the kernel and the firmware say (:mod:`pkernfs.region.physical`)
before /dev/mem is opened, and the mapping's memory type before anything is stored.
"""

from __future__ import annotations

import errno
import logging
import os

from pkernfs.errors import RegionError
from pkernfs.host.srat import nodes_of
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr
from pkernfs.region import physical
from pkernfs.region.physical_backing import PhysicalBacking
from pkernfs.region.spec import parse_span

log = logging.getLogger(__name__)

_RAM_BUFFER_BYTES = 64 << 20  # RAM is rounded up to this, by the kernel's "RAM buffer"


class DevMemBacking(PhysicalBacking):
    """The range ``SIZE!START`` of physical memory.

    :raises RegionError: the range is not free for a region, or the kernel gives no access to it.
    :raises LockedError: a part of it is in use.
    """

    has_pages = False

    def __init__(self, spec: str, *, write: bool, lock: bool, host: Host) -> None:
        span = parse_span(spec)
        physical.check(spec, span, host)
        super().__init__(str(span), spec, [span], write=write, lock=lock, host=host)
        try:
            self.fd = _open(spec, write, host)
        except BaseException:
            self.close()
            raise
        self._fds.append(self.fd)
        self.map_offset = span.start
        nodes = nodes_of(span, host)
        if len(nodes) > 1:
            log.warning("%s: lies in NUMA nodes %s", spec, " and ".join(map(str, nodes)))
        self.node = nodes[0] if len(nodes) == 1 else None

    def refused(self, number: int) -> str:
        """Return the remedy for mmap() failing with this errno, for the message."""
        if number != errno.EPERM:
            return ""
        if self.map_offset % _RAM_BUFFER_BYTES:
            return " (STRICT_DEVMEM): choose a START that is a multiple of 64M"
        return " (STRICT_DEVMEM): boot with iomem=relaxed"


def peek(address: PhysAddr, length: int, host: Host) -> bytes:
    """Read a few bytes of memory that no driver has; empty where the kernel does not give them."""
    try:
        fd = os.open(host.path("dev/mem"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, address)
        finally:
            os.close(fd)
    except OSError:
        return b""


def _open(spec: str, write: bool, host: Host) -> int:
    path = host.path("dev/mem")
    try:
        return os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as e:
        why = _why_not(e.errno, host)
        message = f"{spec}: cannot open {path}: {e.strerror}{f': {why}' if why else ''}"
        raise RegionError(message, e.errno or errno.EIO) from e


def _why_not(number: int | None, host: Host) -> str:
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return "a kernel without CONFIG_DEVMEM, or a container; use device-dax"
    if number not in (errno.EPERM, errno.EACCES):
        return ""
    lockdown = host.lockdown()
    if lockdown is not None:
        return f"kernel lockdown ({lockdown}, by Secure Boot or lockdown=): use device-dax"
    return "root is needed (CAP_SYS_RAWIO)"
