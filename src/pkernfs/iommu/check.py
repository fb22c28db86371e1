"""The proof that what an IOMMU can reach is right: a read-only look at every reachable entry.

Each table page is looked at once, so that time and memory are bounded however the tables are
damaged; findings are data. The first thousand of root-pgtables and of each domain are kept; once
there are ten thousand, the first of each domain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pkernfs.errors import PkernfsError
from pkernfs.iommu.config import Config, load_config
from pkernfs.iommu.context_walk import ContextReader, Device
from pkernfs.iommu.memory import Memory, merge_ranges, without_ranges
from pkernfs.iommu.page_pool import TablePool
from pkernfs.iommu.page_walk import MAX_FINDINGS, Code, Finding, check_tree, leaves, reader
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, PhysRange
from pkernfs.vtd.entries import (
    ADDRESS_MASK,
    ENTRIES,
    INTERRUPT_FIRST,
    INTERRUPT_LAST,
    MAX_PHYSICAL_BITS,
    bdf_text,
    in_interrupt_range,
    leaf_bytes,
)

_MAX_KEPT = 10 * MAX_FINDINGS


@dataclass
class Report:
    """Findings, and how much was looked at. ``found`` counts those that are not kept as well."""

    findings: list[Finding] = field(default_factory=list)
    found: int = 0
    tables: int = 0
    leaves: int = 0
    mapped_bytes: int = 0
    devices: list[Device] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """True if nothing is wrong."""
        return not self.found

    def note(self, finding: Finding) -> None:
        """One thing more that is wrong."""
        self.found += 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)


def check(
    root: Memory | None,
    domains: dict[str, Memory],
    allowed: Iterable[PhysRange],
    *,
    config: Config | None = None,
    physical_bits: int = MAX_PHYSICAL_BITS,
) -> Report:
    """Check root-pgtables (None: there is none) and the page tables of all domains.

    :param domains: the pages of each domain file, by its name.
    :param allowed: memory that may be mapped: that of linked files, but not of table files, and
        device BARs.
    """
    report = Report()
    if root is not None:
        try:
            config = config or load_config(root)
        except PkernfsError as e:
            at = root.first_page
            report.note(Finding(Code.CONFIGURATION, at, f"root-pgtables at {at:#x}: {e}"))
    config = config or Config()
    memories = [*domains.values(), *([root] if root is not None else [])]
    tables = merge_ranges(r for memory in memories for r in memory.ranges)
    mappable = without_ranges(merge_ranges(allowed), tables)
    if root is not None:
        _check_root(report, root, domains, config, physical_bits)
    for name, memory in domains.items():
        tree = check_tree(
            TablePool(memory.region, memory.pieces),
            memory.first_page,
            config.levels,
            allowed=mappable,
            tables=tables,
            physical_bits=physical_bits,
            name=name,
        )
        report.found += tree.found
        report.findings += tree.findings[: max(1, _MAX_KEPT - len(report.findings))]
        report.tables += tree.tables
        report.leaves += tree.leaves
        report.mapped_bytes += tree.mapped_bytes
        if not tree.found:
            _check_interrupt_range(report, name, memory, config.levels)
    return report


def _check_interrupt_range(report: Report, name: str, memory: Memory, levels: int) -> None:
    """Note what sound tables map where no unit translates, at the first such entry.

    Requests without PASID are interrupts there (3.15), so a device does not reach what is mapped.
    """
    where, mapped, first = PhysAddr(0), 0, Iova(0)
    read = reader(memory, memory.size // PAGE)
    for found in leaves(read, memory.first_page, levels, start=Iova(INTERRUPT_FIRST)):
        if found.iova > INTERRUPT_LAST:
            break
        table = PhysAddr(found.path[-1] & ADDRESS_MASK) if found.path else memory.first_page
        size = leaf_bytes(found.level)
        for leaf in found.present():
            if in_interrupt_range(leaf.iova, size):
                if not mapped:
                    first = leaf.iova
                    where = PhysAddr(table + leaf.iova // size % ENTRIES * 8)
                mapped += size
    if mapped:
        report.note(
            Finding(
                Code.INTERRUPT_RANGE,
                where,
                f"{name} entry at {where:#x}, iova {first:#x}: {mapped:#x} bytes in or around the "
                f"interrupt range: a unit translates nothing from {INTERRUPT_FIRST:#x} to "
                f"{INTERRUPT_LAST:#x}: unmap it",
            )
        )


def _check_root(
    report: Report, root: Memory, domains: dict[str, Memory], config: Config, physical_bits: int
) -> None:
    tops = {memory.first_page for memory in domains.values()}
    ids: dict[int, PhysAddr] = {}
    reader = ContextReader(root, root.first_page, config.mode, report.note, physical_bits)
    for device in reader.devices():
        report.devices.append(device)
        if not device.table:
            continue
        where = f"context entry of {bdf_text(device.source_id)} at {device.where:#x}"
        if device.table not in tops or device.levels != config.levels:
            report.note(
                Finding(
                    Code.UNKNOWN_DOMAIN,
                    device.where,
                    f"{where}: no domain's top-level table: got {device.table:#x}, "
                    f"{device.levels} levels",
                )
            )
        elif ids.setdefault(device.domain_id, device.table) != device.table:
            report.note(
                Finding(
                    Code.DOMAIN_ID,
                    device.where,
                    f"{where}: domain id of other tables: got {device.domain_id}",
                )
            )
    report.tables += len(reader.pages)
