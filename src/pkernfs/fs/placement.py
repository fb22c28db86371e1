"""The dax device that a file system is in, as its superblock has it (docs/format.md, section 3).

A kexec forgets how soft-reserved memory was divided into devices. The record in the superblock
says it, and lies in the memory itself: it is found by looking at all memory of the dax regions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import CorruptionError, FormatError, PkernfsError, RegionError
from pkernfs.fs import superblock
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import HOST, Host
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    MAGIC_SUPERBLOCK,
    MAX_PIECES,
    PAGE,
    PIECE,
    PIECES_OFFSET,
    PLACEMENT,
    PLACEMENT_DAX,
    PLACEMENT_OFFSET,
    POOL,
    POOL_DAX,
    POOL_OFFSET,
    RANGES_OFFSET,
    SUPERBLOCK_PAGE,
)
from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region import dax, dax_devices, devmem
from pkernfs.region.dax import Device
from pkernfs.region.region import Region
from pkernfs.region.spec import is_file_spec, resolve

if TYPE_CHECKING:
    from pkernfs.fs.super import Super

log = logging.getLogger(__name__)

_START = RegionOff(0)


@dataclass(frozen=True)
class Placement:
    """A dax device: name, alignment in bytes, ranges in the order of its offsets.

    ``exact``: the memory behind it is for segments, and never the device's.
    """

    name: str
    align: int
    pieces: tuple[Span, ...]
    exact: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"/dev/{self.name} at {' and '.join(map(str, self.pieces))}"

    def covers(self, older: Placement) -> bool:
        """True if this is the older one, or that with more memory at its end, if it may have it."""
        if older.exact:
            return self.pieces == older.pieces
        last = len(older.pieces) - 1
        same = self.pieces[:last] == older.pieces[:last] and len(self.pieces) > last
        return (
            same
            and self.pieces[last].start == older.pieces[last].start
            and self.pieces[last].size >= older.pieces[last].size
        )


class _Found(NamedTuple):
    """A record that was found, and the dax region it is in, by its directory."""

    placement: Placement
    region: str


def of_device(device: Device) -> Placement:
    """The placement that a device has now."""
    return Placement(device.name, device.align, device.pieces)


def encode(placement: Placement | None) -> bytes:
    """The record, for offset 224 of a superblock.

    :raises RegionError: too many ranges.
    """
    image = bytearray(RANGES_OFFSET - PLACEMENT_OFFSET)
    if placement is None:
        return bytes(image)
    if len(placement.pieces) > MAX_PIECES:
        raise RegionError(
            f"/dev/{placement.name}: too many ranges: got {len(placement.pieces)}, "
            f"expected up to {MAX_PIECES}"
        )
    name = placement.name.encode()
    PLACEMENT.pack_into(image, 0, PLACEMENT_DAX, len(placement.pieces), placement.align, name)
    for i, piece in enumerate(placement.pieces):
        PIECE.pack_into(image, PIECES_OFFSET - PLACEMENT_OFFSET + i * PIECE.size, *piece)
    return bytes(image)


def parse(page: bytes) -> Placement | None:
    """The record in a superblock, whose checksum was found good; None without one, or a bad one."""
    kind, count, align, name = PLACEMENT.unpack_from(page, PLACEMENT_OFFSET)
    if kind != PLACEMENT_DAX or not 0 < count <= MAX_PIECES:
        return None
    pieces = tuple(
        Span(*PIECE.unpack_from(page, PIECES_OFFSET + i * PIECE.size)) for i in range(count)
    )
    text = name.rstrip(b"\0").decode("ascii", "replace")
    try:
        dax.device_number(text)
    except ValueError:
        return None
    good = all(p.size and not p.start % BLOCK and not p.size % BLOCK for p in pieces)
    if not good or align < PAGE or align & (align - 1) or max(p.end for p in pieces) >> 52:
        return None
    kind, _granule = POOL.unpack_from(page, POOL_OFFSET)
    return Placement(text, align, pieces, exact=kind == POOL_DAX)


def read(region: Region, offset: RegionOff = _START) -> Placement | None:
    """The record of the superblock at an offset; None without a superblock or a record."""
    return _read_page(region.read(offset, PAGE))


def _read_page(page: bytes) -> Placement | None:
    try:
        superblock.parse(page, SUPERBLOCK_PAGE)
    except PkernfsError:
        return None
    return parse(page)


# ---------------------------------------------------------------------------- opening


def open_region(
    spec: str, *, write: bool, phys_base: PhysAddr | None = None, host: Host = HOST
) -> Region:
    """Open a region that has a file system; a dax device is put back first if a kexec forgot it.

    :raises RegionError, LockedError: as :meth:`Region.open`; or the device is not what it was.
    """
    if not is_file_spec(spec):
        spec = resolve(spec, host)
        name = dax.device_name(spec, host)
        if name is not None:
            spec = _put_back(spec, name, host)
    region = Region.open(spec, write=write, phys_base=phys_base, host=host)
    try:
        _check(region)
    except BaseException:
        region.close()
        raise
    return region


def _check(region: Region) -> None:
    """Refuse a device that has only a part of what its file system was in."""
    recorded = read(region) if region.dax is not None else None
    if recorded is None or region.dax is None:
        return
    now = of_device(region.dax)
    if recorded.pieces == now.pieces or (recorded.name == now.name and now.covers(recorded)):
        return
    if recorded.pieces[0].start == now.pieces[0].start:
        raise RegionError(f"{now}: the file system in it is that of {recorded}")


def record(state: Super) -> None:
    """Keep the superblocks' record right, after a mount for writing."""
    device = state.region.dax
    if device is None or state.read_only or read(state.region) == of_device(device):
        return
    image = encode(of_device(device))
    try:
        with state.store:
            for number in (SUPERBLOCK_PAGE, BACKUP_PAGE):
                page = state.store.edit(number, MAGIC_SUPERBLOCK)
                page[PLACEMENT_OFFSET:RANGES_OFFSET] = image
    except (CorruptionError, FormatError) as e:
        log.warning("%s: where it is was not recorded: %s: run fsck.pkernfs", state.region.name, e)


