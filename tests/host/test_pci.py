"""PCI devices as sysfs has them, and the unit that each is below."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import InvalidError
from pkernfs.host.dmar import BRIDGE, ENDPOINT, IOAPIC, PathStep, Scope, parse
from pkernfs.host.pci import (
    PciDevice,
    all_devices,
    covers,
    driver_module_of,
    group_of,
    modalias_of,
    parse_device,
    read_device,
    reserved_memory_of,
    unit_of,
)
from pkernfs.host.sysroot import Host
from pkernfs.quantities import SourceId
from support.dmar_tables import TWO_UNITS, add_device, config, drhd, scope, table


def device(*chain: int, segment: int = 0) -> PciDevice:
    ids = tuple(map(SourceId, chain))
    return PciDevice(segment, ids[-1], ids, None, False, True, False, False, False)


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


def test_a_scope_is_matched_as_linux_does() -> None:
    """dmar_match_pci_path(): from the root bus, or one step on the bus of the device itself."""
    below = device(0xE8, 0x110, 0x218)  # 00:1d.0, 01:02.0, 02:03.0
    root, own = PathStep(0x1D, 0), PathStep(3, 0)
    for bus, path, matches in (
        (0, (root, PathStep(2, 0), own), True),
        (2, (own,), True),
        (1, (PathStep(2, 0), own), False),  # from the middle
        (0, (own,), False),
        (0, (root,), False),  # a bridge above it, but said to be an endpoint
        (0, (), False),
    ):
        assert covers((Scope(ENDPOINT, 0, bus, path),), below) == matches
    for bus, path in ((0, (root,)), (0, (root, PathStep(2, 0))), (1, (PathStep(2, 0),))):
        assert covers((Scope(BRIDGE, 0, bus, path),), below)


def test_of_several_units_the_last_has_a_device() -> None:
    """dmar_register_drhd_unit() puts each at the head of its list, and INCLUDE_ALL at the tail."""
    one = scope(ENDPOINT, 0, (2, 0))
    table_of_four = table(drhd(0x1000, flags=1), drhd(0x2000, one), drhd(0x3000, one), drhd(0x4000))
    found = unit_of(parse(table_of_four), device(0x10))
    assert found is not None
    assert found.base == 0x3000
    found = unit_of(parse(table_of_four), device(0x18))
    assert found is not None
    assert found.base == 0x1000


def test_reserved_memory_is_the_devices_that_it_names() -> None:
    dmar = parse(TWO_UNITS)
    assert len(reserved_memory_of(dmar, device(0xA0))) == 1
    assert reserved_memory_of(dmar, device(0xA8)) == []
    assert reserved_memory_of(dmar, device(0xA0, segment=1)) == []
    assert not covers((Scope(IOAPIC, 0, 0, (PathStep(0x14, 0),)),), device(0xA0))


# ---------------------------------------------------------------------- sysfs


def test_a_device_of_another_segment_has_no_root_table() -> None:
    assert parse_device("0000:00:05.0") == parse_device("00:05.0") == 0x28
    with pytest.raises(InvalidError, match="only PCI segment 0000"):
        parse_device("0001:00:05.0")


def test_a_device_below_a_vmd_is_named_by_the_vmd() -> None:
    for name in ("10000:e1:00.0", "5d0505:01:00.0"):
        with pytest.raises(InvalidError, match=f"'{name}': it is below a VMD, .*: name that one"):
            parse_device(name)


def test_requests_from_below_a_vmd_are_the_vmds(tmp_path: Path) -> None:
    vmd, drive = "0000:00:0e.0", "10000:e1:00.0"
    root = tmp_path / "sys/devices/pci0000:00"
    add_device(tmp_path, vmd, config(command=4, express=9), "vmd")
    add_device(tmp_path, f"{vmd}/pci10000:e0/10000:e0:06.0", config(kind=6, express=4))
    add_device(tmp_path, f"{vmd}/pci10000:e0/10000:e0:06.0/{drive}", config(command=4), "nvme")
    group = tmp_path / "sys/kernel/iommu_groups/9/devices"
    for name in (vmd, drive):
        (group / name).mkdir(parents=True)
    (root / vmd / "iommu_group").symlink_to(group.parent)
    host = Host(str(tmp_path))
    above = read_device(host, SourceId(0x70))
    assert above is not None
    assert [d.name for d in all_devices(host)] == [vmd, "10000:e0:06.0", drive]
    [below] = group_of(host, above)
    assert (below.name, below.driver, below.chain, below.aliased) == (drive, "nvme", (0x70,), True)
    dmar = parse(TWO_UNITS)
    assert unit_of(dmar, below) == unit_of(dmar, above) == dmar.units[2]


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
    at, port, below = SourceId(0x28), SourceId(0xE0), SourceId(0x100)
    assert edu == PciDevice(0, at, (at,), "edu", False, True, False, False, False)
    assert nvme == PciDevice(0, below, (port, below), "nvme", False, False, False, True, True)
    assert found["0000:00:1c.0"].bridge
    assert found["0000:02:01.0"].aliased
    assert found["0000:03:01.0"].aliased
    assert read_device(host, SourceId(0x29)) is None


def test_a_virtual_function_is_below_its_physical_ones_unit(tmp_path: Path) -> None:
    add_device(tmp_path, "0000:00:1c.0", config(kind=6, express=4))
    add_device(tmp_path, "0000:00:1c.0/0000:01:00.0", config(express=0))
    add_device(tmp_path, "0000:00:1c.0/0000:01:10.0", config(express=0))
    virtual = tmp_path / "sys/bus/pci/devices/0000:01:10.0"
    (virtual / "physfn").symlink_to("../0000:01:00.0")
    found = read_device(Host(str(tmp_path)), SourceId(0x180))
    assert found is not None
    assert (found.source_id, found.chain) == (0x180, (0xE0, 0x100))


def test_a_configuration_space_of_which_little_is_shown(tmp_path: Path) -> None:
    """64 bytes for all but root: nothing is known of ATS then, on the device or below a bridge."""
    add_device(tmp_path, "0000:00:1c.0", config(kind=6, express=4))
    add_device(tmp_path, "0000:00:1c.0/0000:01:00.0", config(express=0, ats=True)[:64])
    add_device(tmp_path, "0000:00:1d.0", config(kind=6, express=4)[:64])
    add_device(tmp_path, "0000:00:1d.0/0000:02:00.0", config(express=0)[:256])
    found = {device.name: device.known for device in all_devices(Host(str(tmp_path)))}
    assert found == {
        "0000:00:1c.0": True, "0000:01:00.0": False, "0000:00:1d.0": False, "0000:02:00.0": False,
    }  # fmt: skip


def test_a_configuration_space_of_garbage_ends_in_a_device(tmp_path: Path) -> None:
    add_device(tmp_path, "0000:00:05.0", b"\xff" * 4096)
    add_device(tmp_path, "0000:00:06.0", bytes([0, 0, 0, 0, 0, 0, 0x10] + [0x40] * 4089))
    add_device(tmp_path, "0000:00:07.0", b"")
    assert len(all_devices(Host(str(tmp_path)))) == 3


def test_the_group_is_without_bridges(tmp_path: Path) -> None:
    add_device(tmp_path, "0000:00:1c.0", config(kind=6))
    for number in (0, 1):
        add_device(tmp_path, f"0000:00:1c.0/0000:01:00.{number}", config())
    group = tmp_path / "sys/kernel/iommu_groups/7/devices"
    for name in ("0000:00:1c.0", "0000:01:00.0", "0000:01:00.1", "0000:01:00.2"):
        (group / name).mkdir(parents=True)  # the last has gone since
    host = Host(str(tmp_path))
    found = read_device(host, SourceId(0x100))
    assert found is not None
    assert group_of(host, found) == []  # no driver has the units
    (tmp_path / "sys/bus/pci/devices/0000:01:00.0/iommu_group").symlink_to(group.parent)
    assert [d.name for d in group_of(host, found)] == ["0000:01:00.1"]


def test_drivers(tmp_path: Path) -> None:
    host = Host(str(tmp_path))
    add_device(tmp_path, "0000:00:05.0", config(), "virtio-pci")
    add_device(tmp_path, "0000:00:06.0", config())
    assert driver_module_of(host, "0000:00:05.0") is None  # it is built in
    (tmp_path / "sys/module/virtio_pci").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/drivers/virtio-pci/module").symlink_to(
        tmp_path / "sys/module/virtio_pci"
    )
    assert driver_module_of(host, "0000:00:05.0") == "virtio_pci"
    assert driver_module_of(host, "0000:00:06.0") is None
    (tmp_path / "sys/bus/pci/devices/0000:00:06.0/modalias").write_text("pci:v1\n")
    assert modalias_of(host, "0000:00:06.0") == "pci:v1"
    assert modalias_of(host, "0000:00:07.0") is None
