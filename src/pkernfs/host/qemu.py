"""The version of a program that is to be QEMU."""

from __future__ import annotations

import re
import subprocess

#: The first with memory-backend= of -machine, with memory-backend-file,offset=, with cpr-reboot.
OLDEST_PLAIN = (5, 0)
OLDEST = (8, 1)
OLDEST_CPR = (8, 2)
_VERSION = re.compile(r"QEMU.*version (\d+\.\d+(?:\.\d+)*)")
_SECONDS = 30


def version_line(path: str) -> str:
    """Run ``path --version``; return its first line, or the reason why there is none."""
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return str(e)
    return done.stdout.partition("\n")[0]


def parse_version(line: str) -> str | None:
    """Return the version of QEMU that such a line names, as ``8.2.1``; None: it names none."""
    found = _VERSION.search(line)
    return found[1] if found else None
