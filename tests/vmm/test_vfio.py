"""pkernfs.vmm.vfio: what it asks of the kernel, with which structures."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from pkernfs.errors import VfioError
from pkernfs.host import pci_config
from pkernfs.quantities import Iova
from pkernfs.vmm import sysfs, uapi, vfio

BDF = "0000:00:05.0"


class Kernel:
    """Notes what is asked of the kernel, with the structures as they were passed; says yes."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, int]]] = []

    def ioctl(self, fd: int, request: int, argument: Any = 0) -> int:
        fields: dict[str, int] = {"fd": fd}
        if isinstance(argument, ctypes.Structure):
            fields |= {f[0]: getattr(argument, f[0]) for f in argument._fields_}
        elif isinstance(argument, ctypes.Array):
            fields["bytes"] = len(argument)
        else:
            fields["value"] = getattr(argument, "value", argument)
        self.asked.append((uapi.request_name(request), fields))
        if request == uapi.IOMMU_IOAS_ALLOC:
            argument.out_ioas_id = 77
        if request == uapi.VFIO_GROUP_GET_STATUS:
            argument.flags = uapi.VFIO_GROUP_FLAGS_VIABLE
        return {uapi.VFIO_CHECK_EXTENSION: 1, uapi.VFIO_GROUP_GET_DEVICE_FD: 9}.get(request, 0)

    @property
    def names(self) -> list[str]:
        """The ioctls, in order."""
        return [name for name, _fields in self.asked]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    opened: dict[str, int] = {"vfio": 3, "iommu": 4, "12": 5, "vfio0": 6}
    monkeypatch.setattr(fcntl, "ioctl", made.ioctl)
    monkeypatch.setattr(vfio, "_open", lambda path: opened[path.name])
    monkeypatch.setattr(sysfs, "group_of", lambda bdf: 12)
    monkeypatch.setattr(vfio, "cdev_of", lambda bdf: Path("/dev/vfio/devices/vfio0"))
    return made


def test_a_container(kernel: Kernel) -> None:
    space = vfio.Container()
    assert not space.ready
    space.prepare(BDF)
    assert kernel.names == [
        "VFIO_GET_API_VERSION", "VFIO_CHECK_EXTENSION", "VFIO_GROUP_GET_STATUS"
    ]  # fmt: skip
    kernel.asked.clear()
    space.add(BDF)
    assert space.ready
    space.map(0x1000, 0x7000_0000, 0x2000, vfio.READ)
    device = space.open(BDF)
    assert (device.fd, space.fds) == (9, {"container": 3, "group-12": 5})
    assert kernel.asked == [
        ("VFIO_GROUP_SET_CONTAINER", {"fd": 5, "value": 3}),
        ("VFIO_SET_IOMMU", {"fd": 3, "value": 3}),
        ("VFIO_IOMMU_MAP_DMA",
         {"fd": 3, "argsz": 32, "flags": 1, "vaddr": 0x7000_0000, "iova": 0x1000, "size": 0x2000}),
        ("VFIO_GROUP_GET_DEVICE_FD", {"fd": 5, "bytes": len(BDF) + 1}),
    ]  # fmt: skip
    kernel.asked.clear()
    space.unmap(0x1000, 0x2000)
    assert kernel.asked == [
        ("VFIO_IOMMU_UNMAP_DMA", {"fd": 3, "argsz": 24, "flags": 0, "iova": 0x1000, "size": 0x2000})
    ]


def test_an_ioas(kernel: Kernel) -> None:
    space = vfio.Ioas()
    assert (space.ready, space.id, space.fds) == (True, 77, {"iommufd": 4})
    space.map(Iova(0x1000), 0x7000_0000, 0x2000, vfio.READ | vfio.WRITE)
    space.prepare(BDF)
    space.add(BDF)
    assert kernel.names == ["IOMMU_IOAS_ALLOC", "IOMMU_IOAS_MAP"]
    fields = kernel.asked[1][1]
    assert fields["flags"] == 7  # fixed IOVA, writeable, readable
    assert (fields["ioas_id"], fields["size"]) == (77, 40)
    assert (fields["user_va"], fields["iova"], fields["length"]) == (0x7000_0000, 0x1000, 0x2000)
    kernel.asked.clear()
    assert space.open(BDF).fd == 6
    assert kernel.asked == [
        ("VFIO_DEVICE_BIND_IOMMUFD",
         {"fd": 6, "argsz": 16, "flags": 0, "iommufd": 4, "out_devid": 0}),
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", {"fd": 6, "argsz": 12, "flags": 0, "pt_id": 77}),
    ]  # fmt: skip
    kernel.asked.clear()
    space.unmap(Iova(0x1000), 0x2000)
    assert kernel.asked == [
        ("IOMMU_IOAS_UNMAP", {"fd": 4, "size": 24, "ioas_id": 77, "iova": 0x1000, "length": 0x2000})
    ]


def test_what_the_kernel_refuses_is_one_line(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, request: int, argument: Any = 0) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    space = vfio.Container()
    space.prepare(BDF)
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(VfioError) as refused:
        space.add(BDF)
    assert str(refused.value) == "group 12: VFIO_GROUP_SET_CONTAINER: Operation not permitted"


def test_the_registers_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions are parts of its descriptor; bus mastering is one bit of one of them."""
    file = tmp_path / "device"
    file.write_bytes(bytes(0x3000))
    asked: list[int] = []

    def tell(fd: int, request: int, info: uapi.vfio_region_info) -> int:
        assert request == uapi.VFIO_DEVICE_GET_REGION_INFO
        asked.append(info.index)
        is_bar = info.index == uapi.VFIO_PCI_BAR0_REGION_INDEX
        info.offset, info.size = (0x1000, 0x1000) if is_bar else (0x2000, 0x100)
        info.flags = uapi.VFIO_REGION_INFO_FLAG_MMAP if is_bar else 0
        return 0

    monkeypatch.setattr(fcntl, "ioctl", tell)
    device = vfio.Device(BDF, os.open(file, os.O_RDWR))
    device.map_bar(0)[4] = 0x5A
    with pytest.raises(VfioError, match=f"{BDF}: BAR 1 cannot be mapped"):
        device.map_bar(1)
    device.write_config(pci_config.COMMAND, pci_config.COMMAND_MEMORY)
    device.set_master(True)
    assert device.read_config(pci_config.COMMAND) == 0x6
    device.set_master(False)
    assert device.read_config(pci_config.COMMAND) == 0x2
    device.close()
    content = file.read_bytes()
    assert (content[0x1004], content[0x2004]) == (0x5A, 0x2)
    assert set(asked) == {0, 1, uapi.VFIO_PCI_CONFIG_REGION_INDEX}
