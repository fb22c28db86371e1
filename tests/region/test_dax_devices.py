"""Dax devices taken apart and made, by a made-up kernel that obeys what is written to sysfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkernfs.errors import BusyError, LockedError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.quantities import PhysAddr
from pkernfs.region import locks
from pkernfs.region.dax import device_names, read_device
from pkernfs.region.dax_devices import free_memory, rebuild, region_devices, regions, users
from support.made_up_dax import REGION, G, M, MadeUpDax
from support.made_up_host import Machine, add_dax, make_machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path, command_line="memmap=512M%1G-1+0xefffffff")


@pytest.fixture
def kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> MadeUpDax:
    """One device over all of the memory, as it is after a kexec."""
    made = MadeUpDax(machine)
    made.install(monkeypatch)
    return made


def test_regions_and_their_devices(machine: Machine) -> None:
    add_dax(machine, "dax0.0", (G, 8 * M))
    add_dax(machine, "dax1.0", (2 * G, 8 * M))
    assert regions(machine) == []  # of a kind that cannot be divided
    machine.write(f"{REGION}/dax_region/create", "")
    assert regions(machine) == [REGION]
    assert [device.name for device in region_devices(REGION, machine)] == ["dax0.0"]


def test_a_device_is_made_as_it_was(kernel: MadeUpDax, machine: Machine) -> None:
    """What is in the way is taken apart: the memory of a device that nobody uses."""
    pieces = (Span(PhysAddr(G + 64 * M), 8 * M), Span(G, 4 * M))
    assert rebuild("dax0.2", 4096, pieces, REGION, machine) == "dax0.2"
    made = read_device("dax0.2", machine)
    assert (made.pieces, made.align, made.driver) == (pieces, 4096, "device_dax")
    assert read_device("dax0.0", machine).size == 0
    assert device_names(machine) == ["dax0.0", "dax0.2"]  # what was made on the way is gone
    others = (Span(PhysAddr(G + 128 * M), 8 * M),)
    assert rebuild("dax0.0", 2 * M, others, REGION, machine) == "dax0.0"
    assert read_device("dax0.2", machine).pieces == pieces


def test_a_name_of_another_region_cannot_be_had(kernel: MadeUpDax, machine: Machine) -> None:
    assert rebuild("dax7.1", 2 * M, (Span(G, 8 * M),), REGION, machine) == "dax0.1"


def test_what_is_used_stays(
    kernel: MadeUpDax, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_CLOSING_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(locks, "_SERVED_WAIT_SECONDS", 0.0)
    pieces = (Span(G, 8 * M),)
    held = locks.lock_physical("theirs", [Span(G, 2 * M)], machine, exclusive=True)
    with pytest.raises(LockedError):
        rebuild("dax0.1", 2 * M, pieces, REGION, machine)
    os.close(held.fd)
    kernel.hold(1234, "dax0.0")
    with pytest.raises(BusyError, match=r"/dev/dax0.0: in the way, and in use by qemu \(1234\)"):
        rebuild("dax0.1", 2 * M, pieces, REGION, machine)
    assert read_device("dax0.0", machine).pieces == (Span(G, 512 * M),)


def test_a_kernel_that_refuses(kernel: MadeUpDax, machine: Machine) -> None:
    rebuild("dax0.1", 2 * M, (Span(G, 8 * M),), REGION, machine)
    with pytest.raises(RegionError, match=r"/dev/dax0.1: it is there with other memory"):
        rebuild("dax0.1", 2 * M, (Span(PhysAddr(G + 64 * M), 8 * M),), REGION, machine)
    kernel.refuses = "mapping"
    with pytest.raises(RegionError, match=r"/dev/dax0.2: cannot write .*: Invalid argument"):
        rebuild("dax0.2", 2 * M, (Span(PhysAddr(G + 64 * M), 8 * M),), REGION, machine)


def test_memory_of_no_device(kernel: MadeUpDax, machine: Machine) -> None:
    """A device that is to spare has it for a while."""
    with free_memory(REGION, machine) as found:
        assert found is None  # a device has all of it
    rebuild("dax0.1", 2 * M, (Span(G, 8 * M),), REGION, machine)
    with free_memory(REGION, machine) as found:
        assert found is not None
        assert (found.name, found.size) == ("dax0.0", 504 * M)
    assert read_device("dax0.0", machine).size == 0


def test_who_uses_a_device(kernel: MadeUpDax, machine: Machine) -> None:
    kernel.hold(1234, "dax0.0")
    assert users("dax0.0", machine) == ["qemu (1234)"]
    kernel.end(1234)
    assert users("dax0.0", machine) == []
    assert users("dax0.9", machine) == []  # no such device
