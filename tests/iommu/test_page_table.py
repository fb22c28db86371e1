"""The page-table builder against a model: any sequence of map, unmap and protect, all widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import (
    ExistsError,
    InvalidError,
    NoSpaceError,
    NoTablePagesError,
    TableDamageError,
)
from pkernfs.host.iomem import Span
from pkernfs.iommu.memory import store_words
from pkernfs.iommu.page_pool import Mapping
from pkernfs.iommu.translate import translate_domain
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff, Word
from pkernfs.region.region import Region
from pkernfs.vtd.entries import leaf_bytes, width_bits
from support.page_tables import GIB, MIB, PHYS_BASE, Domain, Model

HIGH = PhysAddr(1 << 45)  # physical memory that is mapped


@pytest.fixture(params=[3, 4, 5])
def domain(request: pytest.FixtureRequest) -> Iterator[Domain]:
    made = Domain(request.param)
    yield made
    made.close()


def test_largest_leaves(domain: Domain) -> None:
    base = 3 * GIB
    start, end = Iova(base - 2 * MIB - 3 * PAGE), Iova(base + GIB + 2 * MIB + PAGE)
    domain.table.map(start, PhysAddr(HIGH + start), end - start, 3)
    assert domain.leaf_levels(start, end) == {1: 4, 2: 2, 3: 1}


@pytest.mark.parametrize(("largest", "counts"), [(1, {1: 1024}), (2, {2: 2}), (3, {2: 2})])
def test_leaves_no_larger_than_the_unit_knows(largest: int, counts: dict[int, int]) -> None:
    domain = Domain(4, largest=largest)
    domain.table.map(Iova(0), HIGH, 4 * MIB, 3)
    assert domain.leaf_levels(Iova(0), Iova(4 * MIB)) == counts


def test_leaves_as_the_physical_address_allows(domain: Domain) -> None:
    domain.table.map(Iova(0), PhysAddr(HIGH + 4 * MIB), GIB, 3)
    assert domain.leaf_levels(Iova(0), Iova(GIB)) == {2: 512}
    domain.table.map(Iova(2 * GIB), PhysAddr(HIGH + PAGE), 4 * MIB, 1)
    assert domain.leaf_levels(Iova(2 * GIB), Iova(2 * GIB + 4 * MIB)) == {1: 1024}


@pytest.mark.parametrize("level", [2, 3])
def test_maps_that_complete_a_superpage_merge(domain: Domain, level: int) -> None:
    size = leaf_bytes(level)
    start, end = Iova(size), Iova(2 * size)
    used = domain.table.used_pages
    part = size // 4
    for i in (2, 0, 3):
        domain.table.map(Iova(start + i * part), PhysAddr(HIGH + i * part), part, 3)
        assert domain.leaf_levels(start, end).keys() == {level - 1}
    domain.table.map(Iova(start + part), PhysAddr(HIGH + part), part, 3)
    assert domain.leaf_levels(start, end) == {level: 1}
    domain.table.unmap(start, size)
    assert domain.table.used_pages == used == 1


def test_no_merge_of_what_differs(domain: Domain) -> None:
    domain.table.map(Iova(0), HIGH, MIB, 3)
    domain.table.map(Iova(MIB), PhysAddr(HIGH + MIB), MIB, 1)
    assert domain.leaf_levels(Iova(0), Iova(2 * MIB)) == {1: 512}
    assert domain.table.protect(Iova(MIB), MIB, 3) == MIB
    assert domain.leaf_levels(Iova(0), Iova(2 * MIB)) == {2: 1}


def test_what_the_unit_and_others_have_set_is_kept(domain: Domain) -> None:
    """A and D (the unit's) are joined, SNP (a kernel's) must agree, and both outlive a split."""
    domain.table.map(Iova(0), HIGH, 2 * MIB - PAGE, 3)
    leaves = translate_domain(domain.memory, domain.table.root, domain.levels, Iova(0)).steps[-1]
    at = domain.memory.offset(leaves.address)
    assert at is not None
    for index, bits in ((0, 0x800), (3, 0x100), (7, 0x200)):
        entry = RegionOff(at + 8 * index)
        word = int(domain.region.view(entry, 8).cast("Q")[0])
        domain.region.store_u64(entry, word | bits)
    domain.table.map(Iova(2 * MIB - PAGE), PhysAddr(HIGH + 2 * MIB - PAGE), PAGE, 3)
    assert domain.leaf_levels(Iova(0), Iova(2 * MIB)) == {1: 512}
    domain.region.store_u64(at, HIGH | 3)
    domain.table.protect(Iova(0), PAGE, 3)
    assert domain.leaf_levels(Iova(0), Iova(2 * MIB)) == {2: 1}
    leaf = translate_domain(domain.memory, domain.table.root, domain.levels, Iova(0)).steps[-1]
    assert leaf.words == (HIGH | 0x383,)
    domain.table.unmap(Iova(0), PAGE)
    leaf = translate_domain(domain.memory, domain.table.root, domain.levels, Iova(PAGE)).steps[-1]
    assert leaf.words == (HIGH + PAGE | 0x303,)


@pytest.mark.parametrize("level", [2, 3])
def test_a_cut_superpage_is_split(domain: Domain, level: int) -> None:
    size = leaf_bytes(level)
    start, end = Iova(size), Iova(2 * size)

    def page(number: int) -> Iova:
        return Iova(start + number * PAGE)

    domain.table.map(start, HIGH, size, 3)
    assert domain.table.unmap(page(5), PAGE) == PAGE
    assert domain.at(page(5)) is None
    assert domain.at(page(4)) == (HIGH + 4 * PAGE, 3)
    assert domain.at(Iova(end - 1)) == (HIGH + size - 1, 3)
    domain.table.map(page(5), PhysAddr(HIGH + 5 * PAGE), PAGE, 3)
    assert domain.leaf_levels(start, end) == {level: 1}
    assert domain.table.protect(page(7), PAGE, 1) == PAGE
    assert domain.at(page(7)) == (HIGH + 7 * PAGE, 1)
    assert domain.at(page(8)) == (HIGH + 8 * PAGE, 3)


def test_first_and_last_address(domain: Domain) -> None:
    last = Iova((1 << width_bits(domain.levels)) - PAGE)
    top = PhysAddr((1 << 52) - PAGE)
    domain.table.map(Iova(0), PhysAddr(0), PAGE, 1)
    domain.table.map(last, top, PAGE, 2)
    assert domain.at(Iova(0)) == (0, 1)
    assert domain.at(Iova(last + PAGE - 1)) == (top + PAGE - 1, 2)
    assert domain.table.unmap(Iova(0), last + PAGE) == 2 * PAGE
    assert domain.table.used_pages == 1


def test_overlap_is_refused_unless_identical(domain: Domain) -> None:
    domain.table.map(Iova(2 * MIB), HIGH, 4 * MIB, 3)
    before = domain.image()
    for iova, physical, length, perm in (
        (2 * MIB, HIGH, 4 * MIB, 1),
        (3 * MIB, HIGH, PAGE, 3),
        (0, HIGH, 8 * MIB, 3),
        (0, HIGH, GIB, 3),
        (5 * MIB, HIGH + GIB, 2 * MIB, 3),
    ):
        with pytest.raises(ExistsError, match="already mapped"):
            domain.table.map(Iova(iova), PhysAddr(physical), length, perm)
    assert list(domain.table.mappings()) == [(2 * MIB, HIGH, 4 * MIB, 3)]
    domain.table.map(Iova(2 * MIB), HIGH, 4 * MIB, 3)
    domain.table.map(Iova(3 * MIB), PhysAddr(HIGH + MIB), PAGE, 3)
    assert domain.image() == before
    domain.table.map(Iova(0), PhysAddr(HIGH - 2 * MIB), 8 * MIB, 3)
    assert list(domain.table.mappings()) == [(0, HIGH - 2 * MIB, 8 * MIB, 3)]


def test_pieces_are_one_change(domain: Domain) -> None:
    domain.table.map(Iova(4 * MIB), HIGH, PAGE, 3)
    pieces = [
        Span(PhysAddr(HIGH + at * MIB), length * MIB)
        for at, length in ((64, 1), (65, 1), (0, 2), (1024, 1))
    ]
    with pytest.raises(ExistsError):
        domain.table.map_pieces(Iova(0), pieces, 3)
    assert domain.at(Iova(0)) is None
    domain.table.unmap(Iova(4 * MIB), PAGE)
    domain.table.map_pieces(Iova(0), pieces, 3)
    assert domain.leaf_levels(Iova(0), Iova(5 * MIB)) == {2: 2, 1: 256}


@pytest.mark.parametrize(
    ("iova", "length", "message"),
    [
        (1, PAGE, "iova 0x1: unaligned: expected a multiple of 0x1000"),
        (0, 100, "bad length: got 0x64 bytes"),
        (0, 0, "bad length"),
        (0, -PAGE, "bad length"),
        (-PAGE, PAGE, "not an address"),
        (1 << 64, PAGE, "not an address"),
        (1 << 48, PAGE, "not canonical"),
        ((1 << 64) - PAGE, PAGE, "beyond 48 bits"),
        ((1 << 48) - PAGE, 2 * PAGE, "beyond 48 bits"),
    ],
)
def test_bad_ranges(iova: Iova, length: int, message: str) -> None:
    domain = Domain(4)
    before = domain.image()
    for change in (
        lambda: domain.table.map(iova, HIGH, length, 3),
        lambda: domain.table.unmap(iova, length),
        lambda: domain.table.protect(iova, length, 1),
    ):
        with pytest.raises(InvalidError, match=message) as error:
            change()
        assert "\n" not in str(error.value)
    assert domain.image() == before


def test_bad_memory_and_permissions() -> None:
    table = Domain(4).table
    for physical, length, perm in ((1, PAGE, 3), (1 << 52, PAGE, 3), (HIGH, PAGE, 0), (0, PAGE, 4)):
        with pytest.raises(InvalidError):
            table.map(Iova(0), PhysAddr(physical), length, perm)
    with pytest.raises(InvalidError, match="levels"):
        Domain(2)
    assert not list(table.mappings())


# ---------------------------------------------------------------------- the pool


def test_out_of_pages_says_how_many_and_changes_nothing() -> None:
    small = Domain(4, pages=10)
    small.table.map(Iova(0), HIGH, PAGE, 3)
    before, used = small.image(), small.table.used_pages
    assert used == 4
    with pytest.raises(NoTablePagesError, match=r"grow by 2 MiB: truncate -s \+2M") as error:
        small.table.map(Iova(GIB), PhysAddr(HIGH + PAGE), 40 * MIB, 3)
    missing = error.value.missing
    assert missing == (1 + 20 - 6) * PAGE
    assert list(small.table.mappings()) == [(0, HIGH, PAGE, 3)]
    assert small.table.used_pages == used
    assert small.region.read(RegionOff(8 * MIB), PAGE) == before[8 * MIB : 8 * MIB + PAGE]
    enough = Domain(4, pages=10 + missing // PAGE)
    enough.table.map(Iova(0), HIGH, PAGE, 3)
    enough.table.map(Iova(GIB), PhysAddr(HIGH + PAGE), 40 * MIB, 3)
    assert enough.table.free_pages == 0


def test_out_of_pages_of_something_huge_is_told_at_once() -> None:
    domain = Domain(5, pages=4)
    with pytest.raises(NoSpaceError, match=r"grow by \d+ MiB"):
        domain.table.map(Iova(0), PhysAddr(PAGE), 1 << 51, 3)
    with pytest.raises(NoSpaceError):
        Domain(4, pages=2).table.map(Iova(0), HIGH, PAGE, 1)


def test_unmap_that_cannot_split() -> None:
    domain = Domain(4, pages=2)
    domain.table.map(Iova(0), HIGH, GIB, 3)
    with pytest.raises(NoSpaceError):
        domain.table.unmap(Iova(PAGE), PAGE)
    with pytest.raises(NoSpaceError):
        domain.table.protect(Iova(PAGE), PAGE, 1)
    assert list(domain.table.mappings()) == [(0, HIGH, GIB, 3)]
    assert domain.table.unmap(Iova(0), GIB) == GIB


def test_freed_pages_wait_for_the_invalidation() -> None:
    domain = Domain(4, pages=8)
    domain.table.walked = True
    domain.table.map(Iova(0), HIGH, PAGE, 3)
    domain.table.unmap(Iova(0), PAGE)
    assert (domain.table.used_pages, domain.table.free_pages) == (1, 4)
    domain.table.map(Iova(0), HIGH, PAGE, 3)
    domain.table.unmap(Iova(0), PAGE)
    with pytest.raises(NoSpaceError):
        domain.table.map(Iova(0), HIGH, PAGE, 3)
    domain.table.invalidated()
    domain.table.map(Iova(0), HIGH, PAGE, 3)
    assert domain.open().free_pages == 4


@pytest.mark.parametrize("coherent", [True, False])
def test_what_is_stored_is_written_back_in_order(
    coherent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For units that read past the caches: new tables before what refers to them."""
    domain = Domain(4, pages=64)
    log: list[tuple[str, int, int]] = []

    def commit(words: Sequence[Word]) -> None:
        for offset, word in words:
            domain.region.store_u64(offset, word)
            log.append(("store", offset, 8))

    def flush(_region: Region, offset: int, length: int) -> None:
        log.append(("flush", offset, length))

    domain.table = domain.open(commit)
    domain.table.coherent = coherent
    monkeypatch.setattr(Region, "flush_lines", flush)
    for change in (
        lambda: domain.table.map(Iova(0), HIGH, 8 * PAGE, 3),
        lambda: domain.table.map(Iova(GIB), HIGH, GIB, 3),
        lambda: domain.table.unmap(Iova(GIB + 5 * PAGE), PAGE),
        lambda: domain.table.unmap(Iova(0), 4 * PAGE),
    ):
        before = domain.table.used_pages
        log.clear()
        change()
        stores = [entry for entry in log if entry[0] == "store"]
        if not coherent:
            first = log.index(stores[0])
            new = max(0, domain.table.used_pages - before)
            assert [length for _kind, _at, length in log[:first]] == [PAGE] * new
            assert log[first + len(stores) :] == [("flush", at, 8) for _kind, at, _8 in stores]
        else:
            assert log == stores


