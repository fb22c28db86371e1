"""PCI devices and their address spaces through VFIO: a container, or iommufd where there is one.

Structures and numbers are those of Linux's include/uapi/linux/vfio.h and iommufd.h (6.12), named as
there; a test compares them with the headers. Standard library only. What has to be done in which
order, and why, is the caller's business: docs/dma.md, "After the jump".
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from pathlib import Path
from typing import Protocol

DRIVER = "vfio-pci"
PCI = Path("/sys/bus/pci")
CONTAINER = Path("/dev/vfio/vfio")
IOMMUFD = Path("/dev/iommu")

#: PCI's configuration space: the command register and its bits (linux/pci_regs.h).
PCI_COMMAND = 0x04
PCI_COMMAND_MEMORY, PCI_COMMAND_MASTER = 0x2, 0x4

#: Of a mapping; what the device may do.
READ, WRITE = 1, 2


class VfioError(Exception):
    """What failed and why, in one line."""


# ------------------------------------------------------------------------------ linux/vfio.h

VFIO_API_VERSION = 0
VFIO_TYPE1v2_IOMMU = 3
VFIO_GROUP_FLAGS_VIABLE = 1
VFIO_REGION_INFO_FLAG_MMAP = 4
VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE = 1, 2
VFIO_PCI_BAR0_REGION_INDEX = 0
VFIO_PCI_CONFIG_REGION_INDEX = 7


def _io(number: int) -> int:
    """``_IO(';', number)``: VFIO_TYPE and IOMMUFD_TYPE are both ';'."""
    return ord(";") << 8 | number


VFIO_GET_API_VERSION = _io(100)  # VFIO_BASE + 0
VFIO_CHECK_EXTENSION = _io(101)
VFIO_SET_IOMMU = _io(102)
VFIO_GROUP_GET_STATUS = _io(103)
VFIO_GROUP_SET_CONTAINER = _io(104)
VFIO_GROUP_GET_DEVICE_FD = _io(106)
VFIO_DEVICE_GET_REGION_INFO = _io(108)
VFIO_IOMMU_MAP_DMA = _io(113)
VFIO_IOMMU_UNMAP_DMA = _io(114)
VFIO_DEVICE_BIND_IOMMUFD = _io(118)
VFIO_DEVICE_ATTACH_IOMMUFD_PT = _io(119)

_u32, _u64, _s32 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32


class vfio_group_status(ctypes.Structure):
    _fields_ = (("argsz", _u32), ("flags", _u32))


class vfio_region_info(ctypes.Structure):
    _fields_ = (
        ("argsz", _u32), ("flags", _u32), ("index", _u32), ("cap_offset", _u32),
        ("size", _u64), ("offset", _u64),
    )  # fmt: skip


class vfio_iommu_type1_dma_map(ctypes.Structure):
    _fields_ = (
        ("argsz", _u32), ("flags", _u32), ("vaddr", _u64), ("iova", _u64), ("size", _u64),
    )  # fmt: skip


class vfio_iommu_type1_dma_unmap(ctypes.Structure):
    _fields_ = (("argsz", _u32), ("flags", _u32), ("iova", _u64), ("size", _u64))


class vfio_device_bind_iommufd(ctypes.Structure):
    _fields_ = (
        ("argsz", _u32), ("flags", _u32), ("iommufd", _s32), ("out_devid", _u32),
    )  # fmt: skip


class vfio_device_attach_iommufd_pt(ctypes.Structure):
    _fields_ = (("argsz", _u32), ("flags", _u32), ("pt_id", _u32))


# ------------------------------------------------------------------------------ linux/iommufd.h

IOMMU_IOAS_MAP_FIXED_IOVA, IOMMU_IOAS_MAP_WRITEABLE, IOMMU_IOAS_MAP_READABLE = 1, 2, 4

IOMMU_IOAS_ALLOC = _io(0x81)  # IOMMUFD_CMD_BASE is 0x80, for IOMMU_DESTROY
IOMMU_IOAS_MAP = _io(0x85)
IOMMU_IOAS_UNMAP = _io(0x86)


class iommu_ioas_alloc(ctypes.Structure):
    _fields_ = (("size", _u32), ("flags", _u32), ("out_ioas_id", _u32))


class iommu_ioas_map(ctypes.Structure):
    _fields_ = (
        ("size", _u32), ("flags", _u32), ("ioas_id", _u32), ("__reserved", _u32),
        ("user_va", _u64), ("length", _u64), ("iova", _u64),
    )  # fmt: skip


class iommu_ioas_unmap(ctypes.Structure):
    _fields_ = (("size", _u32), ("ioas_id", _u32), ("iova", _u64), ("length", _u64))


_NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.startswith(("VFIO_", "IOMMU_")) and isinstance(value, int) and value > _io(0)
}
Argument = ctypes.Structure | ctypes.c_int | ctypes.Array[ctypes.c_char] | int


def _call(what: str, fd: int, request: int, argument: Argument = 0) -> int:
    """An ioctl; a structure is passed by its address, and changed in place.

    :raises VfioError: the kernel refuses it.
    """
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        name = _NAMES.get(request, hex(request))
        raise VfioError(f"{what}: {name}: {error.strerror}") from error


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise VfioError(f"{path}: {error.strerror}") from error


# ------------------------------------------------------------------------------ sysfs


def device_path(bdf: str) -> Path:
    """Its directory in sysfs.

    :raises VfioError: there is no such device.
    """
    path = PCI / "devices" / bdf
    if not path.is_dir():
        raise VfioError(f"{bdf}: no such device")
    return path


def driver_of(bdf: str) -> str | None:
    """The driver that it is bound to."""
    link = device_path(bdf) / "driver"
    return link.resolve().name if link.is_symlink() else None


def group_of(bdf: str) -> int:
    """The number of its IOMMU group.

    :raises VfioError: no IOMMU is above it, or the kernel does not use it.
    """
    link = device_path(bdf) / "iommu_group"
    if not link.is_symlink():
        raise VfioError(f"{bdf}: in no IOMMU group: boot with intel_iommu=on")
    return int(link.resolve().name)


def group_members(group: int) -> list[str]:
    """The devices of a group: they change their address space together."""
    return sorted(path.name for path in Path(f"/sys/kernel/iommu_groups/{group}/devices").iterdir())


def reserved_regions(group: int) -> str:
    """Addresses that a group's devices cannot be given: lines of the first, the last, the kind."""
    return Path(f"/sys/kernel/iommu_groups/{group}/reserved_regions").read_text()


