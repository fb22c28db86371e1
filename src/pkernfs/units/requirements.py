"""Reasons why a unit cannot walk given tables, and why a device must not depend on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkernfs.host.dmar import Dmar, UnitStructure
from pkernfs.host.pci import PciDevice, reserved_memory_of, unit_of
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.page_walk import leaves, reader
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, SourceId
from pkernfs.vtd.entries import LARGEST_LEAF_LEVEL, bdf_text, is_present
from pkernfs.vtd.registers import Capabilities, Capability, ExtendedCapability

_SIZES = {2: "2 MiB", 3: "1 GiB"}


class Requirements(NamedTuple):
    """The things that tables ask of a unit.

    ``largest_leaf`` is its level, ``end`` the end of the highest address that is mapped, and
    ``physical_end`` that of the memory that they refer to.
    """

    config: Config
    domain_ids: Sequence[int]
    largest_leaf: int
    end: Iova
    physical_end: PhysAddr


def unmet_requirements(able: Capabilities, wanted: Requirements, host_bits: int) -> Iterator[str]:
    """List the reasons why a unit cannot walk the tables."""
    mode, levels = wanted.config.mode, wanted.config.levels
    if able.version >> 8 or not able.major:
        yield f"unknown version: got {able.version:#x}"
    if mode is Mode.SCALABLE:
        if not able.extended(ExtendedCapability.SMTS):
            yield "no scalable mode (ECAP.SMTS)"
        elif not able.extended(ExtendedCapability.SSTS):
            yield "no second stage in scalable mode (ECAP.SSTS)"
        if not able.extended(ExtendedCapability.QI):
            yield "no invalidation queue, which scalable mode needs (ECAP.QI)"
    if levels not in able.levels:
        known = ", ".join(map(str, able.levels)) or "none"
        yield f"no tables of {levels} levels (CAP.SAGAW): it walks {known}"
    if wanted.largest_leaf > able.largest_leaf:
        yield f"no pages of {_SIZES[wanted.largest_leaf]}, which are mapped (CAP.SSLPS)"
    if wanted.end > 1 << able.address_bits:
        bits = able.address_bits
        yield f"mapped up to {wanted.end:#x}, but addresses have {bits} bits (CAP.MGAW)"
    if wanted.physical_end > 1 << host_bits:
        yield f"memory up to {wanted.physical_end:#x}, but it reaches {host_bits} bits (DMAR)"
    for number in wanted.domain_ids:
        if number >= able.domain_ids:
            yield f"domain id {number}: it has {able.domain_ids} (CAP.ND)"
        elif number == 0 and able.has(Capability.CM):
            yield "domain id 0 is reserved (CAP.CM)"


def largest_leaf(memory: Memory, table: PhysAddr, levels: int) -> int:
    """Level of the largest leaf of a domain's tables, which are sound: 1, 2 or 3."""
    for level in range(LARGEST_LEAF_LEVEL, 1, -1):  # what is below a level may be large
        runs = leaves(reader(memory, memory.size // PAGE), table, levels, lowest=level)
        if any(is_present(entry) for run in runs for entry in run.entries):
            return level
    return 1


def unfit_reason(dmar: Dmar, device: PciDevice | None, source_id: SourceId) -> str | None:
    """Return the reason why a device must not depend on these tables; None: it may."""
    name = bdf_text(source_id)
    if device is None:
        return f"device {name}: there is none: detach it"
    if unit_of(dmar, device) is None:
        return f"device {name}: below no unit: its DMA is never translated"
    if not device.known:
        return (
            f"device {name}: the kernel shows too little of its configuration space (or of a "
            "bridge's) to tell if ATS or PASID are enabled: root is needed (CAP_SYS_ADMIN)"
        )
    if device.aliased:
        return f"device {name}: a bridge to conventional PCI is above it: its requests have no name"
    reserved = reserved_memory_of(dmar, device)
    if reserved:
        first = reserved[0]
        return (
            f"device {name}: the firmware has it use memory at {first.start:#x}-{first.last:#x} "
            "(RMRR), which no domain maps"
        )
    if device.ats:
        return f"device {name}: ATS is enabled, and its entry does not allow translation requests"
    if device.pasid:
        return f"device {name}: PASID is enabled, and its entry knows none"
    return None


def cut_off(
    dmar: Dmar,
    units: Sequence[UnitStructure],
    devices: Sequence[PciDevice],
    attached: set[SourceId],
) -> list[PciDevice]:
    """Devices that the kernel has at work below these units, and that their tables do not know."""
    return [
        d
        for d in devices
        if unit_of(dmar, d) in units
        and not d.bridge
        and d.bus_master
        and d.driver is not None
        and (d.segment or d.source_id not in attached)
    ]
