"""pkernfs.vmm.sysfs, in a tree of files like those of /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import VfioError
from pkernfs.quantities import Iova
from pkernfs.vmm import sysfs
from pkernfs.vmm.sysfs import ReservedRange

BDF, OTHER = "0000:00:05.0", "0000:00:06.0"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device without a driver, and vfio-pci, which takes nothing by itself."""
    monkeypatch.setattr(sysfs, "PCI", tmp_path)
    monkeypatch.setattr(sysfs, "GROUPS", tmp_path / "groups")
    (tmp_path / "devices" / BDF).mkdir(parents=True)
    (tmp_path / "devices" / BDF / "config").write_bytes(bytes(range(64)))
    for driver in ("vfio-pci", "e1000e"):
        (tmp_path / "drivers" / driver).mkdir(parents=True)
    return tmp_path


def take(tree: Path, driver: str) -> None:
    """Have a driver take the device."""
    (tree / "devices" / BDF / "driver").symlink_to(tree / "drivers" / driver)


def test_groups(tree: Path) -> None:
    with pytest.raises(VfioError, match=f"{BDF}: in no IOMMU group: boot with intel_iommu=on"):
        sysfs.group_of(BDF)
    group = tree / "groups/12"
    for name in (OTHER, BDF):
        (group / "devices" / name).mkdir(parents=True)
    (tree / "devices" / BDF / "iommu_group").symlink_to(group)
    assert sysfs.group_of(BDF) == 12
    assert sysfs.group_members(12) == [BDF, OTHER]
    (group / "reserved_regions").write_text(
        "0x00000000fee00000 0x00000000feefffff msi\n0x1000 0x1fff direct\n"
    )
    assert sysfs.reserved_ranges(12) == [
        ReservedRange(Iova(0xFEE0_0000), Iova(0xFEEF_FFFF), "msi"),
        ReservedRange(Iova(0x1000), Iova(0x1FFF), "direct"),
    ]


def test_binding_is_told_by_name(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VfioError, match=f"{BDF}: vfio-pci does not take it"):
        sysfs.bind(BDF)
    assert (tree / "devices" / BDF / "driver_override").read_text() == "vfio-pci"
    assert (tree / "drivers_probe").read_text() == BDF
    (tree / "drivers_probe").unlink()
    take(tree, "vfio-pci")
    sysfs.bind(BDF)
    assert not (tree / "drivers_probe").exists()
    sysfs.unbind(BDF)
    assert (tree / "drivers/vfio-pci/unbind").read_text() == BDF
    assert (tree / "devices" / BDF / "driver_override").read_text() == "\n"


def test_a_device_of_another_driver_is_left_alone(tree: Path) -> None:
    take(tree, "e1000e")
    assert sysfs.driver_of(BDF) == "e1000e"
    with pytest.raises(VfioError, match=f"{BDF}: e1000e has it"):
        sysfs.bind(BDF)
    assert not (tree / "devices" / BDF / "driver_override").exists()


def test_a_device_that_is_not_there(tree: Path) -> None:
    with pytest.raises(VfioError, match=f"{OTHER}: no such device"):
        sysfs.driver_of(OTHER)


def test_configuration_space(tree: Path) -> None:
    assert sysfs.read_config(BDF, 4) == 0x0504
    sysfs.write_config(BDF, 4, 0x1234)
    assert sysfs.read_config(BDF, 4) == 0x1234
    assert (tree / "devices" / BDF / "config").read_bytes()[:8] == b"\0\1\2\3\x34\x12\6\7"
