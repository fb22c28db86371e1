"""The pool that belongs to a region."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import LockedError, RegionError
from pkernfs.layout import BLOCK, POOL_DAX, POOL_DIRECTORY
from pkernfs.pool import opening
from pkernfs.pool.opening import open_pool
from pkernfs.pool.pool import Segment
from pkernfs.quantities import Ino, SegmentNo
from pkernfs.region.dax_making import keep_base
from pkernfs.region.region import Place, Region
from support.made_up_dax import MadeUpDax
from support.made_up_host import make_machine


def test_a_pool_is_beside_its_region(on_tmpfs: Path) -> None:
    Region.create(str(on_tmpfs / "base"), BLOCK)
    with Region.open(str(on_tmpfs), write=False) as region:
        pool = open_pool(POOL_DIRECTORY, 2 * BLOCK, region.place)
    assert (pool.kind, pool.granule, pool.name) == (POOL_DIRECTORY, 2 * BLOCK, str(on_tmpfs))
    pool.close()


def test_a_pool_is_beside_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make_machine(tmp_path)
    kernel = MadeUpDax(machine)
    kernel.install(monkeypatch)
    base = keep_base("dax0.0", 8 * BLOCK, machine)
    monkeypatch.setattr(opening, "HOST", machine)
    with Region.open(machine.path(f"dev/{base.name}"), write=True, host=machine) as region:
        pool = open_pool(POOL_DAX, BLOCK, region.place, write=False)
    assert (pool.kind, pool.granule, pool.passes) == (POOL_DAX, BLOCK, False)
    assert pool.name == "the dax region of /dev/dax0.0"
    pool.close()


def test_the_segments_of_a_mounted_device_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its daemon has the locks; a handover reads beside it."""
    machine = make_machine(tmp_path)
    kernel = MadeUpDax(machine)
    kernel.install(monkeypatch)
    base = keep_base("dax0.0", 8 * BLOCK, machine)
    monkeypatch.setattr(opening, "HOST", machine)
    with Region.open(machine.path(f"dev/{base.name}"), write=True, host=machine) as region:
        mounted = open_pool(POOL_DAX, BLOCK, region.place)
        wanted = Segment(SegmentNo(1), Ino(7), POOL_DAX, 2 * BLOCK)
        row = mounted.create(mounted.plan(wanted, []))
        locked = open_pool(POOL_DAX, BLOCK, region.place, write=False)
        with pytest.raises(LockedError, match="in use"):
            locked.open(row, write=False)
        beside = open_pool(POOL_DAX, BLOCK, region.place, write=False, lock=False)
        with beside.open(row, write=False) as memory:
            assert memory.size == 2 * BLOCK
        beside.close()
        with pytest.raises(LockedError, match="in use"):
            locked.open(row, write=False)
        locked.close()
        mounted.close()


def test_a_region_without_its_pool(on_tmpfs: Path) -> None:
    for place in (None, Place(f"{on_tmpfs}/region", 0), Place(f"{on_tmpfs}/base (deleted)", 0)):
        with pytest.raises(RegionError, match="its segments are not here"):
            open_pool(POOL_DIRECTORY, BLOCK, place)
    with pytest.raises(RegionError, match="beside a region that is a dax device"):
        open_pool(POOL_DAX, BLOCK, Place(f"{on_tmpfs}/base", 0))
    with pytest.raises(RegionError, match="no pool of segments of kind 9"):
        open_pool(9, BLOCK, Place(f"{on_tmpfs}/base", 0))
