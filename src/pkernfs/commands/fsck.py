"""``fsck.pkernfs``: check a region, repair it where asked, and exit as fsck(8) says.

:mod:`pkernfs.fs.fsck` finds problems and repairs them; this module prints them.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pkernfs.commands.progress import Progress
from pkernfs.control.mounts import refuse_mount_point

if TYPE_CHECKING:
    from pkernfs.fs.fsck import Report

CLEAN = 0
FIXED = 1
LEFT = 4


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of fsck.pkernfs."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "-n", dest="no", action="store_true", help="check, and change nothing. The default."
    )
    mode.add_argument(
        "-y",
        dest="repair",
        action="store_true",
        help="repair all that can be repaired; ask nothing.",
    )
    mode.add_argument(
        "-p", "-a", dest="repair", action="store_true", help="the same as -y; fsck(8) uses these."
    )
    parser.add_argument(
        "-f", dest="force", action="store_true", help="no effect: the check is always a full one."
    )
    parser.add_argument(
        "-v",
        dest="verbose",
        action="store_true",
        help="also print what a crash left for the next mount to mend, and the counts.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON.")
    parser.add_argument(
        "region", metavar="REGION", help="the region to check; it must not be mounted."
    )


def run(args: argparse.Namespace) -> int:
    """Check ``args.region`` and print the report; return the status of fsck(8)."""
    from pkernfs.fs.fsck import check
    from pkernfs.fs.placement import open_region

    refuse_mount_point(args.region)
    with (
        open_region(args.region, write=args.repair) as region,
        Progress(args.region) as progress,
    ):
        report = check(region, repair=args.repair, progress=progress)
    if args.json:
        print(report.to_json())
    else:
        _print_report(args.region, report, args.verbose)
    return exit_status(report)


def exit_status(report: Report) -> int:
    """Return 0 if nothing was wrong, 1 if all was repaired, 4 if something is left."""
    if report.clean:
        return CLEAN
    return LEFT if report.left else FIXED


def _print_report(region: str, report: Report, verbose: bool) -> None:
    """Print one finding a line; with -v also what a crash left and a mount mends."""
    for problem in report.problems + (report.notes if verbose else []):
        print(f"{problem.message}{f': {problem.remedy}' if problem.fixed else ''}")
    if report.suppressed:
        print(f"... and {report.suppressed} more of the same kinds")
    if verbose:
        for name, value in report.summary.items():
            print(f"{name.replace('_', ' ')}: {value}")
    print(f"{region}: {_verdict(report)}")


def _verdict(report: Report) -> str:
    if report.clean:
        unclean = (
            "" if report.repaired or not report.notes else ", to be recovered by the next mount"
        )
        return f"clean{unclean}"
    fixed = len(report.problems) - report.left
    hint = "" if report.repaired else "; -y repairs what can be repaired without guessing"
    return f"problems: {fixed} repaired, {report.left} left{hint}"