# ---------------------------------------------------------------------------- after a kexec


def _put_back(path: str, name: str, host: Host) -> str:
    """Make the device that ``path`` names again if it was forgotten; its path."""
    found: list[_Found] = []
    if name in dax.device_names(host):
        found = _peek(name, host)
        if not found and _is_itself(path, name, host):
            return path
        found = found or _find_at_its_begin(path, name, host)
    found = found or [one for one in _find_all(host) if one.placement.name == name]
    if not found:
        return path
    if len(found) > 1:
        raise RegionError(
            f"{path}: more than one file system claims it: "
            f"{', '.join(str(one.placement) for one in found)}: make it with daxctl create-device"
        )
    placement, region = found[0]
    made = dax_devices.rebuild(name, placement.align, placement.pieces, region, host)
    log.warning("%s: put back as it was, at %s", path, " and ".join(map(str, placement.pieces)))
    return host.path(f"dev/{made}")


def _is_itself(path: str, name: str, host: Host) -> bool:
    """True if the file system of a device is in it, or none that has a record is."""
    device = dax.read_device(name, host)
    if not device.size or device.driver not in (None, os.path.basename(dax.DRIVER)):
        return False
    with Region.open(path, write=False, lock=False, host=host) as region:
        if not superblock.is_trace(region.view(_START, PAGE)):
            return False
        recorded = read(region)
    if recorded is None:
        return True  # of an older pkernfs, or damaged: mount says it
    return recorded.pieces == device.pieces or (
        recorded.name == name and of_device(device).covers(recorded)
    )


def _find_at_its_begin(path: str, name: str, host: Host) -> list[_Found]:
    """The record of a device that a kexec has given all memory of its dax region.

    If it lies where it says, and is for this device, nobody else's counts: what a guest writes into
    a segment may look like a record.
    """
    device = dax.read_device(name, host)
    if not device.size or device.driver not in (None, os.path.basename(dax.DRIVER)):
        return []
    with Region.open(path, write=False, lock=False, host=host) as region:
        return _at_its_begin(device, read(region))


def _at_its_begin(device: Device, recorded: Placement | None) -> list[_Found]:
    if recorded is None or not recorded.exact or recorded.name != device.name:
        return []
    is_here = recorded.pieces[0].start == device.pieces[0].start
    return [_Found(recorded, device.region)] if is_here else []


def _peek(name: str, host: Host) -> list[_Found]:
    """As :func:`_find_at_its_begin`, but without a driver, where the kernel lets /dev/mem be read.

    A driver first prepares all pages of the memory, which takes as long as there is much of it.
    """
    device = dax.read_device(name, host)
    if device.driver is not None or not device.pieces:
        return []
    page = devmem.peek(device.pieces[0].start, PAGE, host)
    if len(page) < PAGE:
        return []
    found = _at_its_begin(device, _read_page(page))
    return [] if any(one.placement.pieces == device.pieces for one in found) else found


def _find_all(host: Host) -> list[_Found]:
    """Every record that lies where it says."""
    found: list[_Found] = []
    for region in dax_devices.regions(host):
        for device in dax_devices.region_devices(region, host):
            if device.size and device.driver in (None, os.path.basename(dax.DRIVER)):
                found += [_Found(p, region) for p in _search(device, host)]
        with dax_devices.free_memory(region, host) as rest:
            if rest is not None:
                found += [_Found(p, region) for p in _search(rest, host)]
    return found


def _search(device: Device, host: Host) -> Iterator[Placement]:
    """The records in a device. What a file system has is not looked at: files may look like one."""
    path = host.path(f"dev/{device.name}")
    with Region.open(path, write=False, lock=False, host=host) as region:
        taken: list[Span] = []
        for at in range(0, region.size, BLOCK):
            offset = RegionOff(at)
            address = region.physical(offset)
            if address is None or any(t.start <= address < t.end for t in taken):
                continue
            if not superblock.is_trace(region.view(offset, PAGE)):
                continue
            recorded = read(region, offset)
            if recorded is not None and recorded.pieces[0].start == address:
                taken += recorded.pieces
                yield recorded
