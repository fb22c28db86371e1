"""Which physical ranges a region may have: every refusal, before anything is opened."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Span
from pkernfs.quantities import PhysAddr
from pkernfs.region.physical import check, memmap_parameter
from pkernfs.region.spec import parse_span
from support.made_up_host import FIRMWARE, IOMEM, make_machine

G = PhysAddr(1 << 30)
M = 1 << 20
RAM = "0x0-0x9fbff, 0x100000-0x7ffdffff, 0x100000000-0x17fffffff"


def refusal(spec: str, root: Path, **machine: object) -> str:
    with pytest.raises(RegionError) as caught:
        check(spec, parse_span(spec), make_machine(root, **machine))  # type: ignore[arg-type]
    assert caught.value.errno
    return str(caught.value)


def test_the_parameter_that_reserves_a_range() -> None:
    assert memmap_parameter(Span(PhysAddr(4 * G), G)) == "memmap=1G%4G"
    assert memmap_parameter(Span(G, 4 * G)) == "memmap=4G$1G"  # KASLR


# ------------------------------------------------------------------------------ good ranges


@pytest.mark.parametrize(
    ("spec", "line", "iomem"),
    [
        ("512M!1G", "memmap=512M%1G", IOMEM),
        ("256M!1280M", "memmap=512M%1G", IOMEM),
        ("512M!1G", "memmap=256M%1G memmap=256M%1280M", IOMEM),
        ("512M!1G", "memmap=1G$1G", IOMEM + "40000000-5fffffff : Reserved\n"),
        ("512M!1G", "memmap=512M%1G-1+2", IOMEM + "3ff00000-5fffffff : Reserved\n"),
        ("512M!1G", "memmap=512M%1G", IOMEM + "40000000-43ffffff : RAM buffer\n"),
        ("512M!1G", "memmap=512M@1G memmap=512M%1G", IOMEM),
    ],
)
def test_ranges_that_are_reserved(spec: str, line: str, iomem: str, tmp_path: Path) -> None:
    check(spec, parse_span(spec), make_machine(tmp_path, command_line=line, iomem=iomem))


def test_a_kernel_that_was_put_into_the_region(tmp_path: Path) -> None:
    inside = "5c200000-5f42ffff : System RAM\n  5c200000-5d36f05f : Kernel code\n"
    assert refusal("512M!1G", tmp_path, iomem=IOMEM + inside) == (
        "512M!1G: the running kernel was put into it, at 0x5c200000: what it held "
        "there is lost: boot with nokaslr, or load kernels with kexec -s, and choose a START below "
        "other memory"
    )


@pytest.mark.parametrize(
    ("loader", "efi", "more", "release", "remedy"),
    [
        ("208", True, "", "6.8.0", "load kernels with kexec -s, and choose a START below other "
                                   "memory"),
        ("113", True, "", "6.8.0", "boot with nokaslr (the EFI stub of some kernels ignores "
                                   "memmap=: fixed in 6.10)"),
        ("33", True, "", "6.12.5", "boot with nokaslr, or choose another START, if the EFI stub "
                                   "has put it there: with memmap= it takes the lowest memory that "
                                   "is large enough"),
        ("113", False, "", "6.12.5", "boot with nokaslr"),
        ("113", True, " nokaslr", "6.12.5", "choose another START"),
        ("?", True, "", "?", "boot with nokaslr (the EFI stub of some kernels ignores memmap=: "
                        "fixed in 6.10), or load kernels with kexec -s, and choose a START below "
                        "other memory"),
    ],
)  # fmt: skip
def test_a_kernel_was_put_there_by_kexec_or_at_boot(
    loader: str, efi: bool, more: str, release: str, remedy: str, tmp_path: Path
) -> None:
    """Documentation/arch/x86/boot.rst: loader 0xd is kexec. Nothing was there before a boot."""
    inside = "5c200000-5f42ffff : System RAM\n  5c200000-5d36f05f : Kernel code\n"
    line = f"memmap=512M%1G{more}"
    machine = make_machine(tmp_path, iomem=IOMEM + inside, command_line=line)
    machine.write("proc/sys/kernel/bootloader_type", f"{loader}\n")
    machine.write("proc/sys/kernel/osrelease", f"{release}\n")
    if efi:
        machine.write("sys/firmware/efi/fw_platform_size", "64\n")
    with pytest.raises(RegionError) as caught:
        check("512M!1G", parse_span("512M!1G"), machine)
    assert str(caught.value).endswith(f"there is lost: {remedy}")


SPOILT = [
    "memmap=64G28G", "'memmap=64G$128G'", r"memmap=64G\$128G", "memmap=64GB$128GB",
    "memmap=64GB%128G", "memmap=%128G", "memmap=64G%128G-1x",
]  # fmt: skip


@pytest.mark.parametrize("word", SPOILT)
def test_misspelt_ranges_are_shown_as_they_stand_there(word: str, tmp_path: Path) -> None:
    """By what the kernel makes of each: most of these are limits to it."""
    line = f"ro memmap=1M$4G,1M$5G {word}"
    assert refusal("512M!1G", tmp_path, command_line=line).endswith(
        f"boot with memmap=512M%1G on the kernel command line instead of {word}"
    )


def test_a_limit_is_no_misspelt_range(tmp_path: Path) -> None:
    """All above 512 MiB is given up by memmap=512M1G: the region is reserved by it."""
    check("512M!1G", parse_span("512M!1G"), make_machine(tmp_path, command_line="memmap=512M1G"))


@pytest.mark.parametrize(
    "line", ["quiet", "memmap=512M$1G", "memmap=512M%1G-1", "memmap=1M$512M,512M%1G-1"]
)
def test_memory_that_the_firmware_keeps_for_dax(tmp_path: Path, line: str) -> None:
    """The highest type counts, and -1 is of RAM only: kmem could take it at any time."""
    firmware = ((0, G - 1, "System RAM"), (G, 2 * G - 1, "Soft Reserved"))
    machine = make_machine(tmp_path, command_line=line, firmware=firmware)
    with pytest.raises(RegionError, match="the firmware keeps 0x40000000 for device-dax: use /dev"):
        check("512M!1G", parse_span("512M!1G"), machine)


def test_memory_that_the_firmware_keeps_for_dax_may_be_removed(tmp_path: Path) -> None:
    firmware = ((0, G - 1, "System RAM"), (G, 2 * G - 1, "Soft Reserved"))
    machine = make_machine(tmp_path, command_line="memmap=512M%1G", firmware=firmware)
    check("512M!1G", parse_span("512M!1G"), machine)


@pytest.mark.parametrize("at", ["20000000", "27e00000"])
def test_a_kernel_in_memory_that_is_not_reserved(at: str, tmp_path: Path) -> None:
    """KASLR puts it anywhere, so it says nothing of a region; the memmap= is what is missing."""
    inside = IOMEM.replace("  18800000-19601ef1", f"  {at}-28c01ef1")
    assert inside != IOMEM
    for spec, line, message in (
        ("512M!512M", "quiet", "not reserved: it is System RAM at 0x20000000: boot with "),
        ("768M!512M", "memmap=512M%1G", "not all of 0x20000000-0x4fffffff is reserved: "),
    ):
        root = tmp_path / spec
        root.mkdir()
        assert message in refusal(spec, root, command_line=line, iomem=inside)


@pytest.mark.parametrize("parameter", ["elfcorehdr=0x5f000000", "memmap=4G@4G"])
def test_the_crash_kernel_is_told_of_its_own_memory_only(parameter: str, tmp_path: Path) -> None:
    machine = make_machine(
        tmp_path,
        command_line=f"memmap=512M%1G {parameter}",
        firmware=((0, 0x9FFFF, "System RAM"), (0x60000000, 0x6FFFFFFF, "System RAM")),
    )
    check("512M!1G", parse_span("512M!1G"), machine)


def test_a_kernel_that_does_not_show_the_firmwares_map(tmp_path: Path) -> None:
    check("512M!1G", parse_span("512M!1G"), make_machine(tmp_path, firmware=()))


# ------------------------------------------------------------------------------ bad ones


@pytest.mark.parametrize(
    ("spec", "line", "message"),
    [
        (
            "512M!512M",
            "memmap=512M%1G",
            "512M!512M: not reserved: it is System RAM at 0x20000000: "
            "boot with memmap=512M%512M on the kernel command line",
        ),
        (
            "512M!1G",
            "pkernfs=512M!1G",
            "512M!1G: not reserved: no memmap= covers it at 0x40000000: "
            "boot with memmap=512M%1G on the kernel command line",
        ),
        (
            "768M!1G",
            "memmap=512M%1G",
            "768M!1G: not all of 0x40000000-0x6fffffff is reserved: memmap=512M%1G ends at "
            "0x60000000: boot with memmap=768M%1G on the kernel command line instead",
        ),
        (
            "768M!768M",
            "memmap=512M%1G",
            "768M!768M: not all of 0x30000000-0x5fffffff is reserved: memmap=512M%1G begins at "
            "0x40000000: boot with memmap=768M%768M on the kernel command line instead",
        ),
        (
            "1G!768M",
            "",
            "1G!768M: not reserved: it is System RAM at 0x30000000: "
            "boot with memmap=1G$768M on the kernel command line",
        ),
        (
            "512M!1G",
            "memmap=512M!1G",
            "512M!1G: memmap=512M!1G makes persistent memory of 0x40000000: "
            "boot with memmap=512M%1G on the kernel command line instead",
        ),
        (
            "512M!1G",
            "memmap=512M%1G-1+0xefffffff",
            "512M!1G: memmap=512M%1G-1+0xefffffff keeps 0x40000000 for device-dax: "
            "use /dev/daxX.Y (modprobe dax_hmem; modprobe device_dax)",
        ),
        (
            "512M!1536M",
            "memmap=512M%1536M",
            f"512M!1536M: no memory at 0x7ffe0000: the firmware reports Reserved there, "
            f"and memory at {RAM}",
        ),
        (
            "512M!100G",
            "memmap=512M%100G",
            f"512M!100G: no memory at 0x1900000000: the firmware reports nothing there, "
            f"and memory at {RAM}",
        ),
        (
            "256M!2816M",
            "memmap=512M%1G",
            f"256M!2816M: no memory at 0xb0000000: the firmware reports Reserved there, "
            f"and memory at {RAM}",
        ),
        (
            "256M!1536M",
            "memmap=768M%1G",
            "256M!1536M: 0x60000000-0x6fffffff is System RAM, although memmap= covers it: "
            "boot with memmap=256M%1536M as the last memmap=",
        ),
    ],
)
def test_ranges_that_are_not_free(spec: str, line: str, message: str, tmp_path: Path) -> None:
    assert refusal(spec, tmp_path, command_line=line) == message


@pytest.mark.parametrize(
    "claim",
    [
        "40000000-4fffffff : dax0.0",
        "50000000-500fffff : 0000:00:05.0",
        "5ff00000-600fffff : Crash kernel",
        "00000000-7fffffff : PCI Bus 0000:00",
    ],
)
def test_a_range_that_something_has_claimed(claim: str, tmp_path: Path) -> None:
    message = refusal("512M!1G", tmp_path, iomem=IOMEM + claim + "\n")
    span, name = claim.split(" : ")
    start, end = (int(n, 16) for n in span.split("-"))
    where = f"{max(start, G):#x}-{min(end, G + 512 * M - 1):#x}"
    assert message == (
        f"512M!1G: {where} is claimed by {name!r} (/proc/iomem): choose another START"
    )


def test_iomem_without_leave_to_see_it(tmp_path: Path) -> None:
    masked = "00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n"
    message = refusal("512M!1G", tmp_path, iomem=masked)
    assert message == ("512M!1G: /proc/iomem shows no addresses: root is needed (CAP_SYS_ADMIN)")


def test_no_iomem(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    (tmp_path / "proc/iomem").unlink()
    with pytest.raises(RegionError) as caught:
        check("512M!1G", parse_span("512M!1G"), machine)
    assert caught.value.errno == errno.ENOENT
    assert str(caught.value).startswith("512M!1G: cannot read /proc/iomem: ")


def test_the_samples_are_what_they_are_meant_to_be() -> None:
    assert len(FIRMWARE) == 5
    assert "3fffffff : System RAM" in IOMEM
    assert "60000000-7ffdffff : System RAM" in IOMEM
