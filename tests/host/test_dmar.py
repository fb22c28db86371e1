"""The ACPI DMAR table: QEMU's as it is, tables made here, and damaged ones."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.errors import InvalidError, NotFoundError
from pkernfs.host.dmar import BRIDGE, ENDPOINT, IOAPIC, Dmar, Scope, parse
from pkernfs.host.pci import (
    PciDevice,
    all_devices,
    covers,
    read_device,
    reserved_memory_of,
    unit_of,
)
from pkernfs.host.sysroot import Host
from pkernfs.units.discovery import find_units, is_driven, read_dmar, unit_lines, unit_record
from support.dmar_tables import (
    add_device,
    config,
    drhd,
    rmrr,
    scope,
    structure,
    table,
)

#: From the firmware interface of QEMU 7.2, ``-M q35 -device intel-iommu,aw-bits=48,device-iotlb=on
#: -device edu,addr=05.0``; SeaBIOS puts in the checksum.
QEMU_TABLE = bytes.fromhex(
    "444d4152780000000108424f4348532042585043202020200100000042585043"
    "010000002f010000000000000000000000004000000000000000d9fe00000000"
    "0308000000ff0000010800000000000001080000000005000108000000001f00"
    "0108000000001f020108000000001f030200080001000000"
)


def device(*chain: int, segment: int = 0) -> PciDevice:
    return PciDevice(segment, chain[-1], chain, None, False, True, False, False, False)


TWO_UNITS = table(
    drhd(0xFED9_0000, scope(ENDPOINT, 0, (2, 0)), scope(IOAPIC, 0xF0, (0x1F, 7), enumeration=8)),
    drhd(0xFED9_1000, scope(BRIDGE, 0, (0x1C, 0)), scope(ENDPOINT, 0, (0x1D, 0), (3, 1)), size=1),
    drhd(0xFED9_2000, flags=1),
    drhd(0xFED9_3000, flags=1, segment=1),
    rmrr(0x7B00_0000, 0x7BFF_FFFF, scope(ENDPOINT, 0, (0x14, 0))),
    structure(3, struct.pack("<IQI", 0, 0xFED9_2000, 1)),
    structure(4, b"an ACPI device that nobody asks for\0"),
    structure(77, b"of a revision to come"),
)


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
    assert dmar.units[0].scopes[1] == Scope(IOAPIC, 8, 0xF0, ((0x1F, 7),))
    assert (dmar.reserved[0].start, dmar.reserved[0].last) == (0x7B00_0000, 0x7BFF_FFFF)


@pytest.mark.parametrize(
    ("chain", "segment", "name"),
    [
        ((0x10,), 0, "dmar0"),
        ((0xE0,), 0, "dmar1"),  # the bridge itself
        ((0xE0, 0x100), 0, "dmar1"),
        ((0xE0, 0x100, 0x208), 0, "dmar1"),
        ((0xE8, 0x319), 0, "dmar1"),
        ((0xE8, 0x318), 0, "dmar2"),
        ((0xE8,), 0, "dmar2"),
        ((0x10, 0x400), 0, "dmar2"),  # below an endpoint's number: not that endpoint
        ((0x10,), 1, "dmar3"),
        ((0x10,), 2, None),
    ],
)
def test_which_unit_a_device_is_below(
    chain: tuple[int, ...], segment: int, name: str | None
) -> None:
    found = unit_of(parse(TWO_UNITS), device(*chain, segment=segment))
    assert (found and found.name) == name


def test_reserved_memory_is_the_devices_that_it_names() -> None:
    dmar = parse(TWO_UNITS)
    assert len(reserved_memory_of(dmar, device(0xA0))) == 1
    assert reserved_memory_of(dmar, device(0xA8)) == []
    assert reserved_memory_of(dmar, device(0xA0, segment=1)) == []
    assert not covers((Scope(IOAPIC, 0, 0, ((0x14, 0),)),), device(0xA0))


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


# ---------------------------------------------------------------------- sysfs


def test_devices_as_sysfs_has_them(tmp_path: Path) -> None:
    host = Host(str(tmp_path))
    add_device(tmp_path, "0000:00:05.0", config(command=4), "edu")
    add_device(tmp_path, "0000:00:1c.0", config(kind=6, express=4), "pcieport")
    add_device(
        tmp_path, "0000:00:1c.0/0000:01:00.0", config(express=0, ats=True, pasid=True), "nvme"
    )
    add_device(tmp_path, "0000:00:1e.0", config(kind=6, express=7))
    add_device(tmp_path, "0000:00:1e.0/0000:02:01.0", config(command=4))
    add_device(tmp_path, "0000:00:1f.0", config(kind=6))
    add_device(tmp_path, "0000:00:1f.0/0000:03:01.0", config())
    found = {d.name: d for d in all_devices(host)}
    assert list(found)[:2] == ["0000:00:05.0", "0000:00:1c.0"]
    edu, nvme = found["0000:00:05.0"], found["0000:01:00.0"]
    assert edu == PciDevice(0, 0x28, (0x28,), "edu", False, True, False, False, False)
    assert nvme == PciDevice(0, 0x100, (0xE0, 0x100), "nvme", False, False, False, True, True)
    assert found["0000:00:1c.0"].bridge
    assert found["0000:02:01.0"].aliased
    assert found["0000:03:01.0"].aliased
    assert read_device(host, 0x29) is None


def test_a_virtual_function_is_below_its_physical_ones_unit(tmp_path: Path) -> None:
    add_device(tmp_path, "0000:00:1c.0", config(kind=6, express=4))
    add_device(tmp_path, "0000:00:1c.0/0000:01:00.0", config(express=0))
    add_device(tmp_path, "0000:00:1c.0/0000:01:10.0", config(express=0))
    virtual = tmp_path / "sys/bus/pci/devices/0000:01:10.0"
    (virtual / "physfn").symlink_to("../0000:01:00.0")
    found = read_device(Host(str(tmp_path)), 0x180)
    assert found is not None
    assert (found.source_id, found.chain) == (0x180, (0xE0, 0x100))


def test_a_configuration_space_of_garbage_ends_in_a_device(tmp_path: Path) -> None:
    add_device(tmp_path, "0000:00:05.0", b"\xff" * 4096)
    add_device(tmp_path, "0000:00:06.0", bytes([0, 0, 0, 0, 0, 0, 0x10] + [0x40] * 4089))
    add_device(tmp_path, "0000:00:07.0", b"")
    assert len(all_devices(Host(str(tmp_path)))) == 3


def test_a_host_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no DMAR table: .*: switch VT-d on"):
        read_dmar(Host(str(tmp_path)))


def test_units_that_the_kernels_driver_has(tmp_path: Path) -> None:
    """What sysfs tells of them is shown, without access to their registers."""
    host = Host(str(tmp_path))
    there = tmp_path / "sys/firmware/acpi/tables"
    there.mkdir(parents=True)
    (there / "DMAR").write_bytes(QEMU_TABLE)
    shown = tmp_path / "sys/class/iommu/dmar0/intel-iommu"
    shown.mkdir(parents=True)
    for name, text in (("version", "1:0"), ("cap", "d2008c222f0606"), ("ecap", "f42")):
        (shown / name).write_text(text + "\n")
    assert is_driven(host, "dmar0")
    [found] = find_units(host, read_dmar(host), write=True)
    record = unit_record(host, found, {})
    assert (record["state"], record["base"]) == ("driver", 0xFED9_0000)
    assert record["capabilities"][:4] == [
        "modes legacy", "levels 3, 4", "pages of 4 KiB, 2 MiB, 1 GiB", "addresses of 48 bits",
    ]  # fmt: skip
    text = "\n".join(unit_lines(record))
    assert "state: this kernel's driver has it" in text
    assert "endpoint 00:05.0" in text
