"""Opening the pool that a superblock names, beside its region."""

from __future__ import annotations

import os

from pkernfs.errors import RegionError
from pkernfs.layout import POOL_DIRECTORY
from pkernfs.pool.directory import DirectoryPool
from pkernfs.pool.pool import Pool
from pkernfs.region.region import Place
from pkernfs.region.spec import BASE


def open_pool(kind: int, granule: int, region_place: Place | None) -> Pool:
    """Open the pool of a file system.

    :param kind: a ``POOL_`` constant, as recorded; ``granule`` likewise, in bytes
    :param region_place: where its region is; None: in anonymous memory
    :raises RegionError: the region is not where such a pool is, or the pool is not as it was.
    """
    if kind == POOL_DIRECTORY:
        return DirectoryPool.at(_directory_of(region_place), granule)
    raise RegionError(f"this version has no pool of segments of kind {kind}")


def _directory_of(place: Place | None) -> str:
    """:raises RegionError: the region is no file of the right name."""
    directory, name = os.path.split("" if place is None else place.path)
    if name != BASE:
        where = "anonymous memory" if place is None else place.path
        raise RegionError(
            f"{where}: its segments are not here: they are beside a region that is a file "
            f"named {BASE}"
        )
    return directory
