"""A device's domain in the kernel tables as a complete one of a region: what it maps, in dom-N.

Three steps: the kernel tables are read (:func:`read`, in any thread). What they map is found in the
file system (:func:`plan`, in steps). All is looked at once more and changed at once
(:func:`apply`). docs/dma.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.dma.comparison import KernelUnits
from pkernfs.dma.mount import tables_of
from pkernfs.dma.output import PAUSE, Pause
from pkernfs.dma.reports import Owners, pieces_of
from pkernfs.dma.root_pgtables import FIRST_DOMAIN_ID
from pkernfs.errors import BusyError, InvalidError, NoSpaceError, NotFoundError, PkernfsError
from pkernfs.host.bars import Bar, all_bars
from pkernfs.host.sysroot import Host
from pkernfs.iommu.config import Config
from pkernfs.iommu.memory import merge_ranges, overlaps
from pkernfs.iommu.page_pool import Mapping
from pkernfs.layout import INODE_FLAG_TABLE
from pkernfs.quantities import Ino, PhysAddr, PhysRange, RegionOff, SourceId
from pkernfs.units.kernel_tables import Shape, check_shape
from pkernfs.vtd.entries import bdf_text

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

_PLACES_AT_ONCE = 256


class Reading(NamedTuple):
    """A device's domain in the kernel tables.

    ``same`` are all devices that have it; ``taken`` are the domain ids of other entries; ids are
    below ``domain_ids``; ``largest`` is the level of the largest leaf that all units above
    these devices know.
    """

    source_id: SourceId
    shape: Shape
    domain_id: int
    table: PhysAddr
    mappings: Sequence[Mapping]
    same: frozenset[SourceId]
    taken: frozenset[int]
    domain_ids: int
    largest: int


class Piece(NamedTuple):
    """Memory of a file: the inode, an offset in it, the physical address, bytes."""

    ino: Ino
    offset: int
    physical: PhysAddr
    length: int


class Plan(NamedTuple):
    """A reading, and whose memory it is."""

    reading: Reading
    pieces: Sequence[Piece]
    bars: Sequence[Bar]


# ---------------------------------------------------------------------- reading


def read(kernel: KernelUnits, source_id: SourceId, kept: set[SourceId]) -> Reading:
    """Read a device's domain in the kernel tables; nothing is changed.

    :param kept: source ids of the devices that are attached and persist.
    :raises PkernfsError: there is none, or it is not one that a region's tables can stand for.
    """
    device = kernel.device(source_id)
    found = kernel.above(device)
    if not found.driven:
        raise NotFoundError(
            f"device {device.name}: this kernel's driver does not have {found.structure.name}: "
            "there is no live domain: boot with intel_iommu=on, or use map, attach and activate"
        )
    unit = kernel.unit(found)
    entry = unit.entry(source_id)
    kernel.check_group(device, kept | {source_id})
    kernel.check_names(device, unit, entry.table)
    units = kernel.driven()
    everyone = [e for u in units for e in u.entries]
    able = [u.unit.capabilities for u in units]
    return Reading(
        source_id,
        Shape(unit.mode, entry.levels),
        entry.domain_id,
        entry.table,
        kernel.mappings(unit, entry),
        frozenset(e.source_id for e in everyone if e.table == entry.table),
        frozenset(e.domain_id for e in everyone if e.table != entry.table),
        min(c.domain_ids for c in able),
        min(c.largest_leaf for c in able),
    )


# ---------------------------------------------------------------------- whose memory it is


def plan(fs: FileSystem, host: Host, reading: Reading) -> Generator[Pause, None, Plan]:
    """Find whose memory a kernel domain maps.

    :raises InvalidError: some of it does not survive: it is no live file's, and no BAR.
    """
    ranges = merge_ranges(PhysRange.of(m.physical, m.length) for m in reading.mappings)

    def wanted(offset: RegionOff, length: int) -> bool:
        runs = fs.region.physical_runs(offset, length)
        return any(
            at is not None and overlaps(ranges, PhysRange.of(at, count)) for _, count, at in runs
        )

    pieces = yield from pieces_of(fs, wanted)
    bars = [bar for bar in all_bars(host) if overlaps(ranges, bar.range)]
    yield PAUSE
    inodes = {p.ino: str(p.ino) for p in pieces}
    owners = Owners(tables_of(fs).region_memory(), pieces, bars, inodes)
    return (yield from _share_out(reading, owners))


def _share_out(reading: Reading, owners: Owners) -> Generator[Pause, None, Plan]:
    files: list[Piece] = []
    used: set[Bar] = set()
    targets = ((m, t) for m in reading.mappings for t in owners.split(m.physical, m.length))
    for number, (m, target) in enumerate(targets):
        if target.bar is not None:
            used.add(target.bar)
        elif target.path is not None:
            ino = Ino(int(target.path))
            files.append(Piece(ino, target.offset, target.physical, target.length))
        else:
            raise _lost(reading, m, target.physical)
        if number % _PLACES_AT_ONCE == 0:
            yield PAUSE
    return Plan(reading, files, sorted(used))


def _lost(reading: Reading, m: Mapping, physical: PhysAddr) -> InvalidError:
    iova = m.iova + physical - m.physical
    return InvalidError(
        f"device {bdf_text(reading.source_id)}: iova {iova:#x} leads to memory at {physical:#x} "
        "that does not survive: it is no file's of this mount, and no BAR: unmap it in the VMM, or "
        "have all of the guest's memory in pkernfs"
    )


# ---------------------------------------------------------------------- the change


def apply(fs: FileSystem, plan: Plan, number: int) -> int:
    """Have dom-``number`` map what was read, and the device attached to it; its domain id.

    dom-N is complete before the device is attached; where it is attached already, all of dom-N
    changes at once.

    :raises PkernfsError: why not; nothing was changed.
    :raises ZeroingNeeded: see :meth:`FileSystem.fallocate`.
    """
    tables, reading = tables_of(fs), plan.reading
    table = tables.domain(number)
    adopted = _adopted(fs, reading, number)
    if adopted is not None:
        return adopted
    _check_attached(fs, reading, number)
    _check_files(fs, plan)
    if not tables.config.home and not tables.devices():  # nobody has said what they are like
        tables.create_root(Config(*reading.shape))
        table = tables.domain(number)
    check_shape(reading.source_id, reading.shape, Shape(tables.config.mode, tables.config.levels))
    domain_id = _domain_id(fs, reading, table.root)
    mine = [d for d in tables.devices() if d.table == table.root]
    missing = {reading.source_id} - {d.source_id for d in mine}
    for source_id in missing:
        tables.need_root().pages_for(source_id)
    tables.replace(number, reading.mappings, plan.bars, reading.largest)
    for d in mine:
        if d.domain_id != domain_id:
            tables.detach(d.source_id)
            missing.add(d.source_id)
    for source_id in sorted(missing):
        tables.attach(number, source_id, domain_id)
    return domain_id


def _adopted(fs: FileSystem, reading: Reading, number: int) -> int | None:
    """The domain id, if dom-``number`` is the kernel's domain itself, as a kdump kernel has it."""
    for n, table in tables_of(fs).domains.items():
        if table.root != reading.table:
            continue
        for d in tables_of(fs).devices():
            if (d.source_id, d.table, n) == (reading.source_id, table.root, number):
                return d.domain_id
        raise BusyError(
            f"device {bdf_text(reading.source_id)}: its live tables are those of dom-{n}: "
            "attach it there"
        )
    return None


