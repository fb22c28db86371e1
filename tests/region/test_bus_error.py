"""A bus error ends the process with one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pkernfs.region.region import Region


def test_bus_error_is_one_line(tmp_path: Path) -> None:
    """A region that is cut short while it is mapped ends the process with a message."""
    path = tmp_path / "region"
    Region.create(str(path), 8 << 20)
    program = (
        "import os, sys\n"
        "from pkernfs.region.bus_error import exit_on_bus_error\n"
        "from pkernfs.region.region import Region\n"
        "region = Region.open(sys.argv[1], write=True)\n"
        "exit_on_bus_error('pkernfs', 32)\n"
        "os.truncate(sys.argv[1], 0)\n"
        "region.copy_in(4 << 20, b'x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 32
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("pkernfs: bus error")
