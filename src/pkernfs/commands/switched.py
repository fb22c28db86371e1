"""Commands that switch something of a file on or off: they differ in the request alone."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from pkernfs.control import client
from pkernfs.control.mounts import beneath
from pkernfs.control.protocol import Nothing
from pkernfs.control.wire import Call
from pkernfs.quantities import Ino


def configure(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Add the arguments: a file, and on or off."""
    parser.add_argument("file", metavar="FILE", help="a file on a pkernfs mount.")
    parser.add_argument("switch", metavar="on|off", choices=("on", "off"), help=meaning)


def run(args: argparse.Namespace, request: Callable[[Ino, bool], Call[Nothing]]) -> int:
    """Ask the mount of the file ``args.file``, not of what is mounted over that."""
    with beneath(args.file) as place:
        mount = client.find_mount(place)
        ino = Ino(os.stat(place).st_ino)
    client.call(args.file, request(ino, args.switch == "on"), mount)
    return 0
