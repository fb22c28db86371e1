"""Every store of every change: what an IOMMU sees between any two of them, and after a crash.

The stores of an operation are recorded and applied again one 8-byte step at a time. At each step
the walker translates from the tables as they are then (an IOVA must lead to what it led to before
or to what it leads to after), and a mount, which carries out the journal, must find before or
after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import NoSpaceError, ReadOnlyError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.host.iomem import Span
from pkernfs.iommu.config import Config, configure
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.root_tables import RootTables
from pkernfs.iommu.translate import translate, translate_domain
from pkernfs.journal import PageStore, TransactionTooLarge
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Iova, PageNo, PhysAddr, RegionOff, RegionRun, SourceId, Word
from pkernfs.region import trace
from pkernfs.region.region import Region
from pkernfs.vtd.entries import leaf_bytes, width_bits
from support.checking import assert_clean
from support.page_tables import GIB, MIB, PHYS_BASE

pytestmark = pytest.mark.crash

UUID = bytes(range(16))
JOURNAL_PAGES = 32
TOTAL_PAGES = 256
ROOT = RegionRun(RegionOff(40 * PAGE), 16 * PAGE)
DOMAIN = RegionRun(RegionOff(64 * PAGE), 64 * PAGE)
OTHER = RegionRun(RegionOff(160 * PAGE), 8 * PAGE)
HIGH = PhysAddr(1 << 45)
FIRST, SECOND, UPPER = SourceId(0x28), SourceId(0x30), SourceId(0x2A80)
DEVICES = (FIRST, SECOND, SourceId(0x1FF), UPPER)


@dataclass
class Host:
    """A region with a journal, root-pgtables and two domains."""

    config: Config = field(default_factory=Config)
    image: bytes = b""
    record_words: int = 16384

    def __post_init__(self) -> None:
        self.region = Region.anonymous(TOTAL_PAGES * PAGE, phys_base=PHYS_BASE)
        self.store = PageStore(self.region, UUID, PageNo(1), JOURNAL_PAGES, TOTAL_PAGES)
        if self.image:
            self.region.copy_in(RegionOff(0), self.image)
            self.store.recover()
        self.memories = [Memory(self.region, [e]) for e in (ROOT, DOMAIN, OTHER)]
        commit = self.store.commit_words
        if not self.image:
            configure(self.memories[0], commit, self.config)
        self.root = RootTables(self.memories[0], commit)
        levels, words = self.config.levels, self.record_words
        self.domain, self.other = (
            PageTable(m, commit, levels=levels, record_words=words) for m in self.memories[1:]
        )

    def map(self, iova: int, physical: int, length: int, perm: int) -> None:
        self.domain.map(Iova(iova), PhysAddr(physical), length, perm)

    def unmap(self, iova: int, length: int) -> None:
        self.domain.unmap(Iova(iova), length)

    def protect(self, iova: int, length: int, perm: int) -> None:
        self.domain.protect(Iova(iova), length, perm)

    def snapshot(self) -> bytes:
        return self.region.read(RegionOff(0), self.region.size)

    def mappings(self) -> list[tuple[int, ...]]:
        return [tuple(m) for m in self.domain.mappings()]

    def attached(self) -> list[tuple[int, int, int]]:
        return [(d.source_id, d.table, d.domain_id) for d in self.root.devices()]

    def state(self) -> tuple[object, ...]:
        """All that a user can tell, and what is free."""
        free = self.domain.free_pages, self.root.used_pages
        return self.mappings(), self.attached(), free


Setup = Callable[[Host], object]


@dataclass
class Case:
    name: str
    change: Setup
    setup: Setup = lambda h: None
    levels: int = 4
    mode: Mode = Mode.LEGACY
    record_words: int = 16384


def _full_but_one(h: Host) -> None:
    h.map(0, HIGH, 2 * MIB - PAGE, 3)


def _two(h: Host) -> None:
    h.root.attach(FIRST, h.domain.root, 2)
    h.root.attach(SECOND, h.other.root, 3)


def _one(h: Host) -> None:
    h.root.attach(FIRST, h.domain.root, 2)


SM = Mode.SCALABLE
PIECES = [Span(PhysAddr(HIGH + at * GIB), length * MIB) for at, length in ((0, 1), (1, 2), (9, 4))]
CASES = [
    Case("map the first page", lambda h: h.map(0, HIGH, PAGE, 3)),
    Case("map of all sizes", lambda h: h.map(GIB - 3 * PAGE, HIGH + GIB - 3 * PAGE,
                                             GIB + 2 * MIB + 5 * PAGE, 3)),
    Case("map into live tables", lambda h: h.map(8 * PAGE, HIGH, 32 * PAGE, 1),
         lambda h: h.map(0, HIGH, PAGE, 3)),
    Case("map that merges", lambda h: h.map(2 * MIB - PAGE, HIGH + 2 * MIB - PAGE, PAGE, 3),
         _full_but_one),
    Case("map over an identical part", lambda h: h.map(0, HIGH, GIB, 3),
         lambda h: h.map(5 * MIB, HIGH + 5 * MIB, 3 * MIB, 3)),
    Case("map in pieces", lambda h: h.domain.map_pieces(Iova(0), PIECES, 3)),
    Case("unmap a page", lambda h: h.unmap(PAGE, PAGE),
         lambda h: h.map(0, HIGH, 3 * PAGE, 3)),
    Case("unmap splits 2 MiB", lambda h: h.unmap(7 * PAGE, 3 * PAGE),
         lambda h: h.map(0, HIGH, 2 * MIB, 3)),
    Case("unmap splits 1 GiB", lambda h: h.unmap(GIB + 2 * MIB, PAGE),
         lambda h: h.map(0, HIGH, 3 * GIB, 3)),
    Case("unmap all", lambda h: h.unmap(0, 1 << width_bits(h.config.levels)),
         lambda h: h.map(GIB - 3 * PAGE, HIGH + PAGE, 8 * MIB, 3)),
    Case("protect a page of a superpage", lambda h: h.protect(PAGE, PAGE, 1),
         lambda h: h.map(0, HIGH, 2 * MIB, 3)),
    Case("protect many", lambda h: h.protect(0, 4 * GIB, 1),
         lambda h: h.map(0, HIGH + PAGE, 7 * MIB, 3)),
    Case("protect, tables replaced", lambda h: h.protect(PAGE, 6 * MIB, 2),
         lambda h: h.map(0, HIGH + PAGE, 7 * MIB, 3), record_words=10),
    Case("map of 5 levels", lambda h: h.map((1 << 57) - PAGE, HIGH, PAGE, 3), levels=5),
    Case("unmap of 3 levels", lambda h: h.unmap(0, GIB),
         lambda h: h.map(0, HIGH, 2 * GIB, 3), levels=3),
    Case("attach to a new bus", _one),
    Case("attach to a bus in use", lambda h: h.root.attach(SECOND, h.other.root, 3), _one),
    Case("detach one of two", lambda h: h.root.detach(SECOND), _two),
    Case("detach the last", lambda h: h.root.detach(FIRST), _one),
    Case("scalable attach", _one, mode=SM),
    Case("scalable attach, upper half", lambda h: h.root.attach(UPPER, h.domain.root, 9), _two,
         mode=SM),
    Case("scalable attach to a bus in use", lambda h: h.root.attach(SECOND, h.other.root, 3), _one,
         mode=SM),
    Case("scalable detach one of two", lambda h: h.root.detach(SECOND), _two, mode=SM),
    Case("scalable detach the last", lambda h: h.root.detach(FIRST), _one, mode=SM),
]  # fmt: skip


def _probes(case: Case, *states: list[tuple[int, ...]]) -> list[int]:
    """Addresses at the edges of all that is mapped before or after, and of the leaves in it."""
    limit = 1 << width_bits(case.levels)
    found = {0, limit - 1}
    for mappings in states:
        for iova, _physical, length, _perm in mappings:
            for edge in (iova, iova + length):
                for size in (PAGE, leaf_bytes(2), leaf_bytes(3)):
                    low = edge - edge % size
                    found.update((edge, edge - 1, low, low - 1, low + size, low + size - 1))
                found.add(iova + length // 2)
    return sorted(a for a in found if 0 <= a < limit)


Answer = tuple[object, ...]


def _domain_answers(host: Host, probes: list[int]) -> list[Answer]:
    levels, memory = host.config.levels, host.memories[1]
    walks = (translate_domain(memory, host.domain.root, levels, Iova(a)) for a in probes)
    return [(t.physical, t.perm, t.fault) for t in walks]


def _device_answers(host: Host) -> list[Answer]:
    memory = Memory.whole(host.region)
    mode = host.config.mode
    walks = (translate(memory, host.root.root, s, Iova(0x5000), mode=mode) for s in DEVICES)
    return [(t.physical, t.domain_id, t.fault) for t in walks]


def _steps(stores: list[trace.Store]) -> Iterator[tuple[int, bytes]]:
    for offset, length, data in stores:
        data = bytes(length) if data is None else data
        for at in range(0, length, 8):
            yield offset + at, data[at : at + 8]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_store(case: Case) -> None:
    config = Config(case.mode, case.levels)
    host = Host(config, record_words=case.record_words)
    host.other.map(Iova(0), PhysAddr(HIGH + 77 * GIB), MIB, 3)
    case.setup(host)
    before, first = host.state(), host.snapshot()
    trace.trace_start()
    case.change(host)
    stores = trace.trace_stop()
    after, last = host.state(), host.snapshot()
    assert before != after
    probes = _probes(case, host.mappings(), before[0])  # type: ignore[arg-type]
    replay = Host(config, first, record_words=case.record_words)
    old = _domain_answers(replay, probes), _device_answers(replay)
    new = _domain_answers(host, probes), _device_answers(host)
    image = bytearray(first)
    seen: list[str] = []
    for offset, data in _steps(stores):
        if image[offset : offset + 8] == data:
            continue
        image[offset : offset + 8] = data
        replay.region.copy_in(RegionOff(offset), data)
        _look(case, replay, probes, old, new)
        # A mount looks alike at every step of a store of the record, or of a new table.
        in_place = offset >= (1 + JOURNAL_PAGES) * PAGE or offset == PAGE
        if in_place or offset % 512 == 0:
            seen.append(_mounted(case, config, bytes(image), before, after))
    assert bytes(image) == last
    assert seen[-1] == "after"
    assert seen == sorted(seen, key=["before", "after"].index)


def _look(
    case: Case,
    replay: Host,
    probes: list[int],
    old: tuple[list[Answer], list[Answer]],
    new: tuple[list[Answer], list[Answer]],
) -> None:
    """What the hardware finds now is before or after, for each address and device."""
    for kind, now in enumerate((_domain_answers(replay, probes), _device_answers(replay))):
        for at, (a, b, c) in enumerate(zip(now, old[kind], new[kind], strict=True)):
            assert a in (b, c), (case.name, hex(probes[at]) if not kind else at, a, b, c)


def _mounted(
    case: Case, config: Config, image: bytes, before: tuple[object, ...], after: tuple[object, ...]
) -> str:
    mounted = Host(config, image, record_words=case.record_words)
    try:
        state = mounted.state()
        assert state in (before, after), case.name
        assert not mounted.store.journal_state()
        return "before" if state == before else "after"
    finally:
        mounted.region.close()


def test_no_order_of_the_stores_matters_to_the_record() -> None:
    """What is stored before the record's commit word is in no page that can be reached."""
    host = Host()
    host.domain.map(Iova(0), HIGH, 2 * MIB, 3)
    host.domain.map(Iova(4 * MIB), HIGH, MIB, 3)
    live = _reachable(host)
    trace.trace_start()
    host.domain.unmap(Iova(PAGE), PAGE)
    stores = trace.trace_stop()
    commit = next(i for i, s in enumerate(stores) if s[0] == PAGE)
    for offset, length, _data in stores[:commit]:
        assert not live & set(range(offset // PAGE, -(-(offset + length) // PAGE)))


def _reachable(host: Host) -> set[int]:
    pages = set()
    todo = [(host.domain.root, host.config.levels)]
    while todo:
        table, level = todo.pop()
        offset = host.memories[1].offset(table)
        assert offset is not None
        pages.add(offset // PAGE)
        for word in host.region.view(offset, PAGE).cast("Q"):
            if word & 3 and level > 1 and not word & 0x80:
                todo.append((PhysAddr(word & 0x000F_FFFF_FFFF_F000), level - 1))
    return pages


# ---------------------------------------------------------------------- words in the journal


def test_words_are_stored_in_the_order_given() -> None:
    host = Host()
    trace.trace_start()
    host.store.commit_words(
        [
            Word(RegionOff(65 * PAGE + 8), 1),
            Word(RegionOff(65 * PAGE), 2),
            Word(RegionOff(65 * PAGE + 8 * 700), 3),
        ]
    )
    stores = trace.trace_stop()
    in_place = [(o, d) for o, n, d in stores if o >= 64 * PAGE]
    assert [o for o, _d in in_place] == [65 * PAGE + 8, 65 * PAGE, 65 * PAGE + 8 * 700]


def test_words_beyond_one_record_store_nothing() -> None:
    host = Host()
    before = host.snapshot()
    many = [Word(RegionOff(34 * PAGE + 16 * i), 1) for i in range(8000)]
    with pytest.raises(TransactionTooLarge):
        host.store.commit_words(many)
    assert isinstance(TransactionTooLarge(""), NoSpaceError)
    assert host.snapshot() == before
    host.store.commit_words([])
    assert host.snapshot() == before


@pytest.mark.parametrize("offset", [4, -8, TOTAL_PAGES * PAGE, PAGE, 2 * PAGE])
def test_words_stay_out_of_the_journal_and_inside_the_region(offset: RegionOff) -> None:
    host = Host()
    before = host.snapshot()
    with pytest.raises(RuntimeError, match="cannot be stored"):
        host.store.commit_words([Word(RegionOff(64 * PAGE), 1), Word(offset, 1)])
    assert host.snapshot() == before


def test_words_wait_for_no_transaction() -> None:
    host = Host()
    with host.store, pytest.raises(RuntimeError, match="open"):
        host.store.commit_words([Word(RegionOff(64 * PAGE), 1)])
    host.region.writable = False
    with pytest.raises(ReadOnlyError):
        host.store.commit_words([Word(RegionOff(64 * PAGE), 1)])


# ---------------------------------------------------------------------- in a file system


def _table_memory(fs: FileSystem, name: bytes) -> Memory:
    ino = fs.lookup(IOMMU_INO, name).ino
    return Memory(fs.region, [RegionRun(e.region_offset, e.length) for e in fs.extents(ino)])


def test_a_mount_completes_a_change_of_tables() -> None:
    """In a real dom-0: cut anywhere, mounted again, and fsck has nothing to say."""
    with Region.anonymous(32 * MIB, phys_base=PHYS_BASE) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        ino = fs.create(IOMMU_INO, b"dom-0", 0o100400, 0, 0).ino
        fs.run(lambda: fs.setattr(ino, size=2 * MIB))
        ram = fs.create(ROOT_INO, b"ram", 0o100600, 0, 0).ino
        fs.run(lambda: fs.setattr(ram, size=4 * MIB))
        target = PhysAddr(PHYS_BASE + fs.extents(ram)[0].region_offset)
        table = PageTable(_table_memory(fs, b"dom-0"), fs.store.commit_words)
        first = region.read(RegionOff(0), region.size)
        trace.trace_start()
        table.map(Iova(0), target, 3 * MIB, 3)
        table.unmap(Iova(5 * PAGE), PAGE)
        stores = trace.trace_stop()
    for cut in range(len(stores) + 1):
        with Region.anonymous(len(first), phys_base=PHYS_BASE) as region:
            region.copy_in(RegionOff(0), first)
            for offset, length, data in stores[:cut]:
                region.copy_in(offset, bytes(length) if data is None else data)
            mounted = mount_filesystem(region)
            again = PageTable(_table_memory(mounted, b"dom-0"), mounted.store.commit_words)
            mapped = sum(m.length for m in again.mappings())
            assert mapped in (0, 3 * MIB, 3 * MIB - PAGE)
            assert_clean(region)
            again.map(Iova(1 << 40), target, PAGE, 1)
            mounted.unmount()
            assert_clean(region)
