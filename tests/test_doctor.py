"""pkernfs doctor on made-up machines: each thing that can be missing, with its remedy."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest

from pkernfs import doctor
from pkernfs.doctor import MISSING, OK, WARNING, Result
from pkernfs.host import kernel_image
from support.dmar_tables import drhd
from support.dmar_tables import table as dmar_table
from support.made_up_host import Machine, make_machine

GOOD = {
    "DEVMEM": "y", "STRICT_DEVMEM": "y", "DEV_DAX": "m", "KEXEC": "y", "INTEL_IOMMU": "y",
    "FUSE_PASSTHROUGH": "y", "CRASH_DUMP": "y", "VFIO_PCI": "m", "IOMMUFD": "m",
    "RANDOMIZE_BASE": "y",
}  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine that can do everything."""
    line = "memmap=512M%1G pkernfs=512M!1G crashkernel=256M iomem=relaxed"
    machine = make_machine(tmp_path, command_line=line)
    machine.write("proc/sys/kernel/osrelease", "7.3.4-cloud-amd64")
    machine.write("proc/sys/kernel/kexec_load_disabled", "0")
    machine.write("sys/kernel/kexec_crash_size", str(256 << 20))
    machine.write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "64")
    machine.write("sys/bus/dax/drivers/device_dax/new_id", "")
    machine.write("proc/sys/kernel/seccomp/actions_avail", "kill user_notif allow")
    machine.write("sys/kernel/security/lockdown", "[none] integrity confidentiality")
    machine.write("sys/firmware/acpi/tables/DMAR", dmar_table(drhd(0x1_0000, flags=1)))
    machine.write("sys/bus/dax/devices/dax0.0/size", "1")
    machine.write("usr/local/bin/pkernfs", "")
    machine.write("usr/local/lib/systemd/system/pkernfs.target", "")
    machine.write("run/systemd/system/x", "")
    machine.write("dev/fuse", "")
    registers = struct.pack("<QQQ", 0x10, 0xD2_008C_222F_0606, 0xF42)  # of QEMU's unit
    machine.write("dev/mem", bytes(0x1_0000) + registers.ljust(4096, b"\0"))
    configure(machine, GOOD)
    return machine


def configure(machine: Machine, config: dict[str, str]) -> None:
    text = "".join(f"CONFIG_{name}={value}\n" for name, value in config.items())
    machine.write("proc/config.gz", gzip.compress(text.encode()))


def results(machine: Machine) -> dict[str, Result]:
    return {r.name: r for r in doctor.examine(machine)}


def test_nothing_is_missing_on_a_good_machine(machine: Machine) -> None:
    of_the_machine = [
        r for r in results(machine).values() if r.name not in ("QEMU", "kexec-tools")
    ]  # the two are looked for in PATH
    assert [r for r in of_the_machine if r.status != OK] == []
    for area in ("mount", "region", "dma", "units"):
        assert doctor.able(of_the_machine, area)


