"""The node of a dax device, /dev/daxX.Y: owner, mode, and a label that says who made the device.

The kernel makes the node with the device (devtmpfs), for root only. Owner, mode and label stay when
the driver changes, and go with the device. A rule of udev for the device may set another mode, and
udev runs later than who made it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.errors import RegionError
from pkernfs.host.holders import Target
from pkernfs.host.sysroot import Host
from pkernfs.region.dax import DEVICES

_LABEL = "trusted.pkernfs.segment"


class Access(NamedTuple):
    """Owner of a node, and the permission bits of its mode."""

    uid: int
    gid: int
    mode: int


FOR_ROOT = Access(0, 0, 0o600)


def path_of(name: str, host: Host) -> str:
    """Return the path of a device's node."""
    return host.path(f"dev/{name}")


def read_access(name: str, host: Host) -> Access:
    """Return who may open a device.

    :raises RegionError: there is no node, or it is another device's.
    """
    path = path_of(name, host)
    try:
        found = os.lstat(path)
    except OSError as e:
        number = e.errno or errno.EIO
        raise RegionError(f"{path}: {e.strerror}: is /dev no devtmpfs?", number) from e
    if not _is_of(found, host.find(f"{DEVICES}/{name}/dev")):
        raise RegionError(f"{path}: it is not the node of that device", errno.ENODEV)
    return Access(found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))


def target(name: str, host: Host) -> Target:
    """Return what :func:`pkernfs.host.holders.look` looks for to find who has a device.

    :raises RegionError: there is no node.
    """
    path = path_of(name, host)
    try:
        return Target.of(os.stat(path), name)
    except OSError as e:
        raise RegionError(f"{path}: {e.strerror}", e.errno or errno.EIO) from e


def _is_of(found: os.stat_result, number: str | None) -> bool:
    rdev = found.st_rdev
    return stat.S_ISCHR(found.st_mode) and number == f"{os.major(rdev)}:{os.minor(rdev)}"


def set_access(name: str, wanted: Access, host: Host) -> None:
    """Say who may open a device from now on.

    :raises RegionError: there is no node, or the system refuses.
    """
    found = read_access(name, host)
    path = path_of(name, host)
    try:
        if found[:2] != wanted[:2]:
            os.chmod(path, 0)  # the old mode is not for the new owner
            os.chown(path, wanted.uid, wanted.gid)
        os.chmod(path, wanted.mode)
    except OSError as e:
        number = e.errno or errno.EIO
        raise RegionError(f"{path}: cannot set its owner: {e.strerror}", number) from e


@contextlib.contextmanager
def closed(name: str, host: Host) -> Iterator[None]:
    """Let nobody but root open a device while the block runs.

    :raises RegionError: there is no node.
    """
    found = read_access(name, host)
    set_access(name, FOR_ROOT, host)
    try:
        yield
    finally:
        with contextlib.suppress(RegionError):
            set_access(name, found, host)


def set_label(name: str, text: str, host: Host) -> None:
    """Write on a node who made its device; not where devtmpfs has no extended attributes."""
    with contextlib.suppress(OSError):
        os.setxattr(path_of(name, host), _LABEL, text.encode())


def read_label(name: str, host: Host) -> str | None:
    """Return what :func:`set_label` has written since the device is there; None if nothing."""
    try:
        return os.getxattr(path_of(name, host), _LABEL).decode(errors="replace")
    except OSError:
        return None
