"""Mounts, from /proc/self/mountinfo; neither a region nor FUSE is needed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.errors import BusyError, InvalidError, NotFoundError, PermissionDeniedError
from pkernfs.host.mount_table import FSTYPE as FSTYPE
from pkernfs.host.mount_table import table_lines, unescape
from pkernfs.region.spec import BASE, resolve

#: What a mount without a daemon answers; the second one if the daemon is just going.
DEAD = (errno.ENOTCONN, errno.ECONNABORTED)

_OPEN_TREE = 428  # of all architectures
_OPEN_TREE_CLONE = 1
_AT_FDCWD = -100
_OWNER = re.compile(r"(?:^|,)user_id=(\d+)(?:,|$)")


class Mount(NamedTuple):
    """One line of mountinfo; ``device`` is the ``st_dev`` of everything in the mount.

    ``owner`` is the user who mounted it, for a FUSE mount. ``parent_id`` is the number of the mount
    that it is mounted over.
    """

    device: int
    mount_point: str
    fstype: str
    source: str
    owner: int | None = None
    mount_id: int = 0
    parent_id: int = 0


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


@contextlib.contextmanager
def beneath(path: str) -> Iterator[str]:
    """Yield a path to what a pkernfs mount itself has at ``path``, for as long as the block runs.

    It is another one than ``path`` if something is mounted over that: the segment of a native file.

    :raises PermissionDeniedError: so it is, and this user cannot look below it.
    """
    real = os.path.realpath(path)
    mounts = read_mounts()
    top = next((m for m in reversed(mounts) if m.mount_point == real), None)
    below = None if top is None else _mount_below(top, mounts)
    if below is None or top is None or top.fstype == FSTYPE:
        yield path
        return
    tree = _clone(below.mount_point, path)
    try:
        if os.fstat(tree).st_dev != below.device:
            raise NotFoundError(f"{path}: something else is mounted over its mount")
        yield f"/proc/self/fd/{tree}/{os.path.relpath(real, below.mount_point)}"
    finally:
        os.close(tree)


def mount_with_native(path: str) -> Mount | None:
    """Return the pkernfs mount in which ``path`` is a native file: it leads to the segment itself.

    None: it leads to what the mount has there. Every user may ask.
    """
    real = os.path.realpath(path)
    mounts = read_mounts()
    top = next((m for m in reversed(mounts) if m.mount_point == real), None)
    return None if top is None or top.fstype == FSTYPE else _mount_below(top, mounts)


def _mount_below(top: Mount, mounts: list[Mount]) -> Mount | None:
    """The pkernfs mount that a file is in which something is mounted over."""
    by_number = {m.mount_id: m for m in mounts}
    below = by_number.get(top.parent_id)
    while below is not None and below.mount_point == top.mount_point:
        below = by_number.get(below.parent_id)
    return below if below is not None and below.fstype == FSTYPE else None


def _clone(mount_point: str, path: str) -> int:
    """Open a mount without what is mounted over its files.

    :raises PermissionDeniedError: only root may.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    place = os.fsencode(mount_point)
    fd = int(libc.syscall(_OPEN_TREE, _AT_FDCWD, place, _OPEN_TREE_CLONE | os.O_CLOEXEC))
    if fd < 0:
        reason = os.strerror(ctypes.get_errno())
        raise PermissionDeniedError(f"{path}: it is native, and only root sees below it: {reason}")
    return fd


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
    mount_id, parent_id, device, _, mount_point, *_ = left.split(" ")
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
        int(mount_id),
        int(parent_id),
    )
