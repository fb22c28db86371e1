"""``pkernfs native``: have the plain path of a file open the memory of its own."""

from __future__ import annotations

import argparse
import os

from pkernfs.control import client
from pkernfs.control.mounts import beneath
from pkernfs.control.segment_protocol import SetNative
from pkernfs.quantities import Ino


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs native``."""
    parser.add_argument("file", metavar="FILE", help="a file on a pkernfs mount.")
    parser.add_argument(
        "switch",
        metavar="on|off",
        choices=("on", "off"),
        help="on: whoever opens FILE by its name has its segment; off: the file of the mount.",
    )


def run(args: argparse.Namespace) -> int:
    """Have ``args.file`` lead to its segment, or to itself again."""
    with beneath(args.file) as place:
        mount = client.find_mount(place)
        ino = Ino(os.stat(place).st_ino)
    client.call(args.file, SetNative(ino, args.switch == "on"), mount)
    return 0
