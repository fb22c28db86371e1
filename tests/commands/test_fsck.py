"""fsck.pkernfs: exit statuses, reports, and what it refuses, leaving every byte as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pkernfs import layout
from pkernfs.commands import fsck
from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.fsck.problems import MAX_PER_CODE, Code, Report
from pkernfs.region.region import Region
from support.command_lines import FOREIGN, SIZE, Command, refused, unchanged
from support.superblocks import damage


def test_fsck_statuses(region: Path, command: Command) -> None:
    with unchanged(region):
        for options in ([], ["-n"], ["-f"], ["-v"], ["-n", "-f", "-v"]):
            outcome = command("fsck.pkernfs", *options, region)
            assert (outcome.status, outcome.err) == (0, "")
            assert "clean" in outcome.out
    damage(region, layout.SUPERBLOCK_PAGE * layout.PAGE)
    with unchanged(region):
        assert command("fsck.pkernfs", region).status == 4
        assert command("fsck.pkernfs", "-n", region).status == 4
    assert command("fsck.pkernfs", "-y", region).status == 1
    for option in ("-y", "-p", "-a", "-n"):
        assert command("fsck.pkernfs", option, region).status == 0


def test_fsck_json(region: Path, command: Command) -> None:
    report = json.loads(command("fsck.pkernfs", "--json", region).out)
    assert report["problems"] == []
    damage(region, layout.SUPERBLOCK_PAGE * layout.PAGE)
    outcome = command("fsck.pkernfs", "--json", region)
    assert outcome.status == 4
    problems = json.loads(outcome.out)["problems"]
    assert problems
    assert all({"code", "message", "fixed"} <= set(problem) for problem in problems)


@pytest.mark.parametrize("fill", FOREIGN)
@pytest.mark.parametrize("option", ["-n", "-y"])
def test_fsck_other_data(
    fill: Callable[[Path], None], option: str, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "region"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    fill(path)
    with unchanged(path):
        refused(command("fsck.pkernfs", option, path), 8, "fsck.pkernfs", str(path))


def test_fsck_bad_regions(command: Command, tmp_path: Path) -> None:
    refused(command("fsck.pkernfs", tmp_path / "no"), 8, "fsck.pkernfs", "No such file")
    refused(command("fsck.pkernfs", tmp_path), 8, "fsck.pkernfs", "irectory")


def test_what_is_printed_of_a_repair(region: Path, command: Command) -> None:
    damage(region, layout.SUPERBLOCK_PAGE * layout.PAGE)
    finding = "superblock at 0x0: "
    outcome = command("fsck.pkernfs", region)
    [line, verdict] = outcome.out.splitlines()
    assert line.startswith(finding)
    assert not line.endswith(": restored from the other copy")
    hint = "-y repairs what can be repaired without guessing"
    assert verdict == f"{region}: problems: 0 repaired, 1 left; {hint}"
    [line, verdict] = command("fsck.pkernfs", "-y", region).out.splitlines()
    assert line.startswith(finding)
    assert line.endswith(": restored from the other copy")
    assert verdict == f"{region}: problems: 1 repaired, 0 left"
    assert command("fsck.pkernfs", region).out == f"{region}: clean\n"


def test_what_a_crash_left_is_no_problem(region: Path, command: Command) -> None:
    with Region.open(str(region), write=True) as open_region:
        mount_filesystem(open_region)  # and never unmounted
    with unchanged(region):
        verdict = f"{region}: clean, to be recovered by the next mount\n"
        assert command("fsck.pkernfs", region) == (0, verdict, "")
        lines = command("fsck.pkernfs", "-v", region).out.splitlines()
    assert lines[0].endswith(": was not unmounted")
    assert lines[-1] == verdict.rstrip()
    assert "directories: 2" in lines
    assert command("fsck.pkernfs", "-y", region) == (0, f"{region}: clean\n", "")
    assert command("fsck.pkernfs", "-y", "--json", region).status == 0


def made_report(*codes: Code, left: int = 0, repaired: bool = True) -> Report:
    """A report of these findings, of which a repair mended all but the first ``left``."""
    report = Report()
    for number, code in enumerate(codes):
        report.add(code, f"somewhere {number}", fixable=number >= left)
    if repaired:
        report.set_fixed()
    return report


@pytest.mark.parametrize(
    ("report", "status"),
    [
        (made_report(), 0),
        (made_report(Code.NOT_UNMOUNTED), 0),
        (made_report(Code.NOT_UNMOUNTED, repaired=False), 0),
        (made_report(Code.JOURNAL_DAMAGED), 1),
        (made_report(Code.JOURNAL_DAMAGED, Code.BLOCK_LOST, left=1), 4),
        (made_report(Code.JOURNAL_DAMAGED, repaired=False), 4),
    ],
)
def test_the_status_says_what_is_left(report: Report, status: int) -> None:
    assert fsck.exit_status(report) == status


def test_findings_that_are_not_listed_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    report = made_report(*[Code.PAGE_LOST] * (MAX_PER_CODE + 2), repaired=False)
    report.summary = {"data_pages": 7}
    fsck._print_report("REGION", report, verbose=False)
    *lines, more, verdict = capsys.readouterr().out.splitlines()
    assert len(lines) == MAX_PER_CODE
    assert lines[0] == "somewhere 0: page marked as in use, used by nothing"
    assert more == "... and 2 more of the same kinds"
    assert verdict.startswith(f"REGION: problems: 0 repaired, {MAX_PER_CODE} left; -y repairs")
    fsck._print_report("REGION", report, verbose=True)
    assert capsys.readouterr().out.splitlines()[-2] == "data pages: 7"
