"""``pkernfs native``: have the plain path of a file open the memory of its own."""

from __future__ import annotations

import argparse

from pkernfs.commands import switched
from pkernfs.control.segment_protocol import SetNative


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs native``."""
    switched.configure(
        parser, "on: whoever opens FILE by its name has its segment; off: the file of the mount."
    )


def run(args: argparse.Namespace) -> int:
    """Have ``args.file`` lead to its segment, or to itself again."""
    return switched.run(args, SetNative)
