"""The pool that belongs to a region."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.layout import BLOCK, POOL_DIRECTORY
from pkernfs.pool.opening import open_pool
from pkernfs.region.region import Place, Region


def test_a_pool_is_beside_its_region(on_tmpfs: Path) -> None:
    Region.create(str(on_tmpfs / "base"), BLOCK)
    with Region.open(str(on_tmpfs), write=False) as region:
        pool = open_pool(POOL_DIRECTORY, 2 * BLOCK, region.place)
    assert (pool.kind, pool.granule, pool.name) == (POOL_DIRECTORY, 2 * BLOCK, str(on_tmpfs))
    pool.close()


def test_a_region_without_its_pool(on_tmpfs: Path) -> None:
    for place in (None, Place(f"{on_tmpfs}/region", 0), Place(f"{on_tmpfs}/base (deleted)", 0)):
        with pytest.raises(RegionError, match="its segments are not here"):
            open_pool(POOL_DIRECTORY, BLOCK, place)
    with pytest.raises(RegionError, match="no pool of segments of kind 9"):
        open_pool(9, BLOCK, Place(f"{on_tmpfs}/base", 0))
