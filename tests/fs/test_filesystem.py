"""Mounting: regions of any size, and what is no file system."""

from __future__ import annotations

import random

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import FormatError
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import PAGE
from pkernfs.quantities import RegionOff
from support.checking import MemoryFile, assert_clean
from support.files import GIB, MIB, make


@pytest.mark.parametrize("size", [8 * MIB, 8 * MIB + PAGE, 10 * MIB - PAGE, 22 * GIB, 11 << 40])
def test_regions_of_any_size(size: int) -> None:
    with MemoryFile(size) as memory:
        with memory.open() as region:
            make_filesystem(region)
            fs = mount_filesystem(region)
            ino = make(fs, content=b"abc")
            if size > GIB:
                fs.setattr(ino, size=size // GIB * GIB - GIB)
                assert len(fs.extents(ino)) == 1
                assert bytes(fs.read(ino, 0, 4)) == b"abc\0"
            fs.unmount()
        with memory.open() as region:
            fs = mount_filesystem(region)
            assert bytes(fs.read(ino, 0, 3)) == b"abc"
            if size < 23 * GIB:
                assert_clean(region)


def test_what_is_no_file_system_is_refused() -> None:
    with MemoryFile(16 * MIB) as memory, memory.open() as region:
        with pytest.raises(FormatError):
            mount_filesystem(region)
        region.copy_in(RegionOff(0), random.Random(1).randbytes(16 * MIB))
        with pytest.raises(FormatError):
            mount_filesystem(region)
