"""Which physical ranges a region may have: every refusal, before anything is opened."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Span, check, memmap_parameter, nodes_of, parse_span
from pkernfs.region.spec import is_file_spec, resolve
from support.made_up_host import FIRMWARE, IOMEM, make_machine

G = 1 << 30
M = 1 << 20
RAM = "0x0-0x9fbff, 0x100000-0x7ffdffff, 0x100000000-0x17fffffff"


def refusal(spec: str, root: Path, **machine: object) -> str:
    with pytest.raises(RegionError) as caught:
        check(spec, parse_span(spec), make_machine(root, **machine))  # type: ignore[arg-type]
    assert caught.value.errno
    return str(caught.value)


# ------------------------------------------------------------------------------ specs


def test_specs_have_one_form() -> None:
    for spec in ("1G!4G", "1024M!4G", "0x40000000!0x100000000", "1048576k!4096m"):
        assert str(parse_span(spec)) == "1G!4G"
    assert str(parse_span("1026M!2M")) == "1026M!2M"
    assert parse_span("2M!1T") == Span(1 << 40, 2 * M)
    assert memmap_parameter(Span(4 * G, G)) == "memmap=1G%4G"
    assert memmap_parameter(Span(G, 4 * G)) == "memmap=4G$1G"  # KASLR


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("1G!1Z", "1G!1Z: bad region: expected SIZE!START, as in 1G!4G"),
        ("1GB!1G", "1GB!1G: bad region: expected SIZE!START, as in 1G!4G"),
        ("08!1G", "08!1G: bad region: expected SIZE!START, as in 1G!4G"),
        ("0!1G", "0!1G: bad size: got 0"),
        ("1M!1G", "1M!1G: bad size: got 0x100000, expected a multiple of 2 MiB (0x200000)"),
        (
            "1G!1025M",
            "1G!1025M: bad start: got 0x40100000, expected a multiple of 2 MiB (0x200000)",
        ),
        (
            "1G!4P",
            "1G!4P: beyond the last physical address: got 0x1000003fffffff, expected below 2^52",
        ),
        (
            "15E!15E",
            "15E!15E: beyond the last physical address: "
            "got 0x1dfffffffffffffff, expected below 2^52",
        ),
    ],
)
def test_specs_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(RegionError) as caught:
        parse_span(spec)
    assert str(caught.value) == message


def test_what_a_spec_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    machine = make_machine(tmp_path / "root")
    assert resolve("none", machine) == "512M!1G"
    assert resolve("1024M!0x100000000", machine) == "1G!4G"
    assert resolve("region", machine) == str(tmp_path / "region")
    assert resolve("./1G!1G", machine) == str(tmp_path / "1G!1G")
    for spec in ("none", "none:a", "1G!1G", "9!9", "/dev/dax0.0", "1G!1G,1G!4G"):
        assert not is_file_spec(spec)
    for spec in ("region", "./none", "a!b", "/dev/shm/region", "./1G!1G", "a,b"):
        assert is_file_spec(spec)
    for spec in ("1G!1G,1G!4G", "/dev/dax0.0,/dev/dax1.0"):
        with pytest.raises(RegionError, match="several ranges"):
            resolve(spec, machine)


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
        "512M!1G: the running kernel was put into it, at 0x5c200000: what it held is lost: "
        "load kernels with kexec -s, and choose a START below other memory"
    )


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


# ------------------------------------------------------------------------------ NUMA


def apic(domain: int, enabled: int = 1) -> bytes:
    return struct.pack(
        "<BBBBIB3sI", 0, 16, domain & 0xFF, 0, enabled, 0, (domain >> 8).to_bytes(3, "little"), 0
    )


def memory(domain: int, start: int, size: int, enabled: int = 1) -> bytes:
    return struct.pack("<BBIHQQIIQ", 1, 40, domain, 0, start, size, 0, enabled, 0)


def x2apic(domain: int, enabled: int = 1) -> bytes:
    return struct.pack("<BBHIIIII", 2, 24, 0, domain, 7, enabled, 0, 0)


def test_nodes(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    assert nodes_of(Span(G, G), machine) == []
    (tmp_path / "sys/devices/system/node/node0").mkdir(parents=True)
    assert nodes_of(Span(G, G), machine) == [0]
    (tmp_path / "sys/devices/system/node/node1").mkdir()
    assert nodes_of(Span(G, G), machine) == []
    table = bytes(48) + memory(3, 0, G) + memory(0x102, G, G) + memory(9, 2 * G, G, 0)
    table += apic(0x102) + x2apic(5, 0) + b"\x07\x04zz" + x2apic(3)
    machine.write("sys/firmware/acpi/tables/SRAT", table)
    assert nodes_of(Span(0, 2 * M), machine) == [1]  # the second domain of a processor
    assert nodes_of(Span(G, 2 * M), machine) == [0]
    assert nodes_of(Span(G - 2 * M, 4 * M), machine) == [0, 1]
    assert nodes_of(Span(2 * G, 2 * M), machine) == []
    for end in range(48, len(table)):
        machine.write("sys/firmware/acpi/tables/SRAT", table[:end])
        nodes_of(Span(G, G), machine)


def test_the_samples_are_what_they_are_meant_to_be() -> None:
    assert len(FIRMWARE) == 5
    assert "3fffffff : System RAM" in IOMEM
    assert "60000000-7ffdffff : System RAM" in IOMEM
