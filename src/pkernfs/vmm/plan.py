"""The plan of a take-over: which domains, with which devices, and why it could not work.

What can be known beforehand is checked here, and nothing is changed beyond loading VFIO's modules:
what fails later has stopped a device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pkernfs.errors import TakeOverError
from pkernfs.quantities import Iova
from pkernfs.vmm import program, sysfs, vfio
from pkernfs.vmm.export import Attached, Bar, Export, Mapping

_MODULES = Path("/sys/module")
_INTERRUPTS = Path("/proc/interrupts")
#: The drivers that the devices of a group may have when VFIO takes it.
_DRIVERS = (None, sysfs.DRIVER, "pcieport")
#: Mappings in a container, if the module does not say (vfio_iommu_type1.c, dma_entry_limit).
_MOST_ENTRIES = 65535


@dataclass(frozen=True)
class Piece:
    """Addresses of a domain and the memory that they reach, consecutive in both. Bytes.

    :ivar perm: vfio.READ, vfio.WRITE or both
    :ivar offset: in the region, in ``bar``, or in ``segment``
    :ivar segment: what a program maps to have the segment; None: it is in the region, or in a BAR
    """

    iova: Iova
    length: int
    perm: int
    offset: int
    bar: Bar | None = None
    segment: Path | None = None


@dataclass(frozen=True)
class Domain:
    """A domain of the export: what it maps, and the devices to be taken over with it."""

    name: str
    pieces: list[Piece]
    devices: list[str]

    def groups(self) -> list[list[str]]:
        """Its devices by IOMMU group: those of one group change together.

        :raises VfioError: a device is gone, or in no group.
        """
        by_group: dict[int, list[str]] = {}
        for bdf in self.devices:
            by_group.setdefault(sysfs.group_of(bdf), []).append(bdf)
        return list(by_group.values())

    @property
    def bytes(self) -> int:
        """The bytes that it maps."""
        return sum(piece.length for piece in self.pieces)


def plan(export: Export, devices: Sequence[str] = (), spare: str | None = None) -> list[Domain]:
    """Plan a take-over of all attached devices, or of ``devices``, by their domains.

    :param spare: see :meth:`pkernfs.vmm.takeover.TakeOver.take`
    :raises TakeOverError: it cannot work, and why.
    :raises VfioError: a device is gone, or in no IOMMU group.
    """
    attached = {one.device: one for one in export.devices}
    wanted = _wanted(export, attached, devices)
    domains = []
    for name, mappings in export.domains.items():
        mine = [bdf for bdf in wanted if attached[bdf].domain == name]
        if mine:
            domains.append(Domain(name, [p for m in mappings for p in _pieces(m)], mine))
    for bdf in wanted:
        _check_device(attached[bdf])
    _check_host()
    for domain in domains:
        _check_domain(domain, attached)
    if spare is not None:
        _check_spare(spare, attached)
    return domains


def _wanted(export: Export, attached: dict[str, Attached], devices: Sequence[str]) -> list[str]:
    """The devices to take over, each attached to a domain that the export has."""
    if root := export.damaged.get("root-pgtables"):
        raise TakeOverError(f"root-pgtables: damaged: {root}: run pkernfs iommu check")
    for bdf in devices:
        if bdf not in attached:
            raise TakeOverError(f"{bdf}: not attached in this region")
    wanted = [bdf for bdf in attached if not devices or bdf in devices]
    if not wanted:
        raise TakeOverError("no device is attached in this region")
    for bdf in wanted:
        if attached[bdf].domain is None:
            raise TakeOverError(f"{bdf}: attached to what is no domain: run pkernfs iommu check")
    return wanted


def _pieces(mapping: Mapping) -> Iterator[Piece]:
    """The memory of a mapping, piece by piece."""
    perm = (vfio.READ if mapping.readable else 0) | (vfio.WRITE if mapping.writeable else 0)
    iova = mapping.iova
    if mapping.bar is not None:
        yield Piece(iova, mapping.length, perm, mapping.offset, mapping.bar)
        return
    if mapping.has_segment:
        if mapping.segment is None:
            raise TakeOverError(f"{iova:#x}: its segment is not here: mount again")
        yield Piece(iova, mapping.length, perm, mapping.offset, segment=mapping.segment)
        return
    for memory in mapping.memory:
        if mapping.file is None or memory.region_offset is None:
            raise TakeOverError(f"{iova:#x}: maps nobody's memory: run pkernfs iommu check")
        yield Piece(iova, memory.length, perm, memory.region_offset)
        iova = Iova(iova + memory.length)


# ------------------------------------------------------------------------------ the machine


def _check_host() -> None:
    """Refuse a kernel whose VFIO is missing, puts devices to sleep, or takes no interrupts."""
    # Awake: binding a device would put it into D3 else, and end its work.
    _load("vfio_pci", "disable_idle_d3=1")
    if not vfio.IOMMUFD.exists():
        _load("vfio_iommu_type1")
    if not _switched_on("vfio_pci", "disable_idle_d3"):
        raise TakeOverError(
            "vfio-pci: it would put devices to sleep: "
            "modprobe -r vfio_pci; modprobe vfio_pci disable_idle_d3=1"
        )
    remapped = "IR-" in _INTERRUPTS.read_text()
    if not remapped and not _unsafe_interrupts_allowed():
        raise TakeOverError(
            "VFIO: interrupts are not remapped, so a device could forge them: if you trust it, "
            "echo 1 >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
        )


def _load(module: str, *parameters: str) -> None:
    if (_MODULES / module).exists():
        return
    if program.run("modprobe", module, *parameters).returncode:
        raise TakeOverError(f"{module}: this kernel has no such module")


def _unsafe_interrupts_allowed() -> bool:
    return any(
        _switched_on(module, "allow_unsafe_interrupts")
        for module in ("vfio_iommu_type1", "iommufd")
    )


def _switched_on(module: str, parameter: str) -> bool:
    path = _MODULES / module / "parameters" / parameter
    return path.exists() and path.read_text().strip() == "Y"


# ------------------------------------------------------------------------------ the devices


def _check_device(attached: Attached) -> None:
    bdf = attached.device
    driver = sysfs.driver_of(bdf)
    if driver not in (None, sysfs.DRIVER):
        raise TakeOverError(f"{bdf}: {driver} has it, and has set it up anew: too late")
    sysfs.group_of(bdf)
    if attached.adopted_by is None:
        raise TakeOverError(
            f"{bdf}: no unit of this kernel is seen to walk the region's tables for it: it has not "
            "adopted them (dmesg), has taken the device over already, or lacks iomem=relaxed"
        )


def _check_domain(domain: Domain, attached: Collection[str]) -> None:
    limit = _MODULES / "vfio_iommu_type1/parameters/dma_entry_limit"
    most = int(limit.read_text()) if limit.exists() else _MOST_ENTRIES
    if len(domain.pieces) > most:
        raise TakeOverError(
            f"{domain.name}: its memory is in {len(domain.pieces)} pieces: VFIO takes {most}: "
            "see dma_entry_limit of vfio_iommu_type1"
        )
    for bdf in domain.devices:
        _check_group(bdf, domain, attached)
        _check_addresses(bdf, domain)


def _check_group(bdf: str, domain: Domain, attached: Collection[str]) -> None:
    """Refuse a group of which a device would lose its tables, or has a driver."""
    group = sysfs.group_of(bdf)
    for member in sysfs.group_members(group):
        if member in domain.devices:
            continue
        if member in attached:
            raise TakeOverError(
                f"{bdf}: in group {group} with {member}, which would lose its tables: a group is "
                "taken over as one, by one domain"
            )
        if (driver := sysfs.driver_of(member)) not in _DRIVERS:
            raise TakeOverError(f"{bdf}: in group {group} with {member}, which {driver} has")


def _check_spare(spare: str, attached: Collection[str]) -> None:
    for member in sysfs.group_members(sysfs.group_of(spare)):
        if member in attached:
            raise TakeOverError(f"{spare}: not spare: {member} of its group is attached")
        if (driver := sysfs.driver_of(member)) not in _DRIVERS:
            raise TakeOverError(f"{spare}: not spare: {driver} has {member}")


def _check_addresses(bdf: str, domain: Domain) -> None:
    """Refuse mappings where the kernel says that addresses are taken: VFIO maps nothing there."""
    for first, last, kind in sysfs.reserved_ranges(sysfs.group_of(bdf)):
        if kind == "direct":
            raise TakeOverError(f"{bdf}: the firmware has it use {first:#x}-{last:#x} (RMRR)")
        if kind == "direct-relaxable":
            continue
        for piece in domain.pieces:
            if piece.iova <= last and first < piece.iova + piece.length:
                raise TakeOverError(
                    f"{bdf}: {domain.name} maps {piece.iova:#x}, {piece.length:#x} bytes: VFIO "
                    f"takes no addresses from {first:#x} to {last:#x} ({kind})"
                )