def test_a_table_tells_whether_a_unit_may_have_cached_what_changed() -> None:
    domain = Domain(4, pages=64)
    table = domain.table
    table.walked = True
    table.map(Iova(0), HIGH, 511 * PAGE, 3)
    table.map(Iova(GIB), HIGH, PAGE, 3)
    assert not table.stale
    last = 511 * PAGE
    table.map(Iova(last), PhysAddr(HIGH + last), PAGE, 3)  # a superpage instead of a table
    assert table.stale
    table.invalidated()
    assert not table.stale
    table.unmap(Iova(GIB), PAGE)
    assert table.stale


def test_a_huge_protect_replaces_tables_and_stores_few_words() -> None:
    stores: list[int] = []
    domain = Domain(4, pages=1300)
    domain.table.map(Iova(PAGE), HIGH, GIB, 3)

    def commit(words: Sequence[Word]) -> None:
        stores.append(len(words))
        for offset, word in words:
            domain.region.store_u64(offset, word)

    domain.table = domain.open(commit)
    assert domain.table.protect(Iova(0), 4 * GIB, 1) == GIB
    assert stores[0] < 1200
    assert list(domain.table.mappings()) == [(PAGE, HIGH, GIB, 1)]
    assert domain.table.unmap(Iova(0), 4 * GIB) == GIB
    assert domain.table.used_pages == 1


