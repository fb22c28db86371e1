"""Who maps a file of a FUSE mount that is gone, as /proc tells of all processes.

A mapping outlives the daemon and the mount: its pages may be those of another file, to which the
kernel passed it through. It keeps the dead mount's device number, which is in no table of mounts
any more. The next mount of the same file system has another number, and the same inode numbers. So
what is told here may also be a mapping of another file system that ended in the same way, or of an
earlier file of that number: :func:`pkernfs.host.same_memory.may_map` tells them apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pkernfs.host.mount_table import mounts_of_all
from pkernfs.host.same_memory import Area
from pkernfs.host.sysroot import HOST, Host
from pkernfs.quantities import Ino


class LeftMapping(NamedTuple):
    """A process that maps file ``ino`` of a mount that is gone; ``command`` is from its comm."""

    ino: Ino
    pid: int
    command: str
    areas: tuple[Area, ...] = ()


def left_mappings(inos: Iterable[Ino], host: Host = HOST) -> list[LeftMapping]:
    """Return who maps files of these numbers, of mounts that are gone, in the order of processes.

    As far as /proc shows them: the mappings of other users it shows to root only.
    """
    wanted = set(inos)
    pids = sorted(int(name) for name in host.list("proc") if name.isdigit())
    found = {pid: list(_candidates(pid, wanted, host)) for pid in pids if pid != os.getpid()}
    found = {pid: files for pid, files in found.items() if files}
    if not found:
        return []
    # After the maps: what is mounted meanwhile is no ghost.
    mounted = {line.split(" ", 3)[2] for line in mounts_of_all(pids, host)}
    served = set(host.list("sys/class/bdi"))
    left = []
    for pid, files in found.items():
        gone: dict[tuple[Ino, str], list[Area]] = {}
        for device, ino, area in files:
            if device not in mounted and device in served:
                gone.setdefault((ino, device), []).append(area)
        command = (host.find(f"proc/{pid}/comm") or "?") if gone else ""
        left += [LeftMapping(ino, pid, command, tuple(gone[ino, it])) for ino, it in sorted(gone)]
    return left


def _candidates(pid: int, wanted: set[Ino], host: Host) -> Iterator[tuple[str, Ino, Area]]:
    """Yield device, in the form of mountinfo, and number of each file of a wanted number; where."""
    # Only a line feed ends a line; names, which other users choose, may have all else in them.
    for line in (host.find(f"proc/{pid}/maps") or "").split("\n"):
        fields = line.split(None, 5)
        if len(fields) > 4 and fields[4].isdecimal() and (ino := Ino(int(fields[4]))) in wanted:
            major, _, minor = fields[3].partition(":")
            start, _, end = fields[0].partition("-")
            area = Area(int(start, 16), int(end, 16), int(fields[2], 16))
            yield f"{int(major, 16)}:{int(minor, 16)}", ino, area
