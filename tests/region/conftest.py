"""Fixtures: a file region."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.region.region import Region


@pytest.fixture
def path(tmp_path: Path) -> str:
    """An empty file region of 8 MiB."""
    name = str(tmp_path / "region")
    Region.create(name, 8 << 20)
    return name
