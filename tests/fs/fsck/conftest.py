"""A populated region for each test of fsck, to be damaged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkernfs.quantities import RegionOff
from pkernfs.region.region import Region
from support.damage import REGION_BYTES, Damage, Populated, populate
from support.repairs import Pristine


@pytest.fixture(scope="session")
def pristine() -> Pristine:
    """The bytes of a populated region, and the numbers of its inodes by path."""
    with Region.anonymous(REGION_BYTES) as region:
        populated = populate(region)
        return region.read(RegionOff(0), REGION_BYTES), populated.inos


@pytest.fixture
def damage(pristine: Pristine) -> Iterator[Damage]:
    """A copy of the populated region, and the means to damage it."""
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(RegionOff(0), pristine[0])
        yield Damage(Populated(region, dict(pristine[1])))
