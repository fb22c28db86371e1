"""Dax devices taken apart and made, by a made-up kernel that obeys what is written to sysfs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pkernfs.errors import BusyError, LockedError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr
from pkernfs.region import dax, dax_devices, locks
from pkernfs.region.dax import device_names, read_device
from pkernfs.region.dax_devices import free_memory, rebuild, region_devices, regions, users
from support.made_up_host import Machine, add_dax, make_machine

M = 1 << 20
G = PhysAddr(1 << 30)
REGION = "sys/devices/platform/hmem.0"


class MadeUpKernel:
    """Devices of one dax region, 512 MiB at 1 GiB."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.refuses = ""
        machine.write(f"{REGION}/dax_region/create", "")
        self.tell_free()

    def tell_free(self) -> None:
        """The bytes that belong to no device."""
        used = sum(device.size for device in region_devices(REGION, self.machine))
        self.machine.write(f"{REGION}/dax_region/available_size", f"{512 * M - used}\n")

    def write(self, name: str, text: str, where: str, host: Host) -> None:
        """Obey a store into an attribute, as drivers/dax/bus.c does."""
        if name.endswith(self.refuses) and self.refuses:
            raise RegionError(f"{where}: cannot write {text!r} to /{name}: Invalid argument")
        device = Path(host.path(os.path.dirname(name)))
        match os.path.basename(name):
            case "unbind":
                Path(host.path(f"{dax.DEVICES}/{text}/driver")).unlink()
            case "new_id":
                Path(host.path(f"{dax.DEVICES}/{text}/driver")).symlink_to(host.path(dax.DRIVER))
            case "align":
                (device / "align").write_text(text)
            case "size":
                self._resize(device, int(text))
            case "mapping":
                start, end = (int(word, 16) for word in text.split("-"))
                self._add(device, Span(PhysAddr(start), end + 1 - start))
            case "create":
                self._create()
            case "delete":
                shutil.rmtree(os.path.realpath(host.path(f"{dax.DEVICES}/{text}")))
                os.unlink(host.path(f"{dax.DEVICES}/{text}"))
        self.tell_free()

    def _create(self) -> None:
        number = 0
        while f"dax0.{number}" in device_names(self.machine):
            number += 1
        add_dax(self.machine, f"dax0.{number}", driver=None)

    def _resize(self, device: Path, size: int) -> None:
        for mapping in device.glob("mapping*"):
            shutil.rmtree(mapping)
        (device / "size").write_text("0")
        if size:
            self._add(device, Span(PhysAddr(G + 512 * M - size), size))

    def _add(self, device: Path, span: Span) -> None:
        before = int((device / "size").read_text())
        mapping = device / f"mapping{len(list(device.glob('mapping*')))}"
        mapping.mkdir()
        (mapping / "start").write_text(f"{span.start:#x}")
        (mapping / "end").write_text(f"{span.end - 1:#x}")
        (mapping / "page_offset").write_text(f"{before // 4096:#x}")
        (device / "size").write_text(f"{before + span.size}")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path, command_line="memmap=512M%1G-1+0xefffffff")


@pytest.fixture
def kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> MadeUpKernel:
    """One device over all of the memory, as it is after a kexec."""
    add_dax(machine, "dax0.0", (G, 512 * M))
    made = MadeUpKernel(machine)
    monkeypatch.setattr(dax, "write_attribute", made.write)
    monkeypatch.setattr(dax_devices, "write_attribute", made.write)
    return made


def test_regions_and_their_devices(machine: Machine) -> None:
    add_dax(machine, "dax0.0", (G, 8 * M))
    add_dax(machine, "dax1.0", (2 * G, 8 * M))
    assert regions(machine) == []  # of a kind that cannot be divided
    machine.write(f"{REGION}/dax_region/create", "")
    assert regions(machine) == [REGION]
    assert [device.name for device in region_devices(REGION, machine)] == ["dax0.0"]


