"""VFIO: open devices, and the address spaces that they use, in a container or in iommufd.

Everything here is one call of the kernel or a few. What has to be done in which order, and why, is
for :mod:`pkernfs.vmm.takeover` and docs/dma.md, "After the jump". Structures and numbers are in
:mod:`pkernfs.vmm.uapi`, binding to a driver is in :mod:`pkernfs.vmm.sysfs`.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from pathlib import Path
from typing import NamedTuple, Protocol

from pkernfs.errors import VfioError
from pkernfs.host import pci_config
from pkernfs.quantities import Iova
from pkernfs.vmm import sysfs, uapi

CONTAINER = Path("/dev/vfio/vfio")
IOMMUFD = Path("/dev/iommu")

#: Permissions of a mapping: a device may load from it, store into it, or both.
READ, WRITE = 1, 2

_Argument = ctypes.Structure | ctypes.c_int | ctypes.Array[ctypes.c_char] | int


def _call(what: str, fd: int, request: int, argument: _Argument = 0) -> int:
    """Call ioctl(2); a structure is passed by its address, and changed in place.

    :raises VfioError: the kernel refuses it.
    """
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise VfioError(f"{what}: {uapi.request_name(request)}: {error.strerror}") from error


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise VfioError(f"{path}: {error.strerror}") from error


# ------------------------------------------------------------------------------ nodes


def cdev_of(bdf: str) -> Path | None:
    """Return the device's node for iommufd; None if the kernel has none.

    The kernel has nodes if it is built with CONFIG_VFIO_DEVICE_CDEV and vfio-pci has the device.

    :raises VfioError: there is no such device.
    """
    names = [path.name for path in sysfs.device_path(bdf).glob("vfio-dev/vfio*")]
    found = [Path("/dev/vfio/devices") / name for name in names]
    return next((path for path in found if path.exists()), None)


def has_iommufd(bdf: str) -> bool:
    """Tell whether a device that is bound to vfio-pci can be opened through iommufd.

    :raises VfioError: there is no such device.
    """
    return IOMMUFD.exists() and cdev_of(bdf) is not None


# ------------------------------------------------------------------------------ devices


class RegionInfo(NamedTuple):
    """The place of a region (a BAR, the configuration space) in a device's descriptor; bytes."""

    offset: int
    size: int
    mappable: bool


class Device:
    """An open device. The kernel stops its DMA when its last descriptor and mapping are closed.

    :ivar bdf: the device's name
    :ivar fd: its descriptor, which may be handed to another process
    """

    def __init__(self, bdf: str, fd: int) -> None:
        self.bdf = bdf
        self.fd = fd
        self._bars: list[mmap.mmap] = []

    def region(self, index: int) -> RegionInfo:
        """Ask where a region is, by its VFIO_PCI_..._REGION_INDEX.

        :raises VfioError: the device has no such region.
        """
        info = uapi.vfio_region_info(argsz=ctypes.sizeof(uapi.vfio_region_info), index=index)
        _call(f"{self.bdf}: region {index}", self.fd, uapi.VFIO_DEVICE_GET_REGION_INFO, info)
        mappable = bool(info.flags & uapi.VFIO_REGION_INFO_FLAG_MMAP)
        return RegionInfo(info.offset, info.size, mappable)

    def map_bar(self, number: int) -> mmap.mmap:
        """Map the registers of a BAR, 0 to 5, to be loaded and stored in place.

        :raises VfioError: the device has no such BAR, or it cannot be mapped.
        """
        info = self.region(uapi.VFIO_PCI_BAR0_REGION_INDEX + number)
        if not info.mappable:
            raise VfioError(f"{self.bdf}: BAR {number} cannot be mapped")
        self._bars.append(mmap.mmap(self.fd, info.size, offset=info.offset))
        return self._bars[-1]

    def read_config(self, at: int) -> int:
        """Load the 16-bit word at offset ``at`` of the configuration space, as VFIO shows it.

        :raises VfioError: the kernel refuses it.
        """
        start = self.region(uapi.VFIO_PCI_CONFIG_REGION_INDEX).offset
        return int.from_bytes(os.pread(self.fd, 2, start + at), "little")

    def write_config(self, at: int, word: int) -> None:
        """Store a 16-bit word at offset ``at`` of the configuration space.

        :raises VfioError: the kernel refuses it.
        """
        start = self.region(uapi.VFIO_PCI_CONFIG_REGION_INDEX).offset
        os.pwrite(self.fd, word.to_bytes(2, "little"), start + at)

    def set_master(self, on: bool) -> None:
        """Switch the device's bus mastering on or off: whether it may make requests.

        :raises VfioError: the kernel refuses it.
        """
        command = self.read_config(pci_config.COMMAND) & ~pci_config.COMMAND_MASTER
        self.write_config(pci_config.COMMAND, command | (pci_config.COMMAND_MASTER if on else 0))

    def close(self) -> None:
        """Close the device, and the mappings of its BARs, which would keep it open.

        :raises BufferError: somebody has a pointer into a mapping.
        """
        while self._bars:
            self._bars.pop().close()
        os.close(self.fd)


