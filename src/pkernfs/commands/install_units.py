"""``pkernfs install-units``: install, or remove, systemd's units for mounts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pkernfs.errors import NotFoundError
from pkernfs.host.sysroot import HOST


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs install-units``."""
    parser.add_argument(
        "--root",
        default="/",
        metavar="DIR",
        help="install below DIR, the root of a system that does not run; / if not given.",
    )
    parser.add_argument("--remove", action="store_true", help="remove the units.")


def run(args: argparse.Namespace) -> int:
    """Install or remove the units; have a running systemd read them."""
    from pkernfs.kexec import systemd

    root = Path(args.root)
    if not root.is_dir():
        raise NotFoundError(f"{root}: cannot install: no such directory")
    if args.remove:
        systemd.remove(root)
    else:
        for path in systemd.install(root, systemd.find_program(root, sys.argv[0])):
            print(path)
    if root.samefile("/") and HOST.has_systemd():
        systemd.reload()
    return 0
