"""``pkernfs mount`` and ``pkernfs REGION MNT``: check the arguments, and start the daemon."""

from __future__ import annotations

import argparse
import os
import stat
import subprocess
import sys
from collections.abc import Callable

from pkernfs.control.mounts import DEAD, FSTYPE, canonical_spec, mount_at, refuse_mount_point
from pkernfs.errors import (
    BusyError,
    CorruptionError,
    NotDirError,
    NotFoundError,
    PkernfsError,
    one_line,
    with_remedy,
)
from pkernfs.options import parse_mount_options

#: mount(8): the mount failed.
EXIT_FAILED = 32


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
    refuse_mount_point(args.region)
    spec = canonical_spec(args.region)
    from pkernfs.fuse import background, daemon

    def serve(ready: background.Ready) -> None:
        try:
            daemon.run_mount(spec, mount_point, options, ready=ready, tell=_say)
        except CorruptionError as e:  # here, for its kind does not come out of the background
            raise PkernfsError(with_remedy(e)) from e

    if args.foreground:
        background.log_to_stderr()
        inherited = background.inherited_descriptors()
        return exit_status(
            lambda: serve(lambda: background.close_all(inherited)), spec, mount_point
        )
    return exit_status(lambda: background.in_background(serve, EXIT_FAILED), spec, mount_point)


def exit_status(mount: Callable[[], None], spec: str, mount_point: str) -> int:
    """Mount; return the status of mount(8): 0, or 32 after one line on stderr."""
    from pkernfs.fuse.background import DaemonError

    try:
        mount()
    except DaemonError as e:
        _say(e)
        return EXIT_FAILED
    except PkernfsError as e:
        _say(e if str(e).startswith((spec, mount_point)) else f"{spec}: {e}")
        return EXIT_FAILED
    return 0


def _say(what: object) -> None:
    print(f"pkernfs: {one_line(str(what))}", file=sys.stderr, flush=True)


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
        return e.errno not in DEAD
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
