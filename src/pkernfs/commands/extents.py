"""``pkernfs extents``: print where a file's bytes are in the region, as the mount tells it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import struct
from collections.abc import Iterator

from pkernfs.control.mounts import mount_of
from pkernfs.errors import NotSupportedError

_XATTR = "system.pkernfs.extents"
_EXTENT = struct.Struct("<QQQQ")
_NO_ADDRESS = 2**64 - 1

Extent = tuple[int, int, int, int | None]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs extents``."""
    parser.add_argument("--json", action="store_true", help="print JSON.")
    parser.add_argument("file", metavar="FILE", help="a file on a pkernfs mount.")


def run(args: argparse.Namespace) -> int:
    """Print the extents of ``args.file``, in the order of the file."""
    if mount_of(args.file) is None:
        raise NotSupportedError(f"{args.file}: no extents: it is not on a pkernfs mount")
    extents = list(read_extents(args.file))
    if args.json:
        print(json.dumps(describe(args.file, extents)))
    else:
        _print_table(extents)
    return 0


def describe(file: str, extents: list[Extent]) -> dict[str, object]:
    """Build the JSON of ``pkernfs extents``; ``physical`` is None where there is no address."""
    names = ("offset", "length", "region_offset", "physical")
    rows = [dict(zip(names, extent, strict=True)) for extent in extents]
    return {"file": file, "extents": rows}


def read_extents(file: str) -> Iterator[Extent]:
    """Yield file offset, length, region offset and physical address of each extent, in bytes.

    It reads the attribute page by page: ``NAME.N`` begins with extent number N.
    """
    count = 0
    while True:
        page = _read_page(file, f"{_XATTR}.{count}" if count else _XATTR)
        if not page:
            return
        for offset, length, region_offset, physical in _EXTENT.iter_unpack(page):
            yield offset, length, region_offset, None if physical == _NO_ADDRESS else physical
            count += 1


def _read_page(file: str, name: str) -> bytes:
    try:
        value = os.getxattr(file, name)
    except OSError as e:
        if e.errno == errno.ENODATA:
            return b""
        raise NotSupportedError(f"{file}: cannot read its extents: {e.strerror}") from e
    return value[: len(value) - len(value) % _EXTENT.size]


def _print_table(extents: list[Extent]) -> None:
    print(f"{'offset':>16} {'length':>16} {'region offset':>16} {'physical':>16}")
    for offset, length, region_offset, physical in extents:
        address = "-" if physical is None else f"{physical:#x}"
        print(f"{offset:#16x} {length:#16x} {region_offset:#16x} {address:>16}")
