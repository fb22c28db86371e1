"""pkernfs.vmm.export: what is kept of what ``pkernfs iommu export`` prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkernfs.errors import TakeOverError, VmmError
from pkernfs.quantities import Iova, RegionOff
from pkernfs.vmm.export import Attached, Bar, Mapping, Memory, Place, parse_export, read_export
from support.vfio_machine import MIB, SPARE, A, B, VfioMachine, export_of, mapping, two_domains


def test_what_is_kept(machine: VfioMachine) -> None:
    bar = mapping(0, (0, 0x4000), bar={"device": SPARE, "number": 2}, offset=0x1000)
    del bar["file"]
    nobodys = mapping(0x5000, (0, 0x1000))
    del nobodys["file"], nobodys["offset"]
    nobodys["pieces"][0]["region_offset"] = None
    found = parse_export(export_of(machine, dom_0=[bar, nobodys], dom_1=[mapping(0, (MIB, 4096))]))
    assert (found.region, found.place) == ("region", Place(machine.region, 0, 8 * MIB))
    assert found.devices == (Attached(A, "dom-0", "dmar0"), Attached(B, "dom-1", "dmar0"))
    reached = (Memory(0x4000, RegionOff(0)),)
    assert found.domains["dom-0"] == (
        Mapping(Iova(0), 0x4000, True, True, None, Bar(SPARE, 2), 0x1000, reached),
        Mapping(Iova(0x5000), 0x1000, True, False, None, None, 0, (Memory(0x1000, None),)),
    )
    assert found.domains["dom-1"] == (
        Mapping(Iova(0), 4096, True, True, "/guest-ram", None, 0, (Memory(4096, RegionOff(MIB)),)),
    )
    assert found.damaged == {}


def test_a_segment(machine: VfioMachine) -> None:
    for path in ("/dev/dax0.3", None):
        there = mapping(0, (MIB, 4096), segment={"number": 3, "path": path})
        [kept] = parse_export(export_of(machine, dom_0=[there])).domains["dom-0"]
        assert (kept.has_segment, kept.segment) == (True, None if path is None else Path(path))


def test_what_is_refused(machine: VfioMachine) -> None:
    whole = two_domains(machine)
    with pytest.raises(TakeOverError, match="export: version 2 is not known"):
        parse_export({**whole, "version": 2})
    del whole["devices"][0]["adopted_by"]
    with pytest.raises(TakeOverError, match="export: it has no 'adopted_by'"):
        parse_export(whole)


def test_the_command(machine: VfioMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that lacks something is one; without any it is an error."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with_damage = {**two_domains(machine), "damaged": {"dom-7": "a hole"}}
    said = tmp_path / "said"
    said.write_text(json.dumps(with_damage))
    program = tmp_path / "pkernfs"
    program.write_text(f'#!/bin/sh\n[ "$*" = "iommu export mnt --json" ] && cat {said}\nexit 4\n')
    program.chmod(0o755)
    assert read_export("mnt") == parse_export(with_damage)
    with pytest.raises(VmmError, match="pkernfs: it failed"):
        read_export("elsewhere")
