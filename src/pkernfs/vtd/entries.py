"""Entry formats of the VT-d tables, and the fault reasons: declarations and pure conversions.

Field names and sections are those of the VT-d specification, revision 5.10 (Intel D51397-018;
*second-stage*: older revisions say *second-level*). A field is ``(msb, lsb)``; a bit that no field
and no ``IGNORED`` range covers is reserved. Levels count from 1: a level 1 table holds 4 KiB
leaves. Nothing here reads or writes memory.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from pkernfs.errors import InvalidError, TableDamageError
from pkernfs.quantities import PhysAddr, SourceId

PAGE_SHIFT = 12
LEVEL_BITS = 9
ENTRIES = 1 << LEVEL_BITS
MAX_PHYSICAL_BITS = 52
LARGEST_LEAF_LEVEL = 3
LEVELS = (3, 4, 5)
MAX_SOURCE_ID = 0xFFFF
MAX_PASID = 0xFFFFF

READ = 1
WRITE = 2
READ_WRITE = READ | WRITE

#: Requests without PASID to these addresses are interrupts, or blocked, never translated (3.15).
#: Linux gives them to nobody either: IOAPIC_RANGE_START in intel_iommu_get_resv_regions().
INTERRUPT_FIRST = 0xFEE0_0000
INTERRUPT_LAST = 0xFEEF_FFFF


def in_interrupt_range(start: int, length: int) -> bool:
    """Tell whether some of ``length`` bytes from ``start`` on are in the interrupt range."""
    return start <= INTERRUPT_LAST and start + length > INTERRUPT_FIRST


@dataclass(frozen=True)
class Field:
    """Bits ``msb`` down to ``lsb``; an ``address`` keeps its place, its low bits are zero."""

    msb: int
    lsb: int
    address: bool = False

    @property
    def mask(self) -> int:
        """The field's bits in the entry."""
        return (2 << self.msb) - (1 << self.lsb)

    def get(self, entry: int) -> int:
        """The field's value in an entry."""
        value = (entry & self.mask) >> self.lsb
        return value << self.lsb % 64 if self.address else value

    def put(self, name: str, value: int) -> int:
        """The entry that has nothing but ``value`` in this field.

        :raises InvalidError: it does not fit, or is an address with low bits.
        """
        shift = self.lsb % 64 if self.address else 0
        if value < 0 or value & ((1 << shift) - 1) or value >> shift << self.lsb & ~self.mask:
            raise InvalidError(f"{name}: does not fit bits {self.msb}:{self.lsb}: got {value:#x}")
        return value >> shift << self.lsb


@dataclass(frozen=True)
class Pointer(Field):
    """A field that is the physical address of a table, or of other memory."""

    address: bool = True

    def get(self, entry: int) -> PhysAddr:
        """The address in an entry."""
        return PhysAddr(super().get(entry))


class Entry:
    """Base of the formats: a class is never instantiated, an entry is an int of ``BITS`` bits."""

    NAME: ClassVar[str] = ""
    SECTION: ClassVar[str] = ""
    BITS: ClassVar[int] = 64
    IGNORED: ClassVar[tuple[Field, ...]] = ()
    FIELDS: ClassVar[dict[str, Field]] = {}
    KNOWN: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        cls.FIELDS = {k: v for k, v in vars(cls).items() if isinstance(v, Field)}
        cls.KNOWN = 0
        for field in (*cls.FIELDS.values(), *cls.IGNORED):
            assert not cls.KNOWN & field.mask, f"{cls.__name__}: bits declared twice"
            cls.KNOWN |= field.mask

    @classmethod
    def encode(cls, **values: int) -> int:
        """An entry with these fields; those left out are zero.

        :raises InvalidError: a value does not fit its field.
        """
        entry = 0
        for name, value in values.items():
            entry |= cls.FIELDS[name].put(f"{cls.NAME} {name}", value)
        return entry

    @classmethod
    def decode(cls, entry: int, where: str = "") -> dict[str, int]:
        """All fields of an entry.

        :raises TableDamageError: reserved bits are set.
        """
        if entry & cls.reserved():
            place = f"{cls.NAME} {where}".strip()
            raise TableDamageError(
                f"{place}: reserved bits set: got {entry:#x}, expected no {cls.reserved():#x}"
            )
        return {name: field.get(entry) for name, field in cls.FIELDS.items()}

    @classmethod
    def reserved(cls, physical_bits: int = MAX_PHYSICAL_BITS) -> int:
        """Mask of the bits that must be zero on a host of that address width."""
        mask = (1 << cls.BITS) - 1 & ~cls.KNOWN
        for field in cls.FIELDS.values():
            if field.address:
                start = field.lsb // 64 * 64
                width = (1 << start + 64) - (1 << start + physical_bits)
                mask |= field.mask & width
        return mask


