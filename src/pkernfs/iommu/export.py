"""Records from which a VMM rebuilds the state that the tables hold, with iommufd or VFIO.

For each domain an IOAS (what to map), a HWPT (the page tables that stand for it now) and a VFIO
container; for each device what it is attached to. docs/iommu-export.schema.json is the schema.
Numbers of flags are those of Linux's include/uapi/linux/iommufd.h and vfio.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from pkernfs.host.bars import Bar
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Device
from pkernfs.iommu.page_pool import Mapping
from pkernfs.layout import uuid_text
from pkernfs.quantities import Iova, PhysAddr, RegionOff, SegmentNo
from pkernfs.region.region import Place
from pkernfs.vtd.entries import READ, WRITE, bdf_text, width_bits

VERSION = 1
_IOAS_FIXED_IOVA, _IOAS_WRITEABLE, _IOAS_READABLE = 1, 2, 4
_DMA_READ, _DMA_WRITE = 1, 2
_TYPE1_V2 = 3
# Of one mapping: a record has to fit into a message.
_MOST_PIECES = 4096

Record = dict[str, Any]


class SegmentPlace(NamedTuple):
    """A segment, and what a program opens to map it; None: it is lost, or not here."""

    number: SegmentNo
    path: str | None


class Target(NamedTuple):
    """A piece of physical memory: what it is of, and where in it. All in bytes.

    ``path`` is that of a file in the mount, or None; ``region_offset`` None if it is elsewhere. In
    a segment, ``offset`` is that in the file and in the segment.
    """

    physical: PhysAddr
    length: int
    path: str | None
    offset: int
    region_offset: RegionOff | None
    bar: Bar | None
    segment: SegmentPlace | None = None

    def record(self) -> Record:
        """``{"file", "offset"}`` or ``{"bar", "offset"}``; empty if it is nobody's.

        With ``segment`` for a file that has one.
        """
        if self.bar is not None:
            bar = {"device": bdf_text(self.bar.source_id), "number": self.bar.number}
            return {"bar": bar, "offset": self.offset}
        if self.path is not None:
            segment = {} if self.segment is None else {"segment": self.segment._asdict()}
            return {"file": self.path, "offset": self.offset, **segment}
        return {}


#: Cuts so many bytes from a physical address on where their owner, or the offset in it, jumps.
Split = Callable[[PhysAddr, int], Iterator[Target]]


def head(
    config: Config, root: PhysAddr | None, uuid: bytes, region: Record, damaged: dict[str, str]
) -> Record:
    """Describe once the region, and the unit that is to walk its tables.

    ``damaged`` has the reason for each file whose tables the document lacks.
    """
    return {
        "version": VERSION,
        "region": {**region, "uuid": uuid_text(uuid)},
        "unit": unit(config, root),
        "damaged": damaged,
        "ioas": [],
        "hwpt": [],
        "devices": [],
        "vfio_containers": [],
    }


def unit(config: Config, root: PhysAddr | None) -> Record:
    """Describe the unit that is to walk the tables."""
    return {
        "mode": config.mode.name.lower(),
        "levels": config.levels,
        "address_width": width_bits(config.levels),
        "root_table": root,
    }


def region(name: str, size: int, place: Place | None) -> Record:
    """The region as it was mounted; ``place``: what to open, and where in it the region begins."""
    if place is None:
        return {"name": name, "mmap": None}
    path, offset = place
    return {"name": name, "mmap": {"path": path, "offset": offset, "length": size}}


def hwpt(name: str, table: PhysAddr, levels: int, devices: Iterable[Device]) -> Record:
    """The page tables of a domain; ``domain_id`` is None while no device is attached."""
    return {
        "id": name,
        "ioas": name,
        "file": f"/iommu/{name}",
        "table": table,
        "levels": levels,
        "domain_id": next((d.domain_id for d in devices if d.table == table), None),
    }


def device(d: Device, name: str | None, unit: str | None) -> Record:
    """Describe what a device is attached to; ``name`` is None if that is no domain of the region.

    ``unit``: that of the running kernel which walks these tables for it, if one does.
    """
    return {
        "device": bdf_text(d.source_id),
        "pasid": d.pasid,
        "hwpt": name,
        "domain_id": d.domain_id,
        "adopted_by": unit,
    }


def container(name: str, table: PhysAddr, devices: Iterable[Device]) -> Record:
    """The VFIO container for a domain: its type, its devices, and the IOAS to map in it."""
    names = [bdf_text(d.source_id) for d in devices if d.table == table]
    return {"id": name, "type": _TYPE1_V2, "ioas": name, "devices": names}


def mappings(found: Iterable[Mapping], split: Split) -> Iterator[Record]:
    """List what to map, by address; pieces of one file that follow each other are one."""
    last: Record | None = None
    for m in found:
        iova = m.iova
        for target in split(m.physical, m.length):
            record = _mapping(iova, target, m.perm)
            iova = Iova(iova + target.length)
            if last is not None and _follows(last, record):
                last["length"] += record["length"]
                _add_pieces(last["pieces"], record["pieces"])
                continue
            if last is not None:
                yield last
            last = record
    if last is not None:
        yield last


def _mapping(iova: Iova, target: Target, perm: int) -> Record:
    flags = _IOAS_FIXED_IOVA
    flags |= _IOAS_READABLE if perm & READ else 0
    flags |= _IOAS_WRITEABLE if perm & WRITE else 0
    vfio = (_DMA_READ if perm & READ else 0) | (_DMA_WRITE if perm & WRITE else 0)
    return {
        "iova": iova,
        "length": target.length,
        "readable": bool(perm & READ),
        "writeable": bool(perm & WRITE),
        "iommufd_flags": flags,
        "vfio_flags": vfio,
        **target.record(),
        "physical": target.physical,
        "pieces": [
            {
                "length": target.length,
                "physical": target.physical,
                "region_offset": target.region_offset,
            }
        ],
    }


def _add_pieces(pieces: list[Record], more: Iterable[Record]) -> None:
    """Add what follows; where the memory goes on, no new piece begins."""
    for piece in more:
        last = pieces[-1]
        if last["physical"] + last["length"] == piece["physical"] and (
            _end(last) == piece["region_offset"]
        ):
            last["length"] += piece["length"]
        else:
            pieces.append(piece)


def _end(piece: Record) -> int | None:
    """Return the region offset at which a piece ends, if it is in the region."""
    start: int | None = piece["region_offset"]
    return None if start is None else start + int(piece["length"])


def _follows(last: Record, record: Record) -> bool:
    """Tell if a VMM maps both with one call: their addresses follow each other."""
    if last["iova"] + last["length"] != record["iova"]:
        return False
    if last["iommufd_flags"] != record["iommufd_flags"]:
        return False
    if "offset" not in last or "offset" not in record or len(last["pieces"]) == _MOST_PIECES:
        return False
    same = last.get("file") == record.get("file") and last.get("bar") == record.get("bar")
    return bool(same and last["offset"] + last["length"] == record["offset"])


def assemble(records: Iterable[Record]) -> Record:
    """The whole document, from records as they come.

    The first is the head; each other is ``{"in": LIST, "record": ...}``, and ``mappings`` are those
    of the last IOAS or domain.
    """
    whole: Record | None = None
    owner: Record | None = None
    for record in records:
        if whole is None:
            whole = record
            continue
        kind, item = record["in"], record["record"]
        if kind == "mappings":
            assert owner is not None
            owner["mappings"].append(item)
            continue
        whole[kind].append(item)
        if "mappings" in item:
            owner = item
    return whole or {}
