"""``pkernfs path``: print the path by which any program opens a file's own memory."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import stat
import sys

from pkernfs.control.mounts import Mount, beneath, mount_of
from pkernfs.errors import NotFoundError, NotSupportedError
from pkernfs.fuse.segment_xattr import SegmentInfo, read
from pkernfs.region.spec import BASE


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs path``."""
    parser.add_argument("--json", action="store_true", help="print JSON.")
    parser.add_argument("file", metavar="FILE", help="a file on a pkernfs mount.")


def run(args: argparse.Namespace) -> int:
    """Print the native path of ``args.file``."""
    info = find(args.file)
    if args.json:
        text = json.dumps({"file": args.file, "segment": info.number, **_facts(info)}, indent=2)
    else:
        text = info.path
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(text) + b"\n")  # a path may be no text
    return 0


def find(file: str) -> SegmentInfo:
    """Return the segment of a file; its native path is there.

    :raises NotSupportedError: the file has none: why, and what to do.
    :raises NotFoundError: the path leads nowhere.
    """
    with beneath(file) as place:
        mount = mount_of(place)
        if mount is None:
            raise NotSupportedError(f"{file}: no memory of its own: it is not on a pkernfs mount")
        info = read(place)
    if info is None:
        raise NotSupportedError(f"{file}: {_why_none(file, mount)}")
    check_there(file, info)
    return info


def check_there(file: str, info: SegmentInfo) -> None:
    """:raises NotFoundError: this process does not find the segment of a file."""
    if not os.path.lexists(info.path):
        raise NotFoundError(f"{file}: its segment is lost, or elsewhere: no {info.path} here")


def _facts(info: SegmentInfo) -> dict[str, object]:
    return {name: getattr(info, name) for name in ("kind", "path", "length", "granule", "native")}


def _why_none(file: str, mount: Mount) -> str:
    """Say why a file has no segment, and what to do."""
    word = shlex.quote(f"./{file}" if file.startswith("-") else file)
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        return "no memory of its own: it is not a regular file"
    if not may_have_pool(mount.source):
        return (
            f"no memory of its own: {mount.source} has no pool of segments: "
            f"pkernfs qemu-args {word} maps the region; mkfs.pkernfs -s SIZE DIR/ makes a pool"
        )
    if not found.st_size:
        return f"no memory yet: it is empty: truncate -s SIZE {word}"
    return f"no memory of its own: pkernfs segment {word} on"


def may_have_pool(source: str) -> bool:
    """Tell if a region, as the mount table names it, may have been made with a pool."""
    return os.path.basename(source) == BASE or source.startswith("/dev/dax")
