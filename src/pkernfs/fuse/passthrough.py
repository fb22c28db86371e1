"""Shared mappings of files that have memory of their own: the kernel passes them through to it.

FUSE passthrough lets a mount name another file, the *backing file*, when one of its own is opened.
With FOPEN_DIRECT_IO reads and writes still come to the daemon, whose size and times count. A
mapping is one of the backing file: no page is copied, and it outlives the daemon.

The kernel's rules (fs/fuse/iomode.c); a daemon that breaks one has open() fail with EIO:

- While a file is passed through, each further open must be, to the same registered backing file.
- While a file is mapped otherwise, through the page cache, no open may be passed through.
- The backing file is a regular one, and not on hugetlbfs (ELOOP).

The kernel keeps what a killed daemon had registered for as long as a program maps any file of that
mount. So what is registered is open for neither reading nor writing: it then is in the way of no
lease (:mod:`pkernfs.pool.lease`). The kernel itself opens the file again for each program.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pkernfs.errors import PkernfsError, RegionError
from pkernfs.quantities import Ino
from pkernfs.ratelimit import RateLimit

log = logging.getLogger(__name__)

#: The descriptor of the file whose memory is the data of an inode; None: it has no such file. The
#: descriptor stays its owner's, who may close it after the call.
Native = Callable[[Ino], int | None]

#: What stands for a backing file where there is none.
NO_BACKING = 0

_MAP = struct.Struct("=iIQ")  # struct fuse_backing_map: fd, flags, padding
_ID = struct.Struct("=I")
_MAGIC = 229
#: Flags of open(2): for neither reading nor writing, but not O_PATH. No file counts it.
_FOR_NOTHING = os.O_ACCMODE | os.O_NONBLOCK | os.O_CLOEXEC


def _iow(number: int, size: int) -> int:
    """Make the number of an ioctl that takes ``size`` bytes; _IOW of asm-generic/ioctl.h."""
    return 1 << 30 | size << 16 | _MAGIC << 8 | number


_BACKING_OPEN = _iow(1, _MAP.size)
_BACKING_CLOSE = _iow(2, _ID.size)


@dataclass
class _Open:
    """A file that is open: its backing file, or :data:`NO_BACKING`, and how many handles."""

    backing_id: int
    handles: int = 0


class Passthrough:
    """The backing files of one mount, each registered for as long as its file is open.

    ``native`` finds them; ``device`` is the mount's descriptor of /dev/fuse.
    """

    def __init__(self, native: Native, device: int) -> None:
        self._native = native
        self._device = device
        self._open: dict[Ino, _Open] = {}
        self._refusals = RateLimit(log)

    def passes(self, ino: Ino) -> bool:
        """Tell if the kernel has the backing file of an inode open."""
        now = self._open.get(ino)
        return now is not None and now.backing_id != NO_BACKING

    def opened(self, ino: Ino) -> int:
        """Count a handle of a file; return the backing file to open it with, or NO_BACKING.

        The first handle decides. A file that gets memory of its own while it is open stays with
        the page cache until nobody has it open: its mappings may be there, and nothing moves them.
        """
        now = self._open.get(ino)
        if now is None:
            now = self._open[ino] = _Open(self._register(ino))
        now.handles += 1
        return now.backing_id

    def released(self, ino: Ino) -> None:
        """A handle less; the kernel itself keeps what is mapped."""
        now = self._open.get(ino)
        if now is None:
            return
        now.handles -= 1
        if not now.handles:
            del self._open[ino]
            if now.backing_id != NO_BACKING:
                self._unregister(now.backing_id)

    def _register(self, ino: Ino) -> int:
        try:
            fd = self._native(ino)
            if fd is None:
                return NO_BACKING
            uncounted = _reopened(fd)
            try:
                # Only for a buffer that can change does Python return what ioctl(2) does.
                registered = bytearray(_MAP.pack(uncounted, 0, 0))
                return int(fcntl.ioctl(self._device, _BACKING_OPEN, registered))
            finally:
                os.close(uncounted)
        except RegionError:  # it is lost: the log says so when somebody touches the mapping
            return NO_BACKING
        except (OSError, PkernfsError) as e:
            self._refusals.once(
                f"inode {ino}: mapped through the page cache, not directly: {_reason(e)}"
            )
            return NO_BACKING

    def _unregister(self, backing_id: int) -> None:
        with contextlib.suppress(OSError):  # the mount is ending, and with it the registration
            fcntl.ioctl(self._device, _BACKING_CLOSE, _ID.pack(backing_id))


def _reopened(fd: int) -> int:
    """Open a file again, for nothing; or as it is open, where it cannot be written to."""
    try:
        return os.open(f"/proc/self/fd/{fd}", _FOR_NOTHING)
    except OSError:  # read-only or immutable: so nobody cuts it either
        return os.dup(fd)


def _reason(error: OSError | PkernfsError) -> str:
    if isinstance(error, PkernfsError):
        return str(error)
    if error.errno == errno.ELOOP:
        return "the kernel does not pass mappings through to a file on hugetlbfs or overlayfs"
    if error.errno == errno.EPERM:
        return "the daemon lacks CAP_SYS_ADMIN"
    return os.strerror(error.errno or errno.EIO)
