"""A QEMU that is new enough for a test: the one in PATH, or Debian 13's, unpacked into a cache.

Debian 12 has QEMU 7.2. Debian 13's is not installed, its files are only extracted, with the
libraries that it needs, and a script runs them by their own dynamic loader.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from guestlab import GuestLabError
from guestlab.machine import QEMU

_SUITE = "trixie"
_VERSION = re.compile(r"version (\d+)\.(\d+)")
_FETCH_SECONDS = 600
_RUNNER = """\
#!/bin/sh
# Debian {suite}'s QEMU with its own libraries.
root={root}
lib=$root/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR=$lib/qemu
exec $root/usr/lib64/ld-linux-x86-64.so.2 --argv0 {qemu} --library-path $lib \\
    $root/usr/bin/{qemu} -L $root/usr/share/qemu -L $root/usr/share/seabios "$@"
"""


def newer(oldest: tuple[int, int], cache: Path) -> Path:
    """A QEMU of the version ``oldest`` or later; fetches one into ``cache`` if it has to.

    :raises GuestLabError: there is none, and none to be had.
    """
    found = shutil.which(QEMU)
    if found and version(Path(found)) >= oldest:
        return Path(found)
    runner = cache / f"qemu-{_SUITE}" / QEMU
    if not runner.exists():
        _fetch(runner)
    if version(runner) < oldest:
        raise GuestLabError(f"{runner}: too old: expected {'.'.join(map(str, oldest))}")
    return runner


def version(path: Path) -> tuple[int, int]:
    """Major and minor number that a QEMU says it has.

    :raises GuestLabError: it does not say.
    """
    done = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=60)
    match = _VERSION.search(done.stdout)
    if match is None:
        raise GuestLabError(f"{path}: no version: {done.stderr.strip()[-200:]}")
    return int(match[1]), int(match[2])


def _fetch(runner: Path) -> None:
    """Unpack QEMU and what it needs beside ``runner``; all of it appears, or nothing."""
    target = runner.parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="qemu.") as scratch:
        partial = Path(scratch) / target.name
        root = partial / "root"
        root.mkdir(parents=True)
        _extract(root)
        text = _RUNNER.format(suite=_SUITE, root=target / "root", qemu=QEMU)
        (partial / QEMU).write_text(text)
        (partial / QEMU).chmod(0o755)
        partial.chmod(0o755)
        if target.exists():  # without a runner: somebody has taken files out of it
            shutil.rmtree(target)
        os.rename(partial, target)


def _extract(root: Path) -> None:
    command = ["mmdebstrap", "--variant=extract", "--include=qemu-system-x86", _SUITE, str(root)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_FETCH_SECONDS,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise GuestLabError("mmdebstrap: not found: apt-get install mmdebstrap") from error
    except subprocess.TimeoutExpired as error:
        raise GuestLabError(f"mmdebstrap: not done in {_FETCH_SECONDS} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise GuestLabError(f"mmdebstrap: {_SUITE}: {lines[-1]}")
