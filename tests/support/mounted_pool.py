"""Real mounts of a directory: the base range, and segments beside it, on tmpfs or hugetlbfs."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs import mkfs
from pkernfs.layout import POOL_DIRECTORY, SEGMENT_IN_USE, PoolFields
from pkernfs.pool.directory import DirectoryPool
from pkernfs.region.region import Region
from pkernfs.region.spec import BASE
from support.huge_pages import huge_pages
from support.mounting import MIB, Mounted, is_mounted, wait_until

#: The length of a segment is a multiple of this.
GRANULE = 2 * MIB


class MountedPool(Mounted):
    """A directory with a formatted region and its segments, and a daemon that serves it.

    ``place`` is where that directory is made, on tmpfs or hugetlbfs; None: beside the mount point.
    ``damaged`` is for a test that takes segments away: what is left need not be what the table
    says.
    """

    def __init__(self, size: int = 32 * MIB, options: str = "", place: Path | None = None) -> None:
        self.damaged = False
        self._place = place
        super().__init__(size, options)

    def make_region(self, size: int) -> None:
        self.pool = (self._place or self.directory) / "pool"
        self.pool.mkdir(mode=0o711)
        self.region = self.pool / BASE
        Region.create(str(self.region), size)
        pool = DirectoryPool.at(str(self.pool))
        pool.close()
        with Region.open(str(self.region), write=True) as region:
            mkfs.make_filesystem(region, pool=PoolFields(POOL_DIRECTORY, pool.granule))

    @property
    def spec(self) -> str:
        return f"{self.pool}/"

    def file(self, name: str = "f", size: int = 0) -> Path:
        """A new file of that size: from 2 MiB on it has a segment. Nobody has it open after this.

        The daemon learns of a close when the kernel likes, so a descriptor is better not opened.
        """
        path = self.path / name
        os.mknod(path, 0o644)
        if size:
            os.truncate(path, size)
        return path

    def segments(self) -> list[Path]:
        """The files of all segments that are there, by number."""
        return sorted(self.pool.glob("segment-*"), key=lambda path: int(path.name.split("-")[1]))

    def wait_until_gone(self, native: Path) -> None:
        """Wait until the memory of a removed file is given back."""
        wait_until(lambda: not native.exists(), f"the end of {native.name}")

    @contextmanager
    def lent(self) -> Iterator[Self]:
        """For one test of several: it is mounted, and there are no files."""
        if not is_mounted(self.path):
            self.start()
        self.remove_files()
        yield self
        if is_mounted(self.path):
            self.remove_files()

    def remove_files(self) -> None:
        """Remove all files, and wait until their memory is given back."""
        for path in self.path.iterdir():
            if path.name != "iommu":
                path.unlink()
        wait_until(lambda: not self.segments(), "no segments")

    def ended(self) -> str:
        """Unmount, and return what the daemon has said."""
        self.unmount()
        return self.words()

    def check(self) -> None:
        if not self.region.exists():
            return  # with the file system that it was on
        super().check()
        if self.damaged:
            return
        with Region.open(str(self.region), write=False) as region:
            fs = mount_filesystem(region, read_only=True)
            rows = fs.segments.table.rows
            fs.unmount()
        there = {path.name for path in self.segments()}
        used = {f"segment-{n}" for n, row in rows.items() if row.state == SEGMENT_IN_USE}
        assert used <= there <= {f"segment-{n}" for n in rows}


def native_of(path: Path) -> Path:
    """The file of a segment, by the path of the file in the mount that has it."""
    from pkernfs.fuse.segment_xattr import parse

    return Path(parse(os.getxattr(path, "system.pkernfs.segment")).path)


def has_segment(path: Path) -> bool:
    """Tell whether a file in the mount has memory of its own."""
    try:
        native_of(path)
    except OSError:
        return False
    return True


@contextmanager
def tmpfs(options: str = "") -> Iterator[Path]:
    """A tmpfs of its own, open to all; ``options`` are of mount(8)."""
    with tempfile.TemporaryDirectory(prefix="pkernfs-tmpfs.") as directory:
        words = ["-o", options] if options else []
        subprocess.run(["mount", "-t", "tmpfs", *words, "none", directory], check=True)
        try:
            os.chmod(directory, 0o755)
            yield Path(directory)
        finally:
            subprocess.run(["umount", "-l", directory], check=False)


@contextmanager
def huge_pool(size: int, options: str = "", base: int = 8 * MIB) -> Iterator[MountedPool]:
    """A mounted directory on hugetlbfs with room for segments of ``size`` bytes together."""
    with (
        huge_pages(base + size) as huge,
        MountedPool(base, options, place=huge) as mount,
    ):
        yield mount