class RootEntry(Entry):
    """Legacy root entry, one per bus."""

    NAME, SECTION, BITS = "root entry", "9.1", 128
    P = Field(0, 0)
    CTP = Pointer(63, 12)


class ScalableRootEntry(Entry):
    """Scalable-mode root entry: devices 0-15 in the lower table, 16-31 in the upper one."""

    NAME, SECTION, BITS = "scalable root entry", "9.2", 128
    LP = Field(0, 0)
    LCTP = Pointer(63, 12)
    UP = Field(64, 64)
    UCTP = Pointer(127, 76)


class ContextEntry(Entry):
    """Legacy context entry, one per device and function."""

    NAME, SECTION, BITS = "context entry", "9.3", 128
    P = Field(0, 0)
    FPD = Field(1, 1)
    TT = Field(3, 2)
    SSPTPTR = Pointer(63, 12)
    AW = Field(66, 64)
    DID = Field(87, 72)
    IGNORED = (Field(70, 67),)


class ScalableContextEntry(Entry):
    """Scalable-mode context entry. HPTE and EPTR (bits 5 and 6) are not used here: reserved."""

    NAME, SECTION, BITS = "scalable context entry", "9.4", 256
    P = Field(0, 0)
    FPD = Field(1, 1)
    DTE = Field(2, 2)
    PASIDE = Field(3, 3)
    PRE = Field(4, 4)
    PDTS = Field(11, 9)
    PASIDDIRPTR = Pointer(63, 12)
    RID_PASID = Field(83, 64)
    RID_PRIV = Field(84, 84)


class PasidDirectoryEntry(Entry):
    """PASID directory entry, one per 64 PASIDs."""

    NAME, SECTION = "PASID directory entry", "9.5"
    P = Field(0, 0)
    FPD = Field(1, 1)
    SMPTBLPTR = Pointer(63, 12)


class PasidTableEntry(Entry):
    """Scalable-mode PASID table entry. What is for host permission tables is left reserved."""

    NAME, SECTION, BITS = "PASID table entry", "9.6", 512
    P = Field(0, 0)
    FPD = Field(1, 1)
    AW = Field(4, 2)
    PGTT = Field(8, 6)
    SSADE = Field(9, 9)
    SSPTPTR = Pointer(63, 12)
    DID = Field(79, 64)
    PWSNP = Field(87, 87)
    PGSNP = Field(88, 88)
    CD = Field(89, 89)
    EMTE = Field(90, 90)
    PAT = Field(127, 96)
    SRE = Field(128, 128)
    FSPM = Field(131, 130)
    WPE = Field(132, 132)
    EAFE = Field(135, 135)
    FSPTPTR = Pointer(191, 140)
    IGNORED = (Field(134, 133),)


class SecondStageTable(Entry):
    """Second-stage entry that refers to a table, at level 2 or above."""

    NAME, SECTION = "second-stage entry", "9.8"
    R = Field(0, 0)
    W = Field(1, 1)
    A = Field(8, 8)
    ADDRESS = Pointer(51, 12)
    IGNORED = (Field(6, 2), Field(10, 9), Field(61, 52), Field(63, 63))