@pytest.mark.parametrize("record_words", [0, 600])
def test_a_table_is_replaced_if_the_record_would_be_too_long(record_words: int) -> None:
    stores: list[int] = []
    domain = Domain(4, record_words=record_words)
    domain.table.map(Iova(PAGE), HIGH, 10 * MIB, 3)

    def commit(words: Sequence[Word]) -> None:
        stores.append(len(words))
        for offset, word in words:
            domain.region.store_u64(offset, word)

    domain.table = domain.open(commit)
    assert domain.table.protect(Iova(0), 4 * MIB, 1) == 4 * MIB - PAGE
    assert stores == [{0: 2, 600: 512}[record_words]]
    model = Model()
    model.map(Iova(PAGE), HIGH, 10 * MIB, 3)
    model.protect(Iova(0), 4 * MIB, 1)
    domain.verify(model, [0, PAGE, 2 * MIB, 4 * MIB, 6 * MIB])


def test_damaged_tables_are_not_opened() -> None:
    domain = Domain(4)
    domain.table.map(Iova(0), HIGH, PAGE, 3)
    domain.region.store_u64(RegionOff(8 * MIB + 8), domain.table.root | 3)
    with pytest.raises(TableDamageError, match="reached before"):
        domain.open()
    domain.region.store_u64(RegionOff(8 * MIB + 8), HIGH | 3)
    with pytest.raises(TableDamageError, match="outside the domain's file"):
        domain.open()


