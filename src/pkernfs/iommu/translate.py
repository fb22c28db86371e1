"""One translation, step by step as the hardware walks; a fault has the reason it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from pkernfs.errors import InvalidError
from pkernfs.iommu.context_walk import Mode, join
from pkernfs.iommu.memory import Words
from pkernfs.quantities import Iova, PhysAddr, SourceId
from pkernfs.vtd.entries import (
    ADDRESS_MASK,
    ENTRIES,
    INTERRUPT_FIRST,
    INTERRUPT_LAST,
    LEVELS,
    MAX_PASID,
    MAX_PHYSICAL_BITS,
    PGTT_PASS_THROUGH,
    PGTT_SECOND_STAGE,
    READ,
    READ_WRITE,
    TT_PASS_THROUGH,
    WRITE,
    ContextEntry,
    Entry,
    FaultReason,
    PasidDirectoryEntry,
    PasidTableEntry,
    RootEntry,
    ScalableContextEntry,
    ScalableRootEntry,
    check_source_id,
    is_leaf,
    leaf_bytes,
    levels_of,
    second_stage_format,
    width_bits,
)

LEVEL_NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPE", 2: "PDE", 1: "PTE"}


class WalkStep(NamedTuple):
    """An entry that was read: what it is, its physical address, its words (lowest first)."""

    name: str
    address: PhysAddr
    words: tuple[int, ...]


@dataclass
class Translation:
    """The end of a request: at ``physical`` with permissions ``perm``, or with ``fault``.

    ``interrupt``: a write to that address is an interrupt, which no table translates.
    """

    iova: Iova
    steps: list[WalkStep] = field(default_factory=list)
    physical: PhysAddr | None = None
    perm: int = 0
    level: int = 0
    domain_id: int | None = None
    fault: FaultReason | None = None
    interrupt: bool = False


class _Fault(Exception):
    def __init__(self, reason: FaultReason) -> None:
        super().__init__(reason)
        self.reason = reason


_Reasons = FaultReason


class _Kind(NamedTuple):
    """A kind of entry above the page tables, and the fault for each way in which one can fail."""

    name: str
    words: int
    format: type[Entry]
    unreadable: FaultReason
    absent: FaultReason
    reserved: FaultReason


_ROOT = _Kind(
    "root entry", 2, RootEntry,
    _Reasons.ROOT_TABLE_INV, _Reasons.ROOT_ENTRY_P, _Reasons.ROOT_ENTRY_RSVD,
)  # fmt: skip
_CONTEXT = _Kind(
    "context entry", 2, ContextEntry,
    _Reasons.CONTEXT_TABLE_INV, _Reasons.CONTEXT_ENTRY_P, _Reasons.CONTEXT_ENTRY_RSVD,
)  # fmt: skip
_SM_ROOT = _Kind(
    "root entry", 2, ScalableRootEntry,
    _Reasons.SM_ROOT_TABLE_INV, _Reasons.SM_ROOT_ENTRY_P, _Reasons.SM_ROOT_ENTRY_RSVD,
)  # fmt: skip
_SM_CONTEXT = _Kind(
    "context entry", 4, ScalableContextEntry,
    _Reasons.SM_CONTEXT_TABLE_INV, _Reasons.SM_CONTEXT_ENTRY_P, _Reasons.SM_CONTEXT_ENTRY_RSVD,
)  # fmt: skip
_SM_DIRECTORY = _Kind(
    "PASID directory entry", 1, PasidDirectoryEntry,
    _Reasons.SM_PASID_DIR_ACCESS, _Reasons.SM_PASID_DIR_ENTRY_P, _Reasons.SM_PASID_DIR_ENTRY_RSVD,
)  # fmt: skip
_SM_PASID = _Kind(
    "PASID table entry", 8, PasidTableEntry,
    _Reasons.SM_PASID_TABLE_ACCESS, _Reasons.SM_PASID_ENTRY_P, _Reasons.SM_PASID_ENTRY_RSVD,
)  # fmt: skip


def translate(
    memory: Words,
    root: PhysAddr,
    source_id: SourceId,
    iova: Iova,
    *,
    mode: Mode = Mode.LEGACY,
    pasid: int | None = None,
    access: int = 0,
    physical_bits: int = MAX_PHYSICAL_BITS,
) -> Translation:
    """Translate a request of a device, through the tables that ``root`` leads to.

    :param memory: where tables are; an entry outside it cannot be read, which is a fault.
    :param pasid: None: the request has none.
    :param access: READ or WRITE or both: what the request wants; 0: whatever is allowed.
    :raises InvalidError: no request can be like that.
    """
    check_source_id(source_id)
    if not 0 <= iova < 1 << 64:
        raise InvalidError(f"iova {iova:#x}: not an address of 64 bits")
    if pasid is not None and not 0 <= pasid <= MAX_PASID:
        raise InvalidError(f"PASID {pasid:#x}: not one: expected 0..{MAX_PASID:#x}")
    if access & ~READ_WRITE:
        raise InvalidError(f"access {access:#x}: expected r, w or rw")
    walk = _Walk(memory, iova, access, physical_bits)
    if pasid is None and INTERRUPT_FIRST <= iova <= INTERRUPT_LAST:
        walk.result.interrupt = True
        return walk.result
    first = walk.legacy if mode is Mode.LEGACY else walk.scalable
    return walk.end(lambda: first(root, source_id, pasid))


def translate_domain(
    memory: Words, table: PhysAddr, levels: int, iova: Iova, *, access: int = 0
) -> Translation:
    """As :func:`translate`, from a domain's top-level table on."""
    walk = _Walk(memory, iova, access, MAX_PHYSICAL_BITS)
    return walk.end(lambda: walk.second_stage(table, levels))


