"""``pkernfs extents``: print where a file's bytes are, as the mount tells it.

They are in the region, or in the file's segment.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections.abc import Iterator

from pkernfs.control.mounts import beneath, mount_of
from pkernfs.errors import NotSupportedError
from pkernfs.fuse import segment_xattr
from pkernfs.fuse.extents_xattr import NAME, Extent, parse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs extents``."""
    parser.add_argument("--json", action="store_true", help="print JSON.")
    parser.add_argument("file", metavar="FILE", help="a file on a pkernfs mount.")


def run(args: argparse.Namespace) -> int:
    """Print the extents of ``args.file``, in the order of the file."""
    with beneath(args.file) as place:
        if mount_of(place) is None:
            raise NotSupportedError(f"{args.file}: no extents: it is not on a pkernfs mount")
        if os.path.isdir(place):
            raise NotSupportedError(f"{args.file}: no extents: it is a directory")
        info = segment_xattr.read(place)
        segment = None if info is None else info.number
        extents = list(read_extents(place))
    if args.json:
        print(json.dumps(describe(args.file, extents, segment), indent=2))
    else:
        _print_table(extents, segment)
    return 0


def describe(file: str, extents: list[Extent], segment: int | None) -> dict[str, object]:
    """Build the JSON of ``pkernfs extents``; ``physical`` is None where there is no address.

    :param segment: the number of the file's segment, in which ``region_offset`` is then.
    """
    return {"file": file, "extents": [{**e._asdict(), "segment": segment} for e in extents]}


def read_extents(file: str) -> Iterator[Extent]:
    """Yield the extents of a file in its order, read page by page.

    :raises NotSupportedError: they cannot be read.
    """
    count = 0
    while page := list(parse(_read_page(file, f"{NAME}.{count}" if count else NAME))):
        yield from page
        count += len(page)


def _read_page(file: str, name: str) -> bytes:
    try:
        return os.getxattr(file, name)
    except OSError as e:
        if e.errno == errno.ENODATA:
            return b""
        raise NotSupportedError(f"{file}: cannot read its extents: {e.strerror}") from e


def _print_table(extents: list[Extent], segment: int | None) -> None:
    where = "region offset" if segment is None else f"in segment {segment}"
    print(f"{'offset':>16} {'length':>16} {where:>16} {'physical':>16}")
    for offset, length, region_offset, physical in extents:
        address = "-" if physical is None else f"{physical:#x}"
        print(f"{offset:#16x} {length:#16x} {region_offset:#16x} {address:>16}")
