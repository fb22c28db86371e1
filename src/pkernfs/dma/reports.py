"""Questions about the tables of a file system, answered as text: translate, show, check, export.

Each of these is a generator, so that a daemon can serve others in between; what it yields is in
:mod:`pkernfs.dma.output`. A line is right for the moment at which it is made; between two of them
the tables may change.
"""

from __future__ import annotations

import contextlib
import json
import stat
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from pkernfs.dma.kernel_adopted import Adopted
from pkernfs.dma.mount import tables_of
from pkernfs.dma.output import PAUSE, Output, Pause, Question, Record, Status, Text
from pkernfs.dma.table_files import TableFiles
from pkernfs.errors import InvalidError, NotFoundError, PkernfsError
from pkernfs.fs.names import ROOT_PGTABLES, DirectoryEntry
from pkernfs.host.bars import Bar
from pkernfs.host.iomem import Span
from pkernfs.iommu import export, show
from pkernfs.iommu.check import Report, check
from pkernfs.iommu.context_walk import Device
from pkernfs.iommu.memory import Memory, overlaps
from pkernfs.iommu.translate import Translation, translate
from pkernfs.layout import INODE_FLAG_SEGMENT, INODE_FLAG_TABLE, PAGE, ROOT_INO
from pkernfs.quantities import Ino, Iova, PhysAddr, PhysRange, RegionOff, SourceId
from pkernfs.vtd.entries import bdf_text

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem
    from pkernfs.fs.inodes import Inode

_ROOT = ROOT_PGTABLES.decode()
_NAMES_AT_ONCE = 32
_WALKS = 3  # a file that is renamed while its name is looked for is missed
_LINES_AT_ONCE = 128
_MAPPINGS_AT_ONCE = 64
FAULT = 1
FOUND = 1


class Owner(NamedTuple):
    """Memory of a file: where it is, the inode, the offset in the file, its segment."""

    start: PhysAddr
    end: PhysAddr
    ino: Ino
    offset: int
    segment: export.SegmentPlace | None = None


class Owners:
    """Whose memory is where: the files of which something is mapped, and BARs.

    ``paths`` has a name of each inode.
    """

    def __init__(
        self, memory: Memory, pieces: list[Owner], bars: list[Bar], paths: dict[Ino, str]
    ) -> None:
        self._memory = memory
        self._pieces = sorted(pieces)
        self._starts = [p.start for p in self._pieces]
        self._bars = bars
        self._paths = paths

    def split(self, physical: PhysAddr, length: int) -> Iterator[export.Target]:
        """Tell what a range of physical memory is, piece by piece."""
        end = physical + length
        while physical < end:
            target = self._at(physical, end - physical)
            yield target
            physical = PhysAddr(physical + target.length)

    def _at(self, physical: PhysAddr, length: int) -> export.Target:
        """Tell what is there, as far as it goes; what is nobody's goes up to the next that is."""
        for bar in self._bars:
            offset = physical - bar.start
            if 0 <= offset < bar.length:
                length = min(length, bar.length - offset)
                return export.Target(physical, length, None, offset, None, bar)
            if offset < 0:
                length = min(length, -offset)
        at = self._memory.offset(physical, PAGE)
        if at is None:
            length = min(length, self._memory.gap(physical) or length)
        else:
            length = min(length, self._memory.room(physical))
        number = bisect_right(self._starts, physical) - 1
        piece = self._pieces[number] if number >= 0 else None
        if piece is None or physical >= piece.end:
            behind = self._starts[number + 1 : number + 2]
            length = min([length, *(start - physical for start in behind)])
            return export.Target(physical, length, None, 0, at, None)
        length = min(length, piece.end - physical)
        offset = piece.offset + physical - piece.start
        path = self._paths.get(piece.ino)
        return export.Target(physical, length, path, offset, at, None, piece.segment)


class NamedFile(NamedTuple):
    """A regular file, by one of its paths."""

    path: str
    ino: Ino


def walk_files(fs: FileSystem) -> Iterator[NamedFile | Pause]:
    """Path and inode number of every regular file; Pause is a place to pause.

    Files that come, go or get another name meanwhile may be missing, and so are those of which a
    damaged directory has the name; one that has several names is there for each.
    """
    todo = [(ROOT_INO, "")]
    seen = {ROOT_INO}  # a damaged directory may lead back
    while todo:
        directory, path = todo.pop()
        cookie = 0
        while True:
            batch = _names(fs, directory, cookie)
            for name, ino, kind, cookie in batch:  # noqa: B007 - the last one is where to go on
                there = f"{path}/{name.decode(errors='surrogateescape')}"
                if kind == stat.S_IFDIR >> 12:
                    if ino not in seen:
                        seen.add(ino)
                        todo.append((ino, there))
                elif kind == stat.S_IFREG >> 12:
                    yield NamedFile(there, ino)
            if len(batch) < _NAMES_AT_ONCE:
                break
            yield PAUSE
        yield PAUSE


