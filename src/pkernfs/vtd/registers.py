"""Registers of a remapping unit: where they are, what their fields mean.

Chapter 11 of the VT-d specification, revision 5.10. A register is declared as an
:class:`~pkernfs.vtd.entries.Entry` is; offsets are in bytes from the unit's base. What to do with
them is :mod:`pkernfs.units.unit`'s business.
"""

from __future__ import annotations

import enum
from typing import ClassVar, NamedTuple

from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, SourceId
from pkernfs.vtd.entries import FaultReason, Field, Pointer, bdf_text, levels_of


class Register:
    """Base of the registers: never instantiated, a register's value is an int."""

    OFFSET: ClassVar[int] = 0
    BITS: ClassVar[int] = 64
    SECTION: ClassVar[str] = ""


class Version(Register):
    """VER_REG."""

    OFFSET, BITS, SECTION = 0x00, 32, "11.4.1"
    MIN = Field(3, 0)
    MAX = Field(7, 4)


class Capability(Register):
    """CAP_REG."""

    OFFSET, SECTION = 0x08, "11.4.2"
    ND = Field(2, 0)
    AFL = Field(3, 3)
    RWBF = Field(4, 4)
    PLMR = Field(5, 5)
    PHMR = Field(6, 6)
    CM = Field(7, 7)
    SAGAW = Field(12, 8)
    MGAW = Field(21, 16)
    ZLR = Field(22, 22)
    FRO = Field(33, 24)
    SSLPS = Field(37, 34)
    PSI = Field(39, 39)
    NFR = Field(47, 40)
    MAMV = Field(53, 48)
    DWD = Field(54, 54)
    DRD = Field(55, 55)
    FS1GP = Field(56, 56)
    PI = Field(59, 59)
    FS5LP = Field(60, 60)
    ECMDS = Field(61, 61)
    ESIRTPS = Field(62, 62)
    ESRTPS = Field(63, 63)


class ExtendedCapability(Register):
    """ECAP_REG."""

    OFFSET, SECTION = 0x10, "11.4.3"
    C = Field(0, 0)
    QI = Field(1, 1)
    DT = Field(2, 2)
    IR = Field(3, 3)
    EIM = Field(4, 4)
    PT = Field(6, 6)
    SC = Field(7, 7)
    IRO = Field(17, 8)
    MHMV = Field(23, 20)
    NEST = Field(26, 26)
    PRS = Field(29, 29)
    SRS = Field(31, 31)
    PSS = Field(39, 35)
    PASID = Field(40, 40)
    SMTS = Field(43, 43)
    SSADS = Field(45, 45)
    SSTS = Field(46, 46)
    FSTS = Field(47, 47)
    SMPWCS = Field(48, 48)
    ADMS = Field(52, 52)


class Command(Register):
    """GCMD_REG; GSTS_REG, at the next four bytes, has the same bits as states (11.4.4)."""

    OFFSET, BITS, SECTION = 0x18, 32, "11.4.4.1"
    CFI = Field(23, 23)
    SIRTP = Field(24, 24)
    IRE = Field(25, 25)
    QIE = Field(26, 26)
    WBF = Field(27, 27)
    EAFL = Field(28, 28)
    SFL = Field(29, 29)
    SRTP = Field(30, 30)
    TE = Field(31, 31)


class RootTableAddress(Register):
    """RTADDR_REG."""

    OFFSET, SECTION = 0x20, "11.4.5"
    TTM = Field(11, 10)
    RTA = Pointer(63, 12)


class ContextCommand(Register):
    """CCMD_REG."""

    OFFSET, SECTION = 0x28, "11.4.6"
    DID = Field(15, 0)
    SID = Field(31, 16)
    FM = Field(33, 32)
    CAIG = Field(60, 59)
    CIRG = Field(62, 61)
    ICC = Field(63, 63)


class FaultStatus(Register):
    """FSTS_REG."""

    OFFSET, BITS, SECTION = 0x34, 32, "11.4.7"
    PFO = Field(0, 0)
    PPF = Field(1, 1)
    IQE = Field(4, 4)
    ICE = Field(5, 5)
    ITE = Field(6, 6)
    FRI = Field(15, 8)


