"""Damaged and hostile tables: found, told entry by entry, in bounded time; and tables as text."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from pkernfs.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    PkernfsError,
    TableDamageError,
)
from pkernfs.iommu import show
from pkernfs.iommu.check import Report, check
from pkernfs.iommu.config import Config, configure
from pkernfs.iommu.context_walk import ContextReader, Mode
from pkernfs.iommu.memory import Memory, store_words
from pkernfs.iommu.page_pool import TablePool
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.page_walk import Code, scan_tree
from pkernfs.iommu.root_tables import RootTables
from pkernfs.iommu.translate import Translation, translate
from pkernfs.layout import PAGE
from pkernfs.region.region import Region
from pkernfs.vtd import entries
from pkernfs.vtd.entries import READ, WRITE, FaultReason
from support.page_tables import DAMAGE, GIB, MIB, PHYS_BASE, Damage, damage_name

ROOT = 0
DOM_0 = MIB
DOM_1 = 2 * MIB
DATA = 4 * MIB
DEVICE = 0x28


class Host:
    """root-pgtables, two domains and a file of 4 MiB, in one region."""

    def __init__(self, mode: Mode = Mode.LEGACY, levels: int = 4) -> None:
        self.region = Region.anonymous(8 * MIB, phys_base=PHYS_BASE)
        self.commit = store_words(self.region)
        self.root = Memory(self.region, [(ROOT, 16 * PAGE)])
        self.domains = {
            "dom-0": Memory(self.region, [(DOM_0, 64 * PAGE)]),
            "dom-1": Memory(self.region, [(DOM_1, 64 * PAGE)]),
        }
        configure(self.root, self.commit, Config(mode, levels))
        self.levels = levels
        self.mode = mode
        self.tables = RootTables(self.root, self.commit)
        self.first = self.table("dom-0")
        self.first.map(0, PHYS_BASE + DATA, 4 * MIB, 3)
        self.first.unmap(MIB, PAGE)
        self.table("dom-1").map(GIB, PHYS_BASE + DATA, 2 * MIB, 1)
        self.tables.attach(DEVICE, self.first.root, 2)
        self.tables.attach(0x1F8, self.domains["dom-1"].first_page, 3)

    def table(self, name: str) -> PageTable:
        return PageTable(self.domains[name], self.commit, levels=self.levels)

    def check(self, allowed: tuple[int, int] = (DATA, 8 * MIB)) -> Report:
        start, end = allowed
        return check(self.root, self.domains, [(PHYS_BASE + start, PHYS_BASE + end)])

    def walk(self, iova: int, source_id: int = DEVICE, access: int = 0) -> Translation:
        memory = Memory.whole(self.region)
        return translate(
            memory, self.root.first_page, source_id, iova, mode=self.mode, access=access
        )

    def word(self, offset: int) -> int:
        return int(self.region.view(offset, 8).cast("Q")[0])

    def entry(self, iova: int, level: int) -> int:
        """Region offset of the entry that translates ``iova`` at a level, in dom-0."""
        names = {4: "PML4E", 3: "PDPE", 2: "PDE", 1: "PTE"}
        step = next(s for s in self.walk(iova).steps if s.name == names[level])
        return step.address - PHYS_BASE

    def store(self, offset: int, word: int) -> None:
        self.region.store_u64(offset, word)


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(request.param)
    yield made
    made.region.close()


def codes(report: Report) -> set[Code]:
    for finding in report.findings:
        assert "\n" not in finding.message
        assert f"{finding.where:#x}" in finding.message
    return {finding.code for finding in report.findings}


def test_right_tables_are_clean(host: Host) -> None:
    report = host.check()
    assert report.clean, report.findings
    assert report.leaves == 511 + 1 + 1
    assert report.mapped_bytes == 6 * MIB - PAGE
    assert [d.source_id for d in report.devices] == [DEVICE, 0x1F8]


def test_no_tables_at_all() -> None:
    region = Region.anonymous(2 * MIB, phys_base=0)
    assert check(None, {}, []).clean
    assert check(Memory(region, [(0, 2 * MIB)]), {}, []).clean
    with pytest.raises(InvalidError, match="never sized"):
        Memory(region, [])
    with pytest.raises(InvalidError, match="no physical addresses"):
        Memory.whole(Region.anonymous(2 * MIB))


# ---------------------------------------------------------------------- each kind of damage


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_reserved_bits(host: Host, level: int) -> None:
    at = host.entry(0, level)
    host.store(at, host.word(at) | 1 << 62)
    assert codes(host.check()) == {Code.RESERVED_BITS}
    fault = host.walk(0).fault
    assert fault is not None
    assert fault.name.endswith("PAGING_ENTRY_RSVD")
    with pytest.raises(TableDamageError, match="reserved bits"):
        host.table("dom-0")


@pytest.mark.parametrize("level", [2, 3, 4])
def test_a_table_elsewhere(host: Host, level: int) -> None:
    at = host.entry(0, level)
    for target in (PHYS_BASE + DATA, host.domains["dom-1"].first_page, 0, (1 << 52) - PAGE):
        host.store(at, target | 3)
        assert Code.TABLE_OUTSIDE in codes(host.check())
        with pytest.raises(TableDamageError, match="damaged below"):
            list(host.first.mappings())


@pytest.mark.parametrize("level", [2, 3, 4])
def test_cycles_and_shared_tables(host: Host, level: int) -> None:
    at = host.entry(0, level)
    for target in (host.first.root, at - at % PAGE + PHYS_BASE):
        host.store(at, target | 3)
        assert Code.TABLE_TWICE in codes(host.check())
    other = Host(host.mode)
    at = other.entry(0, level)
    other.store(at + 8 * 100, other.word(at))
    assert codes(other.check()) == {Code.TABLE_TWICE}


def test_leaves_out_of_range(host: Host) -> None:
    assert codes(host.check(allowed=(DATA, 7 * MIB))) == {Code.LEAF_OUTSIDE}
    assert codes(host.check(allowed=(DATA + PAGE, 8 * MIB))) == {Code.LEAF_OUTSIDE}
    at = host.entry(0, 1)
    for target in (DOM_0, DOM_1 + PAGE, ROOT + PAGE):
        host.store(at, PHYS_BASE + target | 3)
        assert codes(host.check()) == {Code.LEAF_IS_TABLE}
        assert codes(host.check(allowed=(0, 8 * MIB))) == {Code.LEAF_IS_TABLE}
    host.store(at, PHYS_BASE + 9 * MIB | 3)
    assert codes(host.check()) == {Code.LEAF_OUTSIDE}


def test_a_superpage_that_spans_a_gap(host: Host) -> None:
    base = PHYS_BASE + DATA
    gap = [(base, base + 3 * MIB), (base + 3 * MIB + PAGE, base + 4 * MIB)]
    report = check(host.root, host.domains, gap)
    assert codes(report) == {Code.LEAF_OUTSIDE}
    assert report.found == 1
    whole = [(base, base + 3 * MIB), (base + 3 * MIB, base + 4 * MIB)]
    assert check(host.root, host.domains, whole).clean


def test_tables_between_files_in_many_pieces() -> None:
    """What may be mapped is what is left of the files; in little time, however many pieces."""
    count = 20000
    with Region.anonymous(2 * count * PAGE, phys_base=PHYS_BASE) as region:
        pieces = [(2 * i * PAGE, PAGE) for i in range(count)]
        domains = {"dom-0": Memory(region, pieces)}
        table = PageTable(domains["dom-0"], store_words(region))
        table.map(0, PHYS_BASE + PAGE, PAGE, 3)
        table.map(GIB, PHYS_BASE + 7 * PAGE, PAGE, 3)
        odd = [
            (PHYS_BASE + (2 * i + 1) * PAGE, PHYS_BASE + (2 * i + 2) * PAGE) for i in range(count)
        ]
        everything = [(PHYS_BASE, PHYS_BASE + region.size)]
        began = time.process_time()
        assert check(None, domains, odd).clean
        assert check(None, domains, everything).clean
        table.map(2 * GIB, PHYS_BASE + 6 * PAGE, 2 * PAGE, 3)
        for allowed in (odd, everything):
            assert codes(check(None, domains, allowed)) == {Code.LEAF_IS_TABLE}
        assert time.process_time() - began < 5


def test_damaged_root_and_context_entries(host: Host) -> None:
    root_word = host.word(ROOT)
    for word, code in (
        (root_word | 1 << 5, Code.RESERVED_BITS),
        (host.first.root | 1, Code.TABLE_OUTSIDE),
        (host.root.first_page | 1, Code.TABLE_TWICE),
    ):
        host.store(ROOT, word)
        assert code in codes(host.check())
        with pytest.raises(TableDamageError):
            RootTables(host.root, host.commit)
    host.store(ROOT, root_word)
    device = host.tables.devices()[0]
    at = device.where - PHYS_BASE
    low, high = host.word(at), host.word(at + 8)
    pointer = entries.ADDRESS_MASK
    for where, word, code in (
        (at, low & ~pointer | host.first.root + PAGE, Code.UNKNOWN_DOMAIN),
        (at, low & ~pointer | PHYS_BASE + DATA, Code.UNKNOWN_DOMAIN),
        (at + 8, high & 0xFF | 3 if host.mode else high & 7 | 3 << 8, Code.DOMAIN_ID),
        (at + 8, high | 1 << 63, Code.RESERVED_BITS),
    ):
        if host.mode is Mode.SCALABLE and code is Code.RESERVED_BITS:
            continue
        host.store(where, word)
        assert code in codes(host.check())
        host.store(at, low)
        host.store(at + 8, high)
    assert host.check().clean


def test_a_damaged_configuration(host: Host) -> None:
    host.store(ROOT + PAGE + 8, host.word(ROOT + PAGE + 8) ^ 1 << 20)
    assert Code.CONFIGURATION in codes(host.check())
    with pytest.raises(TableDamageError, match="configuration"):
        RootTables(host.root, host.commit)


# ---------------------------------------------------------------------- hostile tables


def _is_done(host: Host) -> None:
    """Every reader ends soon, with an answer or a PkernfsError."""
    started = time.monotonic()
    report = host.check()
    assert len(report.findings) <= report.found
    memory = host.domains["dom-0"]
    pool = TablePool(host.region, memory.pieces)
    with suppress(PkernfsError):
        for count, _m in enumerate(scan_tree(pool, memory.first_page, host.levels, 0, 1 << 48)):
            if count > 100_000:
                break
    with suppress(PkernfsError):
        for _line in show.domain_struct("x", memory, memory.first_page, host.levels):
            pass
    reader = ContextReader(host.root, host.root.first_page, host.mode, lambda finding: None)
    list(show.translation_struct("x", 0, reader.devices()))
    for iova in (0, 1 << 30, (1 << 48) - 1):
        result = host.walk(iova)
        assert (result.physical is None) == (result.fault is not None)
        assert len(result.steps) <= 9
    for opened in (lambda: host.table("dom-0"), lambda: RootTables(host.root, host.commit)):
        with suppress(PkernfsError):
            opened()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes(host: Host, seed: int) -> None:
    host.region.copy_in(0, random.Random(seed).randbytes(DATA))
    assert not host.check().clean
    _is_done(host)


@pytest.mark.parametrize("seed", range(6))
def test_random_entries_that_lead_back_into_the_tables(host: Host, seed: int) -> None:
    rng = random.Random(seed)
    for offset in (ROOT, DOM_0, DOM_1):
        page = rng.randrange(64)
        for _ in range(300):
            target = PHYS_BASE + offset + rng.randrange(64) * PAGE
            at = offset + rng.choice((0, page)) * PAGE + rng.randrange(512) * 8
            host.store(at, target | rng.choice((1, 3, 3, 0x83)))
    assert not host.check().clean
    _is_done(host)


def test_every_entry_of_every_table_leads_to_the_top(host: Host) -> None:
    for at in range(DOM_0, DOM_0 + 64 * PAGE, 8):
        host.store(at, host.first.root | 3)
    report = host.check()
    assert report.found == 512
    _is_done(host)


def test_findings_are_kept_up_to_a_number(host: Host) -> None:
    for at in range(DOM_0, DOM_0 + 8 * PAGE, 8):
        host.store(at, 3)
    for level in range(3):
        host.store(DOM_0 + level * PAGE, PHYS_BASE + DOM_0 + (level + 1) * PAGE | 3)
    report = host.check()
    assert report.found > 1000
    assert len(report.findings) <= 1002


def test_findings_of_one_domain_do_not_hide_those_of_others(host: Host) -> None:
    for at in range(DOM_0, DOM_0 + PAGE, 8):
        host.store(at, (1 << 62) | 3)
    host.store(DOM_1, 1 << 50 | 3)
    host.store(ROOT, host.word(ROOT) | 4)
    domains = {f"dom-{n}": host.domains["dom-0"] for n in range(20)}
    report = check(host.root, {**domains, "dom-20": host.domains["dom-1"]}, [])
    assert report.found > 20_000
    assert 10_000 <= len(report.findings) < 10_100
    names = [f.message.split()[0] for f in report.findings]
    assert set(names) >= {"dom-0", "dom-19", "dom-20"}
    assert names[0] in ("root", "scalable")


# ---------------------------------------------------------------------- walks


def test_walk_step_by_step(host: Host) -> None:
    found = host.walk(2 * MIB + 0x1234)
    assert found.physical == PHYS_BASE + DATA + 2 * MIB + 0x1234
    assert (found.perm, found.level, found.domain_id) == (3, 2, 2)
    names = [s.name for s in found.steps]
    assert names[0] == "root entry"
    assert names[-3:] == ["PML4E", "PDPE", "PDE"]
    assert len(names) == (7 if host.mode is Mode.SCALABLE else 5)


def test_faults(host: Host) -> None:
    prefix = "SM_" if host.mode is Mode.SCALABLE else ""

    def fault(iova: int, source_id: int = DEVICE, access: int = 0) -> str:
        reason = host.walk(iova, source_id, access).fault
        assert reason is not None
        assert isinstance(reason, FaultReason)
        assert reason.name.startswith(prefix)
        return reason.name.removeprefix(prefix)

    assert fault(0, 0xFF00) == "ROOT_ENTRY_P"
    assert fault(0, DEVICE + 1) == "CONTEXT_ENTRY_P"
    # A unit in scalable mode tells an entry that allows nothing from one that allows too little.
    nothing = ("PAGING_ENTRY_P",) * 2 if prefix else ("READ", "WRITE")
    assert (fault(MIB), fault(MIB, access=WRITE)) == nothing
    assert fault(GIB, 0x1F8, WRITE) == "WRITE"
    assert host.walk(GIB, 0x1F8, READ).physical == PHYS_BASE + DATA
    assert fault(1 << 48) == "ADDR_BEYOND_MGAW"
    assert host.walk(0xFEE00000).interrupt
    at = host.entry(0, 1)
    host.store(at, 0xFEE00000 | 3)
    assert fault(0) == "INTERRUPT_ADDR"
    at = host.entry(2 * MIB, 3)
    host.store(at, 1 << 50 | 3)
    assert fault(0) == "PAGING_ENTRY_INV"


@pytest.mark.parametrize("damage", DAMAGE, ids=damage_name)
def test_the_fault_that_each_damage_leads_to(damage: Damage) -> None:
    host = Host(damage.mode)
    step = next(s for s in host.walk(0).steps if s.name == damage.step)
    word = step.words[damage.word] & ~damage.clear
    host.store(step.address + 8 * damage.word - PHYS_BASE, word | damage.set)
    fault = host.walk(0, access=READ).fault
    assert fault is not None
    assert fault.name == damage.reason


def test_requests_with_pasid(host: Host) -> None:
    def fault(pasid: int) -> FaultReason | None:
        memory, root = Memory.whole(host.region), host.root.first_page
        return translate(memory, root, DEVICE, 0, mode=host.mode, pasid=pasid).fault

    if host.mode is Mode.LEGACY:
        assert fault(1) is FaultReason.LEGACY_PASID
        return
    assert fault(1) is FaultReason.SM_PASID_DISABLED
    context = next(s for s in host.walk(0).steps if s.name == "context entry")
    host.store(context.address - PHYS_BASE, context.words[0] | 1 << 3)
    assert fault(0) is FaultReason.SM_PASID_IS_RID_PASID
    assert fault(1) is FaultReason.SM_PASID_ENTRY_P
    assert fault(64) is FaultReason.SM_PASID_DIR_ENTRY_P
    assert fault(1 << 13) is FaultReason.SM_PASID_TOO_LARGE


def test_pass_through(host: Host) -> None:
    legacy = host.mode is Mode.LEGACY
    name = "context entry" if legacy else "PASID table entry"
    step = next(s for s in host.walk(0).steps if s.name == name)
    clear, kind = (3 << 2, 2 << 2) if legacy else (7 << 6, 4 << 6)
    host.store(step.address - PHYS_BASE, step.words[0] & ~clear | kind)
    assert host.walk(0x1234).physical == 0x1234
    beyond = FaultReason.ADDR_BEYOND_MGAW if legacy else FaultReason.SM_ADDR_BEYOND_HAW
    assert host.walk(1 << 52).fault is beyond


# ---------------------------------------------------------------------- attaching


def test_attach_and_detach(host: Host) -> None:
    with pytest.raises(ExistsError, match=r"0000:00:05\.0"):
        host.tables.attach(DEVICE, host.first.root, 2)
    with pytest.raises(NotFoundError):
        host.tables.detach(0x30)
    for source_id, table, did in ((1 << 16, host.first.root, 1), (1, host.first.root, 1 << 16),
                                  (1, 17, 1), (1, 1 << 52, 1), (-1, 0, 1)):  # fmt: skip
        with pytest.raises(InvalidError):
            host.tables.attach(source_id, table, did)
    with pytest.raises(BusyError):
        configure(host.root, host.commit, Config())
    host.tables.detach(DEVICE)
    assert host.walk(0).fault is not None
    host.tables.detach(0x1F8)
    assert host.tables.used_pages == 2
    assert host.region.is_zero(ROOT, PAGE)
    assert RootTables(host.root, host.commit).config[:2] == (host.mode, 4)


def test_root_pgtables_is_full(host: Host) -> None:
    per_device = 3 if host.mode is Mode.SCALABLE else 1
    count = (16 - host.tables.used_pages) // per_device
    for bus in range(2, 2 + count):
        host.tables.attach(bus << 8, host.first.root, 2)
    with pytest.raises(NoSpaceError, match=r"grow by \d+ MiB"):
        host.tables.attach(0xFF00, host.first.root, 2)
    assert len(RootTables(host.root, host.commit).devices()) == 2 + count
    assert host.check().clean
    for bus in range(2, 2 + count):
        host.tables.detach(bus << 8)
    assert host.tables.used_pages == RootTables(host.root, host.commit).used_pages


def test_zeros_are_a_legacy_table_of_4_levels() -> None:
    region = Region.anonymous(2 * MIB, phys_base=PHYS_BASE)
    root = RootTables(Memory(region, [(0, 2 * MIB)]), store_words(region))
    assert root.config == Config(Mode.LEGACY, 4)
    with pytest.raises(InvalidError):
        configure(root.memory, store_words(region), Config(Mode.LEGACY, 2))


# ---------------------------------------------------------------------- text


def test_translation_struct_is_the_kernels() -> None:
    host = Host()
    text = list(show.translation_struct("dmar0", host.tables.root, host.tables.devices()))
    root, context = host.word(ROOT), host.tables.devices()[0].context_words
    assert text == [
        "IOMMU dmar0: Root Table Address: 0x10000000000",
        "B.D.F\tRoot_entry\t\t\t\tContext_entry\t\t\t\tPASID\tPASID_table_entry",
        f"00:05.0\t0x0000000000000000:0x{root:016x}\t0x{context[1]:016x}:0x{context[0]:016x}"
        "\t-1    \t0x0000000000000000:0x0000000000000000:0x0000000000000000",
        text[3],
        "",
    ]
    assert text[3].startswith("01:1f.0\t")
    scalable = Host(Mode.SCALABLE)
    line = next(
        t for t in show.translation_struct("dmar0", 0, scalable.tables.devices()) if "00:05.0" in t
    )
    entry = scalable.tables.devices()[0].pasid_words
    assert line.endswith(f"\t0     \t0x{entry[2]:016x}:0x{entry[1]:016x}:0x{entry[0]:016x}")


def test_domain_struct_is_the_kernels() -> None:
    host = Host()
    lines = list(show.domain_struct("0000:00:05.0", host.first.memory, host.first.root, 4))
    assert lines[0] == "Device 0000:00:05.0 @0x10000100000"
    assert lines[1] == (
        "IOVA_PFN         \tPML5E             \tPML4E             "
        "\tPDPE              \tPDE               \tPTE"
    )
    words = [host.word(host.entry(0, level)) for level in (4, 3, 2, 1)]
    columns = "\t".join(f"0x{w:016x}" for w in [0, *words])
    assert lines[2] == f"0x0000000000000 |\t{columns}"
    assert len(lines) == 2 + 511 + 1 + 1
    assert lines[-2].startswith("0x0000000000200 |\t0x0000000000000000\t")
    assert lines[-2].count("\t") == 4
    assert lines[-1] == ""
    with_pasid = next(show.domain_struct("a", host.first.memory, host.first.root, 4, 0x1F))
    assert with_pasid == "Device a with pasid 1f @0x10000100000"


def test_merged_view() -> None:
    host = Host()
    lines = [line.split() for line in show.merged(host.first.mappings())]
    assert lines[1:] == [
        ["0x0000000000000000-0xfffff", "0x0000010000400000-0x100004fffff", "rw"],
        ["0x0000000000101000-0x3fffff", "0x0000010000501000-0x100007fffff", "rw"],
    ]
