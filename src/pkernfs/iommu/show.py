"""Tables as text, in the manner of the kernel's debugfs files for Intel IOMMUs.

``dmar_translation_struct`` and ``domain_translation_struct`` (since Linux 6.7), column for column.
The lines come one by one: a domain of 4 KiB pages has many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pkernfs.iommu.context_walk import Device
from pkernfs.iommu.export import Record, Target
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.page_pool import Mapping
from pkernfs.iommu.page_walk import leaves, reader
from pkernfs.iommu.translate import Translation
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, SourceId
from pkernfs.vtd.entries import LEVELS, bdf_text, leaf_bytes, perm_text

_TRANSLATION_HEAD = "B.D.F\tRoot_entry\t\t\t\tContext_entry\t\t\t\tPASID\tPASID_table_entry"
DOMAIN_COLUMNS = "{:<17}\t{:<18}\t{:<18}\t{:<18}\t{:<18}\t{}".format(
    "IOVA_PFN", "PML5E", "PML4E", "PDPE", "PDE", "PTE"
)
_FIRST = Iova(0)


def translation_struct(name: str, root: PhysAddr, devices: Iterable[Device]) -> Iterator[str]:
    """The root table at ``root`` of unit ``name``, a line for each device and PASID."""
    yield f"IOMMU {name}: Root Table Address: {root:#x}"
    yield _TRANSLATION_HEAD
    for d in devices:
        pasid = -1 if d.pasid is None else d.pasid
        third = d.pasid_words[2::-1] if d.pasid_words else (0, 0, 0)
        yield "\t".join(
            [
                bdf_text(d.source_id)[5:],
                _words(d.root_words[::-1]),
                _words(d.context_words[1::-1]),
                f"{pasid:<6d}",
                _words(third),
            ]
        )
    yield ""


def domain_struct(
    device: str, memory: Memory, table: PhysAddr, levels: int, pasid: int | None = None
) -> Iterator[str]:
    """The page tables at ``table``, a line for each leaf.

    ``device`` is what the kernel has as ``DDDD:BB:DD.F``.

    :raises TableDamageError: a table outside ``memory``, or reached too often.
    """
    yield domain_head(device, table, pasid)
    yield DOMAIN_COLUMNS
    for line in leaf_lines(memory, table, levels):
        yield line.text
    yield ""


class LeafLine(NamedTuple):
    """The end of what a leaf maps, and the line for it."""

    end: Iova
    text: str


def leaf_lines(
    memory: Memory, table: PhysAddr, levels: int, start: Iova = _FIRST
) -> Iterator[LeafLine]:
    """A line for each leaf, from address ``start`` on.

    The tables must not change meanwhile; afterwards one may go on from the last end.

    :raises TableDamageError: a table outside ``memory``, or reached too often.
    """
    nothing = (0,) * (max(LEVELS) - levels)
    read = reader(memory, memory.size // PAGE)
    for run in leaves(read, table, levels, start=start):
        size = leaf_bytes(run.level)
        path = "".join(f"{entry:#018x}\t" for entry in (*nothing, *run.path))
        for iova, entry in run.present():
            yield LeafLine(Iova(iova + size), f"{iova // PAGE:#015x} |\t{path}{entry:#018x}")


def domain_head(device: str, table: PhysAddr, pasid: int | None = None) -> str:
    """The line that says whose page tables follow."""
    with_pasid = "" if pasid is None else f"with pasid {pasid:x} "
    return f"Device {device} {with_pasid}@{table:#x}"


def translation(t: Translation, source_id: SourceId, target: Target | None) -> Iterator[str]:
    """Each entry that was read, with its physical address, and how the request ended.

    ``target`` is whose memory it has come to, if it has.
    """
    yield f"device {bdf_text(source_id)} iova {t.iova:#x}"
    for step in t.steps:
        yield f"{step.name:<22}at {step.address:#014x}: {_words(step.words[::-1])}"
    if t.fault is not None:
        yield f"fault {int(t.fault):#04x} {t.fault.name}: {t.fault.text}"
    elif t.interrupt:
        yield "interrupt: a write to this address is an interrupt, and is not translated"
    else:
        size = f", {_size(t.level)} page" if t.level else ", passed through"
        domain = "" if t.domain_id is None else f", domain id {t.domain_id}"
        yield f"physical {t.physical:#x} {perm_text(t.perm)}{size}{domain}{_whose(t, target)}"


def _size(level: int) -> str:
    return {1: "4 KiB", 2: "2 MiB", 3: "1 GiB"}[level]


def _whose(t: Translation, target: Target | None) -> str:
    if target is None:
        return ""
    assert t.physical is not None
    offset = target.offset + t.physical - target.physical
    if target.bar is not None:
        return f", {target.bar.name} + {offset:#x}"
    if target.path is not None:
        return f", {target.path} + {offset:#x}"
    return ", no live file's memory"


def device_record(d: Device, persistent: bool) -> Record:
    """A device for the JSON of ``show``: words as in memory, the lowest first."""
    return {
        "device": bdf_text(d.source_id),
        "persistent": persistent,
        "pasid": d.pasid,
        "domain_id": d.domain_id,
        "table": d.table,
        "levels": d.levels,
        "root_entry": list(d.root_words),
        "context_entry": list(d.context_words),
        "pasid_table_entry": list(d.pasid_words),
    }


def mapping_record(m: Mapping) -> Record:
    """A mapping for the JSON of ``show``, in bytes."""
    return {
        "iova": m.iova,
        "length": m.length,
        "physical": m.physical,
        "perm": perm_text(m.perm),
    }


def merged(mappings: Iterable[Mapping]) -> Iterator[str]:
    """A line for each run of addresses that maps consecutive memory."""
    yield "{:<33}\t{:<33}\t{}".format("IOVA", "PHYSICAL", "PERM")
    for m in mappings:
        iova = f"{m.iova:#018x}-{m.iova + m.length - 1:#x}"
        physical = f"{m.physical:#018x}-{m.physical + m.length - 1:#x}"
        yield f"{iova:<33}\t{physical:<33}\t{perm_text(m.perm)}"


def _words(words: Iterable[int]) -> str:
    return ":".join(f"{word:#018x}" for word in words)
