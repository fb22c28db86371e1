"""``pkernfs kexec``: load the next kernel, hand over every file system, start it."""

from __future__ import annotations

import argparse
import shlex

from pkernfs.commands.progress import Teller
from pkernfs.kexec import steps
from pkernfs.kexec.plan import CRASH_JUMP, Plan
from pkernfs.kexec.prepare import Prepared, Request, prepare, refuse_problems
from pkernfs.kexec.signals import EndedBySignal


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs kexec``."""
    parser.add_argument(
        "--kernel", metavar="K", help="the kernel to load; the running one's file if not given."
    )
    parser.add_argument(
        "--initrd",
        metavar="I",
        help="its initrd; the running kernel's if neither is given; `none`: it needs none.",
    )
    parser.add_argument(
        "--append",
        metavar="A",
        help="its command line; the running one's if not given. pkernfs adds the memmap= and "
        "pkernfs= parameters of the running kernel that it lacks, and nokaslr where KASLR could "
        "put the kernel into a region.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands; change nothing."
    )
    parser.add_argument(
        "--orderly",
        action="store_true",
        help="stop the devices that depend on the tables, and do an orderly kexec.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on although the next kernel is not suitable; print why it is not.",
    )


def run(args: argparse.Namespace) -> int:
    """Check, load, hand over and start. Returns only if that failed, or with --dry-run."""
    prepared = prepare(Request(args.kernel, args.initrd, args.append, args.orderly, args.force))
    if not args.force:
        refuse_problems(prepared.plan)
    _tell(prepared.plan)
    if args.dry_run:
        _print_commands(prepared.plan)
    else:
        start(prepared, replaced=steps.load(prepared.plan))
    return 0


def start(prepared: Prepared, *, replaced: bool) -> None:
    """Hand over and start the kernel that is loaded.

    :param replaced: another kernel was loaded for a panic before.
    """
    try:
        steps.hand_over_and_start(prepared, Teller(), replaced=replaced)
    except EndedBySignal as e:
        raise SystemExit(128 + e.number) from None


def _tell(plan: Plan) -> None:
    """Say what is wrong with the next kernel, what is added and what is lost."""
    teller = Teller()
    for text in [*plan.obstacles, *plan.problems]:
        teller.say(f"forced, although: {text}")
    for word in plan.added:
        teller.say(f"added to the command line: {word}")
    for text in plan.losses:
        teller.say(f"lost with this kernel: {text}")


def _print_commands(plan: Plan) -> None:
    for words in plan.commands:
        print(shlex.join(words))
    if plan.crash:
        print(CRASH_JUMP)
