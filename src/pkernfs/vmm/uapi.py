"""Numbers and structures of the kernel's interfaces to devices: VFIO and iommufd.

They are those of Linux's include/uapi/linux/vfio.h and include/uapi/linux/iommufd.h (6.12), under
the names that they have there. A test compares every number, offset and size with the headers.
Addresses and sizes are in bytes; ``argsz`` and the first ``size`` of an iommufd structure are the
structure's own. Nothing here calls the kernel.
"""

from __future__ import annotations

import ctypes

_u32, _u64, _s32 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32


def _io(number: int) -> int:
    """``_IO(';', number)``: VFIO_TYPE and IOMMUFD_TYPE are both ';'."""
    return ord(";") << 8 | number


# ------------------------------------------------------------------------------ linux/vfio.h

VFIO_API_VERSION = 0
VFIO_TYPE1v2_IOMMU = 3
VFIO_GROUP_FLAGS_VIABLE = 1
VFIO_REGION_INFO_FLAG_MMAP = 4
VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE = 1, 2
VFIO_PCI_BAR0_REGION_INDEX = 0
VFIO_PCI_CONFIG_REGION_INDEX = 7

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


class vfio_group_status(ctypes.Structure):
    """VFIO_GROUP_GET_STATUS fills in ``flags``."""

    _fields_ = (("argsz", _u32), ("flags", _u32))


class vfio_region_info(ctypes.Structure):
    """VFIO_DEVICE_GET_REGION_INFO tells where region ``index`` is in the device's descriptor."""

    _fields_ = (
        ("argsz", _u32), ("flags", _u32), ("index", _u32), ("cap_offset", _u32),
        ("size", _u64), ("offset", _u64),
    )  # fmt: skip


class vfio_iommu_type1_dma_map(ctypes.Structure):
    """VFIO_IOMMU_MAP_DMA has ``iova`` reach ``size`` bytes of this process from ``vaddr`` on."""

    _fields_ = (
        ("argsz", _u32), ("flags", _u32), ("vaddr", _u64), ("iova", _u64), ("size", _u64),
    )  # fmt: skip


class vfio_iommu_type1_dma_unmap(ctypes.Structure):
    """VFIO_IOMMU_UNMAP_DMA takes the mappings of ``size`` bytes from ``iova`` on away."""

    _fields_ = (("argsz", _u32), ("flags", _u32), ("iova", _u64), ("size", _u64))


class vfio_device_bind_iommufd(ctypes.Structure):
    """VFIO_DEVICE_BIND_IOMMUFD binds a device's node to the descriptor ``iommufd``."""

    _fields_ = (
        ("argsz", _u32), ("flags", _u32), ("iommufd", _s32), ("out_devid", _u32),
    )  # fmt: skip


class vfio_device_attach_iommufd_pt(ctypes.Structure):
    """VFIO_DEVICE_ATTACH_IOMMUFD_PT attaches a device to the IOAS or HWPT ``pt_id``."""

    _fields_ = (("argsz", _u32), ("flags", _u32), ("pt_id", _u32))


# ------------------------------------------------------------------------------ linux/iommufd.h

IOMMU_IOAS_MAP_FIXED_IOVA, IOMMU_IOAS_MAP_WRITEABLE, IOMMU_IOAS_MAP_READABLE = 1, 2, 4

IOMMU_IOAS_ALLOC = _io(0x81)  # IOMMUFD_CMD_BASE is 0x80, for IOMMU_DESTROY
IOMMU_IOAS_MAP = _io(0x85)
IOMMU_IOAS_UNMAP = _io(0x86)


class iommu_ioas_alloc(ctypes.Structure):
    """IOMMU_IOAS_ALLOC makes an address space and fills in ``out_ioas_id``."""

    _fields_ = (("size", _u32), ("flags", _u32), ("out_ioas_id", _u32))


class iommu_ioas_map(ctypes.Structure):
    """IOMMU_IOAS_MAP has ``iova`` reach ``length`` bytes of this process from ``user_va`` on."""

    _fields_ = (
        ("size", _u32), ("flags", _u32), ("ioas_id", _u32), ("__reserved", _u32),
        ("user_va", _u64), ("length", _u64), ("iova", _u64),
    )  # fmt: skip


class iommu_ioas_unmap(ctypes.Structure):
    """IOMMU_IOAS_UNMAP takes the mappings of ``length`` bytes from ``iova`` on away."""

    _fields_ = (("size", _u32), ("ioas_id", _u32), ("iova", _u64), ("length", _u64))


_REQUESTS = {
    value: name
    for name, value in list(globals().items())
    if name.startswith(("VFIO_", "IOMMU_")) and isinstance(value, int) and value > _io(0)
}


def request_name(request: int) -> str:
    """Return the name of an ioctl for a message; its number in hexadecimal if it has none here."""
    return _REQUESTS.get(request, hex(request))
