"""``pkernfs holders``: print who maps, holds, or does DMA into the memory of files.

All of it is asked of the kernel and of the tables, when the command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pkernfs.commands.extents import read_extents
from pkernfs.commands.qemu_args import mem_path_of
from pkernfs.control import client
from pkernfs.control.mounts import Mount, beneath
from pkernfs.control.protocol import Ping
from pkernfs.control.segment_protocol import ListSegments, SegmentRow
from pkernfs.control.table_protocol import Read
from pkernfs.dma.output import Record
from pkernfs.errors import (
    InvalidError,
    NotFoundError,
    PermissionDeniedError,
    PkernfsError,
    one_line,
)
from pkernfs.host.holders import Target, look
from pkernfs.host.left_mappings import LeftMapping, left_mappings
from pkernfs.host.mappings import mappings_of
from pkernfs.host.same_memory import may_map
from pkernfs.quantities import Ino

#: What no look at /proc finds.
_NEVER_SEEN = "descriptors on their way between processes, processes outside this PID namespace"


class Holder(NamedTuple):
    """A process (``pid``), or a device or its domain (None), and what it does with the memory.

    ``through`` is what it has open: ``segment``, ``mount``, ``region`` or ``tables``.
    """

    kind: str
    pid: int | None
    name: str
    how: str
    through: str


@dataclass
class HeldFile:
    """A file, or a segment that no file has any more (``path`` is None), and who holds it."""

    path: str | None
    ino: Ino
    segment: int | None = None
    native_path: str | None = None
    holders: list[Holder] = field(default_factory=list)
    native: bool = False


class Answer(NamedTuple):
    """The files in the order of their segments, and what could not be seen."""

    files: list[HeldFile]
    not_seen: list[str]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs holders``."""
    parser.add_argument("--json", action="store_true", help="print JSON.")
    parser.add_argument(
        "target",
        metavar="MNT|FILE",
        help="a mount, for all files that have a segment, or a file, with a segment or without.",
    )


def run(args: argparse.Namespace) -> int:
    """Print who holds what of ``args.target``."""
    answer = find(args.target)
    if args.json:
        print(json.dumps(describe(args.target, answer), indent=2))
    else:
        _print(answer)
    return 0


def describe(target: str, answer: Answer) -> dict[str, Any]:
    """Build the JSON of ``pkernfs holders``, as docs/operations.md has it."""
    files = [{**vars(f), "holders": [h._asdict() for h in f.holders]} for f in answer.files]
    return {"target": target, "files": files, "not_seen": answer.not_seen}


def find(target: str) -> Answer:
    """Ask the kernel and the daemon who holds the files of a mount, or one file.

    :raises InvalidError: it is in no pkernfs, or neither a regular file nor a directory.
    """
    with beneath(target) as place:
        mount = client.find_mount(place)
        rows = list(client.stream(target, ListSegments(), mount))
        files = _files_of(target, os.stat(place), mount, rows)
    daemon = client.call(target, Ping(), mount).pid
    hidden = _add_processes(mount, files, daemon)
    for file in files:
        if file.segment is None and file.path is not None:
            file.holders += _of_region(mount, file.path, daemon)
    not_seen = [_NEVER_SEEN]
    if hidden:
        more = "; root sees more" if os.geteuid() else ""
        who = "1 process that lets" if hidden == 1 else f"{hidden} processes that let"
        not_seen.append(f"{who} nobody look{more}")
    try:
        _add_domains(mount, files)
    except PkernfsError as e:
        not_seen.append(f"what is mapped for DMA: {e}")
    return Answer(files, not_seen)


def _files_of(
    target: str, found: os.stat_result, mount: Mount, rows: list[SegmentRow]
) -> list[HeldFile]:
    if stat.S_ISDIR(found.st_mode):
        return [_file(mount, row) for row in rows]
    if not stat.S_ISREG(found.st_mode):
        raise InvalidError(f"{target}: no memory to hold: it is not a regular file")
    path = os.path.abspath(target)
    for row in rows:
        if row.ino == found.st_ino and row.state == "in use":
            return [HeldFile(path, row.ino, row.number, row.native_path or None, native=row.native)]
    return [HeldFile(path, Ino(found.st_ino))]


def _file(mount: Mount, row: SegmentRow) -> HeldFile:
    path = f"{mount.mount_point.rstrip('/')}{row.path}" if row.path else None
    return HeldFile(path, row.ino, row.number, row.native_path or None, native=row.native)


# ------------------------------------------------------------------------------- processes


