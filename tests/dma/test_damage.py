"""Scribbled and hostile tables in a file system: it is mounted, and every question ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from struct import Struct
from typing import Any

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import BusyError, PkernfsError, TableDamageError
from pkernfs.fs import fsck
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.host.bars import Bar
from pkernfs.iommu.config import Config, config_words
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Iova, PhysAddr, RegionOff, SourceId
from pkernfs.region.checksum import crc32c
from support.table_files import DEVICE, MIB, PHYS_BASE, RW, Host

GIB = 1 << 30
BOUND_SECONDS = 5.0
QUESTIONS: list[dict[str, Any]] = [
    {"what": "show"},
    {"what": "show", "as_json": True},
    {"what": "show", "domain": 0},
    {"what": "export"},
    {"what": "check"},
    {"what": "check", "as_json": True},
    {"what": "translate", "device": DEVICE, "iova": 0x1234},
    {"what": "translate", "device": DEVICE, "iova": GIB + 0x1234, "access": 3},
    {"what": "translate", "device": 0x30, "iova": 0, "pasid": 5},
]


class Damaged(Host):
    """guest is mapped in dom-0 in leaves of all sizes, other in dom-1; a device for each."""

    def __init__(self, mode: Mode = Mode.LEGACY, levels: int = 4) -> None:
        super().__init__(32 * MIB)
        self.tables.create_root(Config(mode, levels))
        guest, other = self.file_of("guest", 4 * MIB), self.file_of("other", 4 * MIB)
        self.dom(0)
        self.dom(1)
        self.map(0, Iova(0), guest, 2 * MIB, 64 * PAGE)
        self.map(0, Iova(GIB), guest)
        self.map(1, Iova(0), other)
        self.tables.map_bar(
            0, Iova(4 * GIB), Bar(SourceId(0x30), 0, PhysAddr(1 << 40), 2 * GIB), 0, None, RW
        )
        self.attach(0)
        self.attach(1, SourceId(0x30))
        self.at_name = {
            name: self.tables.memory(name).pieces[0].offset for name in self.tables.names
        }
        self.base = PHYS_BASE

    def table(self, name: bytes, *indexes: int) -> RegionOff:
        """Region offset of the word that a walk from the file's first page comes to."""
        at = self.at_name[name]
        for index in indexes[:-1]:
            word = self.word(RegionOff(at + 8 * index))
            at = RegionOff((word & ((1 << 52) - PAGE)) - self.base)
        return RegionOff(at + 8 * indexes[-1])

    def word(self, at: RegionOff) -> int:
        return int.from_bytes(self.region.read(at, 8), "little")

    def stop(self) -> None:
        """The daemon is gone; the region is there to be damaged."""
        self.fs.unmount()

    def start(self, phys_base: PhysAddr | None = PHYS_BASE) -> None:
        self.region.close()
        self.region = self.file.open(phys_base=phys_base)
        self.fs = mount_filesystem(self.region)

    def ask_everything(self) -> list[str]:
        """Every question ends, with an answer or one line; what was said."""
        said = []
        began = time.monotonic()
        for question in QUESTIONS:
            said.append(self._ask(question))
        assert time.monotonic() - began < BOUND_SECONDS
        assert not self.fs.read_only
        return said

    def _ask(self, question: dict[str, Any]) -> str:
        try:
            text, records, _status = self.answer(**question)
        except PkernfsError as e:
            return one_line(e)
        return text or str(records)

    def use_everything(self) -> None:
        """Every change ends, done or refused in one line."""
        began = time.monotonic()
        ino = self.fs.find(ROOT_INO, b"other")
        for change in (
            lambda: self.map(0, Iova(8 * GIB), ino),
            lambda: self.map(2, Iova(8 * GIB), ino),
            lambda: self.tables.unmap(0, Iova(0), GIB),
            lambda: self.attach(0, SourceId(0x77)),
            lambda: self.tables.detach(DEVICE),
            lambda: self.tables.detach(SourceId(0x30)),
            lambda: self.tables.create_root(),
            lambda: self.fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"dom-4", 0),
            lambda: self.fs.setattr(ino, size=MIB),
            lambda: self.fs.unlink(ROOT_INO, b"guest"),
            lambda: self.fs.unlink(IOMMU_INO, b"dom-0"),
            lambda: self.fs.unlink(IOMMU_INO, b"dom-1"),
            lambda: self.fs.unlink(IOMMU_INO, ROOT_PGTABLES),
        ):
            try:
                self.run(change)
            except PkernfsError as e:
                one_line(e)
        assert time.monotonic() - began < BOUND_SECONDS