@pytest.mark.parametrize("target", [HIGH, PHYS_BASE + 10 * MIB, 0])
def test_tables_that_are_damaged_later_are_noticed(target: int) -> None:
    """An entry scribbled on under an open table leads to an error, and to no store."""
    domain = Domain(4, pages=1300)
    domain.table.map(Iova(GIB + PAGE), HIGH, GIB, 3)
    domain.table.map(Iova(0), HIGH, PAGE, 3)
    below = PhysAddr(domain.region.view(RegionOff(8 * MIB), 8).cast("Q")[0] & ~3)
    for table, index in ((domain.table.root, 0), (below, 1)):
        start = domain.memory.offset(table)
        assert start is not None
        offset = RegionOff(start + 8 * index)
        old = int(domain.region.view(offset, 8).cast("Q")[0])
        domain.region.store_u64(offset, target | 3)
        before = domain.image()
        with pytest.raises(TableDamageError):
            domain.table.protect(Iova(GIB), GIB, 1)
        with pytest.raises((TableDamageError, ExistsError)):
            domain.table.map(Iova(GIB + 8 * PAGE), PhysAddr(HIGH + GIB), PAGE, 3)
        assert domain.image() == before
        domain.region.store_u64(offset, old)
    assert domain.table.protect(Iova(GIB), GIB, 1) == GIB - PAGE


