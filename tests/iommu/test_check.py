"""Damaged and hostile tables: found, told entry by entry, in bounded time."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import pytest

from pkernfs.errors import InvalidError, PkernfsError, TableDamageError
from pkernfs.iommu import show
from pkernfs.iommu.check import check
from pkernfs.iommu.context_walk import ContextReader
from pkernfs.iommu.memory import Memory, store_words
from pkernfs.iommu.page_pool import TablePool
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.page_walk import Code, scan_tree
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, PhysRange, RegionOff, RegionRun
from pkernfs.region.region import Region
from support.page_tables import GIB, MIB, PHYS_BASE
from support.table_host import DATA, DEVICE, DOM_0, DOM_1, ROOT, TableHost, codes


def test_right_tables_are_clean(host: TableHost) -> None:
    report = host.check()
    assert report.clean, report.findings
    assert report.leaves == 511 + 1 + 1
    assert report.mapped_bytes == 6 * MIB - PAGE
    assert [d.source_id for d in report.devices] == [DEVICE, 0x1F8]


def test_no_tables_at_all() -> None:
    region = Region.anonymous(2 * MIB, phys_base=PhysAddr(0))
    assert check(None, {}, []).clean
    assert check(Memory(region, [RegionRun(RegionOff(0), 2 * MIB)]), {}, []).clean
    with pytest.raises(InvalidError, match="never sized"):
        Memory(region, [])
    with pytest.raises(InvalidError, match="no physical addresses"):
        Memory.whole(Region.anonymous(2 * MIB))


@pytest.mark.parametrize(
    ("iova", "length", "found"),
    [
        (0xFEE0_0000, PAGE, PAGE),
        (0xFEEF_F000, 2 * PAGE, PAGE),
        (0xFEDF_F000, PAGE, 0),
        (0xFEF0_0000, PAGE, 0),
        (0xFEE0_0000, 2 * MIB, 2 * MIB),
        (3 * GIB, GIB, GIB),
    ],
)
def test_addresses_of_interrupts(iova: int, length: int, found: int) -> None:
    """Tables that map them are sound, but a device does not reach what they map (3.15)."""
    region = Region.anonymous(8 * MIB, phys_base=PhysAddr(0))
    memory = Memory(region, [RegionRun(RegionOff(0), 2 * MIB)])
    table = PageTable(memory, store_words(region))
    table.map(Iova(iova), PhysAddr(4 * GIB + iova % GIB), length, 3)
    everything = [PhysRange(PhysAddr(0), PhysAddr(1 << 52))]
    report = check(None, {"dom-0": memory}, everything)
    assert codes(report) == ({Code.INTERRUPT_RANGE} if found else set())
    if found:
        (finding,) = report.findings
        assert f"{found:#x} bytes in or around the interrupt range" in finding.message
        word = int.from_bytes(region.view(RegionOff(finding.where), 8), "little")
        assert word & 3 == 3, "the entry that maps it"
        PageTable(memory, store_words(region)).unmap(Iova(0xFEE0_0000), MIB)
        assert check(None, {"dom-0": memory}, everything).clean


# ---------------------------------------------------------------------- each kind of damage


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_reserved_bits(host: TableHost, level: int) -> None:
    at = host.entry(Iova(0), level)
    host.store(at, host.word(at) | 1 << 62)
    assert codes(host.check()) == {Code.RESERVED_BITS}
    fault = host.walk(Iova(0)).fault
    assert fault is not None
    assert fault.name.endswith("PAGING_ENTRY_RSVD")
    with pytest.raises(TableDamageError, match="reserved bits"):
        host.table("dom-0")


@pytest.mark.parametrize("level", [2, 3, 4])
def test_a_table_elsewhere(host: TableHost, level: int) -> None:
    at = host.entry(Iova(0), level)
    for target in (PHYS_BASE + DATA, host.domains["dom-1"].first_page, 0, (1 << 52) - PAGE):
        host.store(at, target | 3)
        assert Code.TABLE_OUTSIDE in codes(host.check())
        with pytest.raises(TableDamageError, match="damaged below"):
            list(host.first.mappings())


@pytest.mark.parametrize("level", [2, 3, 4])
def test_cycles_and_shared_tables(host: TableHost, level: int) -> None:
    at = host.entry(Iova(0), level)
    for target in (host.first.root, at - at % PAGE + PHYS_BASE):
        host.store(at, target | 3)
        assert Code.TABLE_TWICE in codes(host.check())
    other = TableHost(host.mode)
    at = other.entry(Iova(0), level)
    other.store(RegionOff(at + 8 * 100), other.word(at))
    assert codes(other.check()) == {Code.TABLE_TWICE}


def test_leaves_out_of_range(host: TableHost) -> None:
    assert codes(host.check(allowed=(DATA, 7 * MIB))) == {Code.LEAF_OUTSIDE}
    assert codes(host.check(allowed=(DATA + PAGE, 8 * MIB))) == {Code.LEAF_OUTSIDE}
    at = host.entry(Iova(0), 1)
    for target in (DOM_0, DOM_1 + PAGE, ROOT + PAGE):
        host.store(at, PHYS_BASE + target | 3)
        assert codes(host.check()) == {Code.LEAF_IS_TABLE}
        assert codes(host.check(allowed=(0, 8 * MIB))) == {Code.LEAF_IS_TABLE}
    host.store(at, PHYS_BASE + 9 * MIB | 3)
    assert codes(host.check()) == {Code.LEAF_OUTSIDE}


def test_a_superpage_that_spans_a_gap(host: TableHost) -> None:
    base = PhysAddr(PHYS_BASE + DATA)
    middle, end = PhysAddr(base + 3 * MIB), PhysAddr(base + 4 * MIB)
    gap = [PhysRange(base, middle), PhysRange(PhysAddr(middle + PAGE), end)]
    report = check(host.root, host.domains, gap)
    assert codes(report) == {Code.LEAF_OUTSIDE}
    assert report.found == 1
    whole = [PhysRange(base, middle), PhysRange(middle, end)]
    assert check(host.root, host.domains, whole).clean


@pytest.mark.slow("20,000 pieces show if time grows faster than their number")
def test_tables_between_files_in_many_pieces() -> None:
    """What may be mapped is what is left of the files; in little time, however many pieces."""
    count = 20000
    with Region.anonymous(2 * count * PAGE, phys_base=PHYS_BASE) as region:
        pieces = [RegionRun(RegionOff(2 * i * PAGE), PAGE) for i in range(count)]
        domains = {"dom-0": Memory(region, pieces)}
        table = PageTable(domains["dom-0"], store_words(region))
        table.map(Iova(0), PhysAddr(PHYS_BASE + PAGE), PAGE, 3)
        table.map(Iova(GIB), PhysAddr(PHYS_BASE + 7 * PAGE), PAGE, 3)
        odd = [PhysRange.of(PhysAddr(PHYS_BASE + (2 * i + 1) * PAGE), PAGE) for i in range(count)]
        everything = [PhysRange.of(PHYS_BASE, region.size)]
        began = time.process_time()
        assert check(None, domains, odd).clean
        assert check(None, domains, everything).clean
        table.map(Iova(2 * GIB), PhysAddr(PHYS_BASE + 6 * PAGE), 2 * PAGE, 3)
        for allowed in (odd, everything):
            assert codes(check(None, domains, allowed)) == {Code.LEAF_IS_TABLE}
        assert time.process_time() - began < 5


# ---------------------------------------------------------------------- hostile tables


def _is_done(host: TableHost) -> None:
    """Every reader ends soon, with an answer or a PkernfsError."""
    started = time.monotonic()
    report = host.check()
    assert len(report.findings) <= report.found
    memory = host.domains["dom-0"]
    pool = TablePool(host.region, memory.pieces)
    with suppress(PkernfsError):
        scan = scan_tree(pool, memory.first_page, host.levels, Iova(0), Iova(1 << 48))
        for count, _m in enumerate(scan):
            if count > 100_000:
                break
    with suppress(PkernfsError):
        for _line in show.domain_struct("x", memory, memory.first_page, host.levels):
            pass
    reader = ContextReader(host.root, host.root.first_page, host.mode, lambda finding: None)
    list(show.translation_struct("x", PhysAddr(0), reader.devices()))
    for iova in (0, 1 << 30, (1 << 48) - 1):
        result = host.walk(Iova(iova))
        assert (result.physical is None) == (result.fault is not None)
        assert len(result.steps) <= 9
    for opened in (lambda: host.table("dom-0"), lambda: RootTables(host.root, host.commit)):
        with suppress(PkernfsError):
            opened()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes(host: TableHost, seed: int) -> None:
    host.region.copy_in(RegionOff(0), random.Random(seed).randbytes(DATA))
    assert not host.check().clean
    _is_done(host)


@pytest.mark.parametrize("seed", range(6))
def test_random_entries_that_lead_back_into_the_tables(host: TableHost, seed: int) -> None:
    rng = random.Random(seed)
    for offset in (ROOT, DOM_0, DOM_1):
        page = rng.randrange(64)
        for _ in range(300):
            target = PHYS_BASE + offset + rng.randrange(64) * PAGE
            at = RegionOff(offset + rng.choice((0, page)) * PAGE + rng.randrange(512) * 8)
            host.store(at, target | rng.choice((1, 3, 3, 0x83)))
    assert not host.check().clean
    _is_done(host)


def test_every_entry_of_every_table_leads_to_the_top(host: TableHost) -> None:
    for at in range(DOM_0, DOM_0 + 64 * PAGE, 8):
        host.store(RegionOff(at), host.first.root | 3)
    report = host.check()
    assert report.found == 512
    _is_done(host)


def test_findings_are_kept_up_to_a_number(host: TableHost) -> None:
    for at in range(DOM_0, DOM_0 + 8 * PAGE, 8):
        host.store(RegionOff(at), 3)
    for level in range(3):
        host.store(RegionOff(DOM_0 + level * PAGE), PHYS_BASE + DOM_0 + (level + 1) * PAGE | 3)
    report = host.check()
    assert report.found > 1000
    assert len(report.findings) <= 1002


def test_findings_of_one_domain_do_not_hide_those_of_others(host: TableHost) -> None:
    for at in range(DOM_0, DOM_0 + PAGE, 8):
        host.store(RegionOff(at), (1 << 62) | 3)
    host.store(DOM_1, 1 << 50 | 3)
    host.store(ROOT, host.word(ROOT) | 4)
    domains = {f"dom-{n}": host.domains["dom-0"] for n in range(20)}
    report = check(host.root, {**domains, "dom-20": host.domains["dom-1"]}, [])
    assert report.found > 20_000
    assert 10_000 <= len(report.findings) < 10_100
    names = [f.message.split()[0] for f in report.findings]
    assert set(names) >= {"dom-0", "dom-19", "dom-20"}
    assert names[0] in ("root", "scalable")
