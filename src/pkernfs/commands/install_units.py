"""``pkernfs install-units``: install units for systemd, for mounts that outlive a kexec.

The units in ``pkernfs/systemd`` say what they do, and in which order. They are installed in
/usr/local/lib, so that the administrator can change them in /etc.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from pkernfs.errors import NotFoundError, PkernfsError

UNITS = (
    "pkernfs@.service",
    "pkernfs-handover@.service",
    "pkernfs-kexec-refused.service",
    "pkernfs.target",
)
DIRECTORY = "usr/local/lib/systemd/system"
#: Stands in a unit for the path of this program.
_PLACEHOLDER = "@PKERNFS@"
#: Exists while systemd is process 1.
_RUNNING = Path("/run/systemd/system")


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
    root = Path(args.root)
    if not root.is_dir():
        raise NotFoundError(f"{root}: cannot install: no such directory")
    directory = root / DIRECTORY
    if args.remove:
        for name in UNITS:
            (directory / name).unlink(missing_ok=True)
    else:
        texts = {name: unit_text(name, program(root)) for name in UNITS}
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _replace(directory / name, text)
            print(directory / name)
    if root.samefile("/") and _RUNNING.is_dir():
        _reload()
    return 0


def unit_text(name: str, program: str) -> str:
    """Return the unit ``name``, with the path of this program in it."""
    text = (files("pkernfs") / "systemd" / name).read_text(encoding="utf-8")
    return text.replace(_PLACEHOLDER, program)


def program(root: Path) -> str:
    """Return the path below ``root`` by which units run ``pkernfs``.

    :raises NotFoundError: it is not installed there.
    """
    found = [Path("/usr/local/bin/pkernfs"), Path("/usr/bin/pkernfs")]
    if root.samefile("/"):
        mine = shutil.which(sys.argv[0]) if sys.argv[0].endswith("pkernfs") else None
        found += [Path(p).absolute() for p in (mine, shutil.which("pkernfs")) if p]
    for path in found:
        # A link in an image may lead to a path that exists below the image's root only.
        inside = root / path.relative_to("/")
        if os.path.lexists(inside):
            return str(path)
    raise NotFoundError(f"{root}: cannot install: no pkernfs in its /usr/local/bin or /usr/bin")


def _replace(path: Path, text: str) -> None:
    """Write the file under another name first, so that it appears whole."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(text, encoding="utf-8")
    partial.chmod(0o644)
    os.replace(partial, path)


def _reload() -> None:
    try:
        done = subprocess.run(["systemctl", "daemon-reload"], capture_output=True, text=True)
    except OSError as e:
        raise PkernfsError(f"systemctl daemon-reload: {e.strerror}") from e
    if done.returncode:
        raise PkernfsError(f"systemctl daemon-reload: {done.stderr.strip()}")