# ---------------------------------------------------------------------- any sequence

# Ranges start and end near the edges of leaves of every size, so that superpages come and go.
EDGES = [0, 2 * MIB, 4 * MIB, GIB - 2 * MIB, GIB, GIB + 2 * MIB, 2 * GIB, 512 * GIB - 2 * MIB]


def _addresses(levels: int) -> list[int]:
    limit = 1 << width_bits(levels)
    edges = [e for e in EDGES if e < limit] + [limit - GIB, limit - 2 * MIB, limit]
    near = {e + d * PAGE for e in edges for d in (-2, -1, 0, 1, 2)}
    return sorted(a for a in near if 0 <= a <= limit)


@st.composite
def operations(draw: st.DrawFn, levels: int) -> tuple[str, Iova, int, PhysAddr, int]:
    addresses = _addresses(levels)
    a = draw(st.integers(0, len(addresses) - 2))
    b = draw(st.integers(a + 1, min(a + 14, len(addresses) - 1)))
    iova, end = Iova(addresses[a]), addresses[b]
    kind = draw(st.sampled_from(["map", "map", "map", "unmap", "protect"]))
    shift = draw(st.sampled_from([0, 0, 0, 2 * MIB, PAGE]))
    perm = draw(st.sampled_from([3, 3, 1, 2]))
    return kind, iova, end - iova, PhysAddr(HIGH + iova % (1 << 45) + shift), perm


@pytest.mark.slow("each change of a random sequence is compared with a model")
@pytest.mark.parametrize("levels", [3, 4, 5])
@given(data=st.data())
def test_any_sequence(levels: int, data: st.DataObject) -> None:
    largest = data.draw(st.sampled_from([3, 3, 2]), label="largest")
    record_words = data.draw(st.sampled_from([16384, 3]), label="record_words")
    domain = Domain(levels, pages=600, largest=largest, record_words=record_words)
    try:
        _run(domain, data, levels)
    finally:
        domain.close()


def _run(domain: Domain, data: st.DataObject, levels: int) -> None:
    model = Model()
    probes = _addresses(levels)
    for _ in range(data.draw(st.integers(1, 8), label="steps")):
        kind, iova, length, physical, perm = data.draw(operations(levels))
        before = [tuple(m) for m in domain.table.mappings()]
        try:
            if kind == "map" and physical + length > 1 << 52:
                with pytest.raises(InvalidError):
                    domain.table.map(iova, physical, length, perm)
            elif kind == "map":
                domain.table.map(iova, physical, length, perm)
                assert model.fits(iova, physical, length, perm)
                model.map(iova, physical, length, perm)
            elif kind == "unmap":
                assert domain.table.unmap(iova, length) == model.unmap(iova, length)
            else:
                changed = domain.table.protect(iova, length, perm)
                assert changed == model.protect(iova, length, perm)
        except ExistsError:
            assert not model.fits(iova, physical, length, perm)
        except NoSpaceError:
            assert [tuple(m) for m in domain.table.mappings()] == before
        domain.verify(model, probes)
        if data.draw(st.booleans(), label="remount"):
            domain.table = domain.open()
    domain.table.unmap(Iova(0), 1 << width_bits(levels))
    assert domain.table.used_pages == 1
    assert not any(domain.region.view(RegionOff(8 * MIB), PAGE))


