"""The ACPI DMAR table: QEMU's as it is, tables made here, and damaged ones."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import InvalidError, NotFoundError
from pkernfs.host.dmar import IOAPIC, Dmar, PathStep, Scope, parse, read_dmar
from pkernfs.host.sysroot import Host
from support.dmar_tables import QEMU_TABLE, TWO_UNITS, drhd, rmrr, scope, structure, table


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
        (QEMU_TABLE[:-1], "no such table"),
        (b"XSDT" + QEMU_TABLE[4:], "no such table"),
        (QEMU_TABLE[:9] + b"\0" + QEMU_TABLE[10:], "bad checksum"),
        (table(b"\0\0\3\0"), "bad length: got 3"),
        (table(b"\0\0\0\1"), "bad length: got 256"),
        (table(b"\0"), "cut short"),
        (table(structure(0, b"\0" * 11)), "cut short"),
        (table(drhd(0)), "bad register base"),
        (table(drhd(0xFED9_0010)), "bad register base"),
        (table(drhd(0xFED9_0000, b"\1\0\0\0\0\0")), "device scope: bad length: got 0"),
        (table(drhd(0xFED9_0000, b"\1\7\0\0\0\0\0")), "device scope: bad length: got 7"),
        (table(drhd(0xFED9_0000, b"\1\x20\0\0\0\0\0\0")), "device scope: bad length: got 32"),
        (table(drhd(0xFED9_0000, b"\1\x08")), "device scope: cut short"),
        (table(drhd(0xFED9_0000, scope(1, 0, (0x20, 0)))), "bad path"),
        (table(rmrr(1, 2)[:-4]), "bad length"),
    ],
)
def test_a_table_that_contradicts_itself(data: bytes, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        parse(data)


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
    path = tmp_path / "sys/firmware/acpi/tables/DMAR"
    path.parent.mkdir(parents=True)
    path.write_bytes(QEMU_TABLE)
    assert read_dmar(Host(str(tmp_path))) == parse(QEMU_TABLE)
    path.write_bytes(QEMU_TABLE[:-1])
    with pytest.raises(InvalidError, match="no such table"):
        read_dmar(Host(str(tmp_path)))


def test_a_host_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no DMAR table: .*: switch VT-d on"):
        read_dmar(Host(str(tmp_path)))