# ------------------------------------------------------------------------------ address spaces


class AddressSpace(Protocol):
    """The IOVAs that some devices use, and the memory of this process that they reach.

    Addresses and lengths are in bytes, multiples of 4096. Every call raises VfioError if the kernel
    refuses it.
    """

    #: True from when ranges can be mapped.
    ready: bool

    @property
    def fds(self) -> dict[str, int]:
        """The descriptors that keep the space, each with a name."""
        ...

    def prepare(self, bdf: str) -> None:
        """Open what a device needs that is bound to vfio-pci; nothing changes for the device."""
        ...

    def add(self, bdf: str) -> None:
        """Have a device use these addresses, where that comes before opening it; be ready then."""
        ...

    def map(self, iova: Iova, vaddr: int, length: int, perm: int) -> None:
        """Have ``iova`` reach this process's memory at ``vaddr``, which the kernel pins.

        :param perm: READ, WRITE or both
        """
        ...

    def unmap(self, iova: Iova, length: int) -> None:
        """Take mappings away that lie in a range."""
        ...

    def open(self, bdf: str) -> Device:
        """Open the device, which uses these addresses then; its bus mastering is off."""
        ...

    def close(self) -> None:
        """Close the descriptors. The caller has closed the devices before."""
        ...


class Container:
    """A VFIO container of type 1 (v2). It is ready to be mapped into when a group is in it.

    :raises VfioError: the kernel has no VFIO, or no IOMMU of this type.
    """

    def __init__(self) -> None:
        self.ready = False
        self._groups: dict[int, int] = {}
        self._added: set[int] = set()
        self.fd = _open(CONTAINER)
        try:
            self._check()
        except VfioError:
            os.close(self.fd)
            raise

    def _check(self) -> None:
        if _call("VFIO", self.fd, uapi.VFIO_GET_API_VERSION) != uapi.VFIO_API_VERSION:
            raise VfioError(f"{CONTAINER}: a version of VFIO that is not known")
        if not _call("VFIO", self.fd, uapi.VFIO_CHECK_EXTENSION, uapi.VFIO_TYPE1v2_IOMMU):
            raise VfioError(f"{CONTAINER}: no type 1 IOMMU: modprobe vfio_iommu_type1")

    @property
    def fds(self) -> dict[str, int]:
        """The container's descriptor and those of its groups."""
        return {"container": self.fd, **{f"group-{n}": fd for n, fd in self._groups.items()}}

    def prepare(self, bdf: str) -> None:
        """Open the device's group.

        :raises VfioError: it is in use, or a device of it has a driver of another kind.
        """
        group = sysfs.group_of(bdf)
        if group in self._groups:
            return
        fd = _open(Path(f"/dev/vfio/{group}"))
        status = uapi.vfio_group_status(argsz=ctypes.sizeof(uapi.vfio_group_status))
        try:
            _call(f"group {group}", fd, uapi.VFIO_GROUP_GET_STATUS, status)
            if not status.flags & uapi.VFIO_GROUP_FLAGS_VIABLE:
                raise VfioError(f"group {group}: not viable: a device of it has another driver")
        except VfioError:
            os.close(fd)
            raise
        self._groups[group] = fd

    def add(self, bdf: str) -> None:
        """Add the device's group: all devices of the group use these addresses now.

        :raises VfioError: the kernel refuses it.
        """
        self.prepare(bdf)
        group = sysfs.group_of(bdf)
        if group in self._added:
            return
        container = ctypes.c_int(self.fd)
        _call(f"group {group}", self._groups[group], uapi.VFIO_GROUP_SET_CONTAINER, container)
        if not self._added:
            _call(f"group {group}", self.fd, uapi.VFIO_SET_IOMMU, uapi.VFIO_TYPE1v2_IOMMU)
        self._added.add(group)
        self.ready = True

    def map(self, iova: Iova, vaddr: int, length: int, perm: int) -> None:
        """Map a range with VFIO_IOMMU_MAP_DMA.

        :raises VfioError: the kernel refuses it.
        """
        size = ctypes.sizeof(uapi.vfio_iommu_type1_dma_map)
        flags = uapi.VFIO_DMA_MAP_FLAG_READ if perm & READ else 0
        flags |= uapi.VFIO_DMA_MAP_FLAG_WRITE if perm & WRITE else 0
        request = uapi.vfio_iommu_type1_dma_map(size, flags, vaddr, iova, length)
        _call(f"map {iova:#x}", self.fd, uapi.VFIO_IOMMU_MAP_DMA, request)

    def unmap(self, iova: Iova, length: int) -> None:
        """Unmap a range with VFIO_IOMMU_UNMAP_DMA.

        :raises VfioError: the kernel refuses it.
        """
        size = ctypes.sizeof(uapi.vfio_iommu_type1_dma_unmap)
        request = uapi.vfio_iommu_type1_dma_unmap(size, 0, iova, length)
        _call(f"unmap {iova:#x}", self.fd, uapi.VFIO_IOMMU_UNMAP_DMA, request)

    def open(self, bdf: str) -> Device:
        """Open the device with VFIO_GROUP_GET_DEVICE_FD; add its group before, if need be.

        :raises VfioError: the kernel refuses it.
        """
        self.add(bdf)
        name = ctypes.create_string_buffer(bdf.encode())
        group = self._groups[sysfs.group_of(bdf)]
        return Device(bdf, _call(bdf, group, uapi.VFIO_GROUP_GET_DEVICE_FD, name))

    def close(self) -> None:
        """Close the groups and the container."""
        for fd in self._groups.values():
            os.close(fd)
        os.close(self.fd)


