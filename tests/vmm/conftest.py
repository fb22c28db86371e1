"""Fixtures: a machine without a device, and a directory in which sockets have short names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vfio_machine import VfioMachine


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VfioMachine:
    return VfioMachine.instead_of_this_one(tmp_path, monkeypatch)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for sockets, whose paths have 107 bytes at most (unix(7)): not below TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="vmm.", dir="/tmp") as directory:
        yield Path(directory)
