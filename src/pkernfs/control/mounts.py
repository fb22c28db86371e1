"""Mounts, from /proc/self/mountinfo; neither a region nor FUSE is needed."""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from pkernfs.errors import BusyError, InvalidError
from pkernfs.host.mount_table import FSTYPE as FSTYPE
from pkernfs.host.mount_table import table_lines, unescape
from pkernfs.region.spec import BASE, resolve

#: What a mount without a daemon answers; the second one if the daemon is just going.
DEAD = (errno.ENOTCONN, errno.ECONNABORTED)

_OWNER = re.compile(r"(?:^|,)user_id=(\d+)(?:,|$)")


class Mount(NamedTuple):
    """One line of mountinfo; ``device`` is the ``st_dev`` of everything in the mount.

    ``owner`` is the user who mounted it, for a FUSE mount.
    """

    device: int
    mount_point: str
    fstype: str
    source: str
    owner: int | None = None


def read_mounts(path: str = "/proc/self/mountinfo") -> list[Mount]:
    """Return every mount that this process sees, in mounting order."""
    return [_parse_line(line) for line in table_lines(path)]


def mount_at(path: str) -> Mount | None:
    """Return the mount on ``path`` itself (the topmost of several), dead or alive."""
    real = os.path.realpath(path)
    return next((m for m in reversed(read_mounts()) if m.mount_point == real), None)


def own_mount(mount_point: str, source: str) -> Mount | None:
    """Return this daemon's mount. The file system is not asked, so nobody has to answer."""
    found = (m for m in reversed(read_mounts()) if m.mount_point == mount_point)
    return next((m for m in found if (m.fstype, m.source) == (FSTYPE, source)), None)


def mount_of(path: str) -> Mount | None:
    """Return the mount that ``path`` is in, if it is a pkernfs.

    :raises OSError: there is no such path.
    """
    device = os.stat(path).st_dev
    return next((m for m in read_mounts() if m.device == device and m.fstype == FSTYPE), None)


def mounts_of_region(spec: str) -> list[str]:
    """Return the mount points of the region ``spec``."""
    return [m.mount_point for m in read_mounts() if m.fstype == FSTYPE and m.source == spec]


def canonical_spec(spec: str) -> str:
    """Return a region spec as it is in mountinfo: that of a region has one form only.

    File names become absolute, ``none`` what ``pkernfs=`` on the kernel command line names.

    :raises RegionError: there is nothing of that kind.
    """
    return resolve(spec)


def region_of(target: str) -> str:
    """Return the region that ``target`` is, or that is mounted there.

    In a mount, a directory means the mount, whatever is in it.

    :raises InvalidError: ``target`` is a directory in no pkernfs, and without a region in it.
    """
    here = _pkernfs_at(target)
    if here is not None:
        return here.source  # even if its daemon is dead and cannot be asked
    if not os.path.isdir(target):
        return canonical_spec(target)
    mount = mount_of(target)
    if mount is not None:
        return mount.source
    if not os.path.lexists(os.path.join(target, BASE)):
        raise InvalidError(f"{target}: not a region: it is a directory and not on a pkernfs mount")
    return canonical_spec(target)


def refuse_mount_point(path: str) -> None:
    """Refuse a mount point where a region is asked for that is not mounted.

    :raises BusyError: a pkernfs is mounted on it.
    """
    here = _pkernfs_at(path)
    if here is not None:
        raise BusyError(f"{path}: {here.source} is mounted on it: umount it, and name that")


def _pkernfs_at(path: str) -> Mount | None:
    here = mount_at(path)
    return here if here is not None and here.fstype == FSTYPE else None


def _parse_line(line: str) -> Mount:
    # ID PARENT MAJOR:MINOR ROOT MOUNT_POINT OPTIONS [OPTIONAL ...] - FSTYPE SOURCE SUPER_OPTIONS
    left, _, right = line.partition(" - ")
    _, _, device, _, mount_point, *_ = left.split(" ")
    fstype, source, *options = right.split(" ")
    major, minor = device.split(":")
    number = os.makedev(int(major), int(minor))
    owner = _OWNER.search(options[-1]) if options else None
    return Mount(
        number,
        unescape(mount_point),
        fstype,
        unescape(source),
        None if owner is None else int(owner[1]),
    )
