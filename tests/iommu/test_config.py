"""The configuration page: what it says, and what is believed of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkernfs.errors import BusyError, InvalidError, NoSpaceError, TableDamageError
from pkernfs.host.bars import Bar
from pkernfs.iommu.config import (
    CONFIG_BYTES,
    Config,
    assume_addresses,
    config_offset,
    config_page,
    config_words,
    configure,
    forget_bar,
    load_bars,
    load_config,
    load_non_persistent,
    parse_config,
    record_bar,
    set_non_persistent,
)
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory, store_words
from pkernfs.iommu.page_walk import Code
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, RegionOff, RegionRun, SourceId, Word
from pkernfs.region.region import Region
from support.page_tables import MIB, PHYS_BASE
from support.table_host import ROOT, TableHost, codes


def test_zeros_are_a_legacy_table_of_4_levels() -> None:
    region = Region.anonymous(2 * MIB, phys_base=PHYS_BASE)
    root = RootTables(Memory(region, [RegionRun(RegionOff(0), 2 * MIB)]), store_words(region))
    assert root.config == Config(Mode.LEGACY, 4)
    with pytest.raises(InvalidError):
        configure(root.memory, store_words(region), Config(Mode.LEGACY, 2))


def test_a_damaged_configuration(host: TableHost) -> None:
    at = RegionOff(ROOT + PAGE + 8)
    host.store(at, host.word(at) ^ 1 << 20)
    assert Code.CONFIGURATION in codes(host.check())
    with pytest.raises(TableDamageError, match="configuration"):
        RootTables(host.root, host.commit)


# ---------------------------------------------------------------------- the configuration


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Region.anonymous(2 * MIB, phys_base=PHYS_BASE) as region:
        yield Memory(region, [RegionRun(RegionOff(MIB), 4 * PAGE)])


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("levels", [3, 4, 5])
def test_what_is_stored_comes_back(memory: Memory, mode: Mode, levels: int) -> None:
    stored = configure(memory, store_words(memory.region), Config(mode, levels))
    assert stored == Config(mode, levels, config_page(memory))
    assert load_config(memory) == stored
    assert config_offset(memory) == MIB + PAGE
    assert config_page(memory) == PHYS_BASE + MIB + PAGE


def test_the_words_of_the_page() -> None:
    """Magic, version, mode, levels, checksum, address (docs/iommu.md)."""
    data = b"".join(
        w.to_bytes(8, "little") for w in config_words(Config(Mode.SCALABLE, 5, PhysAddr(0x1000)))
    )
    assert len(data) == CONFIG_BYTES
    assert data[:12] == b"pkiommu\0" + bytes([1, 0, 1, 5])
    assert data[16:] == (0x1000).to_bytes(8, "little")


@pytest.mark.parametrize("bit", range(8 * CONFIG_BYTES))
def test_no_changed_bit_is_believed(bit: int) -> None:
    words = config_words(Config(Mode.LEGACY, 4, PhysAddr(0x1000)))
    data = bytearray(b"".join(w.to_bytes(8, "little") for w in words))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TableDamageError, match="root-pgtables configuration"):
        parse_config(bytes(data))


def test_tables_in_use_keep_their_configuration(memory: Memory) -> None:
    commit = store_words(memory.region)
    commit([Word(RegionOff(MIB), 1)])
    with pytest.raises(BusyError, match="in use"):
        configure(memory, commit, Config())


# ---------------------------------------------------------------------- addresses


def test_addresses_are_those_that_tables_were_made_with(memory: Memory) -> None:
    configure(memory, store_words(memory.region), Config())
    with Region.anonymous(2 * MIB) as copy:
        copy.copy_in(RegionOff(0), memory.region.view(RegionOff(0), 2 * MIB))
        assume_addresses(copy, RegionOff(MIB + PAGE))
        assert copy.physical(RegionOff(0)) == PHYS_BASE
    assume_addresses(memory.region, RegionOff(MIB))  # has addresses of its own: nothing is read
    assert memory.region.physical(RegionOff(0)) == PHYS_BASE


@pytest.mark.parametrize(
    "home", [0, MIB, MIB + PAGE, 1 << 63, (1 << 52) - PAGE, MIB + 2 * PAGE + 8]
)
def test_addresses_that_no_region_has_are_passed_by(home: PhysAddr) -> None:
    with Region.anonymous(2 * MIB) as region:
        words = config_words(Config(home=home))
        page = RegionOff(MIB + PAGE)
        store_words(region)([Word(RegionOff(page + 8 * i), w) for i, w in enumerate(words)])
        assume_addresses(region, page)
        assert region.physical(RegionOff(0)) is None


# ---------------------------------------------------------------------- BARs


def test_bars_come_and_go(memory: Memory) -> None:
    commit = store_words(memory.region)
    bars = [Bar(SourceId(0x28), n, PhysAddr((n + 1) << 32), 4 * PAGE) for n in range(3)]
    for bar in (*bars, bars[0]):
        record_bar(memory, commit, bar)
    assert load_bars(memory) == bars
    forget_bar(memory, commit, bars[1])
    forget_bar(memory, commit, bars[1])
    assert load_bars(memory) == [bars[0], bars[2]]
    record_bar(memory, commit, bars[1])  # in the slot that is free
    assert load_bars(memory) == bars


def test_bars_have_an_end(memory: Memory) -> None:
    commit = store_words(memory.region)
    for number in range((PAGE // 2 - 64) // 32):
        record_bar(memory, commit, Bar(SourceId(number), 0, PhysAddr(PAGE), PAGE))
    with pytest.raises(NoSpaceError, match=r"BAR 5 of 0000:00:00.0: 62 BARs are mapped already"):
        record_bar(memory, commit, Bar(SourceId(0), 5, PhysAddr(PAGE), PAGE))


def test_damaged_and_impossible_bars_are_passed_by(memory: Memory) -> None:
    commit = store_words(memory.region)
    good = Bar(SourceId(1), 0, PhysAddr(PAGE), PAGE)
    record_bar(memory, commit, good)
    for start, length in ((PAGE, 0), (PAGE + 8, PAGE), (PAGE, 8), ((1 << 52) - PAGE, 2 * PAGE)):
        record_bar(memory, commit, Bar(SourceId(2), 0, PhysAddr(start), length))
    assert load_bars(memory) == [good]
    at = RegionOff(config_offset(memory) + 64 + 8)
    commit([Word(at, memory.region.view(at, 8).cast("Q")[0] ^ 1 << 20)])
    assert load_bars(memory) == []


# ---------------------------------------------------------------------- persist off


def test_devices_that_are_switched_off(memory: Memory) -> None:
    commit = store_words(memory.region)
    for source_id in (7, 0xFFFF, 7):
        set_non_persistent(memory, commit, SourceId(source_id), True)
    assert load_non_persistent(memory) == {7, 0xFFFF}
    set_non_persistent(memory, commit, SourceId(9), False)
    set_non_persistent(memory, commit, SourceId(7), False)
    assert load_non_persistent(memory) == {0xFFFF}
    at = RegionOff(config_offset(memory) + PAGE // 2 + 8)
    commit([Word(at, memory.region.view(at, 8).cast("Q")[0] ^ 1)])  # another device, by accident
    assert load_non_persistent(memory) == set()


def test_devices_that_are_switched_off_have_an_end(memory: Memory) -> None:
    commit = store_words(memory.region)
    for source_id in range(256):
        set_non_persistent(memory, commit, SourceId(source_id), True)
    with pytest.raises(NoSpaceError, match="256 devices are switched off already"):
        set_non_persistent(memory, commit, SourceId(256), True)
    assert load_non_persistent(memory) == set(range(256))
