"""Backings with addresses of their own: their size, their lock, the check of their memory type."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import LockedError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.quantities import PhysAddr
from pkernfs.region import locks
from pkernfs.region.physical_backing import PhysicalBacking
from support.made_up_host import Machine
from support.made_up_regions import PAT, PAT_LIST, G, M, dev_mem_machine

SPANS = [Span(PhysAddr(G + 64 * M), 8 * M), Span(PhysAddr(G), 4 * M)]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(locks, "_CLOSING_WAIT_SECONDS", 0.0)
    return dev_mem_machine(tmp_path)


def opened(machine: Machine, spans: list[Span], write: bool, lock: bool = True) -> PhysicalBacking:
    return PhysicalBacking("name", "spec", spans, write=write, lock=lock, host=machine)


def test_several_ranges_are_one_backing(machine: Machine) -> None:
    backing = opened(machine, SPANS, write=True)
    assert (backing.name, backing.size, backing.pieces) == ("name", 12 * M, SPANS)
    assert backing.real_addresses
    backing.close()


@pytest.mark.parametrize(
    ("first", "second", "fits"), [(True, True, False), (True, False, False), (False, False, True)]
)
def test_whoever_writes_is_alone(machine: Machine, first: bool, second: bool, fits: bool) -> None:
    held = opened(machine, SPANS, write=first)
    overlapping = [Span(PhysAddr(G + 2 * M), 16 * M)]
    if fits:
        opened(machine, overlapping, write=second).close()
    else:
        with pytest.raises(LockedError, match="spec: in use: it overlaps 4M!1G"):
            opened(machine, overlapping, write=second)
    opened(machine, [Span(PhysAddr(G + 4 * M), 60 * M)], write=True).close()
    opened(machine, overlapping, write=second, lock=False).close()
    held.close()
    opened(machine, overlapping, write=True).close()


def test_the_memory_type_of_each_range(machine: Machine) -> None:
    backing = opened(machine, SPANS, write=False)
    backing.verify_mapping(lambda: None)
    machine.write(PAT, PAT_LIST.format(G, G + 4 * M, "write-combining"))
    with pytest.raises(RegionError, match="name: the kernel maps it write-combining, not write-b"):
        backing.verify_mapping(lambda: None)
    backing.close()
