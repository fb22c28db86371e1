"""Running a program to its end, with errors of one line. For the other modules of this package."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pkernfs.errors import VmmError

Done = subprocess.CompletedProcess[str]


def run(*command: str, directory: Path | None = None, seconds: float | None = None) -> Done:
    """Run a program, whatever its exit status is, with nothing to read.

    :param directory: where it runs; here, if None
    :param seconds: the time that it may take; any, if None
    :raises VmmError: there is no such program, or it is not done in time.
    """
    try:
        return subprocess.run(
            command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=seconds, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise VmmError(f"{command[0]}: no such program") from error
    except subprocess.TimeoutExpired as error:
        raise VmmError(f"{command[0]}: not done in {seconds:g} s") from error


def output(*command: str, directory: Path | None = None, seconds: float | None = None) -> str:
    """Run a program that has to succeed, and return its standard output.

    :raises VmmError: as for :func:`run`; and its last line of errors, if it fails.
    """
    done = run(*command, directory=directory, seconds=seconds)
    if done.returncode != 0:
        raise VmmError(complaint(done, f"{command[0]}: it failed"))
    return done.stdout


def complaint(done: Done, otherwise: str) -> str:
    """Return the last line of a program's standard error, or ``otherwise`` if it wrote none."""
    return (done.stderr.strip() or otherwise).splitlines()[-1]
