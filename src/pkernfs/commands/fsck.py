"""``fsck.pkernfs``: check a region, repair it where asked, and exit as fsck(8) says.

What is wrong and what a repair does is decided in :mod:`pkernfs.fs.fsck`; here it is printed.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pkernfs.commands.progress import Progress

if TYPE_CHECKING:
    from pkernfs.fs.fsck import Report

CLEAN = 0
FIXED = 1
LEFT = 4


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of fsck.pkernfs."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "-n", dest="no", action="store_true", help="check only, change nothing. The default."
    )
    mode.add_argument(
        "-y", dest="repair", action="store_true", help="repair what can be repaired, ask nothing."
    )
    mode.add_argument(
        "-p", "-a", dest="repair", action="store_true", help="the same as -y, for fsck(8)."
    )
    parser.add_argument(
        "-f", dest="force", action="store_true", help="accepted; the check is always a full one."
    )
    parser.add_argument(
        "-v",
        dest="verbose",
        action="store_true",
        help="say also what a crash has left for the next mount to mend, and what was counted.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON.")
    parser.add_argument("region", metavar="REGION", help="the region to check; not mounted.")


def run(args: argparse.Namespace) -> int:
    """Check ``args.region`` and print the report; the status of fsck(8)."""
    from pkernfs.fs.fsck import check
    from pkernfs.fs.placement import open_region

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
    """0 nothing wrong, 1 all repaired, 4 something is left."""
    if report.clean:
        return CLEAN
    return LEFT if report.left else FIXED


def _print_report(region: str, report: Report, verbose: bool) -> None:
    """Findings one a line; what a crash leaves and a mount mends is told with -v only."""
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
    return f"problems: {fixed} repaired, {report.left} left"