class ProtectedMemory(Register):
    """PMEN_REG."""

    OFFSET, BITS, SECTION = 0x64, 32, "11.4.8"
    PRS = Field(0, 0)
    EPM = Field(31, 31)


class QueueHead(Register):
    """IQH_REG; bytes from the queue's begin. The unit resets it when the queue goes off."""

    OFFSET, SECTION = 0x80, "11.4.9"
    QH = Field(18, 4)


class QueueTail(Register):
    """IQT_REG; bytes from the queue's begin."""

    OFFSET, SECTION = 0x88, "11.4.9"
    QT = Field(18, 4)


class QueueAddress(Register):
    """IQA_REG. DW: descriptors of 256 bits; QS: 2^QS pages."""

    OFFSET, SECTION = 0x90, "11.4.9"
    QS = Field(2, 0)
    DW = Field(11, 11)
    IQA = Pointer(63, 12)


class InvalidateAddress(Register):
    """IVA_REG, at ECAP.IRO."""

    OFFSET, SECTION = 0x00, "11.4.6"
    AM = Field(5, 0)
    IH = Field(6, 6)
    ADDR = Field(63, 12, address=True)


class Iotlb(Register):
    """IOTLB_REG, behind IVA_REG."""

    OFFSET, SECTION = 0x08, "11.4.6"
    DID = Field(47, 32)
    DW = Field(48, 48)
    DR = Field(49, 49)
    IAIG = Field(58, 57)
    IIRG = Field(61, 60)
    IVT = Field(63, 63)


class FaultRecord(Register):
    """FRCD_REG, at CAP.FRO; CAP.NFR + 1 of them."""

    OFFSET, BITS, SECTION = 0x00, 128, "11.4.7"
    FI = Field(63, 12, address=True)
    SID = Field(79, 64)
    T2 = Field(92, 92)
    FR = Field(103, 96)
    PV = Field(123, 104)
    T1 = Field(126, 126)
    F = Field(127, 127)


STATUS = 0x1C
REGISTERS = (
    *(Version, Capability, ExtendedCapability, Command, RootTableAddress, ContextCommand),
    *(FaultStatus, ProtectedMemory, QueueHead, QueueTail, QueueAddress, InvalidateAddress),
    *(Iotlb, FaultRecord),
)

#: Bits of GSTS that a store into GCMD has to repeat: all but those of one-shot commands (11.4.4.1).
KEPT = 0x96FF_FFFF


class Granularity(enum.IntEnum):
    """The extent of an invalidation (CIRG, IIRG, and G of descriptors)."""

    GLOBAL = 1
    DOMAIN = 2
    SELECTIVE = 3  # one device, or some pages


# ---------------------------------------------------------------------- reaching registers


class StepKind(enum.IntEnum):
    """The kinds of steps; mmio.c does them."""

    WRITE_32 = 0
    WRITE_64 = 1
    COMMAND = 2  # GCMD: what GSTS says is on, with the bits of mask cleared and of value set
    WAIT_32 = 3  # until a register's bits of mask are value
    WAIT_64 = 4
    WAIT_SAME = 5  # until two registers of 64 bits, at offset and value, are the same
    WAIT_MEMORY = 6  # until the 4 bytes at an offset of the region are value


class Step(NamedTuple):
    """One of several loads and stores that are made in a row."""

    kind: StepKind
    offset: int
    value: int
    mask: int = 0


# ---------------------------------------------------------------------- what they say


class FaultRecords(NamedTuple):
    """A unit's fault records, 16 bytes each: where the first is, in bytes, and how many."""

    offset: int
    records: int