def test_a_device_is_made_as_it_was(kernel: MadeUpKernel, machine: Machine) -> None:
    """What is in the way is taken apart: the memory of a device that nobody uses."""
    pieces = (Span(PhysAddr(G + 64 * M), 8 * M), Span(G, 4 * M))
    assert rebuild("dax0.2", G, pieces, REGION, machine) == "dax0.2"
    made = read_device("dax0.2", machine)
    assert (made.pieces, made.align, made.driver) == (pieces, G, "device_dax")
    assert read_device("dax0.0", machine).size == 0
    assert device_names(machine) == ["dax0.0", "dax0.2"]  # what was made on the way is gone
    others = (Span(PhysAddr(G + 128 * M), 8 * M),)
    assert rebuild("dax0.0", 2 * M, others, REGION, machine) == "dax0.0"
    assert read_device("dax0.2", machine).pieces == pieces


def test_a_name_of_another_region_cannot_be_had(kernel: MadeUpKernel, machine: Machine) -> None:
    assert rebuild("dax7.1", 2 * M, (Span(G, 8 * M),), REGION, machine) == "dax0.1"


def test_what_is_used_stays(
    kernel: MadeUpKernel, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_CLOSING_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(locks, "_SERVED_WAIT_SECONDS", 0.0)
    pieces = (Span(G, 8 * M),)
    held = locks.lock_physical("theirs", [Span(G, 2 * M)], machine, exclusive=True)
    with pytest.raises(LockedError):
        rebuild("dax0.1", 2 * M, pieces, REGION, machine)
    os.close(held.fd)
    machine.write("proc/1234/comm", "qemu\n")
    machine.write("proc/1234/maps", "7f00-7f01 rw-s 00000000 00:05 300 /dev/dax0.0\n")
    with pytest.raises(BusyError, match=r"/dev/dax0.0: in the way, and in use by qemu \(1234\)"):
        rebuild("dax0.1", 2 * M, pieces, REGION, machine)
    assert read_device("dax0.0", machine).pieces == (Span(G, 512 * M),)


def test_a_kernel_that_refuses(kernel: MadeUpKernel, machine: Machine) -> None:
    rebuild("dax0.1", 2 * M, (Span(G, 8 * M),), REGION, machine)
    with pytest.raises(RegionError, match=r"/dev/dax0.1: it is there with other memory"):
        rebuild("dax0.1", 2 * M, (Span(PhysAddr(G + 64 * M), 8 * M),), REGION, machine)
    kernel.refuses = "mapping"
    with pytest.raises(RegionError, match=r"/dev/dax0.2: cannot write .*: Invalid argument"):
        rebuild("dax0.2", 2 * M, (Span(PhysAddr(G + 64 * M), 8 * M),), REGION, machine)


def test_memory_of_no_device(kernel: MadeUpKernel, machine: Machine) -> None:
    """A device that is to spare has it for a while."""
    with free_memory(REGION, machine) as found:
        assert found is None  # a device has all of it
    rebuild("dax0.1", 2 * M, (Span(G, 8 * M),), REGION, machine)
    with free_memory(REGION, machine) as found:
        assert found is not None
        assert (found.name, found.size) == ("dax0.0", 504 * M)
    assert read_device("dax0.0", machine).size == 0


def test_who_uses_a_device(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    machine.write("proc/1234/comm", "qemu\n")
    machine.write("proc/1234/maps", "7f00-7f01 rw-s 00000000 00:05 300 /dev/dax0.0\n")
    machine.write("proc/77/comm", "sh\n")
    machine.write("proc/77/maps", "7f00-7f01 rw-s 00000000 00:05 300 /dev/dax0.01\n")
    machine.write("proc/78/maps", "7f00-7f01 rw-s 00000000 00:05 301 /tmp/a /dev/dax0.0\n")
    fds = Path(machine.path("proc/88/fd"))
    fds.mkdir(parents=True)
    (fds / "3").symlink_to("/dev/dax0.0")
    assert users("/dev/dax0.0", machine) == ["qemu (1234)", "? (88)"]
