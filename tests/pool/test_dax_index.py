"""What is remembered of the devices of a dax region, and when it is looked at again."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.host.iomem import Span
from pkernfs.pool.dax_index import DaxIndex
from pkernfs.quantities import PhysAddr
from pkernfs.region import dax_making
from pkernfs.region.dax import read_device
from support.made_up_dax import REGION, G, M, MadeUpDax
from support.made_up_host import Machine, make_machine

FIRST = Span(PhysAddr(G + 64 * M), 8 * M)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpDax:
    machine = make_machine(tmp_path, command_line="memmap=512M%1G-1+0xefffffff")
    made = MadeUpDax(machine)
    made.install(monkeypatch)
    dax_making.keep_base("dax0.0", 64 * M, machine)
    return made


@pytest.fixture
def machine(kernel: MadeUpDax) -> Machine:
    return kernel.machine


def test_what_is_there(kernel: MadeUpDax, machine: Machine) -> None:
    name = kernel.foreign(FIRST)
    index = DaxIndex(REGION, machine)
    assert (index.total, index.available()) == (512 * M, 440 * M)
    assert [device.name for device in index.all()] == ["dax0.0", name]
    assert index.at(FIRST.start) == read_device(name, machine)
    assert index.at(PhysAddr(G + 2 * M)) is None


def test_what_changes_is_looked_at_again(kernel: MadeUpDax, machine: Machine) -> None:
    index = DaxIndex(REGION, machine)
    assert index.at(FIRST.start) is None
    name = kernel.foreign(FIRST)
    assert index.at(FIRST.start) is None
    index.refresh()
    assert index.at(FIRST.start) is not None
    dax_making.set_size(name, 4 * M, "x", machine)
    index.refresh()
    assert index.at(FIRST.start) == read_device(name, machine)
    before = index.all()
    index.refresh()
    assert index.all() == before
    dax_making.set_size(name, 0, "x", machine)
    assert index.look(name) == read_device(name, machine)
    assert index.at(FIRST.start) is None
    dax_making.delete(name, REGION, machine)
    assert index.look(name) is None
    assert len(index.all()) == 1


def test_what_one_has_made_oneself(kernel: MadeUpDax, machine: Machine) -> None:
    index = DaxIndex(REGION, machine)
    index.all()
    made = read_device(kernel.foreign(FIRST), machine)
    index.put(made)
    assert index.at(FIRST.start) == made
    index.drop(made.name)
    assert index.at(FIRST.start) is None
    index.forget()
    assert index.at(FIRST.start) == made
