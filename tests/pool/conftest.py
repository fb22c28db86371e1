"""Directories of both kinds for pools."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.huge_pages import huge_pages

MIB = 1 << 20


@contextmanager
def memory_directory(kind: str) -> Iterator[Path]:
    """An empty directory on tmpfs, or on hugetlbfs with room for 16 MiB; mode 0711."""
    if kind == "hugetlbfs":
        with huge_pages(16 * MIB) as directory:
            directory.chmod(0o711)
            yield directory
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkernfs-pool.") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(params=["tmpfs", "hugetlbfs"])
def directory(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of each kind."""
    with memory_directory(request.param) as made:
        yield made


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    """A directory on tmpfs."""
    with memory_directory("tmpfs") as made:
        yield made


@pytest.fixture
def on_hugetlbfs() -> Iterator[Path]:
    """A directory on hugetlbfs."""
    with memory_directory("hugetlbfs") as made:
        yield made
