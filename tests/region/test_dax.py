"""Dax devices and their driver, with a made-up sysfs and a file in the place of the device."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.region.dax import (
    DeviceNumber,
    bind,
    device_name,
    device_names,
    device_number,
    driver_of,
    is_name,
    read_device,
)
from support.made_up_dax import MadeUpDax
from support.made_up_host import Machine, add_dax
from support.made_up_regions import SOFT_RESERVED, G, M, dax_machine, refusal

NO_DEVICE = "no such device: boot with memmap=SIZE%START-1+0xefffffff to have one, and modprobe "


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return dax_machine(tmp_path)


def test_names_are_in_the_order_of_their_numbers(machine: Machine) -> None:
    for name in ("dax0.10", "dax1.0", "dax0.9"):
        add_dax(machine, name, (G, 8 * M))
    assert device_names(machine) == ["dax0.9", "dax0.10", "dax1.0"]
    assert device_number("dax12.3") == DeviceNumber(region=12, device=3)
    assert is_name("dax12.3")
    for name in ("dax0", "dax0.1.2", "mem", ""):
        assert not is_name(name)
        with pytest.raises(ValueError, match="not the name of a dax device"):
            device_number(name)


def test_what_is_a_dax_device(machine: Machine, tmp_path: Path) -> None:
    assert device_name(machine.path("dev/dax12.3"), machine) == "dax12.3"
    for other in ("dev/daxx", "dev/null", "x/dax0.0"):
        assert device_name(machine.path(other), machine) is None
    assert device_name("/dev/null", machine) is None
    number = os.stat("/dev/null").st_rdev
    link = Path(machine.path(f"sys/dev/char/{os.major(number)}:{os.minor(number)}"))
    link.parent.mkdir(parents=True)
    link.symlink_to("../../devices/platform/hmem.0/dax0.7")
    assert device_name("/dev/null", machine) == "dax0.7"  # a node by another name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", f"{NO_DEVICE}device_dax; modprobe dax_hmem"),
        (SOFT_RESERVED, "no such device: modprobe device_dax; modprobe dax_hmem"),
    ],
)
def test_no_device(machine: Machine, line: str, message: str) -> None:
    machine.write("proc/cmdline", line)
    assert refusal(machine) == f"/dev/dax0.0: {message}"


def test_no_device_of_memory_that_there_is(machine: Machine) -> None:
    """Whatever has made it what it is."""
    load = "no such device: modprobe device_dax; modprobe dax_hmem"
    for line in ("memmap=512M%1G-7+0xefffffff", "efi_fake_mem=1G@1G:0x40000"):
        machine.write("proc/cmdline", line)
        assert refusal(machine) == f"/dev/dax0.0: {load}"
    machine.write("proc/cmdline", "memmap=1G%1G+0xefffffff module_blacklist=dax_hmem")
    assert refusal(machine) == "/dev/dax0.0: no such device: boot without module_blacklist=dax_hmem"
    machine.write("proc/cmdline", "memmap=512M!1G")
    assert "ndctl create-namespace -m devdax" in refusal(machine)
    machine.write("proc/cmdline", "quiet")
    machine.write("sys/firmware/memmap/1/type", "Soft Reserved")
    assert refusal(machine) == f"/dev/dax0.0: {load}"


def test_another_device(machine: Machine) -> None:
    for name in ("dax0.0", "dax0.10", "dax0.9"):
        add_dax(machine, name, (G, 8 * M))
    assert refusal(machine, "dax0.1") == (
        "/dev/dax0.1: no such device: there is /dev/dax0.0, /dev/dax0.9, /dev/dax0.10"
    )


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (
            "kmem",
            "it is in system-ram mode, ordinary memory of the kernel (driver kmem): "
            "daxctl reconfigure-device --force --mode=devdax dax0.0, and boot with "
            "modprobe.blacklist=kmem to keep it",
        ),
        ("fsdev_dax", "driver fsdev_dax has it, expected device_dax"),
        (None, "the driver device_dax does not take it: see the kernel's log"),
    ],
)
def test_other_drivers(machine: Machine, driver: str | None, message: str) -> None:
    add_dax(machine, "dax0.0", (G, 8 * M), driver=driver)
    machine.write("sys/bus/dax/drivers/device_dax/bind", "")
    assert refusal(machine) == f"/dev/dax0.0: {message}"
    told = Path(machine.path("sys/bus/dax/drivers/device_dax/bind")).read_text()
    assert told == ("dax0.0" if driver is None else "")  # nothing is ever taken from a driver


@pytest.mark.parametrize("takes_all", [True, False], ids=["6.1", "7.3"])
def test_a_device_is_bound_and_the_driver_told_no_more(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, takes_all: bool
) -> None:
    """A name that the driver keeps is compared with that of each device, ever after."""
    kernel = MadeUpDax(machine, takes_all=takes_all)
    kernel.install(monkeypatch)
    other = kernel.foreign()
    bound = bind(read_device("dax0.0", machine), machine)
    assert bound == read_device("dax0.0", machine)
    assert bound.driver == driver_of("dax0.0", machine) == "device_dax"
    assert driver_of(other, machine) is None
    assert kernel.ids == set()
    assert bind(bound, machine) == bound


def test_a_kernel_that_does_not_bind(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = MadeUpDax(machine)
    kernel.install(monkeypatch)
    kernel.refuses = "bind"
    with pytest.raises(RegionError, match=r"cannot write 'dax0.0' to /.*bind: Invalid argument"):
        bind(read_device("dax0.0", machine), machine)


def test_no_driver(machine: Machine) -> None:
    add_dax(machine, "dax0.0", (G, 8 * M), driver=None)
    os.rmdir(machine.path("sys/bus/dax/drivers/device_dax"))
    assert refusal(machine) == "/dev/dax0.0: no driver: modprobe device_dax"


def test_a_device_without_memory(machine: Machine) -> None:
    add_dax(machine, "dax0.0", driver=None)
    assert refusal(machine) == (
        "/dev/dax0.0: it has no memory: daxctl create-device, or write its mapping"
    )


def test_without_leave(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    add_dax(machine, "dax0.0", (G, 8 * M))

    def refuse(self: Machine, name: str) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", name)

    with monkeypatch.context() as patched:
        patched.setattr(Machine, "read", refuse)
        assert refusal(machine) == (
            "/dev/dax0.0: sysfs hides its addresses: root is needed (CAP_SYS_ADMIN)"
        )
    os.unlink(machine.path("dev/dax0.0"))
    assert refusal(machine) == "/dev/dax0.0: cannot open: No such file or directory"