def _add_processes(mount: Mount, files: list[HeldFile], daemon: int) -> int:
    """Add who has a segment, or a file of the mount; return how many processes hide theirs."""
    wanted: dict[Target, tuple[HeldFile, str]] = {}
    for file in files:
        if file.path is not None:
            wanted[Target(mount.device, file.ino)] = (file, "mount")
        if (target := _segment(file)) is not None:
            wanted[target] = (file, "segment")
    seen = look(wanted)
    for one in seen.found:
        if one.pid == daemon:  # it maps what is read or written, and lets go when asked to
            continue
        file, through = wanted[one.target]
        how = "maps it" if one.maps else "has it open"
        how += " through the mount" if through == "mount" else ""
        file.holders.append(Holder("process", one.pid, one.command, how, through))
    with_segment = {Ino(file.ino): file for file in files if file.segment is not None}
    for left in left_mappings(with_segment):
        how = "maps it through a mount that is gone"
        holder = Holder("process", left.pid, left.command, how, "mount")
        file = with_segment[left.ino]
        if _may_map(left, file.native_path):
            file.holders.append(holder)
    return seen.hidden


def _may_map(left: LeftMapping, native_path: str | None) -> bool:
    """Tell if what is mapped of a mount that is gone may be a segment; False: it is another file's.

    Who may not write the segment is not told.
    """
    if native_path is None:
        return True
    try:
        fd = os.open(native_path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        return may_map(left.pid, left.areas, fd)
    finally:
        os.close(fd)


def _segment(file: HeldFile) -> Target | None:
    """What to look for of a segment; None if there is none here."""
    if file.native_path is None:
        return None
    try:
        return Target.of(os.stat(file.native_path), os.path.basename(file.native_path))
    except OSError:
        return None


def _of_region(mount: Mount, path: str, daemon: int) -> Iterator[Holder]:
    """Yield who maps the part of the region that a file without a segment has."""
    place = mem_path_of(mount.source)
    parts = [(place.start + e.region_offset, e.length) for e in read_extents(path)]
    told = {daemon}
    for mapping in mappings_of(place.path):
        if mapping.pid not in told and any(
            mapping.start < start + length and start < mapping.end for start, length in parts
        ):
            told.add(mapping.pid)
            how = "maps its part of the region"
            yield Holder("process", mapping.pid, mapping.command, how, "region")


# ------------------------------------------------------------------------------- devices


def _add_domains(mount: Mount, files: list[HeldFile]) -> None:
    """Add the domains that map a file's memory for devices, and the devices that are attached.

    :raises PkernfsError: the tables do not tell.
    """
    known: set[tuple[str, int]] = set()
    devices: dict[str, list[str]] = {}
    domain = ""
    for kind, record in _records(mount):
        if kind == "devices":  # they come before all mappings
            devices.setdefault(record["hwpt"], []).append(record["device"])
        elif kind == "ioas":
            domain = record["id"]
        elif kind == "mappings":
            ino = _ino(mount, record.get("file"))
            if ino is None or (domain, ino) in known:
                continue
            known.add((domain, ino))
            found = list(_reached(domain, record["iova"], devices.get(domain, [])))
            for file in files:
                if file.ino == ino and file.path is not None:
                    file.holders += found


def _reached(domain: str, iova: int, devices: list[str]) -> Iterator[Holder]:
    how = f"maps it for devices, at {iova:#x}"
    yield Holder("domain", None, domain, how, "tables")
    for device in devices:
        yield Holder("device", None, device, f"reaches it by {domain}", "tables")


def _records(mount: Mount) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of `pkernfs iommu export`, each with its list; none without tables."""
    try:
        for item in client.stream(mount.mount_point, Read("export", as_json=True), mount):
            if isinstance(item, Record) and "in" in item.record:
                yield item.record["in"], item.record["record"]
    except (NotFoundError, InvalidError):
        return


def _ino(mount: Mount, path: str | None) -> int | None:
    try:
        if path is None:
            return None
        with beneath(mount.mount_point + path) as place:
            return os.stat(place).st_ino
    except (OSError, PermissionDeniedError):
        return None


# ------------------------------------------------------------------------------- as text


def _print(answer: Answer) -> None:
    for file in answer.files:
        who = file.path or "a removed file"
        where = "in the region" if file.segment is None else f"segment {file.segment}"
        if file.native_path is not None:
            where += f", {file.native_path}"
        if file.native:
            where += ", native"
        print(one_line(f"{who} ({where}): {'' if file.holders else 'nobody'}").rstrip())
        for holder in file.holders:
            name = holder.name if holder.pid is None else f"process {holder.pid} ({holder.name})"
            print(f"  {one_line(name)} {holder.how}")
    print(f"not seen: {'; '.join(answer.not_seen)}")
