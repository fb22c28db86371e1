"""``pkernfs segment``: give a file memory of its own, or put its bytes into the region."""

from __future__ import annotations

import argparse

from pkernfs.commands import switched
from pkernfs.control.segment_protocol import SetSegment


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs segment``."""
    switched.configure(
        parser, "on: the file has a segment from here on, with any size; off: it has none."
    )


def run(args: argparse.Namespace) -> int:
    """Convert ``args.file``."""
    return switched.run(args, SetSegment)
