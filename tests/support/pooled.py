"""A real mount whose files can have segments, in a pool beside its region."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pkernfs.fs.mkfs import make_filesystem
from pkernfs.region.region import Region
from pkernfs.region.spec import BASE
from support.memory_pool import POOL
from support.mounting import MIB, Mounted


class Pooled(Mounted):
    """A formatted region in a directory of segments, and a daemon that serves it."""

    def __init__(self, size: int = 16 * MIB, options: str = "", directory: str = "/dev/shm"):
        super().__init__(size, options, directory)
        self.pool = Path(tempfile.mkdtemp(prefix="pool.", dir=self.directory))
        self.pool.chmod(0o711)
        self.region.unlink()
        self.region = self.pool / BASE
        try:
            Region.create(str(self.region), size)
            with Region.open(str(self.region), write=True) as region:
                make_filesystem(region, pool=POOL)
        except BaseException:
            shutil.rmtree(self.directory)
            raise