def one_line(error: PkernfsError) -> str:
    """What it says, on one line.

    :raises AssertionError: on several.
    """
    assert "\n" not in str(error)
    return str(error)


@pytest.fixture
def host() -> Iterator[Damaged]:
    made = Damaged()
    yield made
    made.close()


def pinned(host: Damaged, name: bytes) -> bool:
    ino = host.fs.find(ROOT_INO, name)
    try:
        host.fs.fallocate(ino, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 3 * MIB, PAGE)
    except BusyError:
        return True
    return False


# ---------------------------------------------------------------------- a domain


def outside(h: Damaged) -> None:
    at = h.table(b"dom-0", 0, 0)
    h.region.store_u64(at, h.word(at) | 1 << 50)


def cycle(h: Damaged) -> None:
    at = h.table(b"dom-0", 0, 0)
    h.region.store_u64(at, h.word(h.at_name[b"dom-0"]))


def to_the_top(h: Damaged) -> None:
    h.region.store_u64(h.table(b"dom-0", 0, 0, 0), PHYS_BASE + h.at_name[b"dom-0"] | 3)


def reserved(h: Damaged) -> None:
    at = h.table(b"dom-0", 0, 0, 0, 7)
    h.region.store_u64(at, h.word(at) | 1 << 62)


def other_file(h: Damaged) -> None:
    h.region.store_u64(h.table(b"dom-0", 0, 0), PHYS_BASE + h.at_name[b"dom-1"] | 3)


DAMAGED_DOMAIN = [outside, cycle, to_the_top, reserved, other_file]


@pytest.fixture
def mapped(mapped_either: Host) -> Host:
    """guest is in the region, or a segment."""
    return mapped_either


