"""The export of a mount: what its IOMMU tables hold, as ``pkernfs iommu export --json`` prints it.

docs/iommu-export.schema.json is the schema; only what a take-over needs is kept here. Addresses,
offsets and lengths are in bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pkernfs.errors import TakeOverError
from pkernfs.quantities import Iova, RegionOff
from pkernfs.vmm import program

VERSION = 1


class Bar(NamedTuple):
    """A range of a device's own memory: the device's BDF, and 0 to 5."""

    device: str
    number: int


class Place(NamedTuple):
    """The file that a program maps to have the region, and the range of it; bytes."""

    path: Path
    offset: int
    length: int


class Memory(NamedTuple):
    """A piece of a mapping's memory; ``region_offset`` is None where it is not in the region."""

    length: int
    region_offset: RegionOff | None


@dataclass(frozen=True)
class Mapping:
    """IOVAs of a domain, and what they reach.

    :ivar file: the file that is mapped, from the root of the mount
    :ivar bar: the BAR that is mapped; without ``file`` and ``bar`` the memory is nobody's
    :ivar has_segment: it is memory of the file's own, at the file's offsets
    :ivar segment: what a program maps to have that; None: it is lost
    :ivar offset: of the first byte, in the file or the BAR
    :ivar memory: the pieces of the region, in order, that hold a file
    """

    iova: Iova
    length: int
    readable: bool
    writeable: bool
    file: str | None
    bar: Bar | None
    offset: int
    memory: tuple[Memory, ...]
    has_segment: bool = False
    segment: Path | None = None


@dataclass(frozen=True)
class Attached:
    """An attached device.

    :ivar device: its BDF
    :ivar domain: what it is attached to; None: to no domain of the region
    :ivar adopted_by: the unit of the running kernel that walks these tables for it, if one does
    """

    device: str
    domain: str | None
    adopted_by: str | None


@dataclass(frozen=True)
class Export:
    """The content of a mount's tables.

    :ivar region: the region's name
    :ivar place: its memory; None if no program can map it
    :ivar devices: the attached devices
    :ivar domains: the mappings of each domain, ascending and disjoint
    :ivar damaged: the reason for each file of iommu/ whose tables are missing here
    """

    region: str
    place: Place | None
    devices: tuple[Attached, ...]
    domains: dict[str, tuple[Mapping, ...]]
    damaged: dict[str, str]


def read_export(mnt: str) -> Export:
    """Run ``pkernfs iommu export`` for the mount at ``mnt``.

    :raises VmmError: it fails.
    :raises TakeOverError: it prints something that is not known here.
    """
    done = program.run("pkernfs", "iommu", "export", mnt, "--json")
    # An export that lacks damaged tables is one; the plan refuses the domains that it lacks.
    if done.returncode != 0 and not done.stdout:
        raise TakeOverError(program.complaint(done, "pkernfs: it failed"))
    return parse_export(json.loads(done.stdout))


def parse_export(document: dict[str, Any]) -> Export:
    """Check an export that has been read as JSON, and keep what is needed of it.

    :raises TakeOverError: it is of another version, or lacks a member.
    """
    if document.get("version") != VERSION:
        raise TakeOverError(f"export: version {document.get('version')} is not known")
    try:
        return Export(
            document["region"]["name"],
            _place(document["region"]["mmap"]),
            tuple(Attached(d["device"], d["hwpt"], d["adopted_by"]) for d in document["devices"]),
            {ioas["id"]: tuple(map(_mapping, ioas["mappings"])) for ioas in document["ioas"]},
            dict(document.get("damaged", {})),
        )
    except KeyError as error:
        raise TakeOverError(f"export: it has no {error}") from error


def _place(found: dict[str, Any] | None) -> Place | None:
    if found is None:
        return None
    return Place(Path(found["path"]), int(found["offset"]), int(found["length"]))


def _mapping(found: dict[str, Any]) -> Mapping:
    bar = found.get("bar")
    segment = found.get("segment")
    path = None if segment is None else segment["path"]
    return Mapping(
        found["iova"],
        found["length"],
        found["readable"],
        found["writeable"],
        found.get("file"),
        None if bar is None else Bar(bar["device"], bar["number"]),
        found.get("offset", 0),
        tuple(Memory(one["length"], one["region_offset"]) for one in found.get("pieces", ())),
        segment is not None,
        None if path is None else Path(path),
    )
