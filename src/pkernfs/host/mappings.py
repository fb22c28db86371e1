"""Who maps which bytes of a file or a device: /proc/PID/maps.

A region is one file or device to the kernel: a program that may map it has all of it, and no lease
tells when it is done with a file's part. So this is asked when it matters, never remembered. What
maps through a mount maps files of the mount, not the region, and is not among these.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pkernfs.host.sysroot import HOST, Host


class Mapping(NamedTuple):
    """Bytes ``start`` to ``end`` (offsets in the file or device) that a process maps.

    ``command`` is its name in /proc/PID/comm.
    """

    pid: int
    command: str
    start: int
    end: int
    writable: bool = True

    @property
    def process(self) -> str:
        """The process, for a message."""
        return f"process {self.pid} ({self.command})"


def mappings_of(
    path: str, host: Host = HOST, pids: Iterable[int] | None = None
) -> Iterator[Mapping]:
    """Yield what processes map of the file or device ``path``, in the order of their numbers.

    As far as /proc shows them: the mappings of other users it shows to root only.

    :param pids: those that are asked for; all other processes, if None.
    """
    try:
        status = os.stat(path)
    except OSError:
        return
    wanted = [maps_device(status.st_dev), str(status.st_ino)]
    if pids is None:
        names = sorted(int(name) for name in host.list("proc") if name.isdigit())
        pids = [pid for pid in names if pid != os.getpid()]
    for pid in pids:
        text = host.find(f"proc/{pid}/maps") or ""
        if " ".join(wanted) not in text:  # most map nothing of it
            continue
        command = host.find(f"proc/{pid}/comm") or "?"
        for line in text.split("\n"):  # any other character may be in a file's name
            fields = line.split(" ", 5)
            if fields[3:5] == wanted:
                addresses, permissions, offset = fields[:3]
                low, high = (int(address, 16) for address in addresses.split("-"))
                start = int(offset, 16)
                yield Mapping(pid, command, start, start + high - low, permissions[1] == "w")


def maps_device(device: int) -> str:
    """Return a device number as /proc/PID/maps has it."""
    return f"{os.major(device):02x}:{os.minor(device):02x}"