def cdev_of(bdf: str) -> Path | None:
    """The device's node for iommufd; None if the kernel has none (CONFIG_VFIO_DEVICE_CDEV)."""
    found = [Path("/dev/vfio/devices") / p.name for p in device_path(bdf).glob("vfio-dev/vfio*")]
    return next((path for path in found if path.exists()), None)


def has_iommufd(bdf: str) -> bool:
    """Whether a device that is bound to vfio-pci can be opened through iommufd."""
    return IOMMUFD.exists() and cdev_of(bdf) is not None


def bind(bdf: str) -> None:
    """Bind a device that has no driver to vfio-pci; nothing if it is bound to it.

    Binding alone leaves the device as it is, if the module has been loaded with disable_idle_d3=1.

    :raises VfioError: another driver has it, or vfio-pci does not take it.
    """
    path = device_path(bdf)
    driver = driver_of(bdf)
    if driver == DRIVER:
        return
    if driver is not None:
        raise VfioError(f"{bdf}: {driver} has it")
    try:
        (path / "driver_override").write_text(DRIVER)
        (PCI / "drivers_probe").write_text(bdf)
    except OSError as error:
        raise VfioError(f"{bdf}: cannot bind it to {DRIVER}: {error.strerror}") from error
    if driver_of(bdf) != DRIVER:
        raise VfioError(f"{bdf}: {DRIVER} does not take it: see the kernel's log")


def unbind(bdf: str) -> None:
    """Take it from vfio-pci again, for any driver."""
    if driver_of(bdf) == DRIVER:
        (PCI / "drivers" / DRIVER / "unbind").write_text(bdf)
    (device_path(bdf) / "driver_override").write_text("\n")


def read_config(bdf: str, at: int) -> int:
    """A 16-bit word of the configuration space, through sysfs."""
    with (device_path(bdf) / "config").open("rb", buffering=0) as config:
        return int.from_bytes(os.pread(config.fileno(), 2, at), "little")


def write_config(bdf: str, at: int, word: int) -> None:
    """Store a 16-bit word in the configuration space, through sysfs."""
    with (device_path(bdf) / "config").open("r+b", buffering=0) as config:
        os.pwrite(config.fileno(), word.to_bytes(2, "little"), at)


# ------------------------------------------------------------------------------ devices


