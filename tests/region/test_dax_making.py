"""Steps of making dax devices, and the base range that mkfs keeps, by a made-up kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import BusyError, LockedError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.quantities import PhysAddr
from pkernfs.region import dax_making, locks
from pkernfs.region.dax import device_names, driver_of, read_device
from pkernfs.region.dax_making import keep_base
from support.made_up_dax import REGION, G, M, MadeUpDax
from support.made_up_host import Machine, add_dax, make_machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path, command_line="memmap=512M%1G-1+0xefffffff")


@pytest.fixture
def kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> MadeUpDax:
    made = MadeUpDax(machine)
    made.install(monkeypatch)
    return made


def test_the_steps(kernel: MadeUpDax, machine: Machine) -> None:
    keep_base("dax0.0", 64 * M, machine)
    assert dax_making.first_address(REGION, "x", machine) == G
    assert device_names(machine) == ["dax0.0"]
    name = dax_making.create(REGION, "x", machine)
    assert name == "dax0.1"
    dax_making.add_piece(name, Span(PhysAddr(G + 64 * M), 8 * M), "x", machine)
    dax_making.set_align(name, 4096, "x", machine)
    dax_making.set_size(name, 4 * M, "x", machine)
    found = read_device(name, machine)
    assert (found.pieces, found.align) == ((Span(PhysAddr(G + 64 * M), 4 * M),), 4096)
    with pytest.raises(RegionError, match="Device or resource busy"):
        dax_making.delete(name, REGION, machine)
    dax_making.set_size(name, 0, "x", machine)
    dax_making.unbind(name, machine)  # nobody has it
    dax_making.delete(name, REGION, machine)
    dax_making.delete("dax0.0", REGION, machine)  # the kernel keeps it
    assert device_names(machine) == ["dax0.0"]


def test_another_program_makes_a_device_at_the_same_time(
    kernel: MadeUpDax, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_base("dax0.0", 64 * M, machine)
    theirs = kernel.foreign(Span(PhysAddr(G + 64 * M), 2 * M))
    store = kernel._store

    def late(name: str, text: str) -> None:
        store(name, text)
        machine.write(f"{REGION}/dax_region/create", theirs)  # it is the youngest

    monkeypatch.setattr(kernel, "_store", late)
    with pytest.raises(BusyError, match="x: another program makes devices in"):
        dax_making.create(REGION, "x", machine)


def test_a_base_is_kept(kernel: MadeUpDax, machine: Machine) -> None:
    kept = keep_base("dax0.0", 256 * M, machine)
    assert kept == read_device("dax0.0", machine)
    assert (kept.pieces, kept.driver) == ((Span(G, 256 * M),), "device_dax")
    assert keep_base("dax0.0", 256 * M, machine) == kept  # again
    assert keep_base("dax0.0", 64 * M, machine).size == 64 * M


def test_an_empty_device_becomes_a_base(kernel: MadeUpDax, machine: Machine) -> None:
    """As dax_hmem.region_idle=1 leaves it."""
    dax_making.set_size("dax0.0", 0, "x", machine)
    assert keep_base("dax0.0", 256 * M, machine).pieces == (Span(G, 256 * M),)


@pytest.mark.usefixtures("impatient")
def test_a_base_that_is_not_to_be_had(kernel: MadeUpDax, machine: Machine) -> None:
    for size, says in (
        (0, "bad size: got 0, expected a multiple of 2M"),
        (3 * M, "bad size: got 3145728, expected a multiple of 2M"),
        (1024 * M, "too small: got 512M, expected 1G"),
    ):
        with pytest.raises(RegionError, match=says):
            keep_base("dax0.0", size, machine)
    kernel.hold(77, "dax0.0")
    with pytest.raises(BusyError, match=r"^/dev/dax0.0: in use by qemu \(77\)$"):
        keep_base("dax0.0", 64 * M, machine)
    kernel.end(77)
    held = locks.PhysicalLocks("theirs", machine, exclusive=True)
    held.take([Span(G, 2 * M)])
    with pytest.raises(LockedError):
        keep_base("dax0.0", 64 * M, machine)
    held.close()
    assert read_device("dax0.0", machine).size == 512 * M
    keep_base("dax0.0", 64 * M, machine)
    kernel.foreign(Span(PhysAddr(G + 64 * M), 8 * M))
    with pytest.raises(RegionError, match=r"/dev/dax0.1 has 8M of its dax region: daxctl destroy"):
        keep_base("dax0.0", 32 * M, machine)


def test_a_base_of_another_driver_or_kind(kernel: MadeUpDax, machine: Machine) -> None:
    Path(machine.path(f"{REGION}/dax0.0/driver")).symlink_to("/drivers/kmem")
    with pytest.raises(RegionError, match="system-ram mode"):
        keep_base("dax0.0", 64 * M, machine)
    assert driver_of("dax0.0", machine) == "kmem"
    add_dax(machine, "dax1.0", (2 * G, 8 * M))
    with pytest.raises(RegionError, match="cannot be divided"):
        keep_base("dax1.0", 2 * M, machine)
