"""The next kernel's files: names of distributions, and an initrd that is not found."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.kexec.next_kernel import KernelFiles, find_kernel
from support.made_up_host import Machine, bzimage, make_machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = make_machine(tmp_path)
    machine.write("proc/sys/kernel/osrelease", "7.3.4")
    machine.write("boot/vmlinuz-7.3.4", "")
    return machine


@pytest.mark.parametrize(
    ("kernel", "initrd", "line"),
    [
        ("boot/vmlinuz-7.3.4", "boot/initrd.img-7.3.4", ""),  # Debian
        ("boot/vmlinuz-7.3.4", "boot/initramfs-7.3.4.img", ""),  # Fedora
        ("boot/vmlinuz-7.3.4", "boot/initrd-7.3.4", ""),  # openSUSE
        ("lib/modules/7.3.4/vmlinuz", "boot/initramfs-7.3.4.img", ""),
        ("boot/vmlinuz-linux", "boot/initramfs-linux.img", ""),  # Arch
        ("boot/vmlinuz-lts", "boot/initramfs-lts", ""),  # Alpine
        ("boot/kernel-7.3.4", "boot/initramfs-7.3.4.img", ""),  # Gentoo
        ("boot/efi/abc/7.3.4/linux", "boot/efi/abc/7.3.4/initrd", ""),  # systemd-boot
        ("boot/other", "boot/x.img", r"BOOT_IMAGE=(hd0,gpt2)/other initrd=\x.img"),
    ],
)
def test_files_of_the_running_kernel(tmp_path: Path, kernel: str, initrd: str, line: str) -> None:
    machine = make_machine(tmp_path, command_line=f"memmap=512M%1G {line}")
    machine.write("proc/sys/kernel/osrelease", "7.3.4")
    machine.write("boot/vmlinuz-6.0", bzimage("6.0"))
    machine.write("boot/initrd.img-6.0", "")
    machine.write(kernel, bzimage("7.3.4"))
    machine.write(initrd, "")
    assert find_kernel(None, None, machine) == KernelFiles(f"/{kernel}", f"/{initrd}", "7.3.4", "")


def test_of_several_initrds_none_is_chosen(tmp_path: Path) -> None:
    """One of microcode alone starts no system; boot loaders put all together."""
    line = r"BOOT_IMAGE=/other initrd=\ucode.img initrd=\x.img"
    machine = make_machine(tmp_path, command_line=line)
    machine.write("proc/sys/kernel/osrelease", "7.3.4")
    machine.write("boot/other", bzimage("7.3.4"))
    machine.write("boot/ucode.img", "")
    machine.write("boot/x.img", "")
    boot_params(machine, initrd=True)
    found = find_kernel(None, None, machine)
    assert found.initrd is None
    assert "name one with --initrd" in found.doubt


def test_a_file_of_that_name_that_is_another_kernel(machine: Machine) -> None:
    """It was replaced since this kernel was started."""
    machine.write("boot/vmlinuz-7.3.4", bzimage("7.3.4-2"))
    machine.write("boot/vmlinuz.old", bzimage("7.3.4"))
    assert find_kernel(None, "none", machine).kernel == "/boot/vmlinuz.old"


def boot_params(machine: Machine, *, initrd: bool) -> None:
    """Have the running kernel know if it was started with an initrd."""
    data = bytearray(4096)
    data[0x21C] = initrd
    machine.write("sys/kernel/boot_params/data", bytes(data))


@pytest.mark.parametrize(("kernel", "how"), [(None, "found"), ("/boot/vmlinuz-7.3.4", "given")])
@pytest.mark.parametrize(
    ("had_one", "doubt"),
    [
        (True, "this kernel was started with an initrd, and none is {} for /boot/vmlinuz-7"),
        (None, "it cannot be seen whether this kernel was started with an initrd, and none is {} "),
        (False, ""),
    ],
)
def test_an_initrd_that_is_gone_was_needed(
    machine: Machine, kernel: str | None, how: str, had_one: bool | None, doubt: str
) -> None:
    """Its file may have been removed since; a kernel without it would find no root."""
    if had_one is not None:
        boot_params(machine, initrd=had_one)
    found = find_kernel(kernel, None, machine)
    assert found.initrd is None
    assert found.doubt.startswith(doubt.format(how))
    assert bool(found.doubt) == bool(doubt)
    assert find_kernel(kernel, "none", machine)[1::2] == (None, "")


def test_the_efi_stub_notes_an_initrd_as_well(machine: Machine) -> None:
    boot_params(machine, initrd=False)
    machine.write("sys/firmware/efi/fw_platform_size", "64")
    assert find_kernel(None, None, machine).doubt == ""