@pytest.mark.parametrize(
    ("path", "text", "name", "status", "remedy"),
    [
        ("proc/sys/kernel/osrelease", "5.10.0", "kernel", MISSING, "6.1"),
        ("proc/sys/kernel/osrelease", "6.1.0-28", "kernel", WARNING, "6.6"),
        ("dev/fuse", None, "/dev/fuse", MISSING, "modprobe fuse"),
        ("usr/local/bin/pkernfs", None, "mount -t fuse.pkernfs", WARNING, "scripts/setup"),
        ("sys/kernel/security/lockdown", "none [integrity]", "/dev/mem", WARNING, "lockdown"),
        ("dev/mem", None, "/dev/mem", WARNING, "CONFIG_DEVMEM"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0", "huge pages", WARNING,
         "hugepages="),
        ("proc/sys/kernel/osrelease", "6.8.0", "tmpfs, FUSE passthrough", WARNING, "6.9"),
        ("proc/sys/kernel/seccomp/actions_avail", "kill", "any segment, pkernfs exec", WARNING,
         "CONFIG_SECCOMP_FILTER"),
        ("proc/cmdline", "quiet", "reserved memory", WARNING, "memmap="),
        ("proc/cmdline", "memmap=512M%1G", "pkernfs=", WARNING, "pkernfs=SIZE!START"),
        ("proc/cmdline", "memmap=512M%1G pkernfs=", "pkernfs=", MISSING, "SIZE!START"),
        ("proc/cmdline", "memmap=512M%1G pkernfs=1G!1G", "pkernfs=1G!1G", MISSING, "docs"),
        ("proc/cmdline", "memmap=2G%1G", "KASLR", WARNING, "nokaslr"),
        ("proc/cmdline", "memmap=64G28G", "memmap=", WARNING, "GRUB"),
        ("proc/cmdline", "memmap=64G\\$128G", "memmap=", WARNING, "GRUB"),
        ("proc/cmdline", "'memmap=64G$128G'", "memmap=", WARNING, "GRUB"),
        ("proc/cmdline", "memmap=64G$128GB", "memmap=", WARNING, "GRUB"),
        ("proc/cmdline", "memmap=512M%1G pkernfs=512M!1G", "iomem=", WARNING, "iomem=relaxed"),
        ("proc/sys/kernel/kexec_load_disabled", "1", "kexec_load", MISSING, "sysctl"),
        ("sys/kernel/kexec_crash_size", "0", "crashkernel", MISSING, "crashkernel="),
        ("sys/firmware/acpi/tables/DMAR", None, "DMAR", MISSING, "VT-d"),
        ("sys/class/iommu/dmar0/x", "", "DMAR", WARNING, "intel_iommu=off"),
        ("usr/local/lib/systemd/system/pkernfs.target", None, "systemd", WARNING, "install-units"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(
    machine: Machine, path: str, text: str | None, name: str, status: str, remedy: str
) -> None:
    if text is None:
        Path(machine.path(path)).unlink()
    else:
        machine.write(path, text)
    result = results(machine)[name]
    assert result.status == status
    assert remedy in result.remedy


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("memmap=1G$4G", "it avoids the ranges"),
        ("memmap=1G$4G nokaslr", "off: nokaslr"),
        (
            "memmap=1G$4G,1G$5G,1G$6G,1G$7G,1G$8G",
            "off: a parameter goes on behind the fourth range",
        ),
        (
            "memmap=1G$4G,1G$5G,1G$6G,1G$7G memmap=1G$8G",
            "the next kernel may be put into memmap=1G$8G: memmap=1G$8G comes after the 4 ranges "
            "that it counts",
        ),
    ],
)
def test_what_kaslr_does(machine: Machine, line: str, detail: str) -> None:
    machine.write("proc/cmdline", line)
    assert results(machine)["KASLR"].detail == detail


def test_a_limit_reserves_what_is_above(machine: Machine) -> None:
    machine.write("proc/cmdline", "mem=4G memmap=1G$2G")
    assert results(machine)["reserved memory"].detail == (
        "0x40000000 at 0x80000000, reserved, all from 0x100000000 on, by mem=4G"
    )


def test_a_memmap_that_is_misspelt_is_shown_as_written(machine: Machine) -> None:
    machine.write("proc/cmdline", "ro memmap=64GB$128GB")
    found = results(machine)
    assert "reserved memory" not in found
    assert found["memmap="].detail == (
        "memmap=64GB$128GB: the kernel takes it for memmap=64G, and uses no memory above 64G"
    )


@pytest.mark.parametrize("option", ["INTEL_IOMMU", "CRASH_DUMP", "VFIO_PCI"])
def test_a_kernel_without_an_option_is_said(machine: Machine, option: str) -> None:
    configure(machine, {name: value for name, value in GOOD.items() if name != option})
    result = results(machine)[option]
    assert (result.status, result.remedy) == (MISSING, f"a kernel with CONFIG_{option}")


@pytest.mark.parametrize(
    ("cap", "status", "detail"),
    [
        ("d2008c222f0606", OK, "levels 3, 4"),  # QEMU's
        ("d20080222f0206", MISSING, "no tables of 4 levels"),
    ],
)
def test_what_a_unit_is_able_to_do(machine: Machine, cap: str, status: str, detail: str) -> None:
    Path(machine.path("dev/mem")).unlink()
    machine.write("sys/firmware/acpi/tables/DMAR", dmar_table(drhd(0xFED9_0000, flags=1)))
    for name, text in (("version", "1:0"), ("cap", cap), ("ecap", "f42")):
        machine.write(f"sys/class/iommu/dmar0/intel-iommu/{name}", text)
    found = results(machine)["dmar0"]
    assert found.status == status
    assert detail in found.detail


def test_units_of_which_nobody_tells(machine: Machine) -> None:
    Path(machine.path("dev/mem")).unlink()
    machine.write("sys/firmware/acpi/tables/DMAR", dmar_table(drhd(0xFED9_0000, flags=1)))
    assert results(machine)["dmar0"].status == doctor.UNKNOWN
    machine.write("sys/firmware/acpi/tables/DMAR", b"DMAR")
    assert results(machine)["units"].status == doctor.UNKNOWN


@pytest.mark.parametrize(
    ("table", "status", "detail"),
    [
        (dmar_table(), MISSING, "the table has no unit"),
        (dmar_table(drhd(0xFED9_0000), drhd(0)), MISSING,
         "the unit at 0x40 has register base 0: Linux drives no unit of such a table"),
        (dmar_table(drhd(0xFED9_0000), bytes(8)), OK,
         "there, and no driver has the units; 8 bytes behind the last structure: Linux takes it"),
    ],
)  # fmt: skip
def test_what_linux_does_with_the_firmwares_table(
    machine: Machine, table: bytes, status: str, detail: str
) -> None:
    Path(machine.path("dev/mem")).unlink()
    machine.write("sys/firmware/acpi/tables/DMAR", table)
    found = results(machine)
    assert (found["DMAR"].status, found["DMAR"].detail) == (status, detail)
    assert ("dmar0" in found) == (status == OK)
    assert "units" not in found


@pytest.mark.parametrize(
    ("files", "detail"),
    [
        ({"1048576kB/nr_hugepages": "64"}, "64 of 1 GiB"),
        ({"2048kB/nr_overcommit_hugepages": "4096"}, "4096 of 2 MiB on demand"),
        ({"2048kB/nr_hugepages": "8", "1048576kB/nr_hugepages": "2",
          "1048576kB/nr_overcommit_hugepages": "1"},
         "8 of 2 MiB, 2 of 1 GiB, 1 of 1 GiB on demand"),
        ({}, None),
    ],
)  # fmt: skip
def test_huge_pages_of_every_size(
    machine: Machine, files: dict[str, str], detail: str | None
) -> None:
    base = "sys/kernel/mm/hugepages"
    machine.write(f"{base}/hugepages-2048kB/nr_hugepages", "0")
    for name, text in files.items():
        machine.write(f"{base}/hugepages-{name}", text)
    found = results(machine)["huge pages"]
    assert (found.status, found.detail) == (
        (WARNING, "none are reserved: no region on hugetlbfs") if detail is None else (OK, detail)
    )


@pytest.mark.parametrize(
    ("word", "detail"),
    [
        ("memmap=64G28G", "the kernel takes it for memmap=64G, and uses no memory above 64G"),
        (r"memmap=64G\$128G", "the kernel takes it for memmap=64G, and uses no memory above 64G"),
        ("memmap=%128G", "the kernel ignores it"),
        ("memmap=1G%4G-1x", "the kernel ignores it for 'x' behind it"),
        ("'memmap=64G$128G'", "to the kernel this is no memmap="),
    ],
)
def test_a_misspelt_memmap_is_shown(machine: Machine, word: str, detail: str) -> None:
    machine.write("proc/cmdline", f"ro {word} pkernfs=64G!128G")
    found = results(machine)["memmap="]
    assert (found.status, found.detail) == (WARNING, f"{word}: {detail}")


@pytest.mark.parametrize(
    ("release", "more", "warned"),
    [("6.8.0", "", True), ("6.1.85", "", True), ("6.2.0", "", False), ("6.10.0", "", False),
     ("6.8.0", " nokaslr", False)],
)  # fmt: skip
def test_an_efi_stub_that_ignores_memmap(
    machine: Machine, release: str, more: str, warned: bool
) -> None:
    machine.write("proc/sys/kernel/osrelease", release)
    machine.write("proc/cmdline", f"memmap=512M%1G{more}")
    assert results(machine)["KASLR"].status == OK
    machine.write("sys/firmware/efi/fw_platform_size", "64")
    assert results(machine)["KASLR"].status == (WARNING if warned else OK)


@pytest.mark.parametrize(
    ("line", "kind", "iomem", "status", "detail", "remedy"),
    [
        ("", "Soft Reserved", "", OK,
         "soft-reserved by the firmware's memory map, which a kexec passes on", ""),
        ("efi_fake_mem=512M@1G:0x40000", "System RAM", "Soft Reserved", WARNING,
         "efi_fake_mem= keeps it from this kernel, and a kexec does not pass that on",
         "memmap=512M%1G-1+0xefffffff"),
        ("", "System RAM", "Soft Reserved", WARNING,
         "something that is neither in the firmware's map nor on the command line keeps it from",
         "memmap=512M%1G-1+0xefffffff"),
    ],
)  # fmt: skip
def test_what_keeps_a_region_from_the_next_kernel(
    machine: Machine, line: str, kind: str, iomem: str, status: str, detail: str, remedy: str
) -> None:
    machine.write("proc/cmdline", f"{line} pkernfs=512M!1G modprobe.blacklist=kmem")
    if iomem:
        machine.write("proc/iomem", f"40000000-5fffffff : {iomem}\n")
    if kind != "System RAM":
        machine.write("sys/firmware/memmap/1/type", kind)
    found = results(machine)
    result = found["512M!1G, next kernel"]
    assert result.status == status
    assert result.detail.startswith(detail)
    assert result.remedy.startswith(remedy)
    assert "512M!1G, kmem" not in found
    machine.write("proc/cmdline", "memmap=512M%1G pkernfs=512M!1G")
    assert "512M!1G, next kernel" not in results(machine)


def test_a_mounted_region_without_a_name_counts_as_well(machine: Machine) -> None:
    machine.write("proc/cmdline", "modprobe.blacklist=kmem")
    machine.write("sys/firmware/memmap/1/type", "Soft Reserved")
    assert "512M!1G, next kernel" not in results(machine)
    mounts = "512M!1G /mnt/a fuse.pkernfs rw 0 0\n/dev/shm/r /mnt/b fuse.pkernfs rw 0 0\n"
    machine.write("proc/self/mounts", mounts)
    assert results(machine)["512M!1G, next kernel"].status == OK


@pytest.mark.parametrize(
    ("word", "modprobe", "option", "detail", "remedy"),
    [
        ("", "", "m", "nothing keeps the module kmem from it", "modprobe.blacklist=kmem"),
        ("", "blacklist kmem", "m", "/etc/modprobe.d/a.conf (blacklist kmem) keeps kmem from it; "
         "the next kernel's initrd may lack that", "modprobe.blacklist=kmem"),
        ("module_blacklist=kmem", "", "y", "module_blacklist=kmem keeps no kmem away that is bui",
         "dax_hmem.region_idle=1"),
    ],
)  # fmt: skip
def test_what_keeps_kmem_from_a_region(
    machine: Machine, word: str, modprobe: str, option: str, detail: str, remedy: str
) -> None:
    configure(machine, {**GOOD, "DEV_DAX_KMEM": option})
    machine.write("proc/cmdline", f"memmap=512M%1G-1+0xefffffff pkernfs=512M!1G {word}")
    machine.write("etc/modprobe.d/a.conf", modprobe)
    result = results(machine)["512M!1G, kmem"]
    assert result.detail.startswith(detail)
    assert (result.status, result.remedy) == (WARNING, remedy)


def test_what_is_not_known_is_not_there(machine: Machine) -> None:
    """Neither able nor unable, for the lack of a configuration, or of rights."""
    Path(machine.path("proc/config.gz")).unlink()
    found = results(machine)
    assert found["configuration"].status == found["kexec_load"].status == doctor.UNKNOWN
    for area in ("dma", "kexec"):
        here = [r for r in found.values() if r.area == area and r.name != "kexec-tools"]
        assert doctor.able(here, area) is None
    machine.write("sys/kernel/kexec_loaded", "0")  # it is there with kexec alone
    assert results(machine)["kexec_load"].status == OK
    configure(machine, GOOD)
    table = Path(machine.path("sys/firmware/acpi/tables/DMAR"))
    table.write_bytes(b"DMAR")
    assert results(machine)["DMAR"].status == doctor.UNKNOWN
    assert doctor.able(list(results(machine).values()), "dma") is None


@pytest.mark.parametrize(
    ("script", "status", "detail"),
    [
        (None, MISSING, "qemu-system-x86_64 not found"),
        ("echo error while loading >&2; exit 127", doctor.UNKNOWN, "does not tell its version"),
        (
            "echo QEMU emulator version 7.2.1",
            WARNING,
            "7.2.1 maps segments, but no file at an offset",
        ),
        ("echo QEMU emulator version 8.1.0", WARNING, "8.1.0 has no cpr-reboot"),
        ("echo QEMU emulator version 10.0.2", OK, "10.0.2"),
    ],
)
def test_qemu(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    script: str | None, status: str, detail: str,
) -> None:  # fmt: skip
    """One that cannot run is not one that is not there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        program = tmp_path / "qemu-system-x86_64"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    (found,) = doctor._check_qemu(machine, None)
    assert found.status == status
    assert detail in found.detail


@pytest.mark.parametrize(
    ("line", "lockdown", "remedy"),
    [
        ("quiet", "[none] integrity", "iomem=relaxed"),
        ("iomem=relaxed", "[none] integrity", "a kernel with CONFIG_DEVMEM=y"),
        ("quiet", "none [integrity]", "boot without lockdown=, secure boot off"),
    ],
)
def test_the_remedy_is_that_of_the_cause(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, line: str, lockdown: str, remedy: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    Path(machine.path("dev/mem")).unlink()
    machine.write("proc/cmdline", line)
    machine.write("sys/kernel/security/lockdown", lockdown)
    assert results(machine)["dmar0"].remedy == remedy


def test_neither_dev_mem_nor_dax(machine: Machine) -> None:
    Path(machine.path("dev/mem")).unlink()
    Path(machine.path("sys/bus/dax/devices/dax0.0/size")).unlink()
    Path(machine.path("sys/bus/dax/devices/dax0.0")).rmdir()
    assert not doctor.able(list(results(machine).values()), "region")


def test_the_configuration_is_found_elsewhere(machine: Machine) -> None:
    Path(machine.path("proc/config.gz")).unlink()
    assert kernel_image.running_config(machine) is None
    machine.write("boot/config-7.3.4-cloud-amd64", "CONFIG_KEXEC=y\n# CONFIG_DEVMEM is not set\n")
    assert kernel_image.running_config(machine) == {"KEXEC": "y"}