def _names(fs: FileSystem, directory: Ino, cookie: int) -> list[DirectoryEntry]:
    entries: list[DirectoryEntry] = []
    with contextlib.suppress(PkernfsError):  # removed meanwhile, or damaged: who opens it is told
        entries.extend(islice(fs.readdir(directory, cookie), _NAMES_AT_ONCE))
    return entries


def mapped_pieces(fs: FileSystem) -> Generator[Pause, None, list[Owner]]:
    """Find the files of which something is mapped, or something close by."""
    tables = tables_of(fs)
    pieces = yield from pieces_of(fs, tables.may_be_mapped)
    memory = [Span(p.start, p.end - p.start) for p in pieces if p.segment is not None]
    held = [PhysRange.of(*span) for span in tables.held_memory(memory)]
    return [p for p in pieces if p.segment is None or overlaps(held, PhysRange(p.start, p.end))]


def pieces_of(
    fs: FileSystem, wanted: Callable[[RegionOff, int], bool]
) -> Generator[Pause, None, list[Owner]]:
    """Find the files in memory that is ``wanted``, which is asked for region offset and bytes.

    Of files that have segments, all. By inode, not by name: a file that is renamed meanwhile is not
    missed.
    """
    pieces: list[Owner] = []
    for at, ino in enumerate(fs.numbers()):
        pieces += _wanted_pieces(fs, ino, wanted)
        if at % _NAMES_AT_ONCE == 0:
            yield PAUSE
    return pieces


def _wanted_pieces(
    fs: FileSystem, ino: Ino, wanted: Callable[[RegionOff, int], bool]
) -> list[Owner]:
    try:
        found = fs.stat(ino)
        if not stat.S_ISREG(found.mode) or not found.nlink or not found.data_pages:
            return []
        inode = fs.inode(ino)
        if inode.flags & INODE_FLAG_TABLE:
            return []
        if inode.flags & INODE_FLAG_SEGMENT:
            return list(_segment_pieces(fs, inode))
        return [
            Owner(physical, PhysAddr(physical + count), ino, e.offset + at - e.region_offset)
            for e in fs.extents(ino)
            if wanted(e.region_offset, e.length)
            for at, count, physical in fs.region.physical_runs(e.region_offset, e.length)
            if physical is not None
        ]
    except NotFoundError:
        return []  # removed meanwhile