class Ioas:
    """An address space of iommufd (IOAS). It can be mapped into before any device uses it.

    :raises VfioError: the kernel has no iommufd.
    """

    def __init__(self) -> None:
        self.ready = True
        self._nodes: dict[str, int] = {}
        self.fd = _open(IOMMUFD)
        request = uapi.iommu_ioas_alloc(size=ctypes.sizeof(uapi.iommu_ioas_alloc))
        try:
            _call("address space", self.fd, uapi.IOMMU_IOAS_ALLOC, request)
        except VfioError:
            os.close(self.fd)
            raise
        self.id: int = request.out_ioas_id

    @property
    def fds(self) -> dict[str, int]:
        """The descriptor of /dev/iommu; devices have their own."""
        return {"iommufd": self.fd}

    def prepare(self, bdf: str) -> None:
        """Open the device's node, which cannot be used before it is bound.

        :raises VfioError: the device has none, or it is in use.
        """
        if bdf in self._nodes:
            return
        path = cdev_of(bdf)
        if path is None:
            raise VfioError(f"{bdf}: no node for iommufd: a kernel with CONFIG_VFIO_DEVICE_CDEV")
        self._nodes[bdf] = _open(path)

    def add(self, bdf: str) -> None:
        """Open the device's node: binding and attaching are one with opening.

        :raises VfioError: the device has none, or it is in use.
        """
        self.prepare(bdf)

    def map(self, iova: Iova, vaddr: int, length: int, perm: int) -> None:
        """Map a range with IOMMU_IOAS_MAP.

        :raises VfioError: the kernel refuses it.
        """
        flags = uapi.IOMMU_IOAS_MAP_FIXED_IOVA
        flags |= uapi.IOMMU_IOAS_MAP_READABLE if perm & READ else 0
        flags |= uapi.IOMMU_IOAS_MAP_WRITEABLE if perm & WRITE else 0
        size = ctypes.sizeof(uapi.iommu_ioas_map)
        request = uapi.iommu_ioas_map(size, flags, self.id, 0, vaddr, length, iova)
        _call(f"map {iova:#x}", self.fd, uapi.IOMMU_IOAS_MAP, request)

    def unmap(self, iova: Iova, length: int) -> None:
        """Unmap a range with IOMMU_IOAS_UNMAP.

        :raises VfioError: the kernel refuses it.
        """
        size = ctypes.sizeof(uapi.iommu_ioas_unmap)
        request = uapi.iommu_ioas_unmap(size, self.id, iova, length)
        _call(f"unmap {iova:#x}", self.fd, uapi.IOMMU_IOAS_UNMAP, request)

    def open(self, bdf: str) -> Device:
        """Open the device with VFIO_DEVICE_BIND_IOMMUFD, then attach it to this address space.

        :raises VfioError: the kernel refuses it.
        """
        self.prepare(bdf)
        node = self._nodes[bdf]
        size = ctypes.sizeof(uapi.vfio_device_bind_iommufd)
        bound = uapi.vfio_device_bind_iommufd(size, 0, self.fd)
        _call(bdf, node, uapi.VFIO_DEVICE_BIND_IOMMUFD, bound)
        size = ctypes.sizeof(uapi.vfio_device_attach_iommufd_pt)
        attached = uapi.vfio_device_attach_iommufd_pt(size, 0, self.id)
        _call(bdf, node, uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attached)
        del self._nodes[bdf]  # the device's from now on
        return Device(bdf, node)

    def close(self) -> None:
        """Close /dev/iommu, and nodes that have not become devices."""
        for fd in self._nodes.values():
            os.close(fd)
        os.close(self.fd)