class Capabilities(NamedTuple):
    """The capabilities of a unit: VER, CAP and ECAP as they are."""

    version: int
    cap: int
    ecap: int

    def has(self, field: Field) -> bool:
        """Tell if a bit of CAP is set."""
        return bool(field.get(self.cap))

    def extended(self, field: Field) -> bool:
        """Tell if a bit of ECAP is set."""
        return bool(field.get(self.ecap))

    @property
    def major(self) -> int:
        """Of the architecture's version; from 6 on there are no registers for invalidations."""
        return Version.MAX.get(self.version)

    @property
    def domain_ids(self) -> int:
        """The number of domain ids: all are below it."""
        return 1 << 4 + 2 * Capability.ND.get(self.cap)

    @property
    def levels(self) -> tuple[int, ...]:
        """Numbers of levels of second-stage tables that it walks."""
        bits = Capability.SAGAW.get(self.cap)
        return tuple(levels_of(aw) for aw in (1, 2, 3) if bits >> aw & 1)

    @property
    def address_bits(self) -> int:
        """Width of the addresses that devices may use."""
        return Capability.MGAW.get(self.cap) + 1

    @property
    def largest_leaf(self) -> int:
        """Level of the largest second-stage leaf: 1 4 KiB, 2 2 MiB, 3 1 GiB."""
        pages = Capability.SSLPS.get(self.cap)
        return 1 + (pages & 1) + (pages & 3 == 3)

    @property
    def fault_records(self) -> FaultRecords:
        """Where its fault records are, and how many there are."""
        return FaultRecords(Capability.FRO.get(self.cap) * 16, Capability.NFR.get(self.cap) + 1)

    @property
    def iotlb_offset(self) -> int:
        """Offset of IVA_REG in bytes."""
        return ExtendedCapability.IRO.get(self.ecap) * 16

    @property
    def register_bytes(self) -> int:
        """Bytes of registers that are used here, whole pages."""
        first, count = self.fault_records
        end = max(self.iotlb_offset + 16, first + 16 * count)
        return -(-end // PAGE) * PAGE

    def words(self) -> list[str]:
        """Name the capabilities that matter here, for people."""
        sizes = ("4 KiB", "2 MiB", "1 GiB")[: self.largest_leaf]
        modes = ["legacy"] + ["scalable"] * self.extended(ExtendedCapability.SMTS)
        yes = [
            (ExtendedCapability.C, self.ecap, "coherent walks"),
            (ExtendedCapability.SC, self.ecap, "snoop control"),
            (ExtendedCapability.PT, self.ecap, "pass-through"),
            (ExtendedCapability.DT, self.ecap, "device TLBs"),
            (ExtendedCapability.QI, self.ecap, "queued invalidation"),
            (ExtendedCapability.IR, self.ecap, "interrupt remapping"),
            (Capability.CM, self.cap, "caching mode"),
            (Capability.RWBF, self.cap, "write-buffer flushes wanted"),
            (Capability.PLMR, self.cap, "protected low memory"),
            (Capability.PHMR, self.cap, "protected high memory"),
            (Capability.ESRTPS, self.cap, "caches emptied with a new root"),
        ]
        return [
            f"modes {', '.join(modes)}",
            f"levels {', '.join(map(str, self.levels)) or 'none'}",
            f"pages of {', '.join(sizes)}",
            f"addresses of {self.address_bits} bits",
            f"{self.domain_ids} domain ids",
            *(text for field, word, text in yes if field.get(word)),
        ]


class Fault(NamedTuple):
    """A fault record (11.4.7): ``iova`` is of the page; ``reason`` as FaultReason has it."""

    source_id: SourceId
    iova: Iova
    reason: int
    write: bool
    pasid: int | None

    def __str__(self) -> str:
        access = "write" if self.write else "read"
        return f"{bdf_text(self.source_id)}: {access} of {self.iova:#x}: {_reason(self.reason)}"


def parse_fault(low: int, high: int) -> Fault | None:
    """Decode a fault record; None: it is free."""
    record = high << 64 | low
    if not FaultRecord.F.get(record):
        return None
    pasid = FaultRecord.PV.get(record) if record >> 95 & 1 else None
    return Fault(
        SourceId(FaultRecord.SID.get(record)),
        Iova(FaultRecord.FI.get(record)),
        FaultRecord.FR.get(record),
        not FaultRecord.T1.get(record),
        pasid,
    )


def _reason(number: int) -> str:
    try:
        return f"{FaultReason(number).text} ({number:#04x})"
    except ValueError:
        return f"fault reason {number:#04x}"
