"""A QEMU that is new enough for a test: the one in PATH, or Debian 13's, unpacked into a cache.

Debian 12 has QEMU 7.2. Debian 13's is not installed, its files are only extracted, with the
libraries that it needs, and a script runs them by their own dynamic loader.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import programs
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
    done = programs.run(str(path), "--version", error=GuestLabError, seconds=60)
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
        write_runner(partial / QEMU, _SUITE, target / "root")
        partial.chmod(0o755)
        if target.exists():  # without a runner: somebody has taken files out of it
            shutil.rmtree(target)
        os.rename(partial, target)


def write_runner(runner: Path, suite: str, root: Path) -> None:
    """Write the script that runs the QEMU of ``suite`` from ``root``, where that will be."""
    runner.write_text(_RUNNER.format(suite=suite, root=root, qemu=QEMU))
    runner.chmod(0o755)


def extraction(suite: str, root: Path, *more: str) -> list[str]:
    """The command that unpacks the QEMU of ``suite``, with what it needs, below ``root``.

    :param more: a line of sources.list instead of the host's, and options of mmdebstrap
    """
    what = ["--variant=extract", "--include=qemu-system-x86"]
    return ["mmdebstrap", *what, suite, str(root), *more]


def _extract(root: Path) -> None:
    command = extraction(_SUITE, root)
    advice = "apt-get install mmdebstrap"
    programs.output(*command, error=GuestLabError, advice=advice, seconds=_FETCH_SECONDS)
