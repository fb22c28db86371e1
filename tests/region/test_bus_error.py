"""A bus error ends the process with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pkernfs.region.region import Region

FULL = """
import os, sys
from pkernfs.errors import NoSpaceError
from pkernfs.region.bus_error import exit_on_bus_error
from pkernfs.region.region import Region

region = Region.open(sys.argv[1], write=True)
exit_on_bus_error("pkernfs", 32)
region.copy_in(0, b"kept")
region.reserve(1 << 20, 4096)
with open(sys.argv[2], "wb", buffering=0) as filler:
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError:
        pass
refused = []
hole = bytearray(4096)
for attempt in (
    lambda: region.copy_in(4 << 20, b"x" * 8192),
    lambda: region.copy_out(4 << 20, hole),
    lambda: region.reserve(4 << 20, 4096),
):
    try:
        attempt()
    except NoSpaceError as error:
        refused.append(str(error))
assert len(refused) == 3, refused
assert all("the file system that it is on is full" in line for line in refused)
# What has memory is as good as ever; what has none is zero without any.
region.copy_in(1 << 20, b"reserved")
region.zero(4 << 20, 4096)
region.zero(0, 8 << 20)
assert region.read(0, 4) == bytes(4)
os.unlink(sys.argv[2])
region.copy_in(4 << 20, b"again")
region.copy_out(4 << 20, hole)
assert hole[:6] == b"again\\0"
"""


@pytest.mark.fuse  # as root: it mounts
def test_a_full_file_system_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "none", tmp_path], check=True)
    try:
        path = tmp_path / "region"
        path.touch()
        os.truncate(path, 8 << 20)
        done = subprocess.run(
            [sys.executable, "-c", FULL, path, tmp_path / "filler"], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


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
