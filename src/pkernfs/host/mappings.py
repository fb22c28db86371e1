"""Who maps which bytes of a file or a device: /proc/PID/maps.

A region is one file or device to the kernel: a program that may map it has all of it, and no lease
tells when it is done with a file's part. So this is asked when it matters, never remembered. What
maps through a mount maps files of the mount, not the region, and is not among these.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pkernfs.host.mount_table import table_lines, unescape
from pkernfs.host.sysroot import HOST, Host


class Mapping(NamedTuple):
    """Bytes ``start`` to ``end`` (offsets in the file or device) that a process maps.

    ``command`` is its name in /proc/PID/comm. ``writable``: what it stores there the others see.
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
    devices, ino = _shown_devices(path, status.st_dev, host), str(status.st_ino)
    words = [f" {device} {ino} " for device in devices]
    if pids is None:
        names = sorted(int(name) for name in host.list("proc") if name.isdigit())
        pids = [pid for pid in names if pid != os.getpid()]
    for pid in pids:
        text = host.find(f"proc/{pid}/maps") or ""
        if not any(word in text for word in words):  # most map nothing of it
            continue
        command = host.find(f"proc/{pid}/comm") or "?"
        # Only a line feed ends a line; names, which other users choose, may have all else in them.
        for line in text.split("\n"):
            fields = line.split(None, 5)
            if fields[4:5] == [ino] and fields[3] in devices:
                low, high = (int(address, 16) for address in fields[0].split("-"))
                start = int(fields[2], 16)
                writable = fields[1][1] == "w" and fields[1][3] == "s"
                yield Mapping(pid, command, start, start + high - low, writable)


def _shown_devices(path: str, device: int, host: Host) -> set[str]:
    """Return the devices that maps may have for what is on ``device`` to stat(2).

    Linux has that of the mount there (fs/proc/task_mmu.c, show_map_vma), though subvolumes of btrfs
    have others (fs/btrfs/inode.c, btrfs_getattr). Kernels of openSUSE have those.
    """
    try:
        mounts = table_lines(host.path("proc/self/mountinfo"))
    except OSError:
        mounts = []
    real, nearest, there = os.path.realpath(path), "", device
    for fields in (line.split(" ", 5) for line in mounts):
        where = unescape(fields[4])
        if len(where) >= len(nearest) and os.path.commonpath((real, where)) == where:
            major, _, minor = fields[2].partition(":")
            nearest, there = where, os.makedev(int(major), int(minor))
    return {maps_device(device), maps_device(there)}


def maps_device(device: int) -> str:
    """Return a device number as /proc/PID/maps has it."""
    return f"{os.major(device):02x}:{os.minor(device):02x}"