class SecondStageLeaf4K(Entry):
    """Second-stage entry that maps 4 KiB (SS-PTE, level 1)."""

    NAME, SECTION = "second-stage 4 KiB leaf", "9.8"
    R = Field(0, 0)
    W = Field(1, 1)
    A = Field(8, 8)
    D = Field(9, 9)
    SNP = Field(11, 11)
    ADDRESS = Pointer(51, 12)
    IGNORED = (Field(7, 2), Field(10, 10), Field(61, 52), Field(63, 63))


class SecondStageLeaf2M(Entry):
    """Second-stage entry that maps 2 MiB (SS-PDE with PS, level 2)."""

    NAME, SECTION = "second-stage 2 MiB leaf", "9.8"
    R = Field(0, 0)
    W = Field(1, 1)
    PS = Field(7, 7)
    A = Field(8, 8)
    D = Field(9, 9)
    SNP = Field(11, 11)
    ADDRESS = Pointer(51, 21)
    IGNORED = (Field(6, 2), Field(10, 10), Field(61, 52), Field(63, 63))


class SecondStageLeaf1G(Entry):
    """Second-stage entry that maps 1 GiB (SS-PDPTE with PS, level 3)."""

    NAME, SECTION = "second-stage 1 GiB leaf", "9.8"
    R = Field(0, 0)
    W = Field(1, 1)
    PS = Field(7, 7)
    A = Field(8, 8)
    D = Field(9, 9)
    SNP = Field(11, 11)
    ADDRESS = Pointer(51, 30)
    IGNORED = (Field(6, 2), Field(10, 10), Field(61, 52), Field(63, 63))


ALL_FORMATS: tuple[type[Entry], ...] = (
    RootEntry,
    ScalableRootEntry,
    ContextEntry,
    ScalableContextEntry,
    PasidDirectoryEntry,
    PasidTableEntry,
    SecondStageTable,
    SecondStageLeaf4K,
    SecondStageLeaf2M,
    SecondStageLeaf1G,
)
LEAVES: dict[int, type[Entry]] = {1: SecondStageLeaf4K, 2: SecondStageLeaf2M, 3: SecondStageLeaf1G}

ADDRESS_MASK = SecondStageTable.ADDRESS.mask
PS = SecondStageLeaf2M.PS.mask

#: Context TT (9.3) and PASID PGTT (9.6).
TT_UNTRANSLATED = 0
TT_DEVICE_TLB = 1
TT_PASS_THROUGH = 2
PGTT_FIRST_STAGE = 1
PGTT_SECOND_STAGE = 2
PGTT_NESTED = 3
PGTT_PASS_THROUGH = 4


def leaf_bytes(level: int) -> int:
    """Return the bytes that one entry of a table of that level maps."""
    return 1 << PAGE_SHIFT + LEVEL_BITS * (level - 1)


def width_bits(levels: int) -> int:
    """The address width of tables of so many levels: 39, 48 or 57 bits."""
    return PAGE_SHIFT + LEVEL_BITS * levels


def is_present(entry: int) -> bool:
    """Tell if a second-stage entry is present: it has no bit for that, R or W makes it so."""
    return bool(entry & READ_WRITE)


def is_leaf(entry: int, level: int) -> bool:
    """Tell if a present second-stage entry maps memory, and is no reference to a table."""
    return level == 1 or (level <= LARGEST_LEAF_LEVEL and bool(entry & PS))


def second_stage_format(entry: int, level: int) -> type[Entry]:
    """The format of a present second-stage entry."""
    return LEAVES[level] if is_leaf(entry, level) else SecondStageTable


def aw_of(levels: int) -> int:
    """AW of a context or PASID table entry for tables of so many levels (9.3, 9.6)."""
    return levels - 2


def levels_of(aw: int) -> int:
    """Return the levels of tables that an AW field stands for; they may be none of LEVELS."""
    return aw + 2


def parse_perm(text: str) -> int:
    """``r``, ``w`` or ``rw``.

    :raises InvalidError: something else.
    """
    perms = {"r": READ, "w": WRITE, "rw": READ_WRITE}
    if text not in perms:
        raise InvalidError(f"permission {text!r}: expected r, w or rw")
    return perms[text]


