"""How the running kernel was started, by what it says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.host.boot import Loader, adoptions, by_panic, efi_stub_ignores_memmap, had_initrd
from pkernfs.host.boot import loader as loader_of
from support.made_up_host import Machine, make_machine

LINE = "root=/dev/vda crashkernel=256M intel_iommu=off memmap=512M%1G pkernfs=512M!1G"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path, command_line=LINE)


COPIED = "DMAR: Copied translation tables from previous kernel for dmar0"
FAILED = "DMAR: Failed to copy translation tables from previous kernel for dmar1"
NOT_KDUMP = "DMAR: Translation was enabled for dmar2 but we are not in kdump mode"


def test_what_the_kernel_says_of_the_tables(machine: Machine) -> None:
    assert adoptions(machine) == []
    lines = ["Linux version 7.3.4", COPIED, FAILED, NOT_KDUMP]
    machine.write("dev/kmsg", "".join(f"6,{n},{n},-;{line}\n" for n, line in enumerate(lines)))
    assert [tuple(a) for a in adoptions(machine)] == [
        ("dmar0", True, COPIED), ("dmar1", False, FAILED), ("dmar2", False, NOT_KDUMP),
    ]  # fmt: skip


def test_how_the_kernel_was_started(machine: Machine) -> None:
    assert not by_panic(machine)
    machine.write("proc/cmdline", f"elfcorehdr=0x5f000000 {LINE}")
    assert by_panic(machine)


def test_the_first_word_of_the_kernel_counts(machine: Machine) -> None:
    """A process may write to the log; what it says of a unit comes after the kernel."""
    lines = [FAILED, FAILED.replace("Failed to copy", "Copied"), COPIED, f"{COPIED}\n KEY=value"]
    machine.write("dev/kmsg", "".join(f"6,{n},{n},-;{line}\n" for n, line in enumerate(lines)))
    assert [(a.unit, a.adopted) for a in adoptions(machine)] == [("dmar1", False), ("dmar0", True)]


@pytest.mark.parametrize(
    ("text", "loader"),
    [
        ("208", Loader.KEXEC),
        ("113", Loader.FIRMWARE),
        ("0", Loader.FIRMWARE),
        ("", Loader.UNKNOWN),
        (None, Loader.UNKNOWN),
    ],
)
def test_what_started_this_kernel(text: str | None, loader: Loader, tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    if text is not None:
        machine.write("proc/sys/kernel/bootloader_type", text)
    assert loader_of(machine) is loader


@pytest.mark.parametrize(
    ("release", "version", "ignores"),
    [
        ("?", "", None),
        ("5.10.0-30-amd64", "#1 SMP Debian 5.10.218-1", False),
        ("6.1.90", "#1 SMP", True),
        ("6.1.95", "#1 SMP", False),
        ("6.1.0-42-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.159-1 (2025-12-30)", False),
        ("6.1.0-20-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.85-1 (2024-04-11)", True),
        ("6.1.0-42-amd64", "", True),
        ("6.2.0", "", False),
        ("6.6.32", "", True),
        ("6.6.119", "", False),
        ("6.8.0-52-generic", "#53-Ubuntu SMP Sat Jan 11 00:06:25 UTC 2025", True),
        ("6.9.12", "", False),
        ("6.10.0", "", False),
        ("6.12.57+deb13-amd64", "", False),
        ("7.3.4", "", False),
    ],
)
def test_if_the_efi_stub_ignores_memmap(
    tmp_path: Path, release: str, version: str, ignores: bool | None
) -> None:
    machine = Machine(str(tmp_path))
    machine.write("proc/sys/kernel/osrelease", f"{release}\n")
    machine.write("proc/sys/kernel/version", f"{version}\n")
    assert efi_stub_ignores_memmap(machine) is ignores


@pytest.mark.parametrize(
    ("at", "line", "found"),
    [
        (None, "quiet", False),
        (0x21C, "quiet", True),
        (0xC7, "quiet", True),  # of more than 4 GiB
        (0x218, "quiet", False),  # its address says nothing
        (None, "initrdmem=0x7f000000,16M", True),  # get_ramdisk_image()
        (None, "initrd=2G,16M", True),
        (None, r"initrd=\x.img", False),  # of the EFI stub, which notes what it has loaded
        (0x21C, r"initrd=\x.img", True),
    ],
)
@pytest.mark.parametrize("efi", [False, True])
def test_if_it_had_an_initrd(
    tmp_path: Path, at: int | None, line: str, found: bool, efi: bool
) -> None:
    machine = Machine(str(tmp_path))
    assert had_initrd(machine) is None
    machine.write("sys/kernel/boot_params/data", b"short")
    assert had_initrd(machine) is None
    machine.write("proc/cmdline", f"{line}\n")
    data = bytearray(4096)
    if at is not None:
        data[at] = 1
    machine.write("sys/kernel/boot_params/data", bytes(data))
    if efi:
        machine.write("sys/firmware/efi/fw_platform_size", "64")
    assert had_initrd(machine) is found
