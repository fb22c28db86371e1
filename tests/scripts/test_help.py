"""Every script says what it does: --help is its usage on stdout and status 0, nothing else happens.

A help text is formatted when it is asked for: a `%` that argparse takes for its own is found here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SUBCOMMANDS = {"lab": ("list", "run", "shell", "build")}
LINES = [
    *([path.name] for path in sorted(SCRIPTS.iterdir()) if os.access(path, os.X_OK | os.R_OK)),
    *([name, more] for name, others in SUBCOMMANDS.items() for more in others),
    ["lib/kexeclab/lab-kexec"],
]


def test_no_script_is_left_out() -> None:
    assert {"bench", "demo", "lab", "live-update", "man", "setup", "test"} <= {x[0] for x in LINES}


@pytest.mark.parametrize(
    "line", [x for x in LINES if (SCRIPTS / x[0]).is_file()], ids=lambda x: " ".join(x)
)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(line: list[str], option: str, tmp_path: Path) -> None:
    script = SCRIPTS / line[0]
    first = script.read_text().partition("\n")[0]
    # Any Python will do: one that has nothing of the virtual environment.
    program = {"python": [sys.executable, "-S", "-E"], "sh": ["bash"]}[
        "python" if "python" in first else "sh"
    ]
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [*program, str(script), *line[1:], option],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert script.name in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_size_is_written_as_for_every_command(tmp_path: Path) -> None:
    """With the hint for a unit that is a power of 1000; a size that is good goes on to DIR."""
    for size, said in (("1GB", "did you mean 1G?"), ("16MiB", "no such"), ("0x1000000", "no such")):
        line = [str(SCRIPTS / "live-update"), "start", str(tmp_path / "no"), "--size", size]
        done = subprocess.run([sys.executable, *line], capture_output=True, text=True, timeout=60)
        assert done.returncode
        assert said in done.stderr.replace("No such", "no such")
