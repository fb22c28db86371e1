"""The configuration page: the second page of root-pgtables, which no hardware reads.

It has the tables' mode and levels, and the address at which they were made. It has the device BARs
that they may map, and the devices whose entries a handover clears (docs/iommu.md). All zero stands
for legacy mode and 4 levels.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from pkernfs.errors import BusyError, InvalidError, NoSpaceError, TableDamageError
from pkernfs.host.bars import Bar
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Commit, Memory
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, RegionOff, SourceId, Word
from pkernfs.region.checksum import crc32c
from pkernfs.region.region import Region
from pkernfs.vtd.entries import LEVELS, MAX_PHYSICAL_BITS

CONFIG_BYTES = 24
_CONFIG = Struct("<8sHBBIQ")
_MAGIC = b"pkiommu\0"
_VERSION = 1
_CRC_AT = 12
_BAR = Struct("<IHBBQQQ")  # checksum, source id, number, valid, start, length, zero
_BARS_AT = 64
_TRANSIENT_AT = PAGE // 2
_MAX_BARS = (_TRANSIENT_AT - _BARS_AT) // _BAR.size
_TRANSIENT = Struct("<HHI")  # source id, valid, checksum
_MAX_TRANSIENT = (PAGE - _TRANSIENT_AT) // _TRANSIENT.size
_VALID = 1


class Config(NamedTuple):
    """The mode and levels of a region's tables, which the creation of root-pgtables decides.

    ``home`` is the physical address that the configuration page had when it was stored; 0: not
    known. Tables are good at that place only.
    """

    mode: Mode = Mode.LEGACY
    levels: int = 4
    home: PhysAddr = PhysAddr(0)


def config_words(config: Config) -> tuple[int, ...]:
    """The three words that say so, lowest first.

    :raises InvalidError: no such number of levels.
    """
    if config.levels not in LEVELS:
        raise InvalidError(f"page tables: bad number of levels: got {config.levels}, expected 3..5")
    data = bytearray(_CONFIG.pack(_MAGIC, _VERSION, config.mode, config.levels, 0, config.home))
    data[_CRC_AT : _CRC_AT + 4] = crc32c(data).to_bytes(4, "little")
    return tuple(memoryview(data).cast("Q"))


def load_config(memory: Memory) -> Config:
    """Read what root-pgtables says.

    :raises TableDamageError: it is damaged, or of another version.
    """
    return parse_config(memory.region.read(config_offset(memory), _CONFIG.size))


def parse_config(data: bytes) -> Config:
    """Decode the first 24 bytes of the configuration page.

    :raises TableDamageError: they are damaged, or of another version.
    """
    if not any(data):
        return Config()
    magic, version, mode, levels, crc, home = _CONFIG.unpack(data)
    where = "root-pgtables configuration"
    if magic != _MAGIC or crc != crc32c(data[:_CRC_AT] + bytes(4) + data[_CRC_AT + 4 :]):
        raise TableDamageError(f"{where}: bad magic or checksum: got {data.hex()}")
    if version != _VERSION or mode not in list(Mode) or levels not in LEVELS:
        raise TableDamageError(f"{where}: unknown: got version {version}, mode {mode}")
    return Config(Mode(mode), levels, home)


def assume_addresses(region: Region, at: RegionOff) -> None:
    """Give a region without addresses of its own those that its tables were made with.

    :param at: region offset of the configuration page. What it says is not trusted: an address that
        no region can have is passed by.
    :raises CorruptionError: the configuration is damaged.
    """
    if region.physical(RegionOff(0)) is not None:
        return
    base = base_of(region, parse_config(region.read(at, CONFIG_BYTES)).home, at)
    if base is not None:
        region.assume_physical(base)


def base_of(region: Region, home: PhysAddr, at: RegionOff) -> PhysAddr | None:
    """The address of the region's first byte if offset ``at`` is at ``home``; None: none can be."""
    base = home - at
    if base > 0 and not base % PAGE and base + region.size <= 1 << MAX_PHYSICAL_BITS:
        return PhysAddr(base)
    return None


def configure(memory: Memory, commit: Commit, config: Config) -> Config:
    """Decide mode and levels; the home is where the page is now. Returns all that.

    :raises BusyError: the root table has entries.
    """
    if not memory.region.is_zero(memory.need_offset(memory.first_page), PAGE):
        raise BusyError("root-pgtables: in use: mode and levels cannot change")
    config = config._replace(home=config_page(memory))
    at = config_offset(memory)
    words = config_words(config)
    commit([Word(RegionOff(at + 8 * i), words[i]) for i in (2, 1, 0)])
    return config


