"""``fsck.pkernfs``: check a region, repair it where asked, and exit as fsck(8) says.

What is wrong and what a repair does is decided in :mod:`pkernfs.fs.fsck`; here it is printed.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pkernfs.progress import Progress

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
        "-v", dest="verbose", action="store_true", help="say also what was counted."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON.")
    parser.add_argument("region", metavar="REGION", help="the region to check; not mounted.")


def run(args: argparse.Namespace) -> int:
    """Check ``args.region`` and print the report; the status of fsck(8)."""
    from pkernfs.fs.fsck import check
    from pkernfs.region import Region

    with (
        Region.open(args.region, write=args.repair) as region,
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
    if not report.problems:
        return CLEAN
    return FIXED if all(problem.fixed for problem in report.problems) else LEFT


def _print_report(region: str, report: Report, verbose: bool) -> None:
    for problem in report.problems:
        print(f"{problem.message}{': fixed' if problem.fixed else ''}")
    fixed = sum(1 for problem in report.problems if problem.fixed)
    left = len(report.problems) - fixed
    if not report.problems:
        print(f"{region}: clean")
    elif left:
        print(f"{region}: {left} problems left, {fixed} fixed")
    else:
        print(f"{region}: {fixed} problems fixed")
