"""Real mounts with a pool of segments in a directory on tmpfs."""

from __future__ import annotations

from pathlib import Path

from pkernfs.fs import mkfs
from pkernfs.layout import BLOCK, POOL_DIRECTORY, PoolFields
from pkernfs.region.region import Region
from pkernfs.region.spec import BASE
from support.mounting import MIB, Mounted


class MountedPool(Mounted):
    """A directory with a formatted region and its segments, and a daemon that serves it."""

    def __init__(self, size: int = 32 * MIB, options: str = "") -> None:
        super().__init__(size, options)
        self.region.unlink()
        self.pool = self.directory / "pool"
        self.pool.mkdir(mode=0o711)
        self.region = self.pool / BASE
        Region.create(str(self.region), size)
        self.region.chmod(0o600)
        with Region.open(str(self.region), write=True) as region:
            mkfs.make_filesystem(region, pool=PoolFields(POOL_DIRECTORY, BLOCK))

    def file(self, name: str, size: int = 0) -> Path:
        """A new file of that size: from 2 MiB on it has a segment."""
        path = self.path / name
        with path.open("wb") as file:
            file.truncate(size)
        return path