def load_bars(memory: Memory) -> list[Bar]:
    """The BARs that are recorded; slots that are damaged are passed by."""
    return [bar for bar in _slots(memory) if bar is not None]


def record_bar(memory: Memory, commit: Commit, bar: Bar) -> None:
    """Record a BAR, before anything of it is mapped.

    :raises NoSpaceError: too many are recorded.
    """
    slots = _slots(memory)
    if bar in slots:
        return
    if None not in slots:
        raise NoSpaceError(f"{bar.name}: {_MAX_BARS} BARs are mapped already")
    data = bytearray(_BAR.pack(0, bar.source_id, bar.number, _VALID, bar.start, bar.length, 0))
    data[:4] = crc32c(data).to_bytes(4, "little")
    _store_slot(memory, commit, slots.index(None), tuple(memoryview(data).cast("Q")))


def forget_bar(memory: Memory, commit: Commit, bar: Bar) -> None:
    """The record goes; nothing of the BAR is mapped any more."""
    slots = _slots(memory)
    if bar in slots:
        _store_slot(memory, commit, slots.index(bar), (0, 0, 0, 0))


def load_non_persistent(memory: Memory) -> set[SourceId]:
    """Source ids of the devices whose entries a handover clears; damaged slots are passed by."""
    return {source_id for source_id in _non_persistent_slots(memory) if source_id is not None}


def set_non_persistent(memory: Memory, commit: Commit, source_id: SourceId, on: bool) -> None:
    """Have a handover clear a device's entries, or keep them, which is how it is without this.

    :raises NoSpaceError: it is set for too many devices.
    """
    slots = _non_persistent_slots(memory)
    if (source_id in slots) == on:
        return
    if on and None not in slots:
        raise NoSpaceError(f"persist: {_MAX_TRANSIENT} devices are switched off already")
    slot = slots.index(None if on else source_id)
    word = int.from_bytes(_transient(source_id), "little") if on else 0
    at = config_offset(memory) + _TRANSIENT_AT + slot * _TRANSIENT.size
    commit([Word(RegionOff(at), word)])


def _transient(source_id: SourceId) -> bytes:
    return _TRANSIENT.pack(source_id, _VALID, crc32c(_TRANSIENT.pack(source_id, _VALID, 0)))


def _non_persistent_slots(memory: Memory) -> list[SourceId | None]:
    page = memory.region.read(config_offset(memory), PAGE)
    slots: list[SourceId | None] = []
    for at in range(_TRANSIENT_AT, _TRANSIENT_AT + _MAX_TRANSIENT * _TRANSIENT.size, 8):
        source_id = _TRANSIENT.unpack_from(page, at)[0]
        slots.append(source_id if page[at : at + 8] == _transient(source_id) else None)
    return slots


def _store_slot(memory: Memory, commit: Commit, slot: int, words: tuple[int, ...]) -> None:
    at = config_offset(memory) + _BARS_AT + slot * _BAR.size
    # The first word has the checksum: it is stored last.
    commit([Word(RegionOff(at + 8 * i), words[i]) for i in (3, 2, 1, 0)])


def _slots(memory: Memory) -> list[Bar | None]:
    page = memory.region.read(config_offset(memory), PAGE)
    slots: list[Bar | None] = []
    for at in range(_BARS_AT, _BARS_AT + _MAX_BARS * _BAR.size, _BAR.size):
        data = page[at : at + _BAR.size]
        crc, source_id, number, valid, start, length, _zero = _BAR.unpack(data)
        bar = Bar(source_id, number, start, length)
        good = valid == _VALID and crc == crc32c(bytes(4) + data[4:])
        slots.append(bar if good and _can_be(bar) else None)
    return slots


def _can_be(bar: Bar) -> bool:
    """Tell if a device can have such a BAR."""
    whole = bar.length > 0 and not (bar.start | bar.length) % PAGE
    return whole and bar.start + bar.length <= 1 << MAX_PHYSICAL_BITS


def config_page(memory: Memory) -> PhysAddr:
    """Physical address of the file's second page."""
    return memory.page(1)


def config_offset(memory: Memory) -> RegionOff:
    """Region offset of that page."""
    return memory.need_offset(config_page(memory))
