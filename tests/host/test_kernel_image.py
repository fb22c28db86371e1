"""Kernel images on made-up machines: releases, configurations, modules."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pkernfs.host import kernel_image
from support.made_up_host import Machine, bzimage

RELEASE = "7.3.4"
KERNEL = f"boot/vmlinuz-{RELEASE}"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(str(tmp_path))


def test_an_image_tells_its_release(machine: Machine) -> None:
    machine.write(KERNEL, bzimage(RELEASE))
    assert kernel_image.release_of(machine, f"/{KERNEL}") == RELEASE


@pytest.mark.parametrize("data", [b"", b"MZ" + bytes(600), bzimage("7.3.4")[:0x210], bytes(0x300)])
def test_what_is_no_kernel_has_no_release(machine: Machine, data: bytes) -> None:
    machine.write(KERNEL, data)
    assert kernel_image.release_of(machine, KERNEL) is None
    assert kernel_image.release_of(machine, "boot/none") is None


def test_files_beside_the_image(machine: Machine) -> None:
    machine.write("lab/k/vmlinuz", bzimage("6.1.0"))
    machine.write("lab/k/lib/modules/6.1.0/config", "CONFIG_X=m\n")
    machine.write("lab/k/lib/modules/6.1.0/modules.alias", "alias pci:v* x\n")
    assert kernel_image.release_of(machine, "/lab/k/vmlinuz") == "6.1.0"
    assert kernel_image.config_of(machine, "6.1.0", "/lab/k/vmlinuz") == {"X": "m"}
    found = kernel_image.claiming_modules(machine, "6.1.0", "/lab/k/vmlinuz", "pci:v1")
    assert found is None  # it is not known what is built in
    machine.write("lab/k/lib/modules/6.1.0/modules.builtin.modinfo", "")
    found = kernel_image.claiming_modules(machine, "6.1.0", "/lab/k/vmlinuz", "pci:v1")
    assert found == {"x": False}


def test_where_a_configuration_may_be(machine: Machine) -> None:
    assert kernel_image.config_of(machine, RELEASE) is None
    text = '# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C="text"\nnot CONFIG_D=y\n'
    machine.write(f"lib/modules/{RELEASE}/config", text)
    assert kernel_image.config_of(machine, RELEASE) == {"B": "y", "C": '"text"'}
    machine.write(f"boot/config-{RELEASE}", "CONFIG_E=m\n")
    assert kernel_image.config_of(machine, RELEASE) == {"E": "m"}


def test_the_running_kernel_shows_its_own(machine: Machine) -> None:
    machine.write("proc/sys/kernel/osrelease", RELEASE + "\n")
    machine.write(f"boot/config-{RELEASE}", "CONFIG_FILE=y\n")
    assert kernel_image.running_config(machine) == {"FILE": "y"}
    machine.write("proc/config.gz", gzip.compress(b"CONFIG_SHOWN=y\n"))
    assert kernel_image.running_config(machine) == {"SHOWN": "y"}
    machine.write("proc/config.gz", b"not gzip")
    assert kernel_image.running_config(machine) == {"FILE": "y"}


def test_modules_that_take_a_device(machine: Machine) -> None:
    found = kernel_image.claiming_modules(machine, RELEASE, f"/{KERNEL}", "pci:v1d2")
    assert found is None
    machine.write(
        f"lib/modules/{RELEASE}/modules.alias",
        "# Aliases\nalias pci:v1d* one\nalias pci:v2d* two\nalias pci:v1d2 three\nalias x\n",
    )
    machine.write(
        f"lib/modules/{RELEASE}/modules.builtin.modinfo",
        "three.license=GPL\0three.alias=pci:v1d[2-3]\0four.alias=pci:v1*\0five.alias=pci:v5\0",
    )
    found = kernel_image.claiming_modules(machine, RELEASE, f"/{KERNEL}", "pci:v1d2")
    assert found == {"one": False, "three": True, "four": True}