@pytest.mark.parametrize("damage", DAMAGED_DOMAIN)
@pytest.mark.parametrize("phys_base", [PHYS_BASE, None])
def test_a_damaged_domain(
    host: Damaged,
    damage: Callable[[Damaged], None],
    phys_base: PhysAddr | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    host.stop()
    damage(host)
    raw = host.region.read(host.at_name[b"dom-0"], 2 * MIB)
    host.start(phys_base)
    assert any("iommu/dom-0: dom" in r.getMessage() for r in caplog.records)
    assert list(host.tables.domains) == [1]
    said = host.ask_everything()
    assert "iommu/dom-0: damaged: " in said[0]
    _text, whole, status = host.answer("export")
    assert (list(whole["damaged"]), status) == (["dom-0"], 1)
    _text, whole, status = host.answer("export", domain=1)
    assert (whole["damaged"], status) == ({}, 0)
    report = host.check()
    assert report.found
    assert all("dom-0" in f.message for f in report.findings)
    ino = host.fs.find(ROOT_INO, b"other")
    operations: list[Callable[[], object]] = [
        lambda: host.map(0, Iova(8 * GIB), ino),
        lambda: host.tables.unmap(0, Iova(GIB), PAGE),
        lambda: host.attach(0, SourceId(0x99)),
    ]
    for operation in operations:
        with pytest.raises(TableDamageError, match="iommu/dom-0: damaged"):
            operation()
    # What can be reached is pinned, its tables are not touched, and the rest works.
    assert pinned(host, b"guest")
    assert pinned(host, b"other")
    host.map(1, Iova(GIB), ino)
    with pytest.raises(BusyError):
        host.fs.unlink(IOMMU_INO, b"dom-0")
    assert host.region.read(host.at_name[b"dom-0"], 2 * MIB) == raw
    # The way out: detach, remove, make it again.
    host.tables.detach(DEVICE)
    host.fs.unlink(IOMMU_INO, b"dom-0")
    host.fs.unlink(ROOT_INO, b"guest")
    host.dom(0)
    host.map(0, Iova(0), ino)
    host.assert_check_clean()


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_what_is_behind_cycles_is_pinned(levels: int) -> None:
    """However often a walk comes back to the top before it, and in little time."""
    host = Damaged(levels=levels)
    host.stop()
    top = host.at_name[b"dom-0"]
    good = host.word(RegionOff(top + 8 * (levels == 3)))
    for index in range(512):
        host.region.store_u64(RegionOff(top + 8 * index), PHYS_BASE + top | 3)
    host.region.store_u64(RegionOff(top + 8 * 511), good)
    began = time.monotonic()
    host.start()
    assert pinned(host, b"guest")
    assert list(host.tables.domains) == [1]
    host.ask_everything()
    host.use_everything()
    assert time.monotonic() - began < BOUND_SECONDS
    host.close()


def test_a_domain_with_a_hole(host: Damaged) -> None:
    """A table file lacks memory: its inode is damaged, or says more than it has."""
    ino = host.fs.find(IOMMU_INO, b"dom-0")
    inode = host.fs.inode(ino)
    with host.fs.store:
        host.fs.super.inodes.touch(inode)
        inode.size += 2 * MIB
        host.fs.super.inodes.save(inode)
    host.stop()
    host.start()
    said = host.ask_everything()
    assert "a table file with holes" in said[0]
    assert pinned(host, b"guest")  # by the tables that are there
    with pytest.raises(TableDamageError):
        host.map(0, Iova(8 * GIB), host.fs.find(ROOT_INO, b"other"))
    host.use_everything()


# ---------------------------------------------------------------------- root-pgtables


def bad_root_entry(h: Damaged) -> None:
    h.region.store_u64(h.table(ROOT_PGTABLES, 0), h.word(h.table(ROOT_PGTABLES, 0)) | 4)


def bad_context_entry(h: Damaged) -> None:
    at = RegionOff(h.table(ROOT_PGTABLES, 0, 2 * DEVICE) + 8)
    h.region.store_u64(at, h.word(at) | 1 << 40)


def context_outside(h: Damaged) -> None:
    h.region.store_u64(h.table(ROOT_PGTABLES, 0), 1 << 51 | 1)


def context_is_root(h: Damaged) -> None:
    h.region.store_u64(h.table(ROOT_PGTABLES, 0), PHYS_BASE + h.at_name[ROOT_PGTABLES] | 1)


def bad_configuration(h: Damaged) -> None:
    at = RegionOff(h.at_name[ROOT_PGTABLES] + PAGE + 8)
    h.region.store_u64(at, h.word(at) ^ 1 << 24)


DAMAGED_ROOT = [
    bad_root_entry, bad_context_entry, context_outside, context_is_root, bad_configuration
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_ROOT)
def test_damaged_root_pgtables(host: Damaged, damage: Callable[[Damaged], None]) -> None:
    host.stop()
    damage(host)
    raw = host.region.read(host.at_name[ROOT_PGTABLES], 2 * MIB)
    host.start()
    said = host.ask_everything()
    assert "iommu/root-pgtables: damaged: " in said[0]
    _text, whole, status = host.answer("export", domain=1)  # who is attached is not known
    assert (list(whole["damaged"]), status) == (["root-pgtables"], 1)
    assert host.check().found
    operations: list[Callable[[], object]] = [
        lambda: host.attach(1, SourceId(0x99)),
        lambda: host.tables.detach(DEVICE),
        lambda: host.map(1, Iova(GIB), host.fs.find(ROOT_INO, b"other")),
        lambda: host.tables.create_root(),
    ]
    for operation in operations:
        with pytest.raises(TableDamageError, match="root-pgtables: damaged"):
            operation()
    assert pinned(host, b"guest")
    for name in host.tables.names:  # who is attached is not known
        with pytest.raises(BusyError, match="root-pgtables"):
            host.fs.unlink(IOMMU_INO, name)
    assert host.region.read(host.at_name[ROOT_PGTABLES], 2 * MIB) == raw


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_what_is_mapped_is_pinned_although_nothing_tells_the_levels(levels: int) -> None:
    host = Damaged(levels=levels)
    host.stop()
    bad_configuration(host)
    host.start()
    assert pinned(host, b"guest")
    assert pinned(host, b"other")
    host.ask_everything()
    host.use_everything()
    host.close()


def test_a_domain_of_which_a_context_entry_has_another_page(host: Damaged) -> None:
    """A unit would walk it from there on."""
    host.stop()
    at = host.table(ROOT_PGTABLES, 0, 2 * DEVICE)
    host.region.store_u64(at, host.word(at) + PAGE)
    host.start()
    assert [f.code.name for f in host.check().findings] == ["UNKNOWN_DOMAIN"]
    with pytest.raises(BusyError, match=r"00:05\.0 is attached"):
        host.fs.unlink(IOMMU_INO, b"dom-0")
    host.tables.detach(DEVICE)
    host.fs.unlink(IOMMU_INO, b"dom-0")


@pytest.mark.slow("65,000 context entries are checked")
def test_the_largest_directories_of_all_devices_are_one_page() -> None:
    """Each of 65,000 context entries refers to the same 32 pages: that ends, and soon."""
    host = Damaged(Mode.SCALABLE)
    host.stop()
    root = host.at_name[ROOT_PGTABLES]
    context = (PHYS_BASE + root + 2 * PAGE | 7 << 9 | 1).to_bytes(32, "little")
    for number in range(2, 512):
        at = RegionOff(root + number * PAGE)
        host.region.store_u64(RegionOff(root + 8 * (number - 2)), PHYS_BASE + at | 1)
        host.region.copy_in(at, context * 128)
    began = time.process_time()
    host.start()
    report = host.check()
    assert time.process_time() - began < 2 * BOUND_SECONDS
    assert 60_000 < report.found < 70_000
    host.close()


def hostile_config(home: PhysAddr, levels: int = 4) -> tuple[int, ...]:
    return config_words(Config(Mode.LEGACY, levels, home))


@pytest.mark.parametrize(
    "home", [1, 123, PAGE, (1 << 64) - 1, (1 << 64) - PAGE, 1 << 63, (1 << 52) - PAGE, 1 << 52]
)
@pytest.mark.parametrize("phys_base", [PHYS_BASE, None])
def test_a_home_that_cannot_be(host: Damaged, home: PhysAddr, phys_base: PhysAddr | None) -> None:
    """The checksum is right, and yet it is not trusted."""
    at = host.at_name[ROOT_PGTABLES] + PAGE
    host.stop()
    for i, word in enumerate(hostile_config(home)):
        host.region.store_u64(RegionOff(at + 8 * i), word)
    host.start(phys_base)
    for line in host.ask_everything():
        assert "made for" in line or "no physical addresses" in line
    fsck.check(host.region, repair=False)
    host.use_everything()


_BAR = Struct("<IHBBQQQ")


@pytest.mark.parametrize(
    ("start", "length"),
    [((1 << 64) - PAGE, PAGE), (0, (1 << 64) - PAGE), (1 << 51, 1 << 52), (PAGE, 0), (5, PAGE)],
)
def test_a_bar_that_cannot_be(host: Damaged, start: int, length: int) -> None:
    at = RegionOff(host.at_name[ROOT_PGTABLES] + PAGE + 64)
    data = bytearray(_BAR.pack(0, 0x30, 0, 1, start, length, 0))
    data[:4] = crc32c(data).to_bytes(4, "little")
    host.stop()
    host.region.copy_in(at, bytes(data))
    host.start()
    assert host.tables.bars() == []
    host.ask_everything()
    report = host.check()
    assert {f.code.name for f in report.findings} == {"LEAF_OUTSIDE"}
    fsck.check(host.region, repair=False)
    host.use_everything()


# ---------------------------------------------------------------------- anything


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("seed", range(12))
def test_scribbled(mode: Mode, seed: int) -> None:
    """Random words, plausible and not, all over the tables: all ends, and nothing is damaged more.

    What a pinned file has is still there as long as its domain is.
    """
    rng = random.Random(seed)
    host = Damaged(mode, rng.choice((3, 4, 5)))
    host.stop()
    pages = [(name, at) for name, at in host.at_name.items() for _ in range(4)]
    for _ in range(rng.choice((1, 3, 30, 1000))):
        name, start = rng.choice(pages)
        at = RegionOff(start + rng.randrange(8) * PAGE + rng.randrange(512) * 8)
        old = host.word(at)
        other = rng.choice(list(host.at_name.values())) + rng.randrange(8) * PAGE
        word = rng.choice(
            [
                old ^ 1 << rng.randrange(64),
                rng.getrandbits(64),
                PHYS_BASE + other | rng.choice((1, 3, 0x83)),
                (old & ~((1 << 52) - PAGE)) | PHYS_BASE + other,
                (1 << 64) - 1,
                0,
            ]
        )
        host.region.store_u64(at, word)
        del name
    for phys_base in (PHYS_BASE, None):
        host.start(phys_base)
        host.ask_everything()
        before = host.region.read(host.at_name[ROOT_PGTABLES], 2 * MIB)
        began = time.monotonic()
        fsck.check(host.region, repair=False)
        assert time.monotonic() - began < BOUND_SECONDS
        assert host.region.read(host.at_name[ROOT_PGTABLES], 2 * MIB) == before
        host.stop()
    host.start()
    host.use_everything()
    with suppress(PkernfsError):
        host.remount()
    assert not host.fs.read_only
    host.close()