class Device:
    """An open device. When the last descriptor and mapping of it goes, its DMA is stopped."""

    def __init__(self, bdf: str, fd: int) -> None:
        self.bdf = bdf
        self.fd = fd
        self._bars: list[mmap.mmap] = []

    def region(self, index: int) -> vfio_region_info:
        """Where a region (a BAR, the configuration space) is in the descriptor."""
        info = vfio_region_info(argsz=ctypes.sizeof(vfio_region_info), index=index)
        _call(f"{self.bdf}: region {index}", self.fd, VFIO_DEVICE_GET_REGION_INFO, info)
        return info

    def map_bar(self, number: int) -> mmap.mmap:
        """Its registers, to be read and stored in place.

        :raises VfioError: it has no such BAR, or that cannot be mapped.
        """
        info = self.region(VFIO_PCI_BAR0_REGION_INDEX + number)
        if not info.flags & VFIO_REGION_INFO_FLAG_MMAP:
            raise VfioError(f"{self.bdf}: BAR {number} cannot be mapped")
        self._bars.append(mmap.mmap(self.fd, info.size, offset=info.offset))
        return self._bars[-1]

    def read_config(self, at: int) -> int:
        """A 16-bit word of the configuration space, as VFIO shows it."""
        start = self.region(VFIO_PCI_CONFIG_REGION_INDEX).offset
        return int.from_bytes(os.pread(self.fd, 2, start + at), "little")

    def write_config(self, at: int, word: int) -> None:
        """Store a 16-bit word in the configuration space."""
        start = self.region(VFIO_PCI_CONFIG_REGION_INDEX).offset
        os.pwrite(self.fd, word.to_bytes(2, "little"), start + at)

    def set_master(self, on: bool) -> None:
        """Let it do DMA, or not."""
        command = self.read_config(PCI_COMMAND) & ~PCI_COMMAND_MASTER
        self.write_config(PCI_COMMAND, command | (PCI_COMMAND_MASTER if on else 0))

    def close(self) -> None:
        """Give it back, with the mappings of its BARs, which would keep it open.

        :raises BufferError: somebody has a pointer into one.
        """
        while self._bars:
            self._bars.pop().close()
        os.close(self.fd)


class AddressSpace(Protocol):
    """Addresses that devices use, and what they reach."""

    #: Whether ranges can be mapped now.
    ready: bool

    @property
    def fds(self) -> dict[str, int]:
        """The descriptors that keep it, each with a name."""
        ...

    def prepare(self, bdf: str) -> None:
        """Open what a device that is bound to vfio-pci needs; nothing changes for it."""
        ...

    def add(self, bdf: str) -> None:
        """Have it use these addresses, if that can be told from opening it. Ready from then on."""
        ...

    def map(self, iova: int, vaddr: int, length: int, perm: int) -> None:
        """Have ``iova`` reach this process's memory at ``vaddr``, which is pinned."""
        ...

    def unmap(self, iova: int, length: int) -> None:
        """Take away ranges that have been mapped."""
        ...

    def open(self, bdf: str) -> Device:
        """Open the device, which uses these addresses then; its bus mastering is off."""
        ...

    def close(self) -> None:
        """Close the descriptors. Devices are closed first."""
        ...


class Container:
    """A VFIO container of type 1 (v2). There is nothing to map into before a group is in it."""

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
        if _call("VFIO", self.fd, VFIO_GET_API_VERSION) != VFIO_API_VERSION:
            raise VfioError(f"{CONTAINER}: a version of VFIO that is not known")
        if not _call("VFIO", self.fd, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU):
            raise VfioError(f"{CONTAINER}: no type 1 IOMMU: modprobe vfio_iommu_type1")

    @property
    def fds(self) -> dict[str, int]:
        """The container's and its groups'."""
        return {"container": self.fd, **{f"group-{n}": fd for n, fd in self._groups.items()}}

    def prepare(self, bdf: str) -> None:
        """Open its group.

        :raises VfioError: it is in use, or a device of it has a driver of another kind.
        """
        group = group_of(bdf)
        if group in self._groups:
            return
        fd = _open(Path(f"/dev/vfio/{group}"))
        status = vfio_group_status(argsz=ctypes.sizeof(vfio_group_status))
        try:
            _call(f"group {group}", fd, VFIO_GROUP_GET_STATUS, status)
            if not status.flags & VFIO_GROUP_FLAGS_VIABLE:
                raise VfioError(f"group {group}: not viable: a device of it has another driver")
        except VfioError:
            os.close(fd)
            raise
        self._groups[group] = fd

    def add(self, bdf: str) -> None:
        """Add its group: all devices of that use these addresses now."""
        self.prepare(bdf)
        group = group_of(bdf)
        if group in self._added:
            return
        container = ctypes.c_int(self.fd)
        _call(f"group {group}", self._groups[group], VFIO_GROUP_SET_CONTAINER, container)
        if not self._added:
            _call(f"group {group}", self.fd, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU)
        self._added.add(group)
        self.ready = True

    def map(self, iova: int, vaddr: int, length: int, perm: int) -> None:
        """VFIO_IOMMU_MAP_DMA."""
        size = ctypes.sizeof(vfio_iommu_type1_dma_map)
        flags = VFIO_DMA_MAP_FLAG_READ if perm & READ else 0
        flags |= VFIO_DMA_MAP_FLAG_WRITE if perm & WRITE else 0
        request = vfio_iommu_type1_dma_map(size, flags, vaddr, iova, length)
        _call(f"map {iova:#x}", self.fd, VFIO_IOMMU_MAP_DMA, request)

    def unmap(self, iova: int, length: int) -> None:
        """VFIO_IOMMU_UNMAP_DMA."""
        size = ctypes.sizeof(vfio_iommu_type1_dma_unmap)
        request = vfio_iommu_type1_dma_unmap(size, 0, iova, length)
        _call(f"unmap {iova:#x}", self.fd, VFIO_IOMMU_UNMAP_DMA, request)

    def open(self, bdf: str) -> Device:
        """VFIO_GROUP_GET_DEVICE_FD; its group is added if it has not been."""
        self.add(bdf)
        name = ctypes.create_string_buffer(bdf.encode())
        group = self._groups[group_of(bdf)]
        return Device(bdf, _call(bdf, group, VFIO_GROUP_GET_DEVICE_FD, name))

    def close(self) -> None:
        """Close the groups and the container."""
        for fd in self._groups.values():
            os.close(fd)
        os.close(self.fd)


