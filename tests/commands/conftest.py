"""A formatted region for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_lines import Command, formatted


@pytest.fixture
def region(tmp_path: Path, command: Command) -> Path:
    """A region of 16 MiB with an empty pkernfs."""
    return formatted(tmp_path, command)
