"""systemd's units for mounts that outlive a kexec: installed, removed, and asked of.

The units are in ``pkernfs/systemd``; their purpose and their order stand there. They go where the
administrator's own software has its units, so that /etc is free for changes to them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

from pkernfs.errors import NotFoundError, PkernfsError
from pkernfs.host.sysroot import HOST, Host

UNITS = (
    "pkernfs@.service",
    "pkernfs-handover@.service",
    "pkernfs-kexec-refused.service",
    "pkernfs.target",
)
DIRECTORY = "usr/local/lib/systemd/system"
#: In a unit, where it runs this program.
_PLACEHOLDER = "@PKERNFS@"


def install(root: Path, program: str) -> list[Path]:
    """Install the units below ``root``; return their paths.

    :param program: the path by which they run ``pkernfs``.
    """
    texts = {name: unit_text(name, program) for name in UNITS}
    directory = root / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        _replace(directory / name, text)
    return [directory / name for name in texts]


def remove(root: Path) -> None:
    """Remove the units below ``root``; those that are not there are removed already."""
    for name in UNITS:
        (root / DIRECTORY / name).unlink(missing_ok=True)


def unit_text(name: str, program: str) -> str:
    """Return the unit ``name``, with the path of this program in it."""
    text = (files("pkernfs") / "systemd" / name).read_text(encoding="utf-8")
    return text.replace(_PLACEHOLDER, program)


def find_program(root: Path, invoked: str | None = None) -> str:
    """Return the path, as seen below ``root``, by which units run ``pkernfs``.

    :param invoked: this program's own path; it serves in the running system only.
    :raises NotFoundError: it is not installed there.
    """
    found = [Path("/usr/local/bin/pkernfs"), Path("/usr/bin/pkernfs")]
    if root.samefile("/"):
        mine = shutil.which(invoked) if invoked and invoked.endswith("pkernfs") else None
        found += [Path(p).absolute() for p in (mine, shutil.which("pkernfs")) if p]
    for path in found:
        # A link in an image may lead to where only the image's own root has something.
        inside = root / path.relative_to("/")
        if os.path.lexists(inside):
            return str(path)
    raise NotFoundError(f"{root}: cannot install: no pkernfs in its /usr/local/bin or /usr/bin")


def reload() -> None:
    """Have the running systemd read its units again.

    :raises PkernfsError: it does not.
    """
    try:
        done = subprocess.run(["systemctl", "daemon-reload"], capture_output=True, text=True)
    except OSError as e:
        raise PkernfsError(f"systemctl daemon-reload: {e.strerror}") from e
    if done.returncode:
        raise PkernfsError(f"systemctl daemon-reload: {done.stderr.strip()}")


def hands_over(mount_point: str, host: Host = HOST) -> bool:
    """Tell whether a unit hands this file system over at ``systemctl kexec``."""
    if not host.has_systemd():
        return False
    unit = f"pkernfs-handover@{_escaped(mount_point)}.service"
    return subprocess.run(["systemctl", "is-active", "-q", unit], check=False).returncode == 0


def options_file(mount_point: str) -> str:
    """Return the path of the file with the options of a mount's units."""
    return f"/etc/pkernfs/{_escaped(mount_point)}"


def is_told_of_kernel(mount_point: str, host: Host = HOST) -> bool:
    """Tell whether options of the unit that hands this file system over are about the next kernel.

    These are ``--force`` and ``--cmdline``: with them it does not refuse what others would.
    """
    text = host.find(options_file(mount_point).lstrip("/")) or ""
    given = [line.partition("=")[2] for line in text.splitlines() if line.startswith("HANDOVER=")]
    options = given[-1].strip("\"'").split() if given else []
    return any(one.partition("=")[0] in ("--force", "--cmdline") for one in options)


def _escaped(mount_point: str) -> str:
    return subprocess.run(
        ["systemd-escape", "-p", mount_point], capture_output=True, text=True, check=False
    ).stdout.strip()


def _replace(path: Path, text: str) -> None:
    """Put a file there; it appears whole."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(text, encoding="utf-8")
    partial.chmod(0o644)
    os.replace(partial, path)