# ---------------------------------------------------------------------- all at once


@pytest.mark.parametrize("levels", [3, 4, 5])
@given(data=st.data())
def test_any_replacement(levels: int, data: st.DataObject) -> None:
    """From any state to any other in one commit, after each store of which tables are sound."""
    record_words = data.draw(st.sampled_from([16384, 3]), label="record_words")
    domain = Domain(levels, pages=600, record_words=record_words)
    try:
        model = Model()
        for _ in range(data.draw(st.integers(1, 3), label="replacements")):
            _replace(domain, model, data, levels)
            if data.draw(st.booleans(), label="remount"):
                domain.table = domain.open()
    finally:
        domain.close()


def _replace(domain: Domain, model: Model, data: st.DataObject, levels: int) -> None:
    wanted = Model()
    if data.draw(st.booleans(), label="like before"):
        wanted.pieces = list(model.pieces)
    for _ in range(data.draw(st.integers(0, 5), label="pieces")):
        kind, iova, length, physical, perm = data.draw(operations(levels))
        if physical + length > 1 << 52:
            continue
        if kind == "unmap":
            wanted.unmap(iova, length)
        else:
            wanted.map(iova, physical, length, perm)
    before = [tuple(m) for m in domain.table.mappings()]
    try:
        domain.table.replace(wanted.joined())
        model.pieces = list(wanted.pieces)
    except NoSpaceError:
        assert [tuple(m) for m in domain.table.mappings()] == before
    domain.verify(model, _addresses(levels))


def test_a_replacement_is_one_commit_of_what_differs() -> None:
    domain = Domain(4)
    commits: list[int] = []

    def commit(words: Sequence[Word]) -> None:
        commits.append(len(words))
        store_words(domain.region)(words)

    domain.table.map(Iova(0), HIGH, 4 * MIB, 3)
    domain.table.map(Iova(GIB), PhysAddr(HIGH + GIB), 7 * PAGE, 3)
    domain.table = domain.open(commit)
    now = list(domain.table.mappings())
    domain.table.replace(now)
    assert commits == []
    domain.table.replace([now[0], Mapping(Iova(GIB), PhysAddr(HIGH + GIB), 6 * PAGE, 3)])
    assert commits == [1]
    domain.table.replace([Mapping(Iova(2 * MIB), PhysAddr(HIGH + 2 * MIB), 4 * MIB, 1)])
    assert len(commits) == 2
    domain.table.replace([])
    assert domain.table.used_pages == 1
    domain.close()


def test_a_replacement_with_smaller_leaves() -> None:
    domain = Domain(4)
    domain.table.replace([Mapping(Iova(0), HIGH, GIB, 3)], largest=2)
    assert domain.leaf_levels(Iova(0), Iova(GIB)) == {2: 512}
    domain.close()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([(0, HIGH, 2 * PAGE, 3), (PAGE, HIGH, PAGE, 3)], "iova 0x1000: mapped twice"),
        ([(PAGE, HIGH, PAGE, 3), (0, HIGH, PAGE, 3)], "iova 0x0: mapped twice"),
        ([(0, HIGH, PAGE, 0)], "permission 0x0"),
        ([(0, HIGH + 1, PAGE, 3)], "unaligned"),
        ([(0, 1 << 52, PAGE, 3)], "beyond 52 address bits"),
        ([(1 << 48, HIGH, PAGE, 3)], "beyond 48 bits|not canonical"),
    ],
)
def test_bad_replacements(wanted: list[tuple[int, int, int, int]], message: str) -> None:
    domain = Domain(4)
    domain.table.map(Iova(0), HIGH, PAGE, 3)
    before = domain.image()
    with pytest.raises(InvalidError, match=message):
        domain.table.replace(
            [Mapping(Iova(iova), PhysAddr(to), length, perm) for iova, to, length, perm in wanted]
        )
    assert domain.image() == before
    domain.close()
