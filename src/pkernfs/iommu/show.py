"""Tables as text, in the manner of the kernel's debugfs files for Intel IOMMUs.

``dmar_translation_struct`` and ``domain_translation_struct`` (since Linux 6.7), column for column.
The lines come one by one: a domain of 4 KiB pages has many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pkernfs.errors import CorruptionError
from pkernfs.iommu.contexts import Device
from pkernfs.iommu.entries import ADDRESS_MASK, bdf_text, is_leaf, is_present, leaf_bytes, perm_text
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.pool import Mapping
from pkernfs.layout import PAGE

_TRANSLATION_HEAD = "B.D.F\tRoot_entry\t\t\t\tContext_entry\t\t\t\tPASID\tPASID_table_entry"
_DOMAIN_HEAD = "{:<17}\t{:<18}\t{:<18}\t{:<18}\t{:<18}\t{}".format(
    "IOVA_PFN", "PML5E", "PML4E", "PDPE", "PDE", "PTE"
)


def translation_struct(name: str, root: int, devices: Iterable[Device]) -> Iterator[str]:
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
    device: str, memory: Memory, table: int, levels: int, pasid: int | None = None
) -> Iterator[str]:
    """The page tables at ``table``, a line for each leaf.

    ``device`` is what the kernel has as ``DDDD:BB:DD.F``.

    :raises CorruptionError: a table outside ``memory``, or reached too often.
    """
    with_pasid = "" if pasid is None else f"with pasid {pasid:x} "
    yield f"Device {device} {with_pasid}@{table:#x}"
    yield _DOMAIN_HEAD
    yield from _Leaves(memory).lines(table, levels, 0, [0] * 6)
    yield ""


def merged(mappings: Iterable[Mapping]) -> Iterator[str]:
    """A line for each run of addresses that maps consecutive memory."""
    yield "{:<33}\t{:<33}\t{}".format("IOVA", "PHYSICAL", "PERM")
    for m in mappings:
        iova = f"{m.iova:#018x}-{m.iova + m.length - 1:#x}"
        physical = f"{m.physical:#018x}-{m.physical + m.length - 1:#x}"
        yield f"{iova:<33}\t{physical:<33}\t{perm_text(m.perm)}"


class _Leaves:
    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._left = memory.size // PAGE

    def lines(self, table: int, level: int, start: int, path: list[int]) -> Iterator[str]:
        self._left -= 1
        words = self._memory.words(table, PAGE // 8)
        if words is None or self._left < 0:
            raise CorruptionError(f"page table at {table:#x}: damaged: run the check")
        size = leaf_bytes(level)
        for index, entry in enumerate(words):
            if not is_present(entry):
                continue
            path[level] = entry
            at = start + index * size
            if is_leaf(entry, level):
                yield _leaf_line(at, path)
            else:
                yield from self.lines(entry & ADDRESS_MASK, level - 1, at, path)
            path[level] = 0


def _leaf_line(iova: int, path: list[int]) -> str:
    shown = [path[5], path[4], path[3]]
    if path[2]:
        shown.append(path[2])
        if path[1]:
            shown.append(path[1])
    return "\t".join([f"{iova // PAGE:#015x} |", *[f"{entry:#018x}" for entry in shown]])


def _words(words: Iterable[int]) -> str:
    return ":".join(f"{word:#018x}" for word in words)
