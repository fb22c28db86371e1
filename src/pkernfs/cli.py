"""The commands: parsers, exit statuses and messages. ``pkernfs.commands`` has a module for each.

One command imports one module, and that module imports what it needs when it runs: ``pkernfs info``
must not wait for trio. An expected failure is one line on stderr. Any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NamedTuple, NoReturn, Protocol, cast

from pkernfs import __version__
from pkernfs.errors import PkernfsError, UsageError, one_line, os_reason, with_remedy


class Command(NamedTuple):
    """A row of the command table: a summary, and exit statuses."""

    summary: str
    usage_status: int = 1
    failure_status: int = 1
    interrupted_status: int = 130


#: Commands that are executables of their own.
PROGRAMS = {
    "mkfs": Command("make a pkernfs in a region"),
    "fsck": Command("check the pkernfs in a region, and repair it where asked", 16, 8, 32),
}

#: What may stand first after ``pkernfs``.
COMMANDS = {
    "mount": Command("mount a region", 1, 32, 32),
    "info": Command("print label, uuid, sizes, state and features of a region"),
    "extents": Command("print where a file's bytes are in the region"),
    "qemu-args": Command("print the options with which QEMU maps a file in the region"),
    "path": Command("print the path by which any program opens a file's own memory"),
    "segment": Command("give a file memory of its own, or put its bytes into the region"),
    "native": Command("have the plain path of a file open the memory of its own"),
    "holders": Command("print who maps, holds, or does DMA into the memory of files"),
    "exec": Command("run a program that gets the segments of files by their paths", 125, 125),
    "kexec": Command("load the next kernel, hand over every file system, start the kernel"),
    "handover": Command("freeze, check and record a file system before a kexec"),
    "install-units": Command("install units for systemd"),
    "doctor": Command("print what this host can do, and what it lacks"),
    "iommu": Command("change and read IOMMU tables: map, attach, translate, show, check, export"),
}

#: Words that other programs of this kind have as commands, and what does it here.
ELSEWHERE = {
    "mkfs": "mkfs.pkernfs REGION",
    "format": "mkfs.pkernfs REGION",
    "create": "mkfs.pkernfs -s SIZE REGION",
    "fsck": "fsck.pkernfs REGION",
    "check": "fsck.pkernfs REGION, or pkernfs iommu check MNT",
    "umount": "umount MNT",
    "unmount": "umount MNT",
    "remount": "umount MNT, then mount again with the other options",
    "df": "df MNT",
    "status": "pkernfs info MNT",
    "ls": "findmnt -t fuse.pkernfs shows the mounts, ls MNT the files in one",
    "list": "findmnt -t fuse.pkernfs shows the mounts, pkernfs info MNT what is in one",
    "help": "pkernfs --help",
    "version": "pkernfs --version",
}

#: Arguments that are names, and so cannot be empty.
_OPERANDS = ("region", "mount_point", "target", "file", "dom", "mnt")

#: Imports make few cycles; to look for them as often as Python does takes a command 6 ms.
GARBAGE_THRESHOLD = 100_000

#: Arguments that a message is about, the first that is given; others may be in it.
_SUBJECTS = ("region", "target", "file", "dom", "mnt", "bdf")

#: Columns of the help where no terminal tells its own.
_COLUMNS = 80

MOUNT_FORM = "pkernfs REGION MNT [-o OPTIONS]"


class CommandModule(Protocol):
    """The functions that a module of ``pkernfs.commands`` has."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command; return its exit status."""


