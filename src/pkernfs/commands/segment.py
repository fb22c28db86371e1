"""``pkernfs segment``: give a file memory of its own, or put its bytes into the region."""

from __future__ import annotations

import argparse
import os

from pkernfs.control import client
from pkernfs.control.mounts import beneath
from pkernfs.control.segment_protocol import SetSegment
from pkernfs.quantities import Ino


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs segment``."""
    parser.add_argument("file", metavar="FILE", help="a file on a pkernfs mount.")
    parser.add_argument(
        "switch",
        metavar="on|off",
        choices=("on", "off"),
        help="on: the file has a segment from here on, with any size; off: it has none.",
    )


def run(args: argparse.Namespace) -> int:
    """Convert ``args.file``."""
    with beneath(args.file) as place:
        mount = client.find_mount(place)
        ino = Ino(os.stat(place).st_ino)
    client.call(args.file, SetSegment(ino, args.switch == "on"), mount)
    return 0
