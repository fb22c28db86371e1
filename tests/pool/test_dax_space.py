"""The free memory of a dax region, by a made-up kernel; with the pool: test_dax.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import NoSpaceError
from pkernfs.host.iomem import Span
from pkernfs.pool.dax_index import DaxIndex
from pkernfs.pool.dax_space import DaxSpace
from pkernfs.pool.pool import Space
from pkernfs.quantities import PhysAddr, SegmentNo
from pkernfs.region.dax_making import keep_base
from support.made_up_dax import REGION, G, M, MadeUpDax
from support.made_up_host import make_machine

ONE, TWO = SegmentNo(1), SegmentNo(2)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpDax:
    made = MadeUpDax(make_machine(tmp_path))
    made.install(monkeypatch)
    return made


@pytest.fixture
def space(kernel: MadeUpDax) -> DaxSpace:
    base = keep_base("dax0.0", 64 * M, kernel.machine)
    return DaxSpace(base, DaxIndex(REGION, kernel.machine), "here", kernel.machine)


def test_what_is_promised_is_not_free(space: DaxSpace) -> None:
    first = space.choose(ONE, (), 8 * M, [])
    assert first == (Span(PhysAddr(G + 64 * M), 8 * M),)
    assert space.look() == Space(512 * M, 440 * M, 440 * M)
    assert space.choose(TWO, (), 8 * M, first)[0].start == first[0].end
    space.settle(ONE)
    space.settle(ONE)
    assert space.look() == Space(512 * M, 440 * M, 432 * M)


def test_what_others_have_is_not_to_be_had(space: DaxSpace, kernel: MadeUpDax) -> None:
    theirs = Span(PhysAddr(G + 64 * M), 440 * M)
    kernel.foreign(theirs)
    with pytest.raises(NoSpaceError) as caught:
        space.choose(ONE, (), 16 * M, [Span(theirs.end, 2 * M)])
    assert str(caught.value) == (
        "here: no room for 16M: 6M free in NUMA node 1, the largest piece 6M"
    )


def test_growth_begins_behind_what_is_there(space: DaxSpace) -> None:
    has = (Span(PhysAddr(G + 128 * M), 8 * M),)
    assert space.choose(ONE, has, 12 * M, []) == (Span(PhysAddr(G + 136 * M), 4 * M),)
    assert space.choose(ONE, has, 8 * M, []) == ()
