"""The budgets of tests (support/budgets.py): a run with a test that takes too long fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

SAMPLE = """
import time
import pytest

def spin():
    end = time.process_time() + 0.15
    while time.process_time() < end:
        pass

def test_that_spins():
    spin()

def test_that_waits():
    time.sleep(0.15)

@pytest.mark.slow("it spins")
def test_that_may_spin():
    spin()

@pytest.mark.fuse
def test_of_another_layer():
    spin()
"""


def run(path: Path, budgets: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the tests in a file with the plugin alone."""
    (path.parent / "pytest.ini").write_text("[pytest]\nmarkers = fuse\naddopts = -q\n")
    command = [sys.executable, "-m", "pytest", "-p", "support.budgets", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PKERNFS_BUDGETS": budgets}
    environment.pop("PKERNFS_HYPOTHESIS", None)
    return subprocess.run(
        [*command, *args, path.name],
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow("it runs pytest")
@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["", "xdist"])
def test_a_test_over_its_budget_fails_the_run(tmp_path: Path, workers: tuple[str, ...]) -> None:
    path = tmp_path / "test_sample.py"
    path.write_text(SAMPLE)
    done = run(path, "0.06", *workers)  # of 0.5 s, and of some seconds in the layer fuse
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("too slow: ")]
    assert line.startswith("too slow: test_sample.py::test_that_spins: 0.")
    assert re.search(r" s of processor time, 0\.(0\d+|1[0-4]\d*) s allowed", line), line
    assert "slowest of layer fuse" in done.stdout
    assert "test_that_may_spin (slow)" in done.stdout
    assert "4 passed" in done.stdout


@pytest.mark.slow("it runs pytest")
def test_budgets_can_be_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "test_sample.py"
    path.write_text(SAMPLE)
    done = run(path, "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "too slow" not in done.stdout


@pytest.mark.slow("it runs pytest")
@pytest.mark.parametrize("marker", ["slow", "slow(5)"])
def test_a_marker_gives_its_reason(tmp_path: Path, marker: str) -> None:
    path = tmp_path / "test_sample.py"
    path.write_text(SAMPLE.replace('slow("it spins")', marker))
    done = run(path, "1")
    assert done.returncode == 4
    assert "test_that_may_spin: say why: @pytest.mark.slow" in done.stdout + done.stderr
