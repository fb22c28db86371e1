"""``pkernfs exec``: run a program whose opens of files with a segment give the segment itself."""

from __future__ import annotations

import argparse
import sys

from pkernfs.errors import UsageError, one_line
from pkernfs.plain.launch import run_command, supervise

#: Exit statuses of the command itself, as in env(1).
NOT_EXECUTABLE, NOT_FOUND = 126, 127


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs exec``."""
    parser.add_argument(
        "command",
        metavar="COMMAND",
        nargs=argparse.REMAINDER,
        help="the program and its arguments, also after --",
    )


def run(args: argparse.Namespace) -> int:
    """Become the command; return only if there is none."""
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        raise UsageError("no COMMAND (try pkernfs exec --help)")
    if not words[0]:
        raise UsageError("COMMAND: it is empty")
    supervise()
    try:
        run_command(words)
    except FileNotFoundError as error:
        return _refuse(words[0], error, NOT_FOUND)
    except OSError as error:
        return _refuse(words[0], error, NOT_EXECUTABLE)


def _refuse(program: str, error: OSError, status: int) -> int:
    sys.stderr.write(f"pkernfs: {one_line(program)}: cannot be run: {error.strerror}\n")
    return status
