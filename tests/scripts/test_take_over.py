"""scripts/take-over without a device: errors are passed on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/take-over"


def test_the_script_passes_errors_on(tmp_path: Path) -> None:
    program = tmp_path / "pkernfs"
    program.write_text("#!/bin/sh\necho 'pkernfs: nowhere: not a pkernfs' >&2\nexit 1\n")
    program.chmod(0o755)
    done = run("nowhere", path=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "take-over: pkernfs: nowhere: not a pkernfs\n"
    program.write_text(f"#!/bin/sh\necho '{json.dumps({'version': 2})}'\n")
    assert run("nowhere", path=tmp_path).stderr == "take-over: export: version 2 is not known\n"
    assert run("nowhere", path=tmp_path / "none").stderr == "take-over: pkernfs: no such program\n"
    assert "a command is wanted" in run("nowhere", "--exec", path=tmp_path).stderr
    done = run("nowhere", "--exec", "my-vmm", path=tmp_path)
    assert done.stderr == "take-over: my-vmm: no such program\n"
    assert "--spare BDF" in run("--help", path=tmp_path).stdout


def run(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(
        command, env={"PATH": str(path)}, capture_output=True, text=True, check=False
    )
