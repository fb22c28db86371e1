"""pkernfs native: its words and its refusals; tests/fuse/test_native_mounts.py has what it does."""

from __future__ import annotations

import os

import pytest

from support.command_lines import Command, refused
from support.mounted_pool import MountedPool
from support.mounting import MIB


@pytest.mark.fuse
def test_refusals(command: Command) -> None:
    with MountedPool() as mounted:
        said = command("pkernfs", "native", mounted.file("small", 5000), "on")
        refused(said, 1, "pkernfs", "small", "no memory of its own: pkernfs segment FILE on")
        said = command("pkernfs", "native", mounted.file("empty"), "on")
        refused(said, 1, "pkernfs", "empty", "no memory of its own: truncate -s SIZE FILE")
        refused(command("pkernfs", "native", mounted.path, "on"), 1, "pkernfs", "not a regular")
        refused(command("pkernfs", "native", mounted.path / "no", "on"), 1, "pkernfs", "No such")
        file = mounted.file("f", 2 * MIB)
        with file.open("rb"):
            said = command("pkernfs", "native", file, "on")
            refused(said, 1, "pkernfs", f"process {os.getpid()} ", "has opened it")
        said = command("pkernfs", "native", file, "off")
        assert (said.status, said.out, said.err) == (0, "", "")
