"""``pkernfs mount`` and ``pkernfs REGION MNT``: check the arguments, and start the daemon."""

from __future__ import annotations

import argparse
import errno
import os
import stat
import subprocess
import sys

from pkernfs.control.mounts import FSTYPE, canonical_spec, mount_at
from pkernfs.errors import BusyError, NotDirError, NotFoundError, PkernfsError
from pkernfs.options import parse_mount_options

#: The errors of a mount without a daemon; the second one while the daemon ends.
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs mount``."""
    parser.add_argument(
        "-f", "--foreground", action="store_true", help="stay in the foreground, and log to stderr."
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="mount options, separated by commas; may be repeated.",
    )
    parser.add_argument("region", metavar="REGION", help="the region to mount.")
    parser.add_argument(
        "mount_point", metavar="MNT", help="the mount point: an existing directory."
    )


def run(args: argparse.Namespace) -> int:
    """Mount. Return when the mount answers; in the foreground, when it has ended."""
    options = parse_mount_options(args.options)
    mount_point = os.path.realpath(args.mount_point)
    check_mount_point(mount_point)
    from pkernfs.fuse.daemon import run_mount

    return run_mount(canonical_spec(args.region), mount_point, options, args.foreground)


def check_mount_point(path: str) -> None:
    """Refuse a path that cannot be a mount point; remove a mount whose daemon has died.

    :raises PkernfsError: ``path`` is missing, no directory, or has a pkernfs mounted on it.
    """
    while (mounted := mount_at(path)) is not None and mounted.fstype == FSTYPE:
        if _answers(path):
            raise BusyError(f"{path}: mount point is busy: {mounted.source} is mounted on it")
        _detach_dead_mount(path)
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: mount point does not exist") from None
    if not is_directory:
        raise NotDirError(f"{path}: mount point is not a directory")


def _answers(path: str) -> bool:
    """Ask the daemon of the mount for an answer; the kernel would answer a stat by itself."""
    try:
        os.statvfs(path)
    except OSError as e:
        return e.errno not in _DEAD
    return True


def _detach_dead_mount(path: str) -> None:
    """Remove a mount whose daemon has died; files open on it stay dead.

    :raises PkernfsError: umount fails.
    """
    command = ["umount", "-l", path] if os.geteuid() == 0 else ["fusermount3", "-u", "-z", path]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        raise PkernfsError(f"{path}: cannot unmount what a killed daemon left behind")
    print(f"pkernfs: {path}: removed the mount that a killed daemon left behind", file=sys.stderr)
