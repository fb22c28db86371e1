"""Opening the pool that a superblock names, beside its region."""

from __future__ import annotations

import os

from pkernfs.errors import RegionError
from pkernfs.host.sysroot import HOST
from pkernfs.layout import POOL_DAX, POOL_DIRECTORY
from pkernfs.pool.directory import DirectoryPool
from pkernfs.pool.pool import Pool
from pkernfs.region.region import Place
from pkernfs.region.spec import BASE


def open_pool(
    kind: int,
    granule: int,
    region_place: Place | None,
    *,
    write: bool = True,
    lock: bool = True,
) -> Pool:
    """Open the pool of a file system.

    :param kind: a ``POOL_`` constant, as recorded; ``granule`` likewise, in bytes
    :param region_place: where its region is; None: in anonymous memory
    :param write: segments may be made and changed
    :param lock: keep others from making regions of segments; the daemon of a mount does so
    :raises RegionError: the region is not where such a pool is, or the pool is not as it was.
    """
    if kind == POOL_DIRECTORY:
        return DirectoryPool.at(_directory_of(region_place), granule)
    if kind == POOL_DAX:
        path = "" if region_place is None else region_place.path
        return _open_beside_device(path, write=write, lock=lock)
    raise RegionError(f"this version has no pool of segments of kind {kind}")


def _open_beside_device(path: str, *, write: bool, lock: bool) -> Pool:
    """:raises RegionError: the region is no dax device, or its memory cannot be divided."""
    from pkernfs.pool.dax import DaxPool  # as region.opening: for those only who have such a pool
    from pkernfs.region.dax import device_name, read_device

    name = device_name(path, HOST)
    if name is None:
        raise RegionError(
            f"{path or 'anonymous memory'}: its segments are not here: they are beside a region "
            "that is a dax device"
        )
    return DaxPool(read_device(name, HOST), write=write, lock=lock, host=HOST)


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