def perm_text(perm: int) -> str:
    """``r``, ``w``, ``rw`` or ``-``."""
    return ("r" if perm & READ else "") + ("w" if perm & WRITE else "") or "-"


class PciAddress(NamedTuple):
    """The place of a PCI device: its segment, of 32 bits, and its source id there.

    Segments above 0xffff are Linux's own: it numbers the devices below an Intel VMD from 0x10000
    on (drivers/pci/controller/vmd.c), and DMAR knows no such segment.
    """

    segment: int
    source_id: SourceId


def parse_bdf(text: str) -> PciAddress:
    """Segment and source id of ``DDDD:BB:DD.F`` as in ``lspci -D``; the segment may be left out.

    It has four digits or, without a zero in front, up to eight.

    :raises InvalidError: not a device's address.
    """
    head, _, function = text.rpartition(".")
    parts = head.split(":")
    digits = {2: (2, 2), 3: (_segment_digits(parts[0]), 2, 2)}.get(len(parts), ())
    hexadecimal = set("0123456789abcdefABCDEF")
    good = len(function) == 1 and function in "01234567" and len(digits) == len(parts)
    if not good or any(
        len(p) != n or set(p) - hexadecimal for p, n in zip(parts, digits, strict=True)
    ):
        raise InvalidError(f"device {text!r}: not a device's address: expected DDDD:BB:DD.F")
    *segment, bus, slot = (int(p, 16) for p in parts)
    if slot > 0x1F:
        raise InvalidError(f"device {text!r}: no such device: got {slot:#x}, expected 0..0x1f")
    source_id = SourceId(bus << 8 | slot << 3 | int(function))
    return PciAddress(segment[0] if segment else 0, source_id)


def is_bdf(text: str) -> bool:
    """Tell whether :func:`parse_bdf` takes a text."""
    try:
        parse_bdf(text)
    except InvalidError:
        return False
    return True


def _segment_digits(text: str) -> int:
    """Return how many digits the segment ``text`` must have: the kernel prints it by ``%04x``."""
    return len(text) if 4 < len(text) <= 8 and text[0] != "0" else 4


def check_source_id(source_id: SourceId) -> None:
    """:raises InvalidError: not one."""
    if not 0 <= source_id <= MAX_SOURCE_ID:
        raise InvalidError(f"source id {source_id:#x}: not one: expected 0..{MAX_SOURCE_ID:#x}")


def bdf_text(source_id: SourceId, segment: int = 0) -> str:
    """A source id as ``DDDD:BB:DD.F``."""
    return f"{segment:04x}:{source_id >> 8:02x}:{source_id >> 3 & 31:02x}.{source_id & 7:x}"


