"""Opening the backing of a region spec."""

from __future__ import annotations

import os

from pkernfs.errors import UsageError
from pkernfs.host import iomem
from pkernfs.host.sysroot import HOST, Host
from pkernfs.region import dax
from pkernfs.region.backing import Backing
from pkernfs.region.dax import DaxBacking
from pkernfs.region.devmem import DevMemBacking
from pkernfs.region.files import FileBacking
from pkernfs.region.spec import is_file_spec, resolve


def open_backing(
    spec: str, *, write: bool, phys_base: int | None, lock: bool, host: Host = HOST
) -> Backing:
    """What ``spec`` names, checked, open, and locked if asked; nothing of it was read or stored.

    :raises RegionError: there is no such region, or it is not one's to have.
    :raises LockedError: it is in use, or a part of it is.
    :raises UsageError: ``phys_base`` for memory that has an address of its own.
    """
    if not is_file_spec(spec):
        spec = resolve(spec, host)
    if iomem.looks_physical(spec):
        if phys_base is not None:
            raise UsageError(f"{spec}: phys_base= is for files: this region has its own address")
        return DevMemBacking(spec, write=write, lock=lock, host=host)
    name = dax.device_name(os.path.realpath(spec), host)
    if name is not None:
        if phys_base is not None:
            raise UsageError(f"{spec}: phys_base= is for files: this region has its own address")
        return DaxBacking(os.path.realpath(spec), name, write=write, lock=lock, host=host)
    return FileBacking(spec, write=write, phys_base=phys_base, lock=lock)
