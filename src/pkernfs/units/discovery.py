"""The remapping units of this machine: what ACPI, sysfs and their registers say of each."""

from __future__ import annotations

from typing import Any, NamedTuple

from pkernfs.errors import PermissionDeniedError, PkernfsError, UnitError
from pkernfs.host.dmar import Dmar, UnitStructure
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr
from pkernfs.units.mmio import open_window
from pkernfs.units.unit import Unit
from pkernfs.vtd.entries import bdf_text
from pkernfs.vtd.registers import Capabilities, RootTableAddress

_CLASS = "sys/class/iommu"
_MODES = ("legacy", "scalable", "reserved", "abort")


class FoundUnit(NamedTuple):
    """A unit of the DMAR table. ``driven``: by this kernel's driver. ``unit`` or ``why_not``."""

    structure: UnitStructure
    driven: bool
    unit: Unit | None
    why_not: str


def is_driven(host: Host, name: str) -> bool:
    """Tell if this kernel's driver has a unit: it then shows it in /sys/class/iommu."""
    return name in host.list(_CLASS)


def find_units(host: Host, dmar: Dmar, *, write: bool) -> list[FoundUnit]:
    """All units, in the order of the table. Those that a driver has are only looked at."""
    found = []
    for structure in dmar.units:
        driven = is_driven(host, structure.name)
        unit, why_not = None, ""
        try:
            window = open_window(structure.base, host, write=write and not driven)
            unit = Unit(structure.name, window, structure.base)
        except (PermissionDeniedError, UnitError) as e:
            why_not = str(e)
        found.append(FoundUnit(structure, driven, unit, why_not))
    return found


# ---------------------------------------------------------------------- for people


def unit_record(host: Host, found: FoundUnit, roots: dict[PhysAddr, str]) -> dict[str, Any]:
    """Make the record of a unit that ``pkernfs iommu units --json`` prints.

    :param roots: physical addresses of root tables, and the mounts that they are of.
    """
    s = found.structure
    record: dict[str, Any] = {
        "name": s.name,
        "base": s.base,
        "segment": s.segment,
        "node": s.node,
        "all_devices": s.include_all,
        "scopes": [str(scope) for scope in s.scopes],
    }
    able_to = capabilities(host, found)
    if found.unit is None:
        state: dict[str, Any] = {"state": "driver" if found.driven else "unknown"}
        state["reason"] = found.why_not
    else:
        state = _state(found.unit, found.driven, roots)
        state["faults"] = [
            {**f._asdict(), "source_id": bdf_text(f.source_id, s.segment), "text": str(f)}
            for f in found.unit.faults()
        ]
    if able_to is not None:
        record |= {**able_to._asdict(), "capabilities": able_to.words()}
    return record | state


def _state(unit: Unit, driven: bool, roots: dict[PhysAddr, str]) -> dict[str, Any]:
    now = unit.state()
    mount = roots.get(now.root) if now.translating else None
    if driven:
        name = "driver"
    elif not now.translating:
        name = "off"
    else:
        name = "foreign" if mount is None else "ours"
    return {
        "state": name,
        "mount": mount,
        "root": now.root if now.translating else None,
        "mode": _MODES[RootTableAddress.TTM.get(now.root_register)] if now.translating else None,
        "interrupt_remapping": now.remaps_interrupts,
        "queue": now.queue_on,
        "protected_memory": now.protected,
    }


def capabilities(host: Host, found: FoundUnit) -> Capabilities | None:
    """Read a unit's capabilities from its registers or from sysfs; None: neither has them."""
    if found.unit is not None:
        return found.unit.capabilities
    return _capabilities_in_sysfs(host, found.structure.name)


def _capabilities_in_sysfs(host: Host, name: str) -> Capabilities | None:
    """Read what the kernel's driver shows of a unit that it has."""
    directory = f"{_CLASS}/{name}/intel-iommu"
    texts = [host.find(f"{directory}/{file}") for file in ("version", "cap", "ecap")]
    try:
        version, cap, ecap = (t or "" for t in texts)
        major, minor = (int(n) for n in version.split(":"))
        return Capabilities(major << 4 | minor, int(cap, 16), int(ecap, 16))
    except ValueError:
        return None


_STATES = {
    "off": "off: DMA is not translated",
    "driver": "this kernel's driver has it",
    "foreign": "translates, by another root table",
    "unknown": "unknown",
}


def unit_lines(record: dict[str, Any]) -> list[str]:
    """The same for people."""
    below = ["all other devices of the segment"] * record["all_devices"]
    lines = [
        f"{record['name']}: registers at {record['base']:#x}, segment {record['segment']:04x}"
        + ("" if record["node"] is None else f", NUMA node {record['node']}")
    ]
    state = _STATES.get(record["state"]) or f"in force for {record['mount']}"
    if record.get("root") is not None:
        state += f", {record['mode']} root table at {record['root']:#x}"
    if record.get("reason"):
        state += f": {record['reason']}"
    lines.append(f"  state: {state}")
    on = {
        "interrupt_remapping": "interrupts are remapped",
        "queue": "the invalidation queue is on",
        "protected_memory": "protected memory is closed to DMA",
    }
    lines += [f"         {text}" for key, text in on.items() if record.get(key)]
    lines.append(f"  below it: {', '.join([*record['scopes'], *below]) or 'nothing'}")
    if "capabilities" in record:
        lines.append(f"  able to: {', '.join(record['capabilities'])}")
        lines.append(f"           CAP {record['cap']:#x}, ECAP {record['ecap']:#x}")
    lines += [f"  fault: {fault['text']}" for fault in record.get("faults", ())]
    return lines


def reach_unit(host: Host, structure: UnitStructure) -> Unit:
    """A unit that can be changed, whoever drives it.

    :raises PermissionDeniedError, UnitError: its registers cannot be reached.
    """
    window = open_window(structure.base, host, write=True)
    return Unit(structure.name, window, structure.base)


def need_unit(found: FoundUnit) -> Unit:
    """The unit, if its registers can be reached.

    :raises PkernfsError: why not.
    """
    if found.unit is None:
        raise PkernfsError(f"{found.structure.name}: {found.why_not}")
    return found.unit