def _check_attached(fs: FileSystem, reading: Reading, number: int) -> None:
    """:raises BusyError: the device is attached elsewhere, or something else to dom-``number``."""
    tables = tables_of(fs)
    name, root = bdf_text(reading.source_id), tables.domain(number).root
    for d in tables.devices():
        other = bdf_text(d.source_id)
        if d.source_id == reading.source_id and d.table != root:
            raise BusyError(f"device {name}: attached to another domain: pkernfs iommu detach it")
        if d.table == root and d.source_id not in reading.same | {reading.source_id}:
            raise BusyError(
                f"dom-{number}: device {other} is attached, which has another live domain than "
                f"{name}: take a domain for each, or detach it"
            )


def _check_files(fs: FileSystem, plan: Plan) -> None:
    """Check that what was found in files is still there: others were served meanwhile.

    :raises BusyError: it is not.
    """
    for piece in plan.pieces:
        try:
            good = _is_there(fs, piece)
        except PkernfsError:
            good = False
        if not good:
            raise BusyError(
                f"inode {piece.ino}: it has changed meanwhile: have the VMM at rest, and try again"
            )


def _is_there(fs: FileSystem, piece: Piece) -> bool:
    inode = fs.inode(piece.ino)
    if not inode.is_reg or not inode.nlink or inode.flags & INODE_FLAG_TABLE:
        return False
    at = piece.physical
    for _low, physical, length in tables_of(fs).file_pieces(piece.ino, piece.offset, piece.length):
        if physical != at:
            return False
        at = PhysAddr(at + length)
    return at == piece.physical + piece.length


def _domain_id(fs: FileSystem, reading: Reading, table: PhysAddr) -> int:
    """An id that no other domain has, here or in the kernel's tables: best the one that is there.

    :raises NoSpaceError: there is none.
    """
    devices = tables_of(fs).devices()
    taken = reading.taken | {d.domain_id for d in devices if d.table != table}
    best = [d.domain_id for d in devices if d.table == table] + [reading.domain_id]
    for domain_id in chain(best, range(FIRST_DOMAIN_ID, reading.domain_ids)):
        if FIRST_DOMAIN_ID <= domain_id < reading.domain_ids and domain_id not in taken:
            return domain_id
    raise NoSpaceError("root-pgtables: no free domain id")
