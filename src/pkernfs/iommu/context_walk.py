"""Reading root, context and PASID tables: which device leads to which page tables.

Trusts nothing that it reads: every table is looked at once, and what is wrong is told to the
caller, who may go on.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from pkernfs.iommu.memory import Words
from pkernfs.iommu.page_walk import Code, Finding
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, SourceId
from pkernfs.vtd.entries import (
    LEVELS,
    MAX_PHYSICAL_BITS,
    PGTT_FIRST_STAGE,
    PGTT_NESTED,
    PGTT_PASS_THROUGH,
    PGTT_SECOND_STAGE,
    TT_PASS_THROUGH,
    ContextEntry,
    Entry,
    PasidDirectoryEntry,
    PasidTableEntry,
    RootEntry,
    ScalableContextEntry,
    ScalableRootEntry,
    bdf_text,
    levels_of,
)

BUSES = 256
PASIDS_PER_TABLE = 64
#: What pkernfs makes, and what a kernel may make.
SUPPORTED_PGTT = (PGTT_SECOND_STAGE, PGTT_PASS_THROUGH)
KNOWN_PGTT = (PGTT_FIRST_STAGE, PGTT_SECOND_STAGE, PGTT_NESTED, PGTT_PASS_THROUGH)
Note = Callable[[Finding], object]
_NO_TABLE = PhysAddr(0)


class Mode(enum.IntEnum):
    """Translation table mode of the unit (RTADDR_REG.TTM)."""

    LEGACY = 0
    SCALABLE = 1


class Device(NamedTuple):
    """A present context entry (scalable mode: PASID table entry), and what leads to it.

    Words are as in memory, the lowest first. ``pasid`` is None in legacy mode. ``table`` is 0 if
    requests pass through untranslated, and the first-stage one where there is one.
    """

    source_id: SourceId
    pasid: int | None
    root_words: tuple[int, ...]
    context_words: tuple[int, ...]
    pasid_words: tuple[int, ...]
    table: PhysAddr
    levels: int
    domain_id: int
    where: PhysAddr

    @property
    def kind(self) -> int:
        """PGTT of the PASID table entry, or what it would be for the context entry."""
        if self.pasid_words:
            return PasidTableEntry.PGTT.get(self.pasid_words[0])
        through = ContextEntry.TT.get(self.context_words[0]) == TT_PASS_THROUGH
        return PGTT_PASS_THROUGH if through else PGTT_SECOND_STAGE


def join(words: tuple[int, ...]) -> int:
    """An entry of several 8-byte words, as one int."""
    return sum(word << 64 * i for i, word in enumerate(words))


class ContextReader:
    """Walks what a root table leads to, down to the page tables, which it leaves alone.

    ``pages`` are the physical addresses of the tables that have been seen.

    :param kinds: PGTT of the PASID table entries that are expected.
    :param place: what the tables are expected to be in, for messages.
    """

    def __init__(
        self,
        memory: Words,
        root: PhysAddr,
        mode: Mode,
        note: Note,
        physical_bits: int = MAX_PHYSICAL_BITS,
        *,
        kinds: Collection[int] = SUPPORTED_PGTT,
        place: str = "root-pgtables",
    ) -> None:
        self.pages: set[PhysAddr] = set()
        self._memory = memory
        self._root = root
        self._mode = mode
        self._note = note
        self._physical_bits = physical_bits
        self._kinds = kinds
        self._place = place

    def devices(self) -> Iterator[Device]:
        """Every present entry, by source id and PASID."""
        words = self._table(self._root, "root table", self._root)
        kind = RootEntry if self._mode is Mode.LEGACY else ScalableRootEntry
        for bus in range(BUSES if words else 0):
            pair = words[2 * bus : 2 * bus + 2]
            if not any(pair):
                continue
            where = PhysAddr(self._root + 16 * bus)
            if pair[0] & 1 or (pair[1] & 1 and kind is ScalableRootEntry):
                self._check(kind, join(pair), where)
            if kind is RootEntry:
                if pair[0] & 1:
                    yield from self._legacy(bus, pair, where)
                continue
            for half in (0, 1):
                if pair[half] & 1:
                    yield from self._scalable(bus, half, pair, PhysAddr(where + 8 * half))

    def _legacy(self, bus: int, root: tuple[int, ...], where: PhysAddr) -> Iterator[Device]:
        table = RootEntry.CTP.get(root[0])
        words = self._table(table, f"root entry of bus {bus:#x}", where)
        for at in range(0, len(words), 2):
            if not words[at] & 1:
                continue
            pair = words[at : at + 2]
            entry = join(pair)
            here = PhysAddr(table + 8 * at)
            source_id = SourceId(bus << 8 | at // 2)
            self._check(ContextEntry, entry, here)
            levels = levels_of(ContextEntry.AW.get(entry))
            kind = ContextEntry.TT.get(entry)
            through = kind == TT_PASS_THROUGH
            if kind > TT_PASS_THROUGH or levels not in LEVELS:
                self._invalid("context entry", source_id, here, entry)
                continue
            pointer = _NO_TABLE if through else ContextEntry.SSPTPTR.get(entry)
            did = ContextEntry.DID.get(entry)
            yield Device(source_id, None, root, pair, (), pointer, levels, did, here)

    def _scalable(
        self, bus: int, half: int, root: tuple[int, ...], where: PhysAddr
    ) -> Iterator[Device]:
        table = RootEntry.CTP.get(root[half])
        words = self._table(table, f"root entry of bus {bus:#x}", where)
        for at in range(0, len(words), 4):
            if not words[at] & 1:
                continue
            entry = words[at : at + 4]
            here = PhysAddr(table + 8 * at)
            self._check(ScalableContextEntry, join(entry), here)
            source_id = SourceId(bus << 8 | half << 7 | at // 4)
            yield from self._directory(source_id, root, entry, here)

    def _directory(
        self, source_id: SourceId, root: tuple[int, ...], context: tuple[int, ...], where: PhysAddr
    ) -> Iterator[Device]:
        value = join(context)
        start = ScalableContextEntry.PASIDDIRPTR.get(value)
        count = 1 << ScalableContextEntry.PDTS.get(value) + 7
        what = f"context entry of {bdf_text(source_id)}"
        told = False  # of one page of the directory: they are up to 32, for each device
        for first in range(0, count, PAGE // 8):
            at = PhysAddr(start + 8 * first)
            words = self._table(at, what, where, silent=told)
            told = told or not words
            for slot, word in enumerate(words[:count]):
                if not word & 1:
                    continue
                here = PhysAddr(at + 8 * slot)
                self._check(PasidDirectoryEntry, word, here)
                pasid = (first + slot) * PASIDS_PER_TABLE
                table = PasidDirectoryEntry.SMPTBLPTR.get(word)
                yield from self._pasids(source_id, pasid, root, context, table, here)

    def _pasids(
        self,
        source_id: SourceId,
        pasid: int,
        root: tuple[int, ...],
        context: tuple[int, ...],
        table: PhysAddr,
        where: PhysAddr,
    ) -> Iterator[Device]:
        words = self._table(table, f"PASID directory entry of {bdf_text(source_id)}", where)
        for at in range(0, len(words), 8):
            if not words[at] & 1:
                continue
            entry = words[at : at + 8]
            value = join(entry)
            here = PhysAddr(table + 8 * at)
            self._check(PasidTableEntry, value, here)
            kind = PasidTableEntry.PGTT.get(value)
            levels = levels_of(PasidTableEntry.AW.get(value))
            wide = kind == PGTT_FIRST_STAGE or levels in LEVELS
            if kind not in self._kinds or not wide:
                self._invalid("PASID table entry", source_id, here, value)
                continue
            pointer = _pointer(kind, value)
            did = PasidTableEntry.DID.get(value)
            number = pasid + at // 8
            yield Device(source_id, number, root, context, entry, pointer, levels, did, here)

    def _table(
        self, address: PhysAddr, what: str, where: PhysAddr, *, silent: bool = False
    ) -> tuple[int, ...]:
        """The words of a table page, unless it is elsewhere or was seen before."""
        if address in self.pages:
            if not silent:
                self._found(Code.TABLE_TWICE, where, f"{what}: table reached before", address)
            return ()
        words = self._memory.words(address, PAGE // 8) if address % PAGE == 0 else None
        if words is None:
            if not silent:
                reason = f"{what}: table outside {self._place}"
                self._found(Code.TABLE_OUTSIDE, where, reason, address)
            return ()
        self.pages.add(address)
        return words

    def _check(self, kind: type[Entry], entry: int, where: PhysAddr) -> None:
        if entry & kind.reserved(self._physical_bits):
            self._found(Code.RESERVED_BITS, where, f"{kind.NAME}: reserved bits set", entry)

    def _invalid(self, what: str, source_id: SourceId, where: PhysAddr, entry: int) -> None:
        message = f"{what} of {bdf_text(source_id)}: bad type or width"
        self._found(Code.CONTEXT_INVALID, where, message, entry)

    def _found(self, code: Code, where: PhysAddr, message: str, got: int) -> None:
        what, _, reason = message.rpartition(": ")
        self._note(Finding(code, where, f"{what} at {where:#x}: {reason}: got {got:#x}"))


def _pointer(kind: int, entry: int) -> PhysAddr:
    """The page tables that a PASID table entry refers to first; 0: none."""
    if kind == PGTT_PASS_THROUGH:
        return _NO_TABLE
    if kind == PGTT_SECOND_STAGE:
        return PasidTableEntry.SSPTPTR.get(entry)
    return PasidTableEntry.FSPTPTR.get(entry)
