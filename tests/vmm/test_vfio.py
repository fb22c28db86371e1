"""pkernfs.vmm.vfio: its structures and numbers, and what it asks of the kernel."""

from __future__ import annotations

import ctypes
import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest

from pkernfs.vmm import vfio
from support import uapi

BDF = "0000:00:05.0"


def test_headers(tmp_path: Path) -> None:
    # Debian 12's have no iommufd; tests/lab/test_take_over.py compares all with Debian 13's.
    expected = {name: value for name, value in uapi.ours().items() if not uapi.missing(name)}
    assert len(expected) > 30
    assert uapi.theirs(list(expected), tmp_path) == expected


def test_ioctls_are_told_apart() -> None:
    numbers = [n for name, n in uapi.constants().items() if n > 0x3B00]
    assert len(numbers) == len(set(numbers)) > 10


class Kernel:
    """What is asked of the kernel, with the structures as they were passed; it says yes."""

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
        self.asked.append((vfio._NAMES[request], fields))
        if request == vfio.IOMMU_IOAS_ALLOC:
            argument.out_ioas_id = 77
        if request == vfio.VFIO_GROUP_GET_STATUS:
            argument.flags = vfio.VFIO_GROUP_FLAGS_VIABLE
        return {vfio.VFIO_CHECK_EXTENSION: 1, vfio.VFIO_GROUP_GET_DEVICE_FD: 9}.get(request, 0)

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
    monkeypatch.setattr(vfio, "group_of", lambda bdf: 12)
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
    space.map(0x1000, 0x7000_0000, 0x2000, vfio.READ | vfio.WRITE)
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
    space.unmap(0x1000, 0x2000)
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
    with pytest.raises(vfio.VfioError) as refused:
        space.add(BDF)
    assert str(refused.value) == "group 12: VFIO_GROUP_SET_CONTAINER: Operation not permitted"
