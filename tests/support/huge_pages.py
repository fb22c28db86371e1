"""A hugetlbfs for tests, with pages that are borrowed from the kernel."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hugepages import PAGE_BYTES, HugePages

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def free_pages() -> int:
    """Huge pages of 2 MiB that nobody has; those that are reserved are among them."""
    return int((_POOL / "free_hugepages").read_text())


def reserved_pages() -> int:
    """Huge pages of 2 MiB that are promised, and not touched yet."""
    return int((_POOL / "resv_hugepages").read_text())


@contextmanager
def huge_pages(size: int, page_bytes: int = PAGE_BYTES) -> Iterator[Path]:
    """A directory on hugetlbfs with room for ``size`` bytes; skips the test if there is none."""
    pages = HugePages(size, page_bytes)
    refused = pages.borrow()
    if refused is not None:
        pytest.skip(f"no huge pages: {refused}")
    with tempfile.TemporaryDirectory(prefix="pkernfs-huge.") as directory:
        try:
            options = f"pagesize={page_bytes >> 20}M"
            done = subprocess.run(["mount", "-t", "hugetlbfs", "-o", options, "none", directory])
            if done.returncode:
                pytest.skip("hugetlbfs cannot be mounted")
            try:
                yield Path(directory)
            finally:
                subprocess.run(["umount", "-l", directory], check=True)
        finally:
            pages.give_back()
