"""pkernfs.vmm.plan without a device: pieces, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pkernfs.errors import TakeOverError
from pkernfs.quantities import Iova
from pkernfs.vmm import plan as plan_module
from pkernfs.vmm.export import Bar, parse_export
from pkernfs.vmm.plan import Domain, Piece
from support.vfio_machine import MIB, SPARE, A, B, VfioMachine, export_of, mapping, two_domains


def plan(
    document: dict[str, Any], devices: Sequence[str] = (), spare: str | None = None
) -> list[Domain]:
    return plan_module.plan(parse_export(document), devices, spare)


def test_pieces(machine: VfioMachine) -> None:
    first, second = plan(two_domains(machine))
    assert first == Domain(
        "dom-0",
        [
            Piece(Iova(0x1000), 0x2000, 3, MIB),
            Piece(Iova(0x3000), 0x1000, 3, 5 * MIB),
            Piece(Iova(0x5000), 0x1000, 1, 0),
        ],
        [A],
    )
    assert (second.devices, second.bytes) == ([B], MIB)
    assert plan(two_domains(machine), [B]) == [second]
    assert machine.done == []


def test_bars(machine: VfioMachine) -> None:
    bar = mapping(0, (0, 0x4000), bar={"device": SPARE, "number": 2}, offset=0x1000)
    del bar["file"]
    [domain] = plan(export_of(machine, dom_0=[bar]))
    assert domain.pieces == [Piece(Iova(0), 0x4000, 3, 0x1000, Bar(SPARE, 2))]


def test_a_segment_is_one_piece(machine: VfioMachine) -> None:
    """Its memory is in several; a program has it at one address."""
    segment: dict[str, Any] = {"number": 3, "path": "/dev/dax0.3"}
    there = mapping(0x1000, (0, 0x2000), (0, 0x1000), segment=segment, offset=0x4000)
    for one in there["pieces"]:
        one["region_offset"] = None
    [domain] = plan(export_of(machine, dom_0=[there]))
    path = Path("/dev/dax0.3")
    assert domain.pieces == [Piece(Iova(0x1000), 0x3000, 3, 0x4000, segment=path)]
    segment["path"] = None
    with pytest.raises(TakeOverError, match="0x1000: its segment is not here: mount again"):
        plan(export_of(machine, dom_0=[there]))


def other_driver(machine: VfioMachine) -> None:
    machine.drivers[A] = "e1000e"


def other_in_group(machine: VfioMachine) -> None:
    machine.groups[SPARE] = machine.groups[A]
    machine.drivers[SPARE] = "ahci"


def attached_in_group(machine: VfioMachine) -> None:
    machine.groups[B] = machine.groups[A]


def sleepy(machine: VfioMachine) -> None:
    machine.parameter("vfio_pci", "disable_idle_d3").write_text("N\n")


def forgeable(machine: VfioMachine) -> None:
    machine.parameter("vfio_iommu_type1", "allow_unsafe_interrupts").write_text("N\n")


def firmware(machine: VfioMachine) -> None:
    machine.reserved = "0x1000 0x1fff direct\n"


def taken_addresses(machine: VfioMachine) -> None:
    machine.reserved = "0x3000 0x3fff reserved\n"


def few_entries(machine: VfioMachine) -> None:
    machine.parameter("vfio_iommu_type1", "dma_entry_limit").write_text("2\n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_driver, f"{A}: e1000e has it"),
        (other_in_group, f"{A}: in group 1 with {SPARE}, which ahci has"),
        (attached_in_group, f"{A}: in group 1 with {B}, which would lose its tables"),
        (sleepy, "vfio-pci: it would put devices to sleep: modprobe -r vfio_pci"),
        (firmware, f"{A}: the firmware has it use 0x1000-0x1fff"),
        (taken_addresses, f"{A}: dom-0 maps 0x3000, 0x1000 bytes: VFIO takes no addresses"),
        (few_entries, "dom-0: its memory is in 3 pieces: VFIO takes 2"),
    ],
)
def test_refused(machine: VfioMachine, change: Callable[[VfioMachine], None], reason: str) -> None:
    change(machine)
    with pytest.raises(TakeOverError) as refused:
        plan(two_domains(machine))
    assert str(refused.value).startswith(reason)
    assert machine.done == []


def test_interrupts_that_are_not_remapped(
    machine: VfioMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgeable(machine)
    monkeypatch.setattr(plan_module, "_INTERRUPTS", machine.root / "interrupts")
    (machine.root / "interrupts").write_text("24: 7 PCI-MSI 0-edge x\n")
    with pytest.raises(TakeOverError, match=r"echo 1 >.*/allow_unsafe_interrupts"):
        plan(two_domains(machine))
    (machine.root / "interrupts").write_text("24: 7 IR-PCI-MSI 0-edge x\n")
    plan(two_domains(machine))


def test_exports_that_cannot_work(machine: VfioMachine) -> None:
    for change, reason in (
        ({"adopted_by": None}, f"{A}: no unit of this kernel is seen to walk"),
        ({"hwpt": None}, f"{A}: attached to what is no domain"),
    ):
        whole = two_domains(machine)
        whole["devices"][0] |= change
        with pytest.raises(TakeOverError) as refused:
            plan(whole)
        assert str(refused.value).startswith(reason)
    whole = two_domains(machine)
    del whole["ioas"][0]["mappings"][0]["file"]
    with pytest.raises(TakeOverError, match="0x1000: maps nobody's memory"):
        plan(whole)
    with pytest.raises(TakeOverError, match=f"{SPARE}: not attached in this region"):
        plan(two_domains(machine), [SPARE])
    with pytest.raises(TakeOverError, match=f"{B}: not spare: {B} of its group is attached"):
        plan(two_domains(machine), [A], B)
    with pytest.raises(TakeOverError, match="root-pgtables: damaged: a cycle: run"):
        plan({**two_domains(machine), "damaged": {"dom-1": "a hole", "root-pgtables": "a cycle"}})
    assert plan({**two_domains(machine), "damaged": {"dom-7": "a hole"}})
    with pytest.raises(TakeOverError, match="no device is attached"):
        plan(export_of(machine))
