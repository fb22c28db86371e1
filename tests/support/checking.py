"""Regions in memory for tests, and the check that follows every test."""

from __future__ import annotations

import os

from pkernfs.fs import fsck
from pkernfs.quantities import PhysAddr
from pkernfs.region.region import Region


class MemoryFile:
    """A sparse file in memory that regions are opened on; what they store outlives them."""

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("pkernfs-test", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)

    @property
    def path(self) -> str:
        """A name to open it by, while this object lives."""
        return f"/proc/self/fd/{self._fd}"

    def open(self, *, write: bool = True, phys_base: PhysAddr | None = None) -> Region:
        """A region of it, locked as any other."""
        return Region.open(self.path, write=write, phys_base=phys_base)

    def close(self) -> None:
        """Give the memory back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def assert_clean(region: Region) -> None:
    """fsck finds nothing wrong, mounted or not."""
    report = fsck.check(region, repair=False)
    assert report.clean, [problem.message for problem in report.problems]
