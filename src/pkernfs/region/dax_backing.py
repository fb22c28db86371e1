"""A dax device as the memory of a region."""

from __future__ import annotations

from pkernfs.errors import RegionError
from pkernfs.host import iomem
from pkernfs.host.sysroot import Host
from pkernfs.layout import BLOCK
from pkernfs.region.backing import open_path
from pkernfs.region.dax import Device, bind, read_device
from pkernfs.region.physical_backing import PhysicalBacking


class DaxBacking(PhysicalBacking):
    """The dax device ``name`` at ``path``. One that no driver has is bound to device_dax.

    :raises RegionError: no such device, another driver has it, or the kernel gives no access.
    :raises LockedError: a part of its memory is in use.
    """

    def __init__(self, path: str, name: str, *, write: bool, lock: bool, host: Host) -> None:
        device = bind(read_device(name, host), host)
        _check(device, host)
        super().__init__(path, path, list(device.pieces), write=write, lock=lock, host=host)
        try:
            self.fd = open_path(path, write=write)
        except BaseException:
            self.close()
            raise
        self._fds.append(self.fd)
        self.page_bytes = device.align
        self.node = device.node
        self.dax = device


def _check(device: Device, host: Host) -> None:
    """Refuse what cannot be mapped, or is the kernel's own memory."""
    where = f"/dev/{device.name}"
    if sum(piece.size for piece in device.pieces) != device.size:
        raise RegionError(f"{where}: its mappings are not of its size: got {device.size}")
    for piece in device.pieces:
        if piece.start % BLOCK or piece.size % BLOCK:
            raise RegionError(
                f"{where}: bad mapping: got {piece.start:#x}-{piece.end - 1:#x}, "
                "expected multiples of 2 MiB"
            )
    for resource in iomem.read_iomem(where, host):
        if resource.name.startswith("System RAM") and any(
            iomem.overlap(piece, resource) for piece in device.pieces
        ):
            raise RegionError(f"{where}: {resource.start:#x}-{resource.end - 1:#x} is System RAM")