def _segment_pieces(fs: FileSystem, inode: Inode) -> Iterator[Owner]:
    segments, row = fs.segments, fs.segments.of(inode)
    place = export.SegmentPlace(row.number, segments.native_path(row))
    for piece in tables_of(fs).file_pieces(inode.ino, 0, -(-inode.size // PAGE) * PAGE):
        end = PhysAddr(piece.physical + piece.length)
        yield Owner(piece.physical, end, inode.ino, piece.offset, place)


def owners(fs: FileSystem) -> Generator[Pause, None, Owners]:
    """Find out whose memory is mapped."""
    pieces = yield from mapped_pieces(fs)
    paths: dict[Ino, str] = {}
    wanted = {p.ino for p in pieces}
    for _ in range(_WALKS):
        for found in walk_files(fs) if wanted else ():
            if isinstance(found, Pause):
                yield PAUSE
            elif found.ino in wanted:
                wanted.remove(found.ino)
                paths[found.ino] = found.path
                if not wanted:
                    break
    return Owners(tables_of(fs).region_memory(), pieces, tables_of(fs).bars(), paths)


# ---------------------------------------------------------------------- translate


def translate_text(
    fs: FileSystem, source_id: SourceId, iova: Iova, pasid: int | None = None, access: int = 0
) -> Output:
    """Translate a request as the hardware does, a line for each entry that is read."""
    result = translation(fs, source_id, iova, pasid, access)
    whose = yield from owners(fs)
    target = None
    if result.physical is not None:
        base = PhysAddr(result.physical - result.physical % PAGE)
        target = next(whose.split(base, PAGE))
    yield _text(show.translation(result, source_id, target))
    yield Status(FAULT if result.fault is not None else 0)


def translation(
    fs: FileSystem, source_id: SourceId, iova: Iova, pasid: int | None = None, access: int = 0
) -> Translation:
    """Translate a request of a device through the tables of a file system.

    :raises NotFoundError, InvalidError, TableDamageError: there are no tables to walk.
    """
    tables = tables_of(fs)
    return translate(
        tables.region_memory(),
        tables.root_memory().first_page,
        source_id,
        iova,
        mode=tables.config.mode,
        pasid=pasid,
        access=access,
    )


# ---------------------------------------------------------------------- show


def show_text(fs: FileSystem, number: int | None, *, merge: bool = False) -> Output:
    """The root, context and page tables (or one domain's), as the kernel's debugfs shows its own.

    ``merge``: a line for each run of addresses that maps consecutive memory, not for each leaf.

    :raises NotFoundError, InvalidError, TableDamageError: no such domain, or nothing to walk.
    """
    tables = tables_of(fs)
    tables.check_place()
    devices = tables.devices()
    if number is None and tables.root is not None:
        yield _text(show.translation_struct("pkernfs", tables.root.root, devices))
    for at in sorted(tables.domains) if number is None else [number]:
        yield from _domain_text(tables, at, devices, merge=merge)
    if number is None:
        for name, reason in tables.damaged.items():
            yield _text([f"iommu/{name.decode()}: damaged: {reason}: run `pkernfs iommu check`"])


def _domain_text(tables: TableFiles, number: int, devices: list[Device], *, merge: bool) -> Output:
    table = tables.domain(number)
    names = [(bdf_text(d.source_id), d.pasid) for d in devices if d.table == table.root]
    names = names or [(f"dom-{number}", None)]
    for name, pasid in names[:-1]:  # the tables themselves are shown once, under the last
        yield _text([show.domain_head(name, table.root, pasid)])
    name, pasid = names[-1]
    yield _text([show.domain_head(name, table.root, pasid)])
    if merge:
        lines = show.merged(tables.mappings(number))
        while batch := list(islice(lines, _LINES_AT_ONCE)):
            yield _text(batch)
    else:
        yield _text([show.DOMAIN_COLUMNS])
        yield from _leaves_text(tables, number)
    yield _text([""])


def _leaves_text(tables: TableFiles, number: int) -> Output:
    """A line for each leaf. Every batch is a walk of its own: the tables may change in between."""
    at = Iova(0)
    while True:
        table = tables.domain(number)
        lines = show.leaf_lines(table.memory, table.root, table.levels, at)
        batch = list(islice(lines, _LINES_AT_ONCE))
        if not batch:
            return
        yield _text(line for _end, line in batch)
        at = batch[-1][0]


def _text(lines: Iterable[str]) -> Text:
    return Text("".join(f"{line}\n" for line in lines))


def _record(where: str, record: dict[str, Any]) -> Record:
    return Record({"in": where, "record": record})


def show_records(fs: FileSystem, number: int | None) -> Output:
    """The same as records: entries as they are, and what is mapped with neighbours joined."""
    tables = tables_of(fs)
    tables.check_place()
    root = tables.root.root if tables.root is not None else None
    unit = export.unit(tables.config, root)
    yield Record({"unit": unit, "damaged": _damaged(tables), "devices": [], "domains": []})
    numbers = sorted(tables.domains) if number is None else [number]
    non_persistent = tables.non_persistent()
    shown = {tables.domain(n).root for n in numbers}
    for d in tables.devices():
        if number is None or d.table in shown:
            yield _record("devices", show.device_record(d, d.source_id not in non_persistent))
    for n in numbers:
        table = tables.domain(n)
        record = {"id": f"dom-{n}", "table": table.root, "levels": table.levels}
        yield _record("domains", {**record, "mappings": []})
        for at, m in enumerate(tables.mappings(n)):
            yield _record("mappings", show.mapping_record(m))
            if at % _MAPPINGS_AT_ONCE == 0:
                yield PAUSE


def _damaged(tables: TableFiles) -> dict[str, str]:
    return {name.decode(): reason for name, reason in tables.damaged.items()}


# ---------------------------------------------------------------------- export


def export_records(fs: FileSystem, number: int | None) -> Output:
    """The records of :mod:`pkernfs.iommu.export`; status 1 if damaged tables are missing in them.

    :raises NotFoundError, InvalidError, TableDamageError: as :func:`show_text`.
    """
    tables = tables_of(fs)
    tables.check_place()
    numbers = sorted(tables.domains) if number is None else [number]
    names = {tables.domain(n).root: f"dom-{n}" for n in numbers}
    devices = [d for d in tables.devices() if number is None or d.table in names]
    whose = yield from owners(fs)
    root = tables.root.root if tables.root is not None else None
    damaged = {k: v for k, v in _damaged(tables).items() if number is None or k == _ROOT}
    region = export.region(fs.region.name, fs.region.size, fs.region.place)
    yield Record(export.head(tables.config, root, fs.superblock.uuid, region, damaged))
    for top, name in names.items():
        hwpt = export.hwpt(name, top, tables.config.levels, devices)
        yield _record("hwpt", hwpt)
        container = export.container(name, top, devices)
        yield _record("vfio_containers", container)
    adopted = tables.adopted_by()
    for d in devices:
        unit = adopted.get(Adopted(d.source_id, d.table))
        yield _record("devices", export.device(d, names.get(d.table), unit))
    for n in numbers:
        yield _record("ioas", {"id": f"dom-{n}", "mappings": []})
        for at, m in enumerate(export.mappings(tables.mappings(n), whose.split)):
            yield _record("mappings", m)
            if at % _MAPPINGS_AT_ONCE == 0:
                yield PAUSE
    if damaged:
        yield Status(FOUND)


# ---------------------------------------------------------------------- check


class CheckInput(NamedTuple):
    """All that a check needs beside the tables themselves."""

    root: Memory | None
    domains: dict[str, Memory]
    allowed: list[PhysRange]

    def run(self) -> Report:
        """Check; in any thread, while the tables do not change."""
        return check(self.root, self.domains, self.allowed)


def prepare_check(fs: FileSystem) -> Generator[Pause, None, CheckInput]:
    """Find the tables, and what they may map: memory of live files and recorded BARs.

    :raises InvalidError, TableDamageError: no addresses, or tables of another place.
    """
    tables = tables_of(fs)
    tables.check_place()
    pieces = yield from mapped_pieces(fs)
    allowed = [PhysRange(piece.start, piece.end) for piece in pieces]
    allowed += [bar.range for bar in tables.bars()]
    memories = {name: tables.memory(name) for name in tables.names}
    root = memories.pop(ROOT_PGTABLES, None)
    domains = {name.decode(): memory for name, memory in memories.items()}
    return CheckInput(root, domains, allowed)


def check_text(report: Report, *, as_json: bool) -> Output:
    """The findings, one a line, and what was looked at."""
    if as_json:
        yield _text([json.dumps(_check_json(report), indent=2)])
    else:
        for finding in report.findings:
            yield _text([f"{finding.code.name}: {finding.message}"])
        if report.found > len(report.findings):
            yield _text([f"... and {report.found - len(report.findings)} more"])
        verdict = "clean" if report.clean else f"{report.found} problems"
        said = (
            f"{len(report.devices)} devices, {report.tables} tables, {report.leaves} leaves, "
            f"{report.mapped_bytes} bytes mapped: {verdict}"
        )
        yield _text([said])
    yield Status(0 if report.clean else FOUND)


def _check_json(report: Report) -> dict[str, Any]:
    findings = [
        {"code": f.code.name, "where": f.where, "message": f.message} for f in report.findings
    ]
    return {
        "clean": report.clean,
        "found": report.found,
        "findings": findings,
        "devices": [bdf_text(d.source_id) for d in report.devices],
        "tables": report.tables,
        "leaves": report.leaves,
        "mapped_bytes": report.mapped_bytes,
    }


# ---------------------------------------------------------------------- questions


def answer(fs: FileSystem, question: Question) -> Output:
    """The output of translate, show, export or check.

    :raises InvalidError: another question.
    """
    if question.what == "translate" and None not in (question.device, question.iova):
        assert question.device is not None
        assert question.iova is not None
        return translate_text(fs, question.device, question.iova, question.pasid, question.access)
    if question.what == "show":
        if question.as_json:
            return show_records(fs, question.domain)
        return show_text(fs, question.domain, merge=question.merge)
    if question.what == "export":
        return export_records(fs, question.domain)
    if question.what == "check":
        return _check(fs, as_json=question.as_json)
    raise InvalidError(f"iommu: cannot read {question.what!r}")


def _check(fs: FileSystem, *, as_json: bool) -> Output:
    given = yield from prepare_check(fs)
    yield from check_text(given.run(), as_json=as_json)