class FaultReason(enum.IntEnum):
    """Fault reasons: the number that a fault record holds. ``SM_`` is scalable mode.

    Numbers, and the condition codes beside them, are those of 7.1.3, table 30. The strings of
    Linux (drivers/iommu/intel/dmar.c) and the enumerations of QEMU (hw/i386/intel_iommu_internal.h)
    and VirtualBox (include/VBox/iommu-intel.h) have the same numbers.
    """

    ROOT_ENTRY_P = 0x01  # LRT.2
    CONTEXT_ENTRY_P = 0x02  # LCT.2
    CONTEXT_ENTRY_INV = 0x03  # LCT.4
    ADDR_BEYOND_MGAW = 0x04  # LGN.1
    WRITE = 0x05  # LGN.2
    READ = 0x06  # LGN.3
    PAGING_ENTRY_INV = 0x07  # LSS.1
    ROOT_TABLE_INV = 0x08  # LRT.1
    CONTEXT_TABLE_INV = 0x09  # LCT.1
    ROOT_ENTRY_RSVD = 0x0A  # LRT.3
    CONTEXT_ENTRY_RSVD = 0x0B  # LCT.3
    PAGING_ENTRY_RSVD = 0x0C  # LSS.2
    CONTEXT_ENTRY_TT = 0x0D  # LCT.5
    INTERRUPT_ADDR = 0x0E  # LGN.4
    LEGACY_PASID = 0x31  # RTA.2
    SM_ROOT_TABLE_INV = 0x38  # SRT.1
    SM_ROOT_ENTRY_P = 0x39  # SRT.2
    SM_ROOT_ENTRY_RSVD = 0x3A  # SRT.3
    SM_CONTEXT_TABLE_INV = 0x40  # SCT.1
    SM_CONTEXT_ENTRY_P = 0x41  # SCT.2
    SM_CONTEXT_ENTRY_RSVD = 0x42  # SCT.3
    SM_CONTEXT_ENTRY_INV = 0x43  # SCT.4
    SM_PASID_DISABLED = 0x45  # SCT.6
    SM_PASID_TOO_LARGE = 0x46  # SCT.7
    SM_PASID_IS_RID_PASID = 0x48  # SCT.9
    SM_PASID_DIR_ACCESS = 0x50  # SPD.1
    SM_PASID_DIR_ENTRY_P = 0x51  # SPD.2
    SM_PASID_DIR_ENTRY_RSVD = 0x52  # SPD.3
    SM_PASID_TABLE_ACCESS = 0x58  # SPT.1
    SM_PASID_ENTRY_P = 0x59  # SPT.2
    SM_PASID_ENTRY_RSVD = 0x5A  # SPT.3
    SM_PASID_ENTRY_INV = 0x5B  # SPT.4
    SM_PAGING_ENTRY_INV = 0x78  # SSS.1
    SM_PAGING_ENTRY_P = 0x79  # SSS.2
    SM_PAGING_ENTRY_RSVD = 0x7A  # SSS.3
    SM_PAGING_ROOT_INV = 0x7B  # SSS.4
    SM_ADDR_BEYOND_HAW = 0x83  # SGN.4
    SM_ADDR_BEYOND_MGAW = 0x84  # SGN.5
    SM_WRITE = 0x85  # SGN.6
    SM_READ = 0x86  # SGN.7
    SM_INTERRUPT_ADDR = 0x87  # SGN.8

    @property
    def text(self) -> str:
        """The meaning of the reason, in words."""
        return _FAULT_TEXTS[self.name.removeprefix("SM_")]


_FAULT_TEXTS = {
    "ROOT_ENTRY_P": "root entry not present",
    "CONTEXT_ENTRY_P": "context entry not present",
    "CONTEXT_ENTRY_INV": "context entry invalid",
    "ADDR_BEYOND_MGAW": "address beyond the width of the tables",
    "ADDR_BEYOND_HAW": "address beyond the width of the host",
    "WRITE": "no write permission",
    "READ": "no read permission",
    "PAGING_ENTRY_INV": "paging entry cannot be read",
    "PAGING_ENTRY_P": "neither read nor write permission",
    "PAGING_ROOT_INV": "top-level paging entry cannot be read",
    "ROOT_TABLE_INV": "root entry cannot be read",
    "CONTEXT_TABLE_INV": "context entry cannot be read",
    "ROOT_ENTRY_RSVD": "reserved bits set in the root entry",
    "CONTEXT_ENTRY_RSVD": "reserved bits set in the context entry",
    "PAGING_ENTRY_RSVD": "reserved bits set in a paging entry",
    "CONTEXT_ENTRY_TT": "request blocked by the translation type",
    "INTERRUPT_ADDR": "output address in the interrupt range",
    "LEGACY_PASID": "request with PASID in legacy mode",
    "PASID_IS_RID_PASID": "request with the PASID that stands for requests without one",
    "PASID_DISABLED": "request with PASID, but the context entry does not enable them",
    "PASID_TOO_LARGE": "PASID beyond the directory",
    "PASID_DIR_ACCESS": "PASID directory entry cannot be read",
    "PASID_DIR_ENTRY_P": "PASID directory entry not present",
    "PASID_DIR_ENTRY_RSVD": "reserved bits set in the PASID directory entry",
    "PASID_TABLE_ACCESS": "PASID table entry cannot be read",
    "PASID_ENTRY_P": "PASID table entry not present",
    "PASID_ENTRY_RSVD": "reserved bits set in the PASID table entry",
    "PASID_ENTRY_INV": "PASID table entry invalid",
}
