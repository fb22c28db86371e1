"""Opening the backing that a region spec names, of whatever kind.

The kinds with physical addresses are imported by those only who open one: with what they ask of the
kernel they take as long to import (3 ms) as it takes to check a small region.
"""

from __future__ import annotations

import os

from pkernfs.errors import UsageError
from pkernfs.host.sysroot import HOST, Host
from pkernfs.quantities import PhysAddr
from pkernfs.region import dax
from pkernfs.region.backing import Backing
from pkernfs.region.files import FileBacking
from pkernfs.region.spec import file_of, is_file_spec, looks_physical, resolve


def open_backing(
    spec: str, *, write: bool, phys_base: PhysAddr | None, lock: bool, host: Host = HOST
) -> Backing:
    """Check and open what ``spec`` names, and lock it if asked; none of it is read or stored.

    :raises RegionError: there is no such region, or it is not one's to have.
    :raises LockedError: it is in use, or a part of it is.
    :raises UsageError: ``phys_base`` for memory that has an address of its own.
    """
    spec = file_of(spec) if is_file_spec(spec) else resolve(spec, host)
    path = os.path.realpath(spec)
    is_physical = looks_physical(spec)
    name = None if is_physical else dax.device_name(path, host)
    if not is_physical and name is None:
        return FileBacking(spec, write=write, phys_base=phys_base, lock=lock)
    if phys_base is not None:
        raise UsageError(f"{spec}: phys_base= is for files: this region has its own address")
    if name is None:
        return _open_devmem(spec, write=write, lock=lock, host=host)
    return _open_dax(path, name, write=write, lock=lock, host=host)


def _open_devmem(spec: str, *, write: bool, lock: bool, host: Host) -> Backing:
    from pkernfs.region.devmem import DevMemBacking

    return DevMemBacking(spec, write=write, lock=lock, host=host)


def _open_dax(path: str, name: str, *, write: bool, lock: bool, host: Host) -> Backing:
    from pkernfs.region.dax_backing import DaxBacking

    return DaxBacking(path, name, write=write, lock=lock, host=host)
