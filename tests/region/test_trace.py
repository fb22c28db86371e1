"""The trace of stores: it rebuilds the region."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import RegionError
from pkernfs.layout import PAGE
from pkernfs.quantities import RegionOff
from pkernfs.region.region import Region
from pkernfs.region.trace import Store, trace_start, trace_stop


def replay(image: bytearray, stores: list[Store]) -> None:
    for offset, length, data in stores:
        assert data is None or len(data) == length
        image[offset : offset + length] = bytes(length) if data is None else data


@given(seed=st.integers(0, 1 << 32))
def test_a_trace_rebuilds_the_region(seed: int) -> None:
    rnd = random.Random(seed)
    with Region.anonymous(4 * PAGE) as region:
        region.copy_in(RegionOff(0), rnd.randbytes(4 * PAGE))
        image = bytearray(region.read(RegionOff(0), region.size))
        trace_start()
        count = rnd.randrange(30)
        for _ in range(count):
            length = rnd.randrange(1, 600)
            offset = RegionOff(rnd.randrange(region.size - length))
            kind = rnd.randrange(3)
            if kind == 0:
                region.copy_in(offset, rnd.randbytes(length))
            elif kind == 1:
                region.zero(offset, length)
            else:
                region.store_u64(RegionOff(offset // 8 * 8), rnd.getrandbits(64))
        stores = trace_stop()
        assert len(stores) == count
        replay(image, stores)
        assert image == region.read(RegionOff(0), region.size)
        region.copy_in(RegionOff(0), b"after the end")
        assert trace_stop() == stores


def test_a_traced_store_that_is_refused_is_not_there() -> None:
    with Region.anonymous(PAGE) as region:
        trace_start()
        with pytest.raises(RegionError):
            region.zero(RegionOff(PAGE), 1)
        assert trace_stop() == []
