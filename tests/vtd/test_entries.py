"""Entry formats: every field at its bits, every level and size there and back, reserved bits."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import InvalidError, TableDamageError
from pkernfs.quantities import SourceId
from pkernfs.vtd import entries
from pkernfs.vtd.entries import ALL_FORMATS, LEAVES, Entry, FaultReason

#: Typed out by hand from the specification (and compared with QEMU's masks): bits that are zero.
RESERVED_64 = {
    entries.SecondStageTable: 1 << 62 | 1 << 11 | 1 << 7,
    entries.SecondStageLeaf4K: 1 << 62,
    entries.SecondStageLeaf2M: 1 << 62 | 0x1FF000,
    entries.SecondStageLeaf1G: 1 << 62 | 0x3FFFF000,
    entries.PasidDirectoryEntry: 0xFFC | 0xFFF << 52,
    entries.RootEntry: 0xFFE | 0xFFF << 52 | ((1 << 64) - 1) << 64,
    entries.ContextEntry: 0xFF0 | 0xFFF << 52 | 0xFFFF_FFFF_FF00_0080 << 64,
    entries.ScalableContextEntry: (
        0x1E0 | 0xFFF << 52 | 0xFFFF_FFFF_FFE0_0000 << 64 | ((1 << 128) - 1) << 128
    ),
    entries.PasidTableEntry: (
        (0xC20 | 0xFFF << 52)
        | (0xF87F_0000) << 64
        | (0x0000_0F02 | 0xFFF << 52) << 128
        | ((1 << 320) - 1) << 192
    ),
}

#: The specification's sections (revision 5.10, chapter 9).
SECTIONS = {
    "root entry": "9.1",
    "scalable root entry": "9.2",
    "context entry": "9.3",
    "scalable context entry": "9.4",
    "PASID directory entry": "9.5",
    "PASID table entry": "9.6",
    "second-stage entry": "9.8",
    "second-stage 4 KiB leaf": "9.8",
    "second-stage 2 MiB leaf": "9.8",
    "second-stage 1 GiB leaf": "9.8",
}

#: Typed out by hand from 7.1.3, table 30: condition, number, and the name that it has here.
FAULTS = """
LRT.1 08 ROOT_TABLE_INV          LRT.2 01 ROOT_ENTRY_P            LRT.3 0A ROOT_ENTRY_RSVD
LCT.1 09 CONTEXT_TABLE_INV       LCT.2 02 CONTEXT_ENTRY_P         LCT.3 0B CONTEXT_ENTRY_RSVD
LCT.4 03 CONTEXT_ENTRY_INV       LCT.5 0D CONTEXT_ENTRY_TT        LSS.1 07 PAGING_ENTRY_INV
LSS.2 0C PAGING_ENTRY_RSVD       LGN.1 04 ADDR_BEYOND_MGAW        LGN.2 05 WRITE
LGN.3 06 READ                    LGN.4 0E INTERRUPT_ADDR          RTA.2 31 LEGACY_PASID
SRT.1 38 SM_ROOT_TABLE_INV       SRT.2 39 SM_ROOT_ENTRY_P         SRT.3 3A SM_ROOT_ENTRY_RSVD
SCT.1 40 SM_CONTEXT_TABLE_INV    SCT.2 41 SM_CONTEXT_ENTRY_P      SCT.3 42 SM_CONTEXT_ENTRY_RSVD
SCT.4 43 SM_CONTEXT_ENTRY_INV    SCT.6 45 SM_PASID_DISABLED       SCT.7 46 SM_PASID_TOO_LARGE
SCT.9 48 SM_PASID_IS_RID_PASID   SPD.1 50 SM_PASID_DIR_ACCESS     SPD.2 51 SM_PASID_DIR_ENTRY_P
SPD.3 52 SM_PASID_DIR_ENTRY_RSVD SPT.1 58 SM_PASID_TABLE_ACCESS   SPT.2 59 SM_PASID_ENTRY_P
SPT.3 5A SM_PASID_ENTRY_RSVD     SPT.4 5B SM_PASID_ENTRY_INV      SSS.1 78 SM_PAGING_ENTRY_INV
SSS.2 79 SM_PAGING_ENTRY_P       SSS.3 7A SM_PAGING_ENTRY_RSVD    SSS.4 7B SM_PAGING_ROOT_INV
SGN.4 83 SM_ADDR_BEYOND_HAW      SGN.5 84 SM_ADDR_BEYOND_MGAW     SGN.6 85 SM_WRITE
SGN.7 86 SM_READ                 SGN.8 87 SM_INTERRUPT_ADDR
""".split()


@pytest.mark.parametrize("kind", RESERVED_64)
def test_reserved_bits_are_those_of_the_specification(kind: type[Entry]) -> None:
    assert kind.reserved() == RESERVED_64[kind]


@pytest.mark.parametrize("kind", ALL_FORMATS)
def test_each_reserved_bit_is_refused_and_each_other_one_is_not(kind: type[Entry]) -> None:
    reserved = kind.reserved()
    for bit in range(kind.BITS):
        if reserved >> bit & 1:
            with pytest.raises(TableDamageError, match="reserved bits set"):
                kind.decode(1 << bit)
        else:
            kind.decode(1 << bit)


def test_address_bits_beyond_the_host_are_reserved() -> None:
    assert entries.SecondStageLeaf4K.reserved(39) & 1 << 39
    assert not entries.SecondStageLeaf4K.reserved(39) & 1 << 38
    assert entries.ContextEntry.reserved(46) & 1 << 46


@given(st.data())
def test_fields_come_back(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(ALL_FORMATS))
    values = {}
    for name, field in kind.FIELDS.items():
        top = min(field.msb, 51 + field.lsb // 64 * 64) if field.address else field.msb
        value = data.draw(st.integers(0, (1 << top - field.lsb + 1) - 1))
        values[name] = value << field.lsb % 64 if field.address else value
    entry = kind.encode(**values)
    assert entry < 1 << kind.BITS
    assert kind.decode(entry) == values


@pytest.mark.parametrize("level", LEAVES)
@pytest.mark.parametrize("perm", [1, 2, 3])
def test_leaves_of_every_size_at_zero_and_at_the_top(level: int, perm: int) -> None:
    size = entries.leaf_bytes(level)
    for address in (0, size, (1 << 52) - size):
        values = {"R": perm & 1, "W": perm >> 1, "ADDRESS": address}
        if level > 1:
            values["PS"] = 1
        entry = LEAVES[level].encode(**values)
        assert entry & entries.ADDRESS_MASK == address
        assert entries.is_present(entry)
        assert entries.is_leaf(entry, level)
        assert entries.second_stage_format(entry, level) is LEAVES[level]
        decoded = LEAVES[level].decode(entry)
        assert decoded["ADDRESS"] == address
        assert (decoded["R"], decoded["W"]) == (perm & 1, perm >> 1)


@pytest.mark.parametrize("level", [2, 3, 4, 5])
def test_references_to_tables(level: int) -> None:
    for address in (0, 4096, (1 << 52) - 4096):
        entry = entries.SecondStageTable.encode(R=1, W=1, ADDRESS=address)
        assert not entries.is_leaf(entry, level)
        assert entries.SecondStageTable.decode(entry)["ADDRESS"] == address


def test_golden_words() -> None:
    """By hand: what a unit would be given."""
    assert entries.RootEntry.encode(P=1, CTP=0x1234000) == 0x1234001
    context = entries.ContextEntry.encode(P=1, SSPTPTR=0x5000, AW=2, DID=0xABCD)
    assert context == 0x5001 | 2 << 64 | 0xABCD << 72
    assert entries.ContextEntry.encode(TT=2) == 8
    leaf = entries.SecondStageLeaf2M.encode(R=1, W=1, PS=1, ADDRESS=0x40000000)
    assert leaf == 0x40000083
    pasid = entries.PasidTableEntry.encode(P=1, AW=2, PGTT=2, SSPTPTR=0x7000, DID=3)
    assert pasid == 0x7000 | 2 << 6 | 2 << 2 | 1 | 3 << 64
    root = entries.ScalableRootEntry.encode(LP=1, LCTP=0x1000, UP=1, UCTP=0x2000)
    assert root == 0x1001 | 0x2001 << 64


def test_values_that_do_not_fit() -> None:
    with pytest.raises(InvalidError, match="DID"):
        entries.ContextEntry.encode(DID=1 << 16)
    with pytest.raises(InvalidError, match="ADDRESS"):
        entries.SecondStageLeaf2M.encode(ADDRESS=4096)
    with pytest.raises(InvalidError, match="ADDRESS"):
        entries.SecondStageLeaf4K.encode(ADDRESS=1 << 52)
    with pytest.raises(InvalidError, match="CTP"):
        entries.RootEntry.encode(CTP=-4096)


@pytest.mark.parametrize(
    ("text", "segment", "source_id"),
    [("0000:00:05.0", 0, 0x28), ("0001:ff:1f.7", 1, 0xFFFF), ("3a:00.1", 0, 0x3A01),
     ("10000:e1:00.0", 0x10000, 0xE100), ("5d0505:01:00.0", 0x5D0505, 0x100),
     ("ffffffff:00:00.0", 0xFFFF_FFFF, 0)],
)  # fmt: skip
def test_device_addresses(text: str, segment: int, source_id: SourceId) -> None:
    assert entries.parse_bdf(text) == (segment, source_id)
    assert entries.is_bdf(text)
    assert entries.bdf_text(source_id, segment).endswith(text)


@pytest.mark.parametrize(
    "text",
    ["", "5", "00:05", "0:5.0", "00:20.0", "00:05.8", "0000:00:05.0.1", "0000:00:05.0 ",
     "00000:00:05.0", "gg:00.0", "-1:00.0", "00:05.00", "1:0000:00:05.0",
     "100000000:00:05.0", "001:00:05.0", "\u0660\u0660:05.0"],
)  # fmt: skip
def test_what_is_no_device_address(text: str) -> None:
    with pytest.raises(InvalidError, match="device"):
        entries.parse_bdf(text)
    assert not entries.is_bdf(text)


def test_permissions() -> None:
    for text in ("r", "w", "rw"):
        assert entries.perm_text(entries.parse_perm(text)) == text
    for text in ("", "x", "wr", "rwx"):
        with pytest.raises(InvalidError):
            entries.parse_perm(text)


def test_fault_reasons_are_those_of_the_specification() -> None:
    pinned = dict(zip(FAULTS[2::3], (int(number, 16) for number in FAULTS[1::3]), strict=True))
    assert {reason.name: reason.value for reason in FaultReason} == pinned
    assert all(reason.text for reason in FaultReason)


def test_the_condition_beside_each_fault_reason() -> None:
    """Comments in the source, which the next reader will believe."""
    lines = inspect.getsource(FaultReason).splitlines()
    written = [line.split() for line in lines if "# " in line]
    said = [w for name, _, number, _, code in written for w in (code, number[2:], name)]
    assert sorted(zip(said[::3], said[1::3], said[2::3], strict=True)) == sorted(
        zip(FAULTS[::3], FAULTS[1::3], FAULTS[2::3], strict=True)
    )


def test_sections() -> None:
    assert {kind.NAME: kind.SECTION for kind in ALL_FORMATS} == SECTIONS
