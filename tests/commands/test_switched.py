"""What pkernfs segment and pkernfs native have in common: their words, and which mount they ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_lines import Command, refused
from support.mounting import MIB, Mounted

pytestmark = pytest.mark.parametrize("name", ["segment", "native"])


@pytest.mark.fuse
def test_a_region_without_a_pool(name: str, command: Command) -> None:
    with Mounted(16 * MIB) as mounted:
        (mounted.path / "f").write_bytes(b"x")
        said = command("pkernfs", name, mounted.path / "f", "on")
        refused(said, 1, "pkernfs", "no pool of segments")


def test_bad_words(name: str, tmp_path: Path, command: Command) -> None:
    refused(command("pkernfs", name, tmp_path, "on"), 1, "pkernfs", "not on a pkernfs mount")
    refused(command("pkernfs", name, tmp_path), 1, "pkernfs", "required: on|off")
    refused(command("pkernfs", name, tmp_path, "maybe"), 1, "pkernfs", "invalid choice")
    refused(command("pkernfs", name, "", "on"), 1, "pkernfs", "file: it is empty")
