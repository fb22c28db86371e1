"""Registers bit by bit, and what those that say something say."""

from __future__ import annotations

from pkernfs.layout import PAGE
from pkernfs.vtd.registers import REGISTERS, Capabilities, parse_fault

#: Typed out by hand from chapter 11 (and compared with Linux, drivers/iommu/intel/iommu.h).
FIELDS = """
Version 0x00 MIN 3:0 MAX 7:4
Capability 0x08 ND 2:0 AFL 3:3 RWBF 4:4 PLMR 5:5 PHMR 6:6 CM 7:7 SAGAW 12:8 MGAW 21:16 ZLR 22:22
 FRO 33:24 SSLPS 37:34 PSI 39:39 NFR 47:40 MAMV 53:48 DWD 54:54 DRD 55:55 FS1GP 56:56 PI 59:59
 FS5LP 60:60 ECMDS 61:61 ESIRTPS 62:62 ESRTPS 63:63
ExtendedCapability 0x10 C 0:0 QI 1:1 DT 2:2 IR 3:3 EIM 4:4 PT 6:6 SC 7:7 IRO 17:8 MHMV 23:20
 NEST 26:26 PRS 29:29 SRS 31:31 PSS 39:35 PASID 40:40 SMTS 43:43 SSADS 45:45 SSTS 46:46 FSTS 47:47
 SMPWCS 48:48 ADMS 52:52
Command 0x18 CFI 23:23 SIRTP 24:24 IRE 25:25 QIE 26:26 WBF 27:27 EAFL 28:28 SFL 29:29 SRTP 30:30
 TE 31:31
RootTableAddress 0x20 TTM 11:10 RTA 63:12
ContextCommand 0x28 DID 15:0 SID 31:16 FM 33:32 CAIG 60:59 CIRG 62:61 ICC 63:63
FaultStatus 0x34 PFO 0:0 PPF 1:1 IQE 4:4 ICE 5:5 ITE 6:6 FRI 15:8
ProtectedMemory 0x64 PRS 0:0 EPM 31:31
QueueHead 0x80 QH 18:4
QueueTail 0x88 QT 18:4
QueueAddress 0x90 QS 2:0 DW 11:11 IQA 63:12
InvalidateAddress 0x00 AM 5:0 IH 6:6 ADDR 63:12
Iotlb 0x08 DID 47:32 DW 48:48 DR 49:49 IAIG 58:57 IIRG 61:60 IVT 63:63
FaultRecord 0x00 FI 63:12 SID 79:64 T2 92:92 FR 103:96 PV 123:104 T1 126:126 F 127:127
"""


def test_every_field_is_where_the_specification_has_it() -> None:
    expected: dict[str, list[str]] = {}
    for line in FIELDS.replace("\n ", " ").strip().splitlines():
        name, offset, *fields = line.split()
        expected[name] = [offset, *fields]
    found = {}
    for register in REGISTERS:
        fields = [
            word
            for name, field in vars(register).items()
            if hasattr(field, "msb")
            for word in (name, f"{field.msb}:{field.lsb}")
        ]
        found[register.__name__] = [f"0x{register.OFFSET:02x}", *fields]
    assert found == expected


def test_capabilities_in_words() -> None:
    qemu = Capabilities(0x10, 0xD2008C222F0606, 0xF42)
    assert (qemu.major, qemu.domain_ids, qemu.levels) == (1, 65536, (3, 4))
    assert (qemu.address_bits, qemu.largest_leaf) == (48, 3)
    assert (qemu.fault_records, qemu.iotlb_offset, qemu.register_bytes) == ((0x220, 1), 0xF0, PAGE)
    assert "queued invalidation" in qemu.words()
    small = Capabilities(0x60, 1 << 7 | 1 << 8 + 3 | 38 << 16 | 0x3FF << 24 | 7 << 40, 1)
    assert (small.major, small.domain_ids, small.levels) == (6, 16, (5,))
    assert (small.address_bits, small.largest_leaf) == (39, 1)
    assert (small.fault_records, small.register_bytes) == ((0x3FF0, 8), 5 * PAGE)
    assert small.words()[-2:] == ["coherent walks", "caching mode"]


def test_a_fault_record() -> None:
    assert parse_fault(0x1234_5000, 0x28 | 6 << 32) is None
    fault = parse_fault(0x1234_5678, 1 << 63 | 1 << 62 | 0x28 | 6 << 32)
    assert fault is not None
    assert fault[:5] == (0x28, 0x1234_5000, 6, False, None)
    assert str(fault) == "0000:00:05.0: read of 0x12345000: no read permission (0x06)"
    fault = parse_fault(0, 1 << 63 | 1 << 31 | 5 << 40 | 0xFF << 32)
    assert fault is not None
    assert (fault.write, fault.pasid) == (True, 5)
    assert str(fault).endswith("write of 0x0: fault reason 0xff")