class Ioas:
    """An address space of iommufd. It can be filled before any device uses it."""

    def __init__(self) -> None:
        self.ready = True
        self._nodes: dict[str, int] = {}
        self.fd = _open(IOMMUFD)
        request = iommu_ioas_alloc(size=ctypes.sizeof(iommu_ioas_alloc))
        try:
            _call("address space", self.fd, IOMMU_IOAS_ALLOC, request)
        except VfioError:
            os.close(self.fd)
            raise
        self.id: int = request.out_ioas_id

    @property
    def fds(self) -> dict[str, int]:
        """That of /dev/iommu; devices have their own."""
        return {"iommufd": self.fd}

    def prepare(self, bdf: str) -> None:
        """Open its node, which cannot be used before it is bound.

        :raises VfioError: there is none, or it is in use.
        """
        if bdf in self._nodes:
            return
        path = cdev_of(bdf)
        if path is None:
            raise VfioError(f"{bdf}: no node for iommufd: a kernel with CONFIG_VFIO_DEVICE_CDEV")
        self._nodes[bdf] = _open(path)

    def add(self, bdf: str) -> None:
        """Open its node: binding and attaching are one with opening."""
        self.prepare(bdf)

    def map(self, iova: int, vaddr: int, length: int, perm: int) -> None:
        """IOMMU_IOAS_MAP."""
        flags = IOMMU_IOAS_MAP_FIXED_IOVA
        flags |= IOMMU_IOAS_MAP_READABLE if perm & READ else 0
        flags |= IOMMU_IOAS_MAP_WRITEABLE if perm & WRITE else 0
        size = ctypes.sizeof(iommu_ioas_map)
        request = iommu_ioas_map(size, flags, self.id, 0, vaddr, length, iova)
        _call(f"map {iova:#x}", self.fd, IOMMU_IOAS_MAP, request)

    def unmap(self, iova: int, length: int) -> None:
        """IOMMU_IOAS_UNMAP."""
        request = iommu_ioas_unmap(ctypes.sizeof(iommu_ioas_unmap), self.id, iova, length)
        _call(f"unmap {iova:#x}", self.fd, IOMMU_IOAS_UNMAP, request)

    def open(self, bdf: str) -> Device:
        """VFIO_DEVICE_BIND_IOMMUFD, which opens the device, and VFIO_DEVICE_ATTACH_IOMMUFD_PT."""
        self.prepare(bdf)
        node = self._nodes[bdf]
        bound = vfio_device_bind_iommufd(ctypes.sizeof(vfio_device_bind_iommufd), 0, self.fd)
        _call(bdf, node, VFIO_DEVICE_BIND_IOMMUFD, bound)
        size = ctypes.sizeof(vfio_device_attach_iommufd_pt)
        attached = vfio_device_attach_iommufd_pt(size, 0, self.id)
        _call(bdf, node, VFIO_DEVICE_ATTACH_IOMMUFD_PT, attached)
        del self._nodes[bdf]  # the device's from now on
        return Device(bdf, node)

    def close(self) -> None:
        """Close it, and nodes that have not become devices."""
        for fd in self._nodes.values():
            os.close(fd)
        os.close(self.fd)
