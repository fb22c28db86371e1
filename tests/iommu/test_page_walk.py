"""Walks over whole trees: all leaves, in order, as the scan in C has them; and differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import TableDamageError
from pkernfs.iommu.memory import Piece
from pkernfs.iommu.page_pool import BlockMap, Mapping, TablePool
from pkernfs.iommu.page_walk import Leaf, Leaves, Tree, leaves, reader, scan_tree, without
from pkernfs.layout import BLOCK, PAGE
from pkernfs.quantities import Iova, PhysAddr, PhysRange, RegionOff
from pkernfs.vtd.entries import ADDRESS_MASK, READ_WRITE, leaf_bytes, width_bits
from support.page_tables import GIB, MIB, PHYS_BASE, Domain

DATA = PhysAddr(1 << 40)
LOWEST = Iova(0)


@pytest.fixture(params=[3, 4, 5])
def domain(request: pytest.FixtureRequest) -> Iterator[Domain]:
    made = Domain(request.param)
    made.table.map(Iova(7 * PAGE), DATA, 3 * PAGE, 3)
    made.table.map(Iova(2 * MIB), PhysAddr(DATA + 6 * MIB), 4 * MIB, 1)
    made.table.map(Iova(6 * MIB), DATA, PAGE, 2)
    made.table.map(Iova(GIB), DATA, 2 * GIB, 3)
    last = Iova((1 << width_bits(request.param)) - PAGE)
    made.table.map(last, PhysAddr(DATA + 5 * PAGE), PAGE, 3)
    yield made
    made.close()


def runs(domain: Domain, start: Iova = LOWEST, lowest: int = 1) -> list[Leaves]:
    read = reader(domain.memory, domain.memory.size // PAGE)
    return list(leaves(read, domain.table.root, domain.levels, start=start, lowest=lowest))


def test_leaves_are_what_the_scan_finds(domain: Domain) -> None:
    found = [(leaf, run.level) for run in runs(domain) for leaf in run.present()]
    top = (1 << width_bits(domain.levels)) - PAGE
    assert [(leaf.iova, level) for leaf, level in found] == [
        *((page * PAGE, 1) for page in (7, 8, 9)),
        (2 * MIB, 2),
        (4 * MIB, 2),
        (6 * MIB, 1),
        (GIB, 3),
        (2 * GIB, 3),
        (top, 1),
    ]
    pool = TablePool(domain.region, domain.memory.pieces)
    mapped = {
        at: m.physical + at - m.iova
        for m in scan_tree(pool, domain.table.root, domain.levels, LOWEST, Iova(top + PAGE))
        for leaf, level in found
        if m.iova <= (at := leaf.iova) < m.iova + m.length
    }
    assert mapped == {
        leaf.iova: leaf.entry & ADDRESS_MASK & -leaf_bytes(level) for leaf, level in found
    }


def test_runs_cover_what_no_table_does(domain: Domain) -> None:
    """No entry is left out, and none comes twice: references and runs fill the address space."""
    found = runs(domain)
    covered = sum(len(run.entries) * leaf_bytes(run.level) for run in found)
    assert covered == 1 << width_bits(domain.levels)
    assert [run.iova for run in found] == sorted({run.iova for run in found})
    for run in found:
        assert len(run.path) == domain.levels - run.level
        assert all(entry & READ_WRITE for entry in run.path)


def test_a_walk_goes_on_where_one_has_ended(domain: Domain) -> None:
    everything = [leaf for run in runs(domain) for leaf in run.present()]
    for number, leaf in enumerate(everything):
        later = [one for run in runs(domain, leaf.iova) for one in run.present()]
        assert later == everything[number:]
    assert runs(domain, Iova(1 << width_bits(domain.levels))) == []


def test_small_tables_may_be_passed_by(domain: Domain) -> None:
    assert {run.level for run in runs(domain, lowest=2)} == set(range(2, domain.levels + 1))
    large = [leaf.iova for run in runs(domain, lowest=3) for leaf in run.present()]
    assert large == [GIB, 2 * GIB]


def test_a_reader_ends_whatever_refers_to_what(domain: Domain) -> None:
    root = domain.table.root
    assert root == PHYS_BASE + 8 * MIB
    for at in range(8 * MIB, 8 * MIB + PAGE, 8):
        domain.region.store_u64(RegionOff(at), root | 3)
    with pytest.raises(TableDamageError, match="damaged: run the check"):
        runs(domain)
    domain.region.store_u64(RegionOff(8 * MIB), 1 << 50 | 3)
    with pytest.raises(TableDamageError, match="page table at 0x4000000000000: damaged"):
        runs(domain)


def test_present_leaves_of_a_run() -> None:
    run = Leaves(2, Iova(GIB), (0, 3, 1 << 62, 0x83), ())
    assert list(run.present()) == [Leaf(Iova(GIB + 2 * MIB), 3), Leaf(Iova(GIB + 6 * MIB), 0x83)]


def test_trees_of_which_the_levels_are_not_known() -> None:
    domain = Domain(4)
    pool = TablePool(domain.region, domain.memory.pieces)
    tree = Tree(pool, domain.table.root, (3, 4, 5))
    assert tree.is_empty
    domain.table.map(Iova(GIB), PhysAddr(PHYS_BASE + 12 * MIB), 2 * MIB, 3)
    assert not tree.is_empty
    assert Tree(pool, domain.table.root, (4,)).find([PhysRange.of(PHYS_BASE, 13 * MIB)]) == GIB
    blocks = BlockMap(domain.region, [Piece(PHYS_BASE, RegionOff(0), 16 * MIB)])
    assert Tree(pool, domain.table.root, (4,)).mark(blocks)
    assert [at for at in range(0, 16 * MIB, BLOCK) if blocks.any(RegionOff(at), 1)] == [12 * MIB]
    domain.close()


# ---------------------------------------------------------------------- differences


RUNS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2), st.sampled_from((1, 3))),
    max_size=12,
)


def _runs(pieces: Sequence[tuple[int, int, int, int]]) -> list[Mapping]:
    """Pages that are skipped, mapped, where to, with which permissions."""
    found, at = [], 0
    for skip, count, shift, perm in pieces:
        at += skip
        physical = (at + 100 * shift) * PAGE
        found.append(Mapping(Iova(at * PAGE), PhysAddr(physical), count * PAGE, perm))
        at += count
    return found


def _by_page(runs: Sequence[Mapping]) -> dict[int, tuple[int, int]]:
    return {m.iova + at: (m.physical + at, m.perm) for m in runs for at in range(0, m.length, PAGE)}


@given(RUNS, RUNS)
def test_without(first: list[tuple[int, int, int, int]], other: list[tuple[int, ...]]) -> None:
    these, those = _runs(first), _runs(other)  # type: ignore[arg-type]
    expected = dict(_by_page(these).items() - _by_page(those).items())
    assert _by_page(list(without(these, those))) == expected
