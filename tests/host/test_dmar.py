"""The ACPI DMAR table: QEMU's as it is, tables made here, and damaged ones."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import InvalidError, NotFoundError
from pkernfs.host.dmar import IOAPIC, Dmar, PathStep, Scope, parse, read_dmar, read_table
from pkernfs.host.pci import PciDevice, covers
from pkernfs.host.sysroot import Host
from pkernfs.quantities import SourceId
from support.dmar_tables import QEMU_TABLE, TWO_UNITS, drhd, rmrr, structure, table


def test_the_table_of_qemu() -> None:
    dmar = parse(QEMU_TABLE)
    assert dmar.host_bits == 48
    assert dmar.interrupt_remapping
    [unit] = dmar.units
    assert (unit.name, unit.base, unit.segment, unit.include_all) == (
        "dmar0",
        0xFED9_0000,
        0,
        False,
    )
    assert [str(s) for s in unit.scopes] == [
        "ioapic ff:00.0", "endpoint 00:00.0", "endpoint 00:05.0", "endpoint 00:1f.0",
        "endpoint 00:1f.2", "endpoint 00:1f.3",
    ]  # fmt: skip
    assert [p.all_ports for p in dmar.root_ports] == [True]
    assert dmar.reserved == ()


def test_units_segments_nodes_and_reserved_memory() -> None:
    dmar = parse(TWO_UNITS)
    assert [u.name for u in dmar.units] == ["dmar0", "dmar1", "dmar2", "dmar3"]
    assert [u.node for u in dmar.units] == [None, None, 1, None]
    assert dmar.units[1].register_bytes == 8192
    assert dmar.units[0].scopes[1] == Scope(IOAPIC, 8, 0xF0, (PathStep(0x1F, 7),))
    assert (dmar.reserved[0].start, dmar.reserved[0].last) == (0x7B00_0000, 0x7BFF_FFFF)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (QEMU_TABLE[:47], "cut short"),
        (QEMU_TABLE[:-1], "cut short: got 119 bytes, expected 120"),
        (b"XSDT" + QEMU_TABLE[4:], "no such table"),
        (table(b"\0\0\3\0"), "cut short: got 3"),
        (table(structure(0, b"\0" * 11)), "cut short"),
        (table(drhd(0xFED9_0000, b"\1\0\0\0\0\0")), "device scope: bad length: got 0"),
        (table(drhd(0xFED9_0000, b"\1\5\0\0\0\0\0")), "device scope: bad length: got 5"),
        (table(drhd(0xFED9_0000, b"\1\x20\0\0\0\0\0\0")), "device scope: bad length: got 32"),
        (table(drhd(0xFED9_0000, b"\1\x08")), "device scope: cut short"),
    ],
)
def test_a_table_that_contradicts_itself(data: bytes, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        parse(data)


GOOD = drhd(0xFED9_0000, flags=1)
ANDD = structure(4, b"\0\0\0\7" + b"\\_SB.PCI0")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (table(GOOD, drhd(0)), "the unit at 0x40 has register base 0"),
        (table(GOOD, b"\0\0\0\1"),
         "the structure at 0x40 passes the end: got 256 bytes, expected up to 4"),
        (table(GOOD, rmrr(1, 2)[:-4]), "the structure at 0x40 passes the end"),
        (table(GOOD, b"\1\0\4"), "the structure at 0x40 passes the end"),
        (table(GOOD, ANDD), r"the name at 0x40 \(ANDD\) has no end"),
        (table(GOOD, width=10), "bad host address width: got 11 bits"),
    ],
)  # fmt: skip
def test_linux_drives_no_unit_of_some_tables(data: bytes, why: str, tmp_path: Path) -> None:
    """Its log has "Record passes table end" or "Your BIOS is broken", and then no unit."""
    dmar = parse(data)
    assert re.match(why, dmar.refused)
    assert [u.base for u in dmar.units] == [0xFED9_0000]
    with pytest.raises(InvalidError, match=f"{why}.*: Linux drives no unit"):
        read_dmar(machine_with(tmp_path, data))
    assert read_table(Host(str(tmp_path))) == dmar


@pytest.mark.parametrize(
    ("data", "remarks"),
    [
        (table(GOOD), ()),
        (table(GOOD, width=11), ()),
        (table(GOOD, structure(4, b"\0\0\0\7" + b"\\_SB.PCI0\0")), ()),
        (table(GOOD, bytes(16)), ("16 bytes behind the last structure",)),
        (table(GOOD, b"\0"), ("1 byte behind the last structure",)),
        (table(GOOD, b"\0\0\0\0" + drhd(0)), ("20 bytes behind the last structure",)),
        (table(GOOD, GOOD), ("the unit at 0xfed90000 is there twice",)),
        (table(GOOD)[:9] + b"\0" + table(GOOD)[10:], ("its checksum is wrong",)),
    ],
)
def test_linux_passes_some_faults_by(data: bytes, remarks: tuple[str, ...], tmp_path: Path) -> None:
    dmar = read_dmar(machine_with(tmp_path, data))
    assert (dmar.refused, dmar.remarks) == ("", remarks)
    assert [(u.name, u.base) for u in dmar.units] == [("dmar0", 0xFED9_0000)]


def test_the_base_of_a_unit_is_as_the_firmware_says() -> None:
    assert parse(table(drhd(0xFED9_0010))).units[0].base == 0xFED9_0010


def test_a_node_is_of_units_before_it() -> None:
    """dmar_parse_one_rhsa looks for the unit when it reads the structure."""
    rhsa = structure(3, struct.pack("<IQI", 0, 0xFED9_0000, 1))
    assert parse(table(GOOD, rhsa)).units[0].node == 1
    assert parse(table(rhsa, GOOD)).units[0].node is None


@pytest.mark.parametrize("path", [b"", b"\x20\0", b"\0\x08", b"\0"])
def test_a_path_that_no_device_has_matches_none(path: bytes) -> None:
    odd = struct.pack("<BBBBBB", 1, 6 + len(path), 0, 0, 0, 0) + path
    dmar = parse(table(drhd(0xFED9_0000, odd)))
    for source_id in range(256):
        device = PciDevice(0, SourceId(source_id), (SourceId(source_id),), None, *[False] * 5)
        assert not covers(dmar.units[0].scopes, device)


def machine_with(root: Path, data: bytes) -> Host:
    path = root / "sys/firmware/acpi/tables/DMAR"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return Host(str(root))


@given(st.integers(48, len(TWO_UNITS) - 1), st.integers(0, 255), st.integers(0, len(TWO_UNITS)))
def test_any_damage_is_a_message_or_a_table(at: int, value: int, cut: int) -> None:
    data = bytearray(TWO_UNITS)
    data[at] = value
    for damaged in (data, data[:cut]):
        if len(damaged) > 10:
            damaged[9] = (damaged[9] - sum(damaged)) & 0xFF
        with contextlib.suppress(InvalidError):
            assert isinstance(parse(bytes(damaged)), Dmar)


def test_the_kernels_copy_of_the_table(tmp_path: Path) -> None:
    assert read_dmar(machine_with(tmp_path, QEMU_TABLE)) == parse(QEMU_TABLE)


def test_a_host_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no DMAR table: .*: switch VT-d on"):
        read_dmar(Host(str(tmp_path)))