class _Walk:
    def __init__(self, memory: Words, iova: Iova, access: int, physical_bits: int) -> None:
        self.memory = memory
        self.result = Translation(iova)
        self.access = access
        self.physical_bits = physical_bits
        self.sm = False

    def end(self, first: Callable[[], None]) -> Translation:
        """Walk from ``first`` on, to memory or a fault."""
        try:
            first()
        except _Fault as fault:
            self.result.fault = fault.reason
        return self.result

    def read(
        self, name: str, address: PhysAddr, count: int, failed: FaultReason
    ) -> tuple[int, ...]:
        words = self.memory.words(address, count)
        if words is None:
            raise _Fault(failed)
        self.result.steps.append(WalkStep(name, address, words))
        return words

    def check(self, kind: type[Entry], entry: int, reason: FaultReason) -> None:
        if entry & kind.reserved(self.physical_bits):
            raise _Fault(reason)

    def entry(self, kind: _Kind, address: PhysAddr, half: int = 0) -> int:
        """Read the entry at ``address``, which has to be present and without reserved bits.

        :param half: the half of a root entry that is meant, in scalable mode.
        """
        words = self.read(kind.name, address, kind.words, kind.unreadable)
        entry = words[half] << 64 * half if kind is _SM_ROOT else join(words)
        if not words[half] & 1:
            raise _Fault(kind.absent)
        self.check(kind.format, entry, kind.reserved)
        return entry >> 64 * half

    # ------------------------------------------------------------------ to the page tables

    def legacy(self, root: PhysAddr, source_id: SourceId, pasid: int | None) -> None:
        if pasid is not None:
            raise _Fault(_Reasons.LEGACY_PASID)
        above = self.entry(_ROOT, PhysAddr(root + (source_id >> 8) * 16))
        entry = self.entry(_CONTEXT, PhysAddr(RootEntry.CTP.get(above) + (source_id & 0xFF) * 16))
        self.result.domain_id = ContextEntry.DID.get(entry)
        levels = levels_of(ContextEntry.AW.get(entry))
        kind = ContextEntry.TT.get(entry)
        if levels not in LEVELS or kind > TT_PASS_THROUGH:
            raise _Fault(_Reasons.CONTEXT_ENTRY_INV)
        if kind == TT_PASS_THROUGH:
            self.pass_through(_Reasons.ADDR_BEYOND_MGAW)
        else:
            self.second_stage(ContextEntry.SSPTPTR.get(entry), levels)

    def scalable(self, root: PhysAddr, source_id: SourceId, pasid: int | None) -> None:
        self.sm = True
        half = source_id >> 7 & 1
        above = self.entry(_SM_ROOT, PhysAddr(root + (source_id >> 8) * 16), half)
        at = PhysAddr(RootEntry.CTP.get(above) + (source_id & 0x7F) * 32)
        context = self.entry(_SM_CONTEXT, at)
        rid_pasid = ScalableContextEntry.RID_PASID.get(context)
        limit = 1 << ScalableContextEntry.PDTS.get(context) + 13
        dte, pre = ScalableContextEntry.DTE.get(context), ScalableContextEntry.PRE.get(context)
        if rid_pasid >= limit or (pre and not dte):
            raise _Fault(_Reasons.SM_CONTEXT_ENTRY_INV)
        if pasid is None:
            pasid = rid_pasid
        elif not ScalableContextEntry.PASIDE.get(context):
            raise _Fault(_Reasons.SM_PASID_DISABLED)
        elif pasid >= limit:
            raise _Fault(_Reasons.SM_PASID_TOO_LARGE)
        elif pasid == rid_pasid:
            raise _Fault(_Reasons.SM_PASID_IS_RID_PASID)
        self.pasid_entry(ScalableContextEntry.PASIDDIRPTR.get(context), pasid)

    def pasid_entry(self, directory: PhysAddr, pasid: int) -> None:
        above = self.entry(_SM_DIRECTORY, PhysAddr(directory + (pasid >> 6) * 8))
        at = PhysAddr(PasidDirectoryEntry.SMPTBLPTR.get(above) + (pasid & 63) * 64)
        entry = self.entry(_SM_PASID, at)
        self.result.domain_id = PasidTableEntry.DID.get(entry)
        levels = levels_of(PasidTableEntry.AW.get(entry))
        kind = PasidTableEntry.PGTT.get(entry)
        if kind == PGTT_PASS_THROUGH:
            self.pass_through(_Reasons.SM_ADDR_BEYOND_HAW)  # AW is ignored
        elif kind != PGTT_SECOND_STAGE or levels not in LEVELS:
            raise _Fault(_Reasons.SM_PASID_ENTRY_INV)
        else:
            self.second_stage(PasidTableEntry.SSPTPTR.get(entry), levels)

    # ------------------------------------------------------------------ the page tables

    def width(self, levels: int) -> None:
        if self.result.iova >> width_bits(levels):
            sm = self.sm
            raise _Fault(_Reasons.SM_ADDR_BEYOND_MGAW if sm else _Reasons.ADDR_BEYOND_MGAW)

    def pass_through(self, beyond: FaultReason) -> None:
        if self.result.iova >> self.physical_bits:
            raise _Fault(beyond)
        self.finish(PhysAddr(self.result.iova), READ_WRITE, 0)

    def second_stage(self, table: PhysAddr, levels: int) -> None:
        self.width(levels)
        iova = self.result.iova
        perm = READ_WRITE
        for level in range(levels, 0, -1):
            size = leaf_bytes(level)
            at = PhysAddr(table + iova // size % ENTRIES * 8)
            (entry,) = self.read(LEVEL_NAMES[level], at, 1, self.unreadable(level == levels))
            perm &= entry
            self.permit(perm)
            leaf = is_leaf(entry, level)
            self.check(
                second_stage_format(entry, level),
                entry,
                _Reasons.SM_PAGING_ENTRY_RSVD if self.sm else _Reasons.PAGING_ENTRY_RSVD,
            )
            if leaf:
                self.finish(PhysAddr((entry & ADDRESS_MASK) + iova % size), perm, level)
                return
            table = PhysAddr(entry & ADDRESS_MASK)

    def unreadable(self, top: bool) -> FaultReason:
        if self.sm:
            return _Reasons.SM_PAGING_ROOT_INV if top else _Reasons.SM_PAGING_ENTRY_INV
        return _Reasons.CONTEXT_ENTRY_INV if top else _Reasons.PAGING_ENTRY_INV

    def permit(self, perm: int) -> None:
        """:raises _Fault: the request wants more than ``perm``, or nothing is allowed."""
        if self.sm and not perm & READ_WRITE:
            raise _Fault(_Reasons.SM_PAGING_ENTRY_P)
        lacks = self.access & ~perm
        if lacks & WRITE:
            raise _Fault(_Reasons.SM_WRITE if self.sm else _Reasons.WRITE)
        if lacks & READ or not perm & READ_WRITE:
            raise _Fault(_Reasons.SM_READ if self.sm else _Reasons.READ)

    def finish(self, physical: PhysAddr, perm: int, level: int) -> None:
        if INTERRUPT_FIRST <= physical <= INTERRUPT_LAST:
            raise _Fault(_Reasons.SM_INTERRUPT_ADDR if self.sm else _Reasons.INTERRUPT_ADDR)
        self.result.physical = physical
        self.result.perm = perm & READ_WRITE
        self.result.level = level
