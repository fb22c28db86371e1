"""Mounting and unmounting: options for libfuse, tuning of the kernel, the end of a mount."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from typing import Any

from pkernfs.control.mounts import FSTYPE, mount_at, read_mounts

#: Mount options for libfuse or the kernel. What else there is of the kind (relatime and others)
#: has no meaning here: FUSE leaves access times to the daemon.
_FUSE_OPTIONS = frozenset(
    "rw ro dev nodev suid nosuid exec noexec sync async dirsync noatime nosymfollow "
    "allow_other context fscontext defcontext rootcontext".split()
)

Options = dict[str, Any]


def fuse_options(options: Options) -> set[str]:
    """The options for libfuse: defaults, and those of the user's that it knows."""
    words = {"default_permissions", "subtype=pkernfs"}
    for name, value in options.items():
        if name in _FUSE_OPTIONS:
            words.add(name if value is True else f"{name}={value}")
    return words


def tune_backing_device(device: int) -> None:
    """Give a mount more read-ahead, and shared mappings more dirty pages (root).

    ``device`` is the mount's ``st_dev``, from mountinfo: a stat of the mount would hold it for a
    moment, in which umount(8) finds it busy.
    """
    bdi = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/"
    for name, value in (("read_ahead_kb", 1024), ("strict_limit", 0), ("max_ratio", 100)):
        with contextlib.suppress(OSError), open(bdi + name, "w") as f:
            f.write(str(value))


def sync_and_unmount(mountpoint: str, device: int | None) -> str | None:
    """Write back and unmount, in a thread, while requests are served.

    ``device`` is the mount's ``st_dev``, if it is known: another one in its place, or on top of it,
    is left alone. Returns why the mount had to be detached, or None if it had not.
    """
    if device is not None and not _is_on_top(mountpoint, device):
        return "unmounted or covered here, but open or mounted elsewhere"
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(mountpoint)
    if os.geteuid():
        tool = ["fusermount3", "-u", "--", mountpoint]
        if subprocess.run(tool, capture_output=True).returncode == 0:
            return None
        subprocess.run(["fusermount3", "-u", "-z", "--", mountpoint], capture_output=True)
        return "cannot unmount"
    with contextlib.suppress(OSError):
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        libc.syncfs(fd)
        os.close(fd)
    if libc.umount2(path, 0) == 0:
        return None
    reason = os.strerror(ctypes.get_errno())
    libc.umount2(path, 2)  # MNT_DETACH
    return reason


def _is_on_top(mountpoint: str, device: int) -> bool:
    """Tell whether umount(8) would take this very mount; its daemon is not asked."""
    here = next((m for m in reversed(read_mounts()) if m.mount_point == mountpoint), None)
    return here is not None and here.device == device


def detach_what_is_left(mountpoint: str, source: str) -> None:
    """Detach a mount that lost its daemon otherwise: a severed connection, a bug."""
    left = mount_at(mountpoint)
    if left is not None and (left.fstype, left.source) == (FSTYPE, source):
        tool = ["umount", "-l"] if not os.geteuid() else ["fusermount3", "-u", "-z"]
        subprocess.run([*tool, "--", mountpoint], capture_output=True, check=False)