class _HelpFormatter(argparse.HelpFormatter):
    """Fills the terminal as argparse does, which imports shutil for that: 2 ms for each command."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_terminal_columns() - 2)


def _terminal_columns() -> int:
    """As :func:`shutil.get_terminal_size` finds them."""
    with suppress(KeyError, ValueError):
        columns = int(os.environ["COLUMNS"])
        if columns > 0:
            return columns
    with suppress(ValueError, OSError):  # a closed one, or no terminal
        if sys.__stdout__ is not None:
            return os.get_terminal_size(sys.__stdout__.fileno()).columns or _COLUMNS
    return _COLUMNS


class Parser(argparse.ArgumentParser):
    """A parser that raises :class:`UsageError`, where argparse prints lines and exits with 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UsageError(f"{message} (try {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a second word that is no subcommand, where argparse lists all there are."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            raise UsageError(f"{no_command(value, action.choices)} (try {self.prog} --help)")
        super()._check_value(action, value)


def _similar(word: str, known: Iterable[str]) -> list[str]:
    """The known word that ``word`` may be meant for, if there is one."""
    from difflib import get_close_matches  # 1 ms, for those only who misspell

    return get_close_matches(word.lower(), known, n=1)


def no_command(word: str, known: Iterable[str]) -> str:
    """Return what to say of a word that is none of the commands."""
    meant = _similar(word, known)
    return f"{word} is not a command" + "".join(f" (did you mean {name}?)" for name in meant)


def load(name: str) -> CommandModule:
    """The module of the command ``name``."""
    return cast(CommandModule, import_module(f"pkernfs.commands.{name.replace('-', '_')}"))


def build_parser(name: str, prog: str) -> argparse.ArgumentParser:
    """The parser of the command ``name``, called as ``prog``."""
    command = PROGRAMS.get(name) or COMMANDS[name]
    parser = Parser(
        prog=prog,
        description=f"{command.summary[:1].upper()}{command.summary[1:]}.",
        allow_abbrev=False,
        add_help=False,
    )
    load(name).configure(parser)
    version = f"{prog.split()[0]} {__version__}"
    parser.add_argument("-h", "--help", action="help", help="print this help.")
    parser.add_argument("--version", action="version", version=version, help="print the version.")
    return parser


def top_level_help() -> str:
    """Return the text of ``pkernfs --help``."""
    lines = [f"usage: {MOUNT_FORM}", "       pkernfs COMMAND ...", "", "commands:"]
    lines += [f"  {name:<13} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "pkernfs COMMAND --help explains a command. See also mkfs.pkernfs and fsck.pkernfs.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pkernfs``."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args:
        _complain("pkernfs", "no command (try pkernfs --help)")
        return 1
    if args[0] in ("-h", "--help"):
        return _print(top_level_help())
    if args[0] == "--version":
        return _print(f"pkernfs {__version__}")
    if args[0] in COMMANDS:
        return _run(args[0], f"pkernfs {args[0]}", args[1:])
    if args[0] in ELSEWHERE and "-o" not in args and not os.path.lexists(args[0]):
        _complain("pkernfs", f"{args[0]} is not a command of pkernfs: {ELSEWHERE[args[0]]}")
        return 1
    # A word is a command that is misspelt, or a region: never one that is there, and a region where
    # options of a mount follow, as mount(8) always gives them.
    if "-o" not in args and not os.path.lexists(args[0]) and _similar(args[0], COMMANDS):
        _complain("pkernfs", f"{no_command(args[0], COMMANDS)} (try pkernfs --help)")
        return 1
    if len(args) == 1 and args[0].startswith("-"):
        _complain("pkernfs", f"unrecognized arguments: {args[0]} (try pkernfs --help)")
        return 1
    if len(args) == 1:
        _complain("pkernfs", f"{args[0]}: not a command, and no mount point after it (try --help)")
        return 1
    # The form that mount.fuse3 uses: pkernfs REGION MNT -o OPTIONS.
    return _run("mount", "pkernfs", args)


def mkfs_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``mkfs.pkernfs``."""
    return _run("mkfs", "mkfs.pkernfs", list(sys.argv[1:] if argv is None else argv))


def fsck_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fsck.pkernfs``."""
    return _run("fsck", "fsck.pkernfs", list(sys.argv[1:] if argv is None else argv))


def _run(name: str, prog: str, argv: list[str]) -> int:
    """Run a command, and see to it that what it has printed is where it should be."""
    command = PROGRAMS.get(name) or COMMANDS[name]
    _have_standard_streams()
    with _output_that_tells():
        try:
            status = _attempt(command, name, prog, argv)
        except SystemExit as end:  # --help and --version, by argparse
            status = end.code if isinstance(end.code, int) else 0
        if not _is_printed(prog.split()[0]):
            return status or command.failure_status
    return status


def _attempt(command: Command, name: str, prog: str, argv: list[str]) -> int:
    who = prog.split()[0]
    args = argparse.Namespace()
    gc.set_threshold(GARBAGE_THRESHOLD)
    try:
        build_parser(name, prog).parse_args(argv, args)
        for operand in _OPERANDS:
            if getattr(args, operand, None) == "":
                raise UsageError(f"{operand.replace('_', ' ')}: it is empty")
        from pkernfs.region.bus_error import exit_on_bus_error

        exit_on_bus_error(who, command.failure_status)
        with _warnings_on_stderr(who, name, args):
            return load(name).run(args)
    except UsageError as error:
        _complain(who, str(error))
        return command.usage_status
    except PkernfsError as error:
        _complain(who, _with_subject(with_remedy(error), args))
        return command.failure_status
    except OSError as error:
        if error.filename != _Output.NAME:  # that is said in the end
            _complain(who, os_reason(error))
        return command.failure_status
    except KeyboardInterrupt:
        _complain(who, "interrupted")
        return command.interrupted_status
    except Exception:  # a bug; Python's own status for it, 1, is "all repaired" to fsck(8)
        traceback.print_exc()
        return command.failure_status


class _Output(io.FileIO):
    """Standard output that names itself where it fails, and knows that it did.

    Not every writer passes a failure on (argparse), and ENOSPC may be a region's as well.
    """

    NAME = "standard output"

    def __init__(self) -> None:
        super().__init__(sys.stdout.fileno(), "wb", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write what fits."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = self.NAME
            self.failure = error
            raise


@contextmanager
def _output_that_tells() -> Iterator[None]:
    """Print to an :class:`_Output`, where standard output is a file at all."""
    usual = sys.stdout
    if usual is sys.__stdout__ and isinstance(usual, io.TextIOWrapper):
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output()),
            encoding=usual.encoding,
            errors=usual.errors,
            line_buffering=usual.line_buffering or usual.write_through,
        )
    try:
        yield
    finally:
        sys.stdout = usual


def _is_printed(who: str) -> bool:
    """Tell whether all that was printed has been written; if it has not, why goes to stderr."""
    try:
        sys.stdout.flush()
        raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
        failure = raw.failure if isinstance(raw, _Output) else None
    except OSError as error:
        failure = error
    if failure is None:
        return True
    if not isinstance(failure, BrokenPipeError):  # the reader has gone: nobody reads a message
        _complain(who, os_reason(failure))
    _discard_output()
    return False


@contextmanager
def _warnings_on_stderr(who: str, name: str, args: argparse.Namespace) -> Iterator[None]:
    """Show warnings of the core as messages of the command.

    A mount in the foreground logs by itself. A mount in the background logs to stderr until it
    answers, and to the system log from then on.
    """
    if getattr(args, "foreground", False):
        yield
        return
    # The message of mkfs has what it found before it refused or overwrote.
    handler = logging.NullHandler() if name == "mkfs" else logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{who}: %(message)s"))
    logger = logging.getLogger("pkernfs")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _with_subject(message: str, args: argparse.Namespace) -> str:
    """Put the command's region or file before a message that does not name it."""
    subjects = [getattr(args, name, None) for name in _SUBJECTS]
    subject = next((s for s in subjects if s), "")
    return message if subject in message else f"{subject}: {message}"


def _have_standard_streams() -> None:
    """Open /dev/null for each standard stream that this process lacks."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            stream = open(fd, "r" if fd == 0 else "w", closefd=False)  # noqa: SIM115 - for good
            setattr(sys, name, stream)


def _complain(who: str, message: str) -> None:
    """Write one line to stderr, whatever is in the names that the message quotes."""
    sys.stderr.write(f"{who}: {one_line(message)}\n")
    sys.stderr.flush()


def _print(text: str) -> int:
    with _output_that_tells():
        with suppress(OSError):  # why is said in the end
            print(text)
        return 0 if _is_printed("pkernfs") else 1


def _discard_output() -> None:
    """Give what is not yet printed to /dev/null: a flush at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
