"""A region that was handed over, for tests of pkernfs.fs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.mkfs import make_filesystem
from support.checking import MemoryFile, assert_clean
from support.handed import SIZE, Handed, populated
from support.handover import hand_over


@pytest.fixture(params=[True, False], ids=["digests", "metadata"])
def handed(request: pytest.FixtureRequest) -> Iterator[Handed]:
    with MemoryFile(SIZE) as memory, memory.open() as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        inos = populated(fs)
        places = {
            name: fs.extents(ino)[0].region_offset
            for name, ino in inos.items()
            if fs.inode(ino).is_reg and fs.extents(ino)
        }
        hand_over(fs, digests=request.param)
        assert_clean(region)
        fs.unmount()
        yield Handed(memory, inos, places, region)
