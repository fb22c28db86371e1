"""Which files a supervisor asks for a segment: those on a pkernfs mount of somebody who is trusted.

The type of a FUSE mount is what its owner calls it, and a daemon of the owner's answers for it. So
the native path that it gives counts for root's mounts, and for the owner's own programs.
"""

from __future__ import annotations

import select
import threading

from pkernfs.control.mounts import FSTYPE, read_mounts


class Mounts:
    """The pkernfs mounts that this process sees, as they are now. Threads may use it at once."""

    def __init__(self) -> None:
        self._table = open("/proc/self/mountinfo", "rb")  # noqa: SIM115 - as long as this lives
        self._changes = select.poll()
        self._changes.register(self._table, select.POLLPRI | select.POLLERR)
        self._lock = threading.Lock()
        self._owners: dict[int, int] = {}
        self._read()

    def close(self) -> None:
        """Let the kernel's table go."""
        self._table.close()

    def are_there(self) -> bool:
        """Tell if there is any."""
        self._refresh()
        return bool(self._owners)

    def has(self, device: int) -> bool:
        """Tell if a file with this ``st_dev`` is on one of them."""
        return device in self._owners

    def is_trusted(self, device: int, uid: int) -> bool:
        """Tell if what a mount says of its files counts for a program of the user ``uid``."""
        return self._owners.get(device) in (0, uid)

    def _refresh(self) -> None:
        # The kernel tells of a change once. Whoever has heard of it reads before another one asks.
        with self._lock:
            if self._changes.poll(0):
                self._read()

    def _read(self) -> None:
        # An owner that is not shown is nobody's: -1.
        self._owners = {
            mount.device: -1 if mount.owner is None else mount.owner
            for mount in read_mounts()
            if mount.fstype == FSTYPE
        }
